//! What a change of the catalog answers.

use std::sync::Arc;

use crate::base::RetryClass;
use crate::model::{GroupId, Revision};
use crate::wire::internal::v1 as pb;

/// The answer to a meta command.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaOutcome {
    /// The cluster is there; it was before if `existed`.
    ClusterInitialised {
        cluster: Arc<pb::ClusterRecord>,
        existed: bool,
    },
    /// The node is known as told; nothing changed if not `changed`.
    NodeRegistered { node: Arc<pb::NodeRecord>, changed: bool },
    /// A new stream, with its shards placed; its state is "creating".
    StreamCreated(Arc<pb::StreamRecord>),
    /// A stream with this name and exactly this spec was there.
    StreamExisted(Arc<pb::StreamRecord>),
    /// It takes messages from now on.
    StreamActivated(Arc<pb::StreamRecord>),
    /// Its settings are as told (the revision is higher if that was a change).
    StreamUpdated(Arc<pb::StreamRecord>),
    /// Removed, until its grace period ends.
    StreamRemoved(Arc<pb::StreamRecord>),
    /// Back from removal.
    StreamUndeleted(Arc<pb::StreamRecord>),
    /// Removed without a way back: its shards may be dropped.
    StreamDoomed(Arc<pb::StreamRecord>),
    /// The catalog no longer knows it.
    StreamForgotten(Arc<pb::StreamRecord>),
    /// The node is as asked: drained, not drained, removed, with another replica of the meta group.
    NodeChanged(Arc<pb::NodeRecord>),
    /// Version, settings or meta voters are as asked.
    ClusterChanged(Arc<pb::ClusterRecord>),
    /// A group is as told, or its change is planned, further or over.
    GroupChanged(Arc<pb::GroupRecord>),
    /// A shard of the stream is on its way to another group.
    ShardMoving(Arc<pb::StreamRecord>),
    /// It is there; or, if its move was given up, it stays there.
    ShardMoved {
        stream: Arc<pb::StreamRecord>,
        from: GroupId,
        to: GroupId,
    },
    /// Nothing was changed.
    Refused(MetaRefusal),
}

/// Why nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaRefusal {
    /// There is no cluster yet.
    #[error("the cluster is not initialised")]
    NotInitialised,
    /// It is another cluster.
    #[error("this is cluster {cluster_id} already")]
    OtherCluster { cluster_id: String },
    /// A node of that name is known under another id.
    #[error("node {node_id} is called {name:?} already")]
    NodeNameTaken { name: String, node_id: u64 },
    /// A newer start of the same node is known: this one is an old disk, or a copy.
    #[error("node {node_id} was started with incarnation {known} before: this one is older")]
    StaleIncarnation { node_id: u64, known: u64 },
    /// The node id belongs to another store: this disk was emptied, or is a copy.
    #[error(
        "node n{node_id} is known with store {known}, this is store {found}: an emptied or copied disk; give it a data \
         directory of its own, and remove the old node"
    )]
    OtherStore { node_id: u64, known: String, found: String },
    /// The store has joined as another node: this is a copy of a disk.
    #[error("store {store_id} has joined as node n{node_id}: this disk is a copy of that one")]
    StoreTaken { store_id: String, node_id: u64 },
    /// It was removed, and node ids are not given again.
    #[error(
        "node {name:?} (n{node_id}) was removed from the cluster; it can only come back with an empty data directory"
    )]
    NodeRemoved { name: String, node_id: u64 },
    /// The cluster uses features that it does not know.
    #[error("node {name:?} knows cluster version {knows}, the cluster is at {now}: install a newer version")]
    NodeTooOld { name: String, knows: u32, now: u32 },
    /// No such node.
    #[error("there is no node n{node_id}")]
    NodeNotFound { node_id: u64 },
    /// What it tells of itself breaks a rule.
    #[error("the node cannot join: {why}")]
    BadNode { why: String },
    /// It must be empty first.
    #[error("node {name:?} still holds {groups} replicas; drain it first, or remove it by force")]
    NodeHoldsReplicas { name: String, groups: u32 },
    /// Too few would be left.
    #[error("{what} would have {live} live voters of the {needed} it needs")]
    WouldBreakQuorum { what: String, live: u32, needed: u32 },
    /// The cluster version never goes down.
    #[error("cluster version {asked} is below the {now} in force; it never goes down")]
    VersionDown { asked: u32, now: u32 },
    /// Some nodes are too old for it.
    #[error("cluster version {asked} is not known to {nodes}; install a newer version there first")]
    VersionNotKnown { asked: u32, nodes: String },
    /// A setting out of its range.
    #[error("{why}")]
    BadSettings { why: String },
    /// No such group.
    #[error("there is no group {group_id}")]
    GroupNotFound { group_id: u64 },
    /// It was planned from, or tells of, another state than there is.
    #[error("{what} is at epoch {actual}")]
    StaleEpoch { what: String, actual: u64 },
    /// Something else must be over first.
    #[error("{what}")]
    InFlight { what: String },
    /// A change that makes no sense.
    #[error("{why}")]
    BadChange { why: String },
    /// As many as there may be.
    #[error("there are {max} {what} already, which is the most there may be")]
    TooMany { what: &'static str, max: u64 },
    /// The stream is there, but not so.
    #[error("stream {name:?} exists and differs in {difference}")]
    Differs { name: String, difference: String },
    /// A subject would belong to two streams.
    #[error("subject filter {ours:?} overlaps {theirs:?} of stream {stream:?}")]
    SubjectsOverlap {
        ours: String,
        theirs: String,
        stream: String,
    },
    /// More replicas than nodes that could hold them.
    #[error(
        "{wanted} replicas need {wanted} nodes: the cluster has {nodes}, {live} of them live, {usable} of those active \
         and allowed by the placement; add nodes, or ask for fewer replicas"
    )]
    NotEnoughNodes {
        wanted: u32,
        nodes: u32,
        live: u32,
        usable: u32,
    },
    /// No such stream.
    #[error("there is no stream {name:?}")]
    NotFound { name: String },
    /// It has changed since it was looked at.
    #[error("stream {name:?} has revision {actual}")]
    RevisionMismatch { name: String, actual: Revision },
    /// A field that is fixed when a stream is created.
    #[error("stream {name:?} cannot change {fields}: fixed when a stream is created")]
    Fixed { name: String, fields: String },
    /// Another stream has the name of the one that should come back.
    #[error("another stream is called {name:?} now")]
    NameTaken { name: String },
    /// Its grace period has ended.
    #[error("stream {name:?} cannot come back: its grace period has ended")]
    GraceEnded { name: String },
    /// Its grace period has not ended.
    #[error("stream {name:?} can still come back until {removed_until_us}")]
    GraceNotEnded { name: String, removed_until_us: u64 },
    /// It is (or is not) removed.
    #[error("stream {name:?} is {state}")]
    WrongState { name: String, state: &'static str },
    /// The proposer should not have let it through.
    #[error("the spec is not valid: {why}")]
    BadSpec { why: String },
    /// The id was given to another request before.
    #[error("request id {request_id:?} was used for another request")]
    RequestIdReused { request_id: String },
    /// Too many remembered answers.
    #[error("the answers to recent request ids fill their memory; try again later")]
    RequestsFull,
}

impl MetaRefusal {
    /// Whether a retry can help.
    pub fn retry(&self) -> RetryClass {
        match self {
            MetaRefusal::NotInitialised
            | MetaRefusal::NotEnoughNodes { .. }
            | MetaRefusal::TooMany { .. }
            | MetaRefusal::GraceNotEnded { .. }
            | MetaRefusal::NodeHoldsReplicas { .. }
            | MetaRefusal::WouldBreakQuorum { .. }
            | MetaRefusal::VersionNotKnown { .. }
            | MetaRefusal::StaleEpoch { .. }
            | MetaRefusal::InFlight { .. }
            | MetaRefusal::RequestsFull => RetryClass::DidNotHappen,
            MetaRefusal::OtherCluster { .. }
            | MetaRefusal::NodeNameTaken { .. }
            | MetaRefusal::StaleIncarnation { .. }
            | MetaRefusal::OtherStore { .. }
            | MetaRefusal::StoreTaken { .. }
            | MetaRefusal::NodeRemoved { .. }
            | MetaRefusal::NodeTooOld { .. }
            | MetaRefusal::NodeNotFound { .. }
            | MetaRefusal::BadNode { .. }
            | MetaRefusal::VersionDown { .. }
            | MetaRefusal::BadSettings { .. }
            | MetaRefusal::GroupNotFound { .. }
            | MetaRefusal::BadChange { .. }
            | MetaRefusal::Differs { .. }
            | MetaRefusal::SubjectsOverlap { .. }
            | MetaRefusal::NotFound { .. }
            | MetaRefusal::RevisionMismatch { .. }
            | MetaRefusal::Fixed { .. }
            | MetaRefusal::NameTaken { .. }
            | MetaRefusal::GraceEnded { .. }
            | MetaRefusal::WrongState { .. }
            | MetaRefusal::BadSpec { .. }
            | MetaRefusal::RequestIdReused { .. } => RetryClass::CannotWork,
        }
    }

    /// The stable word of `google.rpc.ErrorInfo`.
    pub fn reason(&self) -> &'static str {
        match self {
            MetaRefusal::NotInitialised => "NOT_INITIALISED",
            MetaRefusal::OtherCluster { .. } => "OTHER_CLUSTER",
            MetaRefusal::NodeNameTaken { .. } => "NODE_NAME_TAKEN",
            MetaRefusal::StaleIncarnation { .. } => "STALE_INCARNATION",
            MetaRefusal::OtherStore { .. } => "OTHER_STORE",
            MetaRefusal::StoreTaken { .. } => "STORE_TAKEN",
            MetaRefusal::NodeRemoved { .. } => "NODE_REMOVED",
            MetaRefusal::NodeTooOld { .. } => "NODE_TOO_OLD",
            MetaRefusal::NodeNotFound { .. } => "NODE_NOT_FOUND",
            MetaRefusal::BadNode { .. } => "BAD_NODE",
            MetaRefusal::NodeHoldsReplicas { .. } => "NODE_HOLDS_REPLICAS",
            MetaRefusal::WouldBreakQuorum { .. } => "WOULD_BREAK_QUORUM",
            MetaRefusal::VersionDown { .. } => "VERSION_DOWN",
            MetaRefusal::VersionNotKnown { .. } => "VERSION_NOT_KNOWN",
            MetaRefusal::BadSettings { .. } => "BAD_SETTINGS",
            MetaRefusal::GroupNotFound { .. } => "GROUP_NOT_FOUND",
            MetaRefusal::StaleEpoch { .. } => "STALE_EPOCH",
            MetaRefusal::InFlight { .. } => "IN_FLIGHT",
            MetaRefusal::BadChange { .. } => "BAD_CHANGE",
            MetaRefusal::TooMany { .. } => "LIMIT_REACHED",
            MetaRefusal::Differs { .. } => "STREAM_DIFFERS",
            MetaRefusal::SubjectsOverlap { .. } => "SUBJECTS_OVERLAP",
            MetaRefusal::NotEnoughNodes { .. } => "NOT_ENOUGH_NODES",
            MetaRefusal::NotFound { .. } => "STREAM_NOT_FOUND",
            MetaRefusal::RevisionMismatch { .. } => "REVISION_MISMATCH",
            MetaRefusal::Fixed { .. } => "FIELD_FIXED",
            MetaRefusal::NameTaken { .. } => "NAME_TAKEN",
            MetaRefusal::GraceEnded { .. } => "GRACE_ENDED",
            MetaRefusal::GraceNotEnded { .. } => "GRACE_NOT_ENDED",
            MetaRefusal::WrongState { .. } => "WRONG_STATE",
            MetaRefusal::BadSpec { .. } => "BAD_SPEC",
            MetaRefusal::RequestIdReused { .. } => "REQUEST_ID_REUSED",
            MetaRefusal::RequestsFull => "REQUESTS_FULL",
        }
    }
}
