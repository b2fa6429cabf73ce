//! What was published and what must therefore be found.
//!
//! Every record carries its batch's number and its place in it, so whatever is read names its own origin. After any
//! number of accidents the stored messages of a stream must satisfy:
//!
//! * sequences are dense from 1;
//! * an acknowledged batch is there once, whole, unchanged, at the sequences of its ack;
//! * a batch whose outcome is unknown is there once and whole, or not at all; and what a check found, or did not find,
//!   stays so;
//! * a batch that was refused as "did not happen" or "cannot work" is not there;
//! * the batches of one producer in one shard are in the order in which they were sent;
//! * what a reader has ever seen at a sequence is what is there;
//! * nothing else is there.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use super::api::Read;
use super::batch::Record;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Sent, or about to be sent again.
    Open,
    /// Its producer has given up without an answer.
    Unknown,
    /// At these sequences: by its ack, or because a check found it.
    There {
        first: u64,
    },
    Refused,
    /// A check did not find it after its producer had given up.
    Absent,
}

struct Attempt {
    stream: String,
    shard: u32,
    /// Whose batches keep their order, and the place in that order; 0: nobody's.
    producer: u64,
    digests: Vec<u64>,
    state: State,
    /// A check has found it already.
    found: bool,
}

#[derive(Default)]
struct Inner {
    /// By number; the numbers of one producer ascend in the order of sending.
    attempts: BTreeMap<u64, Attempt>,
    producers: u64,
    /// Digest of what a reader has seen, by stream, shard and sequence.
    seen: BTreeMap<(String, u32, u64), u64>,
    wrong: Vec<String>,
}

pub struct History {
    inner: Mutex<Inner>,
    /// Acknowledged batches.
    acked: watch::Sender<u64>,
}

/// What a check has counted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub messages: u64,
    pub acked_batches: u64,
    /// Unknown outcomes that turned out to be stored, and not to be.
    pub unknown_there: u64,
    pub unknown_absent: u64,
}

const MARK: &[u8; 4] = b"mst1";

fn digest(record: &Record) -> u64 {
    xxh3_64(&record.content())
}

impl Default for History {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            acked: watch::Sender::new(0),
        }
    }
}

impl History {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// A new line of order.
    pub fn producer(&self) -> u64 {
        let mut h = self.inner();
        h.producers += 1;
        h.producers
    }

    /// Notes that a batch is about to be sent for the first time. Marks the payloads; returns the batch's number.
    pub fn sending(&self, stream: &str, shard: u32, producer: u64, records: &mut [Record]) -> u64 {
        let mut h = self.inner();
        let number = h.attempts.last_key_value().map_or(1, |(n, _)| n + 1);
        for (i, record) in records.iter_mut().enumerate() {
            let mut payload = MARK.to_vec();
            payload.extend(number.to_le_bytes());
            payload.extend((i as u32).to_le_bytes());
            payload.append(&mut record.payload);
            record.payload = payload;
        }
        let attempt = Attempt {
            stream: stream.into(),
            shard,
            producer,
            digests: records.iter().map(digest).collect(),
            state: State::Open,
            found: false,
        };
        h.attempts.insert(number, attempt);
        number
    }

    /// The batch was acknowledged at these sequences.
    pub fn acked(&self, number: u64, shard: u32, first: u64, last: u64) {
        let mut h = self.inner();
        let a = h.attempts.get_mut(&number).expect("was sent");
        let count = a.digests.len() as u64;
        let mut wrong = Vec::new();
        if last + 1 - first != count || first == 0 {
            wrong.push(format!(
                "batch {number} of {count} records was acknowledged at {first}..={last}"
            ));
        }
        if shard != a.shard {
            wrong.push(format!(
                "batch {number} for shard {} was acknowledged in shard {shard}",
                a.shard
            ));
        }
        match a.state {
            State::There { first: before } if before != first => {
                wrong.push(format!(
                    "batch {number} was at {before}, and is now acknowledged at {first}"
                ));
            }
            State::Refused | State::Absent => {
                wrong.push(format!(
                    "batch {number} was {:?}, and is now acknowledged at {first}",
                    a.state
                ));
            }
            State::Open | State::Unknown | State::There { .. } => {}
        }
        a.state = State::There { first };
        h.wrong.extend(wrong);
        drop(h);
        self.acked.send_modify(|n| *n += 1);
    }

    /// The batch was refused by an answer that says it is not stored.
    pub fn refused(&self, number: u64) {
        let mut h = self.inner();
        let a = h.attempts.get_mut(&number).expect("was sent");
        match a.state {
            State::There { first } => {
                let text = format!("batch {number} is at {first}, and was refused as not stored");
                h.wrong.push(text);
            }
            State::Open | State::Unknown | State::Refused | State::Absent => a.state = State::Refused,
        }
    }

    /// The producer will not learn what became of the batch.
    pub fn gave_up(&self, number: u64) {
        let mut h = self.inner();
        let a = h.attempts.get_mut(&number).expect("was sent");
        if a.state == State::Open {
            a.state = State::Unknown;
        }
    }

    /// A reader was given this.
    pub fn saw(&self, stream: &str, messages: &[Read]) {
        let mut h = self.inner();
        for m in messages {
            let now = digest(&m.record);
            let before = h.seen.insert((stream.into(), m.shard, m.sequence), now);
            if before.is_some_and(|b| b != now) {
                let text = format!(
                    "{stream} shard {}: sequence {} was read twice and differs",
                    m.shard, m.sequence
                );
                h.wrong.push(text);
            }
        }
    }

    /// Notes something that must not be.
    pub fn violated(&self, what: String) {
        self.inner().wrong.push(what);
    }

    pub fn acked_batches(&self) -> u64 {
        *self.acked.borrow()
    }

    /// Waits until so many batches are acknowledged in all.
    pub async fn wait_acked(&self, n: u64) {
        let mut rx = self.acked.subscribe();
        // The sender lives as long as `self`.
        let _ = tokio::time::timeout(super::PATIENCE, rx.wait_for(|acked| *acked >= n))
            .await
            .unwrap_or_else(|_| panic!("only {} of {n} batches were acknowledged", self.acked_batches()));
    }

    /// Compares everything that is stored in a stream with what must be.
    pub fn check(&self, stream: &str, stored: &[Read]) -> Result<Tally, Vec<String>> {
        let mut h = self.inner();
        let mut wrong = std::mem::take(&mut h.wrong);
        let mut tally = Tally {
            messages: stored.len() as u64,
            ..Tally::default()
        };
        let mut next: BTreeMap<u32, u64> = BTreeMap::new();
        // By batch: place in it and sequence of every record found.
        let mut found: BTreeMap<u64, Vec<(u32, u64)>> = BTreeMap::new();
        let mut times: BTreeMap<u32, u64> = BTreeMap::new();
        for m in stored {
            let at = format!("{stream} shard {} sequence {}", m.shard, m.sequence);
            let expected = next.entry(m.shard).or_insert(1);
            if m.sequence != *expected {
                wrong.push(format!("{at}: expected {expected}"));
            }
            *expected = m.sequence + 1;
            let time = times.entry(m.shard).or_default();
            if m.append_time_us < *time {
                wrong.push(format!("{at}: appended before the message before it"));
            }
            *time = m.append_time_us;
            let p = &m.record.payload;
            let (Some(MARK), Some(number), Some(place)) = (p.first_chunk::<4>(), p.get(4..12), p.get(12..16)) else {
                wrong.push(format!("{at}: not one of ours"));
                continue;
            };
            let number = u64::from_le_bytes(number.try_into().unwrap());
            let place = u32::from_le_bytes(place.try_into().unwrap());
            match h.attempts.get(&number) {
                Some(a) if a.stream == stream && a.shard == m.shard => {
                    if a.digests.get(place as usize) != Some(&digest(&m.record)) {
                        wrong.push(format!("{at}: record {place} of batch {number} was changed"));
                    }
                    found.entry(number).or_default().push((place, m.sequence));
                }
                Some(a) => wrong.push(format!("{at}: batch {number} was for {} shard {}", a.stream, a.shard)),
                None => wrong.push(format!("{at}: batch {number} was never sent")),
            }
            if let Some(seen) = h.seen.get(&(stream.to_string(), m.shard, m.sequence))
                && *seen != digest(&m.record)
            {
                wrong.push(format!("{at}: a reader saw something else there"));
            }
        }
        for (_, shard, sequence) in h.seen.keys().filter(|(s, _, _)| s == stream) {
            if sequence >= next.get(shard).unwrap_or(&1) {
                wrong.push(format!(
                    "{stream} shard {shard} sequence {sequence}: a reader saw it, and it is gone"
                ));
            }
        }
        let mut last_of: BTreeMap<(u64, u32), (u64, u64)> = BTreeMap::new();
        for (&number, a) in h.attempts.iter_mut().filter(|(_, a)| a.stream == stream) {
            let records = found.get(&number).map(Vec::as_slice).unwrap_or_default();
            let first = records.first().map(|r| r.1);
            let whole = records.len() == a.digests.len()
                && records
                    .iter()
                    .zip(0..)
                    .all(|(r, i)| r.0 == i && r.1 == first.unwrap_or(0) + u64::from(i));
            let at = format!(
                "{stream} shard {}, batch {number} of {} records",
                a.shard,
                a.digests.len()
            );
            match (a.state, first) {
                (State::There { first: told }, _) => {
                    if !whole || first != Some(told) {
                        let by = if a.found { "found before" } else { "acknowledged" };
                        wrong.push(format!("{at}: {by} at {told}, now {}", brief(records)));
                    }
                    tally.acked_batches += 1;
                }
                (State::Refused | State::Absent, Some(_)) => {
                    wrong.push(format!("{at}: {:?} before, now {}", a.state, brief(records)));
                }
                (State::Open | State::Unknown, Some(first)) => {
                    if !whole {
                        wrong.push(format!(
                            "{at}: unknown outcome, found in part or twice: {}",
                            brief(records)
                        ));
                    }
                    a.state = State::There { first };
                    tally.unknown_there += 1;
                }
                (State::Unknown, None) => {
                    a.state = State::Absent;
                    tally.unknown_absent += 1;
                }
                (State::Open | State::Refused | State::Absent, None) => {}
            }
            a.found |= first.is_some();
            if let (Some(first), true) = (first, a.producer > 0)
                && let Some((before, at_before)) = last_of.insert((a.producer, a.shard), (number, first))
                && at_before > first
            {
                wrong.push(format!(
                    "{at}: at {first}, but batch {before}, sent earlier, is at {at_before}"
                ));
            }
        }
        if wrong.is_empty() {
            return Ok(tally);
        }
        let count = wrong.len();
        wrong.truncate(20);
        wrong.push(format!("… {count} in all"));
        Err(wrong)
    }
}

fn brief(records: &[(u32, u64)]) -> String {
    match (records.first(), records.last()) {
        (Some(f), Some(l)) => format!("{} records at {}..={}", records.len(), f.1, l.1),
        _ => "nothing".into(),
    }
}
