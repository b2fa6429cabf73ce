//! Applying a publish.

use std::cell::RefCell;

use super::ShardMachine;
use super::producers::{Answer, Check};
use super::subjects::Subjects;
use super::trim::{Rule, Work};
use crate::base::RetryClass;
use crate::machine::outcome::{Duplicate, DuplicateItem, ItemOutcome, Refusal, StoredItem};
use crate::machine::port::{ShardSink, ShardView, ViewError};
use crate::model::batch::BatchView;
use crate::model::limits::POSTING_OFFSETS_MAX;
use crate::model::{Sequence, StoredBatch, Term, TimeUs};
use crate::wire::internal::v1 as pb;
use crate::wire::v1::Expectation;

/// What an apply needs room for; kept per thread, so that ten thousand shards do not each keep theirs.
#[derive(Default)]
struct Scratch {
    subjects: Subjects,
    /// Of each record of the item at hand: its subject's group.
    groups: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What the entry brings to each of its items.
struct Entry<'a> {
    view: &'a dyn ShardView,
    term: Term,
    /// First sequence of the entry: what its postings count from.
    base: Sequence,
}

/// What a walk over an item's records has found.
struct Found {
    view: BatchView,
    duplicates: Vec<Duplicate>,
    duplicate_bytes: u64,
    /// Message ids remembered before this item.
    fresh_before: usize,
}

impl ShardMachine {
    /// Applies the items in order: each is stored whole (but for duplicates), or not at all. Writes at most one posting
    /// per subject, one block of ids and the shard's record, whatever the number of items.
    ///
    /// An item whose ids are all known is answered as such even if its expectation does not hold (any more): it is a
    /// retry of one that was stored.
    pub fn apply_publish(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        term: Term,
        publish: &pb::Publish,
    ) -> Result<Vec<ItemOutcome>, ViewError> {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.subjects.clear();
            let outcomes = self.publish(view, sink, term, publish, scratch);
            scratch.subjects.clear();
            outcomes
        })
    }

    fn publish(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        term: Term,
        publish: &pb::Publish,
        scratch: &mut Scratch,
    ) -> Result<Vec<ItemOutcome>, ViewError> {
        self.clock = self.clock.max(TimeUs::new(publish.time_us));
        self.ids.forget(self.clock, self.config.duplicate_window_us);
        let entry = Entry {
            view,
            term,
            base: self.tail,
        };
        let mut outcomes = Vec::with_capacity(publish.items.len());
        for item in &publish.items {
            outcomes.push(self.apply_item(&entry, sink, item, scratch)?);
        }
        for (subject, offsets) in scratch.subjects.sorted() {
            let mut parts = offsets.chunks(POSTING_OFFSETS_MAX);
            sink.put_posting(self.shard, subject, entry.base, parts.next().unwrap_or_default());
            // Only an entry of many well compressed batches gets here.
            for part in parts {
                let first = part[0];
                let rebased: Vec<u32> = part.iter().map(|offset| offset - first).collect();
                sink.put_posting(self.shard, subject, entry.base.plus(u64::from(first)), &rebased);
            }
        }
        if let Some(block) = self.ids.close_block(entry.base, self.clock) {
            sink.put_ids(self.shard, entry.base, &block);
        }
        let shard = self.shard;
        self.producers
            .write_dirty(self.tail, term, |id, record| sink.put_producer(shard, id, record));
        self.trim(view, sink, Rule::Limits, &mut Work::default())?;
        self.write(sink);
        Ok(outcomes)
    }

    fn apply_item(
        &mut self,
        entry: &Entry<'_>,
        sink: &mut dyn ShardSink,
        item: &pb::PublishItem,
        scratch: &mut Scratch,
    ) -> Result<ItemOutcome, ViewError> {
        let Some(stamp) = &item.producer else {
            return self.store(entry, sink, item, scratch);
        };
        match self.producers.check(stamp, self.clock, self.config.producers_max) {
            Check::Next => {}
            Check::Again(answer) => return self.answer_again(entry, item, answer),
            Check::Refused(refusal) => return Ok(ItemOutcome::Refused(refusal)),
        }
        let tail_before = self.tail;
        let outcome = self.store(entry, sink, item, scratch)?;
        let answer = match &outcome {
            ItemOutcome::Stored(_) | ItemOutcome::AllDuplicates(_) => Some(Answer::Stored {
                first: tail_before,
                count: self.tail.since(tail_before),
                time: self.clock,
                term: entry.term,
            }),
            ItemOutcome::Refused(refusal) => match refusal.retry() {
                RetryClass::CannotWork => Some(Answer::Refused(*refusal)),
                RetryClass::DidNotHappen | RetryClass::MayHaveHappened => None,
            },
        };
        if let Some(answer) = answer {
            self.producers.use_up(stamp.producer_id, self.clock, answer);
        }
        Ok(outcome)
    }

    /// Stores an item, or says why not. Changes nothing if not.
    fn store(
        &mut self,
        entry: &Entry<'_>,
        sink: &mut dyn ShardSink,
        item: &pb::PublishItem,
        scratch: &mut Scratch,
    ) -> Result<ItemOutcome, ViewError> {
        let fresh_before = self.ids.fresh();
        let checked = match self.walk(item, scratch, fresh_before) {
            Ok(found) => self
                .check(entry, item, &scratch.subjects, &found)?
                .map_or(Ok(found), Err),
            Err(refusal) => Err(refusal),
        };
        Ok(match checked {
            Ok(found) if found.duplicates.len() == found.view.len() as usize => {
                ItemOutcome::AllDuplicates(DuplicateItem {
                    tail: self.tail,
                    append_time: self.clock,
                    term: entry.term,
                    duplicates: found.duplicates,
                    whole_duplicate: false,
                })
            }
            Ok(found) => ItemOutcome::Stored(self.commit(entry, sink, found, scratch)),
            Err(refusal) => {
                self.ids.roll_back(fresh_before);
                ItemOutcome::Refused(refusal)
            }
        })
    }

    /// Looks at each record once: its size, its subject's group, its id.
    fn walk(&mut self, item: &pb::PublishItem, scratch: &mut Scratch, fresh_before: usize) -> Result<Found, Refusal> {
        let view = BatchView::trusted(item.batch.clone()).map_err(|_| Refusal::BadBatch)?;
        let mut duplicates = Vec::new();
        let mut duplicate_bytes = 0;
        scratch.groups.clear();
        scratch.groups.reserve(view.len() as usize);
        let max = self.bounds.message_bytes_max;
        let with_ids = self.config.duplicate_window_us > 0;
        let mut next = self.tail;
        for brief in view.briefs() {
            let brief = brief.map_err(|_| Refusal::BadBatch)?;
            if u64::from(brief.size) > max {
                return Err(Refusal::MessageTooLarge { max });
            }
            let group = scratch.subjects.group(brief.subject).map_err(|_| Refusal::BadBatch)?;
            scratch.groups.push(group);
            if with_ids && let Some(id) = brief.message_id {
                let id = std::str::from_utf8(id).map_err(|_| Refusal::BadBatch)?;
                if let Err(original) = self.ids.insert(id, next) {
                    duplicates.push(Duplicate {
                        position: brief.position,
                        original: (original >= self.floor).then_some(original),
                    });
                    duplicate_bytes += u64::from(brief.size);
                    continue;
                }
            }
            next = next.plus(1);
        }
        Ok(Found {
            view,
            duplicates,
            duplicate_bytes,
            fresh_before,
        })
    }

    /// Why an item that could be read is refused all the same.
    fn check(
        &self,
        entry: &Entry<'_>,
        item: &pb::PublishItem,
        subjects: &Subjects,
        found: &Found,
    ) -> Result<Option<Refusal>, ViewError> {
        let messages = u64::from(found.view.len()) - found.duplicates.len() as u64;
        if messages == 0 {
            return Ok(None);
        }
        if let Some(expect) = &item.expect
            && let Some(refusal) = self.check_expectation(entry, expect, subjects)?
        {
            return Ok(Some(refusal));
        }
        let max = self.config.duplicate_ids_max;
        let fresh = self.ids.fresh() - found.fresh_before;
        if fresh > max as usize {
            return Ok(Some(Refusal::TooManyIds { max }));
        }
        if fresh > 0 && self.ids.len() > max as usize {
            return Ok(Some(Refusal::IdsFull { max }));
        }
        if self.bounds.discard_new {
            let bytes = found.view.message_bytes() - found.duplicate_bytes;
            let max_messages = self.bounds.max_messages.unwrap_or(u64::MAX);
            let max_bytes = self.bounds.max_bytes.unwrap_or(u64::MAX);
            if messages > max_messages || bytes > max_bytes {
                return Ok(Some(Refusal::LargerThanStream));
            }
            if self.messages + messages > max_messages || self.bytes + bytes > max_bytes {
                return Ok(Some(Refusal::StreamFull));
            }
        }
        Ok(None)
    }

    fn check_expectation(
        &self,
        entry: &Entry<'_>,
        expect: &Expectation,
        subjects: &Subjects,
    ) -> Result<Option<Refusal>, ViewError> {
        if let Some(expected) = expect.last_sequence {
            let actual = Sequence::new(self.tail.get() - 1);
            if actual.get() != expected {
                return Ok(Some(Refusal::LastSequence { actual }));
            }
        }
        if let Some(expected) = &expect.subject {
            if !self.config.subject_in_one_shard {
                return Ok(Some(Refusal::SubjectExpectationUnsupported));
            }
            // Postings of this entry are not written yet.
            let last = match subjects.last(&expected.subject) {
                Some(offset) => Some(entry.base.plus(u64::from(offset))),
                None => self.last_by_subject(entry.view, &expected.subject)?,
            };
            let actual = last.unwrap_or(Sequence::new(0));
            if actual.get() != expected.last_sequence {
                return Ok(Some(Refusal::SubjectLastSequence { actual }));
            }
        }
        Ok(None)
    }

    /// The last retained message of exactly this subject, as of the entries applied before.
    pub fn last_by_subject(&self, view: &dyn ShardView, subject: &str) -> Result<Option<Sequence>, ViewError> {
        let mut posting = view.last_posting(self.shard, subject)?;
        while let Some((base, offsets)) = posting {
            for &offset in offsets.iter().rev() {
                let sequence = base.plus(u64::from(offset));
                if sequence < self.floor {
                    return Ok(None);
                }
                if !self.has_holes() || !self.is_deleted(view, sequence)? {
                    return Ok(Some(sequence));
                }
            }
            posting = view.posting_before(self.shard, subject, base)?;
        }
        Ok(None)
    }

    fn is_deleted(&self, view: &dyn ShardView, sequence: Sequence) -> Result<bool, ViewError> {
        let Some(batch) = self.batch_at_or_before(view, sequence)? else {
            return Ok(true);
        };
        let holes = self.holes(view, batch.base)?;
        let offset = sequence.since(batch.base);
        Ok(holes.iter().any(|&hole| u64::from(hole) == offset))
    }

    /// Nothing stands against it: the item gets its sequences.
    fn commit(
        &mut self,
        entry: &Entry<'_>,
        sink: &mut dyn ShardSink,
        found: Found,
        scratch: &mut Scratch,
    ) -> StoredItem {
        let first = self.tail;
        let mut offset = first.since(entry.base) as u32;
        let mut rejected = found.duplicates.iter().map(|duplicate| duplicate.position).peekable();
        for (position, &group) in scratch.groups.iter().enumerate() {
            if rejected.next_if_eq(&(position as u32)).is_none() {
                scratch.subjects.push(group, offset);
                offset += 1;
            }
        }
        let batch = StoredBatch {
            base: first,
            append_time: self.clock,
            term: entry.term,
            record_count: found.view.len(),
            rejected: found.duplicates.iter().map(|duplicate| duplicate.position).collect(),
            batch: found.view.encoded().clone(),
        };
        self.tail = batch.end();
        self.messages += batch.stored_count();
        self.bytes += found.view.message_bytes() - found.duplicate_bytes;
        self.last_time = self.clock;
        self.first_time.get_or_insert(self.clock);
        self.put_batch(sink, batch);
        StoredItem {
            first,
            last: Sequence::new(self.tail.get() - 1),
            tail: self.tail,
            append_time: self.clock,
            term: entry.term,
            duplicates: found.duplicates,
            whole_duplicate: false,
        }
    }

    /// The first answer to a producer's batch, once more.
    fn answer_again(
        &self,
        entry: &Entry<'_>,
        item: &pb::PublishItem,
        answer: Answer,
    ) -> Result<ItemOutcome, ViewError> {
        let (first, count, append_time, term) = match answer {
            Answer::Refused(refusal) => return Ok(ItemOutcome::Refused(refusal)),
            Answer::Stored {
                first,
                count,
                time,
                term,
            } => (first, count, time, term),
        };
        // Positions of duplicates: all of them, or those that the stored batch says.
        let positions = match count {
            0 => BatchView::trusted(item.batch.clone()).map_or(vec![], |view| (0..view.len()).collect()),
            // What is below the floor may or may not be on this replica any more: it is not looked at.
            _ if first.plus(count) <= self.floor => vec![],
            _ => match self.batch_at_or_before(entry.view, first)? {
                Some(batch) if batch.base == first => batch.rejected,
                Some(_) | None => return Err(ViewError(format!("shard {}: no batch at {first}", self.shard))),
            },
        };
        let duplicates = positions
            .into_iter()
            .map(|position| Duplicate {
                position,
                original: None,
            })
            .collect();
        Ok(match count {
            0 => ItemOutcome::AllDuplicates(DuplicateItem {
                tail: self.tail,
                append_time,
                term,
                duplicates,
                whole_duplicate: true,
            }),
            _ => ItemOutcome::Stored(StoredItem {
                first,
                last: first.plus(count - 1),
                tail: self.tail,
                append_time,
                term,
                duplicates,
                whole_duplicate: true,
            }),
        })
    }
}
