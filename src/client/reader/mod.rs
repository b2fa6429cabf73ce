//! Reading: batches as they are stored, with credit, resumed where they ended when the connection breaks.

mod batch;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

pub use batch::{MessageBatch, Messages};

use super::config::GRPC_MESSAGE_BYTES_MAX;
use super::connection::{Backoff, Connection, Repeat, may_repeat};
use super::error::{ClientError, RetryClass, reason};
use super::message::StoredMessage;
use crate::wire::v1::read_service_client::ReadServiceClient;
use crate::wire::v1::{self, read_session_request as request, read_session_response as response, start_position::At};

/// Where reading begins, in each shard read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Start {
    /// The first message retained.
    #[default]
    Beginning,
    /// Only messages written after the reader was opened.
    New,
    /// This sequence.
    Sequence(u64),
    /// The first message appended at or after this time, in microseconds since the Unix epoch.
    TimeUs(u64),
    /// The last N messages of each shard, before filters.
    Last(u64),
    /// Where an earlier read of the stream ended.
    Cursor(Bytes),
}

impl From<Start> for v1::StartPosition {
    fn from(start: Start) -> Self {
        let at = match start {
            Start::Beginning => At::Beginning(v1::Beginning {}),
            Start::New => At::New(v1::New {}),
            Start::Sequence(s) => At::Sequence(s),
            Start::TimeUs(t) => At::TimeUs(t),
            Start::Last(n) => At::Last(n),
            Start::Cursor(c) => At::Cursor(c),
        };
        v1::StartPosition { at: Some(at) }
    }
}

/// A page of messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// In the order of each shard.
    pub messages: Vec<StoredMessage>,
    /// Where to go on.
    pub cursor: Bytes,
    /// Nothing more was stored when the answer was made.
    pub caught_up: bool,
    /// Of a local read: how recent the replicas are.
    pub freshness: Vec<v1::Freshness>,
}

/// What a reader meets.
#[derive(Debug, Clone)]
pub enum ReadEvent {
    /// Messages.
    Batch(MessageBatch),
    /// Everything that was committed has been read.
    CaughtUp {
        /// Next sequence of each shard, by index.
        tails: Vec<(u32, u64)>,
        /// Where reading goes on.
        cursor: Bytes,
        /// Of a local read: how recent the replicas are.
        freshness: Vec<v1::Freshness>,
    },
    /// Messages that were asked for are no longer retained.
    Truncated {
        /// Index of the shard in the stream.
        shard: u32,
        /// First sequence that is gone, inclusive.
        from: u64,
        /// Exclusive.
        to: u64,
    },
    /// Nothing happened for a while.
    Heartbeat {
        /// Next sequence of each shard, by index.
        tails: Vec<(u32, u64)>,
        /// Of a local read: how recent the replicas are.
        freshness: Vec<v1::Freshness>,
    },
}

#[derive(Debug, Clone)]
struct ReaderConfig {
    stream: String,
    start: Start,
    shards: Vec<u32>,
    filters: Vec<String>,
    stop_at_tail: bool,
    credit_messages: u64,
    credit_bytes: u64,
    retry_for: Duration,
    consistency: v1::Consistency,
}

/// Settings of a [`Reader`], made by [`Client::reader`](super::Client::reader).
#[derive(Debug)]
#[must_use = "nothing happens before `open`"]
pub struct ReaderBuilder {
    connection: Arc<Connection>,
    config: ReaderConfig,
}

impl ReaderBuilder {
    pub(super) fn new(connection: Arc<Connection>, stream: String, consistency: v1::Consistency) -> Self {
        ReaderBuilder {
            connection,
            config: ReaderConfig {
                stream,
                start: Start::Beginning,
                shards: Vec::new(),
                filters: Vec::new(),
                stop_at_tail: false,
                credit_messages: 1_000_000,
                credit_bytes: 16 << 20,
                retry_for: Duration::from_secs(60),
                consistency,
            },
        }
    }

    /// Where reading begins. Default: the first message retained.
    pub fn from(mut self, start: Start) -> Self {
        self.config.start = start;
        self
    }

    /// Reads these shards only. Default: all.
    pub fn shards(mut self, shards: impl IntoIterator<Item = u32>) -> Self {
        self.config.shards = shards.into_iter().collect();
        self
    }

    /// Reads messages whose subject matches one more filter, such as `orders.*.eu` or `orders.>`. Default: all.
    pub fn filter(mut self, filter: impl Into<String>) -> Self {
        self.config.filters.push(filter.into());
        self
    }

    /// Ends when everything that is stored has been read. Default: waits for more.
    pub fn stop_at_tail(mut self) -> Self {
        self.config.stop_at_tail = true;
        self
    }

    /// How much the server may send ahead. Default: 1,000,000 messages, 16 MiB. The reader's memory is bounded by it
    /// (and by one batch, 8 MiB).
    pub fn credit(mut self, messages: u64, bytes: u64) -> Self {
        self.config.credit_messages = messages.max(1);
        self.config.credit_bytes = bytes.max(1);
        self
    }

    /// How long a broken connection is tried again before reading fails. Default: 60 s.
    pub fn retry_for(mut self, time: Duration) -> Self {
        self.config.retry_for = time;
        self
    }

    /// Connects and begins.
    pub async fn open(self) -> Result<Reader, ClientError> {
        let retry_for = self.connection.config.retry_for;
        let mut reader = Reader {
            connection: self.connection,
            config: self.config,
            line: None,
            identity: None,
            cursor: None,
            next: BTreeMap::new(),
            current: Vec::new().into_iter(),
            gone_to: BTreeMap::new(),
            ended: false,
            caught_up: false,
            fruitless: 0,
        };
        reader.reopen(retry_for).await?;
        Ok(reader)
    }
}

/// Reads the messages of one stream, in the order of each shard.
///
/// When the connection breaks, the reader goes on after the last batch that it returned: no message is missed and
/// none comes twice. Every batch's checksums are verified.
///
/// ```no_run
/// use mainstem::client::{Client, ClientError, Start};
///
/// # async fn example() -> Result<(), ClientError> {
/// let client = Client::connect("127.0.0.1:7411").await?;
/// let mut reader = client.reader("orders").from(Start::Last(100)).filter("orders.*.eu").open().await?;
///
/// // One by one:
/// if let Some(message) = reader.next().await? {
///     println!("{}: {} bytes", message.sequence, message.payload.len());
/// }
///
/// // By batch, without copying anything:
/// while let Some(batch) = reader.next_batch().await? {
///     for (sequence, message) in &batch {
///         println!("{sequence}: {} {}", message.subject, message.payload.len());
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Reader {
    connection: Arc<Connection>,
    config: ReaderConfig,
    line: Option<Line>,
    /// Id and epoch of the stream, once known.
    identity: Option<(String, u64)>,
    /// Where reading goes on, once something was read.
    cursor: Option<Bytes>,
    /// Next sequence to be returned, per shard.
    next: BTreeMap<u32, u64>,
    /// What `next` has not returned of a batch.
    current: std::vec::IntoIter<StoredMessage>,
    /// Per shard, the end of the last range that was told to be gone.
    gone_to: BTreeMap<u32, u64>,
    ended: bool,
    /// Nothing was missing when the last frame came.
    caught_up: bool,
    /// Sessions in a row that ended without a frame.
    fruitless: u32,
}

/// Sessions that may end without a frame before reading fails: each costs a connection.
const FRUITLESS_MAX: u32 = 20;

#[derive(Debug)]
struct Line {
    requests: mpsc::Sender<v1::ReadSessionRequest>,
    frames: Streaming<v1::ReadSessionResponse>,
    address: usize,
    /// Credit used and not yet given back.
    used: v1::ReadCredit,
}

fn lost(what: &str) -> ClientError {
    ClientError::local(Code::Unavailable, reason::CONNECTION_LOST, what).with_retry(RetryClass::DidNotHappen)
}

fn positions(list: &[v1::ShardPosition]) -> Vec<(u32, u64)> {
    list.iter().map(|p| (p.shard, p.sequence)).collect()
}

impl Reader {
    /// The stream's immutable id, 32 hex digits.
    pub fn stream_id(&self) -> &str {
        self.identity.as_ref().map_or("", |(id, _)| id)
    }

    /// Where reading would go on, once something was read: give it to [`Start::Cursor`]. Counts whole batches: a batch
    /// of which [`Reader::next`] returned a part counts as read.
    pub fn cursor(&self) -> Option<&Bytes> {
        self.cursor.as_ref()
    }

    /// Next sequence to be read, per shard.
    pub fn positions(&self) -> &BTreeMap<u32, u64> {
        &self.next
    }

    /// The next message; `None` at the end, which only a reader with `stop_at_tail` has.
    pub async fn next(&mut self) -> Result<Option<StoredMessage>, ClientError> {
        loop {
            if let Some(message) = self.current.next() {
                return Ok(Some(message));
            }
            let Some(batch) = self.next_batch().await? else {
                return Ok(None);
            };
            self.current = batch
                .iter()
                .map(|(s, r)| batch.to_owned_message(s, &r))
                .collect::<Vec<_>>()
                .into_iter();
        }
    }

    /// The next messages; `None` at the end, which only a reader with `stop_at_tail` has.
    pub async fn next_batch(&mut self) -> Result<Option<MessageBatch>, ClientError> {
        loop {
            match self.next_event().await? {
                Some(ReadEvent::Batch(batch)) => return Ok(Some(batch)),
                Some(ReadEvent::CaughtUp { .. } | ReadEvent::Truncated { .. } | ReadEvent::Heartbeat { .. }) => {}
                None => return Ok(None),
            }
        }
    }

    /// The next thing that happens; `None` at the end, which only a reader with `stop_at_tail` has.
    pub async fn next_event(&mut self) -> Result<Option<ReadEvent>, ClientError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            let Some(line) = &mut self.line else {
                self.reopen(self.config.retry_for).await?;
                continue;
            };
            let address = line.address;
            let frame = match line.frames.message().await {
                Ok(Some(answer)) => {
                    self.fruitless = 0;
                    answer.frame
                }
                // An end before that is not the end of the stream.
                Ok(None) if self.config.stop_at_tail && self.caught_up => {
                    self.ended = true;
                    return Ok(None);
                }
                Ok(None) => {
                    self.line = None;
                    self.fruitless += 1;
                    if self.fruitless > FRUITLESS_MAX {
                        return Err(lost("the server ends every session at once"));
                    }
                    continue;
                }
                Err(status) => {
                    self.line = None;
                    let error = ClientError::from(status);
                    self.connection.move_on(address, &error);
                    if !may_repeat(&error, Repeat::Safe) {
                        return Err(error);
                    }
                    continue;
                }
            };
            match frame {
                Some(response::Frame::Batch(frame)) => {
                    self.caught_up = false;
                    if let Some(batch) = self.take_batch(frame)? {
                        return Ok(Some(ReadEvent::Batch(batch)));
                    }
                }
                Some(response::Frame::CaughtUp(caught)) => {
                    self.caught_up = true;
                    self.cursor = Some(caught.cursor.clone());
                    return Ok(Some(ReadEvent::CaughtUp {
                        tails: positions(&caught.tails),
                        cursor: caught.cursor,
                        freshness: caught.freshness,
                    }));
                }
                Some(response::Frame::Heartbeat(beat)) => {
                    return Ok(Some(ReadEvent::Heartbeat {
                        tails: positions(&beat.tails),
                        freshness: beat.freshness,
                    }));
                }
                Some(response::Frame::Truncated(gone)) => {
                    let next = self.next.entry(gone.shard).or_insert(gone.to);
                    *next = (*next).max(gone.to);
                    // What a repeated session tells again is not news.
                    let told = self.gone_to.entry(gone.shard).or_insert(0);
                    if *told < gone.to {
                        *told = gone.to;
                        return Ok(Some(ReadEvent::Truncated {
                            shard: gone.shard,
                            from: gone.from,
                            to: gone.to,
                        }));
                    }
                }
                Some(response::Frame::GoAway(away)) => {
                    let away = ClientError {
                        leader: away.addresses.first().cloned(),
                        ..ClientError::local(Code::Unavailable, reason::GO_AWAY, "the server asks to reconnect")
                    };
                    self.connection.move_on(address, &away);
                    self.line = None;
                }
                Some(response::Frame::Nodes(nodes)) => self.connection.take_nodes(&nodes.nodes),
                Some(response::Frame::Opened(_)) => {
                    return Err(ClientError::bad_answer("the server opened the session twice"));
                }
                // A frame of a newer version.
                None => {}
            }
        }
    }

    /// Checks a batch and gives its credit back. `None` if all of it has been returned before.
    fn take_batch(&mut self, frame: v1::ReadBatch) -> Result<Option<MessageBatch>, ClientError> {
        if let Some(line) = &mut self.line {
            line.used.messages += u64::from(frame.messages);
            line.used.bytes += frame.batch.len() as u64;
            // Often enough that the server never waits, and seldom enough to cost nothing.
            if line.used.messages >= self.config.credit_messages.div_ceil(4)
                || line.used.bytes >= self.config.credit_bytes.div_ceil(4)
            {
                let credit = v1::ReadSessionRequest {
                    frame: Some(request::Frame::Credit(line.used)),
                };
                // If the connection does not take it now, it is given with the next batch.
                if line.requests.try_send(credit).is_ok() {
                    line.used = v1::ReadCredit::default();
                }
            }
        }
        let mut batch = match MessageBatch::parse(frame) {
            Ok(batch) => batch,
            Err(e) => {
                // Reading on after damage would skip messages in silence.
                self.line = None;
                return Err(e);
            }
        };
        let next = self.next.entry(batch.shard).or_insert(0);
        batch.skip_below(*next);
        *next = (*next).max(batch.end());
        self.cursor = Some(batch.cursor.clone());
        Ok(Some(batch).filter(|b| !b.is_empty()))
    }

    /// Where a new session begins: after what was returned.
    fn resume_at(&self) -> Start {
        if let Some(cursor) = &self.cursor {
            return Start::Cursor(cursor.clone());
        }
        // Opened before, but nothing came yet: "new" or "the last N" must not be judged a second time.
        match self.next.values().min() {
            Some(&lowest) => Start::Sequence(lowest),
            None => self.config.start.clone(),
        }
    }

    async fn reopen(&mut self, retry_for: Duration) -> Result<(), ClientError> {
        let begun = Instant::now();
        let mut backoff = Backoff::new();
        let mut tried = 0;
        loop {
            let error = match self.open_once().await {
                Ok(()) => return Ok(()),
                Err(e) => e,
            };
            tried += 1;
            if !may_repeat(&error, Repeat::Safe) {
                return Err(error);
            }
            if tried < self.connection.choices() {
                continue;
            }
            let pause = backoff.next();
            if begun.elapsed() + pause >= retry_for {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn open_once(&mut self) -> Result<(), ClientError> {
        let connection = Arc::clone(&self.connection);
        let (address, channel) = connection.session_channel(&self.config.stream)?;
        let learning = channel.clone();
        let credit = v1::ReadCredit {
            messages: self.config.credit_messages,
            bytes: self.config.credit_bytes,
        };
        let open = v1::ReadOpen {
            namespace: connection.config.namespace.clone(),
            stream: self.config.stream.clone(),
            shards: self.config.shards.clone(),
            start: Some(self.resume_at().into()),
            filters: self.config.filters.clone(),
            credit: Some(credit),
            stop_at_tail: self.config.stop_at_tail,
            consistency: self.config.consistency.into(),
        };
        let opening = async {
            let (requests, receiver) = mpsc::channel(4);
            let first = v1::ReadSessionRequest {
                frame: Some(request::Frame::Open(open)),
            };
            requests.try_send(first).expect("the channel is empty");
            let mut client = ReadServiceClient::new(channel).max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX);
            let mut frames = client.read_session(ReceiverStream::new(receiver)).await?.into_inner();
            match frames.message().await?.and_then(|r| r.frame) {
                Some(response::Frame::Opened(opened)) => Ok((
                    Line {
                        requests,
                        frames,
                        address,
                        used: v1::ReadCredit::default(),
                    },
                    opened,
                )),
                Some(response::Frame::GoAway(away)) => Err(ClientError {
                    leader: away.addresses.first().cloned(),
                    ..lost(&format!("the server asks to reconnect: {}", away.reason))
                }),
                Some(
                    response::Frame::Batch(_)
                    | response::Frame::CaughtUp(_)
                    | response::Frame::Heartbeat(_)
                    | response::Frame::Truncated(_)
                    | response::Frame::Nodes(_),
                ) => Err(ClientError::bad_answer("the session did not begin with `opened`")),
                None => Err(lost("the server ended the session before it began")),
            }
        };
        let opened = match tokio::time::timeout(connection.config.call_timeout, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(lost("the server did not open the session")),
        };
        let (line, opened) = opened.map_err(|e| {
            connection.move_on(address, &e);
            connection.explain(e)
        })?;
        connection.answered(address);
        connection.learn(learning).await;
        match &self.identity {
            None => self.identity = Some((opened.stream_id, opened.epoch)),
            Some((id, epoch)) if *id == opened.stream_id && *epoch == opened.epoch => {}
            Some((id, _)) => {
                return Err(ClientError::local(
                    Code::FailedPrecondition,
                    "STREAM_REPLACED",
                    format!(
                        "the stream is not the one that was read: it was {id}, it is {}",
                        opened.stream_id
                    ),
                ));
            }
        }
        for position in &opened.positions {
            // What was returned before stays returned.
            self.next.entry(position.shard).or_insert(position.sequence);
        }
        self.caught_up = false;
        self.line = Some(line);
        Ok(())
    }
}
