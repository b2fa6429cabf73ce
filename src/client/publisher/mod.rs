//! Publishing a steady flow: batches, acks in order, resends that are never stored twice.

mod flight;
mod leaders;
mod queue;
mod session;
mod split;
mod ticket;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

pub use ticket::{BatchReceipt, PendingAck, PubAck};

use self::flight::Flight;
use self::leaders::Leaders;
use self::queue::{Place, Queue, Sizes};
use self::session::{Identity, Producer, Session, open_retrying};
use self::split::Splitter;
use super::connection::Connection;
use super::error::{ClientError, RetryClass, reason};
use super::message::{Expect, Message};
use crate::model::Codec;
use crate::model::batch::{RECORD_PREFIX_BYTES, RecordFields, content_bytes};
use crate::wire::v1;

/// What became of a batch, for [`PublisherBuilder::on_batch`].
#[derive(Debug)]
pub struct BatchReport<'a> {
    /// Messages in the batch.
    pub messages: u32,
    /// Encoded size, in bytes.
    pub bytes: usize,
    /// Which messages, as inclusive ranges of their ordinals: the publisher's first message has ordinal 0.
    pub ordinals: &'a [(u64, u64)],
    /// When the first message of the batch was given to the publisher.
    pub since: Instant,
    /// Where it was stored, or why it was not.
    pub outcome: Result<&'a BatchReceipt, &'a ClientError>,
}

type Hook = Arc<dyn Fn(&BatchReport<'_>) + Send + Sync>;

#[derive(Clone)]
struct PublisherConfig {
    stream: String,
    codec: Codec,
    retry_for: Duration,
    on_batch: Option<Hook>,
}

/// Settings of a [`Publisher`], made by [`Client::publisher`](super::Client::publisher).
#[must_use = "nothing happens before `open`"]
pub struct PublisherBuilder {
    connection: Arc<Connection>,
    config: PublisherConfig,
    sizes: Sizes,
    producer: Option<Producer>,
}

impl PublisherBuilder {
    pub(super) fn new(connection: Arc<Connection>, stream: String) -> Self {
        PublisherBuilder {
            connection,
            config: PublisherConfig {
                stream,
                codec: Codec::None,
                retry_for: Duration::from_secs(60),
                on_batch: None,
            },
            sizes: Sizes {
                batch_bytes: 256 << 10,
                batch_messages: 10_000,
                memory_bytes: 64 << 20,
                linger: Duration::from_millis(1),
                track_ordinals: false,
            },
            producer: None,
        }
    }

    /// How long a batch that is not full waits for more messages while earlier ones of its shard are on their way. With
    /// none on their way, a batch is sent at once. Default: 1 ms.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.sizes.linger = linger;
        self
    }

    /// Size at which a batch is sent, in bytes before compression, at most 8 MiB. Default: 256 KiB.
    pub fn batch_bytes(mut self, bytes: usize) -> Self {
        self.sizes.batch_bytes = bytes;
        self
    }

    /// Number of messages at which a batch is sent, 1–100,000. Default: 10,000.
    pub fn batch_messages(mut self, messages: u32) -> Self {
        self.sizes.batch_messages = messages.clamp(1, crate::model::limits::BATCH_RECORDS_MAX as u32);
        self
    }

    /// Upper bound of the messages kept until they are acknowledged, in bytes; `publish` waits while it is reached.
    /// Default: 64 MiB.
    pub fn memory_bytes(mut self, bytes: usize) -> Self {
        self.sizes.memory_bytes = bytes;
        self
    }

    /// Compression of the batches. Default: none.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.config.codec = codec;
        self
    }

    /// How long the publisher goes on trying while nothing of a shard is answered, before it gives everything up.
    /// Zero: every batch is tried once, and that attempt may take as long as a call
    /// ([`ClientConfig::call_timeout`](super::ClientConfig::call_timeout)). Default: 60 s.
    pub fn retry_for(mut self, time: Duration) -> Self {
        self.config.retry_for = time;
        self
    }

    /// Takes the place of an earlier publisher: a higher epoch shuts out those with a lower one; with the same epoch,
    /// sequences go on where the earlier one's ended.
    pub fn producer(mut self, id: u64, epoch: u64) -> Self {
        self.producer = Some(Producer { id, epoch });
        self
    }

    /// Calls `hook` for each batch when its fate is known, in order per shard. It must be quick. Messages that were never
    /// sent because the publisher gave up are not told here; [`Publisher::flush`] tells of them.
    pub fn on_batch(mut self, hook: impl Fn(&BatchReport<'_>) + Send + Sync + 'static) -> Self {
        self.config.on_batch = Some(Arc::new(hook));
        self.sizes.track_ordinals = true;
        self
    }

    /// Connects and opens the session. Fails if the stream does not exist or no server answers for as long as the
    /// client tries again ([`ClientConfig::retry_for`](super::ClientConfig::retry_for)).
    pub async fn open(mut self) -> Result<Publisher, ClientError> {
        let retry_for = self.connection.config.retry_for;
        let (line, opened) = open_retrying(&self.connection, &self.config.stream, self.producer, retry_for).await?;
        let splitter = Splitter::new(opened.spec.as_ref(), opened.map.as_ref())?;
        if opened.batch_bytes_max > 0 {
            self.sizes.batch_bytes = self.sizes.batch_bytes.min(opened.batch_bytes_max as usize);
        }
        let mut flight = Flight::new();
        flight.opened(splitter.shards(), opened.window.unwrap_or_default());
        flight.start_after(|shard| opened.last_producer_sequence.get(&shard).copied().unwrap_or(0));
        let identity = Identity {
            stream_id: opened.stream_id.as_str().into(),
            stream_epoch: opened.epoch,
            producer: Producer {
                id: opened.producer_id,
                epoch: opened.producer_epoch,
            },
        };
        let map_epoch = splitter.epoch();
        let queue = Arc::new(Queue::new(self.sizes, splitter));
        let mut leaders = Leaders::default();
        leaders.opened(&opened);
        let session = Session {
            leaders,
            connection: self.connection,
            config: self.config,
            queue: Arc::clone(&queue),
            flight,
            identity: identity.clone(),
            map_epoch,
            waiting_since: None,
        };
        let task = tokio::spawn(session.run(line));
        Ok(Publisher { queue, identity, task })
    }
}

/// Publishes a steady flow of messages to one stream.
///
/// Messages are gathered into batches, by size and by time, and sent without waiting for earlier ones. Acks come in
/// the order of the messages of each shard. When the connection breaks or the server is busy, batches are sent again
/// under the numbers they had, so that none is stored twice. Memory is bounded: `publish` waits while too much is
/// unacknowledged.
///
/// ```no_run
/// use mainstem::client::{Client, ClientError, Message};
///
/// # async fn example() -> Result<(), ClientError> {
/// let client = Client::connect("127.0.0.1:7411").await?;
/// let publisher = client.publisher("orders").open().await?;
///
/// // One by one: the first await waits for room, the second for the ack.
/// let ack = publisher.publish(&Message::new("orders.eu", "hello")).await?.await?;
/// println!("stored at {:?} of shard {}", ack.sequence, ack.shard);
///
/// // In bulk: nobody waits for single acks, `flush` tells whether all were stored.
/// for n in 0..1_000_000 {
///     publisher.send("orders.eu", format!("message {n}").as_bytes()).await?;
/// }
/// publisher.flush().await?;
/// publisher.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Publisher {
    queue: Arc<Queue>,
    identity: Identity,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Gives a message to the publisher, waiting while there is no room for it. The future returned is its ack.
    pub async fn publish(&self, message: &Message) -> Result<PendingAck, ClientError> {
        self.publish_inner(message, None).await
    }

    /// The same under a condition. The message goes in a batch of its own.
    pub async fn publish_expecting(&self, message: &Message, expect: Expect) -> Result<PendingAck, ClientError> {
        self.publish_inner(message, Some(&expect.into())).await
    }

    async fn publish_inner(
        &self,
        message: &Message,
        expect: Option<&v1::Expectation>,
    ) -> Result<PendingAck, ClientError> {
        give_way().await;
        loop {
            let pushed = message.with_fields(|fields| match self.queue.push(fields, expect, true) {
                Ok(Some(place)) => Ok(Ok(place.expect("the place was asked for"))),
                Ok(None) => Ok(Err(RECORD_PREFIX_BYTES + content_bytes(fields))),
                Err(e) => Err(e),
            })?;
            match pushed {
                Ok(Place { ticket, position }) => {
                    return Ok(PendingAck {
                        fate: ticket.wait(),
                        position,
                    });
                }
                Err(bytes) => self.queue.wait_for_space(bytes).await,
            }
        }
    }

    /// Gives a message without key, id and headers to the publisher. The cheapest way: nothing is allocated, and
    /// nobody waits for this message's ack; [`Publisher::flush`] tells of failures.
    pub async fn send(&self, subject: &str, payload: &[u8]) -> Result<(), ClientError> {
        self.send_fields(&RecordFields {
            subject,
            payload,
            ..RecordFields::default()
        })
        .await
    }

    /// Gives any message to the publisher without waiting for its ack; [`Publisher::flush`] tells of failures.
    pub async fn send_fields(&self, fields: &RecordFields<'_>) -> Result<(), ClientError> {
        give_way().await;
        while self.queue.push(fields, None, false)?.is_none() {
            self.queue
                .wait_for_space(RECORD_PREFIX_BYTES + content_bytes(fields))
                .await;
        }
        Ok(())
    }

    /// Gives many messages to the publisher without waiting for their acks; [`Publisher::flush`] tells of failures.
    pub async fn send_all(&self, messages: &[Message]) -> Result<(), ClientError> {
        let mut rest = messages;
        loop {
            rest = &rest[self.queue.push_many(rest)?..];
            let Some(next) = rest.first() else {
                return Ok(());
            };
            let bytes = next.with_fields(content_bytes);
            self.queue.wait_for_space(RECORD_PREFIX_BYTES + bytes).await;
        }
    }

    /// Sends what is gathered and waits until everything given before is answered. Fails with the first failure since
    /// the last flush.
    pub async fn flush(&self) -> Result<(), ClientError> {
        for ticket in self.queue.flush() {
            // Failures are kept by the queue, in their order.
            let _ = ticket.wait().await;
        }
        match self.queue.take_failure() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Takes no more messages, waits until all are answered, and ends the session.
    pub async fn close(mut self) -> Result<(), ClientError> {
        let flushed = self.flush().await;
        self.queue.close(closed());
        // The task ends by itself now: everything is answered.
        let _ = (&mut self.task).await;
        flushed
    }

    /// How many messages were given to the publisher: the ordinal of the next.
    pub fn taken(&self) -> u64 {
        self.queue.taken()
    }

    /// The stream's immutable id, 32 hex digits.
    pub fn stream_id(&self) -> &str {
        &self.identity.stream_id
    }

    /// This publisher's producer id, to take its place later.
    pub fn producer_id(&self) -> u64 {
        self.identity.producer.id
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.queue.close(closed());
        self.task.abort();
        // Batches that were sent are told by the task's end; these never were.
        drop(self.queue.drain());
    }
}

/// A caller that never waits would keep its thread from the session's task, which it has just woken.
async fn give_way() {
    tokio::task::coop::consume_budget().await;
}

fn closed() -> ClientError {
    ClientError::local(tonic::Code::Cancelled, reason::CLOSED, "the publisher is closed")
        .with_retry(RetryClass::DidNotHappen)
}
