//! What the tests of the pure machines share: a store made of maps, and ways to make batches.
#![allow(dead_code, clippy::unwrap_used)]

pub mod naive;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use mainstem::machine::ShardMachine;
use mainstem::machine::port::{MetaKind, ShardSink, ShardState, ShardView, ViewError};
use mainstem::model::batch::{BatchBuilder, BatchView, Codec, RecordFields};
use mainstem::model::{GroupId, Sequence, ShardId, StoredBatch};

pub const SHARD: ShardId = ShardId::new(7);
pub const GROUP: GroupId = GroupId::new(3);

#[derive(Debug, Default)]
pub struct State {
    /// Keeps what may be dropped: a machine must not tell the difference.
    pub lazy: bool,
    pub batches: BTreeMap<Sequence, StoredBatch>,
    pub holes: BTreeMap<Sequence, Vec<u32>>,
    pub postings: BTreeMap<(String, Sequence), Vec<u32>>,
    pub ids: BTreeMap<Sequence, Vec<u8>>,
    pub producers: BTreeMap<u64, Vec<u8>>,
    pub shard: Option<Vec<u8>>,
    /// That holds the shard.
    pub group: Option<GroupId>,
    pub meta: BTreeMap<(MetaKind, Vec<u8>), Vec<u8>>,
    /// Every write, in order.
    pub writes: Vec<String>,
    pub reads: usize,
}

/// View and sink over maps; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Store(pub Rc<RefCell<State>>);

impl Store {
    pub fn new(lazy: bool) -> Self {
        let store = Self::default();
        store.0.borrow_mut().lazy = lazy;
        store
    }

    fn log(&self, write: String) {
        self.0.borrow_mut().writes.push(write);
    }

    /// The shard as a restarted process finds it.
    pub fn load(&self) -> ShardMachine {
        let state = self.0.borrow();
        ShardMachine::load(
            SHARD,
            state.group.expect("the shard was written"),
            state.shard.as_deref().expect("the shard was written"),
            state.producers.iter().map(|(id, bytes)| (*id, bytes.as_slice())),
            state.ids.iter().map(|(at, bytes)| (*at, bytes.as_slice())),
        )
        .expect("what was written can be loaded")
    }

    /// Sequence and subject of every message from `floor` on that is stored and not deleted.
    pub fn retained(&self, floor: Sequence) -> Vec<(u64, String)> {
        let state = self.0.borrow();
        let mut found = Vec::new();
        for batch in state.batches.values().filter(|batch| batch.end() > floor) {
            let holes = state.holes.get(&batch.base).cloned().unwrap_or_default();
            let view = BatchView::parse(batch.batch.clone()).expect("stored batches are whole");
            for record in view.records() {
                let record = record.unwrap();
                let Some(sequence) = batch.sequence_of(record.position) else {
                    continue;
                };
                let offset = sequence.since(batch.base) as u32;
                if sequence >= floor && !holes.contains(&offset) {
                    found.push((sequence.get(), record.subject.to_string()));
                }
            }
        }
        found
    }
}

impl ShardView for Store {
    fn batch_at_or_before(&self, shard: ShardId, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError> {
        assert_eq!(shard, SHARD);
        self.0.borrow_mut().reads += 1;
        let state = self.0.borrow();
        Ok(state
            .batches
            .range(..=sequence)
            .next_back()
            .map(|(_, batch)| batch.clone()))
    }

    fn batch_at_or_after(&self, shard: ShardId, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError> {
        assert_eq!(shard, SHARD);
        self.0.borrow_mut().reads += 1;
        let state = self.0.borrow();
        Ok(state.batches.range(sequence..).next().map(|(_, batch)| batch.clone()))
    }

    fn holes(&self, _: ShardId, base: Sequence) -> Result<Vec<u32>, ViewError> {
        Ok(self.0.borrow().holes.get(&base).cloned().unwrap_or_default())
    }

    fn last_posting(&self, shard: ShardId, subject: &str) -> Result<Option<(Sequence, Vec<u32>)>, ViewError> {
        self.posting_before(shard, subject, Sequence::new(u64::MAX))
    }

    fn posting_before(
        &self,
        _: ShardId,
        subject: &str,
        below: Sequence,
    ) -> Result<Option<(Sequence, Vec<u32>)>, ViewError> {
        let state = self.0.borrow();
        let range = (subject.to_string(), Sequence::new(0))..(subject.to_string(), below);
        Ok(state
            .postings
            .range(range)
            .next_back()
            .map(|((_, base), offsets)| (*base, offsets.clone())))
    }

    fn shard_state(&self, shard: ShardId) -> Result<Option<ShardState>, ViewError> {
        assert_eq!(shard, SHARD);
        let state = self.0.borrow();
        let (Some(group), Some(record)) = (state.group, &state.shard) else {
            return Ok(None);
        };
        let bytes = |raw: &Vec<u8>| Bytes::copy_from_slice(raw);
        Ok(Some(ShardState {
            group,
            record: bytes(record),
            producers: state.producers.iter().map(|(id, raw)| (*id, bytes(raw))).collect(),
            id_blocks: state.ids.iter().map(|(at, raw)| (*at, bytes(raw))).collect(),
        }))
    }
}

impl ShardSink for Store {
    fn put_batch(&mut self, _: ShardId, batch: &StoredBatch) {
        self.log(format!("batch {batch:?}"));
        let old = self.0.borrow_mut().batches.insert(batch.base, batch.clone());
        assert_eq!(old, None, "a batch is written once");
    }

    fn put_posting(&mut self, _: ShardId, subject: &str, base: Sequence, offsets: &[u32]) {
        self.log(format!("posting {subject} {base} {offsets:?}"));
        assert!(offsets.is_sorted() && !offsets.is_empty());
        let key = (subject.to_string(), base);
        let old = self.0.borrow_mut().postings.insert(key, offsets.to_vec());
        assert_eq!(old, None, "one posting per subject per publish");
    }

    fn put_holes(&mut self, _: ShardId, base: Sequence, offsets: &[u32]) {
        self.log(format!("holes {base} {offsets:?}"));
        assert!(offsets.is_sorted_by(|a, b| a < b));
        let mut state = self.0.borrow_mut();
        assert!(state.batches.contains_key(&base));
        let old = state.holes.insert(base, offsets.to_vec()).unwrap_or_default();
        assert!(old.iter().all(|offset| offsets.contains(offset)), "holes only grow");
    }

    fn put_ids(&mut self, _: ShardId, at: Sequence, block: &[u8]) {
        self.log(format!("ids {at} {block:02x?}"));
        let old = self.0.borrow_mut().ids.insert(at, block.to_vec());
        assert_eq!(old, None, "one block of ids per publish");
    }

    fn drop_ids(&mut self, _: ShardId, below: Sequence) {
        self.log(format!("drop ids {below}"));
        self.0.borrow_mut().ids.retain(|at, _| *at >= below);
    }

    fn put_producer(&mut self, _: ShardId, producer: u64, record: &[u8]) {
        self.log(format!("producer {producer} {record:02x?}"));
        self.0.borrow_mut().producers.insert(producer, record.to_vec());
    }

    fn drop_producer(&mut self, _: ShardId, producer: u64) {
        self.log(format!("drop producer {producer}"));
        assert!(self.0.borrow_mut().producers.remove(&producer).is_some());
    }

    fn put_shard(&mut self, shard: ShardId, group: GroupId, record: &[u8]) {
        assert_eq!(shard, SHARD);
        self.log(format!("shard {record:02x?}"));
        let mut state = self.0.borrow_mut();
        state.shard = Some(record.to_vec());
        state.group = Some(group);
    }

    fn drop_batches(&mut self, _: ShardId, from: Sequence, to: Sequence) {
        self.log(format!("drop batches {from} {to}"));
        let mut state = self.0.borrow_mut();
        assert!(
            from < to && state.batches.contains_key(&from),
            "from is the base of a batch"
        );
        let first_needed = state.batches.range(to..).next().map(|(base, _)| *base);
        assert!(
            first_needed.is_none_or(|base| base == to),
            "to is the base of the first batch needed"
        );
        assert!(
            state.batches.range(from..to).all(|(_, batch)| batch.end() <= to),
            "no batch is cut"
        );
        if !state.lazy {
            assert_eq!(state.batches.keys().next(), Some(&from), "nothing was left behind");
            state.batches.retain(|base, _| *base >= to);
            state.holes.retain(|base, _| *base >= to);
            state
                .postings
                .retain(|(_, base), offsets| base.plus(u64::from(*offsets.last().unwrap())) >= to);
        }
    }

    fn drop_shard(&mut self, _: ShardId) {
        self.log("drop shard".into());
        let lazy = self.0.borrow().lazy;
        *self.0.borrow_mut() = State {
            lazy,
            ..State::default()
        };
    }

    fn put_meta(&mut self, kind: MetaKind, key: &[u8], record: &[u8]) {
        self.log(format!("meta {kind:?} {key:02x?} {record:02x?}"));
        self.0.borrow_mut().meta.insert((kind, key.to_vec()), record.to_vec());
    }

    fn drop_meta(&mut self, kind: MetaKind, key: &[u8]) {
        self.log(format!("drop meta {kind:?} {key:02x?}"));
        self.0.borrow_mut().meta.remove(&(kind, key.to_vec()));
    }
}

/// What a test says of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub subject: String,
    pub id: Option<String>,
    pub payload: usize,
}

impl Record {
    fn fields<'a>(&'a self, payload: &'a [u8]) -> RecordFields<'a> {
        RecordFields {
            subject: &self.subject,
            message_id: self.id.as_deref(),
            payload: &payload[..self.payload],
            ..RecordFields::default()
        }
    }

    pub fn size(&self) -> u64 {
        let payload = vec![b'x'; self.payload];
        mainstem::model::batch::content_bytes(&self.fields(&payload)) as u64
    }
}

pub fn encode(records: &[Record], codec: Codec) -> Bytes {
    let payload = vec![b'x'; records.iter().map(|record| record.payload).max().unwrap_or(0)];
    let mut builder = BatchBuilder::new();
    for record in records {
        builder.push(&record.fields(&payload)).unwrap();
    }
    builder.build(codec).unwrap()
}

/// Gathers writes and lets nobody see them before the apply is over, as a write batch does.
#[derive(Default)]
pub struct Deferred(Vec<Write>);

type Write = Box<dyn FnOnce(&mut Store)>;

impl Deferred {
    pub fn commit(self, store: &Store) {
        let mut store = store.clone();
        for write in self.0 {
            write(&mut store);
        }
    }

    fn push(&mut self, write: impl FnOnce(&mut Store) + 'static) {
        self.0.push(Box::new(write));
    }
}

impl ShardSink for Deferred {
    fn put_batch(&mut self, shard: ShardId, batch: &StoredBatch) {
        let batch = batch.clone();
        self.push(move |store| store.put_batch(shard, &batch));
    }
    fn put_posting(&mut self, shard: ShardId, subject: &str, base: Sequence, offsets: &[u32]) {
        let (subject, offsets) = (subject.to_string(), offsets.to_vec());
        self.push(move |store| store.put_posting(shard, &subject, base, &offsets));
    }
    fn put_holes(&mut self, shard: ShardId, base: Sequence, offsets: &[u32]) {
        let offsets = offsets.to_vec();
        self.push(move |store| store.put_holes(shard, base, &offsets));
    }
    fn put_ids(&mut self, shard: ShardId, at: Sequence, block: &[u8]) {
        let block = block.to_vec();
        self.push(move |store| store.put_ids(shard, at, &block));
    }
    fn drop_ids(&mut self, shard: ShardId, below: Sequence) {
        self.push(move |store| store.drop_ids(shard, below));
    }
    fn put_producer(&mut self, shard: ShardId, producer: u64, record: &[u8]) {
        let record = record.to_vec();
        self.push(move |store| store.put_producer(shard, producer, &record));
    }
    fn drop_producer(&mut self, shard: ShardId, producer: u64) {
        self.push(move |store| store.drop_producer(shard, producer));
    }
    fn put_shard(&mut self, shard: ShardId, group: GroupId, record: &[u8]) {
        let record = record.to_vec();
        self.push(move |store| store.put_shard(shard, group, &record));
    }
    fn drop_batches(&mut self, shard: ShardId, from: Sequence, to: Sequence) {
        self.push(move |store| store.drop_batches(shard, from, to));
    }
    fn drop_shard(&mut self, shard: ShardId) {
        self.push(move |store| store.drop_shard(shard));
    }
    fn put_meta(&mut self, kind: MetaKind, key: &[u8], record: &[u8]) {
        let (key, record) = (key.to_vec(), record.to_vec());
        self.push(move |store| store.put_meta(kind, &key, &record));
    }
    fn drop_meta(&mut self, kind: MetaKind, key: &[u8]) {
        let key = key.to_vec();
        self.push(move |store| store.drop_meta(kind, &key));
    }
}
