//! Removing messages by request: up to a sequence, all but the last, by subject.

use super::ShardMachine;
use super::trim::{Rule, Work};
use crate::machine::outcome::PurgeOutcome;
use crate::machine::port::{ShardSink, ShardView, ViewError};
use crate::model::subject::{Filter, SubjectError};
use crate::model::{Sequence, StoredBatch};
use crate::wire::internal::v1 as pb;

/// Where the search for the messages to keep has got to.
enum Keep {
    /// What is to go is below this.
    Below(Sequence),
    /// So many more are to be kept, below this.
    Unfinished { remaining: u64, below: Sequence },
}

impl ShardMachine {
    /// Removes messages. `Ok(Err(_))`: the filter is not one, and nothing was done. Bounded work: the outcome may name
    /// another purge to be proposed.
    pub fn apply_purge(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        purge: &pb::Purge,
    ) -> Result<Result<PurgeOutcome, SubjectError>, ViewError> {
        let filter = match purge.filter.as_str() {
            "" => None,
            text => match Filter::parse(text) {
                Ok(filter) => (!filter.is_all()).then_some(filter),
                Err(error) => return Ok(Err(error)),
            },
        };
        let mut work = Work::default();
        let below = purge.before_sequence.map_or(self.tail, Sequence::new).min(self.tail);
        let below = match purge.keep {
            None => below,
            Some(keep) => match self.find_kept(view, filter.as_ref(), below, keep, &mut work)? {
                Keep::Below(below) => below,
                Keep::Unfinished { remaining, below } => {
                    return Ok(Ok(PurgeOutcome {
                        messages: 0,
                        next: Some(pb::Purge {
                            before_sequence: Some(below.get()),
                            keep: Some(remaining),
                            ..purge.clone()
                        }),
                    }));
                }
            },
        };
        let before = self.messages;
        let next = match filter {
            None => self
                .trim(view, sink, Rule::Below(below), &mut work)?
                .more
                .then_some(self.floor),
            Some(filter) => {
                let from = purge.from_sequence.map_or(self.floor, Sequence::new).max(self.floor);
                self.delete_matching(view, sink, &filter, from, below, &mut work)?
            }
        };
        self.write(sink);
        Ok(Ok(PurgeOutcome {
            messages: before - self.messages,
            next: next.map(|from| pb::Purge {
                before_sequence: Some(below.get()),
                keep: None,
                from_sequence: Some(from.get()),
                ..purge.clone()
            }),
        }))
    }

    /// Finds where the last `keep` of those that match, below a sequence, begin.
    fn find_kept(
        &self,
        view: &dyn ShardView,
        filter: Option<&Filter>,
        below: Sequence,
        keep: u64,
        work: &mut Work,
    ) -> Result<Keep, ViewError> {
        if filter.is_none() && !self.has_holes() {
            let retained = below.since(self.floor);
            return Ok(Keep::Below(self.floor.plus(retained.saturating_sub(keep))));
        }
        let mut at = below;
        let mut remaining = keep;
        while remaining > 0 && at > self.floor {
            if work.spent() {
                return Ok(Keep::Unfinished { remaining, below: at });
            }
            let batch = self.batch_at(view, Sequence::new(at.get() - 1))?;
            work.add(&batch);
            let matching = self.matching(view, &batch, filter, self.floor, at)?;
            if matching.len() as u64 >= remaining {
                let index = matching.len() - remaining as usize;
                return Ok(Keep::Below(batch.base.plus(u64::from(matching[index].0))));
            }
            remaining -= matching.len() as u64;
            at = batch.base;
        }
        // With nothing to keep all goes; with fewer than are to be kept nothing does.
        Ok(Keep::Below(if keep == 0 { below } else { self.floor }))
    }

    /// Offset and size of each retained message of a batch that matches, within [from, to). Ascending.
    fn matching(
        &self,
        view: &dyn ShardView,
        batch: &StoredBatch,
        filter: Option<&Filter>,
        from: Sequence,
        to: Sequence,
    ) -> Result<Vec<(u32, u32)>, ViewError> {
        let holes = match self.has_holes() {
            true => self.holes(view, batch.base)?,
            false => vec![],
        };
        let mut holes = holes.into_iter().peekable();
        let mut rejected = batch.rejected.iter().copied().peekable();
        let mut found = Vec::new();
        let mut offset = 0;
        for brief in self.open(batch)?.briefs() {
            let brief = brief.map_err(|error| self.damaged(batch, error))?;
            if rejected.next_if_eq(&brief.position).is_some() {
                continue;
            }
            let here = offset;
            offset += 1;
            let sequence = batch.base.plus(u64::from(here));
            if holes.next_if_eq(&here).is_some() || sequence < from || sequence >= to {
                continue;
            }
            let subject = std::str::from_utf8(brief.subject).map_err(|error| self.damaged(batch, error))?;
            if filter.is_none_or(|filter| filter.matches(subject)) {
                found.push((here, brief.size));
            }
        }
        Ok(found)
    }

    /// Marks messages in [from, to) that match as deleted. Answers where to go on, if there is more to look at than one
    /// entry may.
    fn delete_matching(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        filter: &Filter,
        from: Sequence,
        to: Sequence,
        work: &mut Work,
    ) -> Result<Option<Sequence>, ViewError> {
        if self.messages == 0 {
            return Ok(None);
        }
        let start = self.head_base(view, work)?;
        let mut at = from;
        while at < to && !work.spent() {
            let batch = self.batch_at(view, at)?;
            work.add(&batch);
            let matching = self.matching(view, &batch, Some(filter), at, to)?;
            at = batch.end();
            if matching.is_empty() {
                continue;
            }
            // Also those below the floor, which count no more: the record is replaced.
            let mut holes = self.holes(view, batch.base)?;
            for (offset, size) in matching {
                holes.push(offset);
                self.messages -= 1;
                self.bytes -= u64::from(size);
            }
            holes.sort_unstable();
            self.put_holes(sink, batch.base, holes);
        }
        self.forget_head();
        self.settle(view, &mut Work::default())?;
        self.drop_below_floor(sink, start);
        Ok((at < to).then_some(at))
    }
}
