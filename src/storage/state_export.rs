//! The state of one group, as a stream of records for another node. Taken from a consistent view of the engine, while
//! applies go on.
//!
//! A record: family (1 byte: 0 index, 1 batches), length of the key and of the value (LEB128), key, value. Values keep
//! their frame with version and CRC, which is checked on both sides, so that damage is never passed on. Records of a
//! family ascend by key; the index comes first. What is below a floor is left out.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use bytes::{Buf as _, Bytes};
use rocksdb::{ColumnFamily, ReadOptions};

use super::engine;
use super::envelope;
use super::error::{Area, StorageError};
use super::floors::FloorTable;
use super::keys::{self, Key, KeyRange};
use super::record::{corrupt, put_varint, take_u64, take_varint, unframe};
use super::shared::read_error;
use super::state::StateDb;
use crate::model::{GroupId, LogIndex, Sequence, ShardId};

/// A chunk is closed when it is this large.
pub const CHUNK_BYTES: usize = 512 << 10;

/// A family of `state/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    Index = 0,
    Batches = 1,
}

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Family::Index => "index",
            Family::Batches => "batches",
        }
    }
}

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

/// Takes records off the front of a chunk.
pub(super) fn take_record(chunk: &mut Bytes) -> Option<(Family, Bytes, Bytes)> {
    let mut rest = &chunk[..];
    let (&family, after) = rest.split_first()?;
    rest = after;
    let family = match family {
        0 => Family::Index,
        1 => Family::Batches,
        _ => return None,
    };
    let key = usize::try_from(take_varint(&mut rest)?).ok()?;
    let value = usize::try_from(take_varint(&mut rest)?).ok()?;
    if rest.len() < key.checked_add(value)? {
        return None;
    }
    chunk.advance(chunk.len() - rest.len());
    Some((family, chunk.split_to(key), chunk.split_to(value)))
}

struct Export<'a, S> {
    db: &'a StateDb,
    snapshot: &'a rocksdb::Snapshot<'a>,
    floors: FloorTable,
    chunk: Vec<u8>,
    done: Exported,
    sink: S,
}

impl<S: FnMut(Bytes) -> bool> Export<'_, S> {
    /// False: nobody takes the rest.
    fn range(&mut self, family: Family, (from, to): KeyRange) -> Result<bool, StorageError> {
        let inner = &*self.db.0;
        let handle: &ColumnFamily = match family {
            Family::Index => inner.index(),
            Family::Batches => inner.batches(),
        };
        let mut options = ReadOptions::default();
        options.set_snapshot(self.snapshot);
        options.set_iterate_upper_bound(to);
        options.set_readahead_size(256 << 10);
        options.fill_cache(false);
        let mut iter = inner.db.raw_iterator_cf_opt(handle, options);
        iter.seek(from);
        while let Some((key, value)) = iter.item() {
            // Also checks what is left out: damage is found when it is met.
            unframe(Area::State, key, value)?;
            if !engine::is_stale(&self.floors, key, value) {
                self.chunk.push(family as u8);
                put_varint(&mut self.chunk, key.len() as u64);
                put_varint(&mut self.chunk, value.len() as u64);
                self.chunk.extend_from_slice(key);
                self.chunk.extend_from_slice(value);
                self.done.records += 1;
                if self.chunk.len() >= CHUNK_BYTES && !self.flush() {
                    return Ok(false);
                }
            }
            iter.next();
        }
        iter.status()
            .map(|()| true)
            .map_err(|e| read_error(Area::State, "exporting a group", &e))
    }

    fn flush(&mut self) -> bool {
        if self.chunk.is_empty() {
            return true;
        }
        self.done.bytes += self.chunk.len() as u64;
        let full = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK_BYTES + (64 << 10)));
        (self.sink)(full.into())
    }

    fn run(&mut self, group: GroupId, shards: &BTreeSet<ShardId>) -> Result<bool, StorageError> {
        let of_shard: [fn(ShardId) -> KeyRange; 7] = [
            |s| exactly(&Key::Shard(s)),
            keys::producers_of,
            keys::ids_of,
            keys::holes_of,
            |s| keys::postings_of(s, b""),
            |s| exactly(&Key::BatchFloor(s)),
            |s| exactly(&Key::IdFloor(s)),
        ];
        // By tag and then by shard: that is the order of keys.
        for range in of_shard {
            for shard in shards {
                if !self.range(Family::Index, range(*shard))? {
                    return Ok(false);
                }
            }
        }
        if group == GroupId::META && !self.range(Family::Index, keys::all_meta())? {
            return Ok(false);
        }
        for shard in shards {
            let floor = self.floors.get(shard).map_or(Sequence::new(0), |f| f.batches);
            let (_, to) = keys::batches_of(*shard);
            if !self.range(Family::Batches, (envelope::key(*shard, floor), to))? {
                return Ok(false);
            }
        }
        Ok(self.flush())
    }
}

fn exactly(key: &Key<'_>) -> KeyRange {
    let from = key.encode();
    let mut to = from.clone();
    to.push(0);
    (from, to)
}

impl StateDb {
    /// Exports a group. Blocks; use a thread that may.
    ///
    /// First takes a view of the state and calls `pinned` with the group's applied marker in it. Then calls `wanted`,
    /// which may wait; with `None` nothing is exported and the view is let go. The sink takes chunks of whole records,
    /// of about half a mebibyte each; false ends the export (`Ok(None)`).
    pub fn export_group<S: FnMut(Bytes) -> bool>(
        &self,
        group: GroupId,
        pinned: impl FnOnce(Option<(LogIndex, Bytes)>),
        wanted: impl FnOnce() -> Option<S>,
    ) -> Result<Option<Exported>, StorageError> {
        let _held = Held::new(self);
        let result = self.export(group, pinned, wanted);
        self.0.shared.note(result)
    }

    fn export<S: FnMut(Bytes) -> bool>(
        &self,
        group: GroupId,
        pinned: impl FnOnce(Option<(LogIndex, Bytes)>),
        wanted: impl FnOnce() -> Option<S>,
    ) -> Result<Option<Exported>, StorageError> {
        let snapshot = self.0.db.snapshot();
        let get = |key: &Key<'_>| -> Result<Option<Vec<u8>>, StorageError> {
            let key = key.encode();
            let mut options = ReadOptions::default();
            options.set_snapshot(&snapshot);
            match self.0.db.get_pinned_opt(&key, &options) {
                Ok(None) => Ok(None),
                Ok(Some(value)) => unframe(Area::State, &key, &value).map(|p| Some(p.to_vec())),
                Err(e) => Err(read_error(Area::State, "exporting a group", &e)),
            }
        };
        let applied = match get(&Key::Applied(group))? {
            None => None,
            Some(value) => {
                let mut payload = &value[..];
                let index = take_u64(&mut payload)
                    .ok_or_else(|| corrupt(Area::State, &Key::Applied(group).encode(), "too short"))?;
                Some((LogIndex::new(index), Bytes::copy_from_slice(payload)))
            }
        };
        pinned(applied);
        let Some(sink) = wanted() else {
            return Ok(None);
        };
        let shards = self.shards_in(&snapshot, group)?;
        let mut floors = FloorTable::new();
        for shard in &shards {
            let number = |value: Option<Vec<u8>>| value.and_then(|v| take_u64(&mut &v[..])).map(Sequence::new);
            let entry = floors.entry(*shard).or_default();
            entry.batches = number(get(&Key::BatchFloor(*shard))?).unwrap_or_default();
            entry.ids = number(get(&Key::IdFloor(*shard))?).unwrap_or_default();
        }
        let mut export = Export {
            db: self,
            snapshot: &snapshot,
            floors,
            chunk: Vec::new(),
            done: Exported::default(),
            sink,
        };
        Ok(export.run(group, &shards)?.then_some(export.done))
    }

    fn shards_in(&self, snapshot: &rocksdb::Snapshot<'_>, group: GroupId) -> Result<BTreeSet<ShardId>, StorageError> {
        let (from, to) = keys::all_shards();
        let mut options = ReadOptions::default();
        options.set_snapshot(snapshot);
        options.set_iterate_upper_bound(to);
        let mut iter = self.0.db.raw_iterator_opt(options);
        iter.seek(from);
        let mut shards = BTreeSet::new();
        while let Some((key, value)) = iter.item() {
            let mut payload = unframe(Area::State, key, value)?;
            match (Key::decode(key), take_u64(&mut payload)) {
                (Some(Key::Shard(shard)), Some(owner)) => {
                    if owner == group.get() {
                        shards.insert(shard);
                    }
                }
                _ => return Err(corrupt(Area::State, key, "too short")),
            }
            iter.next();
        }
        iter.status()
            .map(|()| shards)
            .map_err(|e| read_error(Area::State, "listing shards", &e))
    }
}
