//! How messages are spread over the shards of a stream: partition bytes → slot → shard.

use xxhash_rust::xxh3::xxh3_64;

use super::limits::{PARTITION_TOKENS_MAX, SHARDS_MAX, SLOTS, SUBJECT_BYTES_MAX};

/// One of the 4,096 slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u16);

impl Slot {
    /// The slot of partition bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self((xxh3_64(bytes) % u64::from(SLOTS)) as u16)
    }

    /// 0–4,095.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }
}

/// Why a message has no slot, or a partitioning is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// The stream is partitioned by key and the message has none.
    #[error("the stream is partitioned by key, and the message has no key")]
    KeyMissing,
    /// Not 1–16 positions.
    #[error("partitioning by subject tokens names {count} positions; 1-{PARTITION_TOKENS_MAX} are allowed")]
    TokenCount { count: usize },
    /// Not ascending from 1.
    #[error("partitioning by subject tokens names position {position}; positions start at 1 and must be ascending")]
    TokenPosition { position: u32 },
}

/// What of a message decides its shard. Fixed when a stream is created.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Partitioning {
    /// The whole subject.
    #[default]
    Subject,
    /// Some tokens of the subject, joined by dots; one that is not there counts as empty.
    SubjectTokens(TokenPositions),
    /// The key.
    Key,
}

/// Positions of tokens, the first is 1. Ascending, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPositions(Vec<u32>);

impl TokenPositions {
    /// Checks them.
    pub fn new(positions: Vec<u32>) -> Result<Self, PartitionError> {
        if positions.is_empty() || positions.len() > PARTITION_TOKENS_MAX {
            return Err(PartitionError::TokenCount { count: positions.len() });
        }
        let mut last = 0;
        for &position in &positions {
            if position <= last || position > SUBJECT_BYTES_MAX as u32 {
                return Err(PartitionError::TokenPosition { position });
            }
            last = position;
        }
        Ok(Self(positions))
    }

    /// The positions.
    pub fn get(&self) -> &[u32] {
        &self.0
    }
}

impl Partitioning {
    /// Whether all messages of one subject are in one shard.
    pub fn keeps_subject_together(&self) -> bool {
        match self {
            Partitioning::Subject | Partitioning::SubjectTokens(_) => true,
            Partitioning::Key => false,
        }
    }

    /// The slot of a message with a valid subject.
    pub fn slot(&self, subject: &str, key: Option<&[u8]>) -> Result<Slot, PartitionError> {
        match self {
            Partitioning::Subject => Ok(Slot::of(subject.as_bytes())),
            Partitioning::SubjectTokens(positions) => Ok(slot_of_tokens(subject, positions)),
            Partitioning::Key => key.map(Slot::of).ok_or(PartitionError::KeyMissing),
        }
    }
}

fn slot_of_tokens(subject: &str, positions: &TokenPositions) -> Slot {
    // Tokens are taken once each, in order, so they are no longer than the subject; and a dot for each.
    let mut buffer = [0u8; SUBJECT_BYTES_MAX + PARTITION_TOKENS_MAX + 1];
    let mut length = 0;
    let mut tokens = subject.split('.');
    let mut next = 1;
    for (i, &position) in positions.0.iter().enumerate() {
        if i > 0 {
            buffer[length] = b'.';
            length += 1;
        }
        let token = tokens.nth((position - next) as usize).unwrap_or("").as_bytes();
        next = position + 1;
        // Only a subject that was never validated could be longer; it is cut rather than a reason to panic.
        let fits = token.len().min(buffer.len() - length);
        buffer[length..length + fits].copy_from_slice(&token[..fits]);
        length += fits;
        if length + 1 >= buffer.len() {
            break;
        }
    }
    Slot::of(&buffer[..length])
}

/// A run of slots that belong to one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRange {
    /// Inclusive.
    pub first: u32,
    /// Inclusive.
    pub last: u32,
    /// Index of the shard in its stream, from 0.
    pub shard: u32,
}

/// Why ranges are not a map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardMapError {
    /// A hole or an overlap.
    #[error("slots must be covered without a gap: expected a range from slot {expected}, found one from {found}")]
    Gap { expected: u32, found: u32 },
    /// Ends before it begins, or past the last slot.
    #[error("the range {first}-{last} is not within slots 0-4095")]
    Range { first: u32, last: u32 },
    /// The last slots belong to nobody.
    #[error("slots from {from} on are not covered")]
    Short { from: u32 },
    /// Not 1–1,024 shards.
    #[error("shard {shard} is past the most that a stream can have ({SHARDS_MAX})")]
    Shard { shard: u32 },
}

/// Slot → shard, with the epoch that tells one map from the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardMap {
    epoch: u64,
    ranges: Vec<SlotRange>,
    table: Box<[u16]>,
    shards: u32,
}

impl ShardMap {
    /// The first map of a stream with `shards` shards (1–1,024): even ranges, epoch 1.
    pub fn even(shards: u32) -> Result<Self, ShardMapError> {
        if shards == 0 || shards > SHARDS_MAX {
            return Err(ShardMapError::Shard { shard: shards });
        }
        let bound = |shard: u32| (u64::from(shard) * u64::from(SLOTS) / u64::from(shards)) as u32;
        let ranges = (0..shards)
            .map(|shard| SlotRange {
                first: bound(shard),
                last: bound(shard + 1) - 1,
                shard,
            })
            .collect();
        Self::from_ranges(1, ranges)
    }

    /// Checks that the ranges are ascending and cover every slot once.
    pub fn from_ranges(epoch: u64, ranges: Vec<SlotRange>) -> Result<Self, ShardMapError> {
        let mut table = Vec::with_capacity(SLOTS as usize);
        let mut shards = 0;
        for range in &ranges {
            let expected = table.len() as u32;
            if range.first != expected {
                return Err(ShardMapError::Gap {
                    expected,
                    found: range.first,
                });
            }
            if range.last < range.first || range.last >= SLOTS {
                return Err(ShardMapError::Range {
                    first: range.first,
                    last: range.last,
                });
            }
            if range.shard >= SHARDS_MAX {
                return Err(ShardMapError::Shard { shard: range.shard });
            }
            shards = shards.max(range.shard + 1);
            table.resize(range.last as usize + 1, range.shard as u16);
        }
        if table.len() as u32 != SLOTS {
            return Err(ShardMapError::Short {
                from: table.len() as u32,
            });
        }
        Ok(Self {
            epoch,
            ranges,
            table: table.into_boxed_slice(),
            shards,
        })
    }

    /// Raised by each change.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Index of the shard that owns a slot.
    pub fn shard(&self, slot: Slot) -> u32 {
        u32::from(self.table[usize::from(slot.0)])
    }

    /// How many shards the map names.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[SlotRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(positions: &[u32]) -> Partitioning {
        Partitioning::SubjectTokens(TokenPositions::new(positions.to_vec()).expect("valid"))
    }

    #[test]
    fn slots_are_fixed_for_ever() {
        // Golden: a change here would send known subjects to other shards.
        assert_eq!(Slot::of(b"").get(), 1_218);
        assert_eq!(Slot::of(b"orders.eu.17").get(), 79);
        assert_eq!(Slot::of(&[b'x'; 300]).get(), 1_364);
    }

    #[test]
    fn tokens_are_joined() {
        let subject = "orders.eu.17.x";
        let slot = |positions: &[u32]| tokens(positions).slot(subject, None).expect("slot");
        assert_eq!(slot(&[2]), Slot::of(b"eu"));
        assert_eq!(slot(&[1, 3]), Slot::of(b"orders.17"));
        assert_eq!(slot(&[2, 9]), Slot::of(b"eu."));
        assert_eq!(slot(&[9]), Slot::of(b""));
        let long = vec!["x"; 128].join(".");
        let all: Vec<u32> = (1..=16).collect();
        assert_eq!(
            tokens(&all).slot(&long, None).expect("slot"),
            Slot::of(vec!["x"; 16].join(".").as_bytes())
        );
        assert_eq!(
            tokens(&[1]).slot(&"y".repeat(255), None).expect("slot"),
            Slot::of("y".repeat(255).as_bytes())
        );
    }

    #[test]
    fn keys_are_required() {
        assert_eq!(Partitioning::Key.slot("a", Some(b"k")), Ok(Slot::of(b"k")));
        assert_eq!(Partitioning::Key.slot("a", None), Err(PartitionError::KeyMissing));
    }

    #[test]
    fn bad_positions() {
        assert!(TokenPositions::new(vec![]).is_err());
        assert!(TokenPositions::new(vec![0]).is_err());
        assert!(TokenPositions::new(vec![2, 2]).is_err());
        assert!(TokenPositions::new((1..=17).collect()).is_err());
    }

    #[test]
    fn even_maps_are_even() {
        for shards in [1, 2, 3, 7, 100, 1_000, 1_024] {
            let map = ShardMap::even(shards).expect("valid");
            assert_eq!((map.shards(), map.epoch()), (shards, 1));
            let mut owned = vec![0u32; shards as usize];
            for slot in 0..SLOTS {
                owned[map.shard(Slot(slot as u16)) as usize] += 1;
            }
            let (least, most) = (owned.iter().min(), owned.iter().max());
            assert!(
                most.zip(least).is_some_and(|(most, least)| most - least <= 1),
                "{shards}"
            );
        }
        assert!(ShardMap::even(0).is_err() && ShardMap::even(1_025).is_err());
    }

    #[test]
    fn maps_with_gaps_are_refused() {
        let range = |first, last, shard| SlotRange { first, last, shard };
        assert!(ShardMap::from_ranges(1, vec![]).is_err());
        assert!(ShardMap::from_ranges(1, vec![range(0, 4_094, 0)]).is_err());
        assert!(ShardMap::from_ranges(1, vec![range(0, 4_096, 0)]).is_err());
        assert!(ShardMap::from_ranges(1, vec![range(0, 10, 0), range(12, 4_095, 1)]).is_err());
        assert!(ShardMap::from_ranges(1, vec![range(0, 10, 0), range(10, 4_095, 1)]).is_err());
        assert!(ShardMap::from_ranges(1, vec![range(0, 4_095, 1_024)]).is_err());
        let map = ShardMap::from_ranges(7, vec![range(0, 10, 1), range(11, 4_095, 0)]).expect("valid");
        assert_eq!((map.shard(Slot(10)), map.shard(Slot(11)), map.epoch()), (1, 0, 7));
    }
}
