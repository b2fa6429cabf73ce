//! Applied state: batches and their indexes, shard and producer records, the meta group's records, applied markers.
//! Without a WAL: after a crash it is older, and the log is applied again from its markers on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use rocksdb::{ColumnFamily, DB};
use tokio::sync::watch;

use super::engine;
use super::error::{Area, StorageError};
use super::floors::{DurableFloors, FloorTable};
use super::keys::{self, Key};
use super::lock::DirLock;
use super::metric_names as names;
use super::record::{take_u64, unframe};
use super::shared::{Shared, read_error};
use super::state_batch::{Effect, StateBatch};
use crate::machine::port::ShardSink as _;
use crate::model::{GroupId, LogIndex, ShardId};

/// What the flusher waits for.
#[derive(Debug, Default)]
pub(super) struct FlushSignal {
    pub wanted: bool,
    pub closing: bool,
}

pub(super) struct StateInner {
    // Dropped in this order: the database before the lock on its directory.
    pub db: DB,
    pub shared: Arc<Shared>,
    /// As applied, including what is not flushed.
    pub floors: RwLock<FloorTable>,
    pub durable_floors: Arc<DurableFloors>,
    /// As applied, including what is not flushed. Advanced by `write`.
    pub applied: Mutex<BTreeMap<GroupId, LogIndex>>,
    /// Advanced by `flush`.
    pub durable_applied: RwLock<BTreeMap<GroupId, LogIndex>>,
    /// Bytes written since the last flush began.
    pub dirty_bytes: AtomicUsize,
    /// A flush is asked for when this much is dirty.
    pub flush_at_bytes: usize,
    /// One flush at a time; holds the number of the last.
    pub flushing: Mutex<u64>,
    pub generation: watch::Sender<u64>,
    pub flush_signal: Mutex<FlushSignal>,
    pub flush_wanted: Condvar,
    /// Held exclusively while a shard is dropped and while trimmed batches are removed, so that neither removes what
    /// the other has just put. Everyone else shares it.
    pub shard_gate: RwLock<()>,
    /// Up to which batch each shard's trimmed ones were removed physically. Only this run's; 0 at first.
    pub removed: Mutex<HashMap<ShardId, u64>>,
    /// Exports that run. As long as there are any, no floor becomes durable, so that nothing they read goes for good.
    pub exports: AtomicUsize,
    /// The groups that are being received.
    pub receiving: Mutex<BTreeSet<GroupId>>,
    pub _lock: Arc<DirLock>,
}

/// The applied state of the node. Cheap to clone.
#[derive(Clone)]
pub struct StateDb(pub(super) Arc<StateInner>);

impl StateInner {
    pub fn index(&self) -> &ColumnFamily {
        self.db
            .cf_handle("default")
            .expect("state/ is opened with its default family")
    }

    pub fn batches(&self) -> &ColumnFamily {
        self.db
            .cf_handle(engine::BATCHES)
            .expect("state/ is opened with its batches family")
    }
}

impl StateDb {
    /// An empty batch of writes.
    pub fn batch(&self) -> StateBatch {
        StateBatch::new(self.clone())
    }

    /// Writes a batch, all of it or nothing. Readable when this returns; durable after a flush. Blocks while the
    /// write buffers are full.
    pub fn write(&self, batch: StateBatch) -> Result<(), StorageError> {
        let inner = &*self.0;
        inner.shared.check()?;
        if batch.is_empty() {
            return Ok(());
        }
        let bytes = batch.bytes();
        let (writes, effects) = batch.into_parts();
        let drops_shard = effects.iter().any(|e| matches!(e, Effect::DropShard(_)));
        let exclusive = drops_shard.then(|| inner.shard_gate.write());
        let shared = (!drops_shard).then(|| inner.shard_gate.read());
        inner
            .db
            .write_opt(writes, &engine::unlogged())
            .map_err(|e| inner.shared.poison("writing state/", e))?;
        self.take_effect(effects);
        drop((exclusive, shared));
        metrics::counter!(names::STATE_WRITE_BYTES).increment(bytes as u64);
        inner.shared.accepted_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let before = inner.dirty_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before < inner.flush_at_bytes && before + bytes >= inner.flush_at_bytes {
            inner.flush_signal.lock().wanted = true;
            inner.flush_wanted.notify_all();
        }
        Ok(())
    }

    fn take_effect(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Applied(group, index) => {
                    self.0.applied.lock().insert(group, index);
                }
                Effect::DropApplied(group) => {
                    self.0.applied.lock().remove(&group);
                }
                Effect::Floors(shard, floors) => {
                    self.0.floors.write().insert(shard, floors);
                }
                Effect::DropShard(shard) => {
                    let mut floors = self.0.floors.write();
                    floors.remove(&shard);
                    self.0.durable_floors.forget(shard);
                    self.0.removed.lock().remove(&shard);
                }
            }
        }
    }

    /// A group's applied marker, durable or not.
    pub fn applied(&self, group: GroupId) -> Result<Option<(LogIndex, Bytes)>, StorageError> {
        let key = Key::Applied(group).encode();
        let Some(value) = self.get(&key)? else {
            return Ok(None);
        };
        let mut payload = &value[..];
        let index = take_u64(&mut payload).ok_or_else(|| super::record::corrupt(Area::State, &key, "too short"))?;
        Ok(Some((LogIndex::new(index), Bytes::copy_from_slice(payload))))
    }

    /// The group's applied index that no crash can take back. What may be purged from its log.
    pub fn durable_applied(&self, group: GroupId) -> Option<LogIndex> {
        self.0.durable_applied.read().get(&group).copied()
    }

    /// A group's applied index, durable or not.
    pub fn applied_index(&self, group: GroupId) -> Option<LogIndex> {
        self.0.applied.lock().get(&group).copied()
    }

    /// Every group that has an applied marker, with its index. Ascending.
    pub fn applied_groups(&self) -> Vec<(GroupId, LogIndex)> {
        self.0.applied.lock().iter().map(|(g, i)| (*g, *i)).collect()
    }

    /// Removes a shard, if it is this group's and `goes` says so of its record. The caller holds the shard: another group's
    /// replica may be about to take it over. Durable after a flush.
    pub fn drop_shard_of(
        &self,
        group: GroupId,
        shard: ShardId,
        goes: impl FnOnce(&[u8]) -> bool,
    ) -> Result<(), StorageError> {
        let found = self.shard_record(shard)?;
        let mut batch = self.batch();
        if found.is_some_and(|(owner, record)| owner == group && goes(&record)) {
            batch.drop_shard(shard);
        }
        self.write(batch)
    }

    /// Removes what is a group's but its shards: its applied marker, and the catalog if it is the meta group. Durable when it
    /// returns, as is all that was written before. The caller sees to it that nobody reads or applies the group meanwhile. Blocks.
    pub fn drop_group(&self, group: GroupId) -> Result<(), StorageError> {
        let mut batch = self.batch();
        if group == GroupId::META {
            batch.drop_all_meta();
        }
        batch.drop_applied(group);
        self.write(batch)?;
        self.flush()
    }

    /// Changes after each flush: `durable_applied` may have moved on.
    pub fn flush_generation(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }

    /// Bytes written since the last flush began.
    pub fn dirty_bytes(&self) -> usize {
        self.0.dirty_bytes.load(Ordering::Relaxed)
    }

    /// Reads one index record and checks it.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        let inner = &*self.0;
        let found = inner
            .db
            .get_pinned(key)
            .map_err(|e| read_error(Area::State, "reading a record", &e))
            .and_then(|value| match value {
                None => Ok(None),
                Some(value) => unframe(Area::State, key, &value).map(|p| Some(p.to_vec())),
            });
        inner.shared.note(found)
    }

    /// Makes everything written so far durable. Blocks; use a thread that may.
    ///
    /// The applied markers and floors are captured first: when the flush has succeeded, those are durable.
    pub fn flush(&self) -> Result<(), StorageError> {
        let inner = &*self.0;
        let mut number = inner.flushing.lock();
        inner.shared.check()?;
        let begun = std::time::Instant::now();
        let applied = inner.applied.lock().clone();
        let floors = inner.floors.read().clone();
        inner.dirty_bytes.store(0, Ordering::Relaxed);
        *number += 1;
        // With something in the write buffer the flush cannot take a short cut past a flush that is still running.
        let key = Key::Flush.encode();
        let value = super::record::frame(&key, 8, |out| out.extend_from_slice(&number.to_le_bytes()));
        inner
            .db
            .put_opt(&key, value, &engine::unlogged())
            .and_then(|()| {
                inner
                    .db
                    .flush_cfs_opt(&[inner.index(), inner.batches()], &rocksdb::FlushOptions::default())
            })
            .map_err(|e| inner.shared.poison("flushing state/", e))?;
        if inner.exports.load(Ordering::SeqCst) == 0 {
            // A shard dropped meanwhile must not get its old floor back.
            let now = inner.floors.read();
            let still: FloorTable = floors
                .into_iter()
                .filter_map(|(shard, captured)| {
                    let current = now.get(&shard)?;
                    let floors = super::floors::Floors {
                        batches: captured.batches.min(current.batches),
                        ids: captured.ids.min(current.ids),
                    };
                    Some((shard, floors))
                })
                .collect();
            inner.durable_floors.advance(still);
        }
        *inner.durable_applied.write() = applied;
        metrics::histogram!(names::STATE_FLUSH_SECONDS).record(begun.elapsed());
        inner.generation.send_replace(*number);
        Ok(())
    }

    /// Reads what is kept in memory; called once at open. All of it is durable: it was just read from disk.
    pub(super) fn load(&self) -> Result<(), StorageError> {
        let inner = &*self.0;
        let mut applied = BTreeMap::new();
        self.scan(keys::all_applied(), |key, mut payload| {
            if let (Some(Key::Applied(group)), Some(index)) = (Key::decode(key), take_u64(&mut payload)) {
                applied.insert(group, LogIndex::new(index));
            }
            Ok(true)
        })?;
        let mut floors = FloorTable::new();
        self.scan(keys::all_batch_floors(), |key, mut payload| {
            if let (Some(Key::BatchFloor(shard)), Some(at)) = (Key::decode(key), take_u64(&mut payload)) {
                floors.entry(shard).or_default().batches = crate::model::Sequence::new(at);
            }
            Ok(true)
        })?;
        self.scan(keys::all_id_floors(), |key, mut payload| {
            if let (Some(Key::IdFloor(shard)), Some(at)) = (Key::decode(key), take_u64(&mut payload)) {
                floors.entry(shard).or_default().ids = crate::model::Sequence::new(at);
            }
            Ok(true)
        })?;
        *inner.durable_applied.write() = applied.clone();
        *inner.applied.lock() = applied;
        inner.durable_floors.advance(floors.clone());
        *inner.floors.write() = floors;
        let key = Key::Flush.encode();
        if let Some(value) = self.get(&key)? {
            *inner.flushing.lock() = take_u64(&mut &value[..]).unwrap_or(0);
        }
        Ok(())
    }
}
