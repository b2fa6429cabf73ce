//! Sequences are dense, and none ever changes its content, on no replica.

use std::collections::BTreeMap;

use mainstem::model::{ReplicaId, Sequence, ShardId, StoredBatch};

use super::{Verdict, broken};

#[derive(Default)]
pub struct Dense(BTreeMap<(ShardId, Sequence), (StoredBatch, ReplicaId)>);

impl Dense {
    /// A replica shows a batch where `expected` is the next sequence.
    pub fn shows(&mut self, shard: ShardId, expected: Sequence, batch: &StoredBatch, by: ReplicaId) -> Verdict {
        if batch.base != expected {
            return Err(broken(
                "sequences are dense",
                format!("{by} shows {} of {shard} after {expected} was next", batch.base),
            ));
        }
        let (first, first_by) = self.0.entry((shard, batch.base)).or_insert_with(|| (batch.clone(), by));
        if first == batch {
            return Ok(());
        }
        Err(broken(
            "sequences never change their content",
            format!(
                "{shard} at {}: {first_by} showed {first:?}, {by} shows {batch:?}",
                batch.base
            ),
        ))
    }
}
