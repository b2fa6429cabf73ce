//! What an answer means for a batch: the last word on it, or that it is sent again.

use std::time::Duration;

use super::{ELECTION, NO_QUORUM, PAUSE_MIN, RELAY_PATIENCE, Waiting, Worker};
use crate::base::RetryClass;
use crate::broker::error::{PublishError, Reach};
use crate::broker::ingest::{Outcome, tell};
use crate::machine::{ItemOutcome, Refusal};
use crate::raft::ProposeError;

impl Worker {
    /// Tells an outcome, or keeps the batch to send it again.
    pub(super) fn settle(&mut self, mut waiting: Waiting, outcome: Outcome) {
        // Its outcome was told as unknown.
        if waiting.reply.is_none() {
            return;
        }
        if let Err(PublishError::Moved { to }) = &outcome {
            self.heir = Some(*to);
        }
        if outcome.is_ok() && self.failed.is_empty() {
            self.pause = PAUSE_MIN;
        }
        if self.router.peers.is_none() || waiting.relayed {
            return self.conclude(waiting, outcome);
        }
        if self.is_behind(&waiting) {
            waiting.uncertain |= may_be_stored(&outcome);
            return self.refuse_behind(waiting);
        }
        // Behind one of its producer that is sent again: so that answers keep their order, it is sent again as well,
        // whatever it was answered. A number that was used up is answered as it was the first time.
        let producer = waiting.producer();
        if producer.is_some() && self.failed.iter().any(|f| f.producer() == producer) {
            waiting.uncertain |= may_be_stored(&outcome);
            self.failed.push_back(waiting);
            return;
        }
        let again = match &outcome {
            Ok(_) => false,
            Err(e) if e.retry_class() == RetryClass::MayHaveHappened => {
                // A producer's number makes a second attempt safe; nothing else does.
                waiting.uncertain = true;
                producer.is_some()
            }
            Err(
                PublishError::Propose(_)
                | PublishError::NoLeader { .. }
                | PublishError::NoQuorum { .. }
                | PublishError::Moved { .. }
                | PublishError::Stopping
                | PublishError::Overloaded { .. },
            ) => true,
            Err(_) => false,
        };
        if again && waiting.submitted.elapsed() < self.patience(&waiting, &outcome) {
            self.failed.push_back(waiting);
        } else {
            self.conclude(waiting, outcome);
        }
    }

    /// How long a batch that was answered like this waits for a leader. One with a producer's number longer than any usual
    /// trouble lasts: whoever sent it would send it again.
    fn patience(&self, waiting: &Waiting, outcome: &Outcome) -> Duration {
        if reach_told(outcome).is_some() || self.router.without_quorum(self.group()).is_some() {
            NO_QUORUM
        } else if waiting.producer().is_some() {
            RELAY_PATIENCE
        } else {
            ELECTION
        }
    }

    /// A batch that nobody took: it ends, as unknown if an earlier attempt may have stored it.
    pub(super) fn refuse(&mut self, waiting: Waiting) {
        self.conclude(waiting, Err(self.no_leader()));
    }

    /// A batch that is behind one of its producer that ended as unknown.
    pub(super) fn refuse_behind(&mut self, waiting: Waiting) {
        let group = self.group();
        let why = match self.router.without_quorum(group) {
            Some(reach) => PublishError::NoQuorum { group, reach },
            None => PublishError::EarlierUnknown,
        };
        self.conclude(waiting, Err(why));
    }

    /// Tells the last word on a batch.
    pub(super) fn conclude(&mut self, mut waiting: Waiting, outcome: Outcome) {
        let group = self.group();
        let stamp = waiting.stamp().copied();
        // Also of one whose turn has not come.
        waiting.uncertain |= stamp.is_some_and(|stamp| self.given_up.was_unknown(&stamp));
        let told = reach_told(&outcome);
        let unknown = || match told.or_else(|| self.router.without_quorum(group)) {
            Some(reach) => Err(PublishError::Unconfirmed { group, reach }),
            None => Err(ProposeError::Unknown { group }.into()),
        };
        let outcome = match outcome {
            // How the last attempt was refused says nothing of the first one.
            Ok(ItemOutcome::Refused(refusal))
                if waiting.uncertain && refusal.retry() != RetryClass::MayHaveHappened =>
            {
                match refusal {
                    // It would have been known as a duplicate before any of these was looked at.
                    Refusal::OutOfOrder { .. }
                    | Refusal::StreamFull
                    | Refusal::IdsFull { .. }
                    | Refusal::TooManyIds { .. }
                    | Refusal::LastSequence { .. }
                    | Refusal::SubjectLastSequence { .. }
                    | Refusal::MessageTooLarge { .. }
                    | Refusal::LargerThanStream
                    | Refusal::SubjectExpectationUnsupported
                    | Refusal::BadBatch => Ok(ItemOutcome::Refused(refusal)),
                    Refusal::Fenced { .. }
                    | Refusal::TooManyProducers { .. }
                    | Refusal::ProducerSequenceZero
                    | Refusal::UnknownProducer
                    | Refusal::AnswerForgotten { .. } => unknown(),
                }
            }
            Err(_) if waiting.uncertain => unknown(),
            // Another node looks for the leader itself, but not for what is known here.
            Err(PublishError::Propose(ProposeError::NotLeader { leader: None, .. })) => {
                let waited = waiting.submitted.elapsed();
                Err(match self.router.without_quorum(group) {
                    Some(reach) => PublishError::NoQuorum { group, reach },
                    None if self.router.peers.is_some() && !waiting.relayed => PublishError::NoLeader { group, waited },
                    None => ProposeError::NotLeader { group, leader: None }.into(),
                })
            }
            outcome @ (Ok(_) | Err(_)) => outcome,
        };
        if let Some((reply, permit)) = waiting.reply.take() {
            let is_unknown = outcome.is_err() && waiting.uncertain;
            let is_stored = outcome.is_ok();
            tell(&self.metrics, waiting.relayed, reply, permit, outcome);
            match stamp {
                Some(stamp) if is_stored => self.given_up.answered(&stamp),
                Some(stamp) if is_unknown && self.given_up.note(&stamp) => self.end_behind(&stamp),
                Some(_) | None => {}
            }
        }
    }
}

/// How many members the leader reached, where that was too few.
fn reach_told(outcome: &Outcome) -> Option<Reach> {
    match outcome {
        Err(PublishError::NoQuorum { reach, .. } | PublishError::Unconfirmed { reach, .. }) => Some(*reach),
        Ok(_) | Err(_) => None,
    }
}

/// Whether a batch that was answered like this may be in the log.
fn may_be_stored(outcome: &Outcome) -> bool {
    match outcome {
        Ok(ItemOutcome::Refused(Refusal::OutOfOrder { .. } | Refusal::UnknownProducer)) => false,
        Ok(_) => true,
        Err(e) => e.retry_class() == RetryClass::MayHaveHappened,
    }
}
