//! What can go wrong in storage: while opening, while working, and for good (poison).

use std::path::PathBuf;

use crate::base::RetryClass;
use crate::model::{GroupId, LogIndex, NodeId};

/// One of the two databases of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// Raft entries and votes.
    Log,
    /// Applied state.
    State,
}

impl Area {
    /// The name of its folder.
    pub fn as_str(self) -> &'static str {
        match self {
            Area::Log => "log",
            Area::State => "state",
        }
    }
}

impl std::fmt::Display for Area {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why the store stopped for good. Nothing is retried; only a restart, which checks everything again, clears it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("storage stopped: {what} failed: {detail}; nothing further is written, restart the node")]
pub struct Poison {
    /// The step that failed.
    pub what: &'static str,
    /// What the engine or the system said.
    pub detail: String,
}

/// Why an operation on an open store failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    /// A record on disk is not what was written. Never served; recorded in `Store::damage`.
    #[error("damaged data in {area}/: {kind} {key}: {detail}")]
    Corrupt {
        area: Area,
        /// Which kind of key, from the table in `keys.rs`.
        kind: &'static str,
        key: String,
        detail: String,
    },
    /// An entry that must be there is not.
    #[error("the log of {group} has no entry {index}, although it is above the purge marker")]
    Hole { group: GroupId, index: LogIndex },
    /// The caller asked for an entry at or below the purge marker.
    #[error("entry {index} of {group} is purged (up to {purged})")]
    Purged {
        group: GroupId,
        index: LogIndex,
        purged: LogIndex,
    },
    /// An append that would leave a gap or write over an entry that was not truncated first.
    #[error("{group}: refused to append entry {index}, the next one is {expected}")]
    Gap {
        group: GroupId,
        index: LogIndex,
        expected: LogIndex,
    },
    /// A write to a group that was set aside.
    #[error("{0} is in quarantine: it is kept as it is and not written")]
    Quarantined(GroupId),
    /// The store stopped for good.
    #[error(transparent)]
    Poisoned(#[from] Poison),
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
    /// The engine could not answer a read.
    #[error("storage engine, {what}: {detail}")]
    Engine { what: &'static str, detail: String },
}

impl StorageError {
    /// What an error of a *write* says about whether it happened. A poisoned write may be on disk.
    pub fn retry_class(&self) -> RetryClass {
        match self {
            StorageError::Poisoned(_) | StorageError::Engine { .. } => RetryClass::MayHaveHappened,
            StorageError::Corrupt { .. }
            | StorageError::Hole { .. }
            | StorageError::Purged { .. }
            | StorageError::Gap { .. }
            | StorageError::Quarantined(_)
            | StorageError::Closed => RetryClass::DidNotHappen,
        }
    }
}

pub(super) const FOLDER_MISSING: &str = "the folder is missing";

/// Why a data directory was not opened. Each says what is wrong, what is allowed, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "{dir:?} is in use by process {pid}: one process may have a data directory open; stop that one, \
         or choose another --data-dir"
    )]
    Locked { dir: PathBuf, pid: String },
    #[error(
        "{dir:?} was written in data format {found}; this binary knows up to {known}: run the newer binary, \
         going back is not possible"
    )]
    NewerFormat { dir: PathBuf, found: u32, known: u32 },
    #[error(
        "{dir:?} belongs to node {found}, but this node is {expected}: a directory may be opened only by the node \
         that made it; correct the node id or the --data-dir"
    )]
    OtherNode {
        dir: PathBuf,
        expected: NodeId,
        found: NodeId,
    },
    #[error(
        "{dir:?} is not empty and not a Mainstem data directory ({why}): only an empty or an own directory is \
         opened; choose another --data-dir"
    )]
    NotADataDir { dir: PathBuf, why: String },
    #[error(
        "the log is damaged: {what} ({file:?}). Acknowledged data or a vote may be missing, so this replica must \
         not vote or acknowledge again. Nothing was changed. Replace it by a new, empty replica if others hold the \
         data; if this is the only copy, restore the directory from a backup"
    )]
    LogDamaged { what: String, file: PathBuf },
    #[error(
        "the applied state is damaged: {what} ({file:?}{}). The log is intact. Nothing was changed. Rebuild the \
         state from another replica; if this is the only copy, restore the directory from a backup",
        groups_suffix(groups)
    )]
    StateDamaged {
        what: String,
        file: PathBuf,
        /// The groups known to be hit; empty when it cannot be told.
        groups: Vec<GroupId>,
    },
    #[error(
        "cannot open {dir:?}: {what}: {detail}: nothing was changed; correct the cause (permissions, space, device) \
         and start again"
    )]
    Io {
        dir: PathBuf,
        what: &'static str,
        detail: String,
    },
}

impl OpenError {
    /// Whether all of it is missing: that looks more like a volume that is not mounted than like damage.
    pub fn is_missing(&self) -> bool {
        match self {
            OpenError::LogDamaged { what, .. } | OpenError::StateDamaged { what, .. } => what == FOLDER_MISSING,
            OpenError::Locked { .. }
            | OpenError::NewerFormat { .. }
            | OpenError::OtherNode { .. }
            | OpenError::NotADataDir { .. }
            | OpenError::Io { .. } => false,
        }
    }

    /// Whether data is damaged (the server then exits with code 6), as opposed to a wrong set-up.
    pub fn is_damage(&self) -> bool {
        match self {
            OpenError::LogDamaged { .. } | OpenError::StateDamaged { .. } => true,
            OpenError::Locked { .. }
            | OpenError::NewerFormat { .. }
            | OpenError::OtherNode { .. }
            | OpenError::NotADataDir { .. }
            | OpenError::Io { .. } => false,
        }
    }
}

fn groups_suffix(groups: &[GroupId]) -> String {
    if groups.is_empty() {
        return String::new();
    }
    let list: Vec<String> = groups.iter().take(20).map(ToString::to_string).collect();
    let more = if groups.len() > 20 { ", …" } else { "" };
    format!("; groups {}{more}", list.join(", "))
}
