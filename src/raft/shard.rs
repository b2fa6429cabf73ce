//! What a replica publishes about a shard to the layers above: positions, figures and the most recent batches. Written
//! by apply only; everyone else reads.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock};
use tokio::sync::watch;

use crate::model::{GroupId, Revision, Sequence, ShardId, StoredBatch, Term, TimeUs};

/// A shard as of the last applied entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// First retained sequence, inclusive. Advanced by trims.
    pub floor: Sequence,
    /// Next sequence to be written. Advanced by publishes.
    pub tail: Sequence,
    /// Term of the last applied entry that touched the shard.
    pub term: Term,
    /// Retained messages.
    pub messages: u64,
    /// Their stored size.
    pub bytes: u64,
    /// Append time of the oldest retained message.
    pub first_time: Option<TimeUs>,
    /// Append time of the newest message there ever was.
    pub last_time: Option<TimeUs>,
    /// Revision of the config in force.
    pub revision: Revision,
    /// When an expire entry would first do something.
    pub next_expiry: Option<TimeUs>,
    /// The shard was removed: nothing may be read or written any more.
    pub removed: bool,
}

impl Positions {
    /// A shard before its first entry.
    pub const fn initial() -> Self {
        Self {
            floor: Sequence::FIRST,
            tail: Sequence::FIRST,
            term: Term::new(0),
            messages: 0,
            bytes: 0,
            first_time: None,
            last_time: None,
            revision: Revision::new(0),
            next_expiry: None,
            removed: false,
        }
    }
}

/// Memory that the recent batches of all shards of a node may take together.
#[derive(Debug)]
pub struct RecentBudget {
    used: AtomicUsize,
    limit: usize,
}

impl RecentBudget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            limit,
        })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// The newest batches of a shard: consecutive, ending at the tail.
#[derive(Debug, Default)]
struct Recent {
    batches: VecDeque<StoredBatch>,
    bytes: usize,
    /// Set by each push, cleared by the sweep: a shard that had no push between two sweeps gives its memory back.
    fresh: bool,
}

/// The group of a shard whose replica has left this node. No group has this id.
const NOWHERE: GroupId = GroupId::new(u64::MAX);

/// One shard's public face on this node.
#[derive(Debug)]
pub struct ShardShared {
    pub shard: ShardId,
    /// The group whose replica here applies to it. Changed when another one adopts the shard.
    group: AtomicU64,
    /// The group that it came from; 0: it was always in this one.
    former: AtomicU64,
    /// The group that will have it: it is sealed; 0: it is not.
    heir: AtomicU64,
    positions: watch::Sender<Positions>,
    recent: Mutex<Recent>,
    budget: Arc<RecentBudget>,
}

impl ShardShared {
    pub fn new(shard: ShardId, group: GroupId, budget: Arc<RecentBudget>) -> Arc<Self> {
        Arc::new(Self {
            shard,
            group: AtomicU64::new(group.get()),
            former: AtomicU64::new(0),
            heir: AtomicU64::new(0),
            positions: watch::Sender::new(Positions::initial()),
            recent: Mutex::default(),
            budget,
        })
    }

    /// The group that has the shard, as far as its replicas here have applied.
    pub fn group(&self) -> GroupId {
        GroupId::new(self.group.load(Ordering::Acquire))
    }

    /// Whether the shard went from this group to the one that has it now.
    pub fn came_from(&self, group: GroupId) -> bool {
        let owner = self.group();
        self.former.load(Ordering::Acquire) == group.get() && owner != group && owner != NOWHERE
    }

    /// The group that the shard goes to, if it is sealed here and not adopted yet.
    pub fn heir(&self) -> Option<GroupId> {
        Some(self.heir.load(Ordering::Acquire))
            .filter(|id| *id != 0)
            .map(GroupId::new)
    }

    /// The shard is sealed.
    pub(super) fn leave_to(&self, heir: GroupId) {
        self.heir.store(heir.get(), Ordering::Release);
    }

    /// This group's replica here has the shard from now on, and it is sealed for that heir, or not. Whoever reads it goes on.
    ///
    /// The heir last: who finds none finds the group that has the shard, and not the one that had it.
    pub(super) fn hand_over(&self, to: GroupId, heir: Option<GroupId>) {
        let from = self.group.swap(to.get(), Ordering::AcqRel);
        if from != to.get() {
            self.former.store(from, Ordering::Release);
        }
        self.heir.store(heir.map_or(0, GroupId::get), Ordering::Release);
    }

    /// The group that has the last word, if it is not `asked`: the one that adopted the shard, or is to.
    pub fn went_on_from(&self, asked: GroupId) -> Option<GroupId> {
        let heir = self.heir();
        let owner = self.group();
        heir.or(Some(owner)).filter(|next| *next != asked)
    }

    /// What its replica had is gone from this node: no group's replica writes here any more, also if the group gets another
    /// one. Who reads looks elsewhere.
    pub(super) fn abandon(&self) {
        self.hand_over(NOWHERE, None);
        self.clear_recent();
        self.nudge();
    }

    /// Wakes those who wait, though nothing has changed: their replica has left this node.
    pub(super) fn nudge(&self) {
        self.positions.send_modify(|_| ());
    }

    /// As of the last applied entry.
    pub fn positions(&self) -> Positions {
        *self.positions.borrow()
    }

    /// Wakes on every apply that touched the shard.
    pub fn watch(&self) -> watch::Receiver<Positions> {
        self.positions.subscribe()
    }

    /// Apply only: after the write to `state/`, before the answers.
    pub(super) fn publish(&self, positions: Positions) {
        self.positions.send_replace(positions);
    }

    /// Apply only: remembers a batch just written.
    pub(super) fn push_recent(&self, batch: StoredBatch) {
        let mut recent = self.recent.lock();
        if recent.batches.back().is_some_and(|b| b.end() != batch.base) {
            self.clear_locked(&mut recent);
        }
        let size = batch.batch.len() + 128;
        recent.bytes += size;
        recent.fresh = true;
        recent.batches.push_back(batch);
        self.budget.used.fetch_add(size, Ordering::Relaxed);
        while self.budget.used() > self.budget.limit {
            let Some(front) = recent.batches.pop_front() else { break };
            let size = front.batch.len() + 128;
            recent.bytes -= size;
            self.budget.used.fetch_sub(size, Ordering::Relaxed);
        }
    }

    fn clear_locked(&self, recent: &mut Recent) {
        self.budget.used.fetch_sub(recent.bytes, Ordering::Relaxed);
        recent.bytes = 0;
        recent.batches.clear();
    }

    /// Apply only: forgets everything, as when deleted records changed what a batch delivers.
    pub(super) fn clear_recent(&self) {
        self.clear_locked(&mut self.recent.lock());
    }

    /// Called now and then: a shard without new batches since the last call gives its memory to the others.
    pub(super) fn sweep_recent(&self) {
        let mut recent = self.recent.lock();
        if !std::mem::take(&mut recent.fresh) {
            self.clear_locked(&mut recent);
        }
    }

    /// Batches from the one that holds `from` on, up to about `bytes_max`, if memory still has that one.
    pub fn recent_from(&self, from: Sequence, bytes_max: usize) -> Option<Vec<StoredBatch>> {
        let recent = self.recent.lock();
        if recent.batches.front().is_none_or(|b| b.base > from) {
            return None;
        }
        let start = recent.batches.partition_point(|b| b.end() <= from);
        let mut out = Vec::new();
        let mut bytes = 0;
        for batch in recent.batches.iter().skip(start) {
            if !out.is_empty() && bytes + batch.batch.len() > bytes_max {
                break;
            }
            bytes += batch.batch.len();
            out.push(batch.clone());
        }
        (!out.is_empty()).then_some(out)
    }
}

impl Drop for ShardShared {
    fn drop(&mut self) {
        self.clear_locked(&mut self.recent.lock());
    }
}

/// Shards share this many locks.
const APPLYING: usize = 1_024;

/// Every shard that has a replica on this node: one face for each, whichever groups' replicas have had it.
#[derive(Debug)]
pub struct ShardDirectory {
    shards: RwLock<HashMap<ShardId, Arc<ShardShared>>>,
    /// Held by a replica while it changes a shard, by shard: two groups never do at a time.
    applying: Box<[Mutex<()>]>,
    /// Shards of which a group's replica here takes over a snapshot: nobody sees them meanwhile.
    arriving: Mutex<HashMap<ShardId, GroupId>>,
}

impl Default for ShardDirectory {
    fn default() -> Self {
        Self {
            shards: RwLock::default(),
            applying: std::iter::repeat_with(Mutex::default).take(APPLYING).collect(),
            arriving: Mutex::default(),
        }
    }
}

impl ShardDirectory {
    pub fn get(&self, shard: ShardId) -> Option<Arc<ShardShared>> {
        self.shards.read().get(&shard).cloned()
    }

    pub fn all(&self) -> Vec<Arc<ShardShared>> {
        self.shards.read().values().cloned().collect()
    }

    /// No other group's replica changes the shard, or what is shown of it, until this is dropped.
    pub(super) fn applying(&self, shard: ShardId) -> MutexGuard<'_, ()> {
        self.applying[shard.get() as usize % APPLYING].lock()
    }

    /// While it is [held](Self::applying): the shard's face, which is this group's from now on. One that another group's replica
    /// here had is taken over, so that whoever reads the shard goes on.
    pub(super) fn face(
        &self,
        shard: ShardId,
        (group, heir): (GroupId, Option<GroupId>),
        budget: &Arc<RecentBudget>,
        positions: Positions,
    ) -> Arc<ShardShared> {
        if let Some(face) = self.get(shard) {
            face.hand_over(group, heir);
            return face;
        }
        let face = ShardShared::new(shard, group, budget.clone());
        face.hand_over(group, heir);
        face.publish(positions);
        self.shards.write().insert(shard, face.clone());
        face
    }

    pub(super) fn remove(&self, shard: ShardId) {
        self.shards.write().remove(&shard);
    }

    /// While it is held: what there is of the shard here is about to be replaced by what this group's replica takes over. Who
    /// reads it must not take what is missing meanwhile for what is gone: it looks elsewhere.
    pub(super) fn begin_arrival(&self, shard: ShardId, group: GroupId) {
        self.arriving.lock().insert(shard, group);
        self.take_away(shard, |_| true);
    }

    /// Everything that this group's replica took over is shown.
    pub(super) fn end_arrivals(&self, group: GroupId) {
        self.arriving.lock().retain(|_, to| *to != group);
    }

    /// The group whose replica here has the shard, or takes it over.
    pub(super) fn owner(&self, shard: ShardId) -> Option<GroupId> {
        let arriving = || self.arriving.lock().get(&shard).copied();
        self.get(shard).map(|face| face.group()).or_else(arriving)
    }

    /// What a group's replica had of a shard here is removed: nobody sees it any more.
    pub(super) fn abandon(&self, shard: ShardId, group: GroupId) {
        let _applying = self.applying(shard);
        self.take_away(shard, |owner| owner == group);
    }

    /// While it is held: nobody sees the shard here any more, if it is whose it should be.
    fn take_away(&self, shard: ShardId, whose: impl FnOnce(GroupId) -> bool) {
        if let Some(face) = self.get(shard).filter(|face| whose(face.group())) {
            self.remove(shard);
            face.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn batch(base: u64, count: u32, size: usize) -> StoredBatch {
        StoredBatch {
            base: Sequence::new(base),
            append_time: TimeUs::new(base),
            term: Term::new(1),
            record_count: count,
            rejected: vec![],
            batch: Bytes::from(vec![0; size]),
        }
    }

    #[test]
    fn recent_batches_are_bounded_and_found_by_sequence() {
        let budget = RecentBudget::new(3_000);
        let shard = ShardShared::new(ShardId::new(1), GroupId::new(2), budget.clone());
        for n in 0..10 {
            shard.push_recent(batch(1 + n * 10, 10, 872));
        }
        assert_eq!(budget.used(), 3_000);
        assert!(shard.recent_from(Sequence::new(1), 1 << 20).is_none());
        let found = shard.recent_from(Sequence::new(95), 1 << 20).expect("newest batch");
        assert_eq!(found[0].base, Sequence::new(91));
        let found = shard.recent_from(Sequence::new(71), 1_000).expect("oldest kept batch");
        assert_eq!((found[0].base, found.len()), (Sequence::new(71), 1));
        assert!(shard.recent_from(Sequence::new(101), 1 << 20).is_none());
        shard.sweep_recent();
        assert!(shard.recent_from(Sequence::new(95), 1 << 20).is_some());
        shard.sweep_recent();
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_gap_forgets_what_was_before() {
        let budget = RecentBudget::new(1 << 20);
        let shard = ShardShared::new(ShardId::new(1), GroupId::new(2), budget.clone());
        shard.push_recent(batch(1, 10, 100));
        shard.push_recent(batch(21, 10, 100));
        assert!(shard.recent_from(Sequence::new(1), 1 << 20).is_none());
        drop(shard);
        assert_eq!(budget.used(), 0);
    }

    /// The face that is found is the one that is written to, also where a group had the shard before and has it again, and its
    /// replica here was another one meanwhile.
    #[test]
    fn a_shard_has_one_face() {
        let budget = RecentBudget::new(1 << 20);
        let directory = ShardDirectory::default();
        let (shard, a, b) = (ShardId::new(1), GroupId::new(7), GroupId::new(8));
        let show = |group| directory.face(shard, (group, None), &budget, Positions::initial());
        let first = show(a);
        assert!(Arc::ptr_eq(&first, &show(b)));
        assert_eq!((first.group(), first.came_from(a)), (b, true));
        first.push_recent(batch(1, 10, 100));
        // The replica of another group has nothing to say.
        directory.abandon(shard, a);
        assert!(directory.get(shard).is_some());
        directory.abandon(shard, b);
        assert!(directory.get(shard).is_none());
        let second = show(b);
        second.leave_to(a);
        assert_eq!((second.heir(), second.went_on_from(b)), (Some(a), Some(a)));
        assert!(Arc::ptr_eq(&second, &show(a)));
        assert_eq!(
            (second.group(), second.went_on_from(a), second.went_on_from(b)),
            (a, None, Some(a))
        );
        assert!(Arc::ptr_eq(&second, &directory.get(shard).expect("it is there")));
        // Whoever holds the one from before does not take it for this one, though its group has a replica here again.
        assert!(first.group() != a && first.group() != b && !first.came_from(b));
        assert_eq!(budget.used(), 0);
        // Nor is what is being replaced by a snapshot seen, though it is known whose it will be.
        directory.begin_arrival(shard, b);
        assert!(directory.get(shard).is_none());
        assert_eq!((directory.owner(shard), second.group()), (Some(b), NOWHERE));
        show(b);
        directory.end_arrivals(b);
        assert_eq!(directory.owner(shard), Some(b));
    }
}
