//! What a node says of itself in `/v1/status`.

use serde::Serialize;

/// What the layers below tell about the data. Read at every request for metrics or status, so it must be cheap: no scan.
pub trait StatusSource: Send + Sync + 'static {
    /// The data at this moment.
    fn data(&self) -> DataStatus;
}

/// The data of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataStatus {
    pub cluster_id: String,
    pub node_id: u64,
    pub incarnation: u64,
    /// Streams that are not removed.
    pub streams: u64,
    /// Over all shards, between floor and tail.
    pub messages: u64,
    /// Of these messages, before compression.
    pub bytes: u64,
    pub space: SpaceStatus,
}

/// The disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SpaceStatus {
    /// What the data directory occupies.
    pub used_bytes: u64,
    /// What its file system has free.
    pub free_bytes: u64,
    /// Publishes are refused for want of space.
    pub low: bool,
}

/// The report at `/v1/status`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub version: &'static str,
    pub cluster: String,
    pub node: String,
    pub pid: u32,
    pub healthy: bool,
    pub ready: bool,
    pub draining: bool,
    /// Microseconds since the Unix epoch.
    pub started_us: u64,
    pub time_us: u64,
    pub uptime_seconds: u64,
    pub clock: ClockReport,
    pub alarms: Vec<AlarmReport>,
    /// Absent until the store is open.
    pub data: Option<DataStatus>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ClockReport {
    /// Whether the wall clock agrees with the time stamped on messages; nothing expires while not.
    pub agrees: bool,
    /// How far the wall clock is ahead (negative: behind), in microseconds.
    pub wall_ahead_us: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct AlarmReport {
    pub name: &'static str,
    /// What it is about; empty: the node.
    pub subject: String,
    pub reason: String,
    pub since_us: u64,
}
