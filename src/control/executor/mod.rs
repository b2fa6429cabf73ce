//! Makes the plan come true. On the meta group's leader: hears every node every second, plans, proposes what the catalog
//! must say, and asks the leaders of groups for their part. On every node: what the leader of a group has to do.

mod duties;
mod liveness;
mod moves;
mod pong;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use prost::Message;
use tokio_util::sync::CancellationToken;

pub(super) use duties::{Orders, serve_groups};
pub(super) use liveness::Liveness;

use super::Control;
use super::meta::QUORUM_AGE;
use super::placement::{Action, GroupReport, MetaReport, NodeReport, Reports, Step, plan};
use super::view::ShardPlace;
use crate::machine::MetaOutcome;
use crate::machine::placement::is_lost;
use crate::model::{GroupId, LogIndex, NodeId, ReplicaId, ShardId, StreamId, TimeUs};
use crate::raft::Group;
use crate::raft::transport::PeerMethod;
use crate::wire::{internal as pb, v1};

/// Between two rounds, when nothing changes.
const ROUND: Duration = Duration::from_secs(1);
/// While streams wait for shards on other nodes.
const SOON: Duration = Duration::from_millis(100);
/// How long a node may take to answer.
const PING: Duration = Duration::from_millis(1_000);
/// How long a hand-over may take.
const TRANSFER: Duration = Duration::from_secs(5);
/// Proposals of one round.
const PROPOSALS_MAX: usize = 64;

/// What the leader has heard.
struct Heard {
    begun: Instant,
    reports: Reports,
    /// Of the last round.
    shards_here: std::collections::HashSet<ShardId>,
    shards_gone: std::collections::HashSet<ShardId>,
}

impl Heard {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            reports: Reports::default(),
            shards_here: Default::default(),
            shards_gone: Default::default(),
        }
    }

    /// By the monotonic clock of this leadership; never 0, which means "never".
    fn now(&self) -> TimeUs {
        TimeUs::new(1 + u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// Runs until cancelled; does something while this node leads the meta group.
pub(super) async fn lead(control: Arc<Control>, token: CancellationToken) {
    let mut changes = control.view.watch();
    let mut heard: Option<Heard> = None;
    loop {
        changes.borrow_and_update();
        let meta = control.groups.get(GroupId::META);
        let leads = meta.filter(|meta| meta.leads_quorum(QUORUM_AGE));
        let mut pause = ROUND;
        match leads {
            Some(meta) => {
                let heard = heard.get_or_insert_with(Heard::new);
                control.liveness.lead(heard.begun);
                match token.run_until_cancelled(control.round(&meta, heard)).await {
                    None => return,
                    Some(waiting) if waiting => pause = SOON,
                    Some(_) => {}
                }
            }
            None => {
                heard = None;
                control.liveness.follow();
            }
        }
        // A change is looked at soon, but many in a row together.
        let wait = async {
            tokio::select! {
                _ = changes.changed() => tokio::time::sleep(SOON.min(pause)).await,
                () = tokio::time::sleep(pause) => {}
            }
        };
        if token.run_until_cancelled(wait).await.is_none() {
            return;
        }
    }
}

impl Control {
    /// One round of the meta group's leader. True: streams wait for something that no change of the view tells.
    async fn round(&self, meta: &Group, heard: &mut Heard) -> bool {
        let asked = self.shards_in_question();
        self.ping_all(meta, heard, &asked).await;
        self.settle_streams(heard).await;
        let Some(shape) = self.view.shape() else { return false };
        let actions = plan(&shape, &heard.reports, heard.now());
        let unblocked = actions.iter().filter(|action| action.blocked.is_none());
        for action in unblocked.take(PROPOSALS_MAX) {
            self.carry_out(meta, action).await;
        }
        !asked.is_empty()
    }

    /// Where are the shards of streams that are being made or dropped?
    fn shards_in_question(&self) -> Vec<pb::ShardPlacement> {
        let streams = self.view.all_streams();
        let unsettled = streams
            .iter()
            .filter(|stream| stream.state == v1::StreamState::Creating || stream.doomed);
        let places = unsettled
            .flat_map(|stream| &stream.shards)
            .map(|place| pb::ShardPlacement {
                index: place.index,
                shard_id: place.shard.get(),
                group_id: place.group.get(),
                moving: None,
            });
        places.collect()
    }

    async fn ping_all(&self, meta: &Group, heard: &mut Heard, asked: &[pb::ShardPlacement]) {
        let Some(peers) = &self.peers else { return };
        let ping = pb::NodePing {
            shards: asked.to_vec(),
            ..pb::NodePing::default()
        };
        let ping = bytes::Bytes::from(ping.encode_to_vec());
        let nodes: Vec<NodeId> = self
            .view
            .nodes()
            .iter()
            .filter(|node| node.state() != pb::NodeState::Removed)
            .map(|node| NodeId::new(node.node_id))
            .collect();
        let pings = nodes.into_iter().map(|node| {
            let ping = ping.clone();
            async move {
                let answer = peers.call(node, PeerMethod::NodePing, ping, PING).await.ok()?;
                Some((node, pb::NodePong::decode(answer).ok()?))
            }
        });
        let pongs: Vec<(NodeId, pb::NodePong)> = join_all(pings).await.into_iter().flatten().collect();
        let now = heard.now();
        heard.shards_here.clear();
        heard.shards_gone.clear();
        heard.reports.groups.clear();
        for (node, pong) in pongs {
            self.liveness.seen(node);
            heard
                .shards_here
                .extend(pong.shards_here.iter().copied().map(ShardId::new));
            heard
                .shards_gone
                .extend(pong.shards_gone.iter().copied().map(ShardId::new));
            let mut report = NodeReport {
                last_seen: now,
                bytes: pong.bytes,
                damaged: pong.damaged.into_iter().map(ReplicaId::new).collect(),
                stopping: pong.stopping,
                handed_over: pong.handed_over.into_iter().map(GroupId::new).collect(),
                ..NodeReport::default()
            };
            for group in pong.groups {
                let id = GroupId::new(group.group_id);
                if let Some(purged) = group.purged {
                    report.purged.insert(id, LogIndex::new(purged));
                }
                if group.leads && id != GroupId::META {
                    let told = GroupReport {
                        leader: ReplicaId::new(group.replica_id),
                        current: group.current.into_iter().map(ReplicaId::new).collect(),
                    };
                    self.liveness.current(id, told.current.clone());
                    heard.reports.groups.insert(id, told);
                }
            }
            heard.reports.nodes.insert(node, report);
        }
        let members = meta.members();
        heard.reports.meta = MetaReport {
            leader: Some(meta.replica),
            voters: match members.committed && !members.joint {
                true => members.voters,
                // Not over yet: none of the memberships that the catalog may ask for.
                false => Default::default(),
            },
            current: duties::current(meta).into_iter().collect(),
        };
    }

    /// Whether half or more of a group's voters were on nodes that were removed: it will never have a leader again.
    fn is_lost(&self, group: GroupId) -> bool {
        let removed = |node: NodeId| {
            let node = self.view.node(node);
            node.is_some_and(|node| node.state() == pb::NodeState::Removed)
        };
        (self.view.group_record(group)).is_some_and(|record| is_lost(&record, removed))
    }

    /// Streams of which every shard is there become active; those of which none is left are forgotten.
    async fn settle_streams(&self, heard: &Heard) {
        for stream in self.view.all_streams() {
            let all = |set: &std::collections::HashSet<ShardId>| stream.shards.iter().all(|p| set.contains(&p.shard));
            // Nobody is left who could drop or keep what was on nodes that were removed.
            let gone = || {
                let gone = |p: &ShardPlace| heard.shards_gone.contains(&p.shard) || self.is_lost(p.group);
                stream.shards.iter().all(gone)
            };
            if stream.state == v1::StreamState::Creating && all(&heard.shards_here) {
                self.activate(stream.id).await;
            } else if stream.state == v1::StreamState::Removed && stream.doomed && gone() {
                let op = pb::meta_command::Op::ForgetStream(pb::ForgetStream {
                    stream_id: stream.id.to_string(),
                    dropped: true,
                });
                self.tell_catalog("forgetting a stream", op).await;
            }
        }
    }

    /// True when the catalog has it.
    pub(super) async fn activate(&self, stream: StreamId) -> bool {
        let op = pb::meta_command::Op::ActivateStream(pb::ActivateStream {
            stream_id: stream.to_string(),
        });
        self.tell_catalog("activating a stream", op).await
    }

    /// Proposes what is found again in a later round if it fails. True when it was not refused.
    pub(super) async fn tell_catalog(&self, what: &'static str, op: pb::meta_command::Op) -> bool {
        match self.propose_meta(String::new(), op).await {
            Ok(MetaOutcome::Refused(refusal)) => {
                tracing::debug!(what, %refusal, "the catalog does not take this");
                false
            }
            Ok(_) => true,
            Err(error) => {
                tracing::info!(what, %error, "not done; it is tried again");
                false
            }
        }
    }

    async fn carry_out(&self, meta: &Group, action: &Action) {
        if let Step::ChangeReplicas { group, add, .. } = &action.step {
            // Its former replica there is set aside: another one cannot run over it.
            let record = self.view.group_record(*group);
            let was_on = |node: &NodeId| {
                let record = record.as_ref();
                record.is_some_and(|record| record.removed.iter().any(|replica| replica.node_id == node.get()))
            };
            if add.iter().any(was_on) {
                tracing::debug!(%action, "a node that has given up a replica of a group gets no other one of it");
                return;
            }
        }
        if let Some(op) = action.step.command() {
            tracing::info!(%action, "planned");
            self.tell_catalog("a planned step", op).await;
            return;
        }
        let (group, to) = match &action.step {
            Step::TransferLeader { group, to, .. } => (*group, *to),
            Step::ChangeReplicas { .. }
            | Step::AbortChange { .. }
            | Step::SplitShard { .. }
            // The groups' leaders find these by themselves: see `duties.rs`.
            | Step::SealShard { .. }
            | Step::UnsealShard { .. }
            | Step::AdoptShard { .. }
            | Step::FinishMove { .. }
            | Step::SetMetaVoters { .. }
            | Step::RenewMetaReplica { .. }
            | Step::Hold { .. } => return,
        };
        tracing::info!(%action, "handing over");
        if group != GroupId::META {
            self.order_transfer(group, to).await;
        } else if let Err(error) = meta.transfer_leader(to, TRANSFER).await {
            tracing::warn!(%error, "the meta group was not handed over");
        }
    }

    /// Every node that holds the group is asked; the one that leads does it.
    async fn order_transfer(&self, group: GroupId, to: ReplicaId) {
        let (Some(peers), Some(place)) = (&self.peers, self.view.group(group)) else {
            return;
        };
        let ping = pb::NodePing {
            orders: vec![pb::LeaderOrder {
                group_id: group.get(),
                transfer_to: to.get(),
            }],
            ..pb::NodePing::default()
        };
        let ping = bytes::Bytes::from(ping.encode_to_vec());
        let calls = place
            .replicas
            .iter()
            .map(|(_, node)| peers.call(*node, PeerMethod::NodePing, ping.clone(), PING));
        for answer in join_all(calls).await {
            if let Err(error) = answer {
                tracing::debug!(%error, "a node did not hear an order");
            }
        }
    }
}
