//! The snapshots that travel from and to this node: what of them is done, how fast they go, and the rate they share.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::base::metric_names as names;
use crate::model::{GroupId, ReplicaId};

/// The rate is that of so long.
const RATE_OVER: Duration = Duration::from_secs(10);
/// Samples of it, at most.
const SAMPLES_MAX: usize = 20;

/// Which way a snapshot travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SnapshotWay {
    Sent,
    Received,
}

impl SnapshotWay {
    /// As a label.
    pub fn as_str(self) -> &'static str {
        match self {
            SnapshotWay::Sent => "sent",
            SnapshotWay::Received => "received",
        }
    }
}

/// How far a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SnapshotPhase {
    /// It is found out what the receiver has already.
    Comparing,
    Transferring,
    /// Everything was sent; the receiver checks it and takes it over.
    Installing,
}

/// A snapshot that travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotProgress {
    pub way: SnapshotWay,
    pub phase: SnapshotPhase,
    pub group: GroupId,
    /// The replica that gets it.
    pub to: ReplicaId,
    /// What has to travel; an estimate unless the receiver has compared.
    pub total_bytes: u64,
    /// What of it has travelled.
    pub bytes: u64,
    /// What need not travel, because the receiver has it.
    pub reused_bytes: u64,
    /// Of the last seconds.
    pub bytes_per_second: u64,
    pub since: SystemTime,
    pub running_for: Duration,
}

impl SnapshotProgress {
    /// What has yet to travel, as far as is known.
    pub fn left_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.bytes)
    }
}

#[derive(Debug)]
struct Meter {
    phase: SnapshotPhase,
    total_bytes: u64,
    bytes: u64,
    reused_bytes: u64,
    /// When so many bytes had travelled, oldest first.
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    fn add(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        let step = RATE_OVER / SAMPLES_MAX as u32;
        if self
            .samples
            .back()
            .is_none_or(|(at, _)| now.duration_since(*at) >= step)
        {
            self.samples.push_back((now, self.bytes));
        }
        while self.samples.len() > SAMPLES_MAX {
            self.samples.pop_front();
        }
    }

    fn rate(&self, now: Instant) -> u64 {
        let recent = |(at, _): &&(Instant, u64)| now.duration_since(*at) <= RATE_OVER;
        let Some((from, before)) = self.samples.iter().find(recent) else {
            return 0;
        };
        let seconds = now.duration_since(*from).as_secs_f64().max(0.1);
        ((self.bytes - before) as f64 / seconds) as u64
    }
}

/// One that runs.
pub(super) struct Running {
    way: SnapshotWay,
    group: GroupId,
    to: ReplicaId,
    begun: Instant,
    since: SystemTime,
    meter: Mutex<Meter>,
    counter: metrics::Counter,
}

impl Running {
    pub fn phase(&self, phase: SnapshotPhase) {
        self.meter.lock().phase = phase;
    }

    /// What has to travel in all, and what need not.
    pub fn expect(&self, total_bytes: u64, reused_bytes: u64) {
        let mut meter = self.meter.lock();
        meter.total_bytes = total_bytes;
        meter.reused_bytes = reused_bytes;
    }

    pub fn add(&self, bytes: u64) {
        self.meter.lock().add(bytes, Instant::now());
        self.counter.increment(bytes);
    }

    pub fn bytes(&self) -> u64 {
        self.meter.lock().bytes
    }

    fn progress(&self) -> SnapshotProgress {
        let now = Instant::now();
        let meter = self.meter.lock();
        SnapshotProgress {
            way: self.way,
            phase: meter.phase,
            group: self.group,
            to: self.to,
            total_bytes: meter.total_bytes.max(meter.bytes),
            bytes: meter.bytes,
            reused_bytes: meter.reused_bytes,
            bytes_per_second: meter.rate(now),
            since: self.since,
            running_for: self.begun.elapsed(),
        }
    }
}

/// Bytes a second, shared by everyone who asks. Nothing is saved up: after a pause it goes on at the rate.
#[derive(Debug)]
pub(super) struct Pacer {
    /// 0: as fast as it goes.
    bytes_per_second: u64,
    /// When the bytes asked for so far have had their time.
    free_at: Mutex<Option<Instant>>,
}

impl Pacer {
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            free_at: Mutex::new(None),
        }
    }

    /// From when on these bytes may travel: the first at once, the next when those before have had their time.
    pub fn turn(&self, bytes: u64, now: Instant) -> Instant {
        if self.bytes_per_second == 0 {
            return now;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut free_at = self.free_at.lock();
        let turn = free_at.map_or(now, |at| at.max(now));
        *free_at = Some(turn + takes);
        turn
    }
}

/// The snapshots that travel, and the rates they share.
pub(super) struct Transfers {
    running: Mutex<BTreeMap<u64, Arc<Running>>>,
    next: AtomicU64,
    pub sent: Pacer,
    pub received: Pacer,
}

impl Transfers {
    /// `bytes_per_second`: each way.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            running: Mutex::default(),
            next: AtomicU64::new(0),
            sent: Pacer::new(bytes_per_second),
            received: Pacer::new(bytes_per_second),
        }
    }

    /// All that run, the oldest first.
    pub fn all(&self) -> Vec<SnapshotProgress> {
        self.running.lock().values().map(|r| r.progress()).collect()
    }

    pub fn begin(&self, way: SnapshotWay, group: GroupId, to: ReplicaId, total_bytes: u64) -> Listed<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let bytes = match way {
            SnapshotWay::Sent => names::RAFT_SNAPSHOT_SENT_BYTES_TOTAL,
            SnapshotWay::Received => names::RAFT_SNAPSHOT_RECEIVED_BYTES_TOTAL,
        };
        let running = Arc::new(Running {
            way,
            group,
            to,
            begun: Instant::now(),
            since: SystemTime::now(),
            meter: Mutex::new(Meter {
                phase: SnapshotPhase::Comparing,
                total_bytes,
                bytes: 0,
                reused_bytes: 0,
                samples: VecDeque::from([(Instant::now(), 0)]),
            }),
            counter: metrics::counter!(bytes),
        });
        self.running.lock().insert(id, running.clone());
        metrics::gauge!(names::RAFT_SNAPSHOT_RUNNING_TRANSFERS, "way" => way.as_str()).increment(1.0);
        Listed {
            transfers: self,
            id,
            running,
        }
    }
}

/// A transfer's place in the list; leaves it however it ends.
pub(super) struct Listed<'a> {
    transfers: &'a Transfers,
    id: u64,
    pub running: Arc<Running>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.transfers.running.lock().remove(&self.id);
        let way = self.running.way.as_str();
        metrics::gauge!(names::RAFT_SNAPSHOT_RUNNING_TRANSFERS, "way" => way).decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_shared_and_nothing_is_saved_up() {
        let begun = Instant::now();
        let after = |seconds: u64| begun + Duration::from_secs(seconds);
        let pacer = Pacer::new(1_000);
        assert_eq!(pacer.turn(2_000, begun), begun, "the first goes at once");
        assert_eq!(pacer.turn(1_000, begun), after(2));
        assert_eq!(pacer.turn(500, begun), after(3), "whoever asks");
        assert_eq!(pacer.turn(1_000, after(60)), after(60), "a pause gives no credit");
        assert_eq!(pacer.turn(1, after(60)), after(61));
    }

    #[test]
    fn none_is_as_fast_as_it_goes_and_the_slowest_still_goes() {
        let begun = Instant::now();
        let free = Pacer::new(0);
        for _ in 0..10 {
            assert_eq!(free.turn(u64::MAX, begun), begun);
        }
        let slow = Pacer::new(1);
        assert_eq!(slow.turn(10, begun), begun);
        assert_eq!(slow.turn(10, begun), begun + Duration::from_secs(10));
        let fast = Pacer::new(u64::MAX);
        assert_eq!(fast.turn(1 << 40, begun), begun);
        assert!(fast.turn(1, begun) < begun + Duration::from_millis(1));
    }

    #[test]
    fn progress_is_told_while_it_runs() {
        let transfers = Transfers::new(0);
        let listed = transfers.begin(SnapshotWay::Sent, GroupId::new(7), ReplicaId::new(71), 500);
        listed.running.phase(SnapshotPhase::Transferring);
        listed.running.expect(1_000, 4_000);
        listed.running.add(300);
        let all = transfers.all();
        let [one] = &all[..] else {
            panic!("one runs: {all:?}");
        };
        assert_eq!((one.bytes, one.left_bytes(), one.reused_bytes), (300, 700, 4_000));
        assert!(one.bytes_per_second > 0 && one.phase == SnapshotPhase::Transferring);
        drop(listed);
        assert_eq!(transfers.all(), []);
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let begun = Instant::now();
        let mut meter = Meter {
            phase: SnapshotPhase::Transferring,
            total_bytes: 0,
            bytes: 0,
            reused_bytes: 0,
            samples: VecDeque::from([(begun, 0)]),
        };
        for second in 1..=60 {
            let bytes = if second <= 30 { 1_000_000 } else { 1_000 };
            meter.add(bytes, begun + Duration::from_secs(second));
        }
        assert_eq!(meter.rate(begun + Duration::from_secs(60)), 1_000);
        assert_eq!(meter.rate(begun + Duration::from_secs(90)), 0);
        assert!(meter.samples.len() <= SAMPLES_MAX);
    }
}
