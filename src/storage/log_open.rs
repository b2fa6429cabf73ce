//! Opening log/: the WAL is checked, RocksDB opens it, and then every record there is is read once. What is missing or
//! changed is found here, before Raft is started on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rocksdb::{Cache, DB, ReadOptions};

use super::committer::decode_batch_record;
use super::engine::{self, OpenFault};
use super::error::{Area, OpenError, StorageError};
use super::keys::{self, Key, KeyRange};
use super::log::GroupLog;
use super::options::StoreOptions;
use super::record::{corrupt, take_u64, unframe};
use super::shared::read_error;
use super::wal_check::{self, WalFault};
use super::witness::{Mark, WITNESS_FILE};
use crate::model::{GroupId, LogIndex, ReplicaId};

/// A log that is whole.
pub(super) struct OpenedLog {
    pub db: DB,
    pub groups: BTreeMap<GroupId, GroupLog>,
    pub mark: Mark,
}

pub(super) fn open(opts: &StoreOptions, cache: &Cache, witness: Mark) -> Result<OpenedLog, OpenError> {
    let dir = opts.dir.join(Area::Log.as_str());
    if !dir.is_dir() {
        return Err(damaged(&dir, super::error::FOLDER_MISSING));
    }
    let report =
        wal_check::check(&dir, &opts.dir.join(super::store::ASIDE_DIR), witness).map_err(|fault| match fault {
            WalFault::Damaged { file, what } => OpenError::LogDamaged { what, file },
            WalFault::Io(e) => io(&opts.dir, "reading the write-ahead log", e),
        })?;
    let opened = engine::open_log(&dir, opts, cache, false);
    let db = opened.map_err(|e| match engine::open_fault(&e) {
        OpenFault::Damage => damaged(&dir, e),
        OpenFault::System => io(&opts.dir, "opening log/", e),
    })?;
    let mark = last_mark(&db, &dir)?;
    let in_wal = report.marks.last().copied().unwrap_or_default();
    if mark.number < in_wal.number {
        return Err(damaged(
            &dir,
            format!("the engine recovered write {} of {}", mark.number, in_wal.number),
        ));
    }
    if mark.number < witness.number {
        return Err(damaged(
            &opts.dir.join(WITNESS_FILE),
            format!(
                "it ends with write {}, but write {} was synced",
                mark.number, witness.number
            ),
        ));
    }
    if mark.number == witness.number && mark.digest != witness.digest {
        return Err(damaged(
            &dir,
            format!("write {} is not the one the witness saw", mark.number),
        ));
    }
    let groups = walk(&db).map_err(|e| damaged(&dir, e))?;
    Ok(OpenedLog { db, groups, mark })
}

fn damaged(file: &Path, what: impl std::fmt::Display) -> OpenError {
    OpenError::LogDamaged {
        what: what.to_string(),
        file: PathBuf::from(file),
    }
}

fn io(dir: &Path, what: &'static str, e: impl std::fmt::Display) -> OpenError {
    OpenError::Io {
        dir: dir.to_path_buf(),
        what,
        detail: e.to_string(),
    }
}

fn last_mark(db: &DB, dir: &Path) -> Result<Mark, OpenError> {
    let key = Key::BatchRecord.encode();
    let value = db.get_pinned(&key).map_err(|e| damaged(dir, e))?;
    let Some(value) = value else {
        return Ok(Mark::default());
    };
    let payload = unframe(Area::Log, &key, &value).map_err(|e| damaged(dir, e))?;
    decode_batch_record(payload).ok_or_else(|| damaged(dir, "the batch record is unreadable"))
}

/// Reads every record and rebuilds what is known of each group.
fn walk(db: &DB) -> Result<BTreeMap<GroupId, GroupLog>, StorageError> {
    let mut groups: BTreeMap<GroupId, GroupLog> = BTreeMap::new();
    // Markers first: they say where the entries must begin. Their tags sort after that of the entries.
    let (_, after_entries) = keys::all_entries();
    let mut iter = scan(db, (after_entries, vec![u8::MAX; 32]));
    while let Some((key, value)) = iter.item() {
        let mut payload = unframe(Area::Log, key, value)?;
        let short = || corrupt(Area::Log, key, "too short");
        match Key::decode(key) {
            Some(Key::Vote(g)) => groups.entry(g).or_default().vote = Some(Bytes::copy_from_slice(payload)),
            Some(Key::Committed(g)) => groups.entry(g).or_default().committed = Some(Bytes::copy_from_slice(payload)),
            Some(Key::Purged(g)) => {
                let index = LogIndex::new(take_u64(&mut payload).ok_or_else(short)?);
                groups.entry(g).or_default().purged = Some((index, Bytes::copy_from_slice(payload)));
            }
            Some(Key::First(g)) => {
                let index = take_u64(&mut payload).ok_or_else(short)?;
                groups.entry(g).or_default().first = Some(LogIndex::new(index));
            }
            Some(Key::Quarantine(g)) => groups.entry(g).or_default().quarantined = true,
            Some(Key::Owner(g)) => {
                let replica = take_u64(&mut payload).ok_or_else(short)?;
                groups.entry(g).or_default().owner = Some(ReplicaId::new(replica));
            }
            Some(Key::Retired(g)) => {
                let replica = take_u64(&mut payload).ok_or_else(short)?;
                groups.entry(g).or_default().retired = Some(ReplicaId::new(replica));
            }
            Some(Key::BatchRecord) => {}
            _ => return Err(corrupt(Area::Log, key, "not a key of the log")),
        }
        iter.next();
    }
    iter.status()
        .map_err(|e| read_error(Area::Log, "reading markers", &e))?;
    walk_entries(db, &mut groups)?;
    for log in groups.values_mut() {
        let purged = log.purged.as_ref().map(|(i, _)| *i);
        log.last = log.last.max(purged);
    }
    Ok(groups)
}

fn walk_entries(db: &DB, groups: &mut BTreeMap<GroupId, GroupLog>) -> Result<(), StorageError> {
    let mut iter = scan(db, (vec![], keys::all_entries().1));
    while let Some((key, value)) = iter.item() {
        unframe(Area::Log, key, value)?;
        let Some(Key::Entry(group, index)) = Key::decode(key) else {
            return Err(corrupt(Area::Log, key, "not a key of the log"));
        };
        let log = groups.entry(group).or_default();
        let expected = match (log.last, &log.purged, log.first) {
            (Some(last), _, _) => last.next(),
            (None, Some((purged, _)), _) => purged.next(),
            (None, None, Some(first)) => first,
            (None, None, None) => return Err(corrupt(Area::Log, key, "an entry of a group without a first one")),
        };
        if index != expected {
            return Err(StorageError::Hole { group, index: expected });
        }
        log.last = Some(index);
        iter.next();
    }
    iter.status().map_err(|e| read_error(Area::Log, "reading entries", &e))
}

fn scan(db: &DB, (from, to): KeyRange) -> rocksdb::DBRawIterator<'_> {
    let mut options = ReadOptions::default();
    options.set_iterate_upper_bound(to);
    options.set_readahead_size(2 << 20);
    options.fill_cache(false);
    let mut iter = db.raw_iterator_opt(options);
    iter.seek(from);
    iter
}
