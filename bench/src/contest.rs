//! What contestants do: the loads, the trait, the meter, the turns.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::future::BoxFuture;

use crate::lab::Lab;
use crate::process::settle_disk;
use crate::report::number;

/// Asynchronous publishing of random messages to one new stream on a new server, for a time.
#[derive(Debug, Clone)]
pub struct PublishLoad {
    pub message_bytes: usize,
    pub subjects: usize,
    pub shards: u32,
    /// One node for each.
    pub replicas: u32,
    /// Every sync takes this long (preload library).
    pub sync_ms: Option<u64>,
    /// Size of a batch: what Mainstem's publisher fills, and what the storage limit writes.
    pub batch_bytes: usize,
    /// Bytes that Mainstem's last turn wrote with one sync, on average: the storage limit does the same. 0: not known.
    pub sync_bytes: Arc<AtomicU64>,
    pub warmup: Duration,
    pub measure: Duration,
}

impl PublishLoad {
    pub fn new(lab: &Lab, message_bytes: usize, subjects: usize) -> Self {
        Self {
            message_bytes,
            subjects,
            shards: 1,
            replicas: 1,
            sync_ms: None,
            batch_bytes: 256 << 10,
            sync_bytes: Arc::default(),
            warmup: lab.warmup,
            measure: lab.measure,
        }
    }

    pub fn sync_bytes_seen(&self, bytes: u64) {
        self.sync_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Two batches, one of each publisher, where Mainstem has not shown what it does.
    pub fn sync_bytes(&self) -> u64 {
        match self.sync_bytes.load(Ordering::Relaxed) {
            0 => 2 * self.batch_bytes as u64,
            seen => seen,
        }
    }

    pub fn conditions(&self) -> BTreeMap<String, String> {
        let mut conditions = BTreeMap::new();
        let mut put = |name: &str, value: String| conditions.insert(name.to_owned(), value);
        put("message_bytes", format!("{} (random payload)", self.message_bytes));
        put("subjects", self.subjects.to_string());
        put("shards", self.shards.to_string());
        put("replicas", self.replicas.to_string());
        put("message_ids", "none".to_owned());
        conditions
    }
}

/// What a turn gave: messages (or whatever is counted) a second, and what else there is to tell.
pub struct Turn {
    pub rate: f64,
    pub told: BTreeMap<String, String>,
}

pub trait Publishes: Send + Sync {
    /// As it is called in the report.
    fn name(&self) -> &'static str;
    fn publish<'a>(&'a self, lab: &'a Lab, load: &'a PublishLoad) -> BoxFuture<'a, Result<Turn>>;
}

/// Every contestant's rates, round by round, and what the last turn of each told.
pub struct Outcome {
    pub rates: Vec<Vec<f64>>,
    pub told: BTreeMap<String, String>,
}

/// All contestants in turn, as many rounds as the lab says, each round beginning with another one.
pub async fn alternate(lab: &Lab, load: &PublishLoad, contestants: &[&dyn Publishes]) -> Result<Outcome> {
    let mut outcome = Outcome {
        rates: vec![Vec::new(); contestants.len()],
        told: BTreeMap::new(),
    };
    for round in 0..lab.rounds {
        for place in 0..contestants.len() {
            let which = (round + place) % contestants.len();
            let contestant = contestants[which];
            if !lab.takes_part(contestant.name()) {
                continue;
            }
            settle(lab.scratch()).await?;
            let turn = contestant.publish(lab, load).await?;
            eprintln!(
                "  round {}: {:<16} {:>12} msg/s",
                round + 1,
                contestant.name(),
                number(turn.rate)
            );
            outcome.rates[which].push(turn.rate);
            for (name, value) in turn.told {
                outcome.told.insert(format!("{}.{name}", contestant.name()), value);
            }
        }
    }
    Ok(outcome)
}

/// Processor time of a contestant's servers, per message, from the readings at both ends.
pub fn tell_cpu(told: &mut BTreeMap<String, String>, readings: Vec<Result<Duration>>, messages: u64) {
    if let [Ok(before), Ok(after)] = readings.as_slice() {
        let micros = (*after - *before).as_secs_f64() * 1e6 / messages.max(1) as f64;
        told.insert("server_cpu".to_owned(), format!("{micros:.2} µs per message"));
    }
}

/// See [`settle_disk`].
pub async fn settle(path: &Path) -> Result<()> {
    let path = path.to_path_buf();
    tokio::task::spawn_blocking(move || settle_disk(&path)).await?
}

/// Counts what publishers have acknowledged, and tells them when to end.
#[derive(Clone)]
pub struct Meter {
    counts: Arc<[Count]>,
    stopped: Arc<AtomicBool>,
}

/// A cache line of its own, so that publishers do not slow each other.
#[repr(align(128))]
#[derive(Default)]
struct Count(AtomicU64);

impl Meter {
    pub fn new(publishers: usize) -> Self {
        Self {
            counts: (0..publishers).map(|_| Count::default()).collect(),
            stopped: Arc::default(),
        }
    }

    pub fn add(&self, publisher: usize, messages: u64) {
        self.counts[publisher].0.fetch_add(messages, Ordering::Relaxed);
    }

    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().map(|c| c.0.load(Ordering::Relaxed)).sum()
    }

    /// Lets the publishers warm up, measures, tells them to end. Messages a second, and how many were measured.
    pub async fn measure(&self, warmup: Duration, measure: Duration, at_edge: impl FnMut()) -> (f64, u64) {
        let mut at_edge = at_edge;
        tokio::time::sleep(warmup).await;
        let (begin, before) = (Instant::now(), self.total());
        at_edge();
        tokio::time::sleep(measure).await;
        let (elapsed, after) = (begin.elapsed(), self.total());
        at_edge();
        self.stop();
        let messages = after - before;
        (messages as f64 / elapsed.as_secs_f64(), messages)
    }
}
