//! What an operator may set of the store. Units are in the names or types; the defaults keep a node under 700 MiB.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of a [`super::Store`].
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The data directory. Created if it is missing.
    pub dir: PathBuf,
    /// One write buffer of `log/`; at most two exist. Several times that of `state/`, so that most entries are purged
    /// before they would be flushed: this sets how many bytes reach the disk per byte published.
    pub log_write_buffer_bytes: usize,
    /// `state/` is flushed when this much has been written to it; at most two such buffers exist per family. With 16 MiB
    /// beside 128 MiB of log, 2.3–2.5 bytes reach the disk per byte published; with 32 MiB, 2.4–2.6
    /// (`tests/storage_rate.rs`).
    pub state_write_buffer_bytes: usize,
    /// Shared by both databases.
    pub block_cache_bytes: usize,
    /// `state/` is also flushed when this has passed since its last flush and something was written, so that no idle
    /// group pins the log. With less than `flush_min_bytes` written, sixty times as long.
    pub flush_interval: Duration,
    /// Below this, a flush by time would only make a tiny file.
    pub flush_min_bytes: usize,
    /// Below this much free space, `Space::low` is set and publishes are to be refused.
    pub min_free_bytes: u64,
    /// Most bytes of requests the committer puts into one synced write; a single larger request still goes alone.
    pub commit_batch_bytes_max: usize,
    /// Whether a thread that asks for a lone small append may write and sync it itself, while syncs are quick. Only
    /// where other threads serve what that thread serves too: it is blocked meanwhile.
    pub commit_on_caller: bool,
    /// Whether the store has threads of its own. Without them its owner does their work: it calls
    /// [`commit_waiting`](super::Store::commit_waiting) and flushes `state/`, and space is looked at and given back only
    /// when it says so. For a simulation, which has to repeat itself exactly.
    pub threads: bool,
    /// Values of `state/` at or above this go to blob files and are not rewritten by compaction.
    pub min_blob_bytes: u64,
    /// A blob file is closed at this size.
    pub blob_file_bytes: u64,
    /// How often free space is looked at.
    pub space_interval: Duration,
    /// How often, at most, trimmed ranges are compacted and blob garbage is collected.
    pub reclaim_interval: Duration,
    /// Blob garbage is collected when its share of all blob bytes is above this …
    pub garbage_ratio_max: f64,
    /// … and it is at least this much.
    pub garbage_min_bytes: u64,
}

/// One mebibyte.
const MIB: usize = 1 << 20;

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            dir: PathBuf::new(),
            log_write_buffer_bytes: 128 * MIB,
            state_write_buffer_bytes: 16 * MIB,
            block_cache_bytes: 64 * MIB,
            flush_interval: Duration::from_secs(5),
            flush_min_bytes: MIB,
            min_free_bytes: 512 * MIB as u64,
            commit_batch_bytes_max: 8 * MIB,
            commit_on_caller: true,
            threads: true,
            min_blob_bytes: 1024,
            blob_file_bytes: 64 * MIB as u64,
            space_interval: Duration::from_millis(250),
            reclaim_interval: Duration::from_secs(10),
            garbage_ratio_max: 0.2,
            garbage_min_bytes: 16 * MIB as u64,
        }
    }
}

impl StoreOptions {
    /// Defaults, in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        StoreOptions {
            dir: dir.into(),
            ..StoreOptions::default()
        }
    }
}
