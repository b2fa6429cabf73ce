//! The two RocksDB instances and every option they are opened with.
//!
//! | option | log/ | state/ | why |
//! |---|---|---|---|
//! | WAL | on, synced per write | off | state/ is rebuilt by re-applying the log |
//! | `wal_recovery_mode` | absolute | – | the default stops at the first bad record and silently drops synced entries and votes after it; the tail of an unsynced write is cut by `wal_check` before, so nothing else is left to tolerate |
//! | `recycle_log_file_num` | 0 | – | recycled files force the tolerant mode |
//! | `track_and_verify_wals_in_manifest` | on | off | a missing or shortened closed WAL is found |
//! | `track_and_verify_wals` (options string) | on | off | a WAL names its predecessor: finds a MANIFEST that lost its tail |
//! | `avoid_flush_during_recovery` (options string) | on | – | opening writes nothing from a log that was not checked yet |
//! | `avoid_flush_during_shutdown` (options string) | on | on | a stop is a crash; `Store::close` flushes state/ itself |
//! | `paranoid_checks`, `force_consistency_checks` | on | on | the defaults, said aloud |
//! | `write_buffer_size` × `max_write_buffer_number` | 128 MiB × 2 | 16 MiB × 2 per family | see `StoreOptions` |
//! | `level0_slowdown/stop`, pending compaction limits | off | off | a stalled write would block votes; permits refuse first |
//! | `level0_file_num_compaction_trigger` | 4 | 4 | flushed entries are purged soon: merging four files mostly drops them |
//! | compression | none | lz4 for the index, none for batches | entries and batches are compressed by producers |
//! | families | default | default (index), `batches`; `atomic_flush` | garbage collection of blobs rewrites no index, and the index's compaction filter reads no blobs; the flush of both is one |
//! | blob files | off | `batches`: at or above `min_blob_bytes` | batches are written once and never by compaction |
//! | blob garbage collection | – | off, but on in passes of `reclaim.rs` | pure ingest rewrites nothing |
//! | `max_open_files` | -1 | -1 | every table is opened, and its footer checked, at open |
//! | `bytes_per_sync`, `wal_bytes_per_sync` | 0, 0 | 1 MiB | the log is synced anyway; flushes spread their writes |
//! | mmap reads and writes | off | off | everything goes through calls a fault test can see |
//! | `max_background_jobs` | 2 | 2 | two cores are the smallest machine |
//! | `keep_log_file_num`, `max_log_file_size` | 2, 4 MiB | 2, 4 MiB | RocksDB's own text logs stay small |

use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rocksdb::compaction_filter::CompactionFilter;
use rocksdb::compaction_filter_factory::{CompactionFilterContext, CompactionFilterFactory};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, CompactionDecision, DB, DBCompressionType, DBRecoveryMode,
    Options, WriteOptions,
};

use super::error::Area;
use super::floors::{DurableFloors, FloorTable};
use super::keys::Key;
use super::offsets;
use super::options::StoreOptions;
use super::record::unframe;

/// The family of state/ that holds batches.
pub const BATCHES: &str = "batches";

fn base_options(string: &str) -> Result<Options, rocksdb::Error> {
    // The crate has no setter for these; the string is parsed by RocksDB itself.
    let mut o = Options::default().get_options_from_string(string)?;
    o.set_paranoid_checks(true);
    o.set_max_open_files(-1);
    o.set_max_background_jobs(2);
    o.set_allow_mmap_reads(false);
    o.set_allow_mmap_writes(false);
    o.set_keep_log_file_num(2);
    o.set_max_log_file_size(4 << 20);
    o.set_recycle_log_file_num(0);
    o.set_stats_dump_period_sec(0);
    o.set_stats_persist_period_sec(0);
    o.set_max_write_buffer_number(2);
    o.set_level_zero_file_num_compaction_trigger(4);
    o.set_level_zero_slowdown_writes_trigger(1 << 20);
    o.set_level_zero_stop_writes_trigger(1 << 20);
    o.set_soft_pending_compaction_bytes_limit(0);
    o.set_hard_pending_compaction_bytes_limit(0);
    o.set_compression_type(DBCompressionType::None);
    // State is small beside blobs and the log is short-lived: five levels are plenty.
    o.set_num_levels(5);
    Ok(o)
}

fn table(cache: &Cache) -> BlockBasedOptions {
    let mut t = BlockBasedOptions::default();
    t.set_block_cache(cache);
    t.set_format_version(6);
    t.set_block_size(16 << 10);
    t
}

/// Opens (or, while a directory is being made, creates) log/.
pub fn open_log(dir: &Path, opts: &StoreOptions, cache: &Cache, create: bool) -> Result<DB, rocksdb::Error> {
    patiently(|| open_log_once(dir, opts, cache, create))
}

fn open_log_once(dir: &Path, opts: &StoreOptions, cache: &Cache, create: bool) -> Result<DB, rocksdb::Error> {
    let mut o = base_options(
        "track_and_verify_wals=true;avoid_flush_during_recovery=true;avoid_flush_during_shutdown=true;\
         force_consistency_checks=true;enforce_write_buffer_manager_during_recovery=false",
    )?;
    o.create_if_missing(create);
    o.set_wal_recovery_mode(DBRecoveryMode::AbsoluteConsistency);
    o.set_track_and_verify_wals_in_manifest(true);
    o.set_write_buffer_size(opts.log_write_buffer_bytes);
    // One writer thread: nothing to gain, and the WAL record of a batch stays a batch.
    o.set_allow_concurrent_memtable_write(false);
    o.set_enable_pipelined_write(false);
    o.set_target_file_size_base(64 << 20);
    o.set_max_bytes_for_level_base(512 << 20);
    o.set_block_based_table_factory(&table(cache));
    DB::open(&o, dir)
}

/// Opens (or, while a directory is being made, creates) state/.
pub fn open_state(
    dir: &Path,
    opts: &StoreOptions,
    cache: &Cache,
    floors: &Arc<DurableFloors>,
    create: bool,
) -> Result<DB, rocksdb::Error> {
    patiently(|| open_state_once(dir, opts, cache, floors, create))
}

fn open_state_once(
    dir: &Path,
    opts: &StoreOptions,
    cache: &Cache,
    floors: &Arc<DurableFloors>,
    create: bool,
) -> Result<DB, rocksdb::Error> {
    let string = "avoid_flush_during_shutdown=true;force_consistency_checks=true";
    let mut db = base_options(string)?;
    db.create_if_missing(create);
    db.create_missing_column_families(create);
    db.set_atomic_flush(true);
    db.set_bytes_per_sync(1 << 20);

    let mut index = base_options(string)?;
    index.set_write_buffer_size(opts.state_write_buffer_bytes);
    index.set_compression_type(DBCompressionType::Lz4);
    index.set_target_file_size_base(16 << 20);
    index.set_max_bytes_for_level_base(64 << 20);
    index.set_compaction_filter_factory(StaleFilterFactory {
        name: CString::new("mainstem.stale").expect("no zero byte"),
        floors: floors.clone(),
    });
    let mut t = table(cache);
    t.set_bloom_filter(10.0, false);
    index.set_block_based_table_factory(&t);

    let mut batches = base_options(string)?;
    batches.set_write_buffer_size(opts.state_write_buffer_bytes);
    batches.set_enable_blob_files(true);
    batches.set_min_blob_size(opts.min_blob_bytes);
    batches.set_blob_file_size(opts.blob_file_bytes);
    batches.set_enable_blob_gc(false);
    batches.set_target_file_size_base(16 << 20);
    batches.set_max_bytes_for_level_base(128 << 20);
    batches.set_block_based_table_factory(&table(cache));

    DB::open_cf_descriptors(
        &db,
        dir,
        [
            ColumnFamilyDescriptor::new("default", index),
            ColumnFamilyDescriptor::new(BATCHES, batches),
        ],
    )
}

/// A write to log/ that is on disk when it returns.
pub fn synced() -> WriteOptions {
    let mut w = WriteOptions::default();
    w.set_sync(true);
    w
}

/// A write to state/, which has no WAL.
pub fn unlogged() -> WriteOptions {
    let mut w = WriteOptions::default();
    w.disable_wal(true);
    w
}

/// Drops index records of trimmed batches during compaction. What is below a floor that is not durable must stay:
/// after a crash the floor is lower again, and re-applying the log would see something else than it did before.
struct StaleFilterFactory {
    name: CString,
    floors: Arc<DurableFloors>,
}

impl CompactionFilterFactory for StaleFilterFactory {
    type Filter = StaleFilter;

    fn create(&mut self, _context: CompactionFilterContext) -> StaleFilter {
        StaleFilter {
            name: self.name.clone(),
            floors: self.floors.snapshot(),
        }
    }

    fn name(&self) -> &CStr {
        &self.name
    }
}

struct StaleFilter {
    name: CString,
    floors: Arc<FloorTable>,
}

impl CompactionFilter for StaleFilter {
    fn filter(&mut self, _level: u32, key: &[u8], value: &[u8]) -> CompactionDecision {
        if is_stale(&self.floors, key, value) {
            CompactionDecision::Remove
        } else {
            CompactionDecision::Keep
        }
    }

    fn name(&self) -> &CStr {
        &self.name
    }
}

/// Whether an index record belongs to something below its shard's floor. Reads apply the same rule to what they find,
/// so it cannot be seen when the filter removes it.
pub fn is_stale(floors: &FloorTable, key: &[u8], value: &[u8]) -> bool {
    let raw = key;
    let Some(key) = Key::decode(key) else {
        return false;
    };
    match key {
        // A posting covers all batches of its entry: its last record may be above a floor that its base is below. One
        // that cannot be read is kept, to be found out when it is.
        Key::Posting(shard, _, at) => floors.get(&shard).is_some_and(|f| {
            let list = || offsets::decode(unframe(Area::State, raw, value).ok()?, offsets::OFFSETS_MAX);
            at < f.batches && list().is_some_and(|list| offsets::end(at, &list) <= f.batches)
        }),
        Key::Holes(shard, at) => floors.get(&shard).is_some_and(|f| at < f.batches),
        Key::Ids(shard, at) => floors.get(&shard).is_some_and(|f| at < f.ids),
        Key::Applied(_)
        | Key::Shard(_)
        | Key::Producer(..)
        | Key::BatchFloor(_)
        | Key::IdFloor(_)
        | Key::Meta(..)
        | Key::Flush
        | Key::Batch(..)
        | Key::Entry(..)
        | Key::Vote(_)
        | Key::Committed(_)
        | Key::Purged(_)
        | Key::First(_)
        | Key::Quarantine(_)
        | Key::Owner(_)
        | Key::Retired(_)
        | Key::BatchRecord => false,
    }
}

/// What an engine error at open means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFault {
    /// The bytes are not what was written, or files are missing.
    Damage,
    /// The system did not let us read or write.
    System,
}

/// Sorts an engine error at open. Who calls it damage gives the data up: what only says that something could not be done
/// now is none.
pub fn open_fault(error: &rocksdb::Error) -> OpenFault {
    use rocksdb::ErrorKind as Kind;
    match error.kind() {
        Kind::Aborted
        | Kind::Busy
        | Kind::Expired
        | Kind::Incomplete
        | Kind::MergeInProgress
        | Kind::ShutdownInProgress
        | Kind::TimedOut
        | Kind::TryAgain
        | Kind::CompactionTooLarge
        | Kind::ColumnFamilyDropped => OpenFault::System,
        Kind::IOError if is_system(error.as_ref()) => OpenFault::System,
        Kind::Corruption
        | Kind::IOError
        | Kind::InvalidArgument
        | Kind::NotFound
        | Kind::NotSupported
        | Kind::Unknown => OpenFault::Damage,
    }
}

/// Whether an error's text says that the system did not let us read or write now.
pub fn is_system(text: &str) -> bool {
    let said = [
        "No space left",
        "Disk quota exceeded",
        "Permission denied",
        "Operation not permitted",
        "Read-only file system",
        "Too many open files",
        "Cannot allocate memory",
        "Resource temporarily unavailable",
        "Device or resource busy",
        "Interrupted system call",
        "While lock file",
        "lock hold by",
    ];
    said.iter().any(|words| text.contains(words))
}

/// Between attempts to open.
const OPEN_PAUSE: Duration = Duration::from_millis(10);
const OPEN_ATTEMPTS: u32 = 20;

/// Opens a database. The engine's timer takes no task that is due before the one which it works at just now, so that a wall
/// clock that was set back can abort an open: it is done again.
fn patiently(open: impl Fn() -> Result<DB, rocksdb::Error>) -> Result<DB, rocksdb::Error> {
    for _ in 1..OPEN_ATTEMPTS {
        match open() {
            Err(error) if error.kind() == rocksdb::ErrorKind::Aborted => {
                tracing::warn!(%error, "the engine did not open; trying again");
                std::thread::sleep(OPEN_PAUSE);
            }
            opened => return opened,
        }
    }
    open()
}
