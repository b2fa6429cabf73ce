//! Every metric of the storage layer: name, kind, unit in the name, meaning.

/// Time one synced write of the committer took, seconds.
pub const SYNC_SECONDS: &str = "storage_sync_seconds";
/// Bytes in one synced write of the committer.
pub const COMMIT_BYTES: &str = "storage_commit_bytes";
/// Requests in one synced write of the committer.
pub const COMMIT_REQUESTS: &str = "storage_commit_requests";
/// Time a request waited before its write began, seconds.
pub const COMMIT_WAIT_SECONDS: &str = "storage_commit_wait_seconds";
/// Bytes of requests waiting for the committer.
pub const COMMIT_QUEUE_BYTES: &str = "storage_commit_queue_bytes";
/// Bytes written to state/, before the engine.
pub const STATE_WRITE_BYTES: &str = "storage_state_write_bytes_total";
/// Time one flush of state/ took, seconds.
pub const STATE_FLUSH_SECONDS: &str = "storage_state_flush_seconds";
/// Free bytes on the data directory's file system.
pub const SPACE_FREE_BYTES: &str = "storage_space_free_bytes";
/// Bytes the two databases hold on disk.
pub const SPACE_HELD_BYTES: &str = "storage_space_held_bytes";
/// Estimate of the bytes among them that are live.
pub const SPACE_LIVE_BYTES: &str = "storage_space_live_bytes";
/// 1 while publishes are to be refused for lack of space.
pub const SPACE_LOW: &str = "storage_space_low";
/// Bytes in blob files whose batches were trimmed.
pub const BLOB_GARBAGE_BYTES: &str = "storage_blob_garbage_bytes";
/// Passes that collected blob garbage.
pub const RECLAIM_PASSES: &str = "storage_reclaim_passes_total";
/// Damaged records found.
pub const DAMAGE_FOUND: &str = "storage_damage_found_total";
/// 1 when the store has stopped for good.
pub const POISONED: &str = "storage_poisoned";

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

/// All of them, for the documentation and for the exporter's descriptions.
pub const ALL: &[(&str, MetricKind, &str)] = &[
    (
        SYNC_SECONDS,
        MetricKind::Histogram,
        "Time one synced write of the committer took",
    ),
    (
        COMMIT_BYTES,
        MetricKind::Histogram,
        "Bytes in one synced write of the committer",
    ),
    (
        COMMIT_REQUESTS,
        MetricKind::Histogram,
        "Requests in one synced write of the committer",
    ),
    (
        COMMIT_WAIT_SECONDS,
        MetricKind::Histogram,
        "Time the oldest request of a write waited before it began",
    ),
    (
        COMMIT_QUEUE_BYTES,
        MetricKind::Gauge,
        "Bytes of requests waiting for the committer",
    ),
    (
        STATE_WRITE_BYTES,
        MetricKind::Counter,
        "Bytes written to state/, before the engine",
    ),
    (
        STATE_FLUSH_SECONDS,
        MetricKind::Histogram,
        "Time one flush of state/ took",
    ),
    (
        SPACE_FREE_BYTES,
        MetricKind::Gauge,
        "Free bytes on the data directory's file system",
    ),
    (
        SPACE_HELD_BYTES,
        MetricKind::Gauge,
        "Bytes the two databases hold on disk",
    ),
    (
        SPACE_LIVE_BYTES,
        MetricKind::Gauge,
        "Estimate of the held bytes that are live",
    ),
    (
        SPACE_LOW,
        MetricKind::Gauge,
        "1 while publishes are to be refused for lack of space",
    ),
    (
        BLOB_GARBAGE_BYTES,
        MetricKind::Gauge,
        "Bytes in blob files whose batches were trimmed",
    ),
    (
        RECLAIM_PASSES,
        MetricKind::Counter,
        "Passes that collected blob garbage",
    ),
    (DAMAGE_FOUND, MetricKind::Counter, "Damaged records found"),
    (POISONED, MetricKind::Gauge, "1 when the store has stopped for good"),
];
