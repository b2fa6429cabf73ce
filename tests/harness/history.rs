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
//! * a batch that expected something is there only where that held;
//! * nothing else is there;
//! * and all of this is the same on every replica.
//!
//! Reads are linearizable: one that began after something was acknowledged, or read, sees it.

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

/// What a batch expected of its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    Last(u64),
    OfSubject { subject: String, last: u64 },
}

struct Attempt {
    stream: String,
    shard: u32,
    /// Whose batches keep their order, and the place in that order; 0: nobody's.
    producer: u64,
    digests: Vec<u64>,
    state: State,
    expect: Option<Expect>,
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
    /// By stream and shard: no read that begins now may end before this tail.
    tails: BTreeMap<(String, u32), u64>,
    wrong: Vec<String>,
}

impl Inner {
    fn raise_tail(&mut self, stream: &str, shard: u32, tail: u64) {
        let known = self.tails.entry((stream.into(), shard)).or_insert(1);
        *known = tail.max(*known);
    }
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
    /// Stored batches whose expectation was looked at.
    pub expectations: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Tally) {
        self.messages += other.messages;
        self.acked_batches += other.acked_batches;
        self.unknown_there += other.unknown_there;
        self.unknown_absent += other.unknown_absent;
        self.expectations += other.expectations;
    }
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
            expect: None,
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
        let stream = a.stream.clone();
        h.wrong.extend(wrong);
        h.raise_tail(&stream, shard, last + 1);
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
            h.raise_tail(stream, m.shard, m.sequence + 1);
        }
    }

    /// A batch that is about to be sent expects this.
    pub fn expects(&self, number: u64, expect: Expect) {
        let mut h = self.inner();
        h.attempts.get_mut(&number).expect("was sent").expect = Some(expect);
    }

    /// An expectation was refused: this is there instead. `before` is the shard's tail as known before it was sent.
    pub fn expectation_failed(&self, number: u64, actual: u64, before: u64) {
        self.refused(number);
        let mut h = self.inner();
        let a = &h.attempts[&number];
        let wrong = match &a.expect {
            Some(Expect::Last(last)) if *last == actual => Some("what it expected was found, and refused".to_string()),
            Some(Expect::Last(_)) if actual + 1 < before => Some(format!(
                "refused because of sequence {actual}, when {} was acknowledged",
                before - 1
            )),
            Some(Expect::OfSubject { last, .. }) if *last == actual => {
                Some("what it expected of the subject was found, and refused".to_string())
            }
            Some(Expect::Last(_) | Expect::OfSubject { .. }) => None,
            None => Some("refused for an expectation that it did not have".into()),
        };
        let wrong = wrong.map(|w| format!("{} shard {}, batch {number}: {w}", a.stream, a.shard));
        h.wrong.extend(wrong);
    }

    /// A read of the shard that begins now must come to this tail at least.
    pub fn tail(&self, stream: &str, shard: u32) -> u64 {
        let h = self.inner();
        h.tails.get(&(stream.to_string(), shard)).copied().unwrap_or(1)
    }

    /// A linearizable read, begun when `tail()` was `before`, came to `tail`.
    pub fn read_to(&self, who: &str, stream: &str, shard: u32, before: u64, tail: u64) {
        let mut h = self.inner();
        if tail < before {
            h.wrong.push(format!(
                "{stream} shard {shard}: a read at {who} came to tail {tail}, after {before} was known: stale"
            ));
        }
        h.raise_tail(stream, shard, tail);
    }

    /// What was noted as wrong so far.
    pub fn wrong(&self) -> Vec<String> {
        self.inner().wrong.clone()
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
        tally.expectations = held(stream, &h, stored, &found, &mut wrong);
        if wrong.is_empty() {
            return Ok(tally);
        }
        let count = wrong.len();
        wrong.truncate(20);
        wrong.push(format!("… {count} in all"));
        Err(wrong)
    }
}

/// Whether stored batches had what they expected before them. Returns how many expected something.
fn held(
    stream: &str,
    h: &Inner,
    stored: &[Read],
    found: &BTreeMap<u64, Vec<(u32, u64)>>,
    wrong: &mut Vec<String>,
) -> u64 {
    let mut looked_at = 0;
    let mut of: BTreeMap<(u32, &str), Vec<u64>> = BTreeMap::new();
    for m in stored {
        of.entry((m.shard, &m.record.subject)).or_default().push(m.sequence);
    }
    for (number, records) in found {
        let a = &h.attempts[number];
        let (Some(expect), Some((_, first))) = (&a.expect, records.first()) else {
            continue;
        };
        looked_at += 1;
        let (expected, actual) = match expect {
            Expect::Last(last) => (*last, first - 1),
            Expect::OfSubject { subject, last } => {
                let all = of
                    .get(&(a.shard, subject.as_str()))
                    .map(Vec::as_slice)
                    .unwrap_or_default();
                (
                    *last,
                    all[..all.partition_point(|s| s < first)].last().copied().unwrap_or(0),
                )
            }
        };
        if expected != actual {
            wrong.push(format!(
                "{stream} shard {}, batch {number}: stored at {first} though it expected {expect:?}: {actual} was there",
                a.shard
            ));
        }
    }
    looked_at
}

/// Two copies of a stream must be the same, message by message.
pub fn same(stream: &str, (one, a): (&str, &[Read]), (other, b): (&str, &[Read])) -> Result<(), String> {
    if a.len() != b.len() {
        return Err(format!(
            "{stream}: {} messages at {one}, {} at {other}",
            a.len(),
            b.len()
        ));
    }
    match a.iter().zip(b).find(|(x, y)| x != y) {
        None => Ok(()),
        Some((x, y)) => Err(format!(
            "{stream}: {one} has shard {} sequence {} ({:016x}, {} µs), {other} has shard {} sequence {} ({:016x}, {} µs)",
            x.shard,
            x.sequence,
            digest(&x.record),
            x.append_time_us,
            y.shard,
            y.sequence,
            digest(&y.record),
            y.append_time_us,
        )),
    }
}

fn brief(records: &[(u32, u64)]) -> String {
    match (records.first(), records.last()) {
        (Some(f), Some(l)) => format!("{} records at {}..={}", records.len(), f.1, l.1),
        _ => "nothing".into(),
    }
}
