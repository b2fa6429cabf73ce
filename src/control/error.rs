//! Why an admin call did not do what it was asked.

use crate::base::RetryClass;
use crate::machine::MetaRefusal;
use crate::raft::ProposeError;

#[derive(Debug, Clone, thiserror::Error)]
pub enum AdminError {
    #[error("{0}")]
    Invalid(String),
    #[error("there is no stream {name:?} in namespace {namespace:?}; `mainstem stream ls` shows those there are")]
    NotFound { namespace: String, name: String },
    #[error("{0}")]
    Refused(MetaRefusal),
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error("the cluster's metadata is not ready on this node: {0}")]
    NotReady(String),
    /// Nothing was done: too few voters of the meta group answer.
    #[error(
        "the cluster's metadata has no quorum: {0}; what is published and read does not depend on it, try again later"
    )]
    NoQuorum(String),
    /// Another node, asked on behalf of this one, said no or nothing.
    #[error("{message}")]
    Peer { message: String, retry: RetryClass },
    #[error("{0}")]
    Timeout(String),
    #[error("the node is stopping")]
    Stopping,
}

impl AdminError {
    pub fn reason(&self) -> &'static str {
        match self {
            AdminError::Invalid(_) => "BAD_SPEC",
            AdminError::NotFound { .. } => "STREAM_NOT_FOUND",
            AdminError::Refused(refusal) => refusal.reason(),
            AdminError::Propose(ProposeError::NotLeader { .. }) => "NOT_LEADER",
            AdminError::Propose(ProposeError::Stopped { .. }) => "GROUP_STOPPED",
            AdminError::Propose(ProposeError::Unknown { .. }) => "OUTCOME_UNKNOWN",
            AdminError::NoQuorum(_) => "NO_QUORUM",
            AdminError::Peer {
                retry: RetryClass::MayHaveHappened,
                ..
            } => "OUTCOME_UNKNOWN",
            AdminError::NotReady(_) | AdminError::Peer { .. } => "NOT_READY",
            AdminError::Timeout(_) => "NOT_SETTLED",
            AdminError::Stopping => "STOPPING",
        }
    }

    pub fn retry_class(&self) -> RetryClass {
        match self {
            AdminError::Invalid(_) | AdminError::NotFound { .. } => RetryClass::CannotWork,
            AdminError::Refused(refusal) => refusal.retry(),
            AdminError::Propose(e) => e.retry_class(),
            AdminError::NotReady(_) | AdminError::NoQuorum(_) | AdminError::Stopping => RetryClass::DidNotHappen,
            AdminError::Peer { retry, .. } => *retry,
            AdminError::Timeout(_) => RetryClass::MayHaveHappened,
        }
    }

    /// The value found where one was expected.
    pub fn actual(&self) -> Option<u64> {
        match self {
            AdminError::Refused(MetaRefusal::RevisionMismatch { actual, .. }) => Some(actual.get()),
            AdminError::Refused(_)
            | AdminError::Invalid(_)
            | AdminError::NotFound { .. }
            | AdminError::Propose(_)
            | AdminError::NotReady(_)
            | AdminError::NoQuorum(_)
            | AdminError::Peer { .. }
            | AdminError::Timeout(_)
            | AdminError::Stopping => None,
        }
    }
}
