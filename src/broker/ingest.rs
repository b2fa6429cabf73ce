//! The way into a shard: a bounded mailbox in front of the task that puts batches into the log, here or at the node that
//! leads the shard (`worker.rs`).

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::counts::BrokerMetrics;
use super::error::PublishError;
use super::route::Router;
use super::worker::Worker;
use crate::base::budget::BytePermit;
use crate::base::clock::Clock;
use crate::base::mailbox::{SendError, Sender, Slot, mailbox};
use crate::machine::ItemOutcome;
use crate::model::{GroupId, ShardId};
use crate::wire::internal as pb;

/// Batches that may wait for a shard. Beyond that a publish is refused as not processed.
pub const MAILBOX_BATCHES: usize = 1_024;
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
    pub(super) fn send(self, outcome: Outcome) {
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
    /// It came from another node, which tries again itself: it goes into the log here or is answered at once.
    pub relayed: bool,
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
    pub(super) fn new(
        shard: ShardId,
        group: GroupId,
        router: Arc<Router>,
        clock: Clock,
        metrics: Arc<BrokerMetrics>,
        token: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (tx, rx) = mailbox("ingest", MAILBOX_BATCHES);
        let worker = Worker::new(shard, group, router, clock, metrics.clone(), rx);
        let ingest = Self { mailbox: tx, metrics };
        (ingest, worker.run(token))
    }

    /// Hands a batch over. If it cannot be taken its outcome is sent at once: not processed.
    pub fn submit(&self, item: Item) {
        match self.mailbox.try_send(item) {
            Ok(()) => {}
            Err(SendError::Full(item)) => refuse(&self.metrics, item, FULL),
            Err(SendError::Closed(item)) => refuse(&self.metrics, item, PublishError::Stopping),
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

fn refuse(metrics: &BrokerMetrics, item: Item, why: PublishError) {
    tell(metrics, item.relayed, item.reply, item.permit, Err(why));
}

/// Counts an outcome and sends it; the batch's memory is given back with it. What came from another node is counted
/// there.
pub(super) fn tell(metrics: &BrokerMetrics, relayed: bool, reply: ReplyTo, permit: BytePermit, outcome: Outcome) {
    if !relayed {
        metrics.answered(reply.submitted, permit.bytes(), &outcome);
    }
    reply.send(outcome);
}
