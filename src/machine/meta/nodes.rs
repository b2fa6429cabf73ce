//! Nodes come, come back, are drained and go; what the cluster as a whole is set to.

use std::sync::Arc;

use super::{FIRST_META_REPLICA, MetaMachine, MetaOutcome, MetaRefusal};
use crate::machine::placement::voters_of;
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::limits::{META_VOTERS_MAX, NODES_MAX, NODES_REMEMBERED_MAX, PLACEMENT_TAGS_MAX};
use crate::model::{GroupId, NodeId};
use crate::wire::internal::v1::{self as pb, NodeState};
use crate::wire::spec;

type Outcome = Result<MetaOutcome, MetaRefusal>;

/// A node is not replaced quicker than this: a restart takes a while.
const REPLACE_AFTER_MIN_US: u64 = 1_000_000;
/// Replicas that may come to or leave one node at a time.
const MOVES_PER_NODE_MAX: u32 = 64;

/// The cluster version that a record means.
fn version(told: u32) -> u32 {
    told.max(1)
}

impl MetaMachine {
    /// The version of the features in force.
    pub fn cluster_version(&self) -> u32 {
        version(self.cluster.as_ref().map_or(0, |cluster| cluster.cluster_version))
    }

    /// Nodes that were not removed.
    pub fn present_nodes(&self) -> impl Iterator<Item = &Arc<pb::NodeRecord>> {
        self.nodes.values().filter(|node| node.state() != NodeState::Removed)
    }

    /// A node, removed or not.
    pub fn node(&self, id: NodeId) -> Option<&Arc<pb::NodeRecord>> {
        self.nodes.get(&id)
    }

    fn put_node(&mut self, sink: &mut dyn ShardSink, node: pb::NodeRecord) -> Arc<pb::NodeRecord> {
        use prost::Message;
        sink.put_meta(MetaKind::Node, &node.node_id.to_be_bytes(), &node.encode_to_vec());
        let node = Arc::new(node);
        self.nodes.insert(NodeId::new(node.node_id), node.clone());
        node
    }

    pub(super) fn register_node(&mut self, sink: &mut dyn ShardSink, time_us: u64, node: &pb::RegisterNode) -> Outcome {
        // What it does not tell stays as it is.
        let known = self
            .nodes
            .get(&NodeId::new(node.node_id))
            .map(|known| (**known).clone());
        let known = known.unwrap_or_default();
        self.join_node(
            sink,
            time_us,
            &pb::JoinNode {
                node_id: node.node_id,
                name: node.name.clone(),
                store_id: known.store_id,
                incarnation: node.incarnation,
                peer_address: known.peer_address,
                client_address: node.client_address.clone(),
                zone: known.zone,
                tags: known.tags,
                cluster_version_max: known.cluster_version_max,
                binary_version: known.binary_version,
                ..pb::JoinNode::default()
            },
        )
    }

    pub(super) fn join_node(&mut self, sink: &mut dyn ShardSink, time_us: u64, join: &pb::JoinNode) -> Outcome {
        self.may_join(join)?;
        let id = NodeId::new(join.node_id);
        let known = self.nodes.get(&id);
        let or = |told: &String, known: Option<&String>| match told.is_empty() {
            true => known.cloned().unwrap_or_default(),
            false => told.clone(),
        };
        let mut record = pb::NodeRecord {
            node_id: join.node_id,
            name: join.name.clone(),
            incarnation: join.incarnation,
            client_address: join.client_address.clone(),
            store_id: or(&join.store_id, known.map(|known| &known.store_id)),
            peer_address: or(&join.peer_address, known.map(|known| &known.peer_address)),
            zone: join.zone.clone(),
            tags: join.tags.clone(),
            state: known.map_or(NodeState::Active, |known| known.state()) as i32,
            meta_replica_id: known.map_or(0, |known| known.meta_replica_id),
            registered_us: known.map_or(time_us, |known| known.registered_us),
            restarted_us: match known {
                Some(known) if known.incarnation == join.incarnation => known.restarted_us,
                Some(_) | None => time_us,
            },
            cluster_version_max: join.cluster_version_max,
            binary_version: join.binary_version.clone(),
            state_since_us: known.map_or(time_us, |known| known.state_since_us),
        };
        if let Some(known) = known
            && **known == record
            && (self.cluster.is_none() || record.meta_replica_id != 0)
        {
            return Ok(MetaOutcome::NodeRegistered {
                node: known.clone(),
                changed: false,
            });
        }
        let Some(cluster) = &self.cluster else {
            let node = self.put_node(sink, record);
            return Ok(MetaOutcome::NodeRegistered { node, changed: true });
        };
        let mut cluster = pb::ClusterRecord::clone(cluster);
        // Those that joined before there were replicas of the meta group to give have the first claim.
        if !self.nodes.contains_key(&id) {
            self.give_meta_replicas(sink, &mut cluster);
        }
        give_meta_replica(&mut cluster, &mut record);
        let node = self.put_node(sink, record);
        self.give_pool_to(sink, &mut cluster, id);
        self.put_cluster(sink, cluster);
        Ok(MetaOutcome::NodeRegistered { node, changed: true })
    }

    /// Every node that has no replica of the meta group gets one.
    pub(super) fn give_meta_replicas(&mut self, sink: &mut dyn ShardSink, cluster: &mut pb::ClusterRecord) {
        let lacking: Vec<pb::NodeRecord> = self
            .present_nodes()
            .filter(|node| node.meta_replica_id == 0)
            .map(|node| pb::NodeRecord::clone(node))
            .collect();
        for mut node in lacking {
            give_meta_replica(cluster, &mut node);
            self.put_node(sink, node);
        }
    }

    fn may_join(&self, join: &pb::JoinNode) -> Result<(), MetaRefusal> {
        let bad = |why: String| MetaRefusal::BadNode { why };
        if join.node_id == 0 {
            return Err(bad("its id is 0".into()));
        }
        if join.tags.len() > PLACEMENT_TAGS_MAX {
            return Err(bad(format!(
                "it has {} tags; at most {PLACEMENT_TAGS_MAX} are allowed",
                join.tags.len()
            )));
        }
        let labels = join
            .tags
            .iter()
            .flat_map(|(key, value)| [("tags", key), ("tags", value)]);
        let zone = (!join.zone.is_empty()).then_some(("zone", &join.zone));
        for (field, label) in labels.chain(zone) {
            spec::check_label(field, label).map_err(|error| bad(error.to_string()))?;
        }
        let now = self.cluster_version();
        // A version that did not tell knows what was there before there were versions.
        if version(join.cluster_version_max) < now {
            return Err(MetaRefusal::NodeTooOld {
                name: join.name.clone(),
                knows: version(join.cluster_version_max),
                now,
            });
        }
        let known = self.nodes.get(&NodeId::new(join.node_id));
        if let Some(known) = known {
            if known.state() == NodeState::Removed {
                return Err(MetaRefusal::NodeRemoved {
                    name: known.name.clone(),
                    node_id: join.node_id,
                });
            }
            let both_told = !known.store_id.is_empty() && !join.store_id.is_empty();
            if both_told && known.store_id != join.store_id {
                return Err(MetaRefusal::OtherStore {
                    node_id: join.node_id,
                    known: known.store_id.clone(),
                    found: join.store_id.clone(),
                });
            }
            if known.incarnation > join.incarnation {
                return Err(MetaRefusal::StaleIncarnation {
                    node_id: join.node_id,
                    known: known.incarnation,
                });
            }
        }
        let mut others = self.nodes.values().filter(|node| node.node_id != join.node_id);
        if let Some(same) = others.find(|node| !join.store_id.is_empty() && node.store_id == join.store_id) {
            return Err(MetaRefusal::StoreTaken {
                store_id: join.store_id.clone(),
                node_id: same.node_id,
            });
        }
        let mut others = self.present_nodes().filter(|node| node.node_id != join.node_id);
        if let Some(other) = others.find(|node| node.name == join.name) {
            return Err(MetaRefusal::NodeNameTaken {
                name: join.name.clone(),
                node_id: other.node_id,
            });
        }
        let too_many = |what, max: usize| MetaRefusal::TooMany { what, max: max as u64 };
        if known.is_none() && self.present_nodes().count() >= NODES_MAX {
            return Err(too_many("nodes", NODES_MAX));
        }
        if known.is_none() && self.nodes.len() >= NODES_REMEMBERED_MAX {
            return Err(too_many("nodes, removed ones counted,", NODES_REMEMBERED_MAX));
        }
        Ok(())
    }

    fn present_node(&self, node_id: u64) -> Result<pb::NodeRecord, MetaRefusal> {
        match self.nodes.get(&NodeId::new(node_id)) {
            None => Err(MetaRefusal::NodeNotFound { node_id }),
            Some(node) if node.state() == NodeState::Removed => Err(MetaRefusal::NodeRemoved {
                name: node.name.clone(),
                node_id,
            }),
            Some(node) => Ok(pb::NodeRecord::clone(node)),
        }
    }

    /// Between active and draining.
    pub(super) fn set_node_state(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        node_id: u64,
        state: NodeState,
    ) -> Outcome {
        let mut node = self.present_node(node_id)?;
        if self.cluster.is_none() {
            return Err(MetaRefusal::NotInitialised);
        }
        if node.state() == state {
            return Ok(MetaOutcome::NodeChanged(Arc::new(node)));
        }
        node.state = state as i32;
        node.state_since_us = time_us;
        let node = self.put_node(sink, node);
        self.raise_revision(sink);
        Ok(MetaOutcome::NodeChanged(node))
    }

    pub(super) fn remove_node(&mut self, sink: &mut dyn ShardSink, time_us: u64, remove: &pb::RemoveNode) -> Outcome {
        let Some(cluster) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        let mut cluster = pb::ClusterRecord::clone(cluster);
        let mut node = match self.present_node(remove.node_id) {
            Ok(node) => node,
            // Once more: it is as asked for.
            Err(MetaRefusal::NodeRemoved { .. }) => {
                let node = self.nodes[&NodeId::new(remove.node_id)].clone();
                return Ok(MetaOutcome::NodeChanged(node));
            }
            Err(other) => return Err(other),
        };
        self.may_lose_meta_replica(&cluster, &node, &remove.unreachable_nodes)?;
        self.may_lose_replicas(&node, remove)?;
        if let Some(meta) = &mut cluster.meta {
            meta.voters.retain(|id| *id != node.meta_replica_id);
            meta.learners.retain(|id| *id != node.meta_replica_id);
            meta.epoch += 1;
        }
        node.state = NodeState::Removed as i32;
        node.state_since_us = time_us;
        node.meta_replica_id = 0;
        let node = self.put_node(sink, node);
        // It will never confirm anything.
        let waiting: Vec<GroupId> = self
            .groups
            .iter()
            .filter(|(_, group)| group.removed.iter().any(|replica| replica.node_id == node.node_id))
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            let mut group = pb::GroupRecord::clone(&self.groups[&id]);
            group.removed.retain(|replica| replica.node_id != node.node_id);
            self.put_group(sink, group);
        }
        self.renew_lost_pool(sink, &mut cluster, &remove.unreachable_nodes, None);
        self.put_cluster(sink, cluster);
        Ok(MetaOutcome::NodeChanged(node))
    }

    /// Without the node's replica, the voters that can be reached must be a majority of those that are left.
    fn may_lose_meta_replica(
        &self,
        cluster: &pb::ClusterRecord,
        node: &pb::NodeRecord,
        unreachable: &[u64],
    ) -> Result<(), MetaRefusal> {
        let voters = cluster.meta.as_ref().map_or(&[][..], |meta| &meta.voters);
        let is_last = !self.present_nodes().any(|other| other.node_id != node.node_id);
        if !voters.contains(&node.meta_replica_id) && !is_last {
            return Ok(());
        }
        let left: Vec<u64> = voters
            .iter()
            .copied()
            .filter(|id| *id != node.meta_replica_id)
            .collect();
        let live = self
            .present_nodes()
            .filter(|other| left.contains(&other.meta_replica_id) && !unreachable.contains(&other.node_id))
            .count() as u32;
        let needed = (left.len() as u32) / 2 + 1;
        if live < needed {
            return Err(MetaRefusal::WouldBreakQuorum {
                what: "the meta group".into(),
                live,
                needed,
            });
        }
        Ok(())
    }

    fn may_lose_replicas(&self, node: &pb::NodeRecord, remove: &pb::RemoveNode) -> Result<(), MetaRefusal> {
        let mut held = 0;
        for group in self.groups.values() {
            let here = |replica: &&pb::ReplicaRecord| replica.node_id == node.node_id;
            if !group.replicas.iter().any(|replica| here(&replica)) {
                continue;
            }
            held += 1;
            let voters = || voters_of(group);
            let reached = |replica: &&pb::ReplicaRecord| {
                let id = replica.node_id;
                let known = self.nodes.get(&NodeId::new(id));
                !remove.unreachable_nodes.contains(&id)
                    && known.is_some_and(|known| known.state() != NodeState::Removed)
            };
            let votes = voters().any(|replica| here(&replica));
            let live = voters().filter(|r| !here(r)).filter(reached).count() as u32;
            // The change that replaces it needs a majority of the voters as they are.
            let needed = voters().count() as u32 / 2 + 1;
            // A group without a shard holds nothing that could be lost.
            if remove.force && !remove.accept_loss && votes && live < needed && group.shards > 0 {
                return Err(MetaRefusal::WouldBreakQuorum {
                    what: format!("group {} ({} shards)", group.group_id, group.shards),
                    live,
                    needed,
                });
            }
        }
        let is_weak = |group: &pb::GroupRecord| {
            let here = |replica: &pb::ReplicaRecord| replica.node_id == node.node_id;
            remove.weak_groups.contains(&group.group_id) && group.shards > 0 && group.replicas.iter().any(here)
        };
        let weak = self.groups.values().find(|group| is_weak(group));
        if let Some(group) = weak.filter(|_| remove.force && !remove.accept_loss) {
            return Err(MetaRefusal::InFlight {
                what: format!(
                    "group {} ({} shards) is not known to have a majority of replicas with everything, besides that of {}; \
                     wait until it has",
                    group.group_id, group.shards, node.name
                ),
            });
        }
        if held > 0 && !remove.force && !remove.accept_loss {
            return Err(MetaRefusal::NodeHoldsReplicas {
                name: node.name.clone(),
                groups: held,
            });
        }
        Ok(())
    }

    pub(super) fn set_cluster_version(&mut self, sink: &mut dyn ShardSink, set: &pb::SetClusterVersion) -> Outcome {
        let now = self.cluster_version();
        let Some(cluster) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        if set.version < now {
            return Err(MetaRefusal::VersionDown {
                asked: set.version,
                now,
            });
        }
        let old: Vec<&str> = self
            .present_nodes()
            .filter(|node| version(node.cluster_version_max) < set.version)
            .map(|node| node.name.as_str())
            .collect();
        if !old.is_empty() {
            return Err(MetaRefusal::VersionNotKnown {
                asked: set.version,
                nodes: old.join(", "),
            });
        }
        if set.version == now {
            return Ok(MetaOutcome::ClusterChanged(cluster.clone()));
        }
        let mut cluster = pb::ClusterRecord::clone(cluster);
        cluster.cluster_version = set.version;
        Ok(MetaOutcome::ClusterChanged(self.put_cluster(sink, cluster)))
    }

    pub(super) fn update_settings(&mut self, sink: &mut dyn ShardSink, update: &pb::UpdateSettings) -> Outcome {
        let Some(known) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        let bad = |why: String| Err(MetaRefusal::BadSettings { why });
        let mut cluster = pb::ClusterRecord::clone(known);
        let settings = cluster.settings.get_or_insert_default();
        if let Some(voters) = update.meta_voters_max {
            if voters % 2 == 0 || voters > META_VOTERS_MAX {
                return bad(format!(
                    "meta_voters_max is {voters}; 1, 3 or {META_VOTERS_MAX} is allowed"
                ));
            }
            settings.meta_voters_max = voters;
        }
        if let Some(us) = update.replace_after_us {
            if us < REPLACE_AFTER_MIN_US {
                return bad(format!(
                    "replace_after is {us} µs; at least {REPLACE_AFTER_MIN_US} is allowed"
                ));
            }
            settings.replace_after_us = us;
        }
        if let Some(moves) = update.moves_per_node_max {
            if moves == 0 || moves > MOVES_PER_NODE_MAX {
                return bad(format!(
                    "moves_per_node_max is {moves}; 1-{MOVES_PER_NODE_MAX} is allowed"
                ));
            }
            settings.moves_per_node_max = moves;
        }
        if known.settings.unwrap_or_default() == *settings {
            return Ok(MetaOutcome::ClusterChanged(known.clone()));
        }
        Ok(MetaOutcome::ClusterChanged(self.put_cluster(sink, cluster)))
    }

    pub(super) fn set_meta_voters(&mut self, sink: &mut dyn ShardSink, set: &pb::SetMetaVoters) -> Outcome {
        let Some(cluster) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        let mut cluster = pb::ClusterRecord::clone(cluster);
        let meta = cluster.meta.get_or_insert_default();
        if meta.epoch != set.base_epoch {
            return Err(MetaRefusal::StaleEpoch {
                what: "the meta group's membership".into(),
                actual: meta.epoch,
            });
        }
        let bad = |why: String| Err(MetaRefusal::BadChange { why });
        let mut voters = set.voters.clone();
        voters.sort_unstable();
        voters.dedup();
        if voters.is_empty() || voters.len() > META_VOTERS_MAX as usize {
            return bad(format!(
                "{} voters of the meta group; 1-{META_VOTERS_MAX} are allowed",
                voters.len()
            ));
        }
        let mut all: Vec<u64> = meta.voters.iter().chain(&meta.learners).copied().collect();
        all.sort_unstable();
        if let Some(unknown) = voters.iter().find(|id| !all.contains(id)) {
            return bad(format!("r{unknown} is no replica of the meta group"));
        }
        let learners = all.into_iter().filter(|id| !voters.contains(id)).collect();
        if meta.voters != voters {
            meta.voters = voters;
            meta.learners = learners;
            meta.epoch += 1;
            self.put_cluster(sink, cluster);
        }
        let cluster = self.cluster.clone().expect("it was there before");
        Ok(MetaOutcome::ClusterChanged(cluster))
    }

    pub(super) fn renew_meta_replica(&mut self, sink: &mut dyn ShardSink, renew: &pb::RenewMetaReplica) -> Outcome {
        let Some(cluster) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        let mut cluster = pb::ClusterRecord::clone(cluster);
        let mut node = self.present_node(renew.node_id)?;
        if node.meta_replica_id != renew.replica_id {
            return Err(MetaRefusal::StaleEpoch {
                what: format!("the meta replica of node {}", node.name),
                actual: node.meta_replica_id,
            });
        }
        // It counts as lost already: what matters is that the others are enough.
        self.may_lose_meta_replica(&cluster, &node, &[])?;
        if let Some(meta) = &mut cluster.meta {
            meta.voters.retain(|id| *id != renew.replica_id);
            meta.learners.retain(|id| *id != renew.replica_id);
        }
        node.meta_replica_id = 0;
        give_meta_replica(&mut cluster, &mut node);
        let node = self.put_node(sink, node);
        self.put_cluster(sink, cluster);
        Ok(MetaOutcome::NodeChanged(node))
    }
}

/// Gives a node without one a replica of the meta group. The first node of all has the one that the cluster was founded
/// with, which votes; every other begins as a learner.
fn give_meta_replica(cluster: &mut pb::ClusterRecord, node: &mut pb::NodeRecord) {
    if node.meta_replica_id != 0 {
        return;
    }
    let meta = cluster.meta.get_or_insert_default();
    if meta.epoch == 0 {
        node.meta_replica_id = FIRST_META_REPLICA;
        meta.voters.push(node.meta_replica_id);
    } else {
        node.meta_replica_id = cluster.next_replica_id;
        cluster.next_replica_id += 1;
        meta.learners.push(node.meta_replica_id);
    }
    meta.epoch += 1;
}
