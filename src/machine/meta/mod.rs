//! The cluster's catalog: cluster, nodes, groups, streams. Every change raises the cluster's revision, which is the
//! version of the view.

mod groups;
mod moves;
mod nodes;
mod outcome;
mod place;
mod requests;
mod streams;
mod subjects;

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;

use super::placement::ClusterShape;
use super::port::{MetaKind, ShardSink};
use super::{LoadError, UnknownFeature};
use crate::model::limits::POOL_GROUPS_MAX;
use crate::model::{Filter, GroupId, NodeId, Revision, ShardId, StreamId};
use crate::wire::internal::v1::{self as pb, NodeState, meta_command::Op};
use crate::wire::v1::{StreamSpec, StreamState};

pub use outcome::{MetaOutcome, MetaRefusal};
use requests::Requests;
pub use requests::remembered;
use subjects::SubjectIndex;

/// The meta group's own replica on the first node. Others are counted from the next.
pub const FIRST_META_REPLICA: u64 = 1;

/// The state machine of the meta group.
#[derive(Debug, Default)]
pub struct MetaMachine {
    cluster: Option<Arc<pb::ClusterRecord>>,
    nodes: BTreeMap<NodeId, Arc<pb::NodeRecord>>,
    groups: BTreeMap<GroupId, Arc<pb::GroupRecord>>,
    streams: BTreeMap<StreamId, Arc<pb::StreamRecord>>,
    requests: Requests,
    /// Index: creating and active streams by namespace and name.
    live: BTreeMap<String, BTreeMap<String, StreamId>>,
    /// Index: their subjects, by namespace.
    subjects: BTreeMap<String, SubjectIndex>,
    /// Index: shards on their way, by each of the two groups.
    moves: BTreeMap<GroupId, BTreeMap<ShardId, pb::ShardMove>>,
}

/// Parses the filters of a spec; none that is normalised fails.
fn filters_of(spec: &StreamSpec) -> Result<Vec<Filter>, MetaRefusal> {
    spec.subjects
        .iter()
        .map(|text| Filter::parse(text))
        .collect::<Result<_, _>>()
        .map_err(|error| MetaRefusal::BadSpec { why: error.to_string() })
}

fn spec_of(stream: &pb::StreamRecord) -> &StreamSpec {
    stream.spec.as_ref().expect("checked when it was made or loaded")
}

fn id_of(stream: &pb::StreamRecord) -> StreamId {
    StreamId::parse(&stream.stream_id).expect("checked when it was made or loaded")
}

fn is_live(stream: &pb::StreamRecord) -> bool {
    match stream.state() {
        StreamState::Creating | StreamState::Active => true,
        StreamState::Unspecified | StreamState::Removed => false,
    }
}

impl MetaMachine {
    /// An empty catalog, before the cluster is initialised.
    pub fn new() -> Self {
        Self::default()
    }

    /// The catalog as its records tell, in any order.
    pub fn load<'a>(records: impl IntoIterator<Item = (MetaKind, &'a [u8], &'a [u8])>) -> Result<Self, LoadError> {
        fn decode<M: Message + Default>(what: &str, bytes: &[u8]) -> Result<Arc<M>, LoadError> {
            M::decode(bytes)
                .map(Arc::new)
                .map_err(|error| LoadError::new(what, error))
        }
        let mut machine = Self::default();
        for (kind, _key, bytes) in records {
            match kind {
                MetaKind::Cluster => machine.cluster = Some(decode("the cluster", bytes)?),
                MetaKind::Node => {
                    let node: Arc<pb::NodeRecord> = decode("a node", bytes)?;
                    machine.nodes.insert(NodeId::new(node.node_id), node);
                }
                MetaKind::Group => {
                    let group: Arc<pb::GroupRecord> = decode("a group", bytes)?;
                    machine.groups.insert(GroupId::new(group.group_id), group);
                }
                MetaKind::Stream => {
                    let stream: Arc<pb::StreamRecord> = decode("a stream", bytes)?;
                    let what = format!("stream {}", stream.stream_id);
                    let id =
                        StreamId::parse(&stream.stream_id).ok_or_else(|| LoadError::new(&what, "its id is not one"))?;
                    let spec = stream
                        .spec
                        .as_ref()
                        .ok_or_else(|| LoadError::new(&what, "it has no spec"))?;
                    filters_of(spec).map_err(|error| LoadError::new(&what, error))?;
                    if is_live(&stream) {
                        machine.index(&stream);
                    }
                    machine.index_moves(&stream);
                    machine.streams.insert(id, stream);
                }
                MetaKind::Request => machine.requests.load(bytes)?,
            }
        }
        Ok(machine)
    }

    /// The cluster, once it is initialised.
    pub fn cluster(&self) -> Option<&Arc<pb::ClusterRecord>> {
        self.cluster.as_ref()
    }

    /// The version of the view: raised by every change.
    pub fn revision(&self) -> Revision {
        Revision::new(self.cluster.as_ref().map_or(0, |cluster| cluster.revision))
    }

    /// All nodes, removed ones too, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<pb::NodeRecord>> {
        self.nodes.values()
    }

    /// The cluster as far as placing needs it. Of reports it knows nothing: every node counts as live.
    pub fn shape(&self) -> ClusterShape {
        ClusterShape::of(
            &self.cluster.as_deref().cloned().unwrap_or_default(),
            self.nodes.values().map(|node| &**node),
            self.groups.values().map(|group| &**group),
            self.streams.values().map(|stream| &**stream),
        )
    }

    /// All data groups, by id. The meta group is not among them.
    pub fn groups(&self) -> impl DoubleEndedIterator<Item = &Arc<pb::GroupRecord>> {
        self.groups.values()
    }

    /// A data group.
    pub fn group(&self, id: GroupId) -> Option<&Arc<pb::GroupRecord>> {
        self.groups.get(&id)
    }

    /// All streams, removed ones too, by id.
    pub fn streams(&self) -> impl Iterator<Item = &Arc<pb::StreamRecord>> {
        self.streams.values()
    }

    /// A stream, removed or not.
    pub fn stream(&self, id: StreamId) -> Option<&Arc<pb::StreamRecord>> {
        self.streams.get(&id)
    }

    /// The stream that has this name now.
    pub fn stream_by_name(&self, namespace: &str, name: &str) -> Option<&Arc<pb::StreamRecord>> {
        let id = self.live.get(namespace)?.get(name)?;
        self.streams.get(id)
    }

    /// Applies a command. The error is no answer: the replica must not go on.
    pub fn apply(
        &mut self,
        sink: &mut dyn ShardSink,
        command: &pb::MetaCommand,
    ) -> Result<MetaOutcome, UnknownFeature> {
        let op = command.op.as_ref().ok_or(UnknownFeature::Command)?;
        let time_us = command.time_us;
        self.requests.forget(sink, time_us);
        let id = command.request_id.as_str();
        if id.is_empty() {
            return Ok(self.apply_op(sink, time_us, op));
        }
        let digest = requests::digest(op);
        if let Some(outcome) = requests::check(&self.requests, id, time_us, digest) {
            return Ok(outcome);
        }
        let outcome = self.apply_op(sink, time_us, op);
        self.requests.remember(sink, id, time_us, digest, &outcome);
        Ok(outcome)
    }

    fn apply_op(&mut self, sink: &mut dyn ShardSink, time_us: u64, op: &Op) -> MetaOutcome {
        let outcome = match op {
            Op::InitCluster(init) => self.init_cluster(sink, init),
            Op::RegisterNode(node) => self.register_node(sink, time_us, node),
            Op::JoinNode(join) => self.join_node(sink, time_us, join),
            Op::DrainNode(drain) => self.set_node_state(sink, time_us, drain.node_id, NodeState::Draining),
            Op::UndrainNode(undrain) => self.set_node_state(sink, time_us, undrain.node_id, NodeState::Active),
            Op::RemoveNode(remove) => self.remove_node(sink, time_us, remove),
            Op::SetClusterVersion(set) => self.set_cluster_version(sink, set),
            Op::UpdateSettings(update) => self.update_settings(sink, update),
            Op::SetMetaVoters(set) => self.set_meta_voters(sink, set),
            Op::RenewMetaReplica(renew) => self.renew_meta_replica(sink, renew),
            Op::GroupFormed(formed) => self.group_formed(sink, formed),
            Op::PlanReplicaChange(plan) => self.plan_replica_change(sink, time_us, plan),
            Op::ReplicaCaughtUp(report) => self.replica_caught_up(sink, report),
            Op::ChangeCommitted(report) => self.change_committed(sink, time_us, report),
            Op::AbortChange(abort) => self.abort_change(sink, time_us, abort),
            Op::ReplicaGone(gone) => self.replica_gone(sink, gone),
            Op::PlanShardMove(plan) => self.plan_shard_move(sink, time_us, plan),
            Op::ShardSealed(sealed) => self.shard_sealed(sink, sealed),
            Op::ShardAdopted(adopted) => self.shard_adopted(sink, adopted),
            Op::ShardMoveDone(done) => self.shard_move_done(sink, done),
            Op::AbortShardMove(abort) => self.abort_shard_move(sink, abort),
            Op::GiveUpShardMove(up) => self.give_up_shard_move(sink, up),
            Op::CreateStream(create) => self.create_stream(sink, time_us, create),
            Op::ActivateStream(activate) => self.activate_stream(sink, activate),
            Op::UpdateStream(update) => self.update_stream(sink, update),
            Op::RemoveStream(remove) => self.remove_stream(sink, time_us, remove),
            Op::UndeleteStream(undelete) => self.undelete_stream(sink, time_us, undelete),
            Op::ForgetStream(forget) => self.forget_stream(sink, time_us, forget),
        };
        outcome.unwrap_or_else(MetaOutcome::Refused)
    }

    fn init_cluster(&mut self, sink: &mut dyn ShardSink, init: &pb::InitCluster) -> Result<MetaOutcome, MetaRefusal> {
        if let Some(cluster) = &self.cluster {
            if cluster.cluster_id != init.cluster_id {
                return Err(MetaRefusal::OtherCluster {
                    cluster_id: cluster.cluster_id.clone(),
                });
            }
            return Ok(MetaOutcome::ClusterInitialised {
                cluster: cluster.clone(),
                existed: true,
            });
        }
        let pool = u64::from(init.pool_groups.clamp(1, POOL_GROUPS_MAX));
        let first = GroupId::META.get() + 1;
        let mut cluster = pb::ClusterRecord {
            cluster_id: init.cluster_id.clone(),
            cluster_name: init.cluster_name.clone(),
            next_group_id: first + pool,
            next_replica_id: FIRST_META_REPLICA + 1,
            next_shard_id: 1,
            revision: 0,
            pool_groups: (first..first + pool).collect(),
            cluster_version: 1,
            next_move_id: 1,
            ..pb::ClusterRecord::default()
        };
        for group_id in first..first + pool {
            self.put_group(
                sink,
                pb::GroupRecord {
                    group_id,
                    pooled: true,
                    replica_count: 1,
                    ..pb::GroupRecord::default()
                },
            );
        }
        // Nodes may have been told of before or after.
        self.give_meta_replicas(sink, &mut cluster);
        if let Some(node) = self.nodes.keys().next().copied() {
            self.give_pool_to(sink, &mut cluster, node);
        }
        let cluster = self.put_cluster(sink, cluster);
        Ok(MetaOutcome::ClusterInitialised {
            cluster,
            existed: false,
        })
    }

    /// Writes the cluster's record with the next revision: the last step of every change.
    fn put_cluster(&mut self, sink: &mut dyn ShardSink, mut cluster: pb::ClusterRecord) -> Arc<pb::ClusterRecord> {
        cluster.revision += 1;
        sink.put_meta(MetaKind::Cluster, b"", &cluster.encode_to_vec());
        let cluster = Arc::new(cluster);
        self.cluster = Some(cluster.clone());
        cluster
    }

    fn raise_revision(&mut self, sink: &mut dyn ShardSink) {
        if let Some(cluster) = &self.cluster {
            let cluster = pb::ClusterRecord::clone(cluster);
            self.put_cluster(sink, cluster);
        }
    }

    fn put_group(&mut self, sink: &mut dyn ShardSink, group: pb::GroupRecord) {
        sink.put_meta(MetaKind::Group, &group.group_id.to_be_bytes(), &group.encode_to_vec());
        self.groups.insert(GroupId::new(group.group_id), Arc::new(group));
    }

    fn put_stream(&mut self, sink: &mut dyn ShardSink, stream: pb::StreamRecord) -> Arc<pb::StreamRecord> {
        let id = id_of(&stream);
        sink.put_meta(MetaKind::Stream, &id.get().to_be_bytes(), &stream.encode_to_vec());
        let stream = Arc::new(stream);
        if let Some(old) = self.streams.insert(id, stream.clone()) {
            self.unindex_moves(&old);
            if is_live(&old) {
                self.unindex(&old);
            }
        }
        self.index_moves(&stream);
        if is_live(&stream) {
            self.index(&stream);
        }
        stream
    }

    fn index(&mut self, stream: &pb::StreamRecord) {
        let (id, spec) = (id_of(stream), spec_of(stream));
        let names = self.live.entry(spec.namespace.clone()).or_default();
        names.insert(spec.name.clone(), id);
        let subjects = self.subjects.entry(spec.namespace.clone()).or_default();
        for filter in filters_of(spec).expect("checked when it was made or loaded") {
            subjects.insert(&filter, id);
        }
    }

    fn unindex(&mut self, stream: &pb::StreamRecord) {
        let (id, spec) = (id_of(stream), spec_of(stream));
        if let Some(names) = self.live.get_mut(&spec.namespace) {
            names.remove(&spec.name);
            if names.is_empty() {
                self.live.remove(&spec.namespace);
            }
        }
        if let Some(subjects) = self.subjects.get_mut(&spec.namespace) {
            for filter in filters_of(spec).expect("checked when it was made or loaded") {
                subjects.remove(&filter, id);
            }
            if subjects.is_empty() {
                self.subjects.remove(&spec.namespace);
            }
        }
    }
}
