//! One publish session: batches in, acks out, in order per shard, within a window. The session never holds more than
//! its window; a client that does not read its acks is not read from.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::Edge;
use super::status::Refusal;
use crate::base::RetryClass;
use crate::broker::ShardAccess;
use crate::broker::error::PublishError;
use crate::broker::ingest::{Item, Outcome, ReplyTo};
use crate::broker::validate::{check_expectation, validate_batch};
use crate::control::view::StreamView;
use crate::machine::{self, ItemOutcome};
use crate::model::limits::{BATCH_BYTES_MAX, SESSION_WINDOW_BATCHES_MAX};
use crate::wire::internal as pb;
use crate::wire::v1;
use crate::wire::v1::publish_session_request::Frame as In;
use crate::wire::v1::publish_session_response::Frame as Out;

/// What a client may send without having an answer.
pub const WINDOW_BATCHES: usize = SESSION_WINDOW_BATCHES_MAX;
/// Likewise, in bytes of encoded batches.
pub const WINDOW_BYTES: u64 = 16 << 20;
/// After `go_away`, how long batches that were already on their way are still taken.
const LINGER: Duration = Duration::from_millis(500);

type Output = mpsc::Sender<Result<v1::PublishSessionResponse, Status>>;

/// Serves one session until either side ends it.
pub async fn run(edge: Arc<Edge>, mut input: Streaming<v1::PublishSessionRequest>, output: Output) {
    let mut session = match open(&edge, &mut input).await {
        Ok(Some((session, opened))) => {
            if send(&output, Out::Opened(opened)).await.is_err() {
                return;
            }
            session
        }
        Ok(None) => return,
        Err(refusal) => {
            // The client may be gone; then nobody needs the error.
            let _ = output.send(Err(refusal.into_status())).await;
            return;
        }
    };
    let (reply_tx, mut replies) = mpsc::channel(WINDOW_BATCHES);
    let mut draining = edge.draining.clone();
    let mut addresses = edge.broker.view().watch_addresses();
    let mut told = false;
    let mut deadline: Option<tokio::time::Instant> = None;
    let mut reading = true;
    while reading || !session.in_flight.is_empty() {
        tokio::select! {
            biased;
            Some((tag, outcome)) = replies.recv() => {
                if send(&output, session.answer(tag, outcome)).await.is_err() {
                    return;
                }
                if let Some(leader) = session.news.take() {
                    let leaders = v1::ShardLeaders { leaders: vec![leader] };
                    if send(&output, Out::Leaders(leaders)).await.is_err() {
                        return;
                    }
                }
            }
            () = super::drained(&mut draining), if !told => {
                told = true;
                deadline = Some(tokio::time::Instant::now() + LINGER);
                let away = v1::PublishGoAway {
                    reason: "the node is stopping".into(),
                    addresses: edge.other_addresses(&session.stream.shards),
                };
                if send(&output, Out::GoAway(away)).await.is_err() {
                    return;
                }
            }
            Ok(()) = addresses.changed() => {
                let nodes = v1::ServerNodes { nodes: edge.nodes() };
                if send(&output, Out::Nodes(nodes)).await.is_err() {
                    return;
                }
            }
            () = until(deadline), if reading => reading = false,
            frame = input.message(), if reading => match frame {
                Ok(Some(v1::PublishSessionRequest { frame: Some(In::Batch(batch)) })) => {
                    let (shard, sequence) = (batch.shard, batch.producer_sequence);
                    if let Err(refusal) = session.take(batch, &reply_tx) {
                        edge.broker.metrics().refused(refusal.reason);
                        let frame = Out::Error(refusal.into_frame(shard, sequence));
                        if send(&output, frame).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(Some(v1::PublishSessionRequest { frame: Some(In::Open(_)) })) => {
                    let refusal = Refusal::bad_request("ALREADY_OPEN", "a session is opened once, by its first frame");
                    let _ = output.send(Err(refusal.into_status())).await;
                    return;
                }
                Ok(Some(v1::PublishSessionRequest { frame: None })) => {
                    let refusal = Refusal::bad_request(
                        "UNKNOWN_FRAME",
                        "the frame is neither `open` nor `batch`; this server may be older than the client",
                    );
                    let _ = output.send(Err(refusal.into_status())).await;
                    return;
                }
                Ok(None) => reading = false,
                Err(_) => return,
            },
        }
    }
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn send(output: &Output, frame: Out) -> Result<(), ()> {
    output
        .send(Ok(v1::PublishSessionResponse { frame: Some(frame) }))
        .await
        .map_err(|_| ())
}

struct Session {
    edge: Arc<Edge>,
    stream: Arc<StreamView>,
    producer: u64,
    epoch: u64,
    shards: HashMap<u32, ShardAccess>,
    next_tag: u64,
    /// By tag: shard, producer sequence, bytes.
    in_flight: BTreeMap<u64, (u32, u64, u64)>,
    bytes_in_flight: u64,
    /// Why a batch that was handed over empty was refused.
    void: HashMap<u64, Refusal>,
    /// By shard: the last term in which a batch was stored, and the node of the leader that was told.
    leaders: HashMap<u32, (u64, u64)>,
    /// A leader that was not told yet.
    news: Option<v1::ShardLeader>,
}

async fn open(
    edge: &Arc<Edge>,
    input: &mut Streaming<v1::PublishSessionRequest>,
) -> Result<Option<(Session, v1::PublishOpened)>, Refusal> {
    let first = match tokio::time::timeout(super::OPEN_PATIENCE, input.message()).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Ok(None) | Err(_)) => return Ok(None),
        Err(_) => {
            return Err(Refusal::bad_request(
                "NO_OPEN",
                "the session's first frame, `open`, did not come",
            ));
        }
    };
    let Some(In::Open(open)) = first.frame else {
        return Err(Refusal::bad_request(
            "NO_OPEN",
            "a session's first frame must be `open`",
        ));
    };
    if open.producer_id == Some(0) {
        return Err(Refusal::bad_request(
            "BAD_PRODUCER",
            "a producer id is 1 or more; leave it out to be given one",
        ));
    }
    let stream = edge.stream(&open.namespace, &open.stream).await?;
    // Random, not counted: ids given by different nodes must not meet.
    let producer = open
        .producer_id
        .unwrap_or_else(|| rand::random_range(1..=u64::MAX >> 1));
    let epoch = open.producer_epoch.unwrap_or(1).max(1);
    let mut last = BTreeMap::new();
    if open.producer_id.is_some() {
        for access in edge.broker.shards_of(&stream, &[])? {
            edge.broker.barrier(&access).await?;
            if let Some(sequence) = edge.broker.last_producer_sequence(&access, producer, epoch).await? {
                last.insert(access.place.index, sequence);
            }
        }
    }
    let leaders: Vec<_> = stream.shards.iter().filter_map(|place| edge.leader_of(place)).collect();
    let opened = v1::PublishOpened {
        node_id: edge.facts.node_id,
        stream_id: stream.id.to_string(),
        epoch: stream.epoch.get(),
        spec: Some(stream.spec.clone()),
        map: Some(v1::ShardMap::from(&stream.map)),
        producer_id: producer,
        producer_epoch: epoch,
        window: Some(v1::PublishWindow {
            batches: u32::try_from(WINDOW_BATCHES).unwrap_or(u32::MAX),
            bytes: WINDOW_BYTES,
        }),
        batch_bytes_max: u32::try_from(BATCH_BYTES_MAX).unwrap_or(u32::MAX),
        last_producer_sequence: last,
        leaders: leaders.clone(),
    };
    let session = Session {
        edge: edge.clone(),
        stream,
        producer,
        epoch,
        shards: HashMap::new(),
        next_tag: 0,
        in_flight: BTreeMap::new(),
        bytes_in_flight: 0,
        void: HashMap::new(),
        leaders: leaders.iter().map(|l| (l.shard, (0, l.node_id))).collect(),
        news: None,
    };
    Ok(Some((session, opened)))
}

impl Session {
    /// Takes a batch: checks it and hands it to its shard. What is refused here was not processed.
    ///
    /// A batch that cannot work uses up its producer number, so that those behind it can go on: it goes through the
    /// log as an empty one, and its answer is the refusal.
    fn take(&mut self, mut batch: v1::PublishBatch, replies: &mpsc::Sender<(u64, Outcome)>) -> Result<(), Refusal> {
        let refusal = match self.check(&batch) {
            Ok(()) => None,
            Err(refusal) if refusal.retry == RetryClass::CannotWork && batch.producer_sequence > 0 => {
                batch.batch = Bytes::new();
                batch.expect = None;
                Some(refusal)
            }
            Err(refusal) => return Err(refusal),
        };
        let handed = self.hand_over(batch, replies);
        match (handed, refusal) {
            (Ok(tag), Some(refusal)) => {
                self.void.insert(tag, refusal);
                Ok(())
            }
            (Ok(_), None) => Ok(()),
            (Err(_), Some(refusal)) => Err(refusal),
            (Err(e), None) => Err(e),
        }
    }

    fn check(&mut self, batch: &v1::PublishBatch) -> Result<(), Refusal> {
        let broker = &self.edge.broker;
        let bytes = batch.batch.len() as u64;
        if bytes > BATCH_BYTES_MAX as u64 {
            return Err(Refusal::bad_request(
                "BATCH_TOO_LARGE",
                format!("an encoded batch of {bytes} bytes is larger than the {BATCH_BYTES_MAX} that are allowed"),
            ));
        }
        if self.in_flight.len() >= WINDOW_BATCHES
            || (self.bytes_in_flight + bytes > WINDOW_BYTES && !self.in_flight.is_empty())
        {
            return Err(PublishError::Overloaded {
                what: "the session's window",
            }
            .into());
        }
        // The stream may have been edited or removed since the session opened.
        let current = broker.view().stream_by_id(self.stream.id);
        match current {
            Some(stream) if stream.state == v1::StreamState::Active => self.stream = stream,
            Some(_) | None => return Err(PublishError::Removed.into()),
        }
        validate_batch(&self.stream, batch.shard, batch.map_epoch, &batch.batch)?;
        if let Some(place) = self.stream.shards.get(batch.shard as usize) {
            broker.admit(place.group)?;
        }
        if let Some(expect) = &batch.expect {
            check_expectation(&self.stream, batch.shard, expect)?;
        }
        if batch.producer_sequence == 0 {
            return Err(Refusal::bad_request(
                "BAD_PRODUCER_SEQUENCE",
                "producer sequences start at 1 for each shard",
            ));
        }
        Ok(())
    }

    fn hand_over(&mut self, batch: v1::PublishBatch, replies: &mpsc::Sender<(u64, Outcome)>) -> Result<u64, Refusal> {
        let broker = &self.edge.broker;
        let bytes = batch.batch.len() as u64;
        let access = match self.shards.get(&batch.shard) {
            Some(access) => access.clone(),
            None => {
                let access = broker.shard(&self.stream, batch.shard)?;
                self.shards.insert(batch.shard, access.clone());
                access
            }
        };
        let permit = broker
            .publish_memory()
            .try_acquire(batch.batch.len())
            .ok_or(PublishError::Overloaded {
                what: "memory for publishes",
            })?;
        let tag = self.next_tag;
        self.next_tag += 1;
        self.in_flight
            .insert(tag, (batch.shard, batch.producer_sequence, bytes));
        self.bytes_in_flight += bytes;
        broker.submit(
            &access,
            Item {
                batch: batch.batch,
                producer: Some(pb::ProducerStamp {
                    producer_id: self.producer,
                    epoch: self.epoch,
                    sequence: batch.producer_sequence,
                }),
                expect: batch.expect,
                permit,
                relayed: false,
                reply: ReplyTo {
                    tag,
                    submitted: Instant::now(),
                    channel: replies.clone(),
                },
            },
        );
        Ok(tag)
    }

    /// Another term may be another leader, of which the client is to be told. Nothing is looked up while terms stay.
    fn stored_in(&mut self, shard: u32, term: u64) {
        let told = self.leaders.entry(shard).or_default();
        if told.0 == term {
            return;
        }
        told.0 = term;
        let place = self.stream.shards.get(shard as usize);
        if let Some(leader) = place.and_then(|place| self.edge.leader_of(place))
            && leader.node_id != told.1
        {
            told.1 = leader.node_id;
            self.news = Some(leader);
        }
    }

    /// The frame that answers a batch.
    fn answer(&mut self, tag: u64, outcome: Outcome) -> Out {
        let (shard, producer_sequence, bytes) = self.in_flight.remove(&tag).unwrap_or_default();
        self.bytes_in_flight -= bytes;
        let void = self.void.remove(&tag);
        let error = match outcome {
            Ok(ItemOutcome::Stored(stored)) => {
                self.stored_in(shard, stored.term.get());
                return Out::Ack(v1::BatchAck {
                    shard,
                    producer_sequence,
                    first: Some(stored.first.get()),
                    last: Some(stored.last.get()),
                    tail: stored.tail.get(),
                    term: stored.term.get(),
                    append_time_us: stored.append_time.get(),
                    duplicates: stored.duplicates.iter().map(|d| d.position).collect(),
                    duplicate: stored.whole_duplicate,
                    durability: v1::Durability::QuorumSynced.into(),
                });
            }
            Ok(ItemOutcome::AllDuplicates(item)) => {
                return Out::Ack(v1::BatchAck {
                    shard,
                    producer_sequence,
                    first: None,
                    last: None,
                    tail: item.tail.get(),
                    term: item.term.get(),
                    append_time_us: item.append_time.get(),
                    duplicates: item.duplicates.iter().map(|d| d.position).collect(),
                    duplicate: item.whole_duplicate,
                    durability: v1::Durability::QuorumSynced.into(),
                });
            }
            Ok(ItemOutcome::Refused(machine)) => match (machine, void) {
                (machine::Refusal::BadBatch, Some(refusal)) => {
                    return Out::Error(refusal.into_frame(shard, producer_sequence));
                }
                (machine, _) => PublishError::Refused(machine),
            },
            Err(e) => e,
        };
        Out::Error(Refusal::from(error).into_frame(shard, producer_sequence))
    }
}
