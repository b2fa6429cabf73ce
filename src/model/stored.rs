//! A batch as it lies in a shard: the producer's bytes, and where and when they were put.

use bytes::Bytes;

use super::{Sequence, Term, TimeUs};

/// A batch at its place in a shard. The producer's bytes are never changed; which of its records count is beside them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBatch {
    /// Sequence of the first stored record. Inclusive.
    pub base: Sequence,
    /// When the shard's leader appended it; never less than the batch before.
    pub append_time: TimeUs,
    /// Raft term of the entry that carried it.
    pub term: Term,
    /// Records in `batch`, stored or not.
    pub record_count: u32,
    /// Positions of records rejected at apply as duplicates: they have no sequence. Ascending.
    pub rejected: Vec<u32>,
    /// The encoded batch (`docs/reference/batch.md`), as the producer sent it.
    pub batch: Bytes,
}

impl StoredBatch {
    /// How many records have a sequence.
    pub fn stored_count(&self) -> u64 {
        u64::from(self.record_count) - self.rejected.len() as u64
    }

    /// The sequence after the last one of this batch.
    pub fn end(&self) -> Sequence {
        self.base.plus(self.stored_count())
    }
}
