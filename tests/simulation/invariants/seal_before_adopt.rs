//! A shard is open in one group at a time: its seal is committed in the one before the other adopts it, with all that was
//! stored before; and after its seal the one stores nothing of it any more.
//!
//! Told from outside: what each group has committed, in order; what each replica's records say; what was acknowledged where.

use std::collections::BTreeMap;

use mainstem::model::{GroupId, ReplicaId, Sequence, ShardId};
use mainstem::wire::internal as pb;
use pb::group_command::Op;

use super::{Verdict, Violation, broken};

const NAME: &str = "seal before adopt";

/// From when on a group has a shard: the entry that created or adopted it, and until when: its seal.
#[derive(Debug, Clone)]
struct Term {
    group: GroupId,
    from: u64,
    until: Option<u64>,
    /// Entries between a seal and what undid it, both without.
    shut: Vec<(u64, u64)>,
}

/// A seal that was committed.
#[derive(Debug, Clone, Copy)]
struct Seal {
    from: GroupId,
    to: GroupId,
    index: u64,
    /// Once anybody has told it.
    tail: Option<Sequence>,
    /// The move was given up.
    undone: bool,
}

#[derive(Debug, Default)]
struct Shard {
    /// By the move that began it, in order; 0: where it was created.
    terms: BTreeMap<u64, Term>,
    seals: BTreeMap<u64, Seal>,
    /// Moves up to this one were given up.
    given_up: u64,
}

#[derive(Default)]
pub struct SealBeforeAdopt {
    shards: BTreeMap<ShardId, Shard>,
    /// How far each group's entries were seen.
    seen: BTreeMap<GroupId, u64>,
}

impl SealBeforeAdopt {
    /// A replica has applied an entry with this command; `own` tells how far its node has applied another group.
    pub fn applied(
        &mut self,
        group: GroupId,
        index: u64,
        command: &pb::GroupCommand,
        by: ReplicaId,
        own: impl Fn(GroupId) -> u64,
    ) -> Verdict {
        if let Some(Op::AdoptShard(adopt)) = &command.op {
            let (from, seal) = (GroupId::new(adopt.from_group), adopt.seal.unwrap_or_default());
            let has = own(from);
            // Of a group whose replica here was removed nothing is left but what it had sealed for this one.
            if has > 0 && has < seal.index {
                return Err(broken(
                    NAME,
                    format!(
                        "{by} has applied the adoption {group} #{index}, and of {from} only #{has}: the seal is #{}",
                        seal.index
                    ),
                ));
            }
        }
        let seen = self.seen.entry(group).or_default();
        if index <= *seen {
            return Ok(());
        }
        *seen = index;
        match &command.op {
            Some(Op::CreateShard(create)) => {
                let term = Term {
                    group,
                    from: index,
                    until: None,
                    shut: Vec::new(),
                };
                let shard = self.shards.entry(ShardId::new(create.shard_id)).or_default();
                shard.terms.entry(0).or_insert(term);
                Ok(())
            }
            Some(Op::SealShard(seal)) => self.seals(group, index, seal),
            Some(Op::UnsealShard(unseal)) => self.unseals(group, index, unseal),
            Some(Op::AdoptShard(adopt)) => self.adopts(group, index, adopt),
            _ => Ok(()),
        }
    }

    fn seals(&mut self, group: GroupId, index: u64, seal: &pb::SealShard) -> Verdict {
        let Some(shard) = self.shards.get_mut(&ShardId::new(seal.shard_id)) else {
            return Ok(());
        };
        if seal.move_id <= shard.given_up {
            return Ok(());
        }
        // Of one that is not open here it is of no effect: it was sealed before.
        let open = shard.terms.values_mut().find(|t| t.group == group && t.until.is_none());
        if let Some(term) = open {
            term.until = Some(index);
            let to = GroupId::new(seal.to_group);
            let sealed = Seal {
                from: group,
                to,
                index,
                tail: None,
                undone: false,
            };
            shard.seals.insert(seal.move_id, sealed);
        }
        Ok(())
    }

    fn unseals(&mut self, group: GroupId, index: u64, unseal: &pb::UnsealShard) -> Verdict {
        let id = ShardId::new(unseal.shard_id);
        let Some(shard) = self.shards.get_mut(&id) else {
            return Ok(());
        };
        if shard.terms.contains_key(&unseal.move_id) {
            let what = format!(
                "{group} #{index} unseals {id}, which was adopted by move {}",
                unseal.move_id
            );
            return Err(broken(NAME, what));
        }
        shard.given_up = shard.given_up.max(unseal.move_id);
        let seal = shard.seals.get_mut(&unseal.move_id).filter(|seal| !seal.undone);
        if let Some(seal) = seal {
            seal.undone = true;
            let at = seal.index;
            let sealed = |term: &&mut Term| term.group == group && term.until == Some(at);
            if let Some(term) = shard.terms.values_mut().find(sealed) {
                term.until = None;
                term.shut.push((at, index));
            }
        }
        Ok(())
    }

    fn adopts(&mut self, group: GroupId, index: u64, adopt: &pb::AdoptShard) -> Verdict {
        let id = ShardId::new(adopt.shard_id);
        let wrong = |why: String| Err(broken(NAME, format!("{group} #{index} adopts {id}: {why}")));
        let Some(shard) = self.shards.get_mut(&id) else {
            return wrong("there is no such shard".into());
        };
        if shard.terms.range(adopt.move_id..).next().is_some() {
            // Again.
            return Ok(());
        }
        let (from, told) = (GroupId::new(adopt.from_group), adopt.seal.unwrap_or_default());
        let Some(seal) = shard.seals.get_mut(&adopt.move_id) else {
            return wrong(format!("no seal of move {} is committed", adopt.move_id));
        };
        if seal.undone {
            return wrong(format!("move {} was given up", adopt.move_id));
        }
        if (seal.from, seal.to) != (from, group) || told.index < seal.index {
            return wrong(format!("its seal is another: {seal:?}, not {told:?} of {from}"));
        }
        let tail = *seal.tail.get_or_insert(Sequence::new(told.tail));
        if tail.get() != told.tail {
            return wrong(format!("it was sealed at {tail}, not at {}", told.tail));
        }
        if let Some(open) = shard.terms.values().find(|term| term.until.is_none()) {
            return wrong(format!("it is open in {} since #{}", open.group, open.from));
        }
        let term = Term {
            group,
            from: index,
            until: None,
            shut: Vec::new(),
        };
        shard.terms.insert(adopt.move_id, term);
        Ok(())
    }

    /// Whoever sealed a shard was told its tail; `acked` is that up to which messages were acknowledged by then.
    pub fn sealed(&mut self, shard: ShardId, move_id: u64, tail: Sequence, acked: Sequence) -> Verdict {
        if tail < acked {
            return Err(broken(
                NAME,
                format!("{shard} is sealed at {tail}, messages below {acked} were acknowledged"),
            ));
        }
        self.rests_at(shard, move_id, tail, &"the answer to its seal")
    }

    fn rests_at(&mut self, id: ShardId, move_id: u64, tail: Sequence, by: &dyn std::fmt::Display) -> Verdict {
        let seal = self.seal(id, move_id, by)?;
        let first = *seal.tail.get_or_insert(tail);
        if first == tail {
            return Ok(());
        }
        Err(broken(
            NAME,
            format!("{id} rests at {first} after the seal of move {move_id}; {by} says {tail}"),
        ))
    }

    fn seal(&mut self, id: ShardId, move_id: u64, by: &dyn std::fmt::Display) -> Result<&mut Seal, Violation> {
        let shard = self.shards.get_mut(&id);
        shard
            .and_then(|shard| shard.seals.get_mut(&move_id))
            .ok_or_else(|| broken(NAME, format!("{by}: no seal of {id} for move {move_id} is committed")))
    }

    /// The record of a shard on a node, which says that this group has it; `applied` is how far that group's replica there
    /// has applied.
    pub fn holds(&mut self, id: ShardId, group: GroupId, record: &pb::ShardRecord, by: &str, applied: u64) -> Verdict {
        let tail = Sequence::new(record.tail);
        let begun = record.origin.map_or(0, |origin| origin.move_id);
        let wrong = |why: String| Err(broken(NAME, format!("{by} has {id} with {group}: {why}")));
        let known = self.shards.get(&id).and_then(|shard| shard.terms.get(&begun)).cloned();
        let Some(term) = known.filter(|term| term.group == group) else {
            return wrong(format!("it did not come there by move {begun}"));
        };
        if begun > 0 {
            let seal = *self.seal(id, begun, &by)?;
            if seal.tail.is_some_and(|at| tail < at) {
                return wrong(format!("it ends at {tail}, its seal said {:?}", seal.tail));
            }
        }
        match (record.seal, term.until) {
            (Some(seal), _) => {
                let from = self.seal(id, seal.move_id, &by)?.from;
                if from != group {
                    return wrong(format!("move {} took it from {from}", seal.move_id));
                }
                self.rests_at(id, seal.move_id, tail, &by)
            }
            (None, Some(sealed)) if applied >= sealed => wrong(format!("it is open, after its seal #{sealed}")),
            (None, _) => Ok(()),
        }
    }

    /// A message was acknowledged as this entry of a group.
    pub fn acked(&self, id: ShardId, group: GroupId, index: u64) -> Verdict {
        let terms = self.shards.get(&id).into_iter().flat_map(|shard| shard.terms.values());
        let open = |term: &&Term| {
            term.group == group
                && term.from < index
                && term.until.is_none_or(|until| index < until)
                && !term.shut.iter().any(|(from, to)| (from..=to).contains(&&index))
        };
        if terms.clone().any(|term| open(&term)) {
            return Ok(());
        }
        let terms: Vec<&Term> = terms.collect();
        Err(broken(
            NAME,
            format!("{group} has taken a message for {id} as #{index}; it was open {terms:?}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: GroupId = GroupId::new(7);
    const B: GroupId = GroupId::new(8);
    const SHARD: ShardId = ShardId::new(73);
    const BY: ReplicaId = ReplicaId::new(701);

    /// A history told step by step, where every replica has applied everything.
    #[derive(Default)]
    struct Told(SealBeforeAdopt);

    impl Told {
        fn entry(&mut self, group: GroupId, index: u64, op: Op) -> Verdict {
            let command = pb::GroupCommand {
                feature_level: 1,
                op: Some(op),
            };
            self.0.applied(group, index, &command, BY, |_| u64::MAX)
        }

        fn created() -> Self {
            let mut told = Self::default();
            let create = pb::CreateShard {
                shard_id: SHARD.get(),
                config: None,
            };
            assert_eq!(told.entry(A, 2, Op::CreateShard(create)), Ok(()));
            told
        }

        /// Created in the one group, sealed there at #10 with the tail 5.
        fn sealed() -> Self {
            let mut told = Self::created();
            assert_eq!(told.entry(A, 10, seal(B, 1)), Ok(()));
            let (tail, acked) = (Sequence::new(5), Sequence::new(4));
            assert_eq!(told.0.sealed(SHARD, 1, tail, acked), Ok(()));
            told
        }

        /// And adopted by the other at #20.
        fn adopted() -> Self {
            let mut told = Self::sealed();
            assert_eq!(told.entry(B, 20, adopt(A, 1, 10, 5)), Ok(()));
            told
        }
    }

    fn seal(to: GroupId, move_id: u64) -> Op {
        Op::SealShard(pb::SealShard {
            shard_id: SHARD.get(),
            to_group: to.get(),
            move_id,
        })
    }

    fn adopt(from: GroupId, move_id: u64, index: u64, tail: u64) -> Op {
        Op::AdoptShard(pb::AdoptShard {
            shard_id: SHARD.get(),
            from_group: from.get(),
            move_id,
            seal: Some(pb::Seal { index, tail, digest: 0 }),
        })
    }

    fn record(tail: u64, origin: Option<u64>, sealed: Option<u64>) -> pb::ShardRecord {
        pb::ShardRecord {
            tail,
            origin: origin.map(|move_id| pb::ShardOrigin {
                from_group: A.get(),
                move_id,
            }),
            seal: sealed.map(|move_id| pb::ShardSeal {
                to_group: B.get(),
                move_id,
            }),
            ..pb::ShardRecord::default()
        }
    }

    #[test]
    fn a_shard_goes_there_and_back() {
        let mut told = Told::adopted();
        assert_eq!(told.entry(B, 21, adopt(A, 1, 12, 5)), Ok(()), "again");
        assert_eq!(told.0.acked(SHARD, A, 9), Ok(()));
        assert_eq!(told.0.acked(SHARD, B, 22), Ok(()));
        assert_eq!(told.entry(B, 30, seal(A, 2)), Ok(()));
        assert_eq!(told.entry(A, 40, adopt(B, 2, 30, 9)), Ok(()));
        assert_eq!(told.0.acked(SHARD, A, 41), Ok(()));
        assert_eq!(told.0.holds(SHARD, A, &record(9, Some(2), None), "n", 40), Ok(()));
    }

    #[test]
    fn what_a_group_takes_after_its_seal_is_told() {
        let mut told = Told::adopted();
        assert!(told.0.acked(SHARD, A, 11).is_err(), "after the seal");
        assert!(told.0.acked(SHARD, B, 19).is_err(), "before the adoption");
        assert!(
            told.0.holds(SHARD, A, &record(6, None, Some(1)), "n", 11).is_err(),
            "it grew"
        );
        assert!(
            told.0.holds(SHARD, A, &record(5, None, None), "n", 11).is_err(),
            "it is open"
        );
        assert_eq!(
            told.0.holds(SHARD, A, &record(4, None, None), "n", 9),
            Ok(()),
            "not yet sealed"
        );
    }

    #[test]
    fn an_adoption_without_its_seal_is_told() {
        assert!(Told::created().entry(B, 20, adopt(A, 1, 10, 5)).is_err(), "no seal");
        assert!(Told::sealed().entry(B, 20, adopt(A, 1, 10, 6)).is_err(), "another tail");
        assert!(
            Told::sealed().entry(B, 20, adopt(A, 1, 9, 5)).is_err(),
            "before the seal"
        );
        assert!(Told::sealed().entry(B, 20, adopt(A, 2, 10, 5)).is_err(), "another move");
        assert!(
            Told::sealed().entry(A, 20, adopt(A, 1, 10, 5)).is_err(),
            "another group"
        );
        let command = pb::GroupCommand {
            feature_level: 1,
            op: Some(adopt(A, 1, 10, 5)),
        };
        let early = Told::sealed().0.applied(B, 20, &command, BY, |_| 9);
        assert!(early.is_err(), "this node has not applied the seal");
    }

    #[test]
    fn a_move_that_was_given_up_is_none() {
        let unsealed = || {
            let mut told = Told::sealed();
            let unseal = pb::UnsealShard {
                shard_id: SHARD.get(),
                move_id: 1,
            };
            assert_eq!(told.entry(A, 15, Op::UnsealShard(unseal)), Ok(()));
            told
        };
        let mut told = unsealed();
        assert!(told.0.acked(SHARD, A, 12).is_err(), "between the seal and its end");
        assert_eq!(told.0.acked(SHARD, A, 16), Ok(()));
        assert_eq!(
            told.0.holds(SHARD, A, &record(5, None, Some(1)), "n", 12),
            Ok(()),
            "behind"
        );
        assert_eq!(told.0.holds(SHARD, A, &record(7, None, None), "n", 18), Ok(()));
        assert_eq!(told.entry(A, 19, seal(B, 1)), Ok(()), "it comes late");
        assert_eq!(told.0.acked(SHARD, A, 20), Ok(()), "and is of no effect");
        assert!(unsealed().entry(B, 20, adopt(A, 1, 10, 5)).is_err(), "given up");
        let late = pb::UnsealShard {
            shard_id: SHARD.get(),
            move_id: 1,
        };
        assert!(Told::adopted().entry(A, 30, Op::UnsealShard(late)).is_err(), "adopted");
        assert_eq!(told.entry(A, 21, seal(B, 2)), Ok(()));
        assert_eq!(told.entry(B, 22, adopt(A, 2, 21, 8)), Ok(()), "another move");
    }

    #[test]
    fn what_was_lost_on_the_way_is_told() {
        let mut told = Told::created();
        assert_eq!(told.entry(A, 10, seal(B, 1)), Ok(()));
        let acked = Sequence::new(6);
        assert!(
            told.0.sealed(SHARD, 1, Sequence::new(5), acked).is_err(),
            "acknowledged"
        );
        let mut told = Told::adopted();
        let short = record(4, Some(1), None);
        assert!(told.0.holds(SHARD, B, &short, "n", 20).is_err(), "it is shorter");
        let unknown = record(5, Some(3), None);
        assert!(told.0.holds(SHARD, B, &unknown, "n", 20).is_err(), "it never came");
    }
}
