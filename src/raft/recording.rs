//! What an entry changes, noted while it is applied.

use super::catalog::MetaChange;
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::{GroupId, Sequence, ShardId, StoredBatch, Term};
use crate::storage::StateBatch;
use crate::wire::internal as pb;

/// The shard that a command is about.
pub(super) fn shard_of(op: &pb::group_command::Op) -> Option<ShardId> {
    use pb::group_command::Op;
    let raw = match op {
        Op::CreateShard(c) => c.shard_id,
        Op::UpdateShard(c) => c.shard_id,
        Op::RemoveShard(c) => c.shard_id,
        Op::Publish(c) => c.shard_id,
        Op::Expire(c) => c.shard_id,
        Op::Purge(c) => c.shard_id,
        Op::SealShard(c) => c.shard_id,
        Op::UnsealShard(c) => c.shard_id,
        Op::AdoptShard(c) => c.shard_id,
        Op::Meta(_) => return None,
    };
    Some(ShardId::new(raw))
}

/// What an entry changed, to be made visible once it is written.
#[derive(Default)]
pub(super) struct Touched {
    pub term: Term,
    pub shard: Option<ShardId>,
    pub holes: bool,
    pub batches: Vec<StoredBatch>,
    pub meta: Vec<MetaChange>,
}

/// Passes everything on, and keeps the batches for the recent tail.
pub(super) struct Recording<'a> {
    pub inner: &'a mut StateBatch,
    pub batches: &'a mut Vec<StoredBatch>,
    pub holes: &'a mut bool,
}

impl ShardSink for Recording<'_> {
    fn put_batch(&mut self, shard: ShardId, batch: &StoredBatch) {
        self.inner.put_batch(shard, batch);
        self.batches.push(batch.clone());
    }
    fn put_posting(&mut self, shard: ShardId, subject: &str, base: Sequence, offsets: &[u32]) {
        self.inner.put_posting(shard, subject, base, offsets);
    }
    fn put_holes(&mut self, shard: ShardId, base: Sequence, offsets: &[u32]) {
        *self.holes = true;
        self.inner.put_holes(shard, base, offsets);
    }
    fn put_ids(&mut self, shard: ShardId, at: Sequence, block: &[u8]) {
        self.inner.put_ids(shard, at, block);
    }
    fn drop_ids(&mut self, shard: ShardId, below: Sequence) {
        self.inner.drop_ids(shard, below);
    }
    fn put_producer(&mut self, shard: ShardId, producer: u64, record: &[u8]) {
        self.inner.put_producer(shard, producer, record);
    }
    fn drop_producer(&mut self, shard: ShardId, producer: u64) {
        self.inner.drop_producer(shard, producer);
    }
    fn put_shard(&mut self, shard: ShardId, group: GroupId, record: &[u8]) {
        self.inner.put_shard(shard, group, record);
    }
    fn drop_batches(&mut self, shard: ShardId, from: Sequence, to: Sequence) {
        self.inner.drop_batches(shard, from, to);
    }
    fn drop_shard(&mut self, shard: ShardId) {
        self.inner.drop_shard(shard);
    }
    fn put_meta(&mut self, kind: MetaKind, key: &[u8], record: &[u8]) {
        self.inner.put_meta(kind, key, record);
    }
    fn drop_meta(&mut self, kind: MetaKind, key: &[u8]) {
        self.inner.drop_meta(kind, key);
    }
}
