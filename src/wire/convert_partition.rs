//! Partitioning and shard maps: wire ⇄ model.

use super::v1;
use crate::model::partition::{PartitionError, Partitioning, ShardMap, ShardMapError, SlotRange, TokenPositions};

impl TryFrom<&v1::Partitioning> for Partitioning {
    type Error = PartitionError;

    /// Nothing set means by subject.
    fn try_from(wire: &v1::Partitioning) -> Result<Self, PartitionError> {
        use v1::partitioning::By;
        match &wire.by {
            None | Some(By::Subject(_)) => Ok(Partitioning::Subject),
            Some(By::SubjectTokens(tokens)) => Ok(Partitioning::SubjectTokens(TokenPositions::new(
                tokens.positions.clone(),
            )?)),
            Some(By::Key(_)) => Ok(Partitioning::Key),
        }
    }
}

impl From<&Partitioning> for v1::Partitioning {
    fn from(model: &Partitioning) -> Self {
        use v1::partitioning::By;
        let by = match model {
            Partitioning::Subject => By::Subject(v1::BySubject {}),
            Partitioning::SubjectTokens(positions) => By::SubjectTokens(v1::BySubjectTokens {
                positions: positions.get().to_vec(),
            }),
            Partitioning::Key => By::Key(v1::ByKey {}),
        };
        v1::Partitioning { by: Some(by) }
    }
}

impl TryFrom<&v1::ShardMap> for ShardMap {
    type Error = ShardMapError;

    fn try_from(wire: &v1::ShardMap) -> Result<Self, ShardMapError> {
        let ranges = wire.ranges.iter().map(|range| SlotRange {
            first: range.first,
            last: range.last,
            shard: range.shard,
        });
        ShardMap::from_ranges(wire.epoch, ranges.collect())
    }
}

impl From<&ShardMap> for v1::ShardMap {
    fn from(model: &ShardMap) -> Self {
        let ranges = model.ranges().iter().map(|range| v1::SlotRange {
            first: range.first,
            last: range.last,
            shard: range.shard,
        });
        v1::ShardMap {
            epoch: model.epoch(),
            ranges: ranges.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let map = ShardMap::even(7).expect("valid");
        assert_eq!(ShardMap::try_from(&v1::ShardMap::from(&map)), Ok(map));
        let tokens = Partitioning::SubjectTokens(TokenPositions::new(vec![1, 3]).expect("valid"));
        for partitioning in [Partitioning::Subject, Partitioning::Key, tokens] {
            let wire = v1::Partitioning::from(&partitioning);
            assert_eq!(Partitioning::try_from(&wire), Ok(partitioning));
        }
        assert_eq!(
            Partitioning::try_from(&v1::Partitioning::default()),
            Ok(Partitioning::Subject)
        );
    }
}
