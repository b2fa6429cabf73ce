//! One task per shard that is published to: takes batches from its mailbox, puts as many as have come into one log
//! entry, and hands out the answers in order. While entries are under way the mailbox fills, so entries grow with the
//! load and a lone batch is proposed at once.
//!
//! Where the group is led elsewhere, what would be an entry goes to the leader's node as one call. When the leader
//! changes, everything under way is answered first; then what is certain not to have happened, and what a producer's
//! number makes safe to repeat, is sent again, in order, to the new leader. So a producer's session sees a failover as
//! latency. Who is told "not processed" can rely on it: a batch that may have been stored once is never answered by how
//! a later attempt failed.
//!
//! What is not answered in time ends as unknown. What its producer sent behind it ends as well, until that one is sent again:
//! answers keep their order. See `worker/given_up.rs`.
//!
//! A shard that is sealed because it goes to another group answers "moved": that did not happen, and is sent again to the new
//! group as soon as the catalog says that it has the shard. Order and numbers hold through it, because the seal is in the
//! former group's log behind everything that was stored there, and the producers' numbers go along.

mod given_up;
mod look;
mod settle;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::given_up::GivenUp;
use super::counts::BrokerMetrics;
use super::error::PublishError;
use super::hop::{Answer, call_failed, pause, relayed};
use super::ingest::{Item, ReplyTo};
use super::route::{Route, Router};
use crate::base::RetryClass;
use crate::base::budget::BytePermit;
use crate::base::clock::Clock;
use crate::base::mailbox::Receiver;
use crate::machine::GroupOutcome;
use crate::model::batch::BatchHeader;
use crate::model::limits::ENTRY_ITEMS_MAX;
use crate::model::{GroupId, NodeId, ShardId};
use crate::raft::transport::Peers;
use crate::raft::{Applied, Group, Pending, ProposeError};
use crate::wire::internal as pb;

/// An entry takes batches until it has this many bytes; one larger batch makes an entry of its own.
const ENTRY_BYTES: usize = 1 << 20;
/// Bound of what the bodies of an entry's batches decompress to: apply looks into each.
const ENTRY_BODY_BYTES: usize = 16 << 20;
/// Entries of one shard that may be in the log, or under way to its leader, and not applied.
const ENTRIES_IN_FLIGHT: usize = 3;

/// How long a batch waits for a leader that takes it …
const ELECTION: Duration = Duration::from_secs(5);
/// … and where it has no quorum: what is promised is an answer within two seconds.
const NO_QUORUM: Duration = Duration::from_millis(1_700);
/// What was sent to the leader's node and is not answered by then is unknown, or sent again.
const RELAY_PATIENCE: Duration = Duration::from_secs(10);
/// How long a call may take to leave this node …
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
/// … where the connection is broken: others wait behind it.
const LEAVE_PATIENCE_APART: Duration = Duration::from_millis(200);
/// Between attempts: the first, doubling up to the last. A new leader ends the pause.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// How long a shard that was sealed is waited for before its former group is asked once more.
const ADOPTION: Duration = Duration::from_secs(1);
/// How often entries under way are looked at that do not get on.
const LOOK: Duration = Duration::from_millis(200);

/// A batch in hand.
struct Waiting {
    item: pb::PublishItem,
    submitted: std::time::Instant,
    /// `None`: told already.
    reply: Option<(ReplyTo, BytePermit)>,
    relayed: bool,
    /// An earlier attempt may have stored it.
    uncertain: bool,
}

impl Waiting {
    /// Of a batch that a producer numbered and sent to this node.
    fn stamp(&self) -> Option<&pb::ProducerStamp> {
        self.item.producer.as_ref().filter(|_| !self.relayed)
    }

    fn producer(&self) -> Option<(u64, u64)> {
        self.item.producer.as_ref().map(|p| (p.producer_id, p.epoch))
    }
}

impl From<Item> for Waiting {
    fn from(item: Item) -> Self {
        Self {
            item: pb::PublishItem {
                batch: item.batch,
                producer: item.producer,
                expect: item.expect,
            },
            submitted: item.reply.submitted,
            reply: Some((item.reply, item.permit)),
            relayed: item.relayed,
            uncertain: false,
        }
    }
}

enum Sent {
    Here(Pending),
    There(BoxFuture<'static, Answer>),
}

struct InFlight {
    group: GroupId,
    /// The node it was sent to; `None`: proposed here.
    to: Option<NodeId>,
    sent: Sent,
    /// It may be in the log. One that did not leave is certain not to be.
    left: bool,
    since: Instant,
    waiting: Vec<Waiting>,
}

pub(super) struct Worker {
    shard: ShardId,
    /// The group that has the shard where the catalog does not tell, as of a node that was just started.
    first_group: GroupId,
    router: Arc<Router>,
    clock: Clock,
    metrics: Arc<BrokerMetrics>,
    inbox: Receiver<Item>,
    in_flight: VecDeque<InFlight>,
    /// To be sent again when all that is under way is answered, in order.
    failed: VecDeque<Waiting>,
    /// To be sent before what is in the mailbox.
    again: VecDeque<Waiting>,
    /// Nothing is sent before.
    resume: Option<Instant>,
    /// Nor before this group has adopted the shard.
    heir: Option<GroupId>,
    pause: Duration,
    /// How often in a row what is under way was seen not to get on.
    lost_looks: u32,
    given_up: GivenUp,
}

impl Worker {
    pub fn new(
        shard: ShardId,
        first_group: GroupId,
        router: Arc<Router>,
        clock: Clock,
        metrics: Arc<BrokerMetrics>,
        inbox: Receiver<Item>,
    ) -> Self {
        Self {
            shard,
            first_group,
            router,
            clock,
            metrics,
            inbox,
            in_flight: VecDeque::new(),
            failed: VecDeque::new(),
            again: VecDeque::new(),
            resume: None,
            heir: None,
            pause: PAUSE_MIN,
            lost_looks: 0,
            given_up: GivenUp::default(),
        }
    }

    fn group(&self) -> GroupId {
        self.router.view.owner_of(self.shard).unwrap_or(self.first_group)
    }

    pub async fn run(mut self, token: CancellationToken) {
        let alone = self.router.peers.is_none();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.in_flight.is_empty() {
                while let Some(waiting) = self.failed.pop_back() {
                    self.again.push_front(waiting);
                }
            }
            let full = self.in_flight.len() >= ENTRIES_IN_FLIGHT;
            let held = self.resume.is_some();
            if !full && !held && !self.again.is_empty() {
                self.send(None).await;
                if token.is_cancelled() {
                    break;
                }
                continue;
            }
            let settled = self.in_flight.is_empty();
            let group = self.group();
            tokio::select! {
                biased;
                (waiting, group, answer) = answer(&mut self.in_flight) => self.finish(waiting, group, answer),
                item = self.inbox.recv(), if !full && !held => match item {
                    Some(item) => self.send(Some(item.into())).await,
                    None => break,
                },
                () = pause(&self.router, self.shard, group, self.heir, self.resume), if held && settled => {
                    self.resume = None;
                    self.heir = None;
                }
                _ = look.tick(), if !alone && !settled => self.look(),
                () = token.cancelled() => break,
            }
        }
        // Everything that was proposed is answered; what still waits was not processed.
        self.inbox.close();
        while let Ok(Some(item)) = self.inbox.try_recv() {
            self.conclude(item.into(), Err(PublishError::Stopping));
        }
        for waiting in std::mem::take(&mut self.again) {
            self.conclude(waiting, Err(PublishError::Stopping));
        }
        while !self.in_flight.is_empty() {
            let (waiting, group, answer) = answer(&mut self.in_flight).await;
            self.finish(waiting, group, answer);
        }
        for waiting in std::mem::take(&mut self.failed) {
            self.conclude(waiting, Err(PublishError::Stopping));
        }
    }

    /// The batches of the next entry.
    fn gather(&mut self, first: Option<Waiting>) -> Vec<Waiting> {
        let (mut bytes, mut body_bytes) = (0, 0);
        let mut gathered = Vec::new();
        let mut next = first.or_else(|| self.next());
        while let Some(waiting) = next {
            if self.is_behind(&waiting) {
                self.refuse_behind(waiting);
            } else {
                bytes += waiting.item.batch.len();
                body_bytes += body_of(&waiting.item);
                gathered.push(self.taken(waiting));
            }
            let has_room = bytes < ENTRY_BYTES && body_bytes < ENTRY_BODY_BYTES && gathered.len() < ENTRY_ITEMS_MAX;
            next = if has_room { self.next() } else { None };
        }
        gathered
    }

    /// The next batch that waits.
    fn next(&mut self) -> Option<Waiting> {
        let again = self.again.pop_front();
        again.or_else(|| self.inbox.try_recv().ok().flatten().map(Waiting::from))
    }

    /// Whether its producer must send another one again first.
    fn is_behind(&self, waiting: &Waiting) -> bool {
        waiting.stamp().is_some_and(|stamp| self.given_up.is_behind(stamp))
    }

    /// A batch whose turn it is. What ended as unknown before may be stored, however this attempt ends.
    fn taken(&mut self, mut waiting: Waiting) -> Waiting {
        let was_unknown = waiting.stamp().is_some_and(|stamp| self.given_up.take(stamp));
        waiting.uncertain |= was_unknown;
        waiting
    }

    fn no_leader(&self) -> PublishError {
        let group = self.group();
        ProposeError::NotLeader { group, leader: None }.into()
    }

    /// Sends one entry. `first` only while nothing is to be sent again.
    async fn send(&mut self, first: Option<Waiting>) {
        let group = self.group();
        let waiting = self.gather(first);
        if waiting.is_empty() {
            return;
        }
        match self.router.route(group) {
            // What is not proposed is certain not to be stored; a quorum that returns finds it waiting.
            Route::Here(replica) if self.router.without_quorum(group).is_some() => {
                self.failed_to_leave(waiting, replica.id, self.no_leader());
            }
            Route::Here(replica) => self.propose(&replica, waiting).await,
            Route::There(node) => {
                let own = self.not_for_others(waiting);
                if let Some(peers) = self.router.peers.clone().filter(|_| !own.is_empty()) {
                    self.relay(&peers, node, group, own).await;
                }
            }
            Route::Nowhere => {
                let own = self.not_for_others(waiting);
                if !own.is_empty() {
                    self.failed_to_leave(own, group, self.no_leader());
                }
            }
        }
    }

    /// Answers what came from other nodes: it has made its hop.
    fn not_for_others(&mut self, waiting: Vec<Waiting>) -> Vec<Waiting> {
        let (relayed, own): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|w| w.relayed);
        let group = self.group();
        for waiting in relayed {
            let leader = self
                .router
                .groups
                .get(group)
                .and_then(|g| g.watch_leader().borrow().leader);
            self.conclude(waiting, Err(ProposeError::NotLeader { group, leader }.into()));
        }
        own
    }

    async fn propose(&mut self, replica: &Group, mut waiting: Vec<Waiting>) {
        let items: Vec<_> = waiting.iter_mut().map(|w| std::mem::take(&mut w.item)).collect();
        self.metrics
            .entry(items.len(), items.iter().map(|i| i.batch.len()).sum());
        let command = pb::GroupCommand {
            feature_level: self.router.view.feature_level(),
            op: Some(pb::group_command::Op::Publish(pb::Publish {
                shard_id: self.shard.get(),
                time_us: self.clock.now_us(),
                items,
            })),
        };
        let bytes: Bytes = command.encode_to_vec().into();
        // A node without peers never sends a batch twice: it does not keep the bytes.
        if self.router.peers.is_some()
            && let Some(pb::group_command::Op::Publish(publish)) = command.op
        {
            for (waiting, item) in waiting.iter_mut().zip(publish.items) {
                waiting.item = item;
            }
        }
        match replica.propose(bytes).await {
            Ok(pending) => self.in_flight.push_back(InFlight {
                group: replica.id,
                to: None,
                sent: Sent::Here(pending),
                left: true,
                since: Instant::now(),
                waiting,
            }),
            Err(e) => self.failed_to_leave(waiting, replica.id, e.into()),
        }
    }

    async fn relay(&mut self, peers: &Peers, node: NodeId, group: GroupId, mut waiting: Vec<Waiting>) {
        let items: Vec<_> = waiting.iter_mut().map(|w| std::mem::take(&mut w.item)).collect();
        let call = pb::RelayPublish {
            group_id: group.get(),
            shard_id: self.shard.get(),
            items,
        };
        let payload = call.encode_to_vec().into();
        for (waiting, item) in waiting.iter_mut().zip(call.items) {
            waiting.item = item;
        }
        let method = crate::raft::transport::PeerMethod::Publish;
        let leaving = peers.begin_call(node, method, payload, RELAY_PATIENCE);
        let router = self.router.clone();
        let patience = match router.is_apart(node) {
            true => LEAVE_PATIENCE_APART,
            false => LEAVE_PATIENCE,
        };
        match tokio::time::timeout(patience, leaving).await {
            Ok(Ok(call)) => {
                let answer = async move { relayed(&router, node, group, call.answer().await) };
                self.in_flight.push_back(InFlight {
                    group,
                    to: Some(node),
                    sent: Sent::There(answer.boxed()),
                    left: true,
                    since: Instant::now(),
                    waiting,
                });
            }
            Ok(Err(e)) => self.failed_to_leave(waiting, group, call_failed(&router, node, group, &e)),
            Err(_) => {
                let stopped = ProposeError::NotLeader { group, leader: None };
                self.failed_to_leave(waiting, group, stopped.into());
            }
        }
    }

    /// An entry that did not leave takes its place in the order of answers.
    fn failed_to_leave(&mut self, waiting: Vec<Waiting>, group: GroupId, error: PublishError) {
        self.in_flight.push_back(InFlight {
            group,
            to: None,
            left: error.retry_class() == RetryClass::MayHaveHappened,
            sent: Sent::There(std::future::ready(Answer::All(error)).boxed()),
            since: Instant::now(),
            waiting,
        });
    }

    fn finish(&mut self, waiting: Vec<Waiting>, group: GroupId, answer: Answer) {
        match answer {
            Answer::Each(outcomes) => {
                let mut outcomes = outcomes.into_iter();
                for waiting in waiting {
                    let outcome = outcomes.next();
                    let outcome = outcome.unwrap_or_else(|| Err(ProposeError::Unknown { group }.into()));
                    self.settle(waiting, outcome);
                }
            }
            Answer::All(error) => {
                for waiting in waiting {
                    self.settle(waiting, Err(error.clone()));
                }
            }
            Answer::NoShard => {
                let error = self.without_shard();
                for waiting in waiting {
                    self.settle(waiting, Err(error.clone()));
                }
            }
        }
        // Who says that the shard is where it was asked for is behind: that is no heir to wait for.
        self.heir = self.heir.filter(|heir| !self.failed.is_empty() && *heir != group);
        if !self.failed.is_empty() && self.resume.is_none() {
            let pause = match self.heir {
                Some(heir) if heir != self.group() => ADOPTION,
                Some(_) => Duration::ZERO,
                None => {
                    let pause = self.pause;
                    self.pause = (pause * 2).min(PAUSE_MAX);
                    pause
                }
            };
            self.resume = Some(Instant::now() + pause);
        }
    }

    /// Why a group that was asked does not have the shard: it went on from there, or is gone.
    fn without_shard(&self) -> PublishError {
        let view = &self.router.view;
        match view.owner_of(self.shard).filter(|_| view.is_in_use(self.shard)) {
            Some(to) => PublishError::Moved { to },
            None => PublishError::Removed,
        }
    }
}

/// Bytes of a batch's records when they are not compressed.
fn body_of(item: &pb::PublishItem) -> usize {
    // An empty batch only uses up a producer number; all others were validated.
    BatchHeader::peek(&item.batch).map_or(0, |header| header.body_bytes as usize)
}

/// Waits for the oldest entry. Pending for ever when there is none.
async fn answer(in_flight: &mut VecDeque<InFlight>) -> (Vec<Waiting>, GroupId, Answer) {
    let Some(front) = in_flight.front_mut() else {
        return std::future::pending().await;
    };
    // Only the wait may be cancelled by the select around this; taking it off the queue happens with the answer.
    let answer = match &mut front.sent {
        Sent::Here(pending) => match pending.wait().await {
            Ok((_, _, Applied::Command(GroupOutcome::Published(outcomes)))) => {
                Answer::Each(outcomes.into_iter().map(Ok).collect())
            }
            Ok((_, _, Applied::Command(GroupOutcome::Moved { to }))) => Answer::All(PublishError::Moved { to }),
            Ok((_, _, Applied::Command(GroupOutcome::NoShard))) => Answer::NoShard,
            // Nothing answers a publish with anything else.
            Ok((_, _, Applied::Command(_) | Applied::Done)) => Answer::All(PublishError::Removed),
            Err(e) => Answer::All(e.into()),
        },
        Sent::There(answer) => answer.await,
    };
    match in_flight.pop_front() {
        Some(front) => (front.waiting, front.group, answer),
        None => (Vec::new(), GroupId::META, answer),
    }
}
