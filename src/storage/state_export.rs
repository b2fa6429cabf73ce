//! The state of one group, as a stream of records for another node (`state_pieces.rs`). Taken from a consistent view of
//! the engine, while applies go on.
//!
//! Values keep their frame with version and CRC, which is checked on both sides, so that damage is never passed on.
//! Records of a family ascend by key; the index comes first. What is below a floor is left out.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use rocksdb::{ColumnFamily, ReadOptions};

use super::engine;
use super::envelope;
use super::error::{Area, StorageError};
use super::floors::{FloorTable, Floors};
use super::keys::{self, Key, KeyRange};
use super::record::{corrupt, take_u64, unframe};
use super::shared::read_error;
use super::state::StateDb;
use super::state_pieces::{Cut, Cutter, Digest, Family, Piece, Stretch};
use super::state_stage::StageError;
use crate::model::{GroupId, LogIndex, Sequence, ShardId};

/// What was exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exported {
    pub records: u64,
    pub bytes: u64,
}

/// Holds back what would remove trimmed records for good, as long as an export may still have to read them: the
/// compaction filter looks at no snapshot.
struct Held<'a>(&'a StateDb);

impl<'a> Held<'a> {
    fn new(db: &'a StateDb) -> Self {
        db.0.exports.fetch_add(1, Ordering::SeqCst);
        Held(db)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.0.exports.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The shards of an export, with their floors.
pub type ExportedShards = BTreeMap<ShardId, Floors>;

/// A consistent view of a group's state. As long as there is one, no floor becomes durable.
pub struct GroupView<'a> {
    db: &'a StateDb,
    group: GroupId,
    snapshot: rocksdb::Snapshot<'a>,
    applied: Option<(LogIndex, Bytes)>,
    shards: ExportedShards,
    _held: Held<'a>,
}

/// What a walk through a view meets.
pub(super) enum Met<'r> {
    Record(Family, &'r [u8], &'r [u8]),
    /// A record that is there and cannot be used.
    Damaged(Family, &'r [u8], StorageError),
}

fn exactly(key: &Key<'_>) -> KeyRange {
    let from = key.encode();
    let mut to = from.clone();
    to.push(0);
    (from, to)
}

/// Everything that belongs to these shards, in the order of an export. Without what is below the batch floors.
fn ranges_of(group: GroupId, shards: &ExportedShards) -> Vec<(Family, KeyRange)> {
    let mut ranges = Vec::new();
    // By tag and then by shard: that is the order of keys.
    for of_shard in INDEX_OF_SHARD {
        ranges.extend(shards.keys().map(|shard| (Family::Index, of_shard(*shard))));
    }
    if group == GroupId::META {
        ranges.push((Family::Index, keys::all_meta()));
    }
    ranges.extend(shards.iter().map(|(shard, floors)| {
        let (_, to) = keys::batches_of(*shard);
        (Family::Batches, (envelope::key(*shard, floors.batches), to))
    }));
    ranges
}

const INDEX_OF_SHARD: [fn(ShardId) -> KeyRange; 7] = [
    |s| exactly(&Key::Shard(s)),
    keys::producers_of,
    keys::ids_of,
    keys::holes_of,
    |s| keys::postings_of(s, b""),
    |s| exactly(&Key::BatchFloor(s)),
    |s| exactly(&Key::IdFloor(s)),
];

impl<'a> GroupView<'a> {
    fn new(db: &'a StateDb, group: GroupId) -> Result<Self, StorageError> {
        let held = Held::new(db);
        let mut view = Self {
            db,
            group,
            snapshot: db.0.db.snapshot(),
            applied: None,
            shards: ExportedShards::new(),
            _held: held,
        };
        if let Some(value) = view.get(&Key::Applied(group))? {
            let mut payload = &value[..];
            let index = take_u64(&mut payload)
                .ok_or_else(|| corrupt(Area::State, &Key::Applied(group).encode(), "too short"))?;
            view.applied = Some((LogIndex::new(index), Bytes::copy_from_slice(payload)));
        }
        view.shards = view.shards_of_group()?;
        Ok(view)
    }

    /// The group's applied marker in it; `None`: nothing of the group was ever applied.
    pub fn applied(&self) -> Option<&(LogIndex, Bytes)> {
        self.applied.as_ref()
    }

    /// The group's shards in it.
    pub fn shards(&self) -> &ExportedShards {
        &self.shards
    }

    /// Tells the pieces that everything consists of; the sink's false ends it (and makes the answer false).
    pub fn pieces(&self, mut sink: impl FnMut(Piece) -> bool) -> Result<bool, StorageError> {
        self.cut(&[Stretch::everything()], |cut| {
            sink(Piece {
                bytes: cut.data.len() as u64,
                digest: Digest::of(&cut.data),
                from: cut.from,
            })
        })
    }

    /// Exports these stretches, which are united, piece by piece. The sink's false ends the export (`Ok(None)`).
    pub fn export(
        &self,
        stretches: &[Stretch],
        mut sink: impl FnMut(Bytes) -> bool,
    ) -> Result<Option<Exported>, StorageError> {
        let mut done = Exported::default();
        let all = self.cut(stretches, |cut| {
            done.records += cut.records;
            done.bytes += cut.data.len() as u64;
            sink(cut.data)
        })?;
        Ok(all.then_some(done))
    }

    fn cut(&self, stretches: &[Stretch], mut sink: impl FnMut(Cut) -> bool) -> Result<bool, StorageError> {
        let mut cutter = Cutter::default();
        for stretch in stretches {
            let mut last = Family::Index;
            let mut failed = None;
            let goes_on = self.walk(&self.shards, stretch, |met| match met {
                Met::Record(family, key, value) => {
                    // A piece is of one family.
                    let before = (family != last).then(|| cutter.take()).flatten();
                    last = family;
                    let cuts = cutter.push(family, key, value);
                    before.into_iter().chain(cuts.into_iter().flatten()).all(&mut sink)
                }
                Met::Damaged(_, _, error) => {
                    failed = Some(error);
                    false
                }
            })?;
            if let Some(error) = failed {
                return Err(error);
            }
            if !goes_on || !cutter.take().is_none_or(&mut sink) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Goes through the records of a stretch, as if these were the group's shards. False from `visit` ends it.
    pub(super) fn walk(
        &self,
        shards: &ExportedShards,
        stretch: &Stretch,
        mut visit: impl FnMut(Met<'_>) -> bool,
    ) -> Result<bool, StorageError> {
        let inner = &*self.db.0;
        let floors: FloorTable = shards.iter().map(|(shard, floors)| (*shard, *floors)).collect();
        for (family, (mut from, mut to)) in ranges_of(self.group, shards) {
            if family < stretch.from.family || (family == stretch.from.family && to[..] <= stretch.from.key[..]) {
                continue;
            }
            if family == stretch.from.family && from[..] < stretch.from.key[..] {
                from = stretch.from.key.to_vec();
            }
            if let Some(end) = &stretch.to {
                if family > end.family || (family == end.family && from[..] >= end.key[..]) {
                    break;
                }
                if family == end.family && to[..] > end.key[..] {
                    to = end.key.to_vec();
                }
            }
            let handle: &ColumnFamily = match family {
                Family::Index => inner.index(),
                Family::Batches => inner.batches(),
            };
            let mut options = ReadOptions::default();
            options.set_snapshot(&self.snapshot);
            options.set_iterate_upper_bound(to);
            options.set_readahead_size(256 << 10);
            options.fill_cache(false);
            let mut iter = inner.db.raw_iterator_cf_opt(handle, options);
            iter.seek(from);
            while let Some((key, value)) = iter.item() {
                // Also checks what is left out: damage is found when it is met.
                let goes_on = match unframe(Area::State, key, value) {
                    Err(error) => visit(Met::Damaged(family, key, error)),
                    Ok(_) if engine::is_stale(&floors, key, value) => true,
                    Ok(_) => visit(Met::Record(family, key, value)),
                };
                if !goes_on {
                    return Ok(false);
                }
                iter.next();
            }
            iter.status()
                .map_err(|e| read_error(Area::State, "reading a group", &e))?;
        }
        Ok(true)
    }

    fn get(&self, key: &Key<'_>) -> Result<Option<Vec<u8>>, StorageError> {
        let key = key.encode();
        let mut options = ReadOptions::default();
        options.set_snapshot(&self.snapshot);
        match self.db.0.db.get_pinned_opt(&key, &options) {
            Ok(None) => Ok(None),
            Ok(Some(value)) => unframe(Area::State, &key, &value).map(|p| Some(p.to_vec())),
            Err(e) => Err(read_error(Area::State, "reading a group", &e)),
        }
    }

    fn shards_of_group(&self) -> Result<ExportedShards, StorageError> {
        let mut shards = ExportedShards::new();
        self.each_record(|shard, _| {
            shards.insert(shard, self.floors_of(shard)?);
            Ok(())
        })?;
        Ok(shards)
    }

    /// The first of the group's shards whose record is like that.
    pub fn find_shard(&self, is_like_that: impl Fn(&[u8]) -> bool) -> Result<Option<ShardId>, StorageError> {
        let mut found = None;
        self.each_record(|shard, record| {
            found = found.or(is_like_that(record).then_some(shard));
            Ok(())
        })?;
        Ok(found)
    }

    /// The group's shards with their records.
    fn each_record(&self, mut met: impl FnMut(ShardId, &[u8]) -> Result<(), StorageError>) -> Result<(), StorageError> {
        let (from, to) = keys::all_shards();
        let mut options = ReadOptions::default();
        options.set_snapshot(&self.snapshot);
        options.set_iterate_upper_bound(to);
        let mut iter = self.db.0.db.raw_iterator_opt(options);
        iter.seek(from);
        while let Some((key, value)) = iter.item() {
            let mut payload = unframe(Area::State, key, value)?;
            match (Key::decode(key), take_u64(&mut payload)) {
                (Some(Key::Shard(shard)), Some(owner)) if owner == self.group.get() => met(shard, payload)?,
                (Some(Key::Shard(_)), Some(_)) => {}
                _ => return Err(corrupt(Area::State, key, "too short")),
            }
            iter.next();
        }
        iter.status().map_err(|e| read_error(Area::State, "listing shards", &e))
    }

    fn floors_of(&self, shard: ShardId) -> Result<Floors, StorageError> {
        let number = |value: Option<Vec<u8>>| value.and_then(|v| take_u64(&mut &v[..])).map(Sequence::new);
        Ok(Floors {
            batches: number(self.get(&Key::BatchFloor(shard))?).unwrap_or_default(),
            ids: number(self.get(&Key::IdFloor(shard))?).unwrap_or_default(),
        })
    }
}

/// Whether a record may be part of an export of this group with these shards.
pub(super) fn check(
    group: GroupId,
    family: Family,
    key: &[u8],
    value: &[u8],
    shards: &ExportedShards,
) -> Result<(), StageError> {
    let refused = |what: String| Err(StageError::Refused(what));
    let mut payload = unframe(Area::State, key, value).map_err(|e| StageError::Refused(e.to_string()))?;
    let Some(key) = Key::decode(key) else {
        return refused("a key of no kind this version knows".into());
    };
    let of = match key {
        Key::Shard(shard) => {
            if take_u64(&mut payload) != Some(group.get()) {
                return refused(format!("{shard} is of another group"));
            }
            shard
        }
        Key::BatchFloor(shard) | Key::IdFloor(shard) => {
            let of_batches = matches!(key, Key::BatchFloor(_));
            let told = shards.get(&shard).map(|f| if of_batches { f.batches } else { f.ids });
            if take_u64(&mut payload).map(Sequence::new) != told {
                return refused(format!("a floor of {shard} is not what was told before"));
            }
            shard
        }
        Key::Producer(shard, _) | Key::Ids(shard, _) | Key::Holes(shard, _) | Key::Posting(shard, ..) => shard,
        Key::Batch(shard, _) if family == Family::Batches => shard,
        Key::Meta(..) if group == GroupId::META && family == Family::Index => return Ok(()),
        Key::Batch(..)
        | Key::Meta(..)
        | Key::Applied(_)
        | Key::Flush
        | Key::Entry(..)
        | Key::Vote(_)
        | Key::Committed(_)
        | Key::Purged(_)
        | Key::First(_)
        | Key::Quarantine(_)
        | Key::Owner(_)
        | Key::Retired(_)
        | Key::BatchRecord => return refused(format!("a {} is not part of it", key.kind())),
    };
    let right_family = (family == Family::Batches) == matches!(key, Key::Batch(..));
    if !right_family || !shards.contains_key(&of) {
        return refused(format!("a {} of {of} where it does not belong", key.kind()));
    }
    Ok(())
}

impl StateDb {
    /// Takes a consistent view of a group. Blocks as long as the work does; use a thread that may.
    pub fn view_group<T>(
        &self,
        group: GroupId,
        work: impl FnOnce(&GroupView<'_>) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let result = GroupView::new(self, group).and_then(|view| work(&view));
        self.0.shared.note(result)
    }

    /// Exports all of a group, as it is now: in chunks of whole records, of about half a mebibyte each. The sink's
    /// false ends the export (`Ok(None)`). Blocks; use a thread that may.
    pub fn export_group(
        &self,
        group: GroupId,
        sink: impl FnMut(Bytes) -> bool,
    ) -> Result<Option<Exported>, StorageError> {
        self.view_group(group, |view| view.export(&[Stretch::everything()], sink))
    }
}
