//! How far a replica's log may be purged. What `state/` holds durably is not needed here any more, but a replica that
//! is a little behind is caught up from the log far more cheaply than by a snapshot, and one that is receiving a
//! snapshot needs every entry behind it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How much of its log a replica keeps beyond its own need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogKeep {
    /// A leader keeps at most this much for replicas that are behind; further behind, they get a snapshot.
    pub leader_bytes: u64,
    /// A follower keeps this much: it may lead next, and does not know who is behind.
    pub follower_bytes: u64,
}

impl Default for LogKeep {
    fn default() -> Self {
        Self {
            leader_bytes: 256 << 20,
            follower_bytes: 4 << 20,
        }
    }
}

/// Points remembered, at least one flush apart.
const POINTS_MAX: usize = 256;
/// After a transfer the entries behind it are still kept for so long, until the replica is seen to follow.
const LINGER: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Inner {
    /// As last decided. `None`: no limit.
    limit: Option<u64>,
    /// (durable index, bytes ever appended) at each flush, ascending.
    points: VecDeque<(u64, u64)>,
    /// Snapshots on their way: entries above the index are needed. With an instant: until then.
    pins: Vec<(u64, u64, Option<Instant>)>,
    next_pin: u64,
}

/// What the others of a group still need of this replica's log.
#[derive(Debug, Default)]
pub struct PurgeHold(Mutex<Inner>);

/// Who else is in the group, as this replica knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Nobody.
    None,
    /// This replica follows: it does not know where the others are.
    Unknown,
    /// This replica leads; the one furthest behind has everything up to here.
    Behind(u64),
}

impl PurgeHold {
    /// Decides anew, after a flush that made everything up to `durable` so. `appended_bytes` of the log, ever.
    pub fn update(&self, durable: u64, appended_bytes: u64, others: Others, keep: LogKeep) {
        let mut inner = self.0.lock();
        if inner.points.back().is_none_or(|(index, _)| *index < durable) {
            inner.points.push_back((durable, appended_bytes));
        }
        while inner.points.len() > POINTS_MAX {
            inner.points.pop_front();
        }
        // The newest point that so many bytes were appended behind; nothing known is the beginning.
        let behind = |bytes: u64| {
            let enough = |at: u64| appended_bytes.saturating_sub(at) >= bytes;
            let newest = inner.points.iter().rev().find(|(_, at)| enough(*at));
            newest.map_or(0, |(index, _)| *index)
        };
        inner.limit = match others {
            Others::None => None,
            Others::Unknown => Some(behind(keep.follower_bytes)),
            Others::Behind(index) => Some(index.max(behind(keep.leader_bytes))),
        };
    }

    /// How far the log may go, of what is durable. `None`: not at all.
    pub fn limit(&self, durable: u64) -> Option<u64> {
        let mut inner = self.0.lock();
        let now = Instant::now();
        inner.pins.retain(|(_, _, until)| until.is_none_or(|u| u > now));
        let pinned = inner.pins.iter().map(|(_, index, _)| *index).min();
        let upto = [inner.limit, pinned].into_iter().flatten().fold(durable, u64::min);
        (upto > 0).then_some(upto)
    }

    /// Keeps every entry above `index` as long as the pin lives, and a little longer (trap F).
    pub fn pin(self: &Arc<Self>, index: u64) -> PurgePin {
        let mut inner = self.0.lock();
        let id = inner.next_pin;
        inner.next_pin += 1;
        inner.pins.push((id, index, None));
        PurgePin { hold: self.clone(), id }
    }
}

/// A snapshot on its way.
#[derive(Debug)]
pub struct PurgePin {
    hold: Arc<PurgeHold>,
    id: u64,
}

impl Drop for PurgePin {
    fn drop(&mut self) {
        let until = Instant::now() + LINGER;
        for (id, _, end) in &mut self.hold.0.lock().pins {
            if *id == self.id {
                *end = Some(until);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_kept_for_those_behind_up_to_a_bound() {
        let hold = Arc::new(PurgeHold::default());
        let keep = LogKeep::default();
        assert_eq!(hold.limit(100), Some(100));
        hold.update(100, 1 << 20, Others::Behind(40), keep);
        assert_eq!(hold.limit(100), Some(40));
        hold.update(200, 300 << 20, Others::Behind(40), keep);
        assert_eq!(hold.limit(200), Some(100), "too far behind: 300 MiB since");
        hold.update(300, 301 << 20, Others::Unknown, keep);
        assert_eq!(hold.limit(300), Some(100), "a follower keeps the last MiBs");
        hold.update(400, 310 << 20, Others::Unknown, keep);
        assert_eq!(hold.limit(400), Some(300));
        hold.update(400, 310 << 20, Others::None, keep);
        assert_eq!(hold.limit(400), Some(400));
    }

    #[test]
    fn trap_f_a_transfer_holds_back_the_purge() {
        let hold = Arc::new(PurgeHold::default());
        let pin = hold.pin(50);
        let later = hold.pin(70);
        assert_eq!(hold.limit(100), Some(50));
        drop(pin);
        assert_eq!(hold.limit(100), Some(50), "until the replica is seen to follow");
        drop(later);
        assert_eq!(hold.limit(30), Some(30));
    }
}
