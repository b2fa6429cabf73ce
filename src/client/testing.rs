//! A peer for the tests of the client: it speaks the protocol over a real connection, keeps messages in memory, and
//! misbehaves on request. It is no server: nothing of it is durable, and it knows one stream.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::model::{BatchView, ShardMap};
use crate::wire::v1;
use crate::wire::v1::publish_service_server::{PublishService, PublishServiceServer};
use crate::wire::v1::read_service_server::{ReadService, ReadServiceServer};
use crate::wire::v1::{publish_session_request as pub_in, publish_session_response as pub_out};
use crate::wire::v1::{read_session_request as read_in, read_session_response as read_out};

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What to do with the next batch instead of storing and acknowledging it.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    None,
    /// Answers with this, storing nothing.
    Refuse {
        reason: &'static str,
        code: Code,
        retry: v1::RetryClass,
    },
    /// Refuses and remembers the number as used up.
    Reject {
        reason: &'static str,
    },
    /// Stores it, and breaks the session before the ack.
    StoreAndBreak,
    /// Breaks the session, storing nothing.
    Break,
    /// Asks to go away, then stores and acknowledges.
    GoAway,
    /// Stores it and says that the outcome is unknown.
    StoreAndDoubt,
    /// Never answers.
    Silence,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) shards: Vec<Vec<StoredBatch>>,
    producers: HashMap<(u64, u64, u32), Producer>,
    pub(crate) faults: VecDeque<Fault>,
    /// Sessions are refused with this.
    pub(crate) refuse_open: Option<(Code, &'static str)>,
    pub(crate) sessions: u64,
    /// Batches received.
    pub(crate) batches: u64,
    next_producer: u64,
    window: v1::PublishWindow,
    /// The reader's session breaks after so many frames.
    pub(crate) break_reads_after: Option<usize>,
    pub(crate) stop_reads_for_credit: u64,
    /// Acknowledge without looking or keeping.
    pub(crate) forget: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct StoredBatch {
    pub(crate) base: u64,
    pub(crate) bytes: Bytes,
    pub(crate) messages: u32,
}

#[derive(Debug, Default)]
struct Producer {
    last: u64,
    answers: HashMap<u64, pub_out::Frame>,
}

/// The running peer. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peer {
    pub(crate) async fn start(shards: u32) -> Self {
        let state = Arc::new(Mutex::new(State {
            shards: vec![Vec::new(); shards as usize],
            window: v1::PublishWindow {
                batches: 8,
                bytes: 1 << 20,
            },
            ..State::default()
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("bound");
        let service = Service {
            state: Arc::clone(&state),
            shards,
        };
        let server = tonic::transport::Server::builder()
            .add_service(PublishServiceServer::new(service.clone()).max_decoding_message_size(16 << 20))
            .add_service(ReadServiceServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { server.await.expect("serves") });
        Peer { address, state, task }
    }

    pub(crate) fn client(&self) -> super::Client {
        super::Client::new(super::ClientConfig::new([self.address.to_string()])).expect("a good address")
    }

    /// Subject and payload of every message stored, per shard, in order.
    pub(crate) fn stored(&self) -> Vec<Vec<(String, Bytes)>> {
        let state = self.state.lock();
        let decode = |b: &StoredBatch| {
            let view = BatchView::parse(b.bytes.clone()).expect("valid");
            let records = view.records().map(|r| {
                let r = r.expect("valid");
                (r.subject.to_owned(), Bytes::copy_from_slice(r.payload))
            });
            records.collect::<Vec<_>>()
        };
        state
            .shards
            .iter()
            .map(|s| s.iter().flat_map(decode).collect())
            .collect()
    }
}

#[derive(Debug, Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    shards: u32,
}

enum Turn {
    Answer(pub_out::Frame),
    Away(pub_out::Frame),
    Break,
    Nothing,
}

impl State {
    /// As after a long time in which nothing was published.
    pub(crate) fn forget_producers(&mut self) {
        self.producers.clear();
    }

    /// What the real server does: a number is applied once, a repeated one gets its first answer, a gap is refused.
    fn take(&mut self, producer: (u64, u64), batch: v1::PublishBatch) -> Turn {
        self.batches += 1;
        let fault = self.faults.pop_front().unwrap_or(Fault::None);
        let sequence = batch.producer_sequence;
        let error = |reason: &str, code: Code, retry: v1::RetryClass| {
            pub_out::Frame::Error(v1::BatchError {
                shard: batch.shard,
                producer_sequence: sequence,
                code: code as i32,
                reason: reason.to_owned(),
                message: "on request".to_owned(),
                retry: retry as i32,
                ..v1::BatchError::default()
            })
        };
        if sequence != 1 && !self.producers.contains_key(&(producer.0, producer.1, batch.shard)) {
            let code = Code::FailedPrecondition;
            return Turn::Answer(error("UNKNOWN_PRODUCER", code, v1::RetryClass::MayHaveHappened));
        }
        let known = self.producers.entry((producer.0, producer.1, batch.shard)).or_default();
        match fault {
            Fault::Break => return Turn::Break,
            Fault::Silence => return Turn::Nothing,
            Fault::Refuse { reason, code, retry } => return Turn::Answer(error(reason, code, retry)),
            Fault::None | Fault::Reject { .. } | Fault::StoreAndBreak | Fault::GoAway | Fault::StoreAndDoubt => {}
        }
        if sequence <= known.last {
            return Turn::Answer(known.answers.get(&sequence).cloned().expect("answers are kept"));
        }
        if sequence != known.last + 1 {
            return Turn::Answer(error(
                "OUT_OF_ORDER",
                Code::FailedPrecondition,
                v1::RetryClass::DidNotHappen,
            ));
        }
        known.last = sequence;
        if let Fault::Reject { reason } = fault {
            let answer = error(reason, Code::FailedPrecondition, v1::RetryClass::CannotWork);
            known.answers.insert(sequence, answer.clone());
            return Turn::Answer(answer);
        }
        if self.forget {
            let ack = v1::BatchAck {
                shard: batch.shard,
                producer_sequence: sequence,
                ..v1::BatchAck::default()
            };
            return Turn::Answer(pub_out::Frame::Ack(ack));
        }
        let view = BatchView::parse(batch.batch.clone()).expect("the client sends good batches");
        let stored = &mut self.shards[batch.shard as usize];
        let base = stored.last().map_or(1, |b| b.base + u64::from(b.messages));
        stored.push(StoredBatch {
            base,
            bytes: batch.batch.clone(),
            messages: view.len(),
        });
        let last = base + u64::from(view.len()) - 1;
        let ack = v1::BatchAck {
            shard: batch.shard,
            producer_sequence: sequence,
            first: Some(base),
            last: Some(last),
            tail: last + 1,
            durability: v1::Durability::QuorumSynced as i32,
            ..v1::BatchAck::default()
        };
        let again = pub_out::Frame::Ack(v1::BatchAck {
            duplicate: true,
            ..ack.clone()
        });
        known.answers.insert(sequence, again);
        match fault {
            Fault::StoreAndBreak => Turn::Break,
            Fault::GoAway => Turn::Away(pub_out::Frame::Ack(ack)),
            Fault::StoreAndDoubt => Turn::Answer(error(
                "TIMED_OUT",
                Code::DeadlineExceeded,
                v1::RetryClass::MayHaveHappened,
            )),
            Fault::None | Fault::Reject { .. } | Fault::Break | Fault::Silence | Fault::Refuse { .. } => {
                Turn::Answer(pub_out::Frame::Ack(ack))
            }
        }
    }
}

#[tonic::async_trait]
impl PublishService for Service {
    async fn publish(&self, _: Request<v1::PublishRequest>) -> Result<Response<v1::PublishResponse>, Status> {
        Err(Status::unimplemented("not in this peer"))
    }

    type PublishSessionStream = Frames<v1::PublishSessionResponse>;

    async fn publish_session(
        &self,
        request: Request<Streaming<v1::PublishSessionRequest>>,
    ) -> Result<Response<Self::PublishSessionStream>, Status> {
        let mut inbox = request.into_inner();
        let Some(pub_in::Frame::Open(open)) = inbox.message().await?.and_then(|r| r.frame) else {
            return Err(Status::invalid_argument("open first"));
        };
        let (opened, producer) = {
            let mut state = self.state.lock();
            if let Some((code, what)) = state.refuse_open {
                return Err(Status::new(code, what));
            }
            state.sessions += 1;
            state.next_producer += 1;
            let producer = (
                open.producer_id.unwrap_or(state.next_producer),
                open.producer_epoch.unwrap_or(1),
            );
            let map = ShardMap::even(self.shards).expect("a good number");
            let last = (0..self.shards)
                .filter_map(|s| state.producers.get(&(producer.0, producer.1, s)).map(|p| (s, p.last)))
                .collect();
            let opened = v1::PublishOpened {
                stream_id: format!("{:032x}", 7),
                epoch: 1,
                spec: Some(v1::StreamSpec::default()),
                map: Some(v1::ShardMap {
                    epoch: map.epoch(),
                    ranges: map
                        .ranges()
                        .iter()
                        .map(|r| v1::SlotRange {
                            first: r.first,
                            last: r.last,
                            shard: r.shard,
                        })
                        .collect(),
                }),
                producer_id: producer.0,
                producer_epoch: producer.1,
                window: Some(state.window),
                batch_bytes_max: 8 << 20,
                last_producer_sequence: last,
                ..v1::PublishOpened::default()
            };
            (opened, producer)
        };
        let (sender, receiver) = mpsc::channel(64);
        let answer = |frame| Ok(v1::PublishSessionResponse { frame: Some(frame) });
        sender.try_send(answer(pub_out::Frame::Opened(opened))).expect("room");
        let state = Arc::clone(&self.state);
        tokio::spawn(async move {
            while let Ok(Some(v1::PublishSessionRequest {
                frame: Some(pub_in::Frame::Batch(batch)),
            })) = inbox.message().await
            {
                let turn = state.lock().take(producer, batch);
                let sent = match turn {
                    Turn::Answer(frame) => sender.send(answer(frame)).await,
                    Turn::Away(frame) => {
                        let away = v1::PublishGoAway {
                            reason: "drain".to_owned(),
                            addresses: vec![],
                        };
                        let _ = sender.send(answer(pub_out::Frame::GoAway(away))).await;
                        sender.send(answer(frame)).await
                    }
                    Turn::Nothing => Ok(()),
                    Turn::Break => {
                        let _ = sender.send(Err(Status::unavailable("broken on request"))).await;
                        return;
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[tonic::async_trait]
impl ReadService for Service {
    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        Err(Status::unimplemented("not in this peer"))
    }

    async fn fetch(&self, _: Request<v1::FetchRequest>) -> Result<Response<v1::FetchResponse>, Status> {
        Err(Status::unimplemented("not in this peer"))
    }

    type ReadSessionStream = Frames<v1::ReadSessionResponse>;

    /// Sends what is stored of shard 0 and ends. The cursor is the next sequence.
    async fn read_session(
        &self,
        request: Request<Streaming<v1::ReadSessionRequest>>,
    ) -> Result<Response<Self::ReadSessionStream>, Status> {
        use v1::start_position::At;
        let mut inbox = request.into_inner();
        let Some(read_in::Frame::Open(open)) = inbox.message().await?.and_then(|r| r.frame) else {
            return Err(Status::invalid_argument("open first"));
        };
        let credit = open.credit.unwrap_or_default();
        let (batches, break_after) = {
            let mut state = self.state.lock();
            state.sessions += 1;
            (state.shards[0].clone(), state.break_reads_after)
        };
        let end = batches.last().map_or(1, |b| b.base + u64::from(b.messages));
        let from = match open.start.and_then(|s| s.at) {
            Some(At::Cursor(c)) => u64::from_le_bytes(c[..].try_into().expect("our cursor")),
            Some(At::Sequence(s)) => s,
            Some(At::New(_)) => end,
            Some(At::Last(n)) => end.saturating_sub(n).max(1),
            Some(At::Beginning(_) | At::TimeUs(_)) | None => 1,
        };
        let mut frames = vec![read_out::Frame::Opened(v1::ReadOpened {
            stream_id: format!("{:032x}", 7),
            epoch: 1,
            positions: vec![v1::ShardPosition {
                shard: 0,
                sequence: from,
            }],
        })];
        for b in batches.iter().filter(|b| b.base + u64::from(b.messages) > from) {
            let next = b.base + u64::from(b.messages);
            frames.push(read_out::Frame::Batch(v1::ReadBatch {
                base_sequence: b.base,
                batch: b.bytes.clone(),
                skip_below: Some(from).filter(|f| *f > b.base),
                messages: (next - from.max(b.base)) as u32,
                cursor: Bytes::copy_from_slice(&next.to_le_bytes()),
                ..v1::ReadBatch::default()
            }));
        }
        frames.push(read_out::Frame::CaughtUp(v1::CaughtUp {
            tails: vec![v1::ShardPosition {
                shard: 0,
                sequence: end,
            }],
            cursor: Bytes::copy_from_slice(&end.to_le_bytes()),
            freshness: Vec::new(),
        }));
        let (sender, receiver) = mpsc::channel(4);
        let state = Arc::clone(&self.state);
        tokio::spawn(async move {
            let mut left = credit;
            for (at, frame) in frames.into_iter().enumerate() {
                if break_after == Some(at) {
                    let _ = sender.send(Err(Status::unavailable("broken on request"))).await;
                    return;
                }
                if let read_out::Frame::Batch(b) = &frame {
                    while left.messages == 0 || left.bytes == 0 {
                        state.lock().stop_reads_for_credit += 1;
                        let Some(Ok(v1::ReadSessionRequest {
                            frame: Some(read_in::Frame::Credit(more)),
                        })) = inbox.next().await
                        else {
                            return;
                        };
                        left.messages += more.messages;
                        left.bytes += more.bytes;
                    }
                    left.messages = left.messages.saturating_sub(u64::from(b.messages));
                    left.bytes = left.bytes.saturating_sub(b.batch.len() as u64);
                }
                if sender
                    .send(Ok(v1::ReadSessionResponse { frame: Some(frame) }))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            if !open.stop_at_tail {
                sender.closed().await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
