//! The cluster as far as placing needs it, from the catalog's records.

use std::collections::{BTreeMap, BTreeSet};

use super::choose::{VerdictKind, allows};
use crate::model::limits::META_VOTERS_MAX;
use crate::model::{GroupId, NodeId, ReplicaId, ShardId, StreamId};
use crate::wire::internal::v1::{self as pb, ChangeReason, MoveStep, NodeState, ReplicaRole};
use crate::wire::v1::{Placement, StreamState};

/// All nodes by id.
pub type Nodes = BTreeMap<NodeId, NodeShape>;

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeShape {
    pub id: NodeId,
    pub name: String,
    pub zone: String,
    pub tags: BTreeMap<String, String>,
    pub state: NodeState,
    pub meta_replica: Option<ReplicaId>,
    /// It can be reached. From reports; of a shape made from records alone: true.
    pub live: bool,
    /// Replicas of data groups on it, learners on their way too.
    pub replicas: u32,
    /// Groups that it leads. From reports.
    pub leaders: u32,
    /// What its replicas hold. From reports.
    pub bytes: u64,
}

impl NodeShape {
    /// The node as its record tells; nothing is on it, and it is taken to be live.
    pub fn of(record: &pb::NodeRecord) -> Self {
        Self {
            id: NodeId::new(record.node_id),
            name: record.name.clone(),
            zone: record.zone.clone(),
            tags: record.tags.clone(),
            state: record.state(),
            meta_replica: (record.meta_replica_id != 0).then(|| ReplicaId::new(record.meta_replica_id)),
            live: true,
            replicas: 0,
            leaders: 0,
            bytes: 0,
        }
    }

    /// Whether it may hold a replica under this placement, whatever its state; else why not.
    pub fn allowed_by(&self, placement: Option<&Placement>) -> Result<(), VerdictKind> {
        allows(placement, self)
    }
}

/// A replica of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaShape {
    pub id: ReplicaId,
    pub node: NodeId,
    pub role: ReplicaRole,
    pub caught_up: bool,
}

/// A change of a group's replicas under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangeShape {
    pub reason: ChangeReason,
    pub add: BTreeSet<ReplicaId>,
    pub remove: BTreeSet<ReplicaId>,
    /// The joint change may be under way.
    pub ready: bool,
}

/// A data group.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupShape {
    pub id: GroupId,
    pub pooled: bool,
    pub formed: bool,
    pub epoch: u64,
    pub replicas: Vec<ReplicaShape>,
    /// So many voters it shall have.
    pub wanted: u32,
    pub placement: Option<Placement>,
    pub change: Option<ChangeShape>,
    pub shards: u32,
    pub log_floor: u64,
    /// Nodes that have not yet confirmed that their former replica of the group is gone: they cannot take another.
    pub leaving: BTreeSet<NodeId>,
}

impl GroupShape {
    /// The group as its record tells.
    pub fn of(record: &pb::GroupRecord) -> Self {
        let replicas: Vec<ReplicaShape> = record
            .replicas
            .iter()
            .map(|replica| ReplicaShape {
                id: ReplicaId::new(replica.replica_id),
                node: NodeId::new(replica.node_id),
                role: replica.role(),
                caught_up: replica.caught_up,
            })
            .collect();
        let ids = |raw: &[u64]| raw.iter().map(|id| ReplicaId::new(*id)).collect();
        Self {
            id: GroupId::new(record.group_id),
            pooled: record.pooled,
            formed: record.formed,
            epoch: record.epoch,
            wanted: wanted_replicas(record),
            placement: record.placement.clone(),
            change: record.change.as_ref().map(|change| ChangeShape {
                reason: change.reason(),
                add: ids(&change.add),
                remove: ids(&change.remove),
                ready: change.ready,
            }),
            shards: record.shards,
            log_floor: record.log_floor,
            leaving: record
                .removed
                .iter()
                .map(|replica| NodeId::new(replica.node_id))
                .collect(),
            replicas,
        }
    }

    /// Its voters, in the order of their making.
    pub fn voters(&self) -> impl Iterator<Item = &ReplicaShape> {
        self.replicas
            .iter()
            .filter(|replica| replica.role == ReplicaRole::Voter)
    }

    /// A replica of it.
    pub fn replica(&self, id: ReplicaId) -> Option<&ReplicaShape> {
        self.replicas.iter().find(|replica| replica.id == id)
    }

    /// The nodes that will hold it when the change under way is over.
    pub fn nodes_after(&self) -> impl Iterator<Item = NodeId> {
        let goes = |id: &ReplicaId| self.change.as_ref().is_some_and(|change| change.remove.contains(id));
        self.replicas
            .iter()
            .filter(move |replica| !goes(&replica.id))
            .map(|replica| replica.node)
    }
}

/// Those of a group's replicas that vote.
pub fn voters_of(record: &pb::GroupRecord) -> impl Iterator<Item = &pb::ReplicaRecord> {
    let votes = |replica: &&pb::ReplicaRecord| replica.role() == ReplicaRole::Voter;
    record.replicas.iter().filter(votes)
}

/// Whether a group can never have a quorum again: half or more of its voters were on nodes that are gone for good.
pub fn is_lost(record: &pb::GroupRecord, is_gone: impl Fn(NodeId) -> bool) -> bool {
    let voters = voters_of(record).count();
    let gone = voters_of(record).filter(|replica| is_gone(NodeId::new(replica.node_id)));
    voters > 0 && gone.count() * 2 >= voters
}

/// So many voters a group shall have.
pub(in crate::machine) fn wanted_replicas(record: &pb::GroupRecord) -> u32 {
    match record.replica_count {
        // From before there could be several nodes.
        0 => record.replicas.len() as u32,
        count => count,
    }
}

/// A shard on its way from one group to another.
#[derive(Debug, Clone, PartialEq)]
pub struct MoveShape {
    pub stream: StreamId,
    pub shard: ShardId,
    pub from: GroupId,
    pub to: GroupId,
    pub record: pb::ShardMove,
}

impl MoveShape {
    /// How far it is.
    pub fn step(&self) -> MoveStep {
        self.record.step()
    }
}

/// A shard in a pooled group whose stream wants other replicas than the group has.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitShape {
    pub stream: StreamId,
    pub name: String,
    pub shard: ShardId,
    pub group: GroupId,
    pub wanted: u32,
    pub placement: Option<Placement>,
}

/// The meta group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MetaShape {
    pub voters: BTreeSet<ReplicaId>,
    pub learners: BTreeSet<ReplicaId>,
    pub epoch: u64,
}

/// The cluster's settings, defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Voters of the meta group at most; odd.
    pub meta_voters_max: u32,
    /// How long a node may be gone before its replicas are made anew elsewhere, in microseconds.
    pub replace_after_us: u64,
    /// Replicas that may come to or leave one node at a time.
    pub moves_per_node_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            meta_voters_max: META_VOTERS_MAX,
            replace_after_us: 300_000_000,
            moves_per_node_max: 2,
        }
    }
}

impl Settings {
    /// As the cluster's record tells.
    pub fn of(cluster: &pb::ClusterRecord) -> Self {
        let default = Self::default();
        let Some(told) = &cluster.settings else { return default };
        let or = |value: u32, default: u32| if value == 0 { default } else { value };
        Self {
            meta_voters_max: or(told.meta_voters_max, default.meta_voters_max),
            replace_after_us: match told.replace_after_us {
                0 => default.replace_after_us,
                us => us,
            },
            moves_per_node_max: or(told.moves_per_node_max, default.moves_per_node_max),
        }
    }
}

/// The whole cluster.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterShape {
    pub nodes: Nodes,
    pub groups: BTreeMap<GroupId, GroupShape>,
    pub moves: Vec<MoveShape>,
    pub splits: Vec<SplitShape>,
    pub meta: MetaShape,
    pub settings: Settings,
}

impl ClusterShape {
    /// The cluster as the catalog's records tell.
    pub fn of<'a>(
        cluster: &pb::ClusterRecord,
        nodes: impl IntoIterator<Item = &'a pb::NodeRecord>,
        groups: impl IntoIterator<Item = &'a pb::GroupRecord>,
        streams: impl IntoIterator<Item = &'a pb::StreamRecord>,
    ) -> Self {
        let meta = cluster.meta.clone().unwrap_or_default();
        let ids = |raw: &[u64]| raw.iter().map(|id| ReplicaId::new(*id)).collect();
        let mut shape = Self {
            nodes: nodes
                .into_iter()
                .map(|node| (NodeId::new(node.node_id), NodeShape::of(node)))
                .collect(),
            groups: groups
                .into_iter()
                .map(|group| (GroupId::new(group.group_id), GroupShape::of(group)))
                .collect(),
            moves: Vec::new(),
            splits: Vec::new(),
            meta: MetaShape {
                voters: ids(&meta.voters),
                learners: ids(&meta.learners),
                epoch: meta.epoch,
            },
            settings: Settings::of(cluster),
        };
        for replica in shape.groups.values().flat_map(|group| &group.replicas) {
            if let Some(node) = shape.nodes.get_mut(&replica.node) {
                node.replicas += 1;
            }
        }
        for stream in streams {
            shape.add_shards(stream);
        }
        shape.moves.sort_by_key(|moving| moving.shard);
        shape.splits.sort_by_key(|split| split.shard);
        shape
    }

    fn add_shards(&mut self, stream: &pb::StreamRecord) {
        let (Some(spec), Some(id)) = (&stream.spec, StreamId::parse(&stream.stream_id)) else {
            return;
        };
        for place in &stream.shards {
            let (shard, group) = (ShardId::new(place.shard_id), GroupId::new(place.group_id));
            if let Some(record) = &place.moving {
                self.moves.push(MoveShape {
                    stream: id,
                    shard,
                    from: GroupId::new(record.from_group),
                    to: GroupId::new(record.to_group),
                    record: *record,
                });
                continue;
            }
            let Some(now) = self.groups.get(&group) else { continue };
            let differs = now.wanted != spec.replicas || now.placement != spec.placement;
            if stream.state() == StreamState::Active && now.pooled && differs {
                self.splits.push(SplitShape {
                    stream: id,
                    name: spec.name.clone(),
                    shard,
                    group,
                    wanted: spec.replicas,
                    placement: spec.placement.clone(),
                });
            }
        }
    }

    /// The moves that a group takes part in.
    pub fn moves_of(&self, group: GroupId) -> impl Iterator<Item = &MoveShape> {
        self.moves
            .iter()
            .filter(move |moving| moving.from == group || moving.to == group)
    }
}
