//! Raft logs: entries, votes, purge markers of every group of the node.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::{DB, ReadOptions};

use super::committer::Committer;
use super::error::{Area, StorageError};
use super::keys::{self, Key};
use super::lock::DirLock;
use super::queue::{Done, Op, Queue};
use super::record::{corrupt, unframe};
use super::shared::{Shared, read_error};
use crate::model::{GroupId, LogIndex, ReplicaId};

/// What is known of a group's log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogMeta {
    /// As given to `save_vote`, synced.
    pub vote: Option<Bytes>,
    /// As given to `save_committed`; may be behind, never synced for its own sake.
    pub committed: Option<Bytes>,
    /// Purge marker: every entry up to it (inclusive) is gone. With the log id given to `purge`.
    pub purged: Option<(LogIndex, Bytes)>,
    /// Index of the first entry there is. Inclusive.
    pub first: Option<LogIndex>,
    /// Index of the last entry there is. Inclusive. At or below the purge marker when nothing is above it.
    pub last: Option<LogIndex>,
    /// The group was set aside: kept as it is, not written.
    pub quarantined: bool,
    /// The replica whose log it is; not known of one that was begun by a version that did not note it.
    pub owner: Option<ReplicaId>,
    /// No replica with this id or a lower one runs here again: it was removed.
    pub retired: Option<ReplicaId>,
}

/// A group's log as its readers may see it.
#[derive(Debug, Clone, Default)]
pub(super) struct GroupLog {
    pub vote: Option<Bytes>,
    pub committed: Option<Bytes>,
    /// Advanced by `purge` at once, before it is written.
    pub purged: Option<(LogIndex, Bytes)>,
    /// First entry ever; meaningful while nothing is purged.
    pub first: Option<LogIndex>,
    /// Last entry written. Advanced by the committer.
    pub last: Option<LogIndex>,
    pub quarantined: bool,
    pub owner: Option<ReplicaId>,
    pub retired: Option<ReplicaId>,
    /// First index removed by each truncation that is asked for and not written yet. Nothing from there on is shown.
    pub truncating: VecDeque<u64>,
}

impl GroupLog {
    fn end_exclusive(&self) -> u64 {
        let end = self.last.map_or(0, |l| l.get() + 1);
        self.truncating.iter().fold(end, |end, &cut| end.min(cut))
    }

    /// Nothing was ever written to it, or everything was removed.
    fn is_empty(&self) -> bool {
        self.vote.is_none() && self.purged.is_none() && self.first.is_none() && self.owner.is_none()
    }

    fn purged_index(&self) -> Option<LogIndex> {
        self.purged.as_ref().map(|(i, _)| *i)
    }

    fn meta(&self) -> LogMeta {
        let end = self.end_exclusive();
        let begin = match &self.purged {
            Some((i, _)) => Some(i.get() + 1),
            None => self.first.map(LogIndex::get),
        };
        let present = begin.filter(|b| *b < end);
        LogMeta {
            vote: self.vote.clone(),
            committed: self.committed.clone(),
            purged: self.purged.clone(),
            first: present.map(LogIndex::new),
            last: present.map(|_| LogIndex::new(end - 1)).or(self.purged_index()),
            quarantined: self.quarantined,
            owner: self.owner,
            retired: self.retired,
        }
    }
}

pub(super) type Groups = Mutex<BTreeMap<GroupId, GroupLog>>;

pub(super) struct LogInner {
    // Dropped in this order: the database before the lock on its directory.
    pub db: Arc<DB>,
    /// Set once the store's threads have started, if callers may commit for themselves.
    pub committer: OnceLock<Arc<Mutex<Committer>>>,
    pub queue: Arc<Queue>,
    pub groups: Arc<Groups>,
    pub shared: Arc<Shared>,
    /// Bytes written by the committer since the store was opened.
    pub written: Arc<AtomicU64>,
    pub _lock: Arc<DirLock>,
}

/// The logs of the node. Cheap to clone.
#[derive(Clone)]
pub struct LogDb(pub(super) Arc<LogInner>);

impl LogDb {
    /// Appends entries, which must follow the last one without a gap. `done` after they are synced; readable then,
    /// not before. Order is kept within a group.
    pub fn append(&self, group: GroupId, entries: Vec<(LogIndex, Bytes)>, done: Done) {
        if entries.is_empty() {
            done(self.0.shared.check());
            return;
        }
        self.ask(group, Op::Append(entries), done);
    }

    /// As [`append`](Self::append), for a caller that has more to do than to wait for the disk: it is never the one who writes.
    pub fn append_aside(&self, group: GroupId, entries: Vec<(LogIndex, Bytes)>, done: Done) {
        match self.0.shared.check() {
            Ok(()) if !entries.is_empty() => self.0.queue.push(group, Op::Append(entries), done),
            checked => done(checked),
        }
    }

    /// Saves a vote; `done` after it is synced.
    pub fn save_vote(&self, group: GroupId, vote: Bytes, done: Done) {
        self.ask(group, Op::Vote(vote), done);
    }

    /// Removes every entry after `last` (`None`: all). They are not read any more from the moment of the call.
    pub fn truncate_after(&self, group: GroupId, last: Option<LogIndex>, done: Done) {
        {
            let mut groups = self.0.groups.lock();
            let log = groups.entry(group).or_default();
            log.truncating.push_back(last.map_or(0, |l| l.get() + 1));
        }
        self.ask(group, Op::Truncate(last), done);
    }

    /// Removes every entry up to `upto` (inclusive). They are not read any more from the moment of the call; `done`
    /// after the marker is synced. A marker beyond the last entry is allowed: the log then continues after it.
    pub fn purge(&self, group: GroupId, upto: LogIndex, log_id: Bytes, done: Done) {
        {
            let mut groups = self.0.groups.lock();
            let log = groups.entry(group).or_default();
            if log.purged_index().is_none_or(|p| p < upto) {
                log.purged = Some((upto, log_id.clone()));
            }
        }
        self.ask(group, Op::Purge(upto, log_id), done);
    }

    /// Saves a hint of what is committed. Rides along with the next synced write and may be lost.
    pub fn save_committed(&self, group: GroupId, committed: Bytes) {
        self.0.queue.set_committed(group, committed);
    }

    /// Sets a group aside: from `done` on it is not listed and not written any more, and nothing of it is removed.
    pub fn set_aside(&self, group: GroupId, done: Done) {
        self.ask(group, Op::Quarantine, done);
    }

    /// Removes everything there is of a group's log, set aside or not; `done` after that is synced. The group may begin
    /// anew then, as another replica than the one that is retired. Nobody reads or writes it meanwhile.
    pub fn clear(&self, group: GroupId, retired: Option<ReplicaId>, done: Done) {
        self.ask(group, Op::Clear(retired), done);
    }

    /// Notes whose log it is, before anything else is written to it; `done` after that is synced.
    pub fn own(&self, group: GroupId, replica: ReplicaId, done: Done) {
        self.ask(group, Op::Own(replica), done);
    }

    fn ask(&self, group: GroupId, op: Op, done: Done) {
        if let Err(error) = self.0.shared.check() {
            done(Err(error));
            return;
        }
        let (op, done) = match self.0.committer.get() {
            Some(committer) => match Committer::commit_alone(committer, group, op, done) {
                Ok(()) => return,
                Err(back) => back,
            },
            None => (op, done),
        };
        self.0.queue.push(group, op, done);
    }

    /// Entries in [from, to), at least one and then no more than `bytes_max` bytes. Empty only when nothing is
    /// written at `from` yet. A missing entry is an error, never skipped.
    pub fn read(
        &self,
        group: GroupId,
        from: LogIndex,
        to_exclusive: LogIndex,
        bytes_max: usize,
    ) -> Result<Vec<(LogIndex, Bytes)>, StorageError> {
        let end = self.readable_end(group, from)?.min(to_exclusive.get());
        if from.get() >= end {
            return Ok(Vec::new());
        }
        match self.scan(group, from, LogIndex::new(end), bytes_max) {
            Ok(entries) => Ok(entries),
            Err(error) => {
                // It may have been purged or truncated while we looked.
                let end_now = self.readable_end(group, from)?;
                if matches!(error, StorageError::Hole { .. }) && end_now < end {
                    return Ok(Vec::new());
                }
                self.0.shared.note(Err(error))
            }
        }
    }

    fn readable_end(&self, group: GroupId, from: LogIndex) -> Result<u64, StorageError> {
        let groups = self.0.groups.lock();
        let Some(log) = groups.get(&group) else {
            return Ok(0);
        };
        match log.purged_index() {
            Some(purged) if from <= purged => Err(StorageError::Purged {
                group,
                index: from,
                purged,
            }),
            _ => Ok(log.end_exclusive()),
        }
    }

    fn scan(
        &self,
        group: GroupId,
        from: LogIndex,
        to: LogIndex,
        bytes_max: usize,
    ) -> Result<Vec<(LogIndex, Bytes)>, StorageError> {
        let (start, end) = keys::entries_of(group, from, Some(to));
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(end);
        options.set_readahead_size(256 << 10);
        let mut iter = self.0.db.raw_iterator_opt(options);
        iter.seek(&start);
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut expected = from;
        while let Some((key, value)) = iter.item() {
            let payload = unframe(Area::Log, key, value)?;
            match Key::decode(key) {
                Some(Key::Entry(g, index)) if g == group && index == expected => {}
                Some(_) => return Err(StorageError::Hole { group, index: expected }),
                None => return Err(corrupt(Area::Log, key, "not a key of this format")),
            }
            if !entries.is_empty() && bytes + payload.len() > bytes_max {
                return Ok(entries);
            }
            bytes += payload.len();
            entries.push((expected, Bytes::copy_from_slice(payload)));
            expected = expected.next();
            iter.next();
        }
        iter.status()
            .map_err(|e| read_error(Area::Log, "reading entries", &e))?;
        if expected < to {
            return Err(StorageError::Hole { group, index: expected });
        }
        Ok(entries)
    }

    /// What is known of a group's log, as its readers see it.
    pub fn meta(&self, group: GroupId) -> Result<LogMeta, StorageError> {
        self.0.shared.check()?;
        Ok(self.0.groups.lock().get(&group).map(GroupLog::meta).unwrap_or_default())
    }

    /// Every group with a log here, those in quarantine left out. Ascending.
    pub fn groups(&self) -> Vec<GroupId> {
        let groups = self.0.groups.lock();
        groups
            .iter()
            .filter(|(_, log)| !log.quarantined && !log.is_empty())
            .map(|(g, _)| *g)
            .collect()
    }

    /// The groups that were set aside. Ascending.
    pub fn quarantined(&self) -> Vec<GroupId> {
        let groups = self.0.groups.lock();
        groups
            .iter()
            .filter(|(_, log)| log.quarantined)
            .map(|(g, _)| *g)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::super::{Store, StoreOptions};
    use super::*;

    /// Also where a lone append is written by its caller.
    #[test]
    fn who_has_more_to_do_never_writes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut opts = StoreOptions::new(dir.path());
        opts.min_free_bytes = 0;
        opts.commit_on_caller = true;
        let store = Store::open(opts, None).expect("new");
        let (tx, written_by) = mpsc::channel();
        for index in 0..200 {
            let entries = vec![(LogIndex::new(index), Bytes::from_static(b"e"))];
            let tx = tx.clone();
            let done = Box::new(move |result: Result<(), StorageError>| {
                result.expect("it is written");
                tx.send(thread::current().id()).expect("waited for");
            });
            store.log().append_aside(GroupId::new(1), entries, done);
            assert_ne!(written_by.recv().expect("it is done"), thread::current().id());
            // As long as it takes for a lone append to count as one.
            thread::sleep(std::time::Duration::from_micros(100));
        }
        let last = store.log().meta(GroupId::new(1)).expect("read").last;
        assert_eq!(last, Some(LogIndex::new(199)));
    }
}
