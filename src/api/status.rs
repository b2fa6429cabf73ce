//! The only place where an error becomes a gRPC status.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::base::RetryClass;
use crate::broker::error::{PublishError, ReadError, StreamError};
use crate::control::AdminError;
use crate::control::operations::OrderError;
use crate::machine;
use crate::wire::v1;

/// Domain of every `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "mainstem.dev";

/// An error, ready to become a status or a frame.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub code: Code,
    pub reason: &'static str,
    pub retry: RetryClass,
    pub message: String,
    pub leader: Option<String>,
    pub actual: Option<u64>,
}

impl Refusal {
    /// A request that cannot work.
    pub fn bad_request(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code: Code::InvalidArgument,
            reason,
            retry: RetryClass::CannotWork,
            message: message.into(),
            leader: None,
            actual: None,
        }
    }

    /// The node is on its way down.
    pub fn stopping() -> Self {
        Self {
            code: Code::Unavailable,
            reason: "STOPPING",
            retry: RetryClass::DidNotHappen,
            message: "the node is stopping; nothing was done, connect again".into(),
            leader: None,
            actual: None,
        }
    }

    /// As a gRPC status with `google.rpc.ErrorInfo`.
    pub fn into_status(self) -> Status {
        let mut metadata = HashMap::from([("retry".to_owned(), self.retry.as_str().to_owned())]);
        if let Some(leader) = self.leader {
            metadata.insert("leader".to_owned(), leader);
        }
        if let Some(actual) = self.actual {
            metadata.insert("actual".to_owned(), actual.to_string());
        }
        let details = ErrorDetails::with_error_info(self.reason, DOMAIN, metadata);
        Status::with_error_details(self.code, self.message, details)
    }

    /// As a frame of a publish session.
    pub fn into_frame(self, shard: u32, producer_sequence: u64) -> v1::BatchError {
        v1::BatchError {
            shard,
            producer_sequence,
            code: self.code as i32,
            reason: self.reason.to_owned(),
            message: self.message,
            retry: match self.retry {
                RetryClass::DidNotHappen => v1::RetryClass::DidNotHappen,
                RetryClass::MayHaveHappened => v1::RetryClass::MayHaveHappened,
                RetryClass::CannotWork => v1::RetryClass::CannotWork,
            }
            .into(),
            actual_sequence: self.actual,
            leader: self.leader,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        refusal.into_status()
    }
}

fn stream_code(e: &StreamError) -> (Code, Option<String>) {
    match e {
        StreamError::NotFound { .. } | StreamError::NoStreamForSubject { .. } => (Code::NotFound, None),
        StreamError::NoSuchShard { .. } => (Code::InvalidArgument, None),
        StreamError::Creating { .. } => (Code::Unavailable, None),
        StreamError::NotLeader { leader, .. } => (Code::Unavailable, leader.clone()),
    }
}

fn meta_code(refusal: &machine::MetaRefusal) -> Code {
    use machine::MetaRefusal as R;
    match refusal {
        R::Differs { .. } | R::SubjectsOverlap { .. } | R::NameTaken { .. } => Code::AlreadyExists,
        R::NotFound { .. } | R::NodeNotFound { .. } | R::GroupNotFound { .. } => Code::NotFound,
        R::RevisionMismatch { .. } | R::StaleEpoch { .. } => Code::Aborted,
        R::BadSpec { .. }
        | R::BadNode { .. }
        | R::BadSettings { .. }
        | R::BadChange { .. }
        | R::Fixed { .. }
        | R::RequestIdReused { .. } => Code::InvalidArgument,
        R::TooMany { .. } | R::RequestsFull => Code::ResourceExhausted,
        R::NotInitialised => Code::Unavailable,
        R::OtherCluster { .. }
        | R::NodeNameTaken { .. }
        | R::StaleIncarnation { .. }
        | R::OtherStore { .. }
        | R::StoreTaken { .. }
        | R::NodeRemoved { .. }
        | R::NodeTooOld { .. }
        | R::NodeHoldsReplicas { .. }
        | R::WouldBreakQuorum { .. }
        | R::VersionDown { .. }
        | R::VersionNotKnown { .. }
        | R::InFlight { .. }
        | R::NotEnoughNodes { .. }
        | R::GraceEnded { .. }
        | R::GraceNotEnded { .. }
        | R::WrongState { .. } => Code::FailedPrecondition,
    }
}

fn refusal_code(refusal: machine::Refusal) -> Code {
    use machine::Refusal as R;
    match refusal {
        R::BadBatch
        | R::MessageTooLarge { .. }
        | R::LargerThanStream
        | R::TooManyIds { .. }
        | R::SubjectExpectationUnsupported
        | R::ProducerSequenceZero => Code::InvalidArgument,
        R::LastSequence { .. }
        | R::SubjectLastSequence { .. }
        | R::Fenced { .. }
        | R::OutOfOrder { .. }
        | R::UnknownProducer
        | R::AnswerForgotten { .. } => Code::FailedPrecondition,
        R::TooManyProducers { .. } | R::StreamFull | R::IdsFull { .. } => Code::ResourceExhausted,
    }
}

impl From<StreamError> for Refusal {
    fn from(e: StreamError) -> Self {
        let (code, leader) = stream_code(&e);
        Self {
            code,
            reason: e.reason(),
            retry: e.retry_class(),
            message: e.to_string(),
            leader,
            actual: None,
        }
    }
}

impl From<PublishError> for Refusal {
    fn from(e: PublishError) -> Self {
        let (code, leader) = match &e {
            PublishError::Stream(s) => stream_code(s),
            PublishError::BadBatch(_)
            | PublishError::BadMessage(_)
            | PublishError::SubjectNotInStream { .. }
            | PublishError::MessageTooLarge { .. }
            | PublishError::BadExpectation(_)
            | PublishError::WrongShard { .. } => (Code::InvalidArgument, None),
            PublishError::MapChanged { .. } => (Code::FailedPrecondition, None),
            PublishError::Overloaded { .. } | PublishError::DiskLow { .. } => (Code::ResourceExhausted, None),
            PublishError::Refused(refusal) => (refusal_code(*refusal), None),
            PublishError::Propose(p) => match p {
                crate::raft::ProposeError::NotLeader { .. } | crate::raft::ProposeError::Stopped { .. } => {
                    (Code::Unavailable, None)
                }
                crate::raft::ProposeError::Unknown { .. } => (Code::Unknown, None),
            },
            PublishError::NoLeader { .. }
            | PublishError::NoQuorum { .. }
            | PublishError::EarlierUnknown
            | PublishError::Moved { .. } => (Code::Unavailable, None),
            PublishError::Unconfirmed { .. } => (Code::Unknown, None),
            PublishError::Stopping => (Code::Unavailable, None),
            PublishError::Removed => (Code::NotFound, None),
            PublishError::Damaged(_) => (Code::DataLoss, None),
        };
        Self {
            code,
            reason: e.reason(),
            retry: e.retry_class(),
            message: e.to_string(),
            leader,
            actual: e.actual(),
        }
    }
}

impl From<ReadError> for Refusal {
    fn from(e: ReadError) -> Self {
        let (code, leader) = match &e {
            ReadError::Stream(s) => stream_code(s),
            ReadError::BadRequest(_) | ReadError::BadCursor(_) => (Code::InvalidArgument, None),
            ReadError::NotRetained { .. } => (Code::OutOfRange, None),
            ReadError::Deleted(_) | ReadError::NoMessage(_) | ReadError::Removed => (Code::NotFound, None),
            ReadError::Barrier { .. } | ReadError::Unreachable(_) | ReadError::Stopping => (Code::Unavailable, None),
            ReadError::Overloaded { .. } | ReadError::NoMemory | ReadError::NotReading { .. } => {
                (Code::ResourceExhausted, None)
            }
            ReadError::Damaged(_) | ReadError::DamagedEverywhere(_) => (Code::DataLoss, None),
            ReadError::Storage(_) => (Code::Internal, None),
        };
        Self {
            code,
            reason: e.reason(),
            retry: e.retry_class(),
            message: e.to_string(),
            leader,
            actual: None,
        }
    }
}

impl From<AdminError> for Refusal {
    fn from(e: AdminError) -> Self {
        Self {
            code: match &e {
                AdminError::Invalid(_) => Code::InvalidArgument,
                AdminError::NotFound { .. } => Code::NotFound,
                AdminError::Refused(refusal) => meta_code(refusal),
                AdminError::Propose(crate::raft::ProposeError::Unknown { .. }) => Code::Unknown,
                AdminError::Peer {
                    retry: RetryClass::MayHaveHappened,
                    ..
                } => Code::Unknown,
                AdminError::Propose(_)
                | AdminError::NotReady(_)
                | AdminError::NoQuorum(_)
                | AdminError::Peer { .. }
                | AdminError::Stopping => Code::Unavailable,
                AdminError::Timeout(_) => Code::DeadlineExceeded,
            },
            reason: e.reason(),
            retry: e.retry_class(),
            message: e.to_string(),
            leader: None,
            actual: e.actual(),
        }
    }
}

impl From<OrderError> for Refusal {
    fn from(e: OrderError) -> Self {
        let code = match &e {
            OrderError::Admin(admin) => return admin.clone().into(),
            OrderError::Invalid(_) | OrderError::NoSuchShard { .. } => Code::InvalidArgument,
            OrderError::NodeNotFound { .. } | OrderError::GroupNotFound { .. } => Code::NotFound,
            OrderError::NoReplicaThere { .. }
            | OrderError::ReplicaThere { .. }
            | OrderError::Shared { .. }
            | OrderError::HandOver { .. } => Code::FailedPrecondition,
            OrderError::Leaderless { .. } | OrderError::NodeSilent { .. } => Code::Unavailable,
        };
        Self {
            code,
            reason: e.reason(),
            retry: e.retry_class(),
            message: e.to_string(),
            leader: None,
            actual: None,
        }
    }
}
