//! Which nodes can be reached, as the meta group's leader sees it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::control::Control;
use crate::control::placement::LIVE_FOR_US;
use crate::model::NodeId;
use crate::wire::internal as pb;

const LIVE_FOR: Duration = Duration::from_micros(LIVE_FOR_US);

/// When each node was heard of.
#[derive(Debug, Default)]
pub struct Liveness {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    seen: HashMap<NodeId, Instant>,
    leads_since: Option<Instant>,
}

impl Liveness {
    pub(super) fn seen(&self, node: NodeId) {
        self.inner.lock().seen.insert(node, Instant::now());
    }

    pub(super) fn lead(&self, since: Instant) {
        self.inner.lock().leads_since = Some(since);
    }

    pub(super) fn follow(&self) {
        *self.inner.lock() = Inner::default();
    }
}

impl Control {
    /// Nodes on which nothing may be placed now, as far as this node, which leads the meta group, can tell. One whose
    /// connection is broken is gone at once; one that is silent, after a while; a leader that is new goes by connections.
    pub(in crate::control) fn unreachable_nodes(&self) -> Vec<u64> {
        let Some(peers) = &self.peers else { return Vec::new() };
        let links = peers.links();
        let up = |node: NodeId| links.iter().any(|link| link.node == node && link.up);
        let inner = self.liveness.inner.lock();
        let new = inner.leads_since.is_none_or(|since| since.elapsed() < LIVE_FOR);
        let heard = |node: NodeId| inner.seen.get(&node).is_some_and(|at| at.elapsed() <= LIVE_FOR);
        self.view
            .nodes()
            .iter()
            .filter(|node| node.state() != pb::NodeState::Removed)
            .map(|node| NodeId::new(node.node_id))
            .filter(|node| *node != self.facts.node && !(up(*node) && (new || heard(*node))))
            .map(NodeId::get)
            .collect()
    }
}
