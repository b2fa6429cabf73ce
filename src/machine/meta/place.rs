//! Which group holds a shard, and which nodes hold a group.

use std::collections::BTreeMap;

use super::{MetaMachine, MetaRefusal};
use crate::machine::port::ShardSink;
use crate::model::{GroupId, NodeId};
use crate::wire::internal::v1 as pb;

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

    /// Places `shards` new shards and counts them in their groups: each in the least loaded pooled group with so many
    /// replicas, or each in a new group of its own. Changes `cluster` (which the caller writes) and groups.
    pub(super) fn place_shards(
        &mut self,
        sink: &mut dyn ShardSink,
        cluster: &mut pb::ClusterRecord,
        shards: u32,
        replicas: u32,
        dedicated: bool,
    ) -> Result<Vec<pb::ShardPlacement>, MetaRefusal> {
        let nodes = self.nodes.len() as u32;
        if replicas > nodes {
            return Err(MetaRefusal::NotEnoughNodes {
                wanted: replicas,
                nodes,
            });
        }
        let mut chosen: BTreeMap<GroupId, pb::GroupRecord> = BTreeMap::new();
        if !dedicated {
            chosen = self.pool(cluster, replicas, shards);
        }
        let mut load = self.node_load();
        let mut placements = Vec::with_capacity(shards as usize);
        for index in 0..shards {
            let group_id = match dedicated {
                true => {
                    let group = new_group(cluster, &mut load, false, replicas);
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

    /// The pooled groups with so many replicas; more are made while there are fewer than the pool should have (as many
    /// as there are with one replica) and than are needed.
    fn pool(&self, cluster: &mut pb::ClusterRecord, replicas: u32, shards: u32) -> BTreeMap<GroupId, pb::GroupRecord> {
        let with = |count: u32| {
            self.groups
                .iter()
                .filter(move |(_, group)| group.pooled && group.replicas.len() as u32 == count)
        };
        let mut pool: BTreeMap<GroupId, pb::GroupRecord> = with(replicas)
            .map(|(id, group)| (*id, pb::GroupRecord::clone(group)))
            .collect();
        let target = with(1).count().max(1);
        let mut load = self.node_load();
        let mut free = pool.values().filter(|group| group.shards == 0).count() as u32;
        while pool.len() < target && free < shards {
            let group = new_group(cluster, &mut load, true, replicas);
            cluster.pool_groups.push(group.group_id);
            pool.insert(GroupId::new(group.group_id), group);
            free += 1;
        }
        pool
    }

    /// Replicas on each node.
    fn node_load(&self) -> BTreeMap<NodeId, u32> {
        let mut load: BTreeMap<NodeId, u32> = self.nodes.keys().map(|id| (*id, 0)).collect();
        for replica in self.groups.values().flat_map(|group| &group.replicas) {
            if let Some(count) = load.get_mut(&NodeId::new(replica.node_id)) {
                *count += 1;
            }
        }
        load
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
                sink.drop_meta(crate::machine::port::MetaKind::Group, &id.get().to_be_bytes());
            } else {
                self.put_group(sink, group);
            }
        }
    }
}

fn new_group(
    cluster: &mut pb::ClusterRecord,
    load: &mut BTreeMap<NodeId, u32>,
    pooled: bool,
    replicas: u32,
) -> pb::GroupRecord {
    let mut nodes: Vec<(u32, NodeId)> = load.iter().map(|(id, count)| (*count, *id)).collect();
    nodes.sort_unstable();
    let nodes: Vec<NodeId> = nodes.into_iter().take(replicas as usize).map(|(_, id)| id).collect();
    for node in &nodes {
        *load.entry(*node).or_default() += 1;
    }
    let group_id = cluster.next_group_id;
    cluster.next_group_id += 1;
    pb::GroupRecord {
        group_id,
        pooled,
        replicas: new_replicas(cluster, &nodes),
        shards: 0,
    }
}

fn new_replicas(cluster: &mut pb::ClusterRecord, nodes: &[NodeId]) -> Vec<pb::ReplicaRecord> {
    nodes
        .iter()
        .map(|node| {
            let replica_id = cluster.next_replica_id;
            cluster.next_replica_id += 1;
            pb::ReplicaRecord {
                replica_id,
                node_id: node.get(),
            }
        })
        .collect()
}
