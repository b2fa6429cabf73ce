//! openraft's log storage over `storage`'s log, with the recent tail of the log in memory.
//!
//! The tail holds every entry that is not yet both synced and applied, and beyond that the most recent ones within a
//! byte budget: replication, apply and tailing readers do not read back what was just written. Entries leave it only
//! from the front, so it is always one consecutive range ending at the last entry.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::time::Instant;

use openraft::alias::{LogIdOf, VoteOf};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{EntryPayload, LogState, OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::codec;
use super::trail::{LogLag, Trail};
use super::types::{Entry, LogId, Mainstem, StoredMembership, Vote};
use crate::model::{GroupId, LogIndex, ReplicaId};
use crate::storage::{LogDb, StorageError};

/// Applied and synced entries are kept in memory up to this many bytes per group.
const TAIL_KEEP_BYTES: usize = 2 << 20;
/// One read for replication returns at most this much, and always one entry. No more than a frame to a peer has room
/// for: what is urgent waits for the frame that is being sent.
const READ_BYTES_MAX: usize = 1 << 20;

fn io_error(e: StorageError) -> io::Error {
    io::Error::other(e)
}

/// Bytes an entry is counted with.
fn weight(entry: &Entry) -> usize {
    64 + match &entry.payload {
        EntryPayload::Normal(p) => p.0.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

#[derive(Debug, Default)]
struct Tail {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Bytes appended since the start, ever growing.
    appended_bytes: u64,
    /// Last entry of the log, in the tail or not. Advanced by append, set back by truncate.
    last: Option<LogId>,
    /// Last purged entry, inclusive. Advanced by purge.
    purged: Option<LogId>,
    /// Index of the first entry that was ever appended to a log that was never purged. A missing entry above is an error.
    begins: Option<u64>,
    /// Every entry at or below is synced. Advanced by the committer's callback, set back by truncate.
    synced: Option<u64>,
    /// Every entry at or below is applied. Advanced by the state machine.
    applied: Option<u64>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    /// The replica whose log it is, and whether its group has others, as of the last membership that is known here. Only for
    /// how an append is written.
    own: Option<u64>,
    others: bool,
    /// When how much was appended.
    trail: Trail,
}

impl Tail {
    fn first_index(&self) -> Option<u64> {
        self.entries.front().map(|e| e.log_id.index)
    }

    fn trim(&mut self) {
        let done = match (self.synced, self.applied) {
            (Some(s), Some(a)) => s.min(a),
            (None, _) | (_, None) => return,
        };
        while self.bytes > TAIL_KEEP_BYTES {
            let Some(front) = self.entries.front() else { return };
            if front.log_id.index > done {
                return;
            }
            self.bytes -= weight(front);
            self.entries.pop_front();
        }
    }
}

/// The log of one group. Clones share the tail.
#[derive(Clone)]
pub struct GroupLog {
    group: GroupId,
    db: LogDb,
    tail: Arc<Mutex<Tail>>,
}

impl GroupLog {
    /// Reads what is on disk. Fails if a record cannot be understood.
    pub fn open(db: LogDb, group: GroupId) -> io::Result<Self> {
        let meta = db.meta(group).map_err(io_error)?;
        let purged = meta
            .purged
            .as_ref()
            .map(|(_, raw)| codec::decode_log_id(raw))
            .transpose()?;
        // With everything purged the last entry is the purged one, which is not there to be read.
        let last = match meta.last.filter(|last| purged.is_none_or(|p| p.index < last.get())) {
            None => purged,
            Some(last) => {
                let entries = db.read(group, last, last.next(), usize::MAX).map_err(io_error)?;
                let (_, raw) = entries.into_iter().next().ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidData, format!("{group}: entry {last} is gone"))
                })?;
                Some(codec::decode_entry(raw)?.log_id)
            }
        };
        let vote = meta.vote.as_deref().map(codec::decode_vote).transpose()?;
        // What was committed beyond the durable log is not known to this log any more (trap D).
        let committed = meta
            .committed
            .as_deref()
            .map(codec::decode_log_id)
            .transpose()?
            .map(|c| if Some(c) > last { last } else { Some(c) })
            .unwrap_or_default();
        let tail = Tail {
            last,
            purged,
            begins: meta.first.map(LogIndex::get),
            synced: last.map(|id| id.index),
            vote,
            committed,
            ..Tail::default()
        };
        Ok(Self {
            group,
            db,
            tail: Arc::new(Mutex::new(tail)),
        })
    }

    /// Whose log it is, and the members of its group as far as they are known.
    pub fn belongs_to(&self, replica: ReplicaId, members: &StoredMembership) {
        let mut tail = self.tail.lock();
        tail.own = Some(replica.get());
        tail.others = members.nodes().any(|(id, _)| *id != replica.get());
    }

    /// The last entry of the log, or the last purged one.
    pub fn last(&self) -> Option<LogId> {
        self.tail.lock().last
    }

    /// The last purged entry.
    pub fn purged(&self) -> Option<LogId> {
        self.tail.lock().purged
    }

    /// Bytes appended since the start.
    pub fn appended_bytes(&self) -> u64 {
        self.tail.lock().appended_bytes
    }

    /// What somebody lacks who has everything up to `matched`.
    pub fn lag(&self, matched: Option<LogIndex>) -> LogLag {
        self.tail.lock().trail.lag(matched.map(LogIndex::get), Instant::now())
    }

    /// Makes the log begin behind a snapshot that the state was installed from. To be called before the replica is
    /// started: a crash may have come between the install and the purge. Entries that the snapshot's leader does not
    /// have go.
    pub async fn begin_behind(&mut self, snapshot: LogId) -> io::Result<()> {
        let (last, purged) = {
            let tail = self.tail.lock();
            (tail.last, tail.purged)
        };
        if purged >= Some(snapshot) {
            return Ok(());
        }
        let same = last.is_some_and(|l| l.index >= snapshot.index) && self.id_at(snapshot.index)? == snapshot;
        if !same && last > purged {
            self.truncate_after(purged).await?;
        }
        self.purge(snapshot).await
    }

    /// Whether the log reaches back to the group's first entry or to its purge marker: so does every log of ours.
    pub fn reaches_back(&self) -> bool {
        let tail = self.tail.lock();
        tail.purged.is_some() || tail.begins == Some(0)
    }

    /// The id of the entry at an index that is not purged.
    pub fn id_at(&self, index: u64) -> io::Result<LogId> {
        if let Some(id) = self.tail.lock().purged.filter(|id| id.index == index) {
            return Ok(id);
        }
        let entry = self.read_range(index, index + 1, usize::MAX)?;
        entry.first().map(|e| e.log_id).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("{}: there is no entry {index}", self.group),
            )
        })
    }

    /// As far as it was noted here.
    pub fn committed(&self) -> Option<LogId> {
        self.tail.lock().committed
    }

    /// Forgets that the entries from this one on are committed: the leader will tell again.
    pub fn forget_committed(&self, from: u64) -> io::Result<()> {
        let before = match from.checked_sub(1) {
            Some(index) => Some(self.id_at(index)?),
            None => None,
        };
        self.tail.lock().committed = before;
        Ok(())
    }

    /// Told by the state machine; lets the tail drop what nobody will ask for soon.
    pub fn set_applied(&self, index: u64) {
        let mut tail = self.tail.lock();
        tail.applied = Some(index);
        tail.trim();
    }

    pub(super) fn read_range(&self, from: u64, to: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let mut out = Vec::new();
        let mut bytes = 0;
        let (from_disk, recent) = {
            let tail = self.tail.lock();
            let from = from.max(match tail.purged {
                Some(purged) => purged.index + 1,
                None => tail.begins.unwrap_or(0),
            });
            let to = to.min(tail.last.map_or(0, |l| l.index + 1));
            if from >= to {
                return Ok(out);
            }
            // An index the tail does not reach is on disk: it left the tail after its sync.
            let split = tail.first_index().unwrap_or(u64::MAX).clamp(from, to);
            let mut recent = Vec::new();
            if let Some(first) = tail.first_index() {
                let skip = usize::try_from(split.saturating_sub(first)).unwrap_or(usize::MAX);
                let mut room = bytes_max;
                for entry in tail.entries.iter().skip(skip).take_while(|e| e.log_id.index < to) {
                    if !recent.is_empty() && weight(entry) > room {
                        break;
                    }
                    room = room.saturating_sub(weight(entry));
                    recent.push(entry.clone());
                }
            }
            (from..split, recent)
        };
        let mut next = from_disk.start;
        while next < from_disk.end {
            let part = self
                .db
                .read(
                    self.group,
                    LogIndex::new(next),
                    LogIndex::new(from_disk.end),
                    bytes_max.saturating_sub(bytes).clamp(1, READ_BYTES_MAX),
                )
                .map_err(io_error)?;
            if part.is_empty() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{}: entry {next} is missing from the log", self.group),
                ));
            }
            for (index, raw) in part {
                if index.get() != next {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{}: expected entry {next}, found {index}", self.group),
                    ));
                }
                bytes += raw.len() + 64;
                out.push(codec::decode_entry(raw)?);
                next += 1;
            }
            if bytes >= bytes_max && next < from_disk.end {
                return Ok(out);
            }
        }
        for entry in recent {
            if !out.is_empty() && bytes + weight(&entry) > bytes_max {
                break;
            }
            bytes += weight(&entry);
            out.push(entry);
        }
        Ok(out)
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(n) => *n,
        Bound::Excluded(n) => n + 1,
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(n) => n + 1,
        Bound::Excluded(n) => *n,
        Bound::Unbounded => u64::MAX,
    };
    (from, to)
}

impl RaftLogReader<Mainstem> for GroupLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (from, to) = bounds(&range);
        self.read_range(from, to, usize::MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<VoteOf<Mainstem>>, io::Error> {
        Ok(self.tail.lock().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read_range(start, end, READ_BYTES_MAX)
    }
}

impl RaftLogStorage<Mainstem> for GroupLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Mainstem>, io::Error> {
        let tail = self.tail.lock();
        Ok(LogState {
            last_purged_log_id: tail.purged,
            last_log_id: tail.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (tx, rx) = oneshot::channel();
        self.db.save_vote(
            self.group,
            codec::encode_vote(vote),
            Box::new(move |res| {
                // The receiver only goes away when the group is shut down.
                let _ = tx.send(res);
            }),
        );
        rx.await
            .map_err(|_| io::Error::other("the log's committer has stopped"))?
            .map_err(io_error)?;
        self.tail.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogIdOf<Mainstem>>) -> Result<(), io::Error> {
        if let Some(id) = committed {
            self.tail.lock().committed = Some(id);
            self.db.save_committed(self.group, codec::encode_log_id(&id));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogIdOf<Mainstem>>, io::Error> {
        Ok(self.tail.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Mainstem>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut records = Vec::new();
        let has_followers;
        {
            let now = Instant::now();
            let mut tail = self.tail.lock();
            for entry in entries {
                let index = entry.log_id.index;
                if let Some(last) = tail.last
                    && index != last.index + 1
                {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!(
                            "{}: append of entry {index} behind entry {} would leave a hole",
                            self.group, last.index
                        ),
                    ));
                }
                records.push((LogIndex::new(index), codec::encode_entry(&entry)));
                tail.begins.get_or_insert(index);
                tail.last = Some(entry.log_id);
                tail.bytes += weight(&entry);
                tail.appended_bytes += weight(&entry) as u64;
                tail.trail.note(index, weight(&entry) as u64, now);
                if let EntryPayload::Membership(members) = &entry.payload {
                    tail.others = members.nodes().any(|(id, _)| Some(*id) != tail.own);
                }
                tail.entries.push_back(entry);
            }
            let leads = tail.last.map(|last| last.leader_id.node_id) == tail.own;
            has_followers = leads && tail.others;
        }
        let Some(upto) = records.last().map(|(index, _)| index.get()) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        let tail = self.tail.clone();
        let done = Box::new(move |res: Result<(), StorageError>| {
            if res.is_ok() {
                let mut tail = tail.lock();
                // A truncation since may have taken the end away again.
                let last = tail.last.map_or(0, |l| l.index);
                tail.synced = tail.synced.max(Some(upto.min(last)));
                tail.trim();
            }
            callback.io_completed(res.map_err(io_error));
        });
        // Who leads others sends them the entries next: they write theirs meanwhile.
        match has_followers {
            true => self.db.append_aside(self.group, records, done),
            false => self.db.append(self.group, records, done),
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogIdOf<Mainstem>>) -> Result<(), io::Error> {
        {
            let mut tail = self.tail.lock();
            let keep = last.map(|l| l.index);
            while let Some(back) = tail.entries.back() {
                if Some(back.log_id.index) <= keep {
                    break;
                }
                let w = weight(back);
                tail.entries.pop_back();
                tail.bytes -= w;
            }
            tail.trail.truncate(keep.unwrap_or(0));
            // A truncation behind the end takes nothing away.
            tail.last = last.min(tail.last).max(tail.purged);
            if tail.last.is_none() {
                tail.begins = None;
            }
            tail.synced = tail.synced.min(tail.last.map(|l| l.index));
        }
        let (tx, rx) = oneshot::channel();
        self.db.truncate_after(
            self.group,
            last.map(|l| LogIndex::new(l.index)),
            Box::new(move |res| {
                let _ = tx.send(res);
            }),
        );
        rx.await
            .map_err(|_| io::Error::other("the log's committer has stopped"))?
            .map_err(io_error)
    }

    async fn purge(&mut self, upto: LogIdOf<Mainstem>) -> Result<(), io::Error> {
        {
            let mut tail = self.tail.lock();
            if tail.purged >= Some(upto) {
                return Ok(());
            }
            tail.purged = Some(upto);
            // By index: an entry that was never committed may be of a later term and yet lie before a snapshot.
            if tail.last.is_none_or(|last| last.index <= upto.index) {
                tail.last = Some(upto);
            }
            while let Some(front) = tail.entries.front() {
                if front.log_id.index > upto.index {
                    break;
                }
                let w = weight(front);
                tail.entries.pop_front();
                tail.bytes -= w;
            }
        }
        let group = self.group;
        self.db.purge(
            group,
            LogIndex::new(upto.index),
            codec::encode_log_id(&upto),
            Box::new(move |res| {
                // A failed write has poisoned the store, which ends the node; nothing waits for this one.
                if let Err(e) = res {
                    tracing::error!(%group, error = %e, "purge of the log failed");
                }
            }),
        );
        Ok(())
    }
}
