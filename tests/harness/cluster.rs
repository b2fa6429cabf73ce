//! Several nodes: the first founds the cluster, the others join it. Ports are chosen by the system at first; a node that
//! is started again listens for its peers where it did before.

use super::node::{Node, Options};
use super::until;

pub struct Cluster {
    pub nodes: Vec<Node>,
    options: Options,
}

/// How nodes with peers are started: calmer than the defaults, because other tests run beside.
fn with_peers(options: &Options, number: usize) -> Options {
    options
        .clone()
        .flag("--name", &format!("node-{}", number + 1))
        .flag("--raft-heartbeat", "150ms")
        .flag("--raft-election-min", "400ms")
        .flag("--raft-election-max", "800ms")
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
            };
        }
        let mut cluster = Self::found(options).await;
        for _ in 1..n {
            cluster.join().await;
        }
        cluster
            .voters_are(if n % 2 == 1 { n.min(5) } else { (n - 1).min(5) })
            .await;
        cluster
    }

    /// A cluster of one node that takes others.
    pub async fn found(options: Options) -> Self {
        let mut first = Node::new("node 0", with_peers(&options, 0));
        first.options.flags.push("--bootstrap".into());
        first.set_peer_listen("127.0.0.1:0");
        first.launch();
        first.ready().await;
        Self {
            nodes: vec![first],
            options,
        }
    }

    /// A node that is to join through another one, not started yet.
    pub fn joiner(&self, through: usize) -> Node {
        let number = self.nodes.len();
        let options = with_peers(&self.options, number).flag("--join", &self.nodes[through].peer_addr());
        let mut node = Node::new(&format!("node {number}"), options);
        node.set_peer_listen("127.0.0.1:0");
        node
    }

    /// One more node.
    pub async fn join(&mut self) {
        let mut node = self.joiner(0);
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
