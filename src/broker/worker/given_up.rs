//! Producers of whose batches one ended as unknown. Were one behind it taken now, it might be acknowledged before the one
//! that was given up is sent again, though both are in order in the log. So those behind it are not taken until then.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::wire::internal as pb;

/// How long a producer has to send again what ended as unknown. Who does not by then does not want to, and goes on.
const FOR: Duration = Duration::from_secs(10);
/// From so many producers on, those whose time is over are looked for.
const MANY: usize = 1_024;

/// By producer and epoch: the first number that ended as unknown, and when.
#[derive(Debug, Default)]
pub(super) struct GivenUp(HashMap<(u64, u64), (u64, Instant)>);

impl GivenUp {
    /// A batch ended as unknown.
    pub fn note(&mut self, stamp: &pb::ProducerStamp) {
        if self.0.len() >= MANY {
            self.0.retain(|_, (_, since)| since.elapsed() < FOR);
        }
        let known = self.0.entry((stamp.producer_id, stamp.epoch));
        let (first, since) = known.or_insert((stamp.sequence, Instant::now()));
        if stamp.sequence <= *first {
            (*first, *since) = (stamp.sequence, Instant::now());
        }
    }

    /// Whether one before this batch is to be sent again first. That one ends the waiting.
    pub fn is_behind(&mut self, stamp: &pb::ProducerStamp) -> bool {
        // Asked for each batch: what is common costs nothing.
        if self.0.is_empty() {
            return false;
        }
        let producer = (stamp.producer_id, stamp.epoch);
        let Some((first, since)) = self.0.get(&producer) else {
            return false;
        };
        if stamp.sequence > *first && since.elapsed() < FOR {
            return true;
        }
        self.0.remove(&producer);
        false
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
        given_up.note(&stamp(1, 1, 7));
        given_up.note(&stamp(1, 1, 8));
        assert!(given_up.is_behind(&stamp(1, 1, 8)));
        assert!(given_up.is_behind(&stamp(1, 1, 9)));
        // Other producers, and a later epoch of this one, have nothing to wait for.
        assert!(!given_up.is_behind(&stamp(2, 1, 9)));
        assert!(!given_up.is_behind(&stamp(1, 2, 9)));
        // It is sent again, and those behind it.
        assert!(!given_up.is_behind(&stamp(1, 1, 7)));
        assert!(!given_up.is_behind(&stamp(1, 1, 8)));
    }

    #[tokio::test(start_paused = true)]
    async fn it_may_be_given_up_again_and_does_not_wait_for_ever() {
        let mut given_up = GivenUp::default();
        given_up.note(&stamp(1, 1, 7));
        assert!(!given_up.is_behind(&stamp(1, 1, 7)));
        given_up.note(&stamp(1, 1, 7));
        tokio::time::advance(FOR / 2).await;
        assert!(given_up.is_behind(&stamp(1, 1, 8)));
        // One before it, of an entry that was under way for longer.
        given_up.note(&stamp(1, 1, 6));
        tokio::time::advance(FOR / 2).await;
        assert!(given_up.is_behind(&stamp(1, 1, 7)));
        tokio::time::advance(FOR / 2).await;
        assert!(!given_up.is_behind(&stamp(1, 1, 8)));
    }

    #[tokio::test(start_paused = true)]
    async fn producers_that_went_away_are_forgotten() {
        let mut given_up = GivenUp::default();
        for producer in 0..MANY as u64 {
            given_up.note(&stamp(producer, 1, 1));
        }
        tokio::time::advance(FOR).await;
        given_up.note(&stamp(u64::MAX, 1, 1));
        assert_eq!(given_up.0.len(), 1);
    }
}
