//! Nodes in one process: each has a store in a directory of its own, a listener, peers and groups.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mainstem::base::RetryClass;
use mainstem::machine::{FEATURE_LEVEL, GroupOutcome, ItemOutcome};
use mainstem::model::batch::{BatchBuilder, Codec, RecordFields};
use mainstem::model::{GroupId, LogIndex, NodeId, ReplicaId, Sequence, ShardId};
use mainstem::raft::transport::{PeerConfig, PeerIdentity, PeerMap, PeerServer, Peers};
use mainstem::raft::{
    Applied, Group, Groups, GroupsOptions, LogKeep, MetaChange, MetaObserver, Origin, ProposeError, RaftTimings,
};
use mainstem::storage::{Store, StoreOptions};
use mainstem::wire::internal as pb;
use prost::Message;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const GROUP: GroupId = GroupId::new(7);
/// Far beyond what anything takes on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub struct Nobody;

impl MetaObserver for Nobody {
    fn changed(&self, _changes: &[MetaChange]) {}
}

/// What differs between tests.
#[derive(Clone)]
pub struct Settings {
    pub timings: RaftTimings,
    pub keep: LogKeep,
    pub tune: fn(&mut PeerConfig),
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // Calmer than the defaults: other tests run beside.
            timings: RaftTimings {
                heartbeat: Duration::from_millis(150),
                election_min: Duration::from_millis(400),
                election_max: Duration::from_millis(800),
            },
            keep: LogKeep::default(),
            tune: |_| {},
        }
    }
}

pub struct Node {
    pub id: NodeId,
    pub store: Arc<Store>,
    pub groups: Arc<Groups>,
    pub peers: Peers,
    pub map: Arc<PeerMap>,
    pub address: String,
    serving: JoinHandle<()>,
    upkeep: JoinHandle<()>,
    stop: CancellationToken,
}

pub fn replica(group: GroupId, node: u64) -> ReplicaId {
    ReplicaId::new(group.get() * 100 + node)
}

/// Opens a store; another one of this process may not have let go of it yet.
pub async fn open_store(dir: &std::path::Path, node: u64) -> Arc<Store> {
    let options = StoreOptions {
        dir: dir.to_owned(),
        min_free_bytes: 0,
        ..StoreOptions::default()
    };
    let begun = Instant::now();
    loop {
        let options = options.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open(options, Some(NodeId::new(node)))).await;
        match opened.unwrap() {
            Ok(store) => return store,
            Err(e @ mainstem::storage::OpenError::Locked { .. }) => assert!(begun.elapsed() < PATIENCE, "{e}"),
            Err(e) => panic!("{e}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Node {
    pub async fn start(dir: &std::path::Path, node: u64, settings: &Settings) -> Node {
        let store = open_store(dir, node).await;
        let identity = PeerIdentity {
            cluster_id: "lab".into(),
            node: NodeId::new(node),
            store_id: store.identity().store_id,
            incarnation: store.identity().incarnation,
            starts: store.identity().starts,
        };
        let mut config = PeerConfig::new(identity, "a secret of the lab");
        (settings.tune)(&mut config);
        let map = Arc::new(PeerMap::default());
        let peers = Peers::new(config, map.clone()).unwrap();
        let options = GroupsOptions {
            recent_bytes: 1 << 20,
            timings: settings.timings,
            keep: settings.keep,
            peers: Some(peers.clone()),
        };
        let groups = Groups::with_options(&store, options, Arc::new(Nobody));
        let server = PeerServer::new(&peers, &groups);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let serve = server
            .tuned()
            .add_service(server.service())
            .serve_with_incoming_shutdown(
                tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true)),
                stop.clone().cancelled_owned(),
            );
        Node {
            id: NodeId::new(node),
            serving: tokio::spawn(async move { serve.await.unwrap() }),
            upkeep: tokio::spawn(groups.clone().upkeep(stop.clone())),
            store,
            groups,
            peers,
            map,
            address,
            stop,
        }
    }

    /// Ends it without a word to the others. What `state/` has not flushed is lost.
    pub async fn kill(self) {
        self.serving.abort();
        self.upkeep.abort();
        self.stop.cancel();
        self.peers.shutdown(Duration::from_secs(10)).await;
        self.groups.shutdown().await;
        tokio::task::spawn_blocking(move || drop(self.store)).await.unwrap();
    }

    pub fn group(&self, group: GroupId) -> Group {
        self.groups.get(group).expect("the group runs here")
    }

    /// Flushes `state/`, so that the log may be purged.
    pub async fn flush(&self) {
        let state = self.store.state().clone();
        tokio::task::spawn_blocking(move || state.flush())
            .await
            .unwrap()
            .unwrap();
    }

    /// Everything the group's state holds here.
    pub async fn export(&self, group: GroupId) -> Vec<u8> {
        let state = self.store.state().clone();
        tokio::task::spawn_blocking(move || {
            let mut out = Vec::new();
            let sink = |chunk: Bytes| {
                out.extend_from_slice(&chunk);
                true
            };
            state.export_group(group, sink).unwrap();
            out
        })
        .await
        .unwrap()
    }
}

/// Some nodes that know each other, some of them stopped.
pub struct Lab {
    pub nodes: Vec<Option<Node>>,
    dirs: Vec<tempfile::TempDir>,
    pub settings: Settings,
    groups: BTreeSet<GroupId>,
}

impl Lab {
    pub async fn new(nodes: usize, settings: Settings) -> Lab {
        let mut lab = Lab {
            nodes: Vec::new(),
            dirs: Vec::new(),
            settings,
            groups: BTreeSet::new(),
        };
        for _ in 0..nodes {
            lab.add().await;
        }
        lab
    }

    /// Node numbers begin with 1; its place in the list is one less.
    pub async fn add(&mut self) -> usize {
        self.dirs.push(tempfile::tempdir().unwrap());
        self.nodes.push(None);
        let at = self.nodes.len() - 1;
        self.start(at).await;
        at
    }

    pub async fn start(&mut self, at: usize) {
        let node = Node::start(self.dirs[at].path(), at as u64 + 1, &self.settings).await;
        self.nodes[at] = Some(node);
        self.introduce();
    }

    pub async fn kill(&mut self, at: usize) {
        self.nodes[at].take().expect("it runs").kill().await;
    }

    pub fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().flatten()
    }

    pub fn node(&self, at: usize) -> &Node {
        self.nodes[at].as_ref().expect("it runs")
    }

    /// Tells every node where the others and their replicas are.
    pub fn introduce(&self) {
        for node in self.running() {
            for other in self.running() {
                node.map.set_node(other.id, other.address.clone());
            }
            for group in &self.groups {
                for n in 1..=self.nodes.len() as u64 {
                    node.map.set_replica(replica(*group, n), NodeId::new(n));
                }
            }
        }
    }

    /// Founds a group on the first `voters` nodes, and makes a shard in it.
    pub async fn found(&mut self, group: GroupId, voters: u64) {
        self.groups.insert(group);
        self.introduce();
        let members: BTreeSet<_> = (1..=voters).map(|n| replica(group, n)).collect();
        for n in 1..=voters {
            let node = self.node(n as usize - 1);
            let origin = Origin::Found(members.clone());
            node.groups.start_as(group, replica(group, n), origin).await.unwrap();
        }
        self.propose(group, create_shard(SHARD_OF(group))).await;
        // Who has nothing of the group's log cannot be started again as one that has run before.
        for n in 1..=voters {
            let log = self.node(n as usize - 1).group(group).log().clone();
            until("a log of each replica", || log.last().is_some()).await;
        }
    }

    /// Starts the replica of a node that was started again.
    pub async fn restart(&mut self, at: usize, group: GroupId) {
        self.start(at).await;
        let origin = Origin::Restart;
        let id = replica(group, at as u64 + 1);
        self.node(at).groups.start_as(group, id, origin).await.unwrap();
    }

    /// The place of the node that leads, once there is one and it has heard a quorum.
    pub async fn leader(&self, group: GroupId) -> usize {
        let begun = Instant::now();
        loop {
            for (at, node) in self.nodes.iter().enumerate() {
                let Some(found) = node.as_ref().and_then(|n| n.groups.get(group)) else {
                    continue;
                };
                if found.status().is_leader && found.read_barrier().await.is_ok() {
                    return at;
                }
            }
            assert!(begun.elapsed() < PATIENCE, "{group} has no leader");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Proposes until it is done. What may have happened is proposed again: a command may be applied twice.
    pub async fn propose(&self, group: GroupId, command: Bytes) -> (LogIndex, Applied) {
        let begun = Instant::now();
        loop {
            let leader = self.leader(group).await;
            match propose_once(&self.node(leader).group(group), command.clone()).await {
                Ok((index, applied)) => return (index, applied),
                Err(e) => assert!(begun.elapsed() < PATIENCE, "{e}"),
            }
        }
    }

    /// Publishes messages `range` of `bytes` bytes each, one by one.
    pub async fn publish(&self, group: GroupId, range: std::ops::Range<u64>, bytes: usize) {
        for n in range {
            let (_, applied) = self.propose(group, publish(SHARD_OF(group), n, bytes)).await;
            let Applied::Command(GroupOutcome::Published(outcomes)) = applied else {
                panic!("not a publish: {applied:?}");
            };
            assert!(
                matches!(outcomes[..], [ItemOutcome::Stored { .. }]),
                "not stored: {outcomes:?}"
            );
        }
    }

    /// Waits until every running replica has applied everything, and checks that all hold the same bytes.
    pub async fn converge(&self, group: GroupId) -> Vec<u8> {
        let begun = Instant::now();
        loop {
            let leader = self.leader(group).await;
            let goal = self.node(leader).group(group).status().last_log;
            let replicas: Vec<_> = self.running().filter(|n| n.groups.get(group).is_some()).collect();
            let statuses: Vec<_> = replicas.iter().map(|n| n.group(group).status()).collect();
            if statuses.iter().all(|s| s.last_applied == goal && s.last_log == goal) {
                let mut exports = Vec::new();
                for node in &replicas {
                    exports.push(node.export(group).await);
                }
                let same = exports.iter().all(|e| *e == exports[0]);
                let still = replicas.iter().all(|n| n.group(group).status().last_applied == goal);
                assert!(
                    same || !still,
                    "the replicas of {group} hold different bytes at {goal:?}"
                );
                if same && still {
                    return exports.swap_remove(0);
                }
            }
            assert!(begun.elapsed() < PATIENCE, "{group} does not converge: {statuses:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether each of these messages is stored on a node, in this order.
    pub fn holds(&self, at: usize, group: GroupId, range: std::ops::Range<u64>) {
        let state = self.node(at).store.state();
        let stored: Vec<_> = state
            .batches(SHARD_OF(group), Sequence::FIRST)
            .map(|b| b.unwrap().batch)
            .collect();
        let mut from = 0;
        for n in range {
            let text = text(n);
            let found = stored[from..]
                .iter()
                .position(|b| b.windows(text.len()).any(|w| w == text.as_bytes()));
            from += found.unwrap_or_else(|| panic!("message {n} of {group} is missing on node {}", at + 1));
        }
    }

    pub async fn end(self) {
        for node in self.nodes.into_iter().flatten() {
            node.kill().await;
        }
    }
}

pub async fn propose_once(group: &Group, command: Bytes) -> Result<(LogIndex, Applied), ProposeError> {
    let mut pending = group.propose(command).await?;
    let answer = tokio::time::timeout(Duration::from_secs(20), pending.wait()).await;
    match answer {
        Ok(Ok((index, _, applied))) => Ok((index, applied)),
        Ok(Err(e)) => {
            assert_ne!(e.retry_class(), RetryClass::CannotWork);
            Err(e)
        }
        Err(_) => Err(ProposeError::Unknown { group: group.id }),
    }
}

/// Polls a condition.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "it never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The one shard of a group here.
#[allow(non_snake_case)] // Reads like the constant that it is for each group.
pub const fn SHARD_OF(group: GroupId) -> ShardId {
    ShardId::new(group.get() * 10 + 3)
}

pub fn command(op: pb::group_command::Op) -> Bytes {
    pb::GroupCommand {
        feature_level: FEATURE_LEVEL,
        op: Some(op),
    }
    .encode_to_vec()
    .into()
}

pub fn create_shard(shard: ShardId) -> Bytes {
    command(pb::group_command::Op::CreateShard(pb::CreateShard {
        shard_id: shard.get(),
        config: Some(pb::ShardConfig {
            stream_id: format!("{:032x}", shard.get()),
            subject_in_one_shard: true,
            duplicate_window_us: 60_000_000,
            duplicate_ids_max: 10_000,
            producers_max: 10,
            // Longer than any election: a producer that waits for a leader is not forgotten.
            producer_idle_us: 600_000_000,
            ..pb::ShardConfig::default()
        }),
    }))
}

pub fn text(n: u64) -> String {
    format!("<message {n}>")
}

pub fn publish(shard: ShardId, n: u64, bytes: usize) -> Bytes {
    let mut payload = text(n).into_bytes();
    let mut noise = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    while payload.len() < bytes {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        payload.push(noise as u8);
    }
    let mut builder = BatchBuilder::new();
    builder
        .push(&RecordFields {
            subject: ["a.b", "a.c", "d"][(n % 3) as usize],
            key: None,
            message_id: None,
            event_time: None,
            headers: &[],
            payload: &payload,
        })
        .unwrap();
    command(pb::group_command::Op::Publish(pb::Publish {
        shard_id: shard.get(),
        time_us: 1_000_000 + n,
        items: vec![pb::PublishItem {
            batch: builder.build(Codec::None).unwrap(),
            producer: None,
            expect: None,
        }],
    }))
}

pub fn purge_before(shard: ShardId, before: u64) -> Bytes {
    command(pb::group_command::Op::Purge(pb::Purge {
        shard_id: shard.get(),
        before_sequence: Some(before),
        ..pb::Purge::default()
    }))
}
