//! Which peers were seen. A node that comes back with less than it had (an emptied, copied or older disk) would break
//! promises it made: it is refused.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::handshake::Refusal;
use crate::model::NodeId;

/// What is remembered of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownPeer {
    pub node: NodeId,
    pub store_id: u128,
    /// The highest seen.
    pub incarnation: u64,
    /// The random number of that start; 0: not known.
    pub start: u64,
}

/// Keeps what is remembered beyond a restart. Called from the transport's tasks: must be quick and must not block.
pub trait PeerMemory: Send + Sync + 'static {
    /// Everything kept. Called once, at start.
    fn load(&self) -> Vec<KnownPeer>;
    /// A peer was seen for the first time, or with a higher incarnation.
    fn remember(&self, peer: KnownPeer);
}

/// Remembers as long as the process runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMemory;

impl PeerMemory for NoMemory {
    fn load(&self) -> Vec<KnownPeer> {
        Vec::new()
    }

    fn remember(&self, _peer: KnownPeer) {}
}

/// The last refusals that were logged, so that each is logged once.
const LOGGED_MAX: usize = 1_024;

pub(super) struct PeerBook {
    known: Mutex<HashMap<NodeId, KnownPeer>>,
    memory: Arc<dyn PeerMemory>,
    logged: Mutex<HashMap<(u64, &'static str), String>>,
}

impl PeerBook {
    pub fn new(memory: Arc<dyn PeerMemory>) -> Self {
        let known = memory.load().into_iter().map(|p| (p.node, p)).collect();
        Self {
            known: Mutex::new(known),
            memory,
            logged: Mutex::default(),
        }
    }

    /// Takes note of a peer that has proven the token, or says why it is not let in. `starts` are the starts that it
    /// knows of, this one last: the one seen here must be among them, or be too long ago for that.
    pub fn admit(&self, peer: KnownPeer, starts: &[u64]) -> Result<(), Refusal> {
        let new = {
            let mut known = self.known.lock();
            match known.get_mut(&peer.node) {
                Some(seen) if seen.store_id != peer.store_id => {
                    return Err(Refusal::OtherStore {
                        node: peer.node,
                        known: seen.store_id,
                        given: peer.store_id,
                    });
                }
                Some(seen) if seen.incarnation > peer.incarnation => {
                    return Err(Refusal::OlderIncarnation {
                        node: peer.node,
                        known: seen.incarnation,
                        given: peer.incarnation,
                    });
                }
                Some(seen)
                    if seen.start != 0
                        && !starts.contains(&seen.start)
                        && peer.incarnation - seen.incarnation < starts.len() as u64 =>
                {
                    return Err(Refusal::OtherPast {
                        node: peer.node,
                        known: seen.incarnation,
                    });
                }
                Some(seen) => {
                    let higher = seen.incarnation < peer.incarnation || seen.start != peer.start;
                    *seen = peer;
                    higher
                }
                None => {
                    known.insert(peer.node, peer);
                    true
                }
            }
        };
        if new {
            self.memory.remember(peer);
        }
        Ok(())
    }

    /// Whether a peer that was admitted still is: no later start of it was seen since.
    pub fn is_current(&self, peer: KnownPeer) -> bool {
        self.known.lock().get(&peer.node) == Some(&peer)
    }

    /// Forgets a node: it has left the cluster for good.
    pub fn forget(&self, node: NodeId) {
        self.known.lock().remove(&node);
    }

    /// Everything remembered.
    pub fn all(&self) -> Vec<KnownPeer> {
        self.known.lock().values().copied().collect()
    }

    /// Whether this text is new for this peer: repeated refusals are logged once.
    pub fn is_news(&self, node: NodeId, side: &'static str, text: &str) -> bool {
        let mut logged = self.logged.lock();
        if logged.len() >= LOGGED_MAX {
            logged.clear();
        }
        logged.insert((node.get(), side), text.to_string()).as_deref() != Some(text)
    }

    /// The peer was let in: the next refusal is news again.
    pub fn no_refusal(&self, node: NodeId, side: &'static str) {
        self.logged.lock().remove(&(node.get(), side));
    }
}
