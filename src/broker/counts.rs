//! What the data plane counts. Every handle is made once; what is counted is counted per batch or per entry, never per
//! message.

use std::collections::HashMap;
use std::time::Instant;

use metrics::{Counter, Histogram, counter, histogram};
use parking_lot::Mutex;

use super::ingest::Outcome;
use crate::base::metric_names as names;
use crate::machine::ItemOutcome;

/// The handles.
pub struct BrokerMetrics {
    stored: Counter,
    duplicate: Counter,
    /// By reason word: a closed set, of which few are ever seen.
    refused: Mutex<HashMap<&'static str, Counter>>,
    published_messages: Counter,
    published_bytes: Counter,
    read_messages: Counter,
    read_bytes: Counter,
    publish_duration: Histogram,
    entry_bytes: Histogram,
    entry_items: Histogram,
    pub(super) expiry_runs: Counter,
}

impl Default for BrokerMetrics {
    fn default() -> Self {
        let outcome = |outcome| counter!(names::BROKER_PUBLISHES_TOTAL, "outcome" => outcome, "reason" => "none");
        Self {
            stored: outcome("stored"),
            duplicate: outcome("duplicate"),
            refused: Mutex::default(),
            published_messages: counter!(names::BROKER_PUBLISHED_MESSAGES_TOTAL),
            published_bytes: counter!(names::BROKER_PUBLISHED_BYTES_TOTAL),
            read_messages: counter!(names::BROKER_READ_MESSAGES_TOTAL),
            read_bytes: counter!(names::BROKER_READ_BYTES_TOTAL),
            publish_duration: histogram!(names::BROKER_PUBLISH_DURATION_SECONDS),
            entry_bytes: histogram!(names::BROKER_ENTRY_BYTES),
            entry_items: histogram!(names::BROKER_ENTRY_ITEMS),
            expiry_runs: counter!(names::BROKER_EXPIRY_RUNS_TOTAL),
        }
    }
}

impl BrokerMetrics {
    /// A batch of so many bytes has its outcome. One that was handed to its shard is counted here and nowhere else.
    pub(super) fn answered(&self, submitted: Instant, bytes: usize, outcome: &Outcome) {
        self.publish_duration.record(submitted.elapsed().as_secs_f64());
        match outcome {
            Ok(ItemOutcome::Stored(stored)) if !stored.whole_duplicate => {
                self.stored.increment(1);
                self.published_messages.increment(stored.last.since(stored.first) + 1);
                self.published_bytes.increment(bytes as u64);
            }
            Ok(ItemOutcome::Stored(_) | ItemOutcome::AllDuplicates(_)) => self.duplicate.increment(1),
            Ok(ItemOutcome::Refused(refusal)) => self.refused(refusal.reason()),
            Err(e) => self.refused(e.reason()),
        }
    }

    /// A batch or a publish was refused; `reason` is a word of `docs/reference/errors.md`.
    pub fn refused(&self, reason: &'static str) {
        let mut refused = self.refused.lock();
        let counter = refused
            .entry(reason)
            .or_insert_with(|| counter!(names::BROKER_PUBLISHES_TOTAL, "outcome" => "refused", "reason" => reason));
        counter.increment(1);
    }

    /// An entry was made of so many batches.
    pub(super) fn entry(&self, items: usize, bytes: usize) {
        self.entry_items.record(items as f64);
        self.entry_bytes.record(bytes as f64);
    }

    /// Messages were handed to a client's session or answer.
    pub fn read(&self, messages: u64, bytes: u64) {
        self.read_messages.increment(messages);
        self.read_bytes.increment(bytes);
    }
}
