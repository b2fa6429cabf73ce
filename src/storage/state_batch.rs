//! What an apply writes: the machine's sink, gathered into one atomic write together with the applied marker.

use rocksdb::WriteBatch;

use super::envelope;
use super::floors::Floors;
use super::keys::{self, Key, KeyRange};
use super::offsets;
use super::record::frame_into;
use super::state::StateDb;
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::{GroupId, LogIndex, Sequence, ShardId, StoredBatch};

/// What a written batch changes in memory, in order.
pub(super) enum Effect {
    Applied(GroupId, LogIndex),
    Floors(ShardId, Floors),
    DropShard(ShardId),
    DropApplied(GroupId),
}

/// Writes that go to state/ together or not at all.
pub struct StateBatch {
    db: StateDb,
    writes: WriteBatch,
    effects: Vec<Effect>,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl StateBatch {
    pub(super) fn new(db: StateDb) -> Self {
        StateBatch {
            db,
            writes: WriteBatch::default(),
            effects: Vec::new(),
            key: Vec::new(),
            value: Vec::new(),
        }
    }

    pub(super) fn into_parts(self) -> (WriteBatch, Vec<Effect>) {
        (self.writes, self.effects)
    }

    /// Bytes gathered so far.
    pub fn bytes(&self) -> usize {
        self.writes.size_in_bytes()
    }

    /// Whether nothing was gathered.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Sets the group's applied marker: the index of the last entry whose effects are in this batch, and whatever the
    /// raft layer keeps beside it.
    pub fn set_applied(&mut self, group: GroupId, index: LogIndex, marker: &[u8]) {
        self.put(&Key::Applied(group), |out| {
            out.extend_from_slice(&index.get().to_le_bytes());
            out.extend_from_slice(marker);
        });
        self.effects.push(Effect::Applied(group, index));
    }

    /// Forgets the group's applied marker.
    pub(super) fn drop_applied(&mut self, group: GroupId) {
        self.delete(&Key::Applied(group));
        self.effects.push(Effect::DropApplied(group));
    }

    fn put(&mut self, key: &Key<'_>, payload: impl FnOnce(&mut Vec<u8>)) {
        self.key.clear();
        key.encode_into(&mut self.key);
        frame_into(&mut self.value, &self.key, payload);
        self.writes.put(&self.key, &self.value);
    }

    /// Removes every record of the meta group.
    pub(super) fn drop_all_meta(&mut self) {
        self.delete_range(keys::all_meta());
    }

    /// Removes a shard but for its batches in these ranges, which ascend. Its floors are gone as if it were removed.
    pub(super) fn drop_shard_but(&mut self, shard: ShardId, kept: &[KeyRange]) {
        self.delete(&Key::Shard(shard));
        self.delete(&Key::BatchFloor(shard));
        self.delete(&Key::IdFloor(shard));
        self.delete_range(keys::producers_of(shard));
        self.delete_range(keys::ids_of(shard));
        self.delete_range(keys::holes_of(shard));
        self.delete_range(keys::postings_of(shard, b""));
        let (mut from, to) = keys::batches_of(shard);
        let mut drop = |from: &[u8], to: &[u8]| {
            if from < to {
                self.writes.delete_range_cf(self.db.0.batches(), from, to);
            }
        };
        let first = kept.partition_point(|(_, end)| *end <= from);
        for (begin, end) in kept[first..].iter().take_while(|(begin, _)| *begin < to) {
            drop(&from, begin);
            from.clone_from(end);
        }
        drop(&from, &to);
        self.effects.push(Effect::DropShard(shard));
    }

    fn delete(&mut self, key: &Key<'_>) {
        self.writes.delete(key.encode());
    }

    fn delete_range(&mut self, (from, to): KeyRange) {
        self.writes.delete_range(from, to);
    }

    /// The floors as they will be when what was gathered so far is written.
    fn floors(&self, shard: ShardId) -> Floors {
        for effect in self.effects.iter().rev() {
            match effect {
                Effect::Floors(s, floors) if *s == shard => return *floors,
                Effect::DropShard(s) if *s == shard => return Floors::default(),
                Effect::Applied(..) | Effect::Floors(..) | Effect::DropShard(_) | Effect::DropApplied(_) => {}
            }
        }
        self.db.0.floors.read().get(&shard).copied().unwrap_or_default()
    }
}

impl ShardSink for StateBatch {
    fn put_batch(&mut self, shard: ShardId, batch: &StoredBatch) {
        self.key.clear();
        Key::Batch(shard, batch.base).encode_into(&mut self.key);
        envelope::encode_into(&mut self.value, &self.key, batch);
        self.writes.put_cf(self.db.0.batches(), &self.key, &self.value);
    }

    fn put_posting(&mut self, shard: ShardId, subject: &str, base: Sequence, list: &[u32]) {
        self.put(&Key::Posting(shard, subject.as_bytes(), base), |out| {
            offsets::encode(out, list);
        });
    }

    fn put_holes(&mut self, shard: ShardId, base: Sequence, list: &[u32]) {
        self.put(&Key::Holes(shard, base), |out| offsets::encode(out, list));
    }

    fn put_ids(&mut self, shard: ShardId, at: Sequence, block: &[u8]) {
        self.put(&Key::Ids(shard, at), |out| out.extend_from_slice(block));
    }

    /// Only raises the floor: id blocks below it are not read any more, and go when compaction meets them.
    fn drop_ids(&mut self, shard: ShardId, below: Sequence) {
        let mut floors = self.floors(shard);
        if floors.ids < below {
            floors.ids = below;
            self.put(&Key::IdFloor(shard), |out| {
                out.extend_from_slice(&below.get().to_le_bytes());
            });
            self.effects.push(Effect::Floors(shard, floors));
        }
    }

    fn put_producer(&mut self, shard: ShardId, producer: u64, record: &[u8]) {
        self.put(&Key::Producer(shard, producer), |out| out.extend_from_slice(record));
    }

    fn drop_producer(&mut self, shard: ShardId, producer: u64) {
        self.delete(&Key::Producer(shard, producer));
    }

    fn put_shard(&mut self, shard: ShardId, group: GroupId, record: &[u8]) {
        self.put(&Key::Shard(shard), |out| {
            out.extend_from_slice(&group.get().to_le_bytes());
            out.extend_from_slice(record);
        });
    }

    /// Only raises the floor. The batches are not read any more; they are removed in the background once the floor is
    /// durable, one range deletion per shard for many trims.
    fn drop_batches(&mut self, shard: ShardId, _from: Sequence, to: Sequence) {
        let mut floors = self.floors(shard);
        if floors.batches < to {
            floors.batches = to;
            self.put(&Key::BatchFloor(shard), |out| {
                out.extend_from_slice(&to.get().to_le_bytes());
            });
            self.effects.push(Effect::Floors(shard, floors));
        }
    }

    fn drop_shard(&mut self, shard: ShardId) {
        self.drop_shard_but(shard, &[]);
    }

    fn put_meta(&mut self, kind: MetaKind, key: &[u8], record: &[u8]) {
        self.put(&Key::Meta(kind as u8, key), |out| out.extend_from_slice(record));
    }

    fn drop_meta(&mut self, kind: MetaKind, key: &[u8]) {
        self.delete(&Key::Meta(kind as u8, key));
    }
}
