//! One task per led shard: takes batches from its mailbox, puts as many as have come into one log entry, proposes, and
//! hands out the answers in order. While entries are under way the mailbox fills, so entries grow with the load and a
//! lone batch is proposed at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use prost::Message;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::counts::BrokerMetrics;
use super::error::PublishError;
use crate::base::budget::BytePermit;
use crate::base::clock::Clock;
use crate::base::mailbox::{Receiver, SendError, Sender, Slot, mailbox};
use crate::machine::{GroupOutcome, ItemOutcome};
use crate::model::ShardId;
use crate::model::batch::BatchHeader;
use crate::model::limits::ENTRY_ITEMS_MAX;
use crate::raft::{Applied, Group, Pending};
use crate::wire::internal as pb;

/// Batches that may wait for a shard. Beyond that a publish is refused as not processed.
pub const MAILBOX_BATCHES: usize = 1_024;
/// An entry takes batches until it has this many bytes; one larger batch makes an entry of its own.
const ENTRY_BYTES: usize = 1 << 20;
/// Bound of what the bodies of an entry's batches decompress to: apply looks into each.
const ENTRY_BODY_BYTES: usize = 16 << 20;
/// Entries of one shard that may be in the log and not applied.
const ENTRIES_IN_FLIGHT: usize = 3;

/// The outcome of one batch.
pub type Outcome = Result<ItemOutcome, PublishError>;

/// Where a batch's outcome goes: a channel with room for everything its session may have under way, so that sending
/// never waits.
#[derive(Debug)]
pub struct ReplyTo {
    pub tag: u64,
    /// When the batch was handed over.
    pub submitted: Instant,
    pub channel: mpsc::Sender<(u64, Outcome)>,
}

impl ReplyTo {
    fn send(self, outcome: Outcome) {
        // Full cannot be: the session reserved a place before it handed the batch over. Closed: the client has gone.
        let _ = self.channel.try_send((self.tag, outcome));
    }
}

/// A validated batch on its way into a shard.
pub struct Item {
    pub batch: Bytes,
    pub producer: Option<pb::ProducerStamp>,
    pub expect: Option<crate::wire::v1::Expectation>,
    /// Memory held at the edge, given back when the outcome is known.
    pub permit: BytePermit,
    pub reply: ReplyTo,
}

/// A shard's mailbox is full.
const FULL: PublishError = PublishError::Overloaded {
    what: "batches waiting for the shard",
};

/// A place in a shard's mailbox, given back when dropped unfilled.
pub struct Place<'a>(Slot<'a, Item>);

impl Place<'_> {
    /// Hands the batch over. If the node stops in this very moment the reply channel may be dropped without an
    /// outcome: then it is unknown.
    pub fn submit(self, item: Item) {
        self.0.send(item);
    }
}

/// The way into a shard.
#[derive(Clone)]
pub struct Ingest {
    mailbox: Sender<Item>,
    metrics: Arc<BrokerMetrics>,
}

impl Ingest {
    /// Makes the mailbox and the task that serves it. The caller owns the task.
    pub fn new(
        shard: ShardId,
        group: Group,
        clock: Clock,
        metrics: Arc<BrokerMetrics>,
        token: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (tx, rx) = mailbox("ingest", MAILBOX_BATCHES);
        let worker = Worker {
            shard,
            group,
            clock,
            metrics: metrics.clone(),
            inbox: rx,
            in_flight: VecDeque::new(),
        };
        (Self { mailbox: tx, metrics }, worker.run(token))
    }

    /// Hands a batch over. If it cannot be taken its outcome is sent at once: not processed.
    pub fn submit(&self, item: Item) {
        match self.mailbox.try_send(item) {
            Ok(()) => {}
            Err(SendError::Full(item)) => tell(&self.metrics, item.reply, item.permit, Err(FULL)),
            Err(SendError::Closed(item)) => tell(&self.metrics, item.reply, item.permit, Err(PublishError::Stopping)),
        }
    }

    /// Takes a place in the mailbox, so that a batch can be handed over later without fail. For what is handed to
    /// several shards: all places are taken before any is filled.
    pub fn reserve(&self) -> Result<Place<'_>, PublishError> {
        match self.mailbox.try_reserve() {
            Ok(slot) => Ok(Place(slot)),
            Err(SendError::Full(())) => Err(FULL),
            Err(SendError::Closed(())) => Err(PublishError::Stopping),
        }
    }

    /// The task has ended; a new one is needed.
    pub fn is_closed(&self) -> bool {
        self.mailbox.is_closed()
    }
}

/// An entry's waiting batches, and what became of the entry.
type Answered = (Vec<(ReplyTo, BytePermit)>, Result<Applied, PublishError>);

struct InFlight {
    pending: Pending,
    waiting: Vec<(ReplyTo, BytePermit)>,
}

struct Worker {
    shard: ShardId,
    group: Group,
    clock: Clock,
    metrics: Arc<BrokerMetrics>,
    inbox: Receiver<Item>,
    in_flight: VecDeque<InFlight>,
}

impl Worker {
    async fn run(mut self, token: CancellationToken) {
        loop {
            let full = self.in_flight.len() >= ENTRIES_IN_FLIGHT;
            tokio::select! {
                biased;
                done = answer(&mut self.in_flight) => self.finish(done),
                item = self.inbox.recv(), if !full => match item {
                    Some(item) => self.propose(item).await,
                    None => break,
                },
                () = token.cancelled() => {
                    self.inbox.close();
                    break;
                }
            }
        }
        // Everything that was proposed is answered; what still waits was not processed.
        while let Ok(Some(item)) = self.inbox.try_recv() {
            tell(&self.metrics, item.reply, item.permit, Err(PublishError::Stopping));
        }
        while !self.in_flight.is_empty() {
            let done = answer(&mut self.in_flight).await;
            self.finish(done);
        }
    }

    async fn propose(&mut self, first: Item) {
        let mut bytes = first.batch.len();
        let mut body_bytes = body_of(&first);
        let mut items = Vec::new();
        let mut waiting = Vec::new();
        let mut next = Some(first);
        while let Some(item) = next {
            items.push(pb::PublishItem {
                batch: item.batch,
                producer: item.producer,
                expect: item.expect,
            });
            waiting.push((item.reply, item.permit));
            next = None;
            if bytes < ENTRY_BYTES
                && body_bytes < ENTRY_BODY_BYTES
                && items.len() < ENTRY_ITEMS_MAX
                && let Ok(Some(more)) = self.inbox.try_recv()
            {
                bytes += more.batch.len();
                body_bytes += body_of(&more);
                next = Some(more);
            }
        }
        self.metrics.entry(items.len(), bytes);
        let command = pb::GroupCommand {
            feature_level: crate::machine::FEATURE_LEVEL,
            op: Some(pb::group_command::Op::Publish(pb::Publish {
                shard_id: self.shard.get(),
                time_us: self.clock.now_us(),
                items,
            })),
        };
        match self.group.propose(command.encode_to_vec().into()).await {
            Ok(pending) => self.in_flight.push_back(InFlight { pending, waiting }),
            Err(e) => {
                for (reply, permit) in waiting {
                    tell(&self.metrics, reply, permit, Err(e.clone().into()));
                }
            }
        }
    }

    fn finish(&mut self, done: Option<Answered>) {
        let Some((waiting, result)) = done else { return };
        match result {
            Ok(Applied::Command(GroupOutcome::Published(outcomes))) => {
                for ((reply, permit), outcome) in waiting.into_iter().zip(outcomes) {
                    tell(&self.metrics, reply, permit, Ok(outcome));
                }
            }
            // Only a shard that was removed meanwhile answers with anything else.
            Ok(Applied::Command(_) | Applied::Done) => {
                for (reply, permit) in waiting {
                    tell(&self.metrics, reply, permit, Err(PublishError::Removed));
                }
            }
            Err(e) => {
                for (reply, permit) in waiting {
                    tell(&self.metrics, reply, permit, Err(e.clone()));
                }
            }
        }
    }
}

/// Counts an outcome and sends it; the batch's memory is given back with it.
fn tell(metrics: &BrokerMetrics, reply: ReplyTo, permit: BytePermit, outcome: Outcome) {
    metrics.answered(reply.submitted, permit.bytes(), &outcome);
    reply.send(outcome);
}

/// Bytes of a batch's records when they are not compressed.
fn body_of(item: &Item) -> usize {
    // An empty batch only uses up a producer number; all others were validated.
    BatchHeader::peek(&item.batch).map_or(0, |header| header.body_bytes as usize)
}

/// Waits for the oldest entry. Pending for ever when there is none.
async fn answer(in_flight: &mut VecDeque<InFlight>) -> Option<Answered> {
    let Some(front) = in_flight.front_mut() else {
        return std::future::pending().await;
    };
    // Only the wait may be cancelled by the select around this; taking it off the queue happens with the answer.
    let result = front.pending.wait().await;
    let front = in_flight.pop_front()?;
    Some((
        front.waiting,
        result.map(|(_, _, applied)| applied).map_err(PublishError::from),
    ))
}
