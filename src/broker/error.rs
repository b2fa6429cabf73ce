//! What can go wrong in the data plane, one enum per operation. Each error knows its reason word and its retry class;
//! `api/status.rs` makes a gRPC status of it.

use std::time::Duration;

use crate::base::RetryClass;
use crate::machine::Refusal;
use crate::model::{GroupId, Sequence};
use crate::raft::{BarrierError, ProposeError};

/// How many of a group's nodes are reached from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    pub live: usize,
    pub needed: usize,
    pub replicas: usize,
}

impl Reach {
    pub fn is_quorum(self) -> bool {
        self.live >= self.needed
    }
}

/// Why a stream cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    #[error("there is no stream {name:?} in namespace {namespace:?}; create it with: mainstem stream create {name}")]
    NotFound { namespace: String, name: String },
    #[error(
        "no stream in namespace {namespace:?} takes the subject {subject:?}; `mainstem stream ls` shows what each takes"
    )]
    NoStreamForSubject { namespace: String, subject: String },
    #[error("stream {name:?} is being created; try again")]
    Creating { name: String },
    #[error("stream {name:?} has {shards} shard(s), numbered from 0; there is no shard {shard}")]
    NoSuchShard { name: String, shard: u32, shards: u32 },
    #[error("shard {shard} of stream {name:?} is not led by this node now{}", leader.as_ref().map(|l| format!("; ask {l}")).unwrap_or_default())]
    NotLeader {
        name: String,
        shard: u32,
        leader: Option<String>,
    },
}

impl StreamError {
    pub fn reason(&self) -> &'static str {
        match self {
            StreamError::NotFound { .. } => "STREAM_NOT_FOUND",
            StreamError::NoStreamForSubject { .. } => "NO_STREAM_FOR_SUBJECT",
            StreamError::Creating { .. } => "STREAM_CREATING",
            StreamError::NoSuchShard { .. } => "NO_SUCH_SHARD",
            StreamError::NotLeader { .. } => "NOT_LEADER",
        }
    }

    pub fn retry_class(&self) -> RetryClass {
        match self {
            StreamError::NotFound { .. } | StreamError::NoStreamForSubject { .. } | StreamError::NoSuchShard { .. } => {
                RetryClass::CannotWork
            }
            StreamError::Creating { .. } | StreamError::NotLeader { .. } => RetryClass::DidNotHappen,
        }
    }
}

/// Why a publish was not acknowledged.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the batch cannot be read: {0}")]
    BadBatch(String),
    #[error("{0}")]
    BadMessage(String),
    #[error("subject {subject:?} does not belong to stream {stream:?}, which takes {subjects}")]
    SubjectNotInStream {
        subject: String,
        stream: String,
        subjects: String,
    },
    #[error("a message of {size} bytes is larger than the {max} bytes that are allowed")]
    MessageTooLarge { size: u64, max: u64 },
    #[error(
        "record {position} ({subject:?}) belongs to shard {expected}, the batch is for shard {shard}; split by the stream's shard map of epoch {epoch}"
    )]
    WrongShard {
        position: u32,
        subject: String,
        expected: u32,
        shard: u32,
        epoch: u64,
    },
    #[error("the batch was split by shard map epoch {got}; the stream's is {current}")]
    MapChanged { got: u64, current: u64 },
    #[error("{0}")]
    BadExpectation(String),
    #[error("the server has as much in hand as it takes ({what}); nothing was stored, slow down and retry")]
    Overloaded { what: &'static str },
    #[error(
        "the disk is nearly full ({free} bytes left of the {needed} that must stay free); nothing was stored, free some space or set tighter limits"
    )]
    DiskLow { free: u64, needed: u64 },
    /// The shard's machine refused it.
    #[error("{0}")]
    Refused(Refusal),
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// The group has no leader, or none that answers, and the wait for one is over.
    #[error("{group} has had no leader that answers for {}.{} s; nothing was stored, try again", waited.as_secs(), waited.subsec_millis() / 100)]
    NoLeader { group: GroupId, waited: Duration },
    /// Too few of the group's nodes are reached for it to have one.
    #[error(
        "{group} has no quorum: {} of its {} nodes are reached, {} are needed; nothing was stored, try again",
        reach.live,
        reach.replicas,
        reach.needed
    )]
    NoQuorum { group: GroupId, reach: Reach },
    /// The leader put it into its log, and too few replicas answer to say more.
    #[error(
        "{group} has no quorum: {} of its {} nodes are reached, {} are needed; the message was sent before that was known, and is stored if enough of them return with it",
        reach.live,
        reach.replicas,
        reach.needed
    )]
    Unconfirmed { group: GroupId, reach: Reach },
    /// Its producer has to send an earlier one again first, so that no ack overtakes another.
    #[error(
        "how an earlier batch of this producer ended is not known; nothing of this one was stored: send that one again, then this one"
    )]
    EarlierUnknown,
    /// The shard was moved to another group in this moment.
    #[error("the shard has just been moved to {to}; nothing was stored, try again")]
    Moved { to: GroupId },
    #[error("the node is stopping; nothing was stored")]
    Stopping,
    #[error("the shard was removed while the publish was under way; nothing was stored")]
    Removed,
    #[error("data of this node is damaged: {0}")]
    Damaged(String),
}

impl PublishError {
    pub fn reason(&self) -> &'static str {
        match self {
            PublishError::Stream(e) => e.reason(),
            PublishError::BadBatch(_) => "BAD_BATCH",
            PublishError::BadMessage(_) => "BAD_MESSAGE",
            PublishError::SubjectNotInStream { .. } => "SUBJECT_NOT_IN_STREAM",
            PublishError::MessageTooLarge { .. } => "MESSAGE_TOO_LARGE",
            PublishError::WrongShard { .. } => "WRONG_SHARD",
            PublishError::MapChanged { .. } => "MAP_CHANGED",
            PublishError::BadExpectation(_) => "BAD_EXPECTATION",
            PublishError::Overloaded { .. } => "OVERLOADED",
            PublishError::DiskLow { .. } => "DISK_LOW",
            PublishError::Refused(refusal) => refusal.reason(),
            PublishError::Propose(ProposeError::NotLeader { .. }) => "NOT_LEADER",
            PublishError::Propose(ProposeError::Stopped { .. }) => "GROUP_STOPPED",
            PublishError::Propose(ProposeError::Unknown { .. }) | PublishError::Unconfirmed { .. } => "OUTCOME_UNKNOWN",
            PublishError::NoLeader { .. } | PublishError::Moved { .. } => "NOT_LEADER",
            PublishError::NoQuorum { .. } => "NO_QUORUM",
            PublishError::EarlierUnknown => "EARLIER_UNKNOWN",
            PublishError::Stopping => "STOPPING",
            PublishError::Removed => "STREAM_REMOVED",
            PublishError::Damaged(_) => "DAMAGED",
        }
    }

    pub fn retry_class(&self) -> RetryClass {
        match self {
            PublishError::Stream(e) => e.retry_class(),
            PublishError::Propose(e) => e.retry_class(),
            PublishError::Refused(refusal) => refusal.retry(),
            PublishError::BadBatch(_)
            | PublishError::BadMessage(_)
            | PublishError::SubjectNotInStream { .. }
            | PublishError::MessageTooLarge { .. }
            | PublishError::BadExpectation(_)
            | PublishError::Removed
            | PublishError::Damaged(_)
            | PublishError::WrongShard { .. } => RetryClass::CannotWork,
            PublishError::MapChanged { .. }
            | PublishError::Overloaded { .. }
            | PublishError::DiskLow { .. }
            | PublishError::NoLeader { .. }
            | PublishError::NoQuorum { .. }
            | PublishError::EarlierUnknown
            | PublishError::Moved { .. }
            | PublishError::Stopping => RetryClass::DidNotHappen,
            PublishError::Unconfirmed { .. } => RetryClass::MayHaveHappened,
        }
    }

    /// The value found where another was expected.
    pub fn actual(&self) -> Option<u64> {
        match self {
            PublishError::Refused(Refusal::OutOfOrder { expected }) => Some(expected.saturating_sub(1)),
            PublishError::Refused(Refusal::Fenced { epoch }) => Some(*epoch),
            PublishError::Refused(refusal) => refusal.actual().map(Sequence::get),
            PublishError::MapChanged { current, .. } => Some(*current),
            PublishError::Stream(_)
            | PublishError::BadBatch(_)
            | PublishError::BadMessage(_)
            | PublishError::SubjectNotInStream { .. }
            | PublishError::MessageTooLarge { .. }
            | PublishError::WrongShard { .. }
            | PublishError::BadExpectation(_)
            | PublishError::Overloaded { .. }
            | PublishError::DiskLow { .. }
            | PublishError::Propose(_)
            | PublishError::NoLeader { .. }
            | PublishError::NoQuorum { .. }
            | PublishError::Unconfirmed { .. }
            | PublishError::EarlierUnknown
            | PublishError::Moved { .. }
            | PublishError::Stopping
            | PublishError::Removed
            | PublishError::Damaged(_) => None,
        }
    }
}

/// Why a read has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{0}")]
    BadRequest(String),
    #[error("the cursor cannot be used: {0}; begin anew without it")]
    BadCursor(String),
    #[error("sequence {sequence} is not there: the shard retains {floor} up to {}", tail.get() - 1)]
    NotRetained {
        sequence: Sequence,
        floor: Sequence,
        tail: Sequence,
    },
    #[error("sequence {0} was deleted")]
    Deleted(Sequence),
    #[error("no message found {0}")]
    NoMessage(String),
    #[error("{group} cannot confirm that it leads: {source}")]
    Barrier {
        group: GroupId,
        #[source]
        source: BarrierError,
    },
    /// No node that could serve the read answers.
    #[error("the shard cannot be read from this node now: {0}; try again")]
    Unreachable(String),
    #[error("the stream was removed while it was being read")]
    Removed,
    #[error("the node is stopping")]
    Stopping,
    #[error("the server serves as many readers as it takes ({max}); try again later")]
    Overloaded { max: usize },
    #[error(
        "the server has as much read as it takes and its clients have not yet fetched; nothing was read, try again"
    )]
    NoMemory,
    #[error(
        "the client has taken nothing for {seconds} s while others waited for the memory that its messages hold; begin again after the last message that came"
    )]
    NotReading { seconds: u64 },
    #[error("stored data is damaged and is not served: {0}")]
    Damaged(String),
    #[error("no node that has it can read it, and it is not served: {0}")]
    DamagedEverywhere(String),
    #[error("the storage failed: {0}")]
    Storage(String),
}

impl ReadError {
    pub fn reason(&self) -> &'static str {
        match self {
            ReadError::Stream(e) => e.reason(),
            ReadError::BadRequest(_) => "BAD_REQUEST",
            ReadError::BadCursor(_) => "BAD_CURSOR",
            ReadError::NotRetained { .. } => "NOT_RETAINED",
            ReadError::Deleted(_) => "DELETED",
            ReadError::NoMessage(_) => "NO_MESSAGE",
            ReadError::Barrier { .. } => "NO_QUORUM",
            ReadError::Unreachable(_) => "NOT_LEADER",
            ReadError::Removed => "STREAM_REMOVED",
            ReadError::Stopping => "STOPPING",
            ReadError::Overloaded { .. } | ReadError::NoMemory | ReadError::NotReading { .. } => "OVERLOADED",
            ReadError::Damaged(_) | ReadError::DamagedEverywhere(_) => "DAMAGED",
            ReadError::Storage(_) => "STORAGE_FAILED",
        }
    }

    pub fn retry_class(&self) -> RetryClass {
        match self {
            ReadError::Stream(e) => e.retry_class(),
            ReadError::Barrier { .. }
            | ReadError::Unreachable(_)
            | ReadError::Stopping
            | ReadError::Overloaded { .. }
            | ReadError::NoMemory
            | ReadError::NotReading { .. }
            | ReadError::Storage(_) => RetryClass::DidNotHappen,
            ReadError::BadRequest(_)
            | ReadError::BadCursor(_)
            | ReadError::NotRetained { .. }
            | ReadError::Deleted(_)
            | ReadError::NoMessage(_)
            | ReadError::Removed
            | ReadError::Damaged(_)
            | ReadError::DamagedEverywhere(_) => RetryClass::CannotWork,
        }
    }
}
