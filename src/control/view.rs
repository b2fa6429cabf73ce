//! The node's picture of the cluster's streams, kept up to date by the meta group's apply. Every request looks here
//! first, so a look-up takes one short read lock and one clone of an `Arc`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::machine::feature_level_of;
use crate::machine::placement::ClusterShape;
use crate::model::partition::{Partitioning, ShardMap};
use crate::model::subject::{Filter, FilterSet};
use crate::model::{Epoch, GroupId, NodeId, ReplicaId, Revision, ShardId, StreamId, TimeUs};
use crate::raft::{MetaChange, MetaObserver};
use crate::wire::{internal as pb, v1};

/// Where a shard of a stream lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardPlace {
    /// Index in the stream, from 0.
    pub index: u32,
    pub shard: ShardId,
    pub group: GroupId,
}

/// A stream, compiled for use.
#[derive(Debug)]
pub struct StreamView {
    pub id: StreamId,
    pub epoch: Epoch,
    pub revision: Revision,
    pub state: v1::StreamState,
    /// When its grace ends, if it is removed.
    pub removed_until: TimeUs,
    /// Removed without a way back: its shards are being dropped.
    pub doomed: bool,
    pub created: TimeUs,
    pub spec: v1::StreamSpec,
    pub partitioning: Partitioning,
    pub subjects: FilterSet,
    pub map: ShardMap,
    /// By index.
    pub shards: Vec<ShardPlace>,
}

impl StreamView {
    pub(super) fn compile(record: &pb::StreamRecord) -> Result<Self, String> {
        let spec = record.spec.clone().ok_or("it has no spec")?;
        let filters = spec
            .subjects
            .iter()
            .map(|s| Filter::parse(s).map_err(|e| e.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            id: StreamId::parse(&record.stream_id).ok_or("its id is not 32 hex digits")?,
            epoch: Epoch::new(record.epoch),
            revision: Revision::new(record.revision),
            state: record.state(),
            removed_until: TimeUs::new(record.removed_until_us),
            doomed: record.doomed,
            created: TimeUs::new(record.created_us),
            partitioning: spec
                .partitioning
                .as_ref()
                .map(Partitioning::try_from)
                .transpose()
                .map_err(|e| e.to_string())?
                .unwrap_or_default(),
            subjects: FilterSet::new(filters),
            map: ShardMap::try_from(record.map.as_ref().ok_or("it has no shard map")?).map_err(|e| e.to_string())?,
            shards: record
                .shards
                .iter()
                .map(|s| ShardPlace {
                    index: s.index,
                    shard: ShardId::new(s.shard_id),
                    group: GroupId::new(s.group_id),
                })
                .collect(),
            spec,
        })
    }

    /// Namespace and name.
    pub fn key(&self) -> (String, String) {
        (self.spec.namespace.clone(), self.spec.name.clone())
    }
}

/// A shard on its way from one group to another, as the catalog has it.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardOnItsWay {
    pub stream: String,
    pub shard: ShardId,
    pub moving: pb::ShardMove,
}

/// A group and who holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlace {
    pub group: GroupId,
    pub replicas: Vec<(ReplicaId, NodeId)>,
}

#[derive(Debug, Default)]
struct Inner {
    cluster: Option<pb::ClusterRecord>,
    nodes: BTreeMap<NodeId, pb::NodeRecord>,
    groups: BTreeMap<GroupId, GroupPlace>,
    group_records: BTreeMap<GroupId, Arc<pb::GroupRecord>>,
    streams: HashMap<StreamId, Arc<StreamView>>,
    /// As the catalog has them.
    stream_records: HashMap<StreamId, Arc<pb::StreamRecord>>,
    /// The stream of each shard, and the group that owns it.
    owners: HashMap<ShardId, (StreamId, GroupId)>,
    moves: BTreeMap<ShardId, ShardOnItsWay>,
    /// Only streams that are not removed. Ordered, for listings.
    names: BTreeMap<(String, String), StreamId>,
    /// The streams of a namespace by the first token of their literal subjects; "" holds those that begin with a
    /// wildcard.
    first_tokens: HashMap<String, HashMap<String, Vec<StreamId>>>,
}

fn first_token(filter: &str) -> &str {
    match filter.split('.').next() {
        None | Some("*" | ">") => "",
        Some(token) => token,
    }
}

impl Inner {
    fn index_shards(&mut self, record: &pb::StreamRecord) {
        let Some(id) = StreamId::parse(&record.stream_id) else {
            return;
        };
        for place in &record.shards {
            let shard = ShardId::new(place.shard_id);
            self.owners.insert(shard, (id, GroupId::new(place.group_id)));
            match place.moving {
                Some(moving) => {
                    let stream = record.stream_id.clone();
                    self.moves.insert(shard, ShardOnItsWay { stream, shard, moving });
                }
                None => drop(self.moves.remove(&shard)),
            }
        }
    }

    fn unindex_shards(&mut self, stream: &StreamView) {
        for place in &stream.shards {
            self.owners.remove(&place.shard);
            self.moves.remove(&place.shard);
        }
    }

    fn unindex(&mut self, stream: &StreamView) {
        if self.names.get(&stream.key()) == Some(&stream.id) {
            self.names.remove(&stream.key());
        }
        if let Some(tokens) = self.first_tokens.get_mut(&stream.spec.namespace) {
            for filter in &stream.spec.subjects {
                if let Some(ids) = tokens.get_mut(first_token(filter)) {
                    ids.retain(|id| *id != stream.id);
                    if ids.is_empty() {
                        tokens.remove(first_token(filter));
                    }
                }
            }
        }
    }

    fn index(&mut self, stream: &StreamView) {
        if stream.state == v1::StreamState::Removed {
            return;
        }
        self.names.insert(stream.key(), stream.id);
        let tokens = self.first_tokens.entry(stream.spec.namespace.clone()).or_default();
        for filter in &stream.spec.subjects {
            let ids = tokens.entry(first_token(filter).to_owned()).or_default();
            if !ids.contains(&stream.id) {
                ids.push(stream.id);
            }
        }
    }
}

/// The view. Written by the meta group's apply, read by everyone.
#[derive(Debug)]
pub struct View {
    inner: RwLock<Inner>,
    /// Raised by every change.
    revision: watch::Sender<Revision>,
    /// Raised when nodes come, go, or take clients elsewhere.
    addresses: watch::Sender<u64>,
}

impl Default for View {
    fn default() -> Self {
        Self {
            inner: RwLock::default(),
            revision: watch::Sender::new(Revision::new(0)),
            addresses: watch::Sender::new(0),
        }
    }
}

impl View {
    /// Wakes on every change.
    pub fn watch(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// Wakes when nodes come, go, or take clients elsewhere. Sessions without number wait for this one, which is rare.
    pub fn watch_addresses(&self) -> watch::Receiver<u64> {
        self.addresses.subscribe()
    }

    /// The cluster's own record, once it exists.
    pub fn cluster(&self) -> Option<pb::ClusterRecord> {
        self.inner.read().cluster.clone()
    }

    /// The newest feature level that may be written now.
    pub fn feature_level(&self) -> u32 {
        let inner = self.inner.read();
        feature_level_of(inner.cluster.as_ref().map_or(1, |cluster| cluster.cluster_version))
    }

    /// Every node.
    pub fn nodes(&self) -> Vec<pb::NodeRecord> {
        self.inner.read().nodes.values().cloned().collect()
    }

    /// Every group.
    pub fn groups(&self) -> Vec<GroupPlace> {
        self.inner.read().groups.values().cloned().collect()
    }

    /// One group.
    pub fn group(&self, group: GroupId) -> Option<GroupPlace> {
        self.inner.read().groups.get(&group).cloned()
    }

    /// A group as the catalog has it.
    pub fn group_record(&self, group: GroupId) -> Option<Arc<pb::GroupRecord>> {
        self.inner.read().group_records.get(&group).cloned()
    }

    /// Every group as the catalog has it.
    pub fn group_records(&self) -> Vec<Arc<pb::GroupRecord>> {
        self.inner.read().group_records.values().cloned().collect()
    }

    /// A node.
    pub fn node(&self, node: NodeId) -> Option<pb::NodeRecord> {
        self.inner.read().nodes.get(&node).cloned()
    }

    /// Where a node takes clients; `None`: it is not known.
    pub fn client_address(&self, node: NodeId) -> Option<String> {
        let inner = self.inner.read();
        let record = inner.nodes.get(&node)?;
        Some(record.client_address.clone()).filter(|address| !address.is_empty())
    }

    /// The node that hosts a replica of the meta group.
    pub fn meta_node(&self, replica: ReplicaId) -> Option<NodeId> {
        let inner = self.inner.read();
        let mut nodes = inner.nodes.iter();
        nodes
            .find(|(_, node)| node.meta_replica_id == replica.get())
            .map(|(id, _)| *id)
    }

    /// The group that owns a shard; `None`: no stream names it.
    pub fn owner_of(&self, shard: ShardId) -> Option<GroupId> {
        self.inner.read().owners.get(&shard).map(|(_, group)| *group)
    }

    /// Whether the stream of a shard is not removed.
    pub fn is_in_use(&self, shard: ShardId) -> bool {
        let inner = self.inner.read();
        let stream = inner
            .owners
            .get(&shard)
            .and_then(|(stream, _)| inner.streams.get(stream));
        stream.is_some_and(|stream| stream.state != v1::StreamState::Removed)
    }

    /// The shards that are on their way from or to a group. Ascending.
    pub fn moves_of(&self, group: GroupId) -> Vec<ShardOnItsWay> {
        let touches = |on: &&ShardOnItsWay| [on.moving.from_group, on.moving.to_group].contains(&group.get());
        self.inner.read().moves.values().filter(touches).cloned().collect()
    }

    /// The cluster as far as planning needs it; every node counts as live. `None`: there is no cluster yet.
    pub fn shape(&self) -> Option<ClusterShape> {
        let inner = self.inner.read();
        Some(ClusterShape::of(
            inner.cluster.as_ref()?,
            inner.nodes.values(),
            inner.group_records.values().map(|group| &**group),
            inner.stream_records.values().map(|stream| &**stream),
        ))
    }

    /// A stream that is not removed, by name.
    pub fn stream(&self, namespace: &str, name: &str) -> Option<Arc<StreamView>> {
        let inner = self.inner.read();
        let id = inner.names.get(&(namespace.to_owned(), name.to_owned()))?;
        inner.streams.get(id).cloned()
    }

    /// A stream by id, removed or not.
    pub fn stream_by_id(&self, id: StreamId) -> Option<Arc<StreamView>> {
        self.inner.read().streams.get(&id).cloned()
    }

    /// The stream of a subject; there is at most one in a namespace.
    pub fn stream_by_subject(&self, namespace: &str, subject: &str) -> Option<Arc<StreamView>> {
        let inner = self.inner.read();
        let tokens = inner.first_tokens.get(namespace)?;
        [first_token(subject), ""]
            .into_iter()
            .filter_map(|token| tokens.get(token))
            .flatten()
            .filter_map(|id| inner.streams.get(id))
            .find(|s| s.subjects.matches(subject))
            .cloned()
    }

    /// Streams of a namespace in order of name, beginning after `after`.
    pub fn list(&self, namespace: &str, prefix: &str, after: Option<&str>, limit: usize) -> Vec<Arc<StreamView>> {
        let inner = self.inner.read();
        let from = match after {
            Some(after) if after >= prefix => (namespace.to_owned(), format!("{after}\0")),
            Some(_) | None => (namespace.to_owned(), prefix.to_owned()),
        };
        inner
            .names
            .range(from..)
            .take_while(|((ns, name), _)| ns == namespace && name.starts_with(prefix))
            .take(limit)
            .filter_map(|(_, id)| inner.streams.get(id).cloned())
            .collect()
    }

    /// How many streams are not removed.
    pub fn live_streams(&self) -> usize {
        self.inner.read().names.len()
    }

    /// Every stream, removed ones too.
    pub fn all_streams(&self) -> Vec<Arc<StreamView>> {
        self.inner.read().streams.values().cloned().collect()
    }
}

impl MetaObserver for View {
    fn changed(&self, changes: &[MetaChange]) {
        let mut moved = false;
        {
            let mut inner = self.inner.write();
            for change in changes {
                match change {
                    MetaChange::Cluster(record) => inner.cluster = Some(record.as_ref().clone()),
                    MetaChange::Node(record) => {
                        let node = record.as_ref().clone();
                        let face = |n: &pb::NodeRecord| (n.client_address.clone(), n.state() == pb::NodeState::Removed);
                        let now = face(&node);
                        let before = inner.nodes.insert(NodeId::new(record.node_id), node);
                        moved |= before.is_none_or(|before| face(&before) != now);
                    }
                    MetaChange::Group(record) => {
                        let place = GroupPlace {
                            group: GroupId::new(record.group_id),
                            replicas: record
                                .replicas
                                .iter()
                                .map(|r| (ReplicaId::new(r.replica_id), NodeId::new(r.node_id)))
                                .collect(),
                        };
                        inner.group_records.insert(place.group, record.clone());
                        inner.groups.insert(place.group, place);
                    }
                    MetaChange::GroupForgotten(id) => {
                        inner.groups.remove(id);
                        inner.group_records.remove(id);
                    }
                    MetaChange::Groups(ids) => {
                        inner.groups.retain(|id, _| ids.contains(id));
                        inner.group_records.retain(|id, _| ids.contains(id));
                    }
                    MetaChange::Stream(record) => match StreamView::compile(record) {
                        Err(e) => {
                            // Only validated records are ever proposed; one that does not compile is damage.
                            tracing::error!(stream = %record.stream_id, error = %e, "a stream record cannot be used");
                        }
                        Ok(stream) => {
                            let stream = Arc::new(stream);
                            inner.stream_records.insert(stream.id, record.clone());
                            inner.index_shards(record);
                            if let Some(old) = inner.streams.insert(stream.id, stream.clone()) {
                                inner.unindex(&old);
                            }
                            inner.index(&stream);
                        }
                    },
                    MetaChange::StreamForgotten(id) => {
                        inner.stream_records.remove(id);
                        if let Some(old) = inner.streams.remove(id) {
                            inner.unindex(&old);
                            inner.unindex_shards(&old);
                        }
                    }
                }
            }
        }
        self.revision.send_modify(|r| *r = Revision::new(r.get() + 1));
        if moved {
            self.addresses.send_modify(|times| *times += 1);
        }
    }
}
