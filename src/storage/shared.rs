//! What the parts of an open store share: poison, damage found, bytes accepted since free space was last looked at.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::error::{Area, Poison, StorageError};
use super::metric_names;

/// One damaged record that was found while working.
#[derive(Debug, Clone)]
pub struct DamageNote {
    pub area: Area,
    pub what: String,
    pub found_at: SystemTime,
}

/// Notes kept; later ones are only counted.
const NOTES_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Shared {
    poison: OnceLock<Poison>,
    poison_tx: watch::Sender<Option<Poison>>,
    damage: Mutex<Vec<DamageNote>>,
    damage_found: AtomicU64,
    /// Bytes handed to either database since free space was last measured.
    pub accepted_bytes: AtomicU64,
}

impl Shared {
    pub fn new() -> Self {
        Shared {
            poison: OnceLock::new(),
            poison_tx: watch::Sender::new(None),
            damage: Mutex::new(Vec::new()),
            damage_found: AtomicU64::new(0),
            accepted_bytes: AtomicU64::new(0),
        }
    }

    /// Stops the store for good. The first reason stays.
    pub fn poison(&self, what: &'static str, detail: impl std::fmt::Display) -> Poison {
        let mut damage = None;
        let poison = self.poison.get_or_init(|| {
            let detail = detail.to_string();
            // A compaction may meet a damaged file before any reader does: then a write is told of it.
            if detail.starts_with("Corruption") {
                damage = Some(format!("{what} failed: {detail}"));
            }
            Poison { what, detail }
        });
        if let Some(damage) = damage {
            let area = if what.contains("log") { Area::Log } else { Area::State };
            self.note_damage(area, damage);
        }
        let first = self.poison_tx.send_if_modified(|p| {
            let first = p.is_none();
            if first {
                *p = Some(poison.clone());
            }
            first
        });
        if first {
            metrics::gauge!(metric_names::POISONED).set(1.0);
            tracing::error!(what = poison.what, detail = %poison.detail, "storage stopped for good");
        }
        poison.clone()
    }

    pub fn check(&self) -> Result<(), StorageError> {
        match self.poison.get() {
            None => Ok(()),
            Some(poison) => Err(StorageError::Poisoned(poison.clone())),
        }
    }

    pub fn poisoned(&self) -> watch::Receiver<Option<Poison>> {
        self.poison_tx.subscribe()
    }

    /// Records damage on its way to the caller.
    pub fn note<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        if let Err(error) = &result {
            self.note_error(error);
        }
        result
    }

    pub fn note_error(&self, error: &StorageError) {
        let area = match error {
            StorageError::Corrupt { area, .. } => *area,
            StorageError::Hole { .. } => Area::Log,
            StorageError::Purged { .. }
            | StorageError::Gap { .. }
            | StorageError::Quarantined(_)
            | StorageError::Poisoned(_)
            | StorageError::Closed
            | StorageError::Engine { .. } => return,
        };
        self.note_damage(area, error.to_string());
    }

    pub fn note_damage(&self, area: Area, what: String) {
        self.damage_found.fetch_add(1, Ordering::Relaxed);
        metrics::counter!(metric_names::DAMAGE_FOUND, "area" => area.as_str()).increment(1);
        let mut notes = self.damage.lock();
        if notes.len() < NOTES_MAX && !notes.iter().any(|n| n.what == what) {
            tracing::error!(%area, what, "damaged data found");
            notes.push(DamageNote {
                area,
                what,
                found_at: SystemTime::now(),
            });
        }
    }

    pub fn damage_found(&self) -> u64 {
        self.damage_found.load(Ordering::Relaxed)
    }

    pub fn first_damage(&self) -> Option<DamageNote> {
        self.damage.lock().first().cloned()
    }
}

/// Turns an engine error met while reading into ours: its own checks found damage, or it could not read.
pub(super) fn read_error(area: Area, what: &'static str, error: &rocksdb::Error) -> StorageError {
    let detail = error.to_string();
    let missing = detail.contains("No such file");
    match error.kind() {
        rocksdb::ErrorKind::Corruption => StorageError::Corrupt {
            area,
            kind: "file",
            key: what.into(),
            detail,
        },
        rocksdb::ErrorKind::IOError | rocksdb::ErrorKind::NotFound if missing => StorageError::Corrupt {
            area,
            kind: "file",
            key: what.into(),
            detail,
        },
        rocksdb::ErrorKind::IOError
        | rocksdb::ErrorKind::NotFound
        | rocksdb::ErrorKind::NotSupported
        | rocksdb::ErrorKind::InvalidArgument
        | rocksdb::ErrorKind::MergeInProgress
        | rocksdb::ErrorKind::Incomplete
        | rocksdb::ErrorKind::ShutdownInProgress
        | rocksdb::ErrorKind::TimedOut
        | rocksdb::ErrorKind::Aborted
        | rocksdb::ErrorKind::Busy
        | rocksdb::ErrorKind::Expired
        | rocksdb::ErrorKind::TryAgain
        | rocksdb::ErrorKind::CompactionTooLarge
        | rocksdb::ErrorKind::ColumnFamilyDropped
        | rocksdb::ErrorKind::Unknown => StorageError::Engine { what, detail },
    }
}
