//! What must hold when everything has come to rest.

use std::collections::{BTreeMap, BTreeSet};

use mainstem::machine::placement::ClusterShape;
use mainstem::model::{GroupId, NodeId};
use mainstem::wire::internal::v1::{self as pb, NodeState};

use super::World;

impl World {
    /// Nodes that may take replicas of a group.
    fn usable(&self, group: &pb::GroupRecord) -> Vec<u64> {
        let shape = self.machine.shape();
        let fits = |node: &&std::sync::Arc<pb::NodeRecord>| {
            let node_shape = &shape.nodes[&NodeId::new(node.node_id)];
            node.state() == NodeState::Active
                && self.is_up(node.node_id)
                && node_shape.allowed_by(group.placement.as_ref()).is_ok()
        };
        let nodes = self.machine.present_nodes().filter(fits);
        nodes.map(|node| node.node_id).collect()
    }

    /// What must hold when everything has come to rest.
    pub fn check_rest(&self) -> Result<(), String> {
        let shape: ClusterShape = self.machine.shape();
        let zone = |node: u64| shape.nodes[&NodeId::new(node)].zone.clone();
        for group in self.machine.groups() {
            let id = GroupId::new(group.group_id);
            let Some(raft) = self.rafts.get(&id).filter(|raft| raft.leader.is_some()) else {
                continue;
            };
            let usable = self.usable(group);
            let on: Vec<u64> = group.replicas.iter().map(|replica| replica.node_id).collect();
            let wanted = group.replica_count as usize;
            let fail = |what: &str| Err(format!("{id} on {on:?} of {usable:?}, wanted {wanted}: {what}"));
            if raft.voters != group.replicas.iter().map(|replica| replica.replica_id).collect() {
                return fail("the catalog does not say who votes");
            }
            if on.iter().collect::<BTreeSet<_>>().len() != on.len() {
                return fail("two replicas on a node");
            }
            if usable.len() >= wanted {
                if on.len() != wanted {
                    return fail("another number of replicas than wanted");
                }
                if on.iter().any(|node| !usable.contains(node)) {
                    return fail("a replica on a node that is drained, gone or not allowed");
                }
            }
            let count = |z: &str, on: &[u64]| on.iter().filter(|node| zone(**node) == z).count();
            for node in on.iter().filter(|node| usable.contains(node)) {
                let others: Vec<u64> = on.iter().copied().filter(|other| other != node).collect();
                let better = usable
                    .iter()
                    .find(|to| !on.contains(to) && count(&zone(**to), &others) < count(&zone(*node), &others));
                if let Some(to) = better {
                    return fail(&format!("n{node} shares its zone, n{to} would not"));
                }
            }
        }
        self.check_leaders(&shape)?;
        self.check_splits(&shape)
    }

    fn check_leaders(&self, shape: &ClusterShape) -> Result<(), String> {
        let mut leads: BTreeMap<u64, u32> = BTreeMap::new();
        let mut could: Vec<(u64, u64, GroupId)> = vec![];
        for group in self.machine.groups() {
            let id = GroupId::new(group.group_id);
            let Some(leader) = self.rafts.get(&id).and_then(|raft| raft.leader) else {
                continue;
            };
            let node = self.node_of(group, leader).unwrap();
            *leads.entry(node).or_default() += 1;
            let free = group.change.is_none() && shape.moves_of(id).next().is_none();
            for other in group.replicas.iter().filter(|replica| self.is_up(replica.node_id)) {
                if free && other.replica_id != leader {
                    could.push((node, other.node_id, id));
                }
            }
        }
        let count = |node: u64| leads.get(&node).copied().unwrap_or(0);
        let active = |node: u64| shape.nodes[&NodeId::new(node)].state == NodeState::Active;
        for (from, to, group) in could {
            if !active(to) {
                continue;
            }
            if !active(from) {
                return Err(format!("n{from} is drained and still leads {group}, n{to} could"));
            }
            if count(from) > count(to) + 1 {
                return Err(format!(
                    "n{from} leads {}, n{to} {}: {group} could move",
                    count(from),
                    count(to)
                ));
            }
        }
        Ok(())
    }

    fn check_splits(&self, shape: &ClusterShape) -> Result<(), String> {
        let healthy = |group: &GroupId| {
            let record = self.machine.group(*group).unwrap();
            self.led(*group) && record.replicas.iter().all(|replica| self.can_seal(replica))
        };
        match shape.splits.iter().find(|split| healthy(&split.group)) {
            Some(split) => Err(format!(
                "{} of {} is still in its pooled group",
                split.shard, split.name
            )),
            None => Ok(()),
        }
    }
}
