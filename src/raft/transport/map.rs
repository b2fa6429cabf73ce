//! Where replicas live. Raft knows replica ids only; which node hosts one, and where that node listens, is data that
//! changes without Raft.

use std::collections::{BTreeMap, HashMap};

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::model::{NodeId, ReplicaId};

#[derive(Debug, Default)]
struct Table {
    replicas: HashMap<ReplicaId, NodeId>,
    /// `host:port` of the node's peer listener.
    nodes: BTreeMap<NodeId, String>,
}

/// Replica id → node id → address. Shared: the layer that holds the cluster's metadata keeps it up to date.
#[derive(Debug)]
pub struct PeerMap {
    table: RwLock<Table>,
    changed: watch::Sender<u64>,
}

impl Default for PeerMap {
    fn default() -> Self {
        Self {
            table: RwLock::default(),
            changed: watch::Sender::new(0),
        }
    }
}

impl PeerMap {
    fn change(&self, change: impl FnOnce(&mut Table)) {
        change(&mut self.table.write());
        self.changed.send_modify(|n| *n += 1);
    }

    /// A node's address, `host:port`. Sessions to another address of the same node end and are opened again.
    pub fn set_node(&self, node: NodeId, address: impl Into<String>) {
        let address = address.into();
        if self.address(node).as_ref() != Some(&address) {
            self.change(|t| {
                t.nodes.insert(node, address);
            });
        }
    }

    /// Forgets a node: the session to it ends.
    pub fn remove_node(&self, node: NodeId) {
        self.change(|t| {
            t.nodes.remove(&node);
        });
    }

    /// Which node hosts a replica.
    pub fn set_replica(&self, replica: ReplicaId, node: NodeId) {
        if self.node_of(replica) != Some(node) {
            self.change(|t| {
                t.replicas.insert(replica, node);
            });
        }
    }

    /// Replaces everything.
    pub fn replace(
        &self,
        nodes: impl IntoIterator<Item = (NodeId, String)>,
        replicas: impl IntoIterator<Item = (ReplicaId, NodeId)>,
    ) {
        let table = Table {
            replicas: replicas.into_iter().collect(),
            nodes: nodes.into_iter().collect(),
        };
        self.change(|t| *t = table);
    }

    /// The node that hosts a replica.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.table.read().replicas.get(&replica).copied()
    }

    /// Where a node listens.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.table.read().nodes.get(&node).cloned()
    }

    /// Wakes on every change.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
