//! The data plane: from a request to the shard that serves it, publishes into the log, reads out of it.

pub mod counts;
pub mod cursor;
pub mod error;
mod expiry;
mod hop;
pub mod ingest;
pub mod lookup;
mod purge;
pub mod reader;
mod relay;
mod relay_codec;
mod remote;
mod route;
pub mod validate;
mod worker;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::base::alarms::{AlarmKind, Alarms};
use crate::base::budget::ByteBudget;
use crate::base::clock::Clock;
use crate::base::tasks::Tasks;
use crate::control::view::{ShardPlace, StreamView, View};
use crate::model::{GroupId, NodeId, ShardId};
use crate::raft::transport::Peers;
use crate::raft::{Group, Groups, Positions, ShardShared};
use crate::storage::Store;
use crate::wire::v1;

use counts::BrokerMetrics;
use error::{PublishError, ReadError, StreamError};
use ingest::{Ingest, Item};
use relay::Relay;
pub use remote::RemoteShard;
use route::Router;

/// A shard, found: where it is, and how it is read from here.
#[derive(Clone)]
pub struct ShardAccess {
    pub place: ShardPlace,
    pub face: Face,
}

/// How a shard is read from this node.
#[derive(Clone)]
pub enum Face {
    /// It has a replica here, which may or may not lead.
    Here { shared: Arc<ShardShared>, group: Group },
    /// Its replicas are on other nodes.
    There(Arc<RemoteShard>),
}

impl ShardAccess {
    /// As far as this node knows.
    pub fn positions(&self) -> Positions {
        match &self.face {
            Face::Here { shared, .. } => shared.positions(),
            Face::There(remote) => remote.positions(),
        }
    }

    /// The replica here, if there is one.
    pub fn replica(&self) -> Option<&Group> {
        match &self.face {
            Face::Here { group, .. } => Some(group),
            Face::There(_) => None,
        }
    }
}

/// What the data plane is made of.
pub struct Broker {
    this: Weak<Broker>,
    view: Arc<View>,
    groups: Arc<Groups>,
    store: Arc<Store>,
    clock: Clock,
    alarms: Alarms,
    tasks: Tasks,
    publish_memory: ByteBudget,
    metrics: Arc<BrokerMetrics>,
    router: Arc<Router>,
    ingests: Mutex<HashMap<ShardId, Ingest>>,
    /// Shards replicated elsewhere that somebody here reads.
    remotes: Mutex<HashMap<ShardId, Weak<RemoteShard>>>,
    /// Shards of whose replica here something is damaged.
    damaged: Mutex<HashSet<ShardId>>,
}

impl Broker {
    /// `publish_memory` bounds the batches in hand from the edge to their ack. With `peers`, shards led or replicated on
    /// other nodes are served from here too, and those here to other nodes.
    #[allow(clippy::too_many_arguments)] // The parts of a node, each named once, by its composition.
    pub fn start(
        view: Arc<View>,
        groups: Arc<Groups>,
        store: Arc<Store>,
        clock: Clock,
        alarms: Alarms,
        tasks: Tasks,
        publish_memory: ByteBudget,
        peers: Option<Peers>,
    ) -> Arc<Self> {
        let broker = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            router: Arc::new(Router::new(groups.clone(), view.clone(), peers.clone())),
            view,
            groups,
            store,
            clock,
            alarms,
            tasks,
            publish_memory,
            metrics: Arc::default(),
            ingests: Mutex::default(),
            remotes: Mutex::default(),
            damaged: Mutex::default(),
        });
        if let Some(peers) = peers {
            peers.serve_calls(Relay::METHODS, Relay::new(&broker));
        }
        broker
            .tasks
            .spawn_vital("expiry", expiry::run(broker.clone(), broker.tasks.token()));
        broker
    }

    /// The cluster's streams.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// The replicas on this node.
    pub fn groups(&self) -> &Arc<Groups> {
        &self.groups
    }

    /// The node's storage.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The node's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Memory for publishes.
    pub fn publish_memory(&self) -> &ByteBudget {
        &self.publish_memory
    }

    /// What is counted here.
    pub fn metrics(&self) -> &BrokerMetrics {
        &self.metrics
    }

    /// A stream that can be used.
    pub fn stream(&self, namespace: &str, name: &str) -> Result<Arc<StreamView>, StreamError> {
        let namespace = namespace_or_default(namespace);
        let stream = self.view.stream(namespace, name).ok_or_else(|| StreamError::NotFound {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })?;
        usable(stream)
    }

    /// The stream that takes a subject.
    pub fn stream_by_subject(&self, namespace: &str, subject: &str) -> Result<Arc<StreamView>, StreamError> {
        let namespace = namespace_or_default(namespace);
        let stream =
            self.view
                .stream_by_subject(namespace, subject)
                .ok_or_else(|| StreamError::NoStreamForSubject {
                    namespace: namespace.to_owned(),
                    subject: subject.to_owned(),
                })?;
        usable(stream)
    }

    /// One shard of a stream.
    pub fn shard(&self, stream: &StreamView, index: u32) -> Result<ShardAccess, StreamError> {
        let mut place = *stream
            .shards
            .get(index as usize)
            .ok_or_else(|| StreamError::NoSuchShard {
                name: stream.spec.name.clone(),
                shard: index,
                shards: u32::try_from(stream.shards.len()).unwrap_or(u32::MAX),
            })?;
        let found = self.face(place.shard, place.group);
        let (group, face) = found.ok_or_else(|| StreamError::NotLeader {
            name: stream.spec.name.clone(),
            shard: index,
            leader: None,
        })?;
        place.group = group;
        Ok(ShardAccess { place, face })
    }

    /// How a shard is read from here, and the group that has it. `None`: not at all.
    fn face(&self, shard: ShardId, owner: GroupId) -> Option<(GroupId, Face)> {
        let mut owner = owner;
        let shared = self.groups.directory().get(shard);
        // Of a shard that has just been adopted the replica here may know more than the view, or less.
        if let Some(shared) = shared.as_ref().filter(|shared| shared.came_from(owner)) {
            owner = shared.group();
        }
        let here = shared.zip(self.groups.serving(owner));
        let face = match here.filter(|_| !self.is_read_elsewhere(shard, owner)) {
            Some((shared, group)) => Face::Here { shared, group },
            None => Face::There(self.router.peers.is_some().then(|| self.remote(shard, owner))?),
        };
        Some((owner, face))
    }

    /// How a shard is read from here now; for a reader whose replica has left this node.
    fn face_now(&self, shard: ShardId) -> Option<Face> {
        Some(self.face(shard, self.view.owner_of(shard)?)?.1)
    }

    /// A shard that is replicated elsewhere; followed for as long as anybody holds it.
    fn remote(&self, shard: ShardId, group: GroupId) -> Arc<RemoteShard> {
        let mut remotes = self.remotes.lock();
        let known = remotes.get(&shard).and_then(Weak::upgrade);
        if let Some(remote) = known {
            return remote;
        }
        remotes.retain(|_, remote| remote.strong_count() > 0);
        let remote = RemoteShard::new(shard, group, self.router.clone());
        remotes.insert(shard, Arc::downgrade(&remote));
        let follow = remote::follow(Arc::downgrade(&remote), self.router.clone(), self.tasks.token());
        self.tasks.spawn(format!("follow {shard}"), follow);
        remote
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.store.identity().node_id
    }

    /// The node that leads a group, as far as is known here.
    pub fn leader_of(&self, group: GroupId) -> Option<NodeId> {
        if self.is_alone() {
            return Some(self.node());
        }
        self.router.leader_of(group)
    }

    /// Whether there are no other nodes: every replica is here, and leads.
    pub fn is_alone(&self) -> bool {
        self.router.peers.is_none()
    }

    fn router(&self) -> &Router {
        &self.router
    }

    /// Refuses what must not be taken now: little disk left, damaged data. What is on other nodes as well is taken on a
    /// damaged one too: it is begun anew from them.
    pub fn admit(&self, group: GroupId) -> Result<(), PublishError> {
        let space = self.store.space();
        if space.low {
            let refusal = PublishError::DiskLow {
                free: space.free,
                needed: self.store.options().min_free_bytes,
            };
            // Whoever is refused must find the alarm on, not a moment later.
            self.alarms.raise(AlarmKind::DiskLow, refusal.to_string());
            return Err(refusal);
        }
        if let Some(damage) = self.store.first_damage()
            && self.router.others(group).is_empty()
        {
            return Err(PublishError::Damaged(damage.what));
        }
        if let Some(poison) = self.store.poisoned().borrow().as_ref() {
            return Err(PublishError::Damaged(poison.to_string()));
        }
        Ok(())
    }

    /// Hands a validated batch to its shard. The outcome comes through the item's reply channel, always.
    pub fn submit(&self, access: &ShardAccess, item: Item) {
        self.ingest(access).submit(item);
    }

    /// The way into a shard, wherever it is led.
    pub fn ingest(&self, access: &ShardAccess) -> Ingest {
        self.ingest_of(access.place.shard, access.place.group)
    }

    fn ingest_of(&self, shard: ShardId, group: GroupId) -> Ingest {
        let mut ingests = self.ingests.lock();
        match ingests.get(&shard) {
            Some(ingest) if !ingest.is_closed() => ingest.clone(),
            Some(_) | None => {
                let (ingest, task) = Ingest::new(
                    shard,
                    group,
                    self.router.clone(),
                    self.clock.clone(),
                    self.metrics.clone(),
                    self.tasks.token(),
                );
                self.tasks.spawn(format!("ingest {shard}"), task);
                ingests.insert(shard, ingest.clone());
                ingest
            }
        }
    }

    /// Notes damage that a read found, so that health reports it. Gives the error back; where another node has the shard, it
    /// is one of here and now: the shard is read there from then on.
    pub fn noted(&self, shard: ShardId, e: ReadError) -> ReadError {
        let ReadError::Damaged(what) = e else {
            return e;
        };
        tracing::error!(%shard, what, "stored data is damaged");
        self.alarms.raise(AlarmKind::Damaged, what.clone());
        self.damaged.lock().insert(shard);
        let owner = self.view.owner_of(shard);
        match owner.is_some_and(|owner| self.is_read_elsewhere(shard, owner)) {
            true => ReadError::Unreachable(format!(
                "its replica here is damaged, and is read on another node: {what}"
            )),
            false => ReadError::Damaged(what),
        }
    }

    /// Whether a shard that has a replica here is read on another node all the same: the one here is damaged.
    fn is_read_elsewhere(&self, shard: ShardId, owner: GroupId) -> bool {
        // Asked for each access: what is common costs nothing.
        self.groups.damage_found() > 0 && self.damaged.lock().contains(&shard) && !self.router.others(owner).is_empty()
    }
}

/// An empty namespace means "default".
pub fn namespace_or_default(namespace: &str) -> &str {
    if namespace.is_empty() { "default" } else { namespace }
}

fn usable(stream: Arc<StreamView>) -> Result<Arc<StreamView>, StreamError> {
    match stream.state {
        v1::StreamState::Active => Ok(stream),
        v1::StreamState::Creating => Err(StreamError::Creating {
            name: stream.spec.name.clone(),
        }),
        v1::StreamState::Removed | v1::StreamState::Unspecified => Err(StreamError::NotFound {
            namespace: stream.spec.namespace.clone(),
            name: stream.spec.name.clone(),
        }),
    }
}
