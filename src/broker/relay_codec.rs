//! Outcomes and positions ⇄ `relay.proto`. Nothing is lost on the way: what a client is told does not depend on the node
//! it is connected to.

use super::error::{PublishError, Reach};
use super::ingest::Outcome;
use crate::machine::{Duplicate, DuplicateItem, ItemOutcome, Refusal, StoredItem};
use crate::model::{GroupId, ReplicaId, Revision, Sequence, Term, TimeUs};
use crate::raft::{Positions, ProposeError};
use crate::wire::internal as pb;
use pb::relay_outcome::Result as Wire;

fn duplicates_to_pb(duplicates: &[Duplicate]) -> Vec<pb::RelayDuplicate> {
    duplicates
        .iter()
        .map(|d| pb::RelayDuplicate {
            position: d.position,
            original: d.original.map(Sequence::get),
        })
        .collect()
}

fn duplicates_from_pb(duplicates: Vec<pb::RelayDuplicate>) -> Vec<Duplicate> {
    duplicates
        .into_iter()
        .map(|d| Duplicate {
            position: d.position,
            original: d.original.map(Sequence::new),
        })
        .collect()
}

fn refusal_to_pb(refusal: Refusal) -> pb::RelayRefused {
    use pb::RelayRefusal as W;
    let (refusal, figure) = match refusal {
        Refusal::BadBatch => (W::BadBatch, 0),
        Refusal::MessageTooLarge { max } => (W::MessageTooLarge, max),
        Refusal::LargerThanStream => (W::LargerThanStream, 0),
        Refusal::TooManyIds { max } => (W::TooManyIds, u64::from(max)),
        Refusal::SubjectExpectationUnsupported => (W::SubjectExpectationUnsupported, 0),
        Refusal::LastSequence { actual } => (W::LastSequence, actual.get()),
        Refusal::SubjectLastSequence { actual } => (W::SubjectLastSequence, actual.get()),
        Refusal::ProducerSequenceZero => (W::ProducerSequenceZero, 0),
        Refusal::Fenced { epoch } => (W::Fenced, epoch),
        Refusal::OutOfOrder { expected } => (W::OutOfOrder, expected),
        Refusal::UnknownProducer => (W::UnknownProducer, 0),
        Refusal::AnswerForgotten { oldest } => (W::AnswerForgotten, oldest),
        Refusal::TooManyProducers { max } => (W::TooManyProducers, u64::from(max)),
        Refusal::StreamFull => (W::StreamFull, 0),
        Refusal::IdsFull { max } => (W::IdsFull, u64::from(max)),
    };
    pb::RelayRefused {
        refusal: refusal.into(),
        figure,
    }
}

/// `None`: one that this version does not know.
fn refusal_from_pb(refused: pb::RelayRefused) -> Option<Refusal> {
    use pb::RelayRefusal as W;
    let figure = refused.figure;
    let small = || u32::try_from(figure).ok();
    Some(match refused.refusal() {
        W::Unspecified => return None,
        W::BadBatch => Refusal::BadBatch,
        W::MessageTooLarge => Refusal::MessageTooLarge { max: figure },
        W::LargerThanStream => Refusal::LargerThanStream,
        W::TooManyIds => Refusal::TooManyIds { max: small()? },
        W::SubjectExpectationUnsupported => Refusal::SubjectExpectationUnsupported,
        W::LastSequence => Refusal::LastSequence {
            actual: Sequence::new(figure),
        },
        W::SubjectLastSequence => Refusal::SubjectLastSequence {
            actual: Sequence::new(figure),
        },
        W::ProducerSequenceZero => Refusal::ProducerSequenceZero,
        W::Fenced => Refusal::Fenced { epoch: figure },
        W::OutOfOrder => Refusal::OutOfOrder { expected: figure },
        W::UnknownProducer => Refusal::UnknownProducer,
        W::AnswerForgotten => Refusal::AnswerForgotten { oldest: figure },
        W::TooManyProducers => Refusal::TooManyProducers { max: small()? },
        W::StreamFull => Refusal::StreamFull,
        W::IdsFull => Refusal::IdsFull { max: small()? },
    })
}

fn failure_to_pb(e: &PublishError) -> pb::RelayFailed {
    use pb::RelayFailure as W;
    let mut failed = pb::RelayFailed {
        text: e.to_string(),
        ..pb::RelayFailed::default()
    };
    let failure = match e {
        PublishError::Propose(ProposeError::NotLeader { leader, .. }) => {
            failed.leader = leader.map(ReplicaId::get);
            W::NotLeader
        }
        PublishError::Propose(ProposeError::Stopped { reason, .. }) => {
            failed.text.clone_from(reason);
            W::Stopped
        }
        PublishError::Propose(ProposeError::Unknown { .. }) => W::Unknown,
        PublishError::NoLeader { .. } => W::NotLeader,
        PublishError::NoQuorum { reach, .. } => {
            failed.reach = Some(reach_to_pb(reach));
            W::NoQuorum
        }
        PublishError::Unconfirmed { reach, .. } => {
            failed.reach = Some(reach_to_pb(reach));
            W::Unconfirmed
        }
        PublishError::Stopping => W::Stopping,
        PublishError::Removed => W::Removed,
        PublishError::Moved { to } => {
            failed.to_group = to.get();
            W::Moved
        }
        PublishError::Overloaded { .. } => W::Overloaded,
        PublishError::DiskLow { free, needed } => {
            failed.free = *free;
            failed.needed = *needed;
            W::DiskLow
        }
        PublishError::Damaged(what) => {
            failed.text.clone_from(what);
            W::Damaged
        }
        // Refusals travel as such; what validation says, and the order of a producer's batches, never
        // gets here: that is seen to where the batch came in.
        PublishError::Refused(_)
        | PublishError::Stream(_)
        | PublishError::EarlierUnknown
        | PublishError::BadBatch(_)
        | PublishError::BadMessage(_)
        | PublishError::SubjectNotInStream { .. }
        | PublishError::MessageTooLarge { .. }
        | PublishError::WrongShard { .. }
        | PublishError::MapChanged { .. }
        | PublishError::BadExpectation(_) => W::Unspecified,
    };
    failed.failure = failure.into();
    failed
}

fn reach_to_pb(reach: &Reach) -> pb::RelayReach {
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    pb::RelayReach {
        live: small(reach.live),
        needed: small(reach.needed),
        replicas: small(reach.replicas),
    }
}

fn reach_from_pb(reach: Option<pb::RelayReach>) -> Reach {
    let reach = reach.unwrap_or_default();
    Reach {
        live: reach.live as usize,
        needed: reach.needed as usize,
        replicas: reach.replicas as usize,
    }
}

fn failure_from_pb(group: GroupId, failed: pb::RelayFailed) -> PublishError {
    use pb::RelayFailure as W;
    match failed.failure() {
        W::NotLeader => ProposeError::NotLeader {
            group,
            leader: failed.leader.map(ReplicaId::new),
        }
        .into(),
        W::Stopped => ProposeError::Stopped {
            group,
            reason: failed.text,
        }
        .into(),
        W::NoQuorum => PublishError::NoQuorum {
            group,
            reach: reach_from_pb(failed.reach),
        },
        W::Unconfirmed => PublishError::Unconfirmed {
            group,
            reach: reach_from_pb(failed.reach),
        },
        W::Unknown | W::Unspecified => ProposeError::Unknown { group }.into(),
        W::Stopping => PublishError::Stopping,
        W::Removed => PublishError::Removed,
        W::Moved => PublishError::Moved {
            to: GroupId::new(failed.to_group),
        },
        W::Overloaded => PublishError::Overloaded {
            what: "publishes at the shard's leader",
        },
        W::DiskLow => PublishError::DiskLow {
            free: failed.free,
            needed: failed.needed,
        },
        W::Damaged => PublishError::Damaged(failed.text),
    }
}

/// An outcome as it is sent.
pub(super) fn outcome_to_pb(outcome: &Outcome) -> pb::RelayOutcome {
    let result = match outcome {
        Ok(ItemOutcome::Stored(item)) => Wire::Stored(pb::RelayStored {
            first: Some(item.first.get()),
            last: Some(item.last.get()),
            tail: item.tail.get(),
            append_time_us: item.append_time.get(),
            term: item.term.get(),
            duplicates: duplicates_to_pb(&item.duplicates),
            whole_duplicate: item.whole_duplicate,
        }),
        Ok(ItemOutcome::AllDuplicates(item)) => Wire::AllDuplicates(pb::RelayStored {
            first: None,
            last: None,
            tail: item.tail.get(),
            append_time_us: item.append_time.get(),
            term: item.term.get(),
            duplicates: duplicates_to_pb(&item.duplicates),
            whole_duplicate: item.whole_duplicate,
        }),
        Ok(ItemOutcome::Refused(refusal)) | Err(PublishError::Refused(refusal)) => {
            Wire::Refused(refusal_to_pb(*refusal))
        }
        Err(e) => Wire::Failed(failure_to_pb(e)),
    };
    pb::RelayOutcome { result: Some(result) }
}

/// The inverse. What this version cannot read is an unknown outcome.
pub(super) fn outcome_from_pb(group: GroupId, outcome: pb::RelayOutcome) -> Outcome {
    let unknown = || PublishError::from(ProposeError::Unknown { group });
    match outcome.result.ok_or_else(unknown)? {
        Wire::Stored(item) => {
            let (Some(first), Some(last)) = (item.first, item.last) else {
                return Err(unknown());
            };
            Ok(ItemOutcome::Stored(StoredItem {
                first: Sequence::new(first),
                last: Sequence::new(last),
                tail: Sequence::new(item.tail),
                append_time: TimeUs::new(item.append_time_us),
                term: Term::new(item.term),
                duplicates: duplicates_from_pb(item.duplicates),
                whole_duplicate: item.whole_duplicate,
            }))
        }
        Wire::AllDuplicates(item) => Ok(ItemOutcome::AllDuplicates(DuplicateItem {
            tail: Sequence::new(item.tail),
            append_time: TimeUs::new(item.append_time_us),
            term: Term::new(item.term),
            duplicates: duplicates_from_pb(item.duplicates),
            whole_duplicate: item.whole_duplicate,
        })),
        Wire::Refused(refused) => refusal_from_pb(refused).map(ItemOutcome::Refused).ok_or_else(unknown),
        Wire::Failed(failed) => Err(failure_from_pb(group, failed)),
    }
}

/// Positions as they are sent. When an expiry is due concerns the leader only.
pub(super) fn positions_to_pb(at: &Positions) -> pb::RelayPositions {
    pb::RelayPositions {
        floor: at.floor.get(),
        tail: at.tail.get(),
        term: at.term.get(),
        messages: at.messages,
        bytes: at.bytes,
        first_time_us: at.first_time.map(TimeUs::get),
        last_time_us: at.last_time.map(TimeUs::get),
        revision: at.revision.get(),
        removed: at.removed,
    }
}

/// The inverse.
pub(super) fn positions_from_pb(at: &pb::RelayPositions) -> Positions {
    Positions {
        floor: Sequence::new(at.floor),
        tail: Sequence::new(at.tail),
        term: Term::new(at.term),
        messages: at.messages,
        bytes: at.bytes,
        first_time: at.first_time_us.map(TimeUs::new),
        last_time: at.last_time_us.map(TimeUs::new),
        revision: Revision::new(at.revision),
        next_expiry: None,
        removed: at.removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    const GROUP: GroupId = GroupId::new(7);

    fn there_and_back(outcome: &Outcome) -> Outcome {
        let bytes = outcome_to_pb(outcome).encode_to_vec();
        outcome_from_pb(GROUP, pb::RelayOutcome::decode(&bytes[..]).expect("its own encoding"))
    }

    #[test]
    fn every_outcome_survives_the_way() {
        let duplicates = vec![
            Duplicate {
                position: 1,
                original: Some(Sequence::new(5)),
            },
            Duplicate {
                position: 3,
                original: None,
            },
        ];
        let actual = Sequence::new(77);
        let refusals = [
            Refusal::BadBatch,
            Refusal::MessageTooLarge { max: 3 },
            Refusal::LargerThanStream,
            Refusal::TooManyIds { max: 4 },
            Refusal::SubjectExpectationUnsupported,
            Refusal::LastSequence { actual },
            Refusal::SubjectLastSequence { actual },
            Refusal::ProducerSequenceZero,
            Refusal::Fenced { epoch: 9 },
            Refusal::OutOfOrder { expected: 12 },
            Refusal::UnknownProducer,
            Refusal::AnswerForgotten { oldest: 6 },
            Refusal::TooManyProducers { max: 10 },
            Refusal::StreamFull,
            Refusal::IdsFull { max: 11 },
        ];
        let stored = [
            ItemOutcome::Stored(StoredItem {
                first: Sequence::new(10),
                last: Sequence::new(12),
                tail: Sequence::new(13),
                append_time: TimeUs::new(1_000),
                term: Term::new(3),
                duplicates: duplicates.clone(),
                whole_duplicate: true,
            }),
            ItemOutcome::AllDuplicates(DuplicateItem {
                tail: Sequence::new(13),
                append_time: TimeUs::new(1_000),
                term: Term::new(3),
                duplicates,
                whole_duplicate: false,
            }),
        ];
        for outcome in stored.into_iter().chain(refusals.map(ItemOutcome::Refused)) {
            assert_eq!(there_and_back(&Ok(outcome.clone())).expect("an outcome"), outcome);
        }
        let failures: [PublishError; 11] = [
            ProposeError::NotLeader {
                group: GROUP,
                leader: Some(ReplicaId::new(4)),
            }
            .into(),
            ProposeError::Stopped {
                group: GROUP,
                reason: "a test".into(),
            }
            .into(),
            ProposeError::Unknown { group: GROUP }.into(),
            PublishError::NoQuorum {
                group: GROUP,
                reach: Reach {
                    live: 1,
                    needed: 2,
                    replicas: 3,
                },
            },
            PublishError::Unconfirmed {
                group: GROUP,
                reach: Reach {
                    live: 2,
                    needed: 3,
                    replicas: 5,
                },
            },
            PublishError::Stopping,
            PublishError::Removed,
            PublishError::Moved { to: GroupId::new(8) },
            PublishError::Overloaded {
                what: "publishes at the shard's leader",
            },
            PublishError::DiskLow { free: 5, needed: 6 },
            PublishError::Damaged("a test".into()),
        ];
        for failure in failures {
            let text = format!("{failure:?}");
            let back = there_and_back(&Err(failure)).expect_err("a failure");
            assert_eq!(format!("{back:?}"), text);
        }
    }
}
