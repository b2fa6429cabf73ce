//! Why an order was not carried out.

use crate::base::RetryClass;
use crate::control::AdminError;
use crate::model::GroupId;
use crate::raft::ChangeError;
use crate::raft::transport::CallError;

/// Why an order was not carried out.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OrderError {
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("there is no node {asked:?}; there are: {known}")]
    NodeNotFound { asked: String, known: String },
    #[error("there is no group {group}; `mainstem cluster report` shows those there are")]
    GroupNotFound { group: GroupId },
    #[error("stream {stream:?} has {shards} shards, numbered from 0; there is no shard {index}")]
    NoSuchShard { stream: String, shards: usize, index: u32 },
    #[error("{group} has no replica on {node}; `mainstem shard ls` shows where its replicas are")]
    NoReplicaThere { group: GroupId, node: String },
    #[error("{group} has a replica on {node} already")]
    ReplicaThere { group: GroupId, node: String },
    #[error(
        "{group} holds {shards} shards, of several streams: all of them would move; allow that, or change the stream's own placement"
    )]
    Shared { group: GroupId, shards: u32 },
    #[error("{group} has no leader: {have} of {voters} voters answer, {need} are needed")]
    Leaderless {
        group: GroupId,
        have: u32,
        voters: u32,
        need: u32,
    },
    #[error("{message}")]
    HandOver { message: String, retry: RetryClass },
    #[error("the leader's node does not answer: {message}")]
    NodeSilent { message: String, retry: RetryClass },
}

impl OrderError {
    /// The stable word of `google.rpc.ErrorInfo`.
    pub fn reason(&self) -> &'static str {
        match self {
            OrderError::Invalid(_) => "BAD_REQUEST",
            OrderError::Admin(e) => e.reason(),
            OrderError::NodeNotFound { .. } => "NODE_NOT_FOUND",
            OrderError::GroupNotFound { .. } => "GROUP_NOT_FOUND",
            OrderError::NoSuchShard { .. } => "NO_SUCH_SHARD",
            OrderError::NoReplicaThere { .. } => "NO_REPLICA_THERE",
            OrderError::ReplicaThere { .. } => "REPLICA_THERE",
            OrderError::Shared { .. } => "GROUP_SHARED",
            OrderError::Leaderless { .. } => "LEADERLESS",
            OrderError::HandOver { .. } => "HAND_OVER_FAILED",
            OrderError::NodeSilent { .. } => "NODE_SILENT",
        }
    }

    /// Whether it may have happened.
    pub fn retry_class(&self) -> RetryClass {
        match self {
            OrderError::Admin(e) => e.retry_class(),
            OrderError::Invalid(_)
            | OrderError::NodeNotFound { .. }
            | OrderError::GroupNotFound { .. }
            | OrderError::NoSuchShard { .. }
            | OrderError::NoReplicaThere { .. }
            | OrderError::ReplicaThere { .. }
            | OrderError::Shared { .. } => RetryClass::CannotWork,
            OrderError::Leaderless { .. } => RetryClass::DidNotHappen,
            OrderError::HandOver { retry, .. } | OrderError::NodeSilent { retry, .. } => *retry,
        }
    }
}

impl From<ChangeError> for OrderError {
    fn from(e: ChangeError) -> Self {
        OrderError::HandOver {
            retry: e.retry_class(),
            message: e.to_string(),
        }
    }
}

impl From<CallError> for OrderError {
    fn from(e: CallError) -> Self {
        if e.refused {
            OrderError::HandOver {
                message: e.message,
                retry: e.retry,
            }
        } else {
            OrderError::NodeSilent {
                message: e.message,
                retry: e.retry,
            }
        }
    }
}
