//! `PublishService`.

use std::sync::Arc;

use futures_util::Stream;
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::status::Refusal;
use super::{Edge, publish_session};
use crate::base::budget::BytePermit;
use crate::broker::error::PublishError;
use crate::broker::ingest::{Item, Outcome, ReplyTo};
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
        let request = request.into_inner();
        Ok(Response::new(self.publish_messages(request).await?))
    }

    type PublishSessionStream = Frames;

    async fn publish_session(
        &self,
        request: Request<Streaming<v1::PublishSessionRequest>>,
    ) -> Result<Response<Frames>, Status> {
        self.edge.accepting()?;
        let session = self.edge.open_session()?;
        let (tx, rx) = mpsc::channel(FRAMES);
        let edge = self.edge.clone();
        let input = request.into_inner();
        self.edge.tasks.spawn("publish session", async move {
            publish_session::run(edge, input, tx).await;
            drop(session);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

/// Messages of one shard, with their places in the request.
struct Part {
    shard: u32,
    places: Vec<usize>,
    builder: BatchBuilder,
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
            broker.stream_by_subject(&request.namespace, &first.subject)?
        } else {
            broker.stream(&request.namespace, &request.stream)?
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
        broker.admit()?;
        let (tx, mut rx) = mpsc::channel(parts.len());
        let mut places = Vec::new();
        for mut part in parts {
            let access = broker.shard(&stream, part.shard)?;
            let batch = part
                .builder
                .build(Codec::None)
                .ok_or_else(|| Refusal::bad_request("BAD_MESSAGE", "a part of the publish has no messages"))?;
            validate_batch(&stream, part.shard, stream.map.epoch(), &batch)?;
            if let Some(expect) = &request.expect {
                check_expectation(&stream, part.shard, expect)?;
            }
            let permit = self.permit(batch.len())?;
            let tag = places.len() as u64;
            places.push((part.shard, part.places));
            broker.submit(
                &access,
                Item {
                    batch,
                    producer: None,
                    expect: request.expect.clone(),
                    permit,
                    reply: ReplyTo {
                        tag,
                        channel: tx.clone(),
                    },
                },
            );
        }
        drop(tx);
        let mut acks = vec![v1::MessageAck::default(); request.messages.len()];
        let mut failed: Option<PublishError> = None;
        let mut stored = false;
        for _ in 0..places.len() {
            let Some((tag, outcome)) = rx.recv().await else {
                return Err(lost_outcome().into());
            };
            let (shard, places) = places
                .get(usize::try_from(tag).unwrap_or(usize::MAX))
                .ok_or_else(|| Refusal::from(lost_outcome()))?;
            match message_acks(*shard, places, outcome) {
                Ok(part) => {
                    stored = true;
                    for (place, ack) in part {
                        if let Some(slot) = acks.get_mut(place) {
                            *slot = ack;
                        }
                    }
                }
                Err(e) => failed = Some(e),
            }
        }
        if let Some(e) = failed {
            let mut refusal = Refusal::from(e);
            if stored {
                // Some shards took their part: only a retry with the same message ids is safe.
                refusal.retry = crate::base::RetryClass::MayHaveHappened;
                refusal.message = format!("part of the messages was stored, but: {}", refusal.message);
            }
            return Err(refusal);
        }
        Ok(v1::PublishResponse {
            stream_id: stream.id.to_string(),
            epoch: stream.epoch.get(),
            acks,
            durability: v1::Durability::QuorumSynced.into(),
        })
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
