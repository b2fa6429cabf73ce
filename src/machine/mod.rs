//! Pure state machines. No IO, async, clock or randomness: what they do depends only on the entry and on the group's
//! own applied state, which they see through [`port`].
//!
//! After any error of an apply the machine must not be used again: its memory may be ahead of what was written. The
//! group stops and loads it anew.

pub mod group;
pub mod meta;
pub mod outcome;
pub mod placement;
pub mod port;
pub mod shard;

pub use group::{GroupMachine, GroupOutcome};
pub use meta::{MetaMachine, MetaOutcome, MetaRefusal};
pub use outcome::{
    Duplicate, DuplicateItem, ExpireOutcome, ItemOutcome, PurgeOutcome, Refusal, StoredItem, UpdateOutcome,
};
pub use shard::{AdoptFault, ShardMachine};

use port::ViewError;

/// The newest feature level that this binary knows. Level 1 is the first.
pub const FEATURE_LEVEL: u32 = 1;

/// Why applying stops. None of these is an answer to a client: the replica must not go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApplyError {
    /// Applied state could not be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The entry is from a newer version.
    #[error(transparent)]
    UnknownFeature(#[from] UnknownFeature),
    /// A shard's copy is not as its seal said.
    #[error(transparent)]
    Adopt(#[from] AdoptFault),
}

/// An entry that this binary does not know: it stops rather than guess.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownFeature {
    /// Written at a level above [`FEATURE_LEVEL`] (or at none).
    #[error("the entry has feature level {found}, this binary knows up to {FEATURE_LEVEL}: install a newer version")]
    Level { found: u32 },
    /// Of a kind that decodes to nothing.
    #[error("the entry holds a command that this binary does not know: install a newer version")]
    Command,
    /// A meta command in a group that is not the meta group, or the other way round.
    #[error("the entry holds a command of another kind of group")]
    WrongGroup,
}

/// Why persisted records do not make a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot load {what}: {why}")]
pub struct LoadError {
    /// Which record.
    pub what: String,
    /// What is wrong with it.
    pub why: String,
}

impl LoadError {
    pub(crate) fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self {
            what: what.into(),
            why: why.to_string(),
        }
    }
}
