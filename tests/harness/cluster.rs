//! Several nodes. Today a cluster has one; tests are written against this so that they can have three tomorrow.

use super::node::{Node, Options};

pub struct Cluster {
    pub nodes: Vec<Node>,
}

impl Cluster {
    /// A cluster of `n` nodes, each with an empty directory, ready to serve.
    pub async fn start(n: usize, options: Options) -> Self {
        assert_eq!(n, 1, "a node cannot join another yet");
        let mut nodes = Vec::new();
        for i in 0..n {
            let mut node = Node::new(&format!("node {i}"), options.clone());
            node.launch();
            node.ready().await;
            nodes.push(node);
        }
        Self { nodes }
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
