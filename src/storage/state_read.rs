//! Reading applied state: the machine's view, and scans for loading and serving.

use std::collections::VecDeque;

use bytes::Bytes;
use rocksdb::{DBRawIterator, ReadOptions};

use super::envelope;
use super::error::{Area, StorageError};
use super::keys::{self, Key, KeyRange};
use super::offsets;
use super::record::{corrupt, take_u64, unframe};
use super::shared::read_error;
use super::state::StateDb;
use crate::machine::port::{MetaKind, ShardState, ShardView, ViewError};
use crate::model::{GroupId, Sequence, ShardId, StoredBatch, TimeUs};

/// Bytes a scan reads at a time.
const CHUNK_BYTES: usize = 1 << 20;

impl StateDb {
    /// How often damage was met with in this store.
    pub fn damage_found(&self) -> u64 {
        self.0.shared.damage_found()
    }

    fn batch_iter(&self, shard: ShardId) -> DBRawIterator<'_> {
        let (_, end) = keys::batches_of(shard);
        let mut options = ReadOptions::default();
        // What is below the floor is gone for readers, whether or not it was removed yet.
        options.set_iterate_lower_bound(envelope::key(shard, self.batch_floor(shard)));
        options.set_iterate_upper_bound(end);
        options.set_readahead_size(64 << 10);
        self.0.db.raw_iterator_cf_opt(self.0.batches(), options)
    }

    fn batch_here(iter: &DBRawIterator<'_>) -> Result<Option<StoredBatch>, StorageError> {
        match iter.item() {
            Some((key, value)) => envelope::decode(key, value).map(Some),
            None => iter
                .status()
                .map(|()| None)
                .map_err(|e| read_error(Area::State, "reading batches", &e)),
        }
    }

    /// Base of the first batch kept, as applied; 0 if nothing was trimmed.
    pub fn batch_floor(&self, shard: ShardId) -> Sequence {
        self.0.floors.read().get(&shard).map_or(Sequence::new(0), |f| f.batches)
    }

    /// The shard's batch floor that no crash can take back.
    pub fn durable_floor(&self, shard: ShardId) -> Sequence {
        self.0
            .durable_floors
            .snapshot()
            .get(&shard)
            .map_or(Sequence::new(0), |f| f.batches)
    }

    /// Batches beginning with the one that holds `from` (or the first after it), at least one if there is any and
    /// then no more than `bytes_max` bytes; and none behind one that is damaged.
    pub fn read_batches(
        &self,
        shard: ShardId,
        from: Sequence,
        bytes_max: usize,
    ) -> Result<Vec<StoredBatch>, StorageError> {
        let result = self.read_batches_unnoted(shard, from, bytes_max);
        self.0.shared.note(result)
    }

    fn read_batches_unnoted(
        &self,
        shard: ShardId,
        from: Sequence,
        bytes_max: usize,
    ) -> Result<Vec<StoredBatch>, StorageError> {
        let mut iter = self.batch_iter(shard);
        iter.seek_for_prev(envelope::key(shard, from));
        let mut next = match Self::batch_here(&iter)? {
            Some(batch) if batch.end() > from => Some(batch),
            Some(_) => {
                iter.next();
                Self::batch_here(&iter)?
            }
            None => {
                iter.seek(envelope::key(shard, from));
                Self::batch_here(&iter)?
            }
        };
        let mut out = Vec::new();
        let mut bytes = 0;
        while let Some(batch) = next {
            if !out.is_empty() && bytes + batch.batch.len() > bytes_max {
                break;
            }
            bytes += batch.batch.len();
            out.push(batch);
            iter.next();
            next = Self::batch_here(&iter).unwrap_or_else(|error| {
                // Those before it are well. Who asks for this one is told.
                self.0.shared.note_error(&error);
                None
            });
        }
        Ok(out)
    }

    /// Every batch from the one that holds `from` on, read a chunk at a time. Nothing is pinned between chunks.
    pub fn batches(&self, shard: ShardId, from: Sequence) -> BatchScan {
        BatchScan {
            db: self.clone(),
            shard,
            next: from,
            buffer: VecDeque::new(),
            ended: false,
        }
    }

    /// The first batch appended at or after `time`. Append times never fall within a shard, so this bisects.
    pub fn first_batch_at_time(&self, shard: ShardId, time: TimeUs) -> Result<Option<StoredBatch>, StorageError> {
        let result = self.bisect_time(shard, time);
        self.0.shared.note(result)
    }

    fn bisect_time(&self, shard: ShardId, time: TimeUs) -> Result<Option<StoredBatch>, StorageError> {
        let mut iter = self.batch_iter(shard);
        iter.seek_to_last();
        let Some(last) = Self::batch_here(&iter)? else {
            return Ok(None);
        };
        if last.append_time < time {
            return Ok(None);
        }
        // The answer is at or before `found`, and its base is at or above `low`.
        let mut found = last;
        let mut low = 0;
        while low < found.base.get() {
            let middle = low + (found.base.get() - low) / 2;
            iter.seek(envelope::key(shard, Sequence::new(middle)));
            let Some(batch) = Self::batch_here(&iter)? else {
                return Err(StorageError::Engine {
                    what: "looking for a time",
                    detail: format!("{shard} lost batch {}", found.base),
                });
            };
            if batch.append_time < time {
                low = batch.base.get() + 1;
            } else if batch.base < found.base {
                found = batch;
            } else {
                // Nothing between the middle and `found`: look before the middle.
                iter.prev();
                match Self::batch_here(&iter)? {
                    Some(before) if before.append_time >= time => found = before,
                    _ => return Ok(Some(found)),
                }
            }
        }
        Ok(Some(found))
    }

    /// Calls back with each record's key and payload, until it returns false.
    pub(super) fn scan(
        &self,
        (from, to): KeyRange,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, StorageError>,
    ) -> Result<(), StorageError> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        let mut iter = self.0.db.raw_iterator_opt(options);
        iter.seek(from);
        let result = (|| {
            while let Some((key, value)) = iter.item() {
                if !each(key, unframe(Area::State, key, value)?)? {
                    return Ok(());
                }
                iter.next();
            }
            iter.status()
                .map_err(|e| read_error(Area::State, "scanning records", &e))
        })();
        self.0.shared.note(result)
    }

    /// Every shard, the group that holds it, and its record.
    pub fn shards(&self) -> Result<Vec<(ShardId, GroupId, Bytes)>, StorageError> {
        let mut out = Vec::new();
        self.scan(keys::all_shards(), |key, mut payload| {
            match (Key::decode(key), take_u64(&mut payload)) {
                (Some(Key::Shard(shard)), Some(group)) => {
                    out.push((shard, GroupId::new(group), Bytes::copy_from_slice(payload)));
                    Ok(true)
                }
                _ => Err(corrupt(Area::State, key, "too short")),
            }
        })?;
        Ok(out)
    }

    /// The group that holds a shard here.
    pub fn owner_of(&self, shard: ShardId) -> Result<Option<GroupId>, StorageError> {
        Ok(self.shard_record(shard)?.map(|(group, _)| group))
    }

    /// A shard's group and record.
    pub fn shard_record(&self, shard: ShardId) -> Result<Option<(GroupId, Bytes)>, StorageError> {
        let key = Key::Shard(shard).encode();
        let Some(value) = self.get(&key)? else { return Ok(None) };
        let mut record: &[u8] = &value;
        let group = take_u64(&mut record).ok_or_else(|| corrupt(Area::State, &key, "too short"))?;
        Ok(Some((GroupId::new(group), Bytes::copy_from_slice(record))))
    }

    /// Every producer of a shard: its id and record.
    pub fn producers(&self, shard: ShardId) -> Result<Vec<(u64, Bytes)>, StorageError> {
        let mut out = Vec::new();
        self.scan(keys::producers_of(shard), |key, payload| {
            if let Some(Key::Producer(_, producer)) = Key::decode(key) {
                out.push((producer, Bytes::copy_from_slice(payload)));
            }
            Ok(true)
        })?;
        Ok(out)
    }

    /// Every id block of a shard at or above its id floor. Ascending.
    pub fn id_blocks(&self, shard: ShardId) -> Result<Vec<(Sequence, Bytes)>, StorageError> {
        let floor = self.0.floors.read().get(&shard).map_or(Sequence::new(0), |f| f.ids);
        let (_, to) = keys::ids_of(shard);
        let mut out = Vec::new();
        self.scan((Key::Ids(shard, floor).encode(), to), |key, payload| {
            if let Some(Key::Ids(_, at)) = Key::decode(key) {
                out.push((at, Bytes::copy_from_slice(payload)));
            }
            Ok(true)
        })?;
        Ok(out)
    }

    /// Every record of a kind in the meta group's state: key and record.
    pub fn meta_records(&self, kind: MetaKind) -> Result<Vec<(Bytes, Bytes)>, StorageError> {
        let mut out = Vec::new();
        self.scan(keys::meta_of(kind as u8), |key, payload| {
            if let Some(Key::Meta(_, name)) = Key::decode(key) {
                out.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(payload)));
            }
            Ok(true)
        })?;
        Ok(out)
    }

    /// One record of the meta group's state.
    pub fn meta_record(&self, kind: MetaKind, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        Ok(self.get(&Key::Meta(kind as u8, key).encode())?.map(Bytes::from))
    }

    /// Every posting of a shard whose subject begins with `subject_prefix`, in order of subject and base, until
    /// `each` returns false.
    pub fn postings(
        &self,
        shard: ShardId,
        subject_prefix: &str,
        mut each: impl FnMut(&str, Sequence, Vec<u32>) -> bool,
    ) -> Result<(), StorageError> {
        let floor = self.batch_floor(shard);
        self.scan(keys::postings_of(shard, subject_prefix.as_bytes()), |key, payload| {
            let Some(Key::Posting(_, subject, base)) = Key::decode(key) else {
                return Err(corrupt(Area::State, key, "not a posting"));
            };
            let subject = std::str::from_utf8(subject).map_err(|_| corrupt(Area::State, key, "subject is not text"))?;
            let list = offsets::decode(payload, offsets::OFFSETS_MAX)
                .ok_or_else(|| corrupt(Area::State, key, "bad offsets"))?;
            // It covers all batches of its entry, so it counts until the last of its records is below the floor.
            Ok(offsets::end(base, &list) <= floor || each(subject, base, list))
        })
    }

    /// The last posting of exactly this subject with a base below `below`.
    fn posting_below(
        &self,
        shard: ShardId,
        subject: &str,
        below: Sequence,
    ) -> Result<Option<(Sequence, Vec<u32>)>, StorageError> {
        let floor = self.batch_floor(shard);
        let Some(last) = below.get().checked_sub(1) else {
            return Ok(None);
        };
        let (from, to) = keys::postings_of_subject(shard, subject.as_bytes());
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from);
        options.set_iterate_upper_bound(to);
        let mut iter = self.0.db.raw_iterator_opt(options);
        iter.seek_for_prev(Key::Posting(shard, subject.as_bytes(), Sequence::new(last)).encode());
        while let Some((key, value)) = iter.item() {
            let Some(Key::Posting(_, found, base)) = Key::decode(key) else {
                return Err(corrupt(Area::State, key, "not a posting"));
            };
            if found != subject.as_bytes() {
                iter.prev();
                continue;
            }
            let payload = unframe(Area::State, key, value)?;
            let list = offsets::decode(payload, offsets::OFFSETS_MAX)
                .ok_or_else(|| corrupt(Area::State, key, "bad offsets"))?;
            // It covers all batches of its entry, so it counts until the last of its records is below the floor.
            return Ok((offsets::end(base, &list) > floor).then_some((base, list)));
        }
        iter.status()
            .map(|()| None)
            .map_err(|e| read_error(Area::State, "reading postings", &e))
    }

    fn view<T>(&self, result: Result<T, StorageError>) -> Result<T, ViewError> {
        self.0.shared.note(result).map_err(|e| ViewError(e.to_string()))
    }
}

impl ShardView for StateDb {
    fn batch_at_or_before(&self, shard: ShardId, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError> {
        let mut iter = self.batch_iter(shard);
        iter.seek_for_prev(envelope::key(shard, sequence));
        self.view(Self::batch_here(&iter))
    }

    fn batch_at_or_after(&self, shard: ShardId, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError> {
        let mut iter = self.batch_iter(shard);
        iter.seek(envelope::key(shard, sequence));
        self.view(Self::batch_here(&iter))
    }

    fn holes(&self, shard: ShardId, base: Sequence) -> Result<Vec<u32>, ViewError> {
        if base < self.batch_floor(shard) {
            return Ok(Vec::new());
        }
        let key = Key::Holes(shard, base).encode();
        let list = self.get(&key).and_then(|value| match value {
            None => Ok(Vec::new()),
            Some(value) => {
                offsets::decode(&value, offsets::OFFSETS_MAX).ok_or_else(|| corrupt(Area::State, &key, "bad offsets"))
            }
        });
        self.view(list)
    }

    fn last_posting(&self, shard: ShardId, subject: &str) -> Result<Option<(Sequence, Vec<u32>)>, ViewError> {
        self.view(self.posting_below(shard, subject, Sequence::new(u64::MAX)))
    }

    fn posting_before(
        &self,
        shard: ShardId,
        subject: &str,
        below: Sequence,
    ) -> Result<Option<(Sequence, Vec<u32>)>, ViewError> {
        self.view(self.posting_below(shard, subject, below))
    }

    fn shard_state(&self, shard: ShardId) -> Result<Option<ShardState>, ViewError> {
        let state = self.shard_record(shard).and_then(|found| {
            let Some((group, record)) = found else { return Ok(None) };
            Ok(Some(ShardState {
                group,
                record,
                producers: self.producers(shard)?,
                id_blocks: self.id_blocks(shard)?,
            }))
        });
        self.view(state)
    }
}

/// An iterator over the batches of a shard. Ends after the last one there is, or after an error.
pub struct BatchScan {
    db: StateDb,
    shard: ShardId,
    next: Sequence,
    buffer: VecDeque<StoredBatch>,
    ended: bool,
}

impl Iterator for BatchScan {
    type Item = Result<StoredBatch, StorageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.buffer.is_empty() && !self.ended {
            match self.db.read_batches(self.shard, self.next, CHUNK_BYTES) {
                Ok(batches) => {
                    self.ended = batches.is_empty();
                    if let Some(last) = batches.last() {
                        self.next = last.end();
                    }
                    self.buffer = batches.into();
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        self.buffer.pop_front().map(Ok)
    }
}
