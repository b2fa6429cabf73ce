//! One simulated node: the product from the store up to the replicas and their transport, on a runtime of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mainstem::model::{GroupId, LogIndex, NodeId, ReplicaId, Sequence, ShardId, Term};
use mainstem::raft::transport::{PeerConfig, PeerIdentity, PeerMap, PeerServer, Peers};
use mainstem::raft::{Group, Groups, GroupsOptions, LogKeep, MetaChange, MetaObserver, Origin, RaftTimings};
use mainstem::storage::{OpenError, Store, StoreOptions};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::disk::Disk;
use super::host::UntilIdle;
use super::net::{Dialer, Net, NodeNo, address};

struct Nobody;

impl MetaObserver for Nobody {
    fn changed(&self, _changes: &[MetaChange]) {}
}

/// What was seen of a replica last.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    pub term: Term,
    pub leader: Option<ReplicaId>,
    pub leads: bool,
    pub applied: u64,
    pub last: Option<LogIndex>,
}

/// A replica that the node shall run.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub origin: Origin,
    /// It was removed, and what it had is gone; who believes otherwise must not succeed.
    pub gone: bool,
}

/// A node, running or not.
pub struct Node {
    pub no: NodeNo,
    pub disk: Disk,
    pub wanted: Vec<Wanted>,
    pub run: Option<Run>,
    /// Raised at each start.
    pub boot: u64,
}

/// A running node.
pub struct Run {
    pub runtime: Runtime,
    pub store: Arc<Store>,
    pub groups: Arc<Groups>,
    pub map: Arc<PeerMap>,
    /// When a timer of it ends next.
    pub deadline: Option<u64>,
    pub paused_until: u64,
    /// A write is under way.
    pub writing: bool,
    pub slow_until: u64,
    pub seen: BTreeMap<GroupId, Seen>,
    /// How far each group's state was looked at.
    pub applied: BTreeMap<GroupId, LogIndex>,
    /// Next sequence of each shard that was not looked at.
    pub next: BTreeMap<ShardId, Sequence>,
    pub failures: Arc<Mutex<Vec<String>>>,
}

impl Node {
    pub fn new(no: NodeNo, dir: std::path::PathBuf) -> Self {
        Self {
            no,
            disk: Disk::new(dir),
            wanted: Vec::new(),
            run: None,
            boot: 0,
        }
    }

    /// Opens the store.
    pub fn open(&self) -> Result<Arc<Store>, OpenError> {
        let options = StoreOptions {
            dir: self.disk.dir().to_owned(),
            min_free_bytes: 0,
            threads: false,
            // They are allocated in eighths.
            log_write_buffer_bytes: 8 << 20,
            state_write_buffer_bytes: 8 << 20,
            block_cache_bytes: 1 << 20,
            ..StoreOptions::default()
        };
        Store::open(options, Some(NodeId::new(self.no as u64)))
    }

    /// Opens the store and starts everything on it.
    pub fn start(
        &mut self,
        net: &Net,
        nodes: usize,
        places: &BTreeMap<ReplicaId, NodeNo>,
        keep: LogKeep,
        floors: &BTreeMap<GroupId, LogIndex>,
    ) -> Result<(), OpenError> {
        let store = self.open()?;
        self.disk.opened();
        self.boot += 1;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let entered = runtime.enter();
        let identity = PeerIdentity {
            cluster_id: "simulation".into(),
            node: NodeId::new(self.no as u64),
            store_id: store.identity().store_id,
            incarnation: store.identity().incarnation,
            starts: store.identity().starts,
        };
        let mut config = PeerConfig::new(identity, "a secret of the simulation");
        config.dial = Some(Arc::new(Dialer {
            net: net.clone(),
            from: self.no,
        }));
        let map = Arc::new(PeerMap::default());
        for other in 1..=nodes {
            map.set_node(NodeId::new(other as u64), address(other));
        }
        for (replica, node) in places {
            map.set_replica(*replica, NodeId::new(*node as u64));
        }
        let peers = Peers::new(config, map.clone()).expect("the settings are good");
        let options = GroupsOptions {
            recent_bytes: 1 << 20,
            timings: RaftTimings::default(),
            keep,
            peers: Some(peers.clone()),
        };
        let groups = Groups::with_options(&store, options, Arc::new(Nobody));
        let server = PeerServer::new(&peers, &groups);
        let serving = server
            .tuned()
            .add_service(server.service())
            .serve_with_incoming(net.listen(self.no));
        runtime.spawn(async move {
            // It ends with the node.
            let _ = serving.await;
        });
        runtime.spawn(groups.clone().upkeep(CancellationToken::new()));
        drop(entered);
        self.run = Some(Run {
            runtime,
            store,
            groups,
            map,
            deadline: None,
            paused_until: 0,
            writing: false,
            slow_until: 0,
            seen: BTreeMap::new(),
            applied: BTreeMap::new(),
            next: BTreeMap::new(),
            failures: Arc::default(),
        });
        for wanted in self.wanted.clone() {
            let floor = floors.get(&wanted.group).copied().unwrap_or_default();
            self.start_replica(wanted, floor);
        }
        Ok(())
    }

    /// Starts a replica, if the node runs.
    pub fn start_replica(&self, wanted: Wanted, floor: LogIndex) {
        let Some(run) = &self.run else { return };
        let (groups, failures) = (run.groups.clone(), run.failures.clone());
        run.runtime.spawn(async move {
            let Wanted {
                group,
                replica,
                origin,
                gone,
            } = wanted;
            match groups.start_at(group, replica, origin, floor).await {
                Err(error) if !gone => failures.lock().push(error.to_string()),
                // One that is gone and starts is found where it is looked at what runs.
                Ok(_) | Err(_) => {}
            }
        });
    }

    pub fn group(&self, group: GroupId) -> Option<Group> {
        self.run.as_ref()?.groups.get(group)
    }
}

impl Run {
    /// Runs everything that can run now.
    pub fn slice(&mut self) {
        self.deadline = self.runtime.block_on(UntilIdle);
    }

    /// Ends at once: no task of the node does anything any more. Gives the store, for the disk to be done with.
    pub fn end(self) -> Arc<Store> {
        let Run {
            runtime, store, groups, ..
        } = self;
        drop(groups);
        drop(runtime);
        store
    }
}

/// The first voters of a group, by node: replica ids are never given twice.
pub fn replica(group: GroupId, n: usize) -> ReplicaId {
    ReplicaId::new(group.get() * 100 + n as u64)
}

/// How the first voters of a group begin.
pub fn founders(group: GroupId, nodes: &[NodeNo]) -> BTreeSet<ReplicaId> {
    nodes.iter().map(|n| replica(group, *n)).collect()
}
