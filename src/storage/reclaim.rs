//! Giving back the space of what was trimmed.
//!
//! A trim only raises a floor (`state_batch.rs`). Once the floor is durable, this task, a step every few seconds:
//!
//! 1. removes the trimmed batches by one range deletion per shard, however many trims there were;
//! 2. compacts those ranges: their keys go, and their bytes in blob files count as garbage. With blob files the keys
//!    are a few bytes per batch, so this costs next to nothing. A blob file without live batches is deleted whole:
//!    where everything has the same retention, nothing is ever rewritten;
//! 3. when too much of the blob bytes is garbage (one file mixes shards of different retention), moves the live
//!    batches of the oldest files into new ones, no more files than it takes. RocksDB collects by age only; it is
//!    switched on for that pass alone, so that pure ingest rewrites nothing;
//! 4. compacts the index of a shard when much of it is stale.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rocksdb::{BottommostLevelCompaction, CompactOptions, Range, ReadOptions};

use super::engine;
use super::envelope;
use super::error::StorageError;
use super::keys;
use super::log::LogDb;
use super::metric_names as names;
use super::options::StoreOptions;
use super::space::SpaceMeter;
use super::state::StateDb;
use super::state_stage::KEPT_FOR;
use super::upkeep::Upkeep;
use super::wal_check::wal_files;
use crate::model::{Sequence, ShardId};

/// More trimmed shards than this are compacted in one go.
const RANGES_MAX: usize = 16;
/// Most live bytes one pass of garbage collection moves.
const MOVED_BYTES_MAX: u64 = 4 << 30;
/// A shard's index smaller than this is not compacted for its own sake.
const INDEX_BYTES_MIN: u64 = 1 << 20;
/// log/ is flushed when it is idle and its WAL is above this: most of it is purged by then, and the file goes.
const IDLE_WAL_BYTES: u64 = 16 << 20;
/// Of all time, compacting trimmed ranges takes at most one part in this many plus one, …
const COMPACT_REST: u32 = 9;
/// … and collecting garbage, which moves live bytes and so frees what it takes.
const COLLECT_REST: u32 = 2;
/// While less than this is written a second, garbage is collected down to a third of what is allowed: moving live bytes
/// then costs nobody anything.
const QUIET_BYTES_PER_SECOND: f64 = (4 << 20) as f64;
const QUIET_SHARE: f64 = 1.0 / 3.0;
/// Idle for this long.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// One blob file, as RocksDB lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlobFile {
    pub number: u64,
    pub total_bytes: u64,
    pub garbage_bytes: u64,
}

/// The task's own memory.
pub(super) struct Reclaim {
    log: LogDb,
    state: StateDb,
    opts: StoreOptions,
    upkeep: Arc<Upkeep>,
    /// Floor at the last compaction of each shard's index.
    indexed: HashMap<ShardId, Sequence>,
    /// Trimmed shards whose range is not compacted yet.
    pending: HashSet<ShardId>,
    /// Since when trims wait for their floor to become durable.
    waiting_since: Option<Instant>,
    /// Compactions and collections rest for a multiple of the time they took.
    compact_not_before: Instant,
    collect_not_before: Instant,
    /// The committer's last write seen, and when it was new.
    log_seen: (u64, Instant),
    log_flushed: u64,
    /// The committer's bytes at the last step, and when that was.
    last_step: (u64, Instant),
}

impl Reclaim {
    pub fn new(log: LogDb, state: StateDb, opts: StoreOptions, upkeep: Arc<Upkeep>) -> Reclaim {
        Reclaim {
            log,
            state,
            opts,
            upkeep,
            indexed: HashMap::new(),
            pending: HashSet::new(),
            waiting_since: None,
            compact_not_before: Instant::now(),
            collect_not_before: Instant::now(),
            log_seen: (0, Instant::now()),
            log_flushed: 0,
            last_step: (0, Instant::now()),
        }
    }

    /// Whether little was written since the last step.
    fn is_quiet(&mut self) -> bool {
        let (written, now) = (self.log.0.written.load(Ordering::Relaxed), Instant::now());
        let (before, then) = std::mem::replace(&mut self.last_step, (written, now));
        let seconds = now.saturating_duration_since(then).as_secs_f64().max(0.1);
        (written.saturating_sub(before) as f64) < seconds * QUIET_BYTES_PER_SECOND
    }

    /// Runs until closed.
    pub fn run(mut self, meter: &SpaceMeter) {
        loop {
            measure(&self.log, &self.state, meter);
            // Where room is short it is worth more than what need not travel again.
            let is_low = meter.read(self.opts.min_free_bytes, &self.state.0.shared).low;
            self.state
                .sweep_incoming(if is_low { Duration::ZERO } else { KEPT_FOR });
            if self.upkeep.wait(self.opts.reclaim_interval) {
                return;
            }
            if let Err(error) = self.step() {
                if matches!(error, StorageError::Poisoned(_)) {
                    return;
                }
                tracing::warn!(%error, "could not give back trimmed space; trying again later");
            }
        }
    }

    /// One step. Public to tests through `Store::reclaim_now`.
    pub fn step(&mut self) -> Result<(), StorageError> {
        let quiet = self.is_quiet();
        self.flush_waiting_trims()?;
        self.remove_trimmed()?;
        if !self.pending.is_empty() && !self.upkeep.is_closing() && Instant::now() >= self.compact_not_before {
            let begun = Instant::now();
            self.compact_trimmed()?;
            self.compact_not_before = Instant::now() + begun.elapsed() * COMPACT_REST;
        }
        if !self.upkeep.is_closing() && Instant::now() >= self.collect_not_before {
            let begun = Instant::now();
            self.collect_garbage(quiet)?;
            self.collect_not_before = Instant::now() + begun.elapsed() * COLLECT_REST;
        }
        if !self.upkeep.is_closing() {
            self.compact_indexes();
            self.shorten_idle_log();
        }
        Ok(())
    }

    /// Where little is written, the next flush by time is far off: trims do not wait for it.
    fn flush_waiting_trims(&mut self) -> Result<(), StorageError> {
        let inner = &*self.state.0;
        let waiting = *inner.floors.read() != *inner.durable_floors.snapshot();
        match self.waiting_since {
            _ if !waiting => self.waiting_since = None,
            None => self.waiting_since = Some(Instant::now()),
            Some(since) if since.elapsed() >= self.opts.reclaim_interval => {
                self.waiting_since = None;
                self.state.flush()?;
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn remove_trimmed(&mut self) -> Result<(), StorageError> {
        let inner = &*self.state.0;
        let floors = inner.durable_floors.snapshot();
        for shard in floors.keys() {
            // Alone with the shard: it may be dropped and put again at any moment.
            let _gate = inner.shard_gate.write();
            let to = self.state.durable_floor(*shard);
            let mut removed = inner.removed.lock();
            let from = Sequence::new(removed.get(shard).copied().unwrap_or(0));
            if to <= from {
                continue;
            }
            let (start, end) = (envelope::key(*shard, from), envelope::key(*shard, to));
            if !self.any_batch(&start, &end) {
                removed.insert(*shard, to.get());
                continue;
            }
            inner
                .db
                .delete_range_cf_opt(inner.batches(), &start, &end, &engine::unlogged())
                .map_err(|e| inner.shared.poison("removing trimmed batches", e))?;
            removed.insert(*shard, to.get());
            self.pending.insert(*shard);
        }
        Ok(())
    }

    fn any_batch(&self, start: &[u8], end: &[u8]) -> bool {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(end);
        let mut iter = self.state.0.db.raw_iterator_cf_opt(self.state.0.batches(), options);
        iter.seek(start);
        // When it cannot be read, removing it is right all the same.
        iter.valid() || iter.status().is_err()
    }

    fn compact_trimmed(&mut self) -> Result<(), StorageError> {
        // The range deletions must be in tables before a compaction can use them.
        self.state.flush()?;
        let inner = &*self.state.0;
        let pending = std::mem::take(&mut self.pending);
        let mut options = CompactOptions::default();
        options.set_exclusive_manual_compaction(false);
        if pending.len() > RANGES_MAX {
            inner
                .db
                .compact_range_cf_opt(inner.batches(), None::<&[u8]>, None::<&[u8]>, &options);
        } else {
            for shard in pending {
                let to = Sequence::new(inner.removed.lock().get(&shard).copied().unwrap_or(u64::MAX));
                let range = (envelope::key(shard, Sequence::new(0)), envelope::key(shard, to));
                inner
                    .db
                    .compact_range_cf_opt(inner.batches(), Some(range.0), Some(range.1), &options);
            }
        }
        Ok(())
    }

    fn collect_garbage(&mut self, quiet: bool) -> Result<(), StorageError> {
        let files = blob_files(&self.state);
        metrics::gauge!(names::BLOB_GARBAGE_BYTES).set(files.iter().map(|f| f.garbage_bytes).sum::<u64>() as f64);
        let allowed = self.opts.garbage_ratio_max * if quiet { QUIET_SHARE } else { 1.0 };
        let count = files_to_collect(&files, allowed, self.opts.garbage_min_bytes);
        if count == 0 {
            return Ok(());
        }
        let inner = &*self.state.0;
        // RocksDB takes the whole part of cutoff × number of files.
        let cutoff = (count as f64 + 0.5) / files.len() as f64;
        let set = |on: &str, cutoff: f64| {
            inner
                .db
                .set_options_cf(
                    inner.batches(),
                    &[
                        ("enable_blob_garbage_collection", on),
                        ("blob_garbage_collection_age_cutoff", &format!("{:.6}", cutoff.min(1.0))),
                    ],
                )
                .map_err(|e| StorageError::Engine {
                    what: "switching blob garbage collection",
                    detail: e.to_string(),
                })
        };
        set("true", cutoff)?;
        let mut options = CompactOptions::default();
        options.set_exclusive_manual_compaction(false);
        // The batches to be moved lie in the last level: it must be gone through although nothing in it changed.
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        inner
            .db
            .compact_range_cf_opt(inner.batches(), None::<&[u8]>, None::<&[u8]>, &options);
        metrics::counter!(names::RECLAIM_PASSES).increment(1);
        set("false", 0.25)
    }

    fn compact_indexes(&mut self) {
        let inner = &*self.state.0;
        for (shard, floors) in inner.durable_floors.snapshot().iter() {
            let last = self.indexed.get(shard).copied().unwrap_or(Sequence::new(0));
            let stale = floors.batches.since(last);
            let live = self.last_base(*shard).since(floors.batches);
            if stale <= live / 2 {
                continue;
            }
            let (from, to) = keys::postings_of(*shard, b"");
            let bytes = inner.db.get_approximate_sizes(&[Range::new(&from, &to)]);
            if bytes.iter().sum::<u64>() >= INDEX_BYTES_MIN {
                inner.db.compact_range(Some(&from), Some(&to));
            }
            self.indexed.insert(*shard, floors.batches);
            if self.upkeep.is_closing() {
                return;
            }
        }
    }

    fn last_base(&self, shard: ShardId) -> Sequence {
        let (from, to) = keys::batches_of(shard);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from);
        options.set_iterate_upper_bound(to);
        let mut iter = self.state.0.db.raw_iterator_cf_opt(self.state.0.batches(), options);
        iter.seek_to_last();
        match iter.key().and_then(keys::Key::decode) {
            Some(keys::Key::Batch(_, base)) => base,
            _ => Sequence::new(0),
        }
    }

    /// An idle log keeps up to two write buffers of purged entries in its WAL. Flushing drops them.
    fn shorten_idle_log(&mut self) {
        let written = self.log.0.written.load(Ordering::Relaxed);
        if written != self.log_seen.0 {
            self.log_seen = (written, Instant::now());
            return;
        }
        if self.log_seen.1.elapsed() < IDLE_TIME || written - self.log_flushed < IDLE_WAL_BYTES {
            return;
        }
        self.log_flushed = written;
        if let Err(error) = self.log.0.db.flush() {
            self.log.0.shared.poison("flushing the log", error);
        }
    }
}

/// How many of the oldest files to collect; 0: none. The least that brings garbage down to half of what is allowed.
pub(super) fn files_to_collect(files: &[BlobFile], ratio_max: f64, bytes_min: u64) -> usize {
    let total: u64 = files.iter().map(|f| f.total_bytes).sum();
    let garbage: u64 = files.iter().map(|f| f.garbage_bytes).sum();
    if garbage < bytes_min || (garbage as f64) <= ratio_max * total as f64 {
        return 0;
    }
    let (mut left_total, mut left_garbage, mut moved) = (total, garbage, 0);
    for (i, file) in files.iter().enumerate() {
        left_total -= file.garbage_bytes;
        left_garbage -= file.garbage_bytes;
        moved += file.total_bytes - file.garbage_bytes;
        let enough = left_garbage as f64 <= ratio_max / 2.0 * left_total as f64;
        if enough || moved >= MOVED_BYTES_MAX {
            return i + 1;
        }
    }
    files.len()
}

/// The blob files of state/, oldest first. RocksDB tells totals as properties, single files only in this listing.
pub(super) fn blob_files(state: &StateDb) -> Vec<BlobFile> {
    let inner = &*state.0;
    let listing = inner.db.property_value_cf(inner.batches(), "rocksdb.sstables");
    let Ok(Some(text)) = listing else {
        return Vec::new();
    };
    let mut files: Vec<BlobFile> = text.lines().filter_map(parse_blob_line).collect();
    files.sort_by_key(|f| f.number);
    files
}

fn parse_blob_line(line: &str) -> Option<BlobFile> {
    let field = |name: &str| -> Option<u64> {
        let at = line.find(name)? + name.len();
        let rest = line[at..].trim_start();
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    };
    Some(BlobFile {
        number: field("blob_file_number:")?,
        total_bytes: field("total_blob_bytes:")?,
        garbage_bytes: field("garbage_blob_bytes:")?,
    })
}

/// Measures what both databases hold and how much of it is live.
pub(super) fn measure(log: &LogDb, state: &StateDb, meter: &SpaceMeter) {
    let inner = &*state.0;
    let index = |name: &str| {
        inner
            .db
            .property_int_value_cf(inner.index(), name)
            .ok()
            .flatten()
            .unwrap_or(0)
    };
    let batches = |name: &str| {
        inner
            .db
            .property_int_value_cf(inner.batches(), name)
            .ok()
            .flatten()
            .unwrap_or(0)
    };
    let logs = |name: &str| log.0.db.property_int_value(name).ok().flatten().unwrap_or(0);
    let wal: u64 = wal_files(log.0.db.path())
        .unwrap_or_default()
        .iter()
        .filter_map(|f| std::fs::metadata(f).ok())
        .map(|m| m.len())
        .sum();
    const SST: &str = "rocksdb.total-sst-files-size";
    const LIVE: &str = "rocksdb.estimate-live-data-size";
    let held = index(SST) + batches(SST) + batches("rocksdb.total-blob-file-size") + logs(SST) + wal;
    // For a family with blob files the estimate counts the live bytes in them, too.
    let live = index(LIVE) + batches(LIVE) + logs(LIVE);
    meter.held.store(held, Ordering::Relaxed);
    meter.live.store(live, Ordering::Relaxed);
    metrics::gauge!(names::SPACE_HELD_BYTES).set(held as f64);
    metrics::gauge!(names::SPACE_LIVE_BYTES).set(live as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(u64, u64)]) -> Vec<BlobFile> {
        let file = |(i, &(total_bytes, garbage_bytes)): (usize, &(u64, u64))| BlobFile {
            number: i as u64,
            total_bytes,
            garbage_bytes,
        };
        list.iter().enumerate().map(file).collect()
    }

    #[test]
    fn no_more_files_are_collected_than_it_takes() {
        let count = |list: &[(u64, u64)]| files_to_collect(&files(list), 0.2, 50);
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[(100, 0), (100, 0)]), 0);
        assert_eq!(count(&[(1000, 200), (1000, 190)]), 0, "below what is allowed");
        assert_eq!(count(&[(100, 40)]), 0, "too little to bother");
        assert_eq!(count(&[(1000, 900), (1000, 10), (1000, 10)]), 1);
        assert_eq!(count(&[(1000, 0), (1000, 900), (1000, 0)]), 2, "age comes first");
        assert_eq!(count(&[(1000, 500), (1000, 500), (1000, 500)]), 3);
    }

    #[test]
    fn a_line_of_the_listing_is_understood() {
        let line = "blob_file_number: 12 total_blob_count: 3 total_blob_bytes: 4096 checksum_method:  \
                    checksum_value:  linked_ssts: { 14 } garbage_blob_count: 1 garbage_blob_bytes: 1024";
        let want = BlobFile {
            number: 12,
            total_bytes: 4096,
            garbage_bytes: 1024,
        };
        assert_eq!(parse_blob_line(line), Some(want));
        assert_eq!(parse_blob_line("--- blob files --- version# 3 ---"), None);
    }
}
