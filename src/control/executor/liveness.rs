//! Which nodes can be reached, as the meta group's leader sees it.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::control::Control;
use crate::control::placement::LIVE_FOR_US;
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::wire::internal as pb;

const LIVE_FOR: Duration = Duration::from_micros(LIVE_FOR_US);

/// When each node was heard of.
#[derive(Debug, Default)]
pub struct Liveness {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    seen: HashMap<NodeId, Instant>,
    leads_since: Option<Instant>,
    /// By the leaders of groups: which replicas have (nearly) everything, and when that was told.
    current: HashMap<GroupId, (BTreeSet<ReplicaId>, Instant)>,
}

impl Liveness {
    pub(super) fn seen(&self, node: NodeId) {
        self.inner.lock().seen.insert(node, Instant::now());
    }

    pub(super) fn current(&self, group: GroupId, replicas: BTreeSet<ReplicaId>) {
        self.inner.lock().current.insert(group, (replicas, Instant::now()));
    }

    pub(super) fn lead(&self, since: Instant) {
        self.inner.lock().leads_since = Some(since);
    }

    pub(super) fn follow(&self) {
        *self.inner.lock() = Inner::default();
    }
}

impl Control {
    /// Groups with shards and a replica on the node that are not known to keep a majority of replicas with everything when
    /// it goes: by what their leaders told of late. Where a change of voters may be made, both majorities count.
    pub(in crate::control) fn weak_without(&self, node: NodeId) -> Vec<u64> {
        let inner = self.liveness.inner.lock();
        let is_weak = |record: &pb::GroupRecord| {
            let told = inner.current.get(&GroupId::new(record.group_id));
            let Some((current, _)) = told.filter(|(_, at)| at.elapsed() <= LIVE_FOR) else {
                return true;
            };
            let of = |replica: &pb::ReplicaRecord| replica.node_id == node.get();
            let sound =
                |replica: &&pb::ReplicaRecord| !of(replica) && current.contains(&ReplicaId::new(replica.replica_id));
            let majority = |votes: &dyn Fn(&pb::ReplicaRecord) -> bool| {
                let all = || record.replicas.iter().filter(|replica| votes(replica));
                all().filter(sound).count() * 2 > all().count()
            };
            let votes = |replica: &pb::ReplicaRecord| replica.role() == pb::ReplicaRole::Voter;
            let will_vote = |replica: &pb::ReplicaRecord| match &record.change {
                Some(change) => {
                    (votes(replica) || change.add.contains(&replica.replica_id))
                        && !change.remove.contains(&replica.replica_id)
                }
                None => votes(replica),
            };
            let may_be_changed = record.change.as_ref().is_some_and(|change| change.ready);
            !(majority(&votes) && (!may_be_changed || majority(&will_vote)))
        };
        let records = self.view.group_records();
        let held = records
            .iter()
            .filter(|record| record.shards > 0 && record.replicas.iter().any(|replica| replica.node_id == node.get()));
        held.filter(|record| is_weak(record))
            .map(|record| record.group_id)
            .collect()
    }

    /// Nodes on which nothing may be placed now, as far as this node, which leads the meta group, can tell. One whose
    /// connection is broken is gone at once; one that is silent, after a while; a leader that is new goes by connections.
    pub(in crate::control) fn unreachable_nodes(&self) -> Vec<u64> {
        let Some(peers) = &self.peers else { return Vec::new() };
        let links = peers.links();
        let up = |node: NodeId| links.iter().any(|link| link.node == node && link.up);
        let inner = self.liveness.inner.lock();
        let new = inner.leads_since.is_none_or(|since| since.elapsed() < LIVE_FOR);
        let heard = |node: NodeId| inner.seen.get(&node).is_some_and(|at| at.elapsed() <= LIVE_FOR);
        self.view
            .nodes()
            .iter()
            .filter(|node| node.state() != pb::NodeState::Removed)
            .map(|node| NodeId::new(node.node_id))
            .filter(|node| *node != self.facts.node && !(up(*node) && (new || heard(*node))))
            .map(NodeId::get)
            .collect()
    }
}
