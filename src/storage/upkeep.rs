//! Background work: flushing state/ by size and time, watching free space, giving back what was trimmed.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::options::StoreOptions;
use super::shared::Shared;
use super::space::SpaceMeter;
use super::state::StateDb;

/// Below `flush_min_bytes`, a flush by time waits this many intervals: each makes a file, and so little pins little.
const IDLE_INTERVALS: u32 = 60;

/// Flushes state/ when asked (by size), or when time has passed and something was written.
pub(super) fn run_flusher(state: &StateDb, interval: Duration, min_bytes: usize) {
    let inner = &*state.0;
    let mut last = Instant::now();
    loop {
        {
            let mut signal = inner.flush_signal.lock();
            if signal.closing {
                return;
            }
            if !signal.wanted {
                inner.flush_wanted.wait_for(&mut signal, interval);
            }
            if signal.closing {
                return;
            }
            let dirty = inner.dirty_bytes.load(Ordering::Relaxed);
            let due = if dirty >= min_bytes {
                interval
            } else {
                interval * IDLE_INTERVALS
            };
            let by_time = dirty > 0 && last.elapsed() >= due;
            if !signal.wanted && !by_time {
                continue;
            }
            signal.wanted = false;
        }
        last = Instant::now();
        if let Err(error) = state.flush() {
            tracing::error!(%error, "state/ is not flushed any more");
            return;
        }
    }
}

/// Ends the space and reclaim tasks.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    closing: Mutex<bool>,
    changed: Condvar,
}

impl Upkeep {
    pub fn close(&self) {
        *self.closing.lock() = true;
        self.changed.notify_all();
    }

    /// Waits; true when it is time to end.
    pub fn wait(&self, time: Duration) -> bool {
        let mut closing = self.closing.lock();
        if !*closing {
            self.changed.wait_for(&mut closing, time);
        }
        *closing
    }

    pub fn is_closing(&self) -> bool {
        *self.closing.lock()
    }
}

/// Measures free space until closed. Apart from the reclaim task, whose compactions take long.
pub(super) fn run_space(meter: &SpaceMeter, shared: &Shared, opts: &StoreOptions, upkeep: &Upkeep) {
    loop {
        if let Err(error) = meter.measure(&opts.dir, shared) {
            tracing::warn!(%error, "could not measure free space");
        }
        meter.read(opts.min_free_bytes, shared);
        if upkeep.wait(opts.space_interval) {
            return;
        }
    }
}
