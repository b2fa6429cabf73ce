//! Several nodes: the first founds the cluster, the others join it. Ports are chosen by the system at first; a node that
//! is started again listens for its peers where it did before.
//!
//! `Cluster::networked` puts a proxy in front of each node's peer listener (`net.rs`), so that nodes can be cut off from
//! each other while clients go on talking to each of them, and lets nodes keep their addresses for clients.

use std::time::Duration;

use mainstem::wire::v1;

use super::net::{Flow, Link, Net, own_address};
use super::node::{Node, Options};
use super::until;

pub struct Cluster {
    pub nodes: Vec<Node>,
    options: Options,
    net: Wires,
}

/// What lies between the nodes.
enum Wires {
    Nothing,
    /// The proxy of each node.
    Proxies {
        net: Net,
        addresses: Vec<String>,
    },
    /// Networks of the machine, made by the test.
    Places(Vec<Place>),
}

/// Where a node is to be.
#[derive(Clone)]
pub struct Place {
    /// The network namespace.
    pub namespace: String,
    /// HOST:PORT in it.
    pub client: String,
    pub peer: String,
}

/// How nodes with peers are started: calmer than the defaults, because other tests run beside.
fn with_peers(options: &Options, number: usize) -> Options {
    let mut options = options.clone();
    for (flag, value) in [
        ("--name", format!("node-{}", number + 1).as_str()),
        ("--raft-heartbeat", "150ms"),
        ("--raft-election-min", "400ms"),
        ("--raft-election-max", "800ms"),
    ] {
        if !options.flags.iter().any(|known| known == flag) {
            options = options.flag(flag, value);
        }
    }
    options
}

impl Cluster {
    /// A cluster of `n` nodes, each with an empty directory, ready to serve. With several, all of those that should vote
    /// in the meta group do.
    pub async fn start(n: usize, options: Options) -> Self {
        if n == 1 {
            let mut node = Node::new("node 0", options.clone());
            node.launch();
            node.ready().await;
            return Self {
                nodes: vec![node],
                options,
                net: Wires::Nothing,
            };
        }
        Self::found(options).await.grown_to(n).await
    }

    /// The same, with proxies between the nodes.
    pub async fn networked(n: usize, options: Options) -> Self {
        let wires = Wires::Proxies {
            net: Net::default(),
            addresses: Vec::new(),
        };
        Self::empty(options, wires).founded().await.grown_to(n).await
    }

    /// A node at each of these places.
    pub async fn placed(places: Vec<Place>, options: Options) -> Self {
        let n = places.len();
        let cluster = Self::empty(options, Wires::Places(places));
        cluster.founded().await.grown_to(n).await
    }

    /// A cluster of one node that takes others.
    pub async fn found(options: Options) -> Self {
        Self::empty(options, Wires::Nothing).founded().await
    }

    fn empty(options: Options, net: Wires) -> Self {
        Self {
            nodes: Vec::new(),
            options,
            net,
        }
    }

    async fn founded(mut self) -> Self {
        let mut first = Node::new("node 0", with_peers(&self.options, 0));
        first.options.flags.push("--bootstrap".into());
        self.wire(&mut first).await;
        first.launch();
        first.ready().await;
        self.nodes.push(first);
        self
    }

    async fn grown_to(mut self, n: usize) -> Self {
        for _ in 1..n {
            self.join().await;
        }
        self.voters_are(if n % 2 == 1 { n.min(5) } else { (n - 1).min(5) })
            .await;
        self
    }

    /// Gives a node its place in the network.
    async fn wire(&mut self, node: &mut Node) {
        match &mut self.net {
            Wires::Nothing => node.set_peer_listen("127.0.0.1:0"),
            Wires::Proxies { net, addresses } => {
                let peer = own_address();
                let proxy = net.add(peer.clone(), node.pid_cell()).await;
                node.set_peer_listen(&peer);
                node.set_client_listen(&own_address());
                node.options.flags.extend(["--advertise-peer".into(), proxy.clone()]);
                addresses.push(proxy);
            }
            Wires::Places(places) => {
                let place = &places[self.nodes.len()];
                node.set_peer_listen(&place.peer);
                node.set_client_listen(&place.client);
                node.options.namespace = Some(place.namespace.clone());
            }
        }
    }

    /// Where other nodes find one.
    fn peer_address(&self, i: usize) -> String {
        match &self.net {
            Wires::Proxies { addresses, .. } => addresses[i].clone(),
            Wires::Nothing | Wires::Places(_) => self.nodes[i].peer_addr(),
        }
    }

    /// A node that is to join through another one, not started yet.
    pub fn joiner(&self, through: usize) -> Node {
        let number = self.nodes.len();
        let options = with_peers(&self.options, number).flag("--join", &self.peer_address(through));
        let mut node = Node::new(&format!("node {number}"), options);
        node.set_peer_listen("127.0.0.1:0");
        node
    }

    /// One more node.
    pub async fn join(&mut self) {
        self.join_through(0).await;
    }

    pub async fn join_through(&mut self, through: usize) {
        let mut node = self.joiner(through);
        self.wire(&mut node).await;
        node.launch();
        node.ready().await;
        self.nodes.push(node);
    }

    /// Waits until so many replicas of the meta group vote, as any running node has logged.
    pub async fn voters_are(&mut self, voters: usize) {
        let what = format!("voters={voters}");
        until("the meta group has its voters", async || {
            self.nodes
                .iter()
                .any(|node| node.has_logged(&["the meta group's voters", &what]))
        })
        .await;
    }

    /// Where clients may connect.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(Node::client_addr).collect()
    }

    /// The nodes that run and are not paused.
    pub fn awake(&mut self) -> Vec<usize> {
        (0..self.nodes.len())
            .filter(|i| self.nodes[*i].runs() && !self.nodes[*i].is_paused())
            .collect()
    }

    // ---- What happens to nodes

    /// kill -9.
    pub async fn kill(&mut self, i: usize) {
        self.nodes[i].kill9().await;
    }

    /// The power of these nodes fails at the same time; unsynced writes are lost as the seed says. Needs
    /// `Options::powered()`.
    pub async fn power_fail(&mut self, which: &[usize], seed: u64) {
        for &i in which {
            self.nodes[i].power_off(seed.wrapping_add(i as u64));
        }
        for &i in which {
            self.nodes[i].powered_off().await;
        }
    }

    pub fn pause(&mut self, i: usize) {
        self.nodes[i].pause();
    }

    pub fn resume(&mut self, i: usize) {
        self.nodes[i].resume();
    }

    /// Each sync takes this much longer. Needs the preload library.
    pub fn slow_disk(&self, i: usize, by: Duration) {
        self.nodes[i].faults(&format!("sync-delay-us {}", by.as_micros()));
    }

    /// The wall clock is off by so much. Needs the preload library.
    pub fn clock_jump(&self, i: usize, by_us: i64) {
        self.nodes[i].faults(&format!("clock-offset-us {by_us}"));
    }

    /// The data directory of a node that does not run is empty. When it is started it asks to join, as whoever has to
    /// make a node on an empty disk would let it: with `--bootstrap` it would be a cluster of its own.
    pub fn wipe(&mut self, i: usize) {
        assert!(!self.nodes[i].runs(), "a node that runs cannot be wiped");
        let data = self.nodes[i].data().to_path_buf();
        if data.exists() {
            std::fs::remove_dir_all(data).unwrap();
        }
        let other = self.peer_address((i + 1) % self.nodes.len());
        let flags = &mut self.nodes[i].options.flags;
        if let Some(at) = flags.iter().position(|flag| flag == "--bootstrap") {
            flags.splice(at..=at, ["--join".into(), other]);
        }
    }

    // ---- What happens between them

    fn net(&self) -> &Net {
        match &self.net {
            Wires::Proxies { net, .. } => net,
            Wires::Nothing | Wires::Places(_) => panic!("made by Cluster::networked"),
        }
    }

    /// What `from` sends does not arrive at `to`; the other direction goes on.
    pub fn cut(&self, from: usize, to: usize) {
        self.net().set(from, to, Flow::Held);
    }

    /// How what `from` sends travels to `to`.
    pub fn link(&self, from: usize, to: usize, link: Link) {
        self.net().set(from, to, link);
    }

    /// The node reaches no other one, and none reaches it.
    pub fn isolate(&self, i: usize, how: Flow) {
        let others: Vec<usize> = (0..self.nodes.len()).filter(|other| *other != i).collect();
        self.partition(&[&[i], &others], how);
    }

    /// Nodes of different groups do not reach each other.
    pub fn partition(&self, groups: &[&[usize]], how: Flow) {
        for (at, group) in groups.iter().enumerate() {
            for (other_at, other) in groups.iter().enumerate() {
                for (&i, &j) in group.iter().flat_map(|i| other.iter().map(move |j| (i, j))) {
                    if at != other_at {
                        self.net().set(i, j, how);
                    }
                }
            }
        }
    }

    /// Every node reaches every other one, without delay.
    pub fn reconnect(&self) {
        self.net().heal();
    }

    // ---- What is waited for

    pub fn wait(&mut self) -> Wait<'_> {
        Wait(self)
    }

    /// What the nodes that run say is wrong; empty: nothing.
    pub async fn wrong(&mut self) -> String {
        let mut wrong = String::new();
        for i in self.awake() {
            if let Err(what) = health(&self.nodes[i].client_addr()).await {
                wrong += &format!("node {i}: {what}\n");
            }
        }
        wrong
    }
}

/// What a cluster is waited for. Panics, saying what did not happen, when it takes too long.
pub struct Wait<'a>(&'a mut Cluster);

impl Wait<'_> {
    /// Waits until every shard of a stream has a leader, as a node that is awake sees it. Returns the place of the first
    /// shard's leader in the cluster.
    pub async fn leader(self, stream: &str) -> usize {
        let cluster = self.0;
        let mut found = None;
        until("every shard has a leader", async || {
            for i in cluster.awake() {
                let Ok(api) = super::Api::connect(&cluster.nodes[i].client_addr()).await else {
                    continue;
                };
                let told = tokio::time::timeout(Duration::from_secs(5), api.stream(stream)).await;
                let Ok(Ok(told)) = told else { continue };
                let leaders: Option<Vec<u64>> = told.shards.iter().map(|shard| shard.leader_node).collect();
                found = leaders.and_then(|leaders| leaders.first().map(|node| *node as usize - 1));
                if found.is_some() {
                    return true;
                }
            }
            false
        })
        .await;
        found.expect("a leader")
    }

    /// Waits until the cluster is healthy and plans nothing: no leader is handed over any more because the groups of a
    /// new cluster come to lie unevenly. A test that needs a leader to stay where it is waits for this first.
    pub async fn settled(self) {
        let cluster = self.0;
        nothing_wrong("settled", async || {
            let wrong = cluster.wrong().await;
            if !wrong.is_empty() {
                return wrong;
            }
            let node = cluster.awake()[0];
            match cluster.nodes[node].api().await.plan().await {
                Ok(plan) if plan.actions.is_empty() && plan.silent_nodes.is_empty() => String::new(),
                planned => format!("{planned:?}"),
            }
        })
        .await;
    }

    /// Waits until every node that runs sees nothing wrong with the cluster: every node of it answers, every group has
    /// its leader, its quorum, and its replicas.
    pub async fn healthy(self) {
        let cluster = self.0;
        nothing_wrong("healthy", async || cluster.wrong().await).await;
    }
}

/// Waits until there is nothing wrong any more.
async fn nothing_wrong(what: &str, mut wrong: impl AsyncFnMut() -> String) {
    let begun = tokio::time::Instant::now();
    loop {
        let wrong = wrong().await;
        if wrong.is_empty() {
            return;
        }
        assert!(
            begun.elapsed() < super::PATIENCE,
            "not {what} after {:?}:\n{wrong}",
            super::PATIENCE
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What a node says is wrong with the cluster.
async fn health(address: &str) -> Result<(), String> {
    let api = super::Api::connect(address).await.map_err(|e| e.to_string())?;
    let patience = Duration::from_secs(10);
    let report = tokio::time::timeout(patience, api.report())
        .await
        .map_err(|_| "no report in time".to_string())?
        .map_err(|e| format!("{e:?}"))?;
    let problems: Vec<&str> = report.problems.iter().map(|p| p.text.as_str()).collect();
    let silent: Vec<&str> = report.silent_nodes.iter().map(|n| n.name.as_str()).collect();
    let summary = report.summary.unwrap_or_default();
    // A group that holds nothing may have been lost with a node that was removed by force.
    let lame = |g: &&v1::GroupReport| g.leaderless || g.under_replicated || g.quorum_have < g.quorum_need;
    let groups: Vec<u64> = report
        .groups
        .iter()
        .filter(|g| g.shards > 0)
        .filter(lame)
        .map(|g| g.group_id)
        .collect();
    let fine = problems.is_empty()
        && silent.is_empty()
        && groups.is_empty()
        && summary.changes + summary.moves == 0
        && report.meta.is_some_and(|meta| !meta.leaderless);
    if fine {
        Ok(())
    } else {
        Err(format!(
            "problems {problems:?}, silent {silent:?}, groups {groups:?}, {summary:?}"
        ))
    }
}

impl std::ops::Index<usize> for Cluster {
    type Output = Node;
    fn index(&self, i: usize) -> &Node {
        &self.nodes[i]
    }
}

impl std::ops::IndexMut<usize> for Cluster {
    fn index_mut(&mut self, i: usize) -> &mut Node {
        &mut self.nodes[i]
    }
}
