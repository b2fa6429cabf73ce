//! Requests waiting for the committer: one FIFO per group, votes and the meta group first, then one request per group
//! in turn.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::error::StorageError;
use super::metric_names;
use crate::model::{GroupId, LogIndex, ReplicaId};

/// Called once, with the outcome, by the committer's thread (or at once by the caller's when the store is closed).
/// It must be quick: every group waits for it.
pub type Done = Box<dyn FnOnce(Result<(), StorageError>) + Send>;

/// What a group asks for.
#[derive(Debug)]
pub(super) enum Op {
    Append(Vec<(LogIndex, Bytes)>),
    Vote(Bytes),
    /// Removes every entry after this one; `None`: all.
    Truncate(Option<LogIndex>),
    /// Removes every entry up to this one, whose encoded log id is given.
    Purge(LogIndex, Bytes),
    Quarantine,
    /// Removes everything, and retires this replica.
    Clear(Option<ReplicaId>),
    Own(ReplicaId),
}

impl Op {
    pub fn bytes(&self) -> usize {
        const OVERHEAD: usize = 64;
        match self {
            Op::Append(entries) => entries.iter().map(|(_, e)| e.len() + OVERHEAD).sum(),
            Op::Vote(b) | Op::Purge(_, b) => b.len() + OVERHEAD,
            Op::Truncate(_) | Op::Quarantine | Op::Clear(_) | Op::Own(_) => OVERHEAD,
        }
    }
}

pub(super) struct Request {
    pub group: GroupId,
    pub op: Op,
    pub done: Done,
    pub asked_at: Instant,
}

#[derive(Default)]
struct GroupQueue {
    requests: VecDeque<Request>,
    /// Votes among them.
    votes: usize,
    /// Whether the group is in `Waiting::turn`. It may be there with nothing left, until its turn comes.
    in_turn: bool,
}

#[derive(Default)]
struct Waiting {
    groups: HashMap<GroupId, GroupQueue>,
    /// Groups with requests, in turn; each at most once.
    turn: VecDeque<GroupId>,
    /// Groups whose vote goes before everyone's turn.
    urgent: VecDeque<GroupId>,
    /// The latest committed hint of each group; rides along with the next write.
    committed: BTreeMap<GroupId, Bytes>,
    bytes: usize,
    closing: bool,
}

/// One write's worth of requests.
#[derive(Default)]
pub(super) struct Taken {
    pub requests: Vec<Request>,
    pub committed: BTreeMap<GroupId, Bytes>,
}

#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    ready: Condvar,
}

impl Queue {
    /// Adds a request, or answers it if the store is closing.
    pub fn push(&self, group: GroupId, op: Op, done: Done) {
        let request = Request {
            group,
            op,
            done,
            asked_at: Instant::now(),
        };
        let mut waiting = self.waiting.lock();
        if waiting.closing {
            drop(waiting);
            (request.done)(Err(StorageError::Closed));
            return;
        }
        waiting.add(request);
        drop(waiting);
        self.ready.notify_one();
    }

    /// Adds a request without waking the committer's thread, if nothing else waits: the caller, who holds the committer,
    /// takes it at once. Otherwise gives it back.
    pub fn push_alone(&self, group: GroupId, op: Op, done: Done) -> Result<(), (Op, Done)> {
        let mut waiting = self.waiting.lock();
        if waiting.closing || !waiting.turn.is_empty() {
            return Err((op, done));
        }
        waiting.add(Request {
            group,
            op,
            done,
            asked_at: Instant::now(),
        });
        Ok(())
    }

    /// Sets a hint that the next write takes along. Never causes a write.
    pub fn set_committed(&self, group: GroupId, hint: Bytes) {
        self.waiting.lock().committed.insert(group, hint);
    }

    /// Waits until there is work, or the queue is closing.
    pub fn wait(&self) {
        let mut waiting = self.waiting.lock();
        while waiting.turn.is_empty() && !waiting.closing {
            self.ready.wait(&mut waiting);
        }
    }

    /// Whether a request waits.
    pub fn has_work(&self) -> bool {
        !self.waiting.lock().turn.is_empty()
    }

    /// Takes work, perhaps none. `None` when closing and nothing is left. What is taken must be written before anything
    /// is taken again: only who holds the committer calls this.
    pub fn take(&self, bytes_max: usize) -> Option<Taken> {
        let mut waiting = self.waiting.lock();
        if waiting.turn.is_empty() {
            if !waiting.closing {
                return Some(Taken::default());
            }
            let committed = std::mem::take(&mut waiting.committed);
            // One last write for the hints alone.
            return (!committed.is_empty()).then(|| Taken {
                requests: Vec::new(),
                committed,
            });
        }
        let mut taken = Taken::default();
        let mut bytes = 0;
        waiting.take_urgent(&mut taken.requests, &mut bytes, bytes_max);
        waiting.take_in_turn(&mut taken.requests, &mut bytes, bytes_max);
        taken.committed = std::mem::take(&mut waiting.committed);
        metrics::gauge!(metric_names::COMMIT_QUEUE_BYTES).set(waiting.bytes as f64);
        Some(taken)
    }

    /// No request is taken in any more; those waiting are still written.
    pub fn close(&self) {
        self.waiting.lock().closing = true;
        self.ready.notify_all();
    }

    /// Takes everything that waits, to be failed.
    pub fn drain(&self) -> Vec<Request> {
        let mut waiting = self.waiting.lock();
        waiting.closing = true;
        waiting.turn.clear();
        waiting.urgent.clear();
        waiting.committed.clear();
        waiting.bytes = 0;
        waiting.groups.drain().flat_map(|(_, q)| q.requests).collect()
    }
}

impl Waiting {
    fn add(&mut self, request: Request) {
        let group = request.group;
        self.bytes += request.op.bytes();
        let queue = self.groups.entry(group).or_default();
        if !queue.in_turn {
            queue.in_turn = true;
            self.turn.push_back(group);
        }
        if matches!(request.op, Op::Vote(_)) {
            queue.votes += 1;
            self.urgent.push_back(group);
        }
        queue.requests.push_back(request);
    }

    fn pop(&mut self, group: GroupId, out: &mut Vec<Request>, bytes: &mut usize) -> bool {
        let Some(queue) = self.groups.get_mut(&group) else {
            return false;
        };
        let Some(request) = queue.requests.pop_front() else {
            return false;
        };
        if matches!(request.op, Op::Vote(_)) {
            queue.votes -= 1;
        }
        let size = request.op.bytes();
        self.bytes -= size;
        *bytes += size;
        out.push(request);
        true
    }

    /// A vote takes what its own group asked before it along: a group's order is kept.
    fn take_urgent(&mut self, out: &mut Vec<Request>, bytes: &mut usize, bytes_max: usize) {
        while let Some(group) = self.urgent.pop_front() {
            while self.groups.get(&group).is_some_and(|q| q.votes > 0) {
                self.pop(group, out, bytes);
            }
        }
        while *bytes < bytes_max && self.pop(GroupId::META, out, bytes) {}
    }

    fn take_in_turn(&mut self, out: &mut Vec<Request>, bytes: &mut usize, bytes_max: usize) {
        while *bytes < bytes_max {
            let Some(group) = self.turn.pop_front() else {
                return;
            };
            self.pop(group, out, bytes);
            if self.groups.get(&group).is_some_and(|q| !q.requests.is_empty()) {
                self.turn.push_back(group);
            } else {
                self.groups.remove(&group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(queue: &Queue, group: u64, op: Op) {
        queue.push(GroupId::new(group), op, Box::new(|_| {}));
    }

    fn entry(index: u64, bytes: usize) -> Op {
        Op::Append(vec![(LogIndex::new(index), Bytes::from(vec![0; bytes]))])
    }

    fn taken(queue: &Queue, bytes_max: usize) -> Vec<(u64, &'static str)> {
        let taken = queue.take(bytes_max).expect("something waits");
        let name = |op: &Op| match op {
            Op::Append(_) => "append",
            Op::Vote(_) => "vote",
            Op::Truncate(_) => "truncate",
            Op::Purge(..) => "purge",
            Op::Quarantine => "quarantine",
            Op::Clear(_) => "clear",
            Op::Own(_) => "own",
        };
        taken.requests.iter().map(|r| (r.group.get(), name(&r.op))).collect()
    }

    #[test]
    fn votes_and_the_meta_group_go_first_and_a_groups_order_is_kept() {
        let queue = Queue::default();
        push(&queue, 5, entry(0, 10));
        push(&queue, 6, entry(0, 10));
        push(&queue, 6, Op::Vote(Bytes::new()));
        push(&queue, 6, entry(1, 10));
        push(&queue, 1, entry(0, 10));
        assert_eq!(
            taken(&queue, 1 << 20),
            [(6, "append"), (6, "vote"), (1, "append"), (5, "append"), (6, "append")]
        );
    }

    #[test]
    fn groups_take_turns_under_the_cap() {
        let queue = Queue::default();
        for index in 0..4 {
            push(&queue, 7, entry(index, 1000));
        }
        push(&queue, 8, entry(0, 1000));
        push(&queue, 9, entry(0, 1000));
        let three: Vec<_> = taken(&queue, 3 * 1064).into_iter().map(|(g, _)| g).collect();
        assert_eq!(three, [7, 8, 9], "a busy group does not hold the others up");
        // A request larger than the cap still goes, alone.
        push(&queue, 9, entry(1, 5000));
        let mut rest = Vec::new();
        while rest.len() < 4 {
            let batch = taken(&queue, 100);
            assert!(batch.len() <= 1);
            rest.extend(batch.into_iter().map(|(g, _)| g));
        }
        rest.sort_unstable();
        assert_eq!(rest, [7, 7, 7, 9]);
        push(&queue, 9, entry(2, 10));
        let mut next = taken(&queue, 1 << 20);
        if next.is_empty() {
            next = taken(&queue, 1 << 20);
        }
        assert_eq!(next, [(9, "append")]);
    }

    #[test]
    fn hints_ride_along_and_the_last_ones_go_when_closing() {
        let queue = Queue::default();
        queue.set_committed(GroupId::new(3), Bytes::from_static(b"a"));
        queue.set_committed(GroupId::new(3), Bytes::from_static(b"b"));
        push(&queue, 4, entry(0, 1));
        let first = queue.take(100).expect("a request");
        assert_eq!(first.committed[&GroupId::new(3)], Bytes::from_static(b"b"));
        queue.set_committed(GroupId::new(3), Bytes::from_static(b"c"));
        queue.close();
        let last = queue.take(100).expect("a hint");
        assert!(last.requests.is_empty());
        assert_eq!(last.committed.len(), 1);
        assert!(queue.take(100).is_none());
    }
}
