//! Moving the floor: by age, by the limits, up to a sequence. Exact per message, also within a batch.

use super::ShardMachine;
use crate::machine::port::{ShardSink, ShardView, ViewError};
use crate::model::batch::BatchView;
use crate::model::limits::{TRIM_BATCHES_MAX, TRIM_BYTES_MAX};
use crate::model::{Sequence, StoredBatch, TimeUs};

/// What has to go.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rule {
    /// What is over max_messages or max_bytes, where the oldest make room.
    Limits,
    /// What is older than max_age at this time.
    Age { now: TimeUs },
    /// What is below this sequence.
    Below(Sequence),
}

impl Rule {
    /// Whether the oldest message has to go.
    pub fn wants(self, machine: &ShardMachine) -> bool {
        match self {
            Rule::Limits => {
                let (messages, bytes) = machine.excess();
                messages > 0 || bytes > 0
            }
            Rule::Age { now } => match (machine.first_time, machine.bounds.max_age_us) {
                (Some(first), Some(age)) => first.plus_us(age) <= now,
                (Some(_), None) | (None, Some(_)) | (None, None) => false,
            },
            Rule::Below(sequence) => machine.floor < sequence.min(machine.tail),
        }
    }

    /// Whether all that is left of the oldest batch has to go, given that its oldest message has.
    fn wants_whole(self, machine: &ShardMachine, head: &Head) -> bool {
        match self {
            Rule::Limits => {
                let (messages, bytes) = machine.excess();
                head.messages <= messages || head.bytes <= bytes
            }
            Rule::Age { .. } => true,
            Rule::Below(sequence) => head.end <= sequence,
        }
    }
}

/// What one entry has done so far. Bounded, so that a purge of a large shard does not hold up its group.
#[derive(Debug, Default)]
pub(super) struct Work {
    batches: usize,
    bytes: usize,
}

impl Work {
    /// A batch was looked at.
    pub fn add(&mut self, batch: &StoredBatch) {
        self.batches += 1;
        self.bytes += batch.batch.len();
    }

    /// Whether the rest is left to the next entry.
    pub fn spent(&self) -> bool {
        self.batches >= TRIM_BATCHES_MAX || self.bytes >= TRIM_BYTES_MAX
    }
}

/// The batch that holds the floor.
#[derive(Debug)]
pub(super) struct Head {
    base: Sequence,
    /// Exclusive.
    end: Sequence,
    append_time: TimeUs,
    /// Retained messages in it.
    messages: u64,
    /// Their sizes together.
    bytes: u64,
    /// By offset from the base; 0 for a deleted message. Read when the floor first has to fall into the batch.
    sizes: Option<Vec<u32>>,
}

#[derive(Debug, Default)]
pub(super) struct Trimmed {
    pub messages: u64,
    /// The work of one entry was done before the rule was satisfied.
    pub more: bool,
}

impl ShardMachine {
    /// How many messages and bytes are over the limits.
    fn excess(&self) -> (u64, u64) {
        if self.bounds.discard_new {
            return (0, 0);
        }
        let over = |value: u64, max: Option<u64>| value.saturating_sub(max.unwrap_or(u64::MAX));
        (
            over(self.messages, self.bounds.max_messages),
            over(self.bytes, self.bounds.max_bytes),
        )
    }

    /// Moves the floor on while the rule wants it, and drops the batches that are wholly below it.
    pub(super) fn trim(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        rule: Rule,
        work: &mut Work,
    ) -> Result<Trimmed, ViewError> {
        let before = self.messages;
        let mut start = None;
        let more = loop {
            if self.messages == 0 || !rule.wants(self) {
                break false;
            }
            if work.spent() {
                break true;
            }
            let head = match self.head.take() {
                Some(head) => head,
                None => self.read_head(view, work)?,
            };
            start.get_or_insert(head.base);
            if matches!(rule, Rule::Below(sequence) if sequence >= self.tail) {
                // Everything goes; no need to look at it.
                self.messages = 0;
                self.bytes = 0;
            } else if rule.wants_whole(self, &head) {
                self.messages -= head.messages;
                self.bytes -= head.bytes;
                self.floor = head.end;
            } else {
                self.trim_within(view, rule, head)?;
            }
            self.settle(view, work)?;
        };
        if let Some(start) = start {
            self.drop_below_floor(sink, start);
        }
        Ok(Trimmed {
            messages: before - self.messages,
            more,
        })
    }

    /// Drops what is wholly below the floor, from the batch at `start` on.
    pub(super) fn drop_below_floor(&self, sink: &mut dyn ShardSink, start: Sequence) {
        let first_needed = self.head.as_ref().map_or(self.tail, |head| head.base);
        if first_needed > start {
            sink.drop_batches(self.shard, start, first_needed);
        }
    }

    /// Moves the floor on record by record, and keeps the head.
    fn trim_within(&mut self, view: &dyn ShardView, rule: Rule, mut head: Head) -> Result<(), ViewError> {
        let sizes = match head.sizes.take() {
            Some(sizes) => sizes,
            None => {
                let batch = self.batch_at(view, head.base)?;
                self.record_sizes(view, &batch)?
            }
        };
        while self.floor < head.end && rule.wants(self) {
            let size = u64::from(sizes[self.floor.since(head.base) as usize]);
            if size > 0 {
                self.messages -= 1;
                self.bytes -= size;
                head.messages -= 1;
                head.bytes -= size;
            }
            self.floor = self.floor.plus(1);
        }
        head.sizes = Some(sizes);
        self.head = Some(head);
        Ok(())
    }

    /// Brings the floor to the first retained message, and what is known of it up to date.
    pub(super) fn settle(&mut self, view: &dyn ShardView, work: &mut Work) -> Result<(), ViewError> {
        while self.messages > 0 {
            let mut head = match self.head.take() {
                Some(head) => head,
                None => self.read_head(view, work)?,
            };
            if head.messages == 0 {
                self.floor = head.end;
                continue;
            }
            if let Some(sizes) = &head.sizes {
                while sizes[self.floor.since(head.base) as usize] == 0 {
                    self.floor = self.floor.plus(1);
                }
            }
            self.first_time = Some(head.append_time);
            // Most heads go whole or never; their sizes are only kept while the floor is among them.
            if self.floor == head.base {
                head.sizes = None;
            }
            self.head = Some(head);
            return Ok(());
        }
        self.head = None;
        self.floor = self.tail;
        self.first_time = None;
        Ok(())
    }

    /// Forgets the head: what it holds was changed.
    pub(super) fn forget_head(&mut self) {
        self.head = None;
    }

    /// Base of the batch that holds the floor.
    pub(super) fn head_base(&mut self, view: &dyn ShardView, work: &mut Work) -> Result<Sequence, ViewError> {
        let head = match self.head.take() {
            Some(head) => head,
            None => self.read_head(view, work)?,
        };
        let base = head.base;
        self.head = Some(head);
        Ok(base)
    }

    /// The batch that holds a retained sequence.
    pub(super) fn batch_at(&self, view: &dyn ShardView, sequence: Sequence) -> Result<StoredBatch, ViewError> {
        match self.batch_at_or_before(view, sequence)? {
            Some(batch) if batch.end() > sequence => Ok(batch),
            Some(_) | None => Err(ViewError(format!(
                "shard {}: sequence {sequence} is retained, but no batch holds it",
                self.shard
            ))),
        }
    }

    fn read_head(&self, view: &dyn ShardView, work: &mut Work) -> Result<Head, ViewError> {
        let batch = self.batch_at(view, self.floor)?;
        work.add(&batch);
        let mut head = Head {
            base: batch.base,
            end: batch.end(),
            append_time: batch.append_time,
            messages: batch.stored_count(),
            bytes: 0,
            sizes: None,
        };
        let plain = self.floor == batch.base && batch.rejected.is_empty();
        if plain && (!self.has_holes() || self.holes(view, batch.base)?.is_empty()) {
            head.bytes = self.open(&batch)?.message_bytes();
            return Ok(head);
        }
        let sizes = self.record_sizes(view, &batch)?;
        let retained = &sizes[self.floor.since(batch.base) as usize..];
        head.messages = retained.iter().filter(|size| **size > 0).count() as u64;
        head.bytes = retained.iter().map(|size| u64::from(*size)).sum();
        head.sizes = Some(sizes);
        Ok(head)
    }

    /// Sizes of a batch's messages by offset from its base; 0 for a deleted one.
    fn record_sizes(&self, view: &dyn ShardView, batch: &StoredBatch) -> Result<Vec<u32>, ViewError> {
        let mut sizes = Vec::with_capacity(batch.stored_count() as usize);
        let mut rejected = batch.rejected.iter().copied().peekable();
        for brief in self.open(batch)?.briefs() {
            let brief = brief.map_err(|error| self.damaged(batch, error))?;
            if rejected.next_if_eq(&brief.position).is_none() {
                sizes.push(brief.size);
            }
        }
        if sizes.len() as u64 != batch.stored_count() {
            return Err(self.damaged(batch, "its records are not as many as were stored"));
        }
        if self.has_holes() {
            for hole in self.holes(view, batch.base)? {
                match sizes.get_mut(hole as usize) {
                    Some(size) => *size = 0,
                    None => return Err(self.damaged(batch, "a deleted record is not in it")),
                }
            }
        }
        Ok(sizes)
    }

    pub(super) fn open(&self, batch: &StoredBatch) -> Result<BatchView, ViewError> {
        BatchView::trusted(batch.batch.clone()).map_err(|error| self.damaged(batch, error))
    }

    pub(super) fn damaged(&self, batch: &StoredBatch, why: impl std::fmt::Display) -> ViewError {
        ViewError(format!(
            "shard {}: the stored batch at {} is damaged: {why}",
            self.shard, batch.base
        ))
    }
}
