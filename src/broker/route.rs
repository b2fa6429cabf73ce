//! Where a group is led and replicated: from the replica here if there is one, else from what other nodes say.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use super::error::{Reach, ReadError};
use crate::base::RetryClass;
use crate::control::view::View;
use crate::machine::placement::voters_of;
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::raft::transport::{PeerMethod, Peers};
use crate::raft::{Group, Groups};
use crate::wire::internal as pb;

/// A replica that has known no leader for so long may itself be the one that is cut off: others are asked.
const LONELY: Duration = Duration::from_secs(1);
/// A leader that no quorum has answered for so long has none.
const SILENT: Duration = Duration::from_secs(1);
/// So long, if too few nodes are connected for one.
const SILENT_AND_APART: Duration = Duration::from_millis(300);
/// How long a read looks for a node that serves it.
pub(super) const READ_PATIENCE: Duration = Duration::from_secs(6);
/// How long one node may take of that before the next is asked.
const ONE_NODE: Duration = Duration::from_secs(3);
/// Between two attempts of a read.
pub(super) const READ_PAUSE: Duration = Duration::from_millis(50);

/// Where the leader of a group is.
pub(super) enum Route {
    /// The replica here leads, or is the only one there can be.
    Here(Group),
    /// This node leads, or knows who does, or is worth asking.
    There(NodeId),
    /// Nobody knows now.
    Nowhere,
}

/// Who may answer a call about a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    Leader,
    AnyReplica,
}

/// What a node answered.
pub(super) enum Told<T> {
    Answer(T),
    Elsewhere(pb::RelayElsewhere),
    /// Not an answer of this protocol.
    Nonsense,
}

/// Finds leaders and replicas.
pub(super) struct Router {
    pub groups: Arc<Groups>,
    pub view: Arc<View>,
    pub peers: Option<Peers>,
    /// Leaders of groups without a replica here, as last heard. As many as there are groups.
    hints: Mutex<HashMap<GroupId, NodeId>>,
    turn: AtomicUsize,
}

impl Router {
    pub fn new(groups: Arc<Groups>, view: Arc<View>, peers: Option<Peers>) -> Self {
        Self {
            groups,
            view,
            peers,
            hints: Mutex::default(),
            turn: AtomicUsize::new(0),
        }
    }

    /// The node of a replica.
    pub fn node_of(&self, group: GroupId, replica: ReplicaId) -> Option<NodeId> {
        let place = self.view.group(group)?;
        let found = place.replicas.iter().find(|(r, _)| *r == replica);
        found
            .map(|(_, node)| *node)
            .or_else(|| self.peers.as_ref()?.map().node_of(replica))
    }

    /// The nodes of a group's replicas, without this one.
    pub fn others(&self, group: GroupId) -> Vec<NodeId> {
        // Without peers every replica is here.
        let Some(own) = self.peers.as_ref().map(Peers::node) else {
            return Vec::new();
        };
        let place = self.view.group(group);
        let nodes = place.iter().flat_map(|p| &p.replicas).map(|(_, node)| *node);
        nodes.filter(|node| *node != own).collect()
    }

    /// Where a proposal goes.
    pub fn route(&self, group: GroupId) -> Route {
        let local = self.groups.get(group);
        let Some(peers) = &self.peers else {
            return local.map_or(Route::Nowhere, Route::Here);
        };
        if let Some(local) = local {
            if local.leads() {
                return Route::Here(local);
            }
            let known = *local.watch_leader().borrow();
            match known.leader.and_then(|leader| self.node_of(group, leader)) {
                Some(node) if node != peers.node() => return Route::There(node),
                Some(_) => return Route::Nowhere,
                None if known.since.elapsed().is_ok_and(|lonely| lonely < LONELY) => return Route::Nowhere,
                None => {}
            }
        }
        if let Some(node) = self.hints.lock().get(&group) {
            return Route::There(*node);
        }
        let others = self.others(group);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        match others.get(turn % others.len().max(1)) {
            Some(node) => Route::There(*node),
            None => Route::Nowhere,
        }
    }

    /// The node that leads a group: as the replica here knows, or else as other nodes said last.
    pub fn leader_of(&self, group: GroupId) -> Option<NodeId> {
        let local = self.groups.get(group);
        let leader = local.as_ref().and_then(|g| g.watch_leader().borrow().leader);
        let node = leader.and_then(|leader| self.node_of(group, leader));
        node.or_else(|| self.hints.lock().get(&group).copied())
    }

    /// The leader as this node would tell another one.
    pub fn elsewhere(&self, group: GroupId) -> pb::RelayElsewhere {
        let local = self.groups.get(group);
        let leader = local.as_ref().and_then(|g| g.watch_leader().borrow().leader);
        let node = leader.and_then(|leader| self.node_of(group, leader));
        pb::RelayElsewhere {
            leader_node: node.map(NodeId::get),
            replica: local.is_some(),
        }
    }

    /// Takes note of what `node` said of a group that it does not lead.
    pub fn told(&self, group: GroupId, node: NodeId, elsewhere: &pb::RelayElsewhere) {
        let leader = elsewhere.leader_node.map(NodeId::new).filter(|leader| *leader != node);
        match leader {
            Some(leader) => drop(self.hints.lock().insert(group, leader)),
            None => self.lost(group, node),
        }
    }

    /// `node` answered as the leader.
    pub fn leads(&self, group: GroupId, node: NodeId) {
        self.hints.lock().insert(group, node);
    }

    /// `node` does not answer: it is not asked first any more.
    pub fn lost(&self, group: GroupId, node: NodeId) {
        let mut hints = self.hints.lock();
        if hints.get(&group) == Some(&node) {
            hints.remove(&group);
        }
    }

    /// How much of a group is reached. Nodes that nothing was ever asked of are not known to be gone.
    pub fn reach(&self, group: GroupId) -> Option<Reach> {
        let peers = self.peers.as_ref()?;
        let record = self.view.group_record(group)?;
        let links = peers.links();
        let down = |node: u64| links.iter().any(|l| l.node.get() == node && !l.up);
        let voters = || voters_of(&record);
        let replicas = voters().count();
        Some(Reach {
            live: voters().filter(|replica| !down(replica.node_id)).count(),
            needed: replicas / 2 + 1,
            replicas,
        })
    }

    /// Whether the connection to a node is broken.
    pub fn is_apart(&self, node: NodeId) -> bool {
        let links = self.peers.as_ref().map(Peers::links).unwrap_or_default();
        links.iter().any(|link| link.node == node && !link.up)
    }

    /// Whether the replica here has not heard of a leader for a while.
    pub fn is_silent(&self, group: GroupId) -> bool {
        let local = self.groups.get(group).filter(|local| !local.leads());
        local.is_some_and(|local| {
            let silent = SILENT.max(local.heartbeat() * 4);
            local.freshness().heard.is_some_and(|ago| ago >= silent)
        })
    }

    /// The numbers of a group that has no quorum, as far as can be told here: by who answers the leader if that is here,
    /// else by who is connected. While members change the catalog is not what decides: a leader that is answered has a
    /// quorum.
    pub fn without_quorum(&self, group: GroupId) -> Option<Reach> {
        self.peers.as_ref()?;
        let Some(local) = self.groups.get(group).filter(Group::leads) else {
            return self.reach(group).filter(|reach| !reach.is_quorum());
        };
        // Asked for each entry: what is common is told by the replica alone.
        let silence = local.quorum_silence().filter(|silence| *silence >= SILENT_AND_APART)?;
        let reach = self.reach(group)?;
        // Between two heartbeats there is silence.
        let silent = SILENT.max(local.heartbeat() * 4);
        if silence >= silent {
            let live = reach.live.min(local.answering(silent));
            return Some(Reach { live, ..reach });
        }
        (!reach.is_quorum()).then_some(reach)
    }

    /// Whom to ask, best first. This node is the last of any: who asks it through here could not read its replica, or has
    /// found it damaged.
    fn candidates(&self, group: GroupId, ask: Ask) -> Vec<NodeId> {
        let own = self.peers.as_ref().map(Peers::node);
        let first = match self.route(group) {
            Route::Here(_) => own,
            Route::There(node) => Some(node),
            Route::Nowhere => None,
        };
        let mut all: Vec<NodeId> = first.into_iter().collect();
        if ask == Ask::AnyReplica {
            all.extend(self.others(group).into_iter().filter(|node| Some(*node) != first));
            all.retain(|node| Some(*node) != own);
            all.extend(own.filter(|_| self.groups.get(group).is_some()));
        }
        all
    }

    /// Asks until a node answers, within `patience`. Only for calls that change nothing: they may be entered twice.
    pub async fn ask<T>(
        &self,
        group: GroupId,
        ask: Ask,
        method: PeerMethod,
        payload: Bytes,
        patience: Duration,
        parse: impl Fn(Bytes) -> Told<T>,
    ) -> Result<T, ReadError> {
        let Some(peers) = &self.peers else {
            return Err(ReadError::Unreachable("this node has no peers".into()));
        };
        let begun = Instant::now();
        let mut last = format!("nobody knows who leads {group}");
        loop {
            let candidates = self.candidates(group, ask);
            let mut damaged = 0;
            for node in &candidates {
                let node = *node;
                let left = patience.saturating_sub(begun.elapsed());
                let left = if method == PeerMethod::Positions {
                    left
                } else {
                    left.min(ONE_NODE)
                };
                match peers.call(node, method, payload.clone(), left).await.map(&parse) {
                    Ok(Told::Answer(answer)) => {
                        if ask == Ask::Leader {
                            self.leads(group, node);
                        }
                        return Ok(answer);
                    }
                    Ok(Told::Elsewhere(elsewhere)) => {
                        let what = match ask {
                            Ask::Leader => "lead",
                            Ask::AnyReplica => "hold",
                        };
                        last = format!("node {node} does not {what} {group}");
                        self.told(group, node, &elsewhere);
                    }
                    Ok(Told::Nonsense) => last = format!("node {node} answers in a way this version does not know"),
                    Err(e) => {
                        damaged += usize::from(e.refused && e.retry == RetryClass::CannotWork);
                        last = e.message;
                        self.lost(group, node);
                    }
                }
            }
            if damaged > 0 && damaged == candidates.len() {
                return Err(ReadError::DamagedEverywhere(last));
            }
            if begun.elapsed() + READ_PAUSE >= patience {
                return Err(ReadError::Unreachable(last));
            }
            tokio::time::sleep(READ_PAUSE).await;
        }
    }
}
