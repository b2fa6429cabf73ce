//! Below which batch and which id block each shard's data was trimmed: as applied, and as far as that is durable.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::model::{Sequence, ShardId};

/// The floors of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Floors {
    /// Base of the first batch kept. Inclusive. Raised by `drop_batches`.
    pub batches: Sequence,
    /// Key of the first id block kept. Inclusive. Raised by `drop_ids`.
    pub ids: Sequence,
}

/// The floors of every shard that has any.
pub type FloorTable = HashMap<ShardId, Floors>;

/// Floors that were flushed. Only these may make anything go for good. Replaced whole, so that a compaction takes its
/// copy by one reference count.
#[derive(Debug, Default)]
pub struct DurableFloors(RwLock<Arc<FloorTable>>);

impl DurableFloors {
    /// What is durable now.
    pub fn snapshot(&self) -> Arc<FloorTable> {
        self.0.read().clone()
    }

    /// Takes over what a flush that began with `captured` has made durable.
    pub fn advance(&self, captured: FloorTable) {
        *self.0.write() = Arc::new(captured);
    }

    /// A shard was dropped: it may come back with less, so nothing of it may go on the word of the old floor.
    pub fn forget(&self, shard: ShardId) {
        let mut table = self.0.write();
        if table.contains_key(&shard) {
            Arc::make_mut(&mut table).remove(&shard);
        }
    }
}
