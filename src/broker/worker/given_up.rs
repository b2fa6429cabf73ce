//! Producers of whose batches one ended as unknown. Were one behind it taken now, it might be acknowledged before the one
//! that was given up is sent again, though both are in order in the log. So those behind it are not taken until then. And
//! what ended as unknown may be stored, however its next attempt ends.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::wire::internal as pb;

/// How long a producer has to send again what ended as unknown. Who does not by then does not want to, and goes on.
const BEHIND_FOR: Duration = Duration::from_secs(10);
/// How long is known what ended as unknown, if it is not answered otherwise.
const KNOWN_FOR: Duration = Duration::from_secs(600);
/// From so many producers on, those whose time is over are looked for; of so many no more is known than must be.
const MANY: usize = 1_024;

#[derive(Debug)]
struct Mark {
    /// The number to be sent again next.
    next: u64,
    /// The last that ended as unknown.
    last: u64,
    since: Instant,
}

/// By producer and epoch.
#[derive(Debug, Default)]
pub(super) struct GivenUp(HashMap<(u64, u64), Mark>);

impl GivenUp {
    /// A batch ended as unknown. Whether it is the first of its producer, or before the first.
    pub fn note(&mut self, stamp: &pb::ProducerStamp) -> bool {
        if self.0.len() >= MANY {
            self.0.retain(|_, mark| mark.since.elapsed() < KNOWN_FOR);
        }
        if self.0.len() >= MANY {
            self.0.retain(|_, mark| mark.since.elapsed() < BEHIND_FOR);
        }
        let (sequence, since) = (stamp.sequence, Instant::now());
        let mark = self.0.entry((stamp.producer_id, stamp.epoch)).or_insert(Mark {
            next: u64::MAX,
            last: sequence,
            since,
        });
        mark.last = mark.last.max(sequence);
        let is_first = sequence < mark.next;
        if is_first {
            (mark.next, mark.since) = (sequence, since);
        }
        is_first
    }

    /// Whether one before this batch is to be sent again first.
    pub fn is_behind(&self, stamp: &pb::ProducerStamp) -> bool {
        self.mark(stamp)
            .is_some_and(|mark| stamp.sequence > mark.next && mark.since.elapsed() < BEHIND_FOR)
    }

    fn mark(&self, stamp: &pb::ProducerStamp) -> Option<&Mark> {
        // Asked for each batch: what is common costs nothing.
        if self.0.is_empty() {
            return None;
        }
        self.0.get(&(stamp.producer_id, stamp.epoch))
    }

    /// A batch that is not behind is sent: the next one may follow. Whether it ended as unknown before.
    pub fn take(&mut self, stamp: &pb::ProducerStamp) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let Some(mark) = self.0.get_mut(&(stamp.producer_id, stamp.epoch)) else {
            return false;
        };
        mark.next = stamp.sequence.saturating_add(1);
        stamp.sequence <= mark.last
    }

    /// Whether a batch ended as unknown before: it may be stored.
    pub fn was_unknown(&self, stamp: &pb::ProducerStamp) -> bool {
        self.mark(stamp).is_some_and(|mark| stamp.sequence <= mark.last)
    }

    /// The machine's word on a batch is told: with the last one all are answered.
    pub fn answered(&mut self, stamp: &pb::ProducerStamp) {
        let producer = (stamp.producer_id, stamp.epoch);
        if !self.0.is_empty() && self.0.get(&producer).is_some_and(|mark| stamp.sequence >= mark.last) {
            self.0.remove(&producer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(producer_id: u64, epoch: u64, sequence: u64) -> pb::ProducerStamp {
        pb::ProducerStamp {
            producer_id,
            epoch,
            sequence,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_behind_waits_for_the_first_that_was_given_up() {
        let mut given_up = GivenUp::default();
        assert!(given_up.note(&stamp(1, 1, 7)));
        assert!(!given_up.note(&stamp(1, 1, 8)));
        assert!(given_up.is_behind(&stamp(1, 1, 8)));
        assert!(given_up.is_behind(&stamp(1, 1, 9)));
        // Other producers, and a later epoch of this one, have nothing to wait for.
        assert!(!given_up.is_behind(&stamp(2, 1, 9)));
        assert!(!given_up.is_behind(&stamp(1, 2, 9)));
        // It is sent again, and those behind it, one after the other.
        assert!(!given_up.is_behind(&stamp(1, 1, 7)));
        assert!(given_up.take(&stamp(1, 1, 7)), "it may be stored");
        assert!(!given_up.is_behind(&stamp(1, 1, 8)));
        assert!(given_up.is_behind(&stamp(1, 1, 9)));
        assert!(
            given_up.was_unknown(&stamp(1, 1, 8)),
            "it may be stored, though it is not its turn"
        );
        assert!(!given_up.was_unknown(&stamp(1, 1, 9)) && !given_up.was_unknown(&stamp(2, 1, 8)));
        assert!(given_up.take(&stamp(1, 1, 8)));
        assert!(!given_up.is_behind(&stamp(1, 1, 9)));
        assert!(!given_up.take(&stamp(1, 1, 9)), "it was never sent");
        // The first answer is not the last.
        given_up.answered(&stamp(1, 1, 7));
        assert!(given_up.take(&stamp(1, 1, 8)));
        given_up.answered(&stamp(1, 1, 8));
        assert!(given_up.0.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn it_may_be_given_up_again_and_does_not_wait_for_ever() {
        let mut given_up = GivenUp::default();
        given_up.note(&stamp(1, 1, 7));
        given_up.note(&stamp(1, 1, 9));
        given_up.take(&stamp(1, 1, 7));
        given_up.take(&stamp(1, 1, 8));
        assert!(given_up.note(&stamp(1, 1, 7)), "those under way behind it end with it");
        tokio::time::advance(BEHIND_FOR / 2).await;
        assert!(given_up.is_behind(&stamp(1, 1, 8)));
        tokio::time::advance(BEHIND_FOR / 2).await;
        assert!(!given_up.is_behind(&stamp(1, 1, 8)));
        assert!(given_up.take(&stamp(1, 1, 8)), "what ended as unknown is remembered");
    }

    #[tokio::test(start_paused = true)]
    async fn producers_that_went_away_are_forgotten() {
        let mut given_up = GivenUp::default();
        for producer in 0..MANY as u64 {
            given_up.note(&stamp(producer, 1, 1));
        }
        tokio::time::advance(BEHIND_FOR).await;
        given_up.note(&stamp(u64::MAX, 1, 1));
        assert_eq!(given_up.0.len(), 1);
    }
}
