//! What an apply answers. The leader turns these into acks and errors; followers drop them.

use crate::base::RetryClass;
use crate::model::{Sequence, Term, TimeUs};
use crate::wire::internal::v1 as pb;

/// The answer to one item of a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ItemOutcome {
    /// At least one record was stored.
    Stored(StoredItem),
    /// Every record was a duplicate by message id: nothing was stored.
    AllDuplicates(DuplicateItem),
    /// Nothing was stored, and why.
    Refused(Refusal),
}

/// Where an item's records are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredItem {
    /// Sequence of the first record stored, inclusive. Records that are not duplicates follow densely.
    pub first: Sequence,
    /// Sequence of the last one, inclusive.
    pub last: Sequence,
    /// Next sequence of the shard, after this item (for a whole duplicate: now).
    pub tail: Sequence,
    /// When it was appended.
    pub append_time: TimeUs,
    /// Of the entry that stored it.
    pub term: Term,
    /// Records that were not stored, ascending by position. Of a whole duplicate that is no longer retained: empty.
    pub duplicates: Vec<Duplicate>,
    /// The producer had sent this number before: this is its first answer, and nothing was stored now.
    pub whole_duplicate: bool,
}

/// An item that stored nothing because each of its message ids was known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuplicateItem {
    /// Next sequence of the shard.
    pub tail: Sequence,
    /// When it was found out.
    pub append_time: TimeUs,
    /// Of the entry that found it out.
    pub term: Term,
    /// Every record, ascending by position.
    pub duplicates: Vec<Duplicate>,
    /// The producer had sent this number before.
    pub whole_duplicate: bool,
}

/// A record that was not stored because its message id was known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Duplicate {
    /// In its batch, from 0.
    pub position: u32,
    /// Where the first message with this id was stored; `None` if it has been trimmed since, or is no longer known.
    pub original: Option<Sequence>,
}

/// Why nothing of an item was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The leader validates batches, so this is a batch that it should not have let through.
    #[error("the batch is damaged or malformed")]
    BadBatch,
    /// A message is over the stream's limit (or over `max_bytes` all by itself).
    #[error("a message is larger than the stream allows ({max} bytes)")]
    MessageTooLarge { max: u64 },
    /// The stream refuses what does not fit, and this would not fit if it were empty.
    #[error("the batch is larger than the whole stream may be")]
    LargerThanStream,
    /// More new message ids in one batch than the shard may remember at all.
    #[error("the batch carries more message ids than the stream remembers ({max})")]
    TooManyIds { max: u32 },
    /// The stream is partitioned by key.
    #[error("the last sequence of a subject cannot be expected on a stream partitioned by key")]
    SubjectExpectationUnsupported,
    /// The shard's last sequence is another.
    #[error("the shard's last sequence is {actual}")]
    LastSequence { actual: Sequence },
    /// The subject's last sequence is another (0: no message of the subject is retained).
    #[error("the subject's last sequence is {actual}")]
    SubjectLastSequence { actual: Sequence },
    /// Producer sequences start at 1.
    #[error("producer sequences start at 1")]
    ProducerSequenceZero,
    /// A session with a higher epoch has taken over.
    #[error("the producer has epoch {epoch} now: a newer session has taken over")]
    Fenced { epoch: u64 },
    /// A gap in the producer's numbers.
    #[error("the producer's next sequence is {expected}")]
    OutOfOrder { expected: u64 },
    /// The shard does not (or no longer) know the producer, and this is not its first batch. Whether an earlier attempt
    /// of this batch was applied before the producer was forgotten is not known either.
    #[error("the shard does not know this producer (any more): open a new session")]
    UnknownProducer,
    /// The number was used, too long ago for its answer to be remembered.
    #[error(
        "the producer's sequence was used up before, and its answer is no longer remembered (the oldest is {oldest})"
    )]
    AnswerForgotten { oldest: u64 },
    /// The shard remembers as many producers as it may.
    #[error("the shard remembers {max} producers, which is the most it may")]
    TooManyProducers { max: u32 },
    /// The stream refuses new messages when full, and it is.
    #[error("the stream is full")]
    StreamFull,
    /// The shard remembers as many message ids as it may.
    #[error("the shard remembers {max} message ids, which is the most it may in its window")]
    IdsFull { max: u32 },
}

impl Refusal {
    /// Whether a retry can help.
    pub fn retry(self) -> RetryClass {
        match self {
            Refusal::BadBatch
            | Refusal::MessageTooLarge { .. }
            | Refusal::LargerThanStream
            | Refusal::TooManyIds { .. }
            | Refusal::SubjectExpectationUnsupported
            | Refusal::LastSequence { .. }
            | Refusal::SubjectLastSequence { .. }
            | Refusal::ProducerSequenceZero
            | Refusal::Fenced { .. } => RetryClass::CannotWork,
            Refusal::UnknownProducer | Refusal::AnswerForgotten { .. } => RetryClass::MayHaveHappened,
            Refusal::OutOfOrder { .. }
            | Refusal::TooManyProducers { .. }
            | Refusal::StreamFull
            | Refusal::IdsFull { .. } => RetryClass::DidNotHappen,
        }
    }

    /// The stable word of `google.rpc.ErrorInfo`.
    pub fn reason(self) -> &'static str {
        match self {
            Refusal::BadBatch => "BAD_BATCH",
            Refusal::MessageTooLarge { .. } => "MESSAGE_TOO_LARGE",
            Refusal::LargerThanStream => "BATCH_LARGER_THAN_STREAM",
            Refusal::TooManyIds { .. } => "TOO_MANY_MESSAGE_IDS",
            Refusal::SubjectExpectationUnsupported => "SUBJECT_EXPECTATION_UNSUPPORTED",
            Refusal::LastSequence { .. } | Refusal::SubjectLastSequence { .. } => "EXPECTATION_FAILED",
            Refusal::ProducerSequenceZero => "BAD_PRODUCER_SEQUENCE",
            Refusal::Fenced { .. } => "PRODUCER_FENCED",
            Refusal::OutOfOrder { .. } => "OUT_OF_ORDER",
            Refusal::UnknownProducer => "UNKNOWN_PRODUCER",
            Refusal::AnswerForgotten { .. } => "ANSWER_FORGOTTEN",
            Refusal::TooManyProducers { .. } => "TOO_MANY_PRODUCERS",
            Refusal::StreamFull => "STREAM_FULL",
            Refusal::IdsFull { .. } => "MESSAGE_IDS_FULL",
        }
    }

    /// The actual value of a failed expectation.
    pub fn actual(self) -> Option<Sequence> {
        match self {
            Refusal::LastSequence { actual } | Refusal::SubjectLastSequence { actual } => Some(actual),
            Refusal::BadBatch
            | Refusal::MessageTooLarge { .. }
            | Refusal::LargerThanStream
            | Refusal::TooManyIds { .. }
            | Refusal::SubjectExpectationUnsupported
            | Refusal::ProducerSequenceZero
            | Refusal::Fenced { .. }
            | Refusal::OutOfOrder { .. }
            | Refusal::UnknownProducer
            | Refusal::AnswerForgotten { .. }
            | Refusal::TooManyProducers { .. }
            | Refusal::StreamFull
            | Refusal::IdsFull { .. } => None,
        }
    }

    /// Code and figure under which a producer's record remembers it; `None` for those that use up no number. Disk
    /// format: codes are never given to another refusal.
    pub(super) fn to_stored(self) -> Option<(u64, u64)> {
        match self {
            Refusal::BadBatch => Some((1, 0)),
            Refusal::MessageTooLarge { max } => Some((2, max)),
            Refusal::LargerThanStream => Some((3, 0)),
            Refusal::TooManyIds { max } => Some((4, u64::from(max))),
            Refusal::SubjectExpectationUnsupported => Some((5, 0)),
            Refusal::LastSequence { actual } => Some((6, actual.get())),
            Refusal::SubjectLastSequence { actual } => Some((7, actual.get())),
            Refusal::ProducerSequenceZero
            | Refusal::Fenced { .. }
            | Refusal::OutOfOrder { .. }
            | Refusal::UnknownProducer
            | Refusal::AnswerForgotten { .. }
            | Refusal::TooManyProducers { .. }
            | Refusal::StreamFull
            | Refusal::IdsFull { .. } => None,
        }
    }

    /// The inverse.
    pub(super) fn from_stored(code: u64, figure: u64) -> Option<Self> {
        let actual = Sequence::new(figure);
        match code {
            1 => Some(Refusal::BadBatch),
            2 => Some(Refusal::MessageTooLarge { max: figure }),
            3 => Some(Refusal::LargerThanStream),
            4 => Some(Refusal::TooManyIds {
                max: u32::try_from(figure).ok()?,
            }),
            5 => Some(Refusal::SubjectExpectationUnsupported),
            6 => Some(Refusal::LastSequence { actual }),
            7 => Some(Refusal::SubjectLastSequence { actual }),
            _ => None,
        }
    }
}

/// What an expiry did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpireOutcome {
    /// Messages removed.
    pub messages: u64,
    /// Producers forgotten.
    pub producers: u64,
    /// There is more to remove than one entry may: propose the next at once.
    pub more: bool,
}

/// What a purge did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PurgeOutcome {
    /// Messages removed by this entry.
    pub messages: u64,
    /// There is more to remove than one entry may: propose this to go on. What was published meanwhile is not touched.
    pub next: Option<pb::Purge>,
}

/// What an update of a shard's settings did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// They are in force.
    Applied,
    /// The same or a newer revision was applied before.
    Stale,
}
