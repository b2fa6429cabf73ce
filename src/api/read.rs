//! `ReadService`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use tonic::{Request, Response, Status, Streaming};

use super::outgoing::outgoing;
use super::status::Refusal;
use super::{Edge, SessionKind, read_session};
use crate::base::budget::{BytePermit, Held};
use crate::broker::ShardAccess;
use crate::broker::cursor::Cursor;
use crate::broker::error::ReadError;
use crate::broker::lookup::{Consistency, Found, Start};
use crate::broker::reader::{OwnedRecord, ShardReader, Step};
use crate::control::view::StreamView;
use crate::model::subject::FilterSet;
use crate::model::{Sequence, TimeUs};
use crate::wire::v1;
use crate::wire::v1::read_service_server::ReadService;

const FETCH_MESSAGES: u32 = 100;
const FETCH_MESSAGES_MAX: u32 = 1_000;
const FETCH_BYTES: u32 = 1 << 20;
const FETCH_BYTES_MAX: u32 = 8 << 20;
const FETCH_WAIT_MAX: Duration = Duration::from_secs(30);
/// Memory that a single read takes before it knows the size of what it finds.
const GET_BYTES: usize = 64 << 10;
/// What a message takes in an answer besides its payload and subject.
const MESSAGE_OVERHEAD: usize = 64;

/// The service.
pub struct Read {
    pub(super) edge: Arc<Edge>,
}

type Frames = Pin<Box<dyn Stream<Item = Result<v1::ReadSessionResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ReadService for Read {
    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        self.edge.accepting()?;
        let mut memory = self.memory(GET_BYTES)?;
        let answer = self.get_one(request.into_inner()).await?;
        let bytes = answer.encoded_len();
        self.fit(&mut memory, bytes)?;
        self.edge.broker.metrics().read(1, bytes as u64);
        Ok(holding(answer, memory))
    }

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<v1::FetchResponse>, Status> {
        self.edge.accepting()?;
        let (answer, memory) = self.fetch_page(request.into_inner()).await?;
        Ok(match memory {
            Some(memory) => holding(answer, memory),
            None => Response::new(answer),
        })
    }

    type ReadSessionStream = Frames;

    async fn read_session(
        &self,
        request: Request<Streaming<v1::ReadSessionRequest>>,
    ) -> Result<Response<Frames>, Status> {
        let place = self.edge.open_session(SessionKind::Read)?;
        let (output, frames) = outgoing(self.edge.read_memory.clone(), place);
        let session = read_session::run(self.edge.clone(), request.into_inner(), output);
        self.edge.tasks.spawn("read session", session);
        Ok(Response::new(Box::pin(frames)))
    }
}

/// An answer that holds memory until it is sent.
fn holding<T>(answer: T, memory: BytePermit) -> Response<T> {
    let mut response = Response::new(answer);
    response.extensions_mut().insert(Held::from(memory));
    response
}

/// A record in its decoded form.
pub fn message_of(shard: u32, sequence: Sequence, append_time: TimeUs, record: OwnedRecord) -> v1::StoredMessage {
    v1::StoredMessage {
        message: Some(v1::Message {
            subject: record.subject,
            payload: record.payload,
            headers: record
                .headers
                .into_iter()
                .map(|(name, value)| v1::Header { name, value })
                .collect(),
            key: record.key,
            message_id: record.message_id,
            event_time_us: record.event_time.map(TimeUs::get),
        }),
        shard,
        sequence: sequence.get(),
        append_time_us: append_time.get(),
    }
}

/// Filters of a request; none given means everything.
pub fn filters_of(filters: &[String]) -> Result<Option<FilterSet>, Refusal> {
    if filters.is_empty() {
        return Ok(None);
    }
    let set = FilterSet::parse(filters).map_err(|e| Refusal::bad_request("BAD_FILTER", e.to_string()))?;
    Ok((!set.is_all()).then_some(set))
}

/// What a request asks for; nothing said is linearizable.
pub fn consistency_of(asked: i32) -> Result<Consistency, Refusal> {
    match v1::Consistency::try_from(asked) {
        Ok(v1::Consistency::Unspecified | v1::Consistency::Linearizable) => Ok(Consistency::Linearizable),
        Ok(v1::Consistency::Local) => Ok(Consistency::Local),
        Err(_) => Err(Refusal::bad_request(
            "BAD_REQUEST",
            format!("consistency {asked} is not known: there are linearizable (1) and local (2)"),
        )),
    }
}

/// Where each shard begins.
pub async fn begin(
    edge: &Edge,
    stream: &StreamView,
    accesses: &[ShardAccess],
    start: Option<v1::StartPosition>,
    consistency: Consistency,
) -> Result<Vec<Sequence>, Refusal> {
    use v1::start_position::At;
    for access in accesses {
        edge.broker.ready(access, consistency).await?;
    }
    let start = match start.and_then(|s| s.at) {
        None | Some(At::Beginning(_)) => Start::Beginning,
        Some(At::New(_)) => Start::New,
        Some(At::Sequence(sequence)) => Start::Sequence(Sequence::new(sequence)),
        Some(At::TimeUs(time)) => Start::Time(TimeUs::new(time)),
        Some(At::Last(n)) => Start::Last(n),
        Some(At::Cursor(raw)) => {
            let cursor = Cursor::decode(&raw).map_err(|e| ReadError::BadCursor(e.to_owned()))?;
            if cursor.stream != stream.id || cursor.epoch != stream.epoch {
                return Err(ReadError::BadCursor(format!(
                    "it is of stream id {} epoch {}, stream {:?} has id {} epoch {} (was it made anew?)",
                    cursor.stream, cursor.epoch, stream.spec.name, stream.id, stream.epoch
                ))
                .into());
            }
            // A shard the cursor does not know begins at its floor.
            return Ok(accesses
                .iter()
                .map(|access| {
                    cursor
                        .next
                        .iter()
                        .find(|(index, _)| *index == access.place.index)
                        .map_or(access.positions().floor, |(_, next)| *next)
                })
                .collect());
        }
    };
    let mut out = Vec::with_capacity(accesses.len());
    for access in accesses {
        out.push(edge.broker.start_of(access, start).await?);
    }
    Ok(out)
}

impl Read {
    /// Memory for an answer; refused at once where there is none.
    fn memory(&self, bytes: usize) -> Result<BytePermit, Refusal> {
        let permit = self.edge.read_memory.try_acquire(bytes);
        permit.ok_or_else(|| ReadError::NoMemory.into())
    }

    /// Makes the memory that an answer holds as large as the answer.
    fn fit(&self, memory: &mut BytePermit, bytes: usize) -> Result<(), Refusal> {
        match bytes.checked_sub(memory.bytes()) {
            None => memory.shrink_to(bytes),
            Some(more) => memory.merge(self.memory(more)?),
        }
        Ok(())
    }

    async fn get_one(&self, request: v1::GetRequest) -> Result<v1::GetResponse, Refusal> {
        let broker = &self.edge.broker;
        let stream = self.edge.stream(&request.namespace, &request.stream).await?;
        let consistency = consistency_of(request.consistency)?;
        let by = request.by.ok_or_else(|| {
            Refusal::bad_request(
                "BAD_REQUEST",
                "say which message: sequence, last_by_subject or first_at_time",
            )
        })?;
        let access = match &by {
            v1::get_request::By::Sequence(by) => broker.shard(&stream, by.shard)?,
            v1::get_request::By::LastBySubject(by) => broker.shard_of_subject(&stream, &by.subject)?,
            v1::get_request::By::FirstAtTime(by) => broker.shard(&stream, by.shard)?,
        };
        let found = match by {
            v1::get_request::By::Sequence(by) => {
                broker
                    .get_by_sequence(&access, Sequence::new(by.sequence), consistency)
                    .await
            }
            v1::get_request::By::LastBySubject(by) => {
                broker
                    .get_last_by_subject(&stream, &access, &by.subject, consistency)
                    .await
            }
            v1::get_request::By::FirstAtTime(by) => {
                broker
                    .get_first_at(&stream, &access, TimeUs::new(by.time_us), consistency)
                    .await
            }
        }
        .map_err(|e| broker.noted(access.place.shard, e))?;
        let local = consistency == Consistency::Local;
        let Found {
            shard,
            sequence,
            append_time,
            record,
        } = found;
        Ok(v1::GetResponse {
            message: Some(message_of(shard, sequence, append_time, record)),
            stream_id: stream.id.to_string(),
            epoch: stream.epoch.get(),
            leader: self.edge.other_leader_of(&access.place).filter(|_| !local),
            freshness: self.edge.freshness(&access).filter(|_| local),
        })
    }

    async fn fetch_page(&self, request: v1::FetchRequest) -> Result<(v1::FetchResponse, Option<BytePermit>), Refusal> {
        let broker = &self.edge.broker;
        let messages_max = match request.max_messages {
            0 => FETCH_MESSAGES,
            n if n <= FETCH_MESSAGES_MAX => n,
            n => {
                return Err(Refusal::bad_request(
                    "BAD_REQUEST",
                    format!("max_messages is 1 to {FETCH_MESSAGES_MAX} (0 means {FETCH_MESSAGES}), not {n}"),
                ));
            }
        };
        let bytes_max = match request.max_bytes {
            0 => FETCH_BYTES,
            n => n.min(FETCH_BYTES_MAX),
        };
        let wait = Duration::from_micros(request.wait_us).min(FETCH_WAIT_MAX);
        let filters = filters_of(&request.filters)?;
        let consistency = consistency_of(request.consistency)?;
        let stream = self.edge.stream(&request.namespace, &request.stream).await?;
        let accesses = broker.shards_of(&stream, &request.shards)?;
        let starts = begin(&self.edge, &stream, &accesses, request.start, consistency).await?;
        let mut readers: Vec<(u32, ShardReader)> = accesses
            .iter()
            .zip(starts)
            .map(|(access, next)| {
                let reader = broker.reader(access, next, filters.clone());
                (access.place.index, reader.among(accesses.len()))
            })
            .collect();
        // Taken only while there is something to read: who waits for messages holds none.
        let mut memory = None;
        let deadline = tokio::time::Instant::now() + wait;
        let mut messages = Vec::new();
        let mut room = i64::from(bytes_max);
        let mut caught_up;
        loop {
            caught_up = true;
            if memory.is_none() && readers.iter().any(|(_, r)| r.has_more()) {
                memory = Some(self.memory(bytes_max as usize)?);
            }
            for (shard, reader) in &mut readers {
                while (messages.len() as u64) < u64::from(messages_max) && room > 0 {
                    let left = u64::from(messages_max) - messages.len() as u64;
                    let step = reader.step(left, u64::try_from(room).unwrap_or(1)).await;
                    match step.map_err(|e| broker.noted(reader.shard(), e))? {
                        Step::Deliver(delivery) => {
                            for (sequence, record) in delivery.records()? {
                                room -= (record.payload.len() + record.subject.len() + MESSAGE_OVERHEAD) as i64;
                                messages.push(message_of(*shard, sequence, delivery.append_time, record));
                            }
                        }
                        Step::Skipped | Step::Truncated { .. } => {}
                        Step::AtTail(_) => break,
                    }
                }
                caught_up &= reader.next() >= reader.positions().tail;
            }
            if !messages.is_empty() || !caught_up || tokio::time::Instant::now() >= deadline {
                break;
            }
            memory = None;
            let mut changes: FuturesUnordered<_> = readers.iter_mut().map(|(_, r)| r.changed()).collect();
            let mut draining = self.edge.draining.clone();
            tokio::select! {
                _ = changes.next() => {}
                () = tokio::time::sleep_until(deadline) => break,
                () = super::drained(&mut draining) => break,
            }
        }
        let cursor = Cursor {
            stream: stream.id,
            epoch: stream.epoch,
            next: readers.iter().map(|(shard, r)| (*shard, r.next())).collect(),
        };
        let read = messages.len() as u64;
        let answer = v1::FetchResponse {
            messages,
            cursor: cursor.encode(),
            caught_up,
            stream_id: stream.id.to_string(),
            epoch: stream.epoch.get(),
            freshness: match consistency {
                Consistency::Linearizable => Vec::new(),
                Consistency::Local => accesses.iter().filter_map(|a| self.edge.freshness(a)).collect(),
            },
        };
        if let Some(memory) = &mut memory {
            let bytes = answer.encoded_len();
            self.fit(memory, bytes)?;
            broker.metrics().read(read, bytes as u64);
        }
        Ok((answer, memory))
    }
}
