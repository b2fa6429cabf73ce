//! One shard: order, de-duplication, producers, expectations, retention.
//!
//! Every field is either in the shard's records or follows from them, so that a machine that is loaded goes on exactly as
//! the one that wrote them. What is only a cache says so.

mod ids;
mod moving;
mod producers;
mod publish;
mod purge;
mod subjects;
mod trim;

use std::collections::BTreeMap;

use prost::Message;

use super::LoadError;
use super::outcome::{ExpireOutcome, UpdateOutcome};
use super::port::{ShardSink, ShardView, ViewError};
use crate::model::limits::MESSAGE_BYTES_MAX;
use crate::model::{Epoch, GroupId, Revision, Sequence, ShardId, StoredBatch, StreamId, TimeUs};
use crate::wire::internal::v1 as pb;
use crate::wire::v1::DiscardPolicy;

pub use moving::AdoptFault;

use ids::IdWindow;
use producers::Producers;
use trim::{Head, Rule};

/// Expiry waits for a while after the first message (or id) is due, so that one entry removes many: a sixteenth of the
/// age, but no longer than this.
const EXPIRY_SLACK_MAX_US: u64 = 1_000_000;

/// The limits in force, from the config.
#[derive(Debug, Clone, Copy, Default)]
struct Bounds {
    max_age_us: Option<u64>,
    max_bytes: Option<u64>,
    max_messages: Option<u64>,
    message_bytes_max: u64,
    discard_new: bool,
}

impl Bounds {
    fn of(config: &pb::ShardConfig) -> Self {
        let limits = config.limits.unwrap_or_default();
        let max_bytes = limits.max_bytes.unwrap_or(u64::MAX);
        let message_bytes = limits.max_message_bytes.map_or(u64::MAX, u64::from);
        Self {
            max_age_us: limits.max_age_us,
            max_bytes: limits.max_bytes,
            max_messages: limits.max_messages,
            // A message over max_bytes would be acknowledged and gone at once.
            message_bytes_max: (MESSAGE_BYTES_MAX as u64).min(message_bytes).min(max_bytes),
            discard_new: limits.discard == DiscardPolicy::New as i32,
        }
    }
}

/// The state machine of one shard.
#[derive(Debug)]
pub struct ShardMachine {
    shard: ShardId,
    group: GroupId,
    config: pb::ShardConfig,
    bounds: Bounds,
    /// Of the config. Advanced by updates.
    revision: Revision,
    /// First retained sequence, inclusive; never one of a deleted message. Advanced by trims.
    floor: Sequence,
    /// Next sequence to be given. Advanced by publishes.
    tail: Sequence,
    /// Retained: from the floor on and not deleted.
    messages: u64,
    /// Sum of their message sizes.
    bytes: u64,
    /// Append time of the newest message ever.
    last_time: TimeUs,
    /// Append time of the oldest retained message.
    first_time: Option<TimeUs>,
    /// Greatest time of any entry applied.
    clock: TimeUs,
    ids: IdWindow,
    producers: Producers,
    /// Where it went: the machine must be left as it is.
    seal: Option<pb::ShardSeal>,
    /// Where it came from.
    origin: Option<pb::ShardOrigin>,
    /// Seals of moves up to this one are of no effect; 0: of none.
    given_up: u64,
    /// Cache: the batch that holds the floor.
    head: Option<Head>,
    /// What the apply at hand has written: a view need not show it yet. Empty between applies.
    written: Written,
}

#[derive(Debug, Default)]
struct Written {
    /// Ascending; all above what was there before.
    batches: Vec<StoredBatch>,
    /// By base of the batch.
    holes: BTreeMap<Sequence, Vec<u32>>,
}

impl ShardMachine {
    /// A new, empty shard.
    pub fn create(sink: &mut dyn ShardSink, shard: ShardId, group: GroupId, config: pb::ShardConfig) -> Self {
        let mut machine = Self {
            shard,
            group,
            bounds: Bounds::of(&config),
            config,
            revision: Revision::new(0),
            floor: Sequence::FIRST,
            tail: Sequence::FIRST,
            messages: 0,
            bytes: 0,
            last_time: TimeUs::new(0),
            first_time: None,
            clock: TimeUs::new(0),
            ids: IdWindow::default(),
            producers: Producers::default(),
            seal: None,
            origin: None,
            given_up: 0,
            head: None,
            written: Written::default(),
        };
        machine.write(sink);
        machine
    }

    /// The shard as its records tell: an encoded `ShardRecord`, its `ProducerRecord`s by id, its `IdBlock`s ascending by
    /// key.
    pub fn load<'a>(
        shard: ShardId,
        group: GroupId,
        record: &[u8],
        producers: impl IntoIterator<Item = (u64, &'a [u8])>,
        id_blocks: impl IntoIterator<Item = (Sequence, &'a [u8])>,
    ) -> Result<Self, LoadError> {
        let fail = |why: String| LoadError::new(format!("shard {shard}"), why);
        let record = pb::ShardRecord::decode(record).map_err(|error| fail(error.to_string()))?;
        let config = record.config.ok_or_else(|| fail("the record has no config".into()))?;
        let (floor, tail) = (Sequence::new(record.floor), Sequence::new(record.tail));
        let clock = TimeUs::new(record.clock_us);
        if floor < Sequence::FIRST || floor > tail || record.messages > tail.since(floor) {
            return Err(fail(format!(
                "floor {floor}, tail {tail} and {} messages do not fit together",
                record.messages
            )));
        }
        Ok(Self {
            shard,
            group,
            bounds: Bounds::of(&config),
            revision: Revision::new(record.revision),
            floor,
            tail,
            messages: record.messages,
            bytes: record.bytes,
            last_time: TimeUs::new(record.last_time_us),
            first_time: record.first_time_us.map(TimeUs::new),
            clock,
            ids: IdWindow::load(id_blocks, clock, config.duplicate_window_us)?,
            producers: Producers::load(producers)?,
            seal: record.seal,
            origin: record.origin,
            given_up: record.given_up,
            head: None,
            written: Written::default(),
            config,
        })
    }

    /// Its identity in the cluster.
    pub fn shard(&self) -> ShardId {
        self.shard
    }

    /// The group that holds it.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The settings in force.
    pub fn config(&self) -> &pb::ShardConfig {
        &self.config
    }

    /// The stream it belongs to; `None` if the config was never right.
    pub fn stream_id(&self) -> Option<StreamId> {
        StreamId::parse(&self.config.stream_id)
    }

    /// The stream's epoch.
    pub fn epoch(&self) -> Epoch {
        Epoch::new(self.config.epoch)
    }

    /// Of the settings in force.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// First retained sequence, inclusive; equals the tail when nothing is retained.
    pub fn floor(&self) -> Sequence {
        self.floor
    }

    /// Next sequence to be given.
    pub fn tail(&self) -> Sequence {
        self.tail
    }

    /// Messages retained.
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// Sum of the retained messages' sizes, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Append time of the oldest retained message.
    pub fn first_time(&self) -> Option<TimeUs> {
        self.first_time
    }

    /// Append time of the newest message, retained or not; `None` if there never was one.
    pub fn last_time(&self) -> Option<TimeUs> {
        (self.tail > Sequence::FIRST).then_some(self.last_time)
    }

    /// Message ids remembered.
    pub fn ids(&self) -> usize {
        self.ids.len()
    }

    /// Producers remembered.
    pub fn producers(&self) -> usize {
        self.producers.len()
    }

    /// Epoch and last sequence used up by a producer.
    pub fn producer(&self, id: u64) -> Option<(u64, u64)> {
        self.producers.get(id)
    }

    /// When an expiry would next do something worth an entry; `None`: never, as things are. Propose `Expire` with the
    /// leader's time when that has come; after each entry this may have changed.
    pub fn next_expiry(&self) -> Option<TimeUs> {
        if self.seal.is_some() {
            return None;
        }
        let slack =
            |time: TimeUs, after_us: u64| time.plus_us(after_us).plus_us((after_us / 16).min(EXPIRY_SLACK_MAX_US));
        let age = match (self.first_time, self.bounds.max_age_us) {
            (Some(first), Some(age)) => Some(slack(first, age)),
            (Some(_), None) | (None, Some(_)) | (None, None) => None,
        };
        let ids = self
            .ids
            .oldest()
            .map(|time| slack(time, self.config.duplicate_window_us));
        let producers = self
            .producers
            .oldest()
            .map(|time| slack(time, self.config.producer_idle_us));
        let over = Rule::Limits.wants(self).then_some(self.clock);
        [age, ids, producers, over].into_iter().flatten().min()
    }

    /// Whether an expiry at this time would do something worth an entry.
    pub fn needs_expiry(&self, now: TimeUs) -> bool {
        self.next_expiry().is_some_and(|due| due <= now)
    }

    /// Removes messages that are older than the age limit at this time (and what is over the other limits since they
    /// were changed), and forgets ids and producers. Bounded work: more may be left.
    pub fn apply_expire(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        time: TimeUs,
    ) -> Result<ExpireOutcome, ViewError> {
        self.clock = self.clock.max(time);
        self.forget_ids(sink);
        let shard = self.shard;
        let producers = self.producers.forget(self.clock, self.config.producer_idle_us, |id| {
            sink.drop_producer(shard, id);
        });
        let mut work = trim::Work::default();
        // The entry's own time, not the clock: if an earlier leader's was ahead, nothing goes before its time.
        let aged = self.trim(view, sink, Rule::Age { now: time }, &mut work)?;
        let over = self.trim(view, sink, Rule::Limits, &mut work)?;
        self.write(sink);
        Ok(ExpireOutcome {
            messages: aged.messages + over.messages,
            producers,
            more: aged.more || over.more,
        })
    }

    /// Puts new settings in force. Messages that are over a lowered limit go now; if they are more than one entry may
    /// remove, the next expiry goes on.
    pub fn apply_update(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        revision: Revision,
        config: pb::ShardConfig,
    ) -> Result<UpdateOutcome, ViewError> {
        if revision <= self.revision {
            return Ok(UpdateOutcome::Stale);
        }
        self.revision = revision;
        self.bounds = Bounds::of(&config);
        self.config = config;
        // Also what the old window had forgotten: it must not come back under a longer one.
        self.forget_ids(sink);
        self.trim(view, sink, Rule::Limits, &mut trim::Work::default())?;
        self.write(sink);
        Ok(UpdateOutcome::Applied)
    }

    /// The shard goes, with everything in it.
    pub fn apply_remove(self, sink: &mut dyn ShardSink) {
        sink.drop_shard(self.shard);
    }

    /// Forgets ids that are out of the window, on disk too.
    fn forget_ids(&mut self, sink: &mut dyn ShardSink) {
        self.ids.forget(self.clock, self.config.duplicate_window_us);
        if let Some(below) = self.ids.take_undropped() {
            sink.drop_ids(self.shard, below);
        }
    }

    /// Whether some sequence from the floor on was deleted.
    fn has_holes(&self) -> bool {
        self.messages < self.tail.since(self.floor)
    }

    fn put_batch(&mut self, sink: &mut dyn ShardSink, batch: StoredBatch) {
        sink.put_batch(self.shard, &batch);
        self.written.batches.push(batch);
    }

    fn put_holes(&mut self, sink: &mut dyn ShardSink, base: Sequence, holes: Vec<u32>) {
        sink.put_holes(self.shard, base, &holes);
        self.written.holes.insert(base, holes);
    }

    /// The batch with the largest base at or below a sequence, this apply's own included.
    fn batch_at_or_before(&self, view: &dyn ShardView, sequence: Sequence) -> Result<Option<StoredBatch>, ViewError> {
        let at = self.written.batches.partition_point(|batch| batch.base <= sequence);
        match at.checked_sub(1) {
            Some(at) => Ok(Some(self.written.batches[at].clone())),
            None => view.batch_at_or_before(self.shard, sequence),
        }
    }

    /// Offsets of deleted records of the batch with this base, this apply's own included.
    fn holes(&self, view: &dyn ShardView, base: Sequence) -> Result<Vec<u32>, ViewError> {
        match self.written.holes.get(&base) {
            Some(holes) => Ok(holes.clone()),
            None => view.holes(self.shard, base),
        }
    }

    /// Writes the shard's record: the last step of every apply.
    fn write(&mut self, sink: &mut dyn ShardSink) {
        self.written.batches.clear();
        self.written.holes.clear();
        sink.put_shard(self.shard, self.group, &self.record().encode_to_vec());
    }

    fn record(&self) -> pb::ShardRecord {
        pb::ShardRecord {
            config: Some(self.config.clone()),
            revision: self.revision.get(),
            floor: self.floor.get(),
            tail: self.tail.get(),
            messages: self.messages,
            bytes: self.bytes,
            last_time_us: self.last_time.get(),
            clock_us: self.clock.get(),
            first_time_us: self.first_time.map(TimeUs::get),
            seal: self.seal,
            origin: self.origin,
            given_up: self.given_up,
        }
    }
}
