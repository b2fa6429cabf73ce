//! Which shard a message belongs to.

use crate::client::error::{ClientError, reason};
use crate::model::batch::RecordFields;
use crate::model::partition::{SlotRange, TokenPositions};
use crate::model::{Partitioning, ShardMap};
use crate::wire::v1;

/// How a stream is cut into shards.
#[derive(Debug, Clone)]
pub(super) struct Splitter {
    partitioning: Partitioning,
    map: ShardMap,
}

impl Splitter {
    pub(super) fn new(spec: Option<&v1::StreamSpec>, map: Option<&v1::ShardMap>) -> Result<Self, ClientError> {
        let partitioning = match spec.and_then(|s| s.partitioning.as_ref()).and_then(|p| p.by.as_ref()) {
            None | Some(v1::partitioning::By::Subject(_)) => Partitioning::Subject,
            Some(v1::partitioning::By::SubjectTokens(t)) => {
                let positions = TokenPositions::new(t.positions.clone())
                    .map_err(|e| ClientError::bad_answer(format!("the stream's partitioning: {e}")))?;
                Partitioning::SubjectTokens(positions)
            }
            Some(v1::partitioning::By::Key(_)) => Partitioning::Key,
        };
        let map = map.ok_or_else(|| ClientError::bad_answer("the server did not send the stream's shard map"))?;
        Ok(Splitter {
            partitioning,
            map: read_map(map)?,
        })
    }

    /// The same partitioning under another map.
    pub(super) fn with_map(&self, map: &v1::ShardMap) -> Result<Self, ClientError> {
        Ok(Splitter {
            partitioning: self.partitioning.clone(),
            map: read_map(map)?,
        })
    }

    pub(super) fn epoch(&self) -> u64 {
        self.map.epoch()
    }

    pub(super) fn shards(&self) -> usize {
        self.map.shards() as usize
    }

    /// Index of the shard that a message belongs to.
    pub(super) fn shard_of(&self, fields: &RecordFields<'_>) -> Result<u32, ClientError> {
        if self.map.shards() == 1 && self.partitioning != Partitioning::Key {
            return Ok(0);
        }
        self.partitioning
            .slot(fields.subject, fields.key)
            .map(|slot| self.map.shard(slot))
            .map_err(|e| ClientError::invalid(reason::BAD_MESSAGE, e.to_string()))
    }

    /// Whether every slot is in the same shard under both maps.
    pub(super) fn places_like(&self, other: &Splitter) -> bool {
        self.map.ranges() == other.map.ranges()
    }
}

fn read_map(map: &v1::ShardMap) -> Result<ShardMap, ClientError> {
    let ranges = map
        .ranges
        .iter()
        .map(|r| SlotRange {
            first: r.first,
            last: r.last,
            shard: r.shard,
        })
        .collect();
    ShardMap::from_ranges(map.epoch, ranges)
        .map_err(|e| ClientError::bad_answer(format!("the stream's shard map: {e}")))
}
