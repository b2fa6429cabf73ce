//! `PublishService`.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::Stream;
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::status::Refusal;
use super::{Edge, Placed, SessionKind, publish_session};
use crate::base::RetryClass;
use crate::base::budget::BytePermit;
use crate::broker::error::PublishError;
use crate::broker::ingest::{Ingest, Item, Outcome, Place, ReplyTo};
use crate::broker::validate::{check_expectation, check_subject, validate_batch};
use crate::control::view::StreamView;
use crate::machine::ItemOutcome;
use crate::model::batch::{BatchBuilder, BuildError, Codec, RecordError, RecordFields};
use crate::model::limits::{MESSAGE_BYTES_MAX, PUBLISH_MESSAGES_MAX};
use crate::wire::v1;
use crate::wire::v1::publish_service_server::PublishService;

/// Frames waiting to be sent to one client.
const FRAMES: usize = 64;

/// The service.
pub struct Publish {
    pub(super) edge: Arc<Edge>,
}

type Frames = Pin<Box<dyn Stream<Item = Result<v1::PublishSessionResponse, Status>> + Send>>;

#[tonic::async_trait]
impl PublishService for Publish {
    async fn publish(&self, request: Request<v1::PublishRequest>) -> Result<Response<v1::PublishResponse>, Status> {
        self.edge.accepting()?;
        Ok(Response::new(self.publish_messages(request.into_inner()).await?))
    }

    type PublishSessionStream = Frames;

    async fn publish_session(
        &self,
        request: Request<Streaming<v1::PublishSessionRequest>>,
    ) -> Result<Response<Frames>, Status> {
        let place = self.edge.open_session(SessionKind::Publish)?;
        let (tx, rx) = mpsc::channel(FRAMES);
        let session = publish_session::run(self.edge.clone(), request.into_inner(), tx);
        self.edge.tasks.spawn("publish session", session);
        Ok(Response::new(Box::pin(Placed {
            answers: ReceiverStream::new(rx),
            _place: place,
        })))
    }
}

/// Messages of one shard, with their places in the request.
struct Part {
    shard: u32,
    places: Vec<usize>,
    builder: BatchBuilder,
}

/// A part that can be handed to its shard.
struct Ready {
    shard: u32,
    places: Vec<usize>,
    batch: Bytes,
    permit: BytePermit,
    ingest: Ingest,
}

impl Publish {
    async fn publish_messages(&self, request: v1::PublishRequest) -> Result<v1::PublishResponse, Refusal> {
        let broker = &self.edge.broker;
        let Some(first) = request.messages.first() else {
            return Err(Refusal::bad_request(
                "NO_MESSAGES",
                "a publish needs 1 to 1,000 messages, it has none",
            ));
        };
        if request.messages.len() > PUBLISH_MESSAGES_MAX {
            return Err(Refusal::bad_request(
                "TOO_MANY_MESSAGES",
                format!(
                    "a publish takes 1 to {PUBLISH_MESSAGES_MAX} messages, it has {}; use PublishSession for more",
                    request.messages.len()
                ),
            ));
        }
        let stream = if request.stream.is_empty() {
            crate::model::subject::validate_subject(&first.subject)
                .map_err(|e| Refusal::bad_request("BAD_MESSAGE", e.to_string()))?;
            let found = self.edge.stream_by_subject(&request.namespace, &first.subject);
            found.await?
        } else {
            self.edge.stream(&request.namespace, &request.stream).await?
        };
        let parts = split(&stream, &request.messages)?;
        if request.expect.is_some() && parts.len() > 1 {
            return Err(Refusal::bad_request(
                "BAD_EXPECTATION",
                format!(
                    "an expectation needs all messages in one shard, these go to {}",
                    parts.len()
                ),
            ));
        }
        let counted = |refusal: Refusal| {
            broker.metrics().refused(refusal.reason);
            refusal
        };
        let ready = self.prepare(&stream, parts, request.expect.as_ref()).map_err(counted)?;
        let (tx, mut rx) = mpsc::channel(ready.len());
        let places = self.submit_all(ready, request.expect.as_ref(), &tx).map_err(counted)?;
        // From here on something may be stored: no early return. A reply that never comes ends the channel.
        drop(tx);
        let mut acks = vec![v1::MessageAck::default(); request.messages.len()];
        let mut stored = 0;
        let mut failures = Vec::new();
        while stored + failures.len() < places.len() {
            let Some((tag, outcome)) = rx.recv().await else {
                failures.push(lost_outcome());
                break;
            };
            let answered = match usize::try_from(tag).ok().and_then(|tag| places.get(tag)) {
                Some((shard, places)) => message_acks(*shard, places, outcome),
                None => Err(lost_outcome()),
            };
            match answered {
                Ok(part) => {
                    stored += 1;
                    for (place, ack) in part {
                        if let Some(slot) = acks.get_mut(place) {
                            *slot = ack;
                        }
                    }
                }
                Err(e) => failures.push(e),
            }
        }
        if let Some(refusal) = refusal_of(failures, stored > 0) {
            return Err(refusal);
        }
        let first = acks.first().and_then(|ack| stream.shards.get(ack.shard as usize));
        Ok(v1::PublishResponse {
            leader: first.and_then(|place| self.edge.other_leader_of(place)),
            stream_id: stream.id.to_string(),
            epoch: stream.epoch.get(),
            acks,
            durability: v1::Durability::QuorumSynced.into(),
        })
    }

    /// Checks every part and takes its memory before any part is handed over: what is refused here did not happen.
    fn prepare(
        &self,
        stream: &StreamView,
        parts: Vec<Part>,
        expect: Option<&v1::Expectation>,
    ) -> Result<Vec<Ready>, Refusal> {
        let broker = &self.edge.broker;
        let mut ready = Vec::with_capacity(parts.len());
        for mut part in parts {
            let access = broker.shard(stream, part.shard)?;
            broker.admit(access.place.group)?;
            let batch = part
                .builder
                .build(Codec::None)
                .ok_or_else(|| Refusal::bad_request("BAD_MESSAGE", "a part of the publish has no messages"))?;
            validate_batch(stream, part.shard, stream.map.epoch(), &batch)?;
            if let Some(expect) = expect {
                check_expectation(stream, part.shard, expect)?;
            }
            ready.push(Ready {
                permit: self.permit(batch.len())?,
                ingest: broker.ingest(&access),
                batch,
                shard: part.shard,
                places: part.places,
            });
        }
        Ok(ready)
    }

    /// Hands over all parts or, if a shard has no room, none. Returns each part's shard and places, by tag.
    fn submit_all(
        &self,
        ready: Vec<Ready>,
        expect: Option<&v1::Expectation>,
        replies: &mpsc::Sender<(u64, Outcome)>,
    ) -> Result<Vec<(u32, Vec<usize>)>, Refusal> {
        let ingests: Vec<Ingest> = ready.iter().map(|part| part.ingest.clone()).collect();
        let rooms: Vec<Place<'_>> = ingests.iter().map(Ingest::reserve).collect::<Result<_, _>>()?;
        let mut places = Vec::with_capacity(ready.len());
        let submitted = Instant::now();
        for ((part, room), tag) in ready.into_iter().zip(rooms).zip(0..) {
            places.push((part.shard, part.places));
            room.submit(Item {
                batch: part.batch,
                producer: None,
                expect: expect.cloned(),
                permit: part.permit,
                relayed: false,
                reply: ReplyTo {
                    tag,
                    submitted,
                    channel: replies.clone(),
                },
            });
        }
        Ok(places)
    }

    fn permit(&self, bytes: usize) -> Result<BytePermit, Refusal> {
        self.edge.broker.publish_memory().try_acquire(bytes).ok_or_else(|| {
            PublishError::Overloaded {
                what: "memory for publishes",
            }
            .into()
        })
    }
}

fn lost_outcome() -> PublishError {
    PublishError::Propose(crate::raft::ProposeError::Unknown {
        group: crate::model::GroupId::new(0),
    })
}

/// What is told of a publish of which these parts failed; nothing if none did. The part that needs a change of the
/// request is told first. Where another part was stored, or may have been, only a retry with the same message ids is
/// safe, whatever became of the part that is told.
fn refusal_of(failures: Vec<PublishError>, stored: bool) -> Option<Refusal> {
    let unknown = failures.iter().any(|e| e.retry_class() == RetryClass::MayHaveHappened);
    let worst = failures.into_iter().min_by_key(|e| match e.retry_class() {
        RetryClass::CannotWork => 0,
        RetryClass::MayHaveHappened => 1,
        RetryClass::DidNotHappen => 2,
    })?;
    let mut refusal = Refusal::from(worst);
    if stored {
        refusal.message = format!("part of the messages was stored, but: {}", refusal.message);
    } else if unknown && refusal.retry != RetryClass::MayHaveHappened {
        refusal.message = format!("part of the messages may have been stored, but: {}", refusal.message);
    }
    if stored || unknown {
        refusal.retry = RetryClass::MayHaveHappened;
    }
    Some(refusal)
}

/// Groups messages by shard, in order.
fn split(stream: &StreamView, messages: &[v1::Message]) -> Result<Vec<Part>, Refusal> {
    let mut parts: Vec<Part> = Vec::new();
    for (place, message) in messages.iter().enumerate() {
        check_subject(stream, &message.subject)?;
        let shard = if stream.shards.len() == 1 {
            0
        } else {
            let slot = stream
                .partitioning
                .slot(&message.subject, message.key.as_deref())
                .map_err(|e| Refusal::bad_request("BAD_MESSAGE", e.to_string()))?;
            stream.map.shard(slot)
        };
        let index = match parts.iter().position(|p| p.shard == shard) {
            Some(index) => index,
            None => {
                parts.push(Part {
                    shard,
                    places: Vec::new(),
                    builder: BatchBuilder::new(),
                });
                parts.len() - 1
            }
        };
        let Some(part) = parts.get_mut(index) else { continue };
        part.places.push(place);
        part.builder
            .push(&RecordFields {
                subject: &message.subject,
                key: message.key.as_deref(),
                message_id: message.message_id.as_deref(),
                event_time: message.event_time_us.map(crate::model::TimeUs::new),
                headers: &message
                    .headers
                    .iter()
                    .map(|h| (h.name.as_str(), h.value.as_ref()))
                    .collect::<Vec<_>>(),
                payload: &message.payload,
            })
            .map_err(|e| match e {
                BuildError::Record(RecordError::TooLarge { bytes }) => PublishError::MessageTooLarge {
                    size: bytes as u64,
                    max: MESSAGE_BYTES_MAX as u64,
                },
                BuildError::Record(_) | BuildError::Full { .. } => {
                    PublishError::BadMessage(format!("message {place}: {e}"))
                }
            })?;
    }
    Ok(parts)
}

/// One ack per message of a part.
fn message_acks(shard: u32, places: &[usize], outcome: Outcome) -> Result<Vec<(usize, v1::MessageAck)>, PublishError> {
    let (mut next, tail, term, append_time, duplicates) = match outcome? {
        ItemOutcome::Stored(stored) => (
            Some(stored.first),
            stored.tail,
            stored.term,
            stored.append_time,
            stored.duplicates,
        ),
        ItemOutcome::AllDuplicates(item) => (None, item.tail, item.term, item.append_time, item.duplicates),
        ItemOutcome::Refused(refusal) => return Err(PublishError::Refused(refusal)),
    };
    let mut duplicates = duplicates.iter().peekable();
    let mut acks = Vec::with_capacity(places.len());
    for (position, place) in places.iter().enumerate() {
        let mut ack = v1::MessageAck {
            shard,
            append_time_us: append_time.get(),
            term: term.get(),
            tail: tail.get(),
            ..v1::MessageAck::default()
        };
        if let Some(duplicate) = duplicates.next_if(|d| d.position as usize == position) {
            ack.duplicate = true;
            ack.sequence = duplicate.original.map_or(0, |s| s.get());
        } else if let Some(sequence) = next {
            ack.sequence = sequence.get();
            next = Some(sequence.plus(1));
        }
        acks.push((*place, ack));
    }
    Ok(acks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine;

    /// Neither the order in which the parts' answers come nor a part that certainly failed hides what may be stored.
    #[test]
    fn a_part_that_may_be_stored_is_never_told_as_not_happened() {
        let full = || PublishError::Overloaded { what: "a test" };
        let wrong = || PublishError::Refused(machine::Refusal::BadBatch);
        use RetryClass::{CannotWork, DidNotHappen, MayHaveHappened};
        let cases = [
            (vec![full()], false, "OVERLOADED", DidNotHappen),
            (vec![full()], true, "OVERLOADED", MayHaveHappened),
            (vec![wrong()], false, "BAD_BATCH", CannotWork),
            (vec![wrong()], true, "BAD_BATCH", MayHaveHappened),
            (vec![full(), wrong()], false, "BAD_BATCH", CannotWork),
            (vec![lost_outcome()], false, "OUTCOME_UNKNOWN", MayHaveHappened),
            (vec![lost_outcome(), full()], false, "OUTCOME_UNKNOWN", MayHaveHappened),
            (vec![full(), lost_outcome()], false, "OUTCOME_UNKNOWN", MayHaveHappened),
            (vec![lost_outcome(), wrong()], false, "BAD_BATCH", MayHaveHappened),
        ];
        for (failures, stored, reason, retry) in cases {
            let text = format!("{failures:?} {stored}");
            let told = refusal_of(failures, stored).expect("a failure");
            assert_eq!((told.reason, told.retry), (reason, retry), "{text}");
        }
        assert!(refusal_of(Vec::new(), true).is_none());
    }
}
