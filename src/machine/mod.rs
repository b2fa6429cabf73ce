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

pub use group::{GroupMachine, GroupOutcome, is_adoptable, waits_for};
pub use meta::{MetaMachine, MetaOutcome, MetaRefusal};
pub use outcome::{
    Duplicate, DuplicateItem, ExpireOutcome, ItemOutcome, PurgeOutcome, Refusal, StoredItem, UpdateOutcome,
};
pub use shard::{AdoptFault, ShardMachine};

use port::ViewError;

/// The newest feature level that this binary knows. Level 1 is the first.
pub const FEATURE_LEVEL: u32 = 1;

/// Feature levels, each with the cluster version from which on it may be written: then every node knows it.
const LEVELS: &[(u32, u32)] = &[(1, 1)];

/// The newest feature level that may be written while this cluster version is in force.
pub fn feature_level_of(cluster_version: u32) -> u32 {
    let allowed = LEVELS.iter().filter(|(version, _)| *version <= cluster_version.max(1));
    allowed.map(|(_, level)| *level).max().unwrap_or(1).min(FEATURE_LEVEL)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_has_its_version() {
        assert_eq!(feature_level_of(0), 1, "before there were versions");
        for pair in LEVELS.windows(2) {
            assert!(pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1, "{pair:?}");
        }
        let newest = LEVELS.last().map(|(_, level)| *level);
        assert_eq!(
            newest,
            Some(FEATURE_LEVEL),
            "a level that no version lets through is never written"
        );
        assert_eq!(feature_level_of(u32::MAX), FEATURE_LEVEL);
    }
}
