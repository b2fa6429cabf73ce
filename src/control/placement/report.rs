//! What nodes and leaders reported lately, as the meta leader has gathered it. Nothing here is replicated.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{GroupId, LogIndex, NodeId, ReplicaId, TimeUs};

/// A node that was heard of within this time can be reached, in microseconds.
pub const LIVE_FOR_US: u64 = 3_000_000;

/// What was reported. Times are by the gatherer's own (monotonic) clock, the one that `plan` is given.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reports {
    /// When the gathering began: a node that was never heard of may have been there until then.
    pub since: TimeUs,
    pub nodes: BTreeMap<NodeId, NodeReport>,
    /// By the groups' leaders. A group without one is leaderless, or its leader cannot be reached.
    pub groups: BTreeMap<GroupId, GroupReport>,
    pub meta: MetaReport,
}

/// By a node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeReport {
    pub last_seen: TimeUs,
    /// What its replicas hold.
    pub bytes: u64,
    /// It is being stopped, and shall lead nothing new.
    pub stopping: bool,
    /// Groups that it was ordered of late to hand over.
    pub handed_over: BTreeSet<GroupId>,
    /// Replicas on it whose logs are damaged: they never run again.
    pub damaged: BTreeSet<ReplicaId>,
    /// Up to where the logs of its replicas are purged.
    pub purged: BTreeMap<GroupId, LogIndex>,
}

/// By a group's leader.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupReport {
    pub leader: ReplicaId,
    /// Replicas that have (nearly) everything, the leader among them.
    pub current: BTreeSet<ReplicaId>,
}

/// By the meta group's leader.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MetaReport {
    pub leader: Option<ReplicaId>,
    /// Voters by the committed membership.
    pub voters: BTreeSet<ReplicaId>,
    /// Replicas that have (nearly) everything.
    pub current: BTreeSet<ReplicaId>,
}

impl Reports {
    /// When a node was last heard of, so far as can be known.
    pub fn heard_of(&self, node: NodeId) -> TimeUs {
        let seen = self.nodes.get(&node).map_or(TimeUs::new(0), |report| report.last_seen);
        seen.max(self.since)
    }

    /// Whether a node can be reached.
    pub fn is_live(&self, node: NodeId, now: TimeUs) -> bool {
        let report = self.nodes.get(&node);
        report.is_some_and(|report| now.get().saturating_sub(report.last_seen.get()) <= LIVE_FOR_US)
    }

    /// Whether a replica is known to be damaged.
    pub fn is_damaged(&self, node: NodeId, replica: ReplicaId) -> bool {
        let report = self.nodes.get(&node);
        report.is_some_and(|report| report.damaged.contains(&replica))
    }
}
