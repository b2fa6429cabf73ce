//! One read session: credit in, batches out. It takes the next step only when there is credit, the frames before have
//! left and the node has memory for another; for a client that does not read, nothing more is read.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use tonic::{Status, Streaming};

use super::Edge;
use super::outgoing::{self, Room};
use super::read::{begin, consistency_of, filters_of};
use super::status::Refusal;
use crate::base::budget::BytePermit;
use crate::broker::ShardAccess;
use crate::broker::cursor::Cursor;
use crate::broker::error::ReadError;
use crate::broker::lookup::Consistency;
use crate::broker::reader::{Delivery, ShardReader, Step};
use crate::control::view::StreamView;
use crate::model::Sequence;
use crate::wire::v1;
use crate::wire::v1::read_session_request::Frame as In;
use crate::wire::v1::read_session_response::Frame as Out;

const HEARTBEAT: Duration = Duration::from_secs(5);
/// After this a session that waits for its client or for memory gives back what it has read ahead.
const IDLE: Duration = Duration::from_secs(1);

/// The leaders of a reader that catches up again and again are asked this often at the most.
const CONFIRM_EVERY: Duration = Duration::from_millis(100);
/// What they said counts for so long: while a reader reads what came meanwhile, it need not be asked again.
const CONFIRMED_FOR: Duration = Duration::from_secs(1);
/// When they cannot be asked, this is waited.
const CONFIRM_AGAIN: Duration = Duration::from_secs(1);

type Output = outgoing::Sender<Result<v1::ReadSessionResponse, Status>>;

struct Session {
    edge: Arc<Edge>,
    stream: Arc<StreamView>,
    accesses: Vec<ShardAccess>,
    consistency: Consistency,
    readers: Vec<(u32, ShardReader)>,
    /// The reader to begin the next round with, so that no shard starves another.
    turn: usize,
    messages: u64,
    bytes: u64,
    stop_at_tail: bool,
    /// For the batches that the readers have read ahead.
    ahead: Option<BytePermit>,
}

/// Why a session ended.
enum End {
    /// The client is gone or has what it asked for.
    Quiet,
    GoAway(v1::ReadGoAway),
    Refused(Box<Refusal>),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        End::Refused(Box::new(refusal))
    }
}

/// Serves one session until either side ends it.
pub async fn run(edge: Arc<Edge>, mut input: Streaming<v1::ReadSessionRequest>, output: Output) {
    let end = match open(&edge, &mut input, &output).await {
        Ok(mut session) => session.serve(&mut input, &output).await,
        Err(end) => end,
    };
    // The client may be gone; then nobody needs the last word.
    match end {
        End::Quiet => {}
        End::GoAway(away) => output.send_last(Ok(response(Out::GoAway(away)))),
        End::Refused(refusal) => output.send_last(Err(refusal.into_status())),
    }
}

fn response(frame: Out) -> v1::ReadSessionResponse {
    v1::ReadSessionResponse { frame: Some(frame) }
}

async fn send(output: &Output, frame: Out) -> Result<(), End> {
    output.send(Ok(response(frame)), None).await.map_err(|_| End::Quiet)
}

/// Ends the session of a client that takes nothing while others wait for the memory that it holds.
fn end_if_stalled(output: &Output) -> Result<(), End> {
    if !output.is_stalled() {
        return Ok(());
    }
    output.clear();
    let seconds = outgoing::STALLED.as_secs();
    Err(Refusal::from(ReadError::NotReading { seconds }).into())
}

async fn open(
    edge: &Arc<Edge>,
    input: &mut Streaming<v1::ReadSessionRequest>,
    output: &Output,
) -> Result<Session, End> {
    let first = match tokio::time::timeout(super::OPEN_PATIENCE, input.message()).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Ok(None) | Err(_)) => return Err(End::Quiet),
        Err(_) => {
            return Err(Refusal::bad_request("NO_OPEN", "the session's first frame, `open`, did not come").into());
        }
    };
    let Some(In::Open(open)) = first.frame else {
        return Err(Refusal::bad_request("NO_OPEN", "a session's first frame must be `open`").into());
    };
    let filters = filters_of(&open.filters)?;
    let consistency = consistency_of(open.consistency)?;
    let stream = edge.stream(&open.namespace, &open.stream).await?;
    let accesses = edge.broker.shards_of(&stream, &open.shards).map_err(Refusal::from)?;
    let starts = begin(edge, &stream, &accesses, open.start, consistency).await?;
    let readers: Vec<(u32, ShardReader)> = accesses
        .iter()
        .zip(&starts)
        .map(|(access, next)| {
            let reader = edge.broker.reader(access, *next, filters.clone());
            (access.place.index, reader.among(accesses.len()))
        })
        .collect();
    let credit = open.credit.unwrap_or_default();
    let opened = v1::ReadOpened {
        stream_id: stream.id.to_string(),
        epoch: stream.epoch.get(),
        positions: readers.iter().map(|(shard, r)| position(*shard, r.next())).collect(),
    };
    send(output, Out::Opened(opened)).await?;
    Ok(Session {
        edge: edge.clone(),
        stream,
        accesses,
        consistency,
        readers,
        turn: 0,
        messages: credit.messages,
        bytes: credit.bytes,
        stop_at_tail: open.stop_at_tail,
        ahead: None,
    })
}

fn position(shard: u32, sequence: Sequence) -> v1::ShardPosition {
    v1::ShardPosition {
        shard,
        sequence: sequence.get(),
    }
}

impl Session {
    async fn serve(&mut self, input: &mut Streaming<v1::ReadSessionRequest>, output: &Output) -> End {
        match self.try_serve(input, output).await {
            Ok(()) => End::Quiet,
            Err(end) => end,
        }
    }

    async fn try_serve(&mut self, input: &mut Streaming<v1::ReadSessionRequest>, output: &Output) -> Result<(), End> {
        let mut draining = self.edge.draining.clone();
        let mut addresses = self.edge.broker.view().watch_addresses();
        let mut told_caught_up = false;
        let mut last_sent = tokio::time::Instant::now();
        let mut confirm = Confirm::new(self.consistency);
        loop {
            if *draining.borrow() {
                return Err(self.go_away());
            }
            // A reader with much to read never gets to the wait below. One that takes nothing is not waited for.
            if output.has_place() && addresses.has_changed().is_ok_and(|changed| changed) {
                addresses.mark_unchanged();
                self.tell_nodes(output).await?;
            }
            let mut moved = false;
            if self.messages > 0 && self.bytes > 0 {
                // What has come of credit is taken without waiting, the rest below.
                moved = self.round(output).await?;
            }
            if moved {
                last_sent = tokio::time::Instant::now();
                told_caught_up = false;
                // New credit must not wait until everything stored is sent.
                while let Some(frame) = now_or_never(input) {
                    self.take(frame?)?;
                }
                continue;
            }
            let caught_up = self.is_caught_up();
            if caught_up && !told_caught_up {
                if confirm.is_confirmed() {
                    told_caught_up = true;
                    send(output, Out::CaughtUp(self.caught_up())).await?;
                    last_sent = tokio::time::Instant::now();
                    confirm.used();
                    if self.stop_at_tail {
                        return Ok(());
                    }
                    continue;
                }
                confirm.begin(&self.edge, &self.accesses);
            }
            let hungry = self.messages == 0 || self.bytes == 0;
            let mut changes: FuturesUnordered<_> = self.readers.iter_mut().map(|(_, r)| r.changed()).collect();
            let beat = last_sent + HEARTBEAT;
            tokio::select! {
                _ = changes.next(), if !hungry => {}
                result = confirm.wait() => {
                    drop(changes);
                    // Who only follows goes on, and is told later; who wants the end must know that it is one.
                    if let Err(e) = result && self.stop_at_tail {
                        return Err(Refusal::from(e).into());
                    }
                }
                frame = input.message() => {
                    drop(changes);
                    match frame {
                        Ok(Some(frame)) => self.take(frame)?,
                        // A client that has nothing more to grant may still want what it paid for.
                        Ok(None) if hungry => return Ok(()),
                        Ok(None) => return self.without_input(output).await,
                        Err(_) => return Ok(()),
                    }
                }
                () = tokio::time::sleep_until(beat) => {
                    drop(changes);
                    end_if_stalled(output)?;
                    let frame = v1::Heartbeat {
                        tails: self.tails(),
                        time_us: self.edge.broker.clock().now_us(),
                        freshness: self.freshness(),
                    };
                    send(output, Out::Heartbeat(frame)).await?;
                    last_sent = tokio::time::Instant::now();
                }
                () = super::drained(&mut draining) => {}
                Ok(()) = addresses.changed(), if output.has_place() => {
                    drop(changes);
                    self.tell_nodes(output).await?;
                }
                () = output.closed() => return Ok(()),
            }
        }
    }

    /// The client has closed its side: serve the credit that is left, then end.
    async fn without_input(&mut self, output: &Output) -> Result<(), End> {
        let mut draining = self.edge.draining.clone();
        let mut confirm = Confirm::new(self.consistency);
        while self.messages > 0 && self.bytes > 0 && !*draining.borrow() {
            if self.round(output).await? {
                continue;
            }
            if self.stop_at_tail {
                if confirm.is_confirmed() {
                    return send(output, Out::CaughtUp(self.caught_up())).await;
                }
                confirm.begin(&self.edge, &self.accesses);
            }
            let mut changes: FuturesUnordered<_> = self.readers.iter_mut().map(|(_, r)| r.changed()).collect();
            tokio::select! {
                _ = changes.next() => {}
                result = confirm.wait() => {
                    result.map_err(Refusal::from)?;
                }
                () = super::drained(&mut draining) => {}
                () = output.closed() => return Ok(()),
            }
        }
        Ok(())
    }

    async fn tell_nodes(&self, output: &Output) -> Result<(), End> {
        let nodes = self.edge.nodes();
        send(output, Out::Nodes(v1::ServerNodes { nodes })).await
    }

    fn is_caught_up(&self) -> bool {
        self.readers.iter().all(|(_, r)| r.next() >= r.positions().tail)
    }

    fn caught_up(&self) -> v1::CaughtUp {
        // As of when it caught up: more may have come since, which it has not sent.
        let tail = |r: &ShardReader| r.positions().tail.min(r.next());
        v1::CaughtUp {
            tails: self.readers.iter().map(|(s, r)| position(*s, tail(r))).collect(),
            cursor: self.cursor(),
            freshness: self.freshness(),
        }
    }

    /// Of a local read.
    fn freshness(&self) -> Vec<v1::Freshness> {
        match self.consistency {
            Consistency::Linearizable => Vec::new(),
            Consistency::Local => self.accesses.iter().filter_map(|a| self.edge.freshness(a)).collect(),
        }
    }

    fn take(&mut self, frame: v1::ReadSessionRequest) -> Result<(), End> {
        match frame.frame {
            Some(In::Credit(credit)) => {
                self.messages = self.messages.saturating_add(credit.messages);
                self.bytes = self.bytes.saturating_add(credit.bytes);
                Ok(())
            }
            Some(In::Open(_)) => {
                Err(Refusal::bad_request("ALREADY_OPEN", "a session is opened once, by its first frame").into())
            }
            None => Err(Refusal::bad_request(
                "UNKNOWN_FRAME",
                "the frame is neither `open` nor `credit`; this server may be older than the client",
            )
            .into()),
        }
    }

    fn go_away(&self) -> End {
        End::GoAway(v1::ReadGoAway {
            reason: "the node is stopping".into(),
            addresses: self.edge.other_addresses(&self.stream.shards),
            cursor: self.cursor(),
        })
    }

    /// Waits for a frame's memory, without holding any while it takes long.
    async fn room(&mut self, output: &Output) -> Result<Room, End> {
        let mut draining = self.edge.draining.clone();
        let mut room = std::pin::pin!(output.room());
        loop {
            tokio::select! {
                biased;
                room = &mut room => return room.map_err(|_| End::Quiet),
                () = super::drained(&mut draining) => return Err(self.go_away()),
                () = tokio::time::sleep(IDLE) => {
                    self.forget_ahead();
                    end_if_stalled(output)?;
                }
            }
        }
    }

    fn forget_ahead(&mut self) {
        for (_, reader) in &mut self.readers {
            reader.forget_ahead();
        }
        self.ahead = None;
    }

    /// Batches are kept read ahead only while more than half of the memory is free.
    fn account_ahead(&mut self) {
        let frugal = self.edge.read_memory.free() < self.edge.read_memory.limit() / 2;
        for (_, reader) in &mut self.readers {
            reader.set_frugal(frugal);
        }
        let bytes: usize = self.readers.iter().map(|(_, r)| r.ahead_bytes()).sum();
        let held = self.ahead.as_ref().map_or(0, BytePermit::bytes);
        if bytes == 0 {
            self.ahead = None;
        } else if bytes <= held {
            if let Some(permit) = &mut self.ahead {
                permit.shrink_to(bytes);
            }
        } else {
            let memory = &self.edge.read_memory;
            let more = (memory.free() >= memory.limit() / 2 + bytes - held)
                .then(|| memory.try_acquire(bytes - held))
                .flatten();
            match (more, &mut self.ahead) {
                (Some(more), Some(permit)) => permit.merge(more),
                (Some(more), None) => self.ahead = Some(more),
                (None, _) => self.forget_ahead(),
            }
        }
    }

    /// One step of each shard. True if anything was sent or skipped.
    async fn round(&mut self, output: &Output) -> Result<bool, End> {
        let mut moved = false;
        let count = self.readers.len();
        for n in 0..count {
            if self.messages == 0 || self.bytes == 0 {
                break;
            }
            let at = (self.turn + n) % count.max(1);
            if !self.readers.get(at).is_some_and(|(_, r)| r.has_more()) {
                continue;
            }
            let room = self.room(output).await?;
            let broker = self.edge.broker.clone();
            let Some((shard, reader)) = self.readers.get_mut(at) else {
                break;
            };
            let shard = *shard;
            let step = match reader.step(self.messages, self.bytes.min(room.bytes())).await {
                Ok(step) => step,
                Err(ReadError::Removed) => return Err(Refusal::from(ReadError::Removed).into()),
                Err(e) => return Err(Refusal::from(broker.noted(reader.shard(), e)).into()),
            };
            match step {
                Step::Deliver(delivery) => {
                    moved = true;
                    self.messages = self.messages.saturating_sub(delivery.messages);
                    self.bytes = self.bytes.saturating_sub(delivery.batch.len() as u64);
                    broker.metrics().read(delivery.messages, delivery.batch.len() as u64);
                    let frame = response(Out::Batch(frame_of(shard, delivery, self.cursor())));
                    self.account_ahead();
                    let room = output.fit(room, frame.encoded_len()).await.map_err(|_| End::Quiet)?;
                    output.send(Ok(frame), Some(room)).await.map_err(|_| End::Quiet)?;
                }
                Step::Skipped => moved = true,
                Step::Truncated { from, to } => {
                    moved = true;
                    drop(room);
                    let frame = v1::Truncated {
                        shard,
                        from: from.get(),
                        to: to.get(),
                    };
                    send(output, Out::Truncated(frame)).await?;
                }
                Step::AtTail(_) => {}
            }
        }
        self.turn = (self.turn + 1) % count.max(1);
        Ok(moved)
    }

    fn tails(&self) -> Vec<v1::ShardPosition> {
        self.readers
            .iter()
            .map(|(shard, r)| position(*shard, r.positions().tail))
            .collect()
    }

    fn cursor(&self) -> bytes::Bytes {
        Cursor {
            stream: self.stream.id,
            epoch: self.stream.epoch,
            next: self.readers.iter().map(|(shard, r)| (*shard, r.next())).collect(),
        }
        .encode()
    }
}

/// Asks the leaders of all shards whether there is more than the replicas read here have: without that, one that was cut
/// off, or slept, would take its own tail for the end.
struct Confirm {
    consistency: Consistency,
    /// Gives when it began to ask.
    asking: Option<BoxFuture<'static, Result<tokio::time::Instant, ReadError>>>,
    /// What was acknowledged before this is here.
    confirmed: Option<tokio::time::Instant>,
    not_before: tokio::time::Instant,
}

impl Confirm {
    fn new(consistency: Consistency) -> Self {
        Self {
            consistency,
            asking: None,
            confirmed: None,
            not_before: tokio::time::Instant::now(),
        }
    }

    /// The leaders have answered of late, and what they had then is here. Who stands at the tail has caught up.
    fn is_confirmed(&self) -> bool {
        self.consistency == Consistency::Local || self.confirmed.is_some_and(|at| at.elapsed() <= CONFIRMED_FOR)
    }

    /// It was told: the next time is another.
    fn used(&mut self) {
        self.confirmed = None;
        self.not_before = tokio::time::Instant::now() + CONFIRM_EVERY;
    }

    /// Asks, if that is not under way.
    fn begin(&mut self, edge: &Arc<Edge>, accesses: &[ShardAccess]) {
        if self.asking.is_some() {
            return;
        }
        let (edge, accesses, not_before) = (edge.clone(), accesses.to_vec(), self.not_before);
        self.asking = Some(Box::pin(async move {
            tokio::time::sleep_until(not_before).await;
            let begun = tokio::time::Instant::now();
            for access in &accesses {
                edge.broker.barrier(access).await?;
            }
            Ok(begun)
        }));
    }

    /// Waits for the answer; for ever, if nothing was asked. May be cancelled.
    async fn wait(&mut self) -> Result<(), ReadError> {
        let Some(asking) = &mut self.asking else {
            return std::future::pending().await;
        };
        let result = asking.await;
        self.asking = None;
        match result {
            Ok(begun) => {
                self.confirmed = Some(begun);
                Ok(())
            }
            Err(e) => {
                self.not_before = tokio::time::Instant::now() + CONFIRM_AGAIN;
                Err(e)
            }
        }
    }
}

fn frame_of(shard: u32, delivery: Delivery, cursor: bytes::Bytes) -> v1::ReadBatch {
    v1::ReadBatch {
        shard,
        base_sequence: delivery.base.get(),
        append_time_us: delivery.append_time.get(),
        term: delivery.term.get(),
        batch: delivery.batch,
        absent: delivery.absent,
        sequence_offsets: delivery.offsets,
        skip_below: delivery.skip_below.map(Sequence::get),
        messages: u32::try_from(delivery.messages).unwrap_or(u32::MAX),
        cursor,
    }
}

/// A frame that has already come, if any.
fn now_or_never(input: &mut Streaming<v1::ReadSessionRequest>) -> Option<Result<v1::ReadSessionRequest, End>> {
    use futures_util::FutureExt;
    match input.message().now_or_never()? {
        Ok(Some(frame)) => Some(Ok(frame)),
        // The end of the input is seen again by the next wait.
        Ok(None) => None,
        Err(_) => Some(Err(End::Quiet)),
    }
}
