//! Which group holds a shard, and which nodes hold a group.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{MetaMachine, MetaRefusal};
use crate::machine::placement::{NodeShape, Nodes, Request, is_lost, place, voters_of, wanted_replicas};
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::{GroupId, NodeId};
use crate::wire::internal::v1::{self as pb, NodeState};
use crate::wire::v1::StreamSpec;

impl MetaMachine {
    /// Pool groups that have no replica yet get one on the first node there is.
    pub(super) fn give_pool_to(&mut self, sink: &mut dyn ShardSink, cluster: &mut pb::ClusterRecord, node: NodeId) {
        let homeless: Vec<pb::GroupRecord> = self
            .groups
            .values()
            .filter(|group| group.pooled && group.replicas.is_empty())
            .map(|group| pb::GroupRecord::clone(group))
            .collect();
        for mut group in homeless {
            group.replicas = new_replicas(cluster, &[node]);
            self.put_group(sink, group);
        }
    }

    /// Places the shards of a new stream and counts them in their groups: each in the least loaded pooled group with so
    /// many replicas and the same placement, or each in a new group of its own. Changes `cluster` (which the caller
    /// writes) and groups.
    pub(super) fn place_shards(
        &mut self,
        sink: &mut dyn ShardSink,
        cluster: &mut pb::ClusterRecord,
        spec: &StreamSpec,
        unreachable: &[u64],
    ) -> Result<Vec<pb::ShardPlacement>, MetaRefusal> {
        self.check_nodes(spec, unreachable)?;
        let mut maker = Maker {
            machine: self,
            spec,
            unreachable,
            nodes: None,
        };
        let mut chosen: BTreeMap<GroupId, pb::GroupRecord> = BTreeMap::new();
        if !spec.dedicated {
            chosen = maker.pool(cluster);
        }
        let mut placements = Vec::with_capacity(spec.shards as usize);
        for index in 0..spec.shards {
            let group_id = match spec.dedicated {
                true => {
                    let group = maker.make(cluster, false);
                    let id = GroupId::new(group.group_id);
                    chosen.insert(id, group);
                    id
                }
                false => chosen
                    .values()
                    .map(|group| (group.shards, GroupId::new(group.group_id)))
                    .min()
                    .map(|(_, id)| id)
                    .expect("the pool has a group"),
            };
            let group = chosen.get_mut(&group_id).expect("just chosen");
            group.shards += 1;
            placements.push(pb::ShardPlacement {
                index,
                shard_id: cluster.next_shard_id,
                group_id: group_id.get(),
                moving: None,
            });
            cluster.next_shard_id += 1;
        }
        for (id, group) in chosen {
            if self.groups.get(&id).is_none_or(|known| **known != group) {
                self.put_group(sink, group);
            }
        }
        Ok(placements)
    }

    /// Whether there are as many live nodes as a stream wants replicas.
    pub(super) fn check_nodes(&self, spec: &StreamSpec, unreachable: &[u64]) -> Result<(), MetaRefusal> {
        let live = |node: &&Arc<pb::NodeRecord>| !unreachable.contains(&node.node_id);
        let allowed = |node: &&Arc<pb::NodeRecord>| {
            node.state() == NodeState::Active && NodeShape::of(node).allowed_by(spec.placement.as_ref()).is_ok()
        };
        let usable = self.present_nodes().filter(live).filter(allowed).count() as u32;
        if spec.replicas > usable {
            return Err(MetaRefusal::NotEnoughNodes {
                wanted: spec.replicas,
                nodes: self.present_nodes().count() as u32,
                live: self.present_nodes().filter(live).count() as u32,
                usable,
            });
        }
        Ok(())
    }

    /// The shards of a stream that is forgotten no longer count; groups of its own go.
    pub(super) fn release_shards(&mut self, sink: &mut dyn ShardSink, placements: &[pb::ShardPlacement]) {
        let mut counts: BTreeMap<GroupId, u32> = BTreeMap::new();
        for placement in placements {
            *counts.entry(GroupId::new(placement.group_id)).or_default() += 1;
        }
        for (id, count) in counts {
            let Some(group) = self.groups.get(&id) else { continue };
            let mut group = pb::GroupRecord::clone(group);
            group.shards = group.shards.saturating_sub(count);
            if group.shards == 0 && !group.pooled {
                self.groups.remove(&id);
                sink.drop_meta(MetaKind::Group, &id.get().to_be_bytes());
            } else {
                self.put_group(sink, group);
            }
        }
    }

    /// Whether a group can never have a quorum again: most of its voters were on nodes that were removed.
    fn is_lost(&self, group: &pb::GroupRecord) -> bool {
        is_lost(group, |node| {
            let node = self.nodes.get(&node);
            node.is_none_or(|node| node.state() == NodeState::Removed)
        })
    }

    /// Pooled groups that were lost while they held no shard are given up. Those for streams of one replica get a successor
    /// on another node, so that the pool keeps its size, or stay until there is one; others are made when a stream wants
    /// one. Only groups of `among`, if that is told. Changes `cluster`, which the caller writes.
    pub(super) fn renew_lost_pool(
        &mut self,
        sink: &mut dyn ShardSink,
        cluster: &mut pb::ClusterRecord,
        unreachable: &[u64],
        among: Option<&[pb::ShardPlacement]>,
    ) {
        let lost: Vec<Arc<pb::GroupRecord>> = self
            .groups
            .values()
            .filter(|group| group.pooled && group.shards == 0 && self.is_lost(group))
            .filter(|group| among.is_none_or(|among| among.iter().any(|p| p.group_id == group.group_id)))
            .filter(|group| self.move_of(GroupId::new(group.group_id)).is_none())
            .cloned()
            .collect();
        for group in lost {
            let request = Request {
                replicas: 1,
                placement: group.placement.as_ref(),
                ..Request::default()
            };
            let is_kept = wanted_replicas(&group) == 1;
            let nodes = match is_kept {
                true => place(&node_shapes(self, unreachable), &request).nodes,
                false => Vec::new(),
            };
            if is_kept && nodes.is_empty() {
                continue;
            }
            self.groups.remove(&GroupId::new(group.group_id));
            sink.drop_meta(MetaKind::Group, &group.group_id.to_be_bytes());
            cluster.pool_groups.retain(|id| *id != group.group_id);
            if !is_kept {
                continue;
            }
            let successor = pb::GroupRecord {
                group_id: cluster.next_group_id,
                pooled: true,
                replicas: new_replicas(cluster, &nodes),
                replica_count: 1,
                placement: group.placement.clone(),
                ..pb::GroupRecord::default()
            };
            cluster.next_group_id += 1;
            cluster.pool_groups.push(successor.group_id);
            self.put_group(sink, successor);
        }
    }
}

/// Makes groups for one stream.
struct Maker<'a> {
    machine: &'a MetaMachine,
    spec: &'a StreamSpec,
    unreachable: &'a [u64],
    /// With what is on them, also by the groups made so far. Only counted when a group is to be made.
    nodes: Option<Nodes>,
}

impl Maker<'_> {
    /// The pooled groups that the stream may use; more are made while there are fewer than the pool should have (as many
    /// as there are with one replica) and than are needed.
    fn pool(&mut self, cluster: &mut pb::ClusterRecord) -> BTreeMap<GroupId, pb::GroupRecord> {
        let alike = |group: &pb::GroupRecord| {
            group.pooled && wanted_replicas(group) == self.spec.replicas && group.placement == self.spec.placement
        };
        let plain = |group: &pb::GroupRecord| group.pooled && wanted_replicas(group) == 1 && group.placement.is_none();
        let groups = || self.machine.groups.values();
        let target = groups().filter(|group| plain(group)).count().max(1);
        let mut size = groups().filter(|group| alike(group)).count();
        // One that has lost its quorum takes nothing new.
        let mut pool: BTreeMap<GroupId, pb::GroupRecord> = groups()
            .filter(|group| alike(group) && self.has_quorum(group))
            .map(|group| (GroupId::new(group.group_id), pb::GroupRecord::clone(group)))
            .collect();
        let mut free = pool.values().filter(|group| group.shards == 0).count() as u32;
        while pool.is_empty() || (size < target && free < self.spec.shards) {
            let group = self.make(cluster, true);
            cluster.pool_groups.push(group.group_id);
            pool.insert(GroupId::new(group.group_id), group);
            size += 1;
            free += 1;
        }
        pool
    }

    fn has_quorum(&self, group: &pb::GroupRecord) -> bool {
        let live = voters_of(group).filter(|replica| {
            let node = self.machine.nodes.get(&NodeId::new(replica.node_id));
            !self.unreachable.contains(&replica.node_id) && node.is_some_and(|node| node.state() != NodeState::Removed)
        });
        live.count() > voters_of(group).count() / 2
    }

    /// A new group on the nodes that suit best.
    fn make(&mut self, cluster: &mut pb::ClusterRecord, pooled: bool) -> pb::GroupRecord {
        let nodes = self
            .nodes
            .get_or_insert_with(|| node_shapes(self.machine, self.unreachable));
        let request = Request {
            replicas: self.spec.replicas,
            placement: self.spec.placement.as_ref(),
            ..Request::default()
        };
        let chosen = place(nodes, &request).nodes;
        for id in &chosen {
            if let Some(node) = nodes.get_mut(id) {
                node.replicas += 1;
            }
        }
        let group_id = cluster.next_group_id;
        cluster.next_group_id += 1;
        pb::GroupRecord {
            group_id,
            pooled,
            replicas: new_replicas(cluster, &chosen),
            replica_count: self.spec.replicas,
            placement: self.spec.placement.clone(),
            ..pb::GroupRecord::default()
        }
    }
}

fn node_shapes(machine: &MetaMachine, unreachable: &[u64]) -> Nodes {
    let mut nodes: Nodes = machine
        .present_nodes()
        .map(|record| {
            let mut node = NodeShape::of(record);
            node.live = !unreachable.contains(&record.node_id);
            (node.id, node)
        })
        .collect();
    for replica in machine.groups.values().flat_map(|group| &group.replicas) {
        if let Some(node) = nodes.get_mut(&NodeId::new(replica.node_id)) {
            node.replicas += 1;
        }
    }
    nodes
}

/// New voters, one on each of these nodes.
pub(super) fn new_replicas(cluster: &mut pb::ClusterRecord, nodes: &[NodeId]) -> Vec<pb::ReplicaRecord> {
    nodes
        .iter()
        .map(|node| {
            let replica_id = cluster.next_replica_id;
            cluster.next_replica_id += 1;
            pb::ReplicaRecord {
                replica_id,
                node_id: node.get(),
                ..pb::ReplicaRecord::default()
            }
        })
        .collect()
}
