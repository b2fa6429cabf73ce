//! The one writer of log/: a thread, or for a lone small request on a quick disk its caller. It takes what all groups
//! ask for, writes it as one batch, syncs once, notes the write in the witness and then completes the requests in
//! order. There is no timer: a lone request is written at once, and while a sync runs the next batch grows. A failed
//! write or sync poisons the store.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::{DB, FlushOptions, WriteBatch};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::engine;
use super::error::StorageError;
use super::keys::{self, Key};
use super::log::{GroupLog, Groups, LogInner};
use super::metric_names as names;
use super::queue::{Done, Op, Queue, Request, Taken};
use super::record::{frame, frame_into};
use super::shared::Shared;
use super::witness::{Mark, Witness};
use crate::model::{GroupId, LogIndex, ReplicaId};

/// Bytes of a RocksDB batch before its records: sequence (8) and count (4). RocksDB fills them in later.
pub(super) const BATCH_HEAD_BYTES: usize = 12;
/// Up to this many entries are removed one by one; more by a range deletion. Range deletions slow reads down.
const POINT_DELETES_MAX: u64 = 64;
/// After this many range deletions the write buffer is flushed, which resolves them.
const RANGE_DELETES_MAX: usize = 4096;

/// A request is committed on its caller's thread only if it is small, nothing was written for a while (else others are
/// about to come, and would share the sync), and syncs have been quick: the caller's thread serves other tasks too.
const ALONE_BYTES_MAX: usize = 16 << 10;
const ALONE_IDLE_MIN: Duration = Duration::from_micros(50);
const ALONE_SYNC_MAX: Duration = Duration::from_micros(500);

/// What the next entry of a group must be, once everything taken so far is written.
#[derive(Debug, Clone, Copy, Default)]
struct Plan {
    /// Lowest index that may be on disk.
    low: u64,
    /// Next index to append; `None`: the log is empty and never purged, any index may be its first.
    next: Option<u64>,
    purged: Option<u64>,
    quarantined: bool,
}

impl Plan {
    fn of(log: &GroupLog) -> Plan {
        let purged = log.purged.as_ref().map(|(i, _)| i.get());
        let last = log.last.map(LogIndex::get);
        Plan {
            low: purged.map(|p| p + 1).or(log.first.map(LogIndex::get)).unwrap_or(0),
            next: last.max(purged).map(|n| n + 1),
            purged,
            quarantined: log.quarantined,
        }
    }
}

/// How a written request changes what readers see.
enum Change {
    Appended {
        first: u64,
        last: u64,
        new_first: bool,
    },
    Voted(Bytes),
    Truncated {
        next: Option<u64>,
    },
    Purged,
    Quarantined,
    Cleared(Option<ReplicaId>),
    Owned(ReplicaId),
    Refused,
    /// A truncation that was refused: what it hid from readers is shown again.
    TruncationRefused,
}

struct Outcome {
    group: GroupId,
    change: Change,
    result: Result<(), StorageError>,
    done: Done,
}

pub(super) struct Committer {
    db: Arc<DB>,
    queue: Arc<Queue>,
    groups: Arc<Groups>,
    shared: Arc<Shared>,
    written: Arc<AtomicU64>,
    witness: Witness,
    /// The last write that was synced.
    mark: Mark,
    batch_bytes_max: usize,
    plans: HashMap<GroupId, Plan>,
    buffer: Vec<u8>,
    key: Vec<u8>,
    range_deletes: usize,
    /// How long a write with its sync takes, averaged over the last ones. Slow until it is known.
    usual_sync: Duration,
    /// When the last write ended.
    ended_at: Instant,
}

impl Committer {
    pub fn new(log: &LogInner, witness: Witness, mark: Mark, batch_bytes_max: usize) -> Committer {
        let plans = log.groups.lock().iter().map(|(g, log)| (*g, Plan::of(log))).collect();
        Committer {
            db: log.db.clone(),
            queue: log.queue.clone(),
            groups: log.groups.clone(),
            shared: log.shared.clone(),
            written: log.written.clone(),
            witness,
            mark,
            batch_bytes_max,
            plans,
            buffer: Vec::new(),
            key: Vec::new(),
            range_deletes: 0,
            usual_sync: 2 * ALONE_SYNC_MAX,
            ended_at: Instant::now(),
        }
    }

    /// Runs until the queue is closed and empty, or the store is poisoned.
    pub fn run(committer: &Mutex<Committer>, queue: &Queue) {
        loop {
            queue.wait();
            // Before anything is taken: order is kept with those who commit for themselves.
            let mut committer = committer.lock();
            let Some(taken) = queue.take(committer.batch_bytes_max) else {
                break;
            };
            if committer.commit(taken).is_err() {
                break;
            }
        }
        committer.lock().end();
    }

    /// Commits what waits, as one write, on the caller's thread; nothing if nothing does.
    pub fn commit_waiting(&mut self) {
        let queue = self.queue.clone();
        if let Some(taken) = queue.take(self.batch_bytes_max)
            && self.commit(taken).is_err()
        {
            self.end();
        }
    }

    fn end(&mut self) {
        for request in self.queue.drain() {
            let error = self.shared.check().err().unwrap_or(StorageError::Closed);
            (request.done)(Err(error));
        }
        if self.shared.check().is_ok()
            && let Err(error) = self.witness.settle(self.mark)
        {
            tracing::warn!(%error, "could not sync the witness while closing");
        }
    }

    /// Commits a lone request on the caller's thread, which saves two thread switches. Gives it back if it should go
    /// through the queue: something else is going on, or the disk is not known to be quick.
    pub fn commit_alone(committer: &Mutex<Committer>, group: GroupId, op: Op, done: Done) -> Result<(), (Op, Done)> {
        if !matches!(op, Op::Append(_)) || op.bytes() > ALONE_BYTES_MAX {
            return Err((op, done));
        }
        let Some(mut committer) = committer.try_lock() else {
            return Err((op, done));
        };
        if committer.usual_sync > ALONE_SYNC_MAX || committer.ended_at.elapsed() < ALONE_IDLE_MIN {
            return Err((op, done));
        }
        committer.queue.push_alone(group, op, done)?;
        let max = committer.batch_bytes_max;
        if let Some(taken) = committer.queue.take(max) {
            // The thread that waits for work finds out by itself that the store is poisoned.
            let _ = committer.commit(taken);
        }
        Ok(())
    }

    fn commit(&mut self, taken: Taken) -> Result<(), ()> {
        let result = self.commit_inner(taken);
        self.ended_at = Instant::now();
        result
    }

    fn commit_inner(&mut self, taken: Taken) -> Result<(), ()> {
        let begun = Instant::now();
        if let Some(first) = taken.requests.first() {
            metrics::histogram!(names::COMMIT_WAIT_SECONDS).record(begun - first.asked_at);
        }
        let requests = taken.requests.len();
        let mut batch = WriteBatch::default();
        let mut outcomes = Vec::with_capacity(requests);
        for request in taken.requests {
            outcomes.push(self.plan(&mut batch, request));
        }
        for (group, hint) in &taken.committed {
            if !self.plans.get(group).is_some_and(|p| p.quarantined) {
                put(&mut batch, &Key::Committed(*group), hint);
            }
        }
        if batch.is_empty() {
            finish(outcomes);
            return Ok(());
        }
        // state/ may have stopped the store: then nothing is written here either.
        if let Err(error) = self.shared.check() {
            for outcome in outcomes {
                (outcome.done)(Err(error.clone()));
            }
            return Err(());
        }
        let mark = self.seal(&mut batch);
        let bytes = batch.size_in_bytes();
        if let Err(what) = self.write(batch, mark) {
            let poison = self.shared.poison(what.0, what.1);
            for outcome in outcomes {
                // A write that failed may still be on disk, or come back: its outcome is unknown.
                let result = outcome.result.and(Err(StorageError::Poisoned(poison.clone())));
                (outcome.done)(result);
            }
            return Err(());
        }
        let took = begun.elapsed();
        self.usual_sync = (self.usual_sync * 7 + took) / 8;
        metrics::histogram!(names::SYNC_SECONDS).record(took);
        metrics::histogram!(names::COMMIT_BYTES).record(bytes as f64);
        metrics::histogram!(names::COMMIT_REQUESTS).record(requests as f64);
        self.shared.accepted_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
        self.show(&outcomes, taken.committed);
        finish(outcomes);
        self.resolve_range_deletes();
        Ok(())
    }

    /// Ends the batch with its record: number and rolling digest of all writes so far. Fixed length, so that
    /// `wal_check` finds it from the end.
    fn seal(&mut self, batch: &mut WriteBatch) -> Mark {
        let mark = Mark {
            number: self.mark.number + 1,
            digest: next_digest(self.mark.digest, &batch.data()[BATCH_HEAD_BYTES..]),
        };
        let key = Key::BatchRecord.encode();
        batch.put(&key, encode_batch_record(&key, mark));
        mark
    }

    fn write(&mut self, batch: WriteBatch, mark: Mark) -> Result<(), (&'static str, String)> {
        self.db
            .write_opt(batch, &engine::synced())
            .map_err(|e| ("writing and syncing the log", e.to_string()))?;
        self.mark = mark;
        // Before anybody is told: a kill in between, and damage to the end of the log, would lose what was told.
        self.witness
            .note(mark)
            .map_err(|e| ("writing the witness", e.to_string()))
    }

    /// Puts a request into the batch, or refuses it without touching the batch.
    fn plan(&mut self, batch: &mut WriteBatch, request: Request) -> Outcome {
        let group = request.group;
        let mut plan = self.plans.get(&group).copied().unwrap_or_default();
        let refused = match request.op {
            Op::Truncate(_) => Change::TruncationRefused,
            Op::Append(_) | Op::Vote(_) | Op::Purge(..) | Op::Quarantine | Op::Clear(_) | Op::Own(_) => Change::Refused,
        };
        let planned = if plan.quarantined && !matches!(request.op, Op::Clear(_)) {
            Err(StorageError::Quarantined(group))
        } else {
            match request.op {
                Op::Append(entries) => self.plan_append(batch, group, &mut plan, &entries),
                Op::Vote(vote) => {
                    put(batch, &Key::Vote(group), &vote);
                    Ok(Change::Voted(vote))
                }
                Op::Truncate(last) => Ok(self.plan_truncate(batch, group, &mut plan, last)),
                Op::Purge(upto, log_id) => Ok(self.plan_purge(batch, group, &mut plan, upto, &log_id)),
                Op::Quarantine => {
                    plan.quarantined = true;
                    put(batch, &Key::Quarantine(group), &[]);
                    Ok(Change::Quarantined)
                }
                Op::Clear(retired) => {
                    let next = plan.next.unwrap_or(plan.low);
                    self.remove(batch, group, plan.low, next);
                    let marks = [
                        Key::Vote,
                        Key::Committed,
                        Key::Purged,
                        Key::First,
                        Key::Quarantine,
                        Key::Owner,
                    ];
                    for mark in marks {
                        batch.delete(mark(group).encode());
                    }
                    if let Some(retired) = retired {
                        put(batch, &Key::Retired(group), &retired.get().to_le_bytes());
                    }
                    plan = Plan::default();
                    Ok(Change::Cleared(retired))
                }
                Op::Own(replica) => {
                    put(batch, &Key::Owner(group), &replica.get().to_le_bytes());
                    Ok(Change::Owned(replica))
                }
            }
        };
        let (change, result) = match planned {
            Ok(change) => {
                self.plans.insert(group, plan);
                (change, Ok(()))
            }
            Err(error) => (refused, Err(error)),
        };
        Outcome {
            group,
            change,
            result,
            done: request.done,
        }
    }

    fn plan_append(
        &mut self,
        batch: &mut WriteBatch,
        group: GroupId,
        plan: &mut Plan,
        entries: &[(LogIndex, Bytes)],
    ) -> Result<Change, StorageError> {
        let first = entries.first().map_or(0, |(i, _)| i.get());
        let mut expected = plan.next.unwrap_or(first);
        for (index, _) in entries {
            if index.get() != expected {
                return Err(StorageError::Gap {
                    group,
                    index: *index,
                    expected: LogIndex::new(expected),
                });
            }
            expected += 1;
        }
        let new_first = plan.next.is_none();
        if new_first {
            plan.low = first;
            put(batch, &Key::First(group), &first.to_le_bytes());
        }
        for (index, entry) in entries {
            self.key.clear();
            Key::Entry(group, *index).encode_into(&mut self.key);
            frame_into(&mut self.buffer, &self.key, |out| out.extend_from_slice(entry));
            batch.put(&self.key, &self.buffer);
        }
        plan.next = Some(expected);
        Ok(Change::Appended {
            first,
            last: expected - 1,
            new_first,
        })
    }

    fn plan_truncate(
        &mut self,
        batch: &mut WriteBatch,
        group: GroupId,
        plan: &mut Plan,
        last: Option<LogIndex>,
    ) -> Change {
        // Nothing at or below the purge marker is there to be removed.
        let from = last.map_or(0, |l| l.get() + 1).max(plan.low);
        if let Some(next) = plan.next
            && from < next
        {
            self.remove(batch, group, from, next);
            plan.next = match plan.purged {
                None if from == plan.low => None,
                _ => Some(from),
            };
        }
        Change::Truncated { next: plan.next }
    }

    fn plan_purge(
        &mut self,
        batch: &mut WriteBatch,
        group: GroupId,
        plan: &mut Plan,
        upto: LogIndex,
        log_id: &[u8],
    ) -> Change {
        let after = upto.get() + 1;
        if plan.purged.is_none_or(|p| p < upto.get()) {
            let mut marker = upto.get().to_le_bytes().to_vec();
            marker.extend_from_slice(log_id);
            put(batch, &Key::Purged(group), &marker);
            if let Some(next) = plan.next {
                self.remove(batch, group, plan.low, after.min(next));
            }
            plan.purged = Some(upto.get());
            plan.low = after;
            plan.next = Some(plan.next.unwrap_or(0).max(after));
        }
        Change::Purged
    }

    /// Removes entries in [from, to).
    fn remove(&mut self, batch: &mut WriteBatch, group: GroupId, from: u64, to: u64) {
        if from >= to {
            return;
        }
        if to - from <= POINT_DELETES_MAX {
            for index in from..to {
                batch.delete(Key::Entry(group, LogIndex::new(index)).encode());
            }
        } else {
            let (start, end) = keys::entries_of(group, LogIndex::new(from), Some(LogIndex::new(to)));
            batch.delete_range(start, end);
            self.range_deletes += 1;
        }
    }

    fn resolve_range_deletes(&mut self) {
        if self.range_deletes >= RANGE_DELETES_MAX {
            self.range_deletes = 0;
            let mut options = FlushOptions::default();
            options.set_wait(false);
            if let Err(error) = self.db.flush_opt(&options) {
                tracing::warn!(%error, "could not begin to flush the log's write buffer");
            }
        }
    }

    /// Makes what was written visible to readers.
    fn show(&self, outcomes: &[Outcome], committed: BTreeMap<GroupId, Bytes>) {
        let mut groups = self.groups.lock();
        for outcome in outcomes {
            if matches!(outcome.change, Change::Refused) && !groups.contains_key(&outcome.group) {
                continue;
            }
            let log = groups.entry(outcome.group).or_default();
            match &outcome.change {
                Change::Appended { first, last, new_first } => {
                    if *new_first {
                        log.first = Some(LogIndex::new(*first));
                    }
                    log.last = Some(LogIndex::new(*last));
                }
                Change::Voted(vote) => log.vote = Some(vote.clone()),
                Change::Truncated { next } => {
                    log.truncating.pop_front();
                    log.last = next.and_then(|n| n.checked_sub(1)).map(LogIndex::new);
                }
                Change::Purged => {
                    let purged = log.purged.as_ref().map(|(i, _)| *i);
                    log.last = log.last.max(purged);
                }
                Change::Quarantined => log.quarantined = true,
                Change::Cleared(retired) => {
                    *log = GroupLog {
                        retired: retired.or(log.retired),
                        ..GroupLog::default()
                    }
                }
                Change::Owned(replica) => log.owner = Some(*replica),
                Change::TruncationRefused => {
                    log.truncating.pop_front();
                }
                Change::Refused => {}
            }
        }
        for (group, hint) in committed {
            groups.entry(group).or_default().committed = Some(hint);
        }
    }
}

/// Calls back in the order the requests were written.
fn finish(outcomes: Vec<Outcome>) {
    for outcome in outcomes {
        (outcome.done)(outcome.result);
    }
}

fn put(batch: &mut WriteBatch, key: &Key<'_>, payload: &[u8]) {
    let key = key.encode();
    let value = frame(&key, payload.len(), |out| out.extend_from_slice(payload));
    batch.put(&key, value);
}

/// The digest after a write with these records.
pub(super) fn next_digest(before: u64, records: &[u8]) -> u64 {
    xxh3_64_with_seed(records, before)
}

pub(super) fn encode_batch_record(key: &[u8], mark: Mark) -> Vec<u8> {
    frame(key, 16, |out| {
        out.extend_from_slice(&mark.number.to_le_bytes());
        out.extend_from_slice(&mark.digest.to_le_bytes());
    })
}

pub(super) fn decode_batch_record(mut payload: &[u8]) -> Option<Mark> {
    let number = super::record::take_u64(&mut payload)?;
    let digest = super::record::take_u64(&mut payload)?;
    payload.is_empty().then_some(Mark { number, digest })
}
