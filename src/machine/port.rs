//! What a machine needs from outside, as two narrow traits: a view of its own group's applied state, and a sink for
//! what an apply writes. `storage` implements both; tests implement them over maps.

use bytes::Bytes;

use crate::model::{GroupId, Sequence, ShardId, StoredBatch};

/// Why the view could not answer. The apply stops; nothing is guessed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot read applied state: {0}")]
pub struct ViewError(pub String);

/// A group's own applied state, as of the entries before the one that is being applied; it may or may not show what the
/// same apply has written so far (a machine remembers that itself). Reading it is deterministic: it depends only on the
/// entries applied so far. Nothing below the floor is ever returned by a machine even if the view still has it.
pub trait ShardView {
    /// The batch with the largest base at or below `sequence` (which may end before `sequence`), as written.
    fn batch_at_or_before(&self, shard: ShardId, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError>;

    /// The batch with the smallest base at or above `sequence`.
    fn batch_at_or_after(&self, shard: ShardId, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError>;

    /// Offsets (from the batch's base) of records deleted since, for the batch with this base. Ascending.
    fn holes(&self, shard: ShardId, base: Sequence) -> Result<Vec<u32>, ViewError>;

    /// The last posting of exactly this subject: the base it was written under and the offsets from that base.
    fn last_posting(&self, shard: ShardId, subject: &str) -> Result<Option<(Sequence, Vec<u32>)>, ViewError>;

    /// The last posting of this subject whose base is below `below`.
    fn posting_before(
        &self,
        shard: ShardId,
        subject: &str,
        below: Sequence,
    ) -> Result<Option<(Sequence, Vec<u32>)>, ViewError>;

    /// A shard as it was last written, whichever group holds it: that of another group only when it adopts it.
    fn shard_state(&self, shard: ShardId) -> Result<Option<ShardState>, ViewError>;
}

/// What is kept of a shard besides its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardState {
    /// The group that holds it.
    pub group: GroupId,
    /// An encoded `ShardRecord`.
    pub record: Bytes,
    /// Encoded `ProducerRecord`s by id.
    pub producers: Vec<(u64, Bytes)>,
    /// Encoded `IdBlock`s, ascending by key.
    pub id_blocks: Vec<(Sequence, Bytes)>,
}

/// What an apply writes. Everything between two commits of the sink, with the applied marker, is one atomic write.
pub trait ShardSink {
    fn put_batch(&mut self, shard: ShardId, batch: &StoredBatch);
    /// Positions of one subject's records as ascending offsets from `base`. One per subject per applied publish.
    fn put_posting(&mut self, shard: ShardId, subject: &str, base: Sequence, offsets: &[u32]);
    /// Replaces the offsets of records deleted from the batch with this base.
    fn put_holes(&mut self, shard: ShardId, base: Sequence, offsets: &[u32]);
    /// An encoded `IdBlock`, keyed by the sequence `at` (first sequence of the publish that brought the ids).
    fn put_ids(&mut self, shard: ShardId, at: Sequence, block: &[u8]);
    /// Id blocks with a key below `below` are no longer needed.
    fn drop_ids(&mut self, shard: ShardId, below: Sequence);
    /// An encoded `ProducerRecord`.
    fn put_producer(&mut self, shard: ShardId, producer: u64, record: &[u8]);
    fn drop_producer(&mut self, shard: ShardId, producer: u64);
    /// An encoded `ShardRecord`, with the group that holds the shard.
    fn put_shard(&mut self, shard: ShardId, group: GroupId, record: &[u8]);
    /// Batches whose base is in [from, to) are no longer needed; `to` is the base of the first batch that is, so no
    /// batch is cut. The floor itself is in the shard record. A posting is no longer needed when its last offset, counted
    /// from its base, is below `to`; its base may be below before that.
    fn drop_batches(&mut self, shard: ShardId, from: Sequence, to: Sequence);
    /// Everything of this shard goes.
    fn drop_shard(&mut self, shard: ShardId);
    /// A record of the meta group, by kind and key.
    fn put_meta(&mut self, kind: MetaKind, key: &[u8], record: &[u8]);
    fn drop_meta(&mut self, kind: MetaKind, key: &[u8]);
}

/// The kinds of record in the meta group's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum MetaKind {
    Cluster = 1,
    Node = 2,
    Group = 3,
    Stream = 4,
    /// Answers to recent request ids.
    Request = 5,
}
