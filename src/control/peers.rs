//! Where the nodes and their replicas are: from the view; before there is one, from what the node remembers. What it
//! remembers is written whenever it changes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::view::View;
use crate::model::{NodeId, ReplicaId};
use crate::raft::transport::{KnownPeer, PeerMap, PeerMemory};
use crate::storage::{ClusterHints, PeerHint, SeenStore};
use crate::wire::internal as pb;

/// After a failed write.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps the hints of a data directory.
pub struct HintsKeeper {
    dir: PathBuf,
    hints: Mutex<ClusterHints>,
    changed: Notify,
}

impl HintsKeeper {
    /// `hints` as they are in the directory.
    pub fn new(dir: PathBuf, hints: ClusterHints) -> Arc<Self> {
        Arc::new(Self {
            dir,
            hints: Mutex::new(hints),
            changed: Notify::new(),
        })
    }

    /// Tells the transport where everyone was.
    pub fn tell(&self, map: &PeerMap) {
        for peer in &self.hints.lock().peers {
            if !peer.address.is_empty() {
                map.set_node(peer.node, peer.address.clone());
            }
            if let Some(replica) = peer.meta_replica {
                map.set_replica(replica, peer.node);
            }
        }
    }

    /// Runs until cancelled: passes on what the view says, and writes down what may be needed before there is one.
    pub async fn run(self: Arc<Self>, view: Arc<View>, map: Arc<PeerMap>, token: CancellationToken) {
        let mut changes = view.watch();
        let mut told = None;
        let mut written = self.hints.lock().clone();
        loop {
            changes.borrow_and_update();
            if view.cluster().is_some() {
                let now = places(&view);
                if told.as_ref() != Some(&now) {
                    self.learn(&view);
                    let (nodes, replicas) = now.clone();
                    map.replace(nodes, replicas);
                    told = Some(now);
                }
            }
            let hints = self.hints.lock().clone();
            let mut failed = false;
            if hints != written {
                let (dir, copy) = (self.dir.clone(), hints.clone());
                match tokio::task::spawn_blocking(move || copy.store(&dir)).await {
                    Ok(Ok(())) => written = hints,
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "what is known of the other nodes cannot be written; it is tried again");
                        failed = true;
                    }
                    // The runtime is going down.
                    Err(_) => return,
                }
            }
            tokio::select! {
                () = token.cancelled() => return,
                _ = changes.changed() => {}
                () = self.changed.notified() => {}
                () = tokio::time::sleep(AGAIN), if failed => {}
            }
        }
    }

    fn learn(&self, view: &View) {
        let mut hints = self.hints.lock();
        for node in view.nodes() {
            let id = NodeId::new(node.node_id);
            if node.state() == pb::NodeState::Removed {
                hints.peers.retain(|peer| peer.node != id);
                continue;
            }
            let peer = entry(&mut hints.peers, id);
            if !node.peer_address.is_empty() {
                peer.address = node.peer_address;
            }
            if node.meta_replica_id != 0 {
                peer.meta_replica = Some(ReplicaId::new(node.meta_replica_id));
            }
        }
    }
}

fn entry(peers: &mut Vec<PeerHint>, node: NodeId) -> &mut PeerHint {
    let at = match peers.binary_search_by_key(&node, |peer| peer.node) {
        Ok(at) => at,
        Err(at) => {
            let new = PeerHint {
                node,
                address: String::new(),
                meta_replica: None,
                seen: None,
            };
            peers.insert(at, new);
            at
        }
    };
    &mut peers[at]
}

type Places = (BTreeMap<NodeId, String>, BTreeMap<ReplicaId, NodeId>);

/// Everything the transport must know.
fn places(view: &View) -> Places {
    let (mut nodes, mut replicas) = Places::default();
    for node in view.nodes() {
        if node.state() == pb::NodeState::Removed {
            continue;
        }
        let id = NodeId::new(node.node_id);
        if !node.peer_address.is_empty() {
            nodes.insert(id, node.peer_address);
        }
        if node.meta_replica_id != 0 {
            replicas.insert(ReplicaId::new(node.meta_replica_id), id);
        }
    }
    for group in view.groups() {
        replicas.extend(group.replicas);
    }
    (nodes, replicas)
}

impl PeerMemory for HintsKeeper {
    fn load(&self) -> Vec<KnownPeer> {
        let hints = self.hints.lock();
        let seen = hints.peers.iter().filter_map(|peer| {
            let seen = peer.seen?;
            Some(KnownPeer {
                node: peer.node,
                store_id: seen.store_id,
                incarnation: seen.incarnation,
                start: seen.start,
            })
        });
        seen.collect()
    }

    fn remember(&self, peer: KnownPeer) {
        let seen = Some(SeenStore {
            store_id: peer.store_id,
            incarnation: peer.incarnation,
            start: peer.start,
        });
        entry(&mut self.hints.lock().peers, peer.node).seen = seen;
        self.changed.notify_one();
    }
}
