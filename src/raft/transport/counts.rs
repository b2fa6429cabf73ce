//! What is counted of the sessions with other nodes.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

use crate::base::metric_names as names;

/// Counters of a session's calling side.
pub(super) struct CallCounts {
    answered: Counter,
    lost: Counter,
    given_up: Counter,
    round_trip: Histogram,
    received: Counter,
}

impl CallCounts {
    pub fn new() -> Self {
        let calls = |outcome: &'static str| metrics::counter!(names::RAFT_PEER_CALLS_TOTAL, "outcome" => outcome);
        Self {
            answered: calls("answered"),
            lost: calls("lost"),
            given_up: calls("given_up"),
            round_trip: metrics::histogram!(names::RAFT_PEER_ROUND_TRIP_SECONDS),
            received: received_bytes(),
        }
    }

    pub fn received(&self, bytes: usize) {
        self.received.increment(bytes as u64);
    }

    /// A call that goes ahead of everything else was answered.
    pub fn round_trip(&self, took: Duration) {
        self.round_trip.record(took.as_secs_f64());
    }

    /// How a call ended: `None`: nobody waits for its answer any more.
    pub fn ended(&self, answered: Option<bool>) {
        match answered {
            Some(true) => self.answered.increment(1),
            Some(false) => self.lost.increment(1),
            None => self.given_up.increment(1),
        }
    }
}

/// Bytes of frames that came from other nodes.
pub(super) fn received_bytes() -> Counter {
    metrics::counter!(names::RAFT_PEER_RECEIVED_BYTES_TOTAL)
}

/// Bytes of frames sent to other nodes.
pub(super) fn sent_bytes() -> Counter {
    metrics::counter!(names::RAFT_PEER_SENT_BYTES_TOTAL)
}

/// A session that this node has made and that lives, for as long as this does.
pub(super) struct Up(Gauge);

impl Up {
    pub fn new() -> Self {
        let up = metrics::gauge!(names::RAFT_PEER_SESSIONS);
        up.increment(1.0);
        Self(up)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
