//! What a change of the catalog answers.

use std::sync::Arc;

use crate::base::RetryClass;
use crate::model::Revision;
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
    /// More replicas than nodes.
    #[error("{wanted} replicas need {wanted} nodes, the cluster has {nodes}")]
    NotEnoughNodes { wanted: u32, nodes: u32 },
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
            | MetaRefusal::RequestsFull => RetryClass::DidNotHappen,
            MetaRefusal::OtherCluster { .. }
            | MetaRefusal::NodeNameTaken { .. }
            | MetaRefusal::StaleIncarnation { .. }
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
