//! Shards that go from one group to another and back: what the catalog would hold, and what the leaders of the groups would
//! propose for it (`control/executor/moves`), whoever leads meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use mainstem::machine::GroupOutcome;
use mainstem::model::{GroupId, LogIndex, ShardId};
use mainstem::raft::Applied;
use mainstem::wire::internal as pb;
use pb::group_command::Op;

use super::ask::{Ask, Told};
use super::invariants::{Verdict, broken};
use super::load::command;
use super::net::{MS, NodeNo};
use super::world::{Asker, Due, World};

/// What the catalog would hold of shards and their moves.
#[derive(Debug, Default)]
pub struct Catalog {
    pub owners: BTreeMap<ShardId, GroupId>,
    pub moving: BTreeMap<ShardId, Moving>,
    /// No replica of a group begins with entries up to here.
    pub floors: BTreeMap<GroupId, LogIndex>,
    /// How many there were.
    pub adoptions: u64,
    /// Moves whose first adoption in the log was answered.
    pub first_adoptions: BTreeSet<(ShardId, u64)>,
    /// Moves that were given up: leaders that do not know may still ask for them.
    given_up: Vec<(ShardId, Moving)>,
    last_move: u64,
}

#[derive(Debug, Clone, Copy)]
pub struct Moving {
    pub id: u64,
    pub from: GroupId,
    pub to: GroupId,
    pub step: Step,
    /// Until when nothing is asked.
    busy: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    Planned,
    /// Sealed; nodes of this set (bit by number) have not said that they have applied it and flushed that.
    Told {
        seal: pb::Seal,
        lacks: u64,
        until: u64,
    },
    /// It is decided that the shard stays.
    GivenUp,
    /// It is decided that it goes.
    Sealed(pb::Seal),
    Adopted(pb::Seal),
}

impl Catalog {
    /// The floor of a group.
    pub fn floor(&self, group: GroupId) -> LogIndex {
        self.floors.get(&group).copied().unwrap_or_default()
    }

    fn raise(&mut self, group: GroupId, to: u64) {
        let floor = self.floors.entry(group).or_default();
        *floor = (*floor).max(LogIndex::new(to));
    }

    /// Whether a shard is on its way from or to the group: its members stay as they are.
    pub fn moves(&self, group: GroupId) -> bool {
        self.moving.values().any(|m| m.from == group || m.to == group)
    }
}

fn seal(shard: ShardId, moving: &Moving) -> Ask {
    Ask::Propose(command(Op::SealShard(pb::SealShard {
        shard_id: shard.get(),
        to_group: moving.to.get(),
        move_id: moving.id,
    })))
}

fn unseal(shard: ShardId, moving: &Moving) -> Ask {
    Ask::Propose(command(Op::UnsealShard(pb::UnsealShard {
        shard_id: shard.get(),
        move_id: moving.id,
    })))
}

fn adopt(shard: ShardId, moving: &Moving, seal: pb::Seal) -> Ask {
    Ask::Propose(command(Op::AdoptShard(pb::AdoptShard {
        shard_id: shard.get(),
        from_group: moving.from.get(),
        move_id: moving.id,
        seal: Some(seal),
    })))
}

impl World {
    /// The next step of each shard, and when to look again.
    pub fn move_shards(&mut self) -> Verdict {
        let next = self.now + self.rng.range(20, 300) * MS;
        self.at(next, Due::Move);
        // Each node hears of the catalog in its own time.
        for no in 1..=self.scene.nodes {
            if self.rng.one_in(2) {
                self.tell_floors(no);
            }
        }
        for shard in self.made.clone() {
            match self.catalog.moving.get(&shard).copied() {
                None => self.begin_move(shard),
                Some(moving) => self.go_on(shard, moving)?,
            }
        }
        self.ask_late()
    }

    /// A leader whose copy of the catalog is behind seals for a move that was given up long ago.
    fn ask_late(&mut self) -> Verdict {
        if self.catalog.given_up.is_empty() || !self.rng.one_in(10) {
            return Ok(());
        }
        let (shard, moving) = *self.rng.pick(&self.catalog.given_up);
        let Some(no) = self.leader(moving.from) else {
            return Ok(());
        };
        self.note(format_args!("n{no} is asked late: {shard} move {}", moving.id));
        self.ask(no, moving.from, seal(shard, &moving), Asker::LateSeal(shard, moving.id))
            .map(drop)
    }

    /// It must be of no effect.
    pub fn late_told(&mut self, shard: ShardId, move_id: u64, told: &Told) -> Verdict {
        if let Told::Applied(index, _, Applied::Command(outcome)) = told
            && matches!(outcome, GroupOutcome::Sealed { .. } | GroupOutcome::Adopted { .. })
            && self.catalog.moving.get(&shard).is_none_or(|m| m.id != move_id)
        {
            let what = format!("{shard} move {move_id}, which was given up, #{index}: {outcome:?}");
            return Err(broken("a seal that comes late is of no effect", what));
        }
        Ok(())
    }

    /// A node has said whether it has applied and flushed the seal.
    pub fn flush_told(&mut self, shard: ShardId, move_id: u64, no: NodeNo, told: &Told) {
        if let Some(moving) = self.catalog.moving.get_mut(&shard).filter(|m| m.id == move_id)
            && let Step::Told { lacks, .. } = &mut moving.step
            && *told == Told::Done
        {
            *lacks &= !(1 << no);
        }
    }

    /// Decides whether the shard goes: when every node has its seal.
    fn decide(&mut self, shard: ShardId, moving: Moving, seal: pb::Seal, lacks: u64, until: u64) -> Verdict {
        let step = match lacks {
            0 => {
                self.catalog.raise(moving.from, seal.index);
                Step::Sealed(seal)
            }
            _ if self.now >= until => Step::GivenUp,
            _ => {
                for no in (1..=self.scene.nodes).filter(|no| lacks & (1 << no) != 0) {
                    let ask = Ask::Flush(LogIndex::new(seal.index));
                    self.ask(no, moving.from, ask, Asker::Flush(shard, moving.id, no))?;
                }
                return Ok(());
            }
        };
        self.note(format_args!("{shard} move {}: {step:?}", moving.id));
        self.catalog.moving.insert(shard, Moving { step, ..moving });
        Ok(())
    }

    fn tell_floors(&self, no: NodeNo) {
        let Some(run) = &self.nodes[no - 1].run else { return };
        for group in run.groups.all() {
            group.set_floor(self.catalog.floor(group.id));
        }
    }

    /// The nodes that shall run a replica of a group.
    pub fn nodes_of(&self, group: GroupId) -> BTreeSet<NodeNo> {
        let has = |no: &NodeNo| self.nodes[no - 1].wanted.iter().any(|w| w.group == group && !w.gone);
        (1..=self.scene.nodes).filter(has).collect()
    }

    fn begin_move(&mut self, shard: ShardId) {
        if self.quiet || !self.rng.one_in(5) {
            return;
        }
        let from = self.catalog.owners.get(&shard).copied();
        let Some(from) = from.filter(|from| !self.swaps.contains_key(from)) else {
            return;
        };
        let heirs: Vec<GroupId> = (self.scene.groups.iter().map(|(group, _)| *group))
            .filter(|to| *to != from && !self.swaps.contains_key(to))
            .filter(|to| self.nodes_of(*to) == self.nodes_of(from))
            // As the catalog has it: a group gives shards away or takes some.
            .filter(|to| !(self.catalog.moving.values()).any(|m| m.to == from || m.from == *to))
            .collect();
        if heirs.is_empty() {
            return;
        }
        self.catalog.last_move += 1;
        let moving = Moving {
            id: self.catalog.last_move,
            from,
            to: *self.rng.pick(&heirs),
            step: Step::Planned,
            busy: 0,
        };
        self.note(format_args!(
            "{shard} is to go from {from} to {}, move {}",
            moving.to, moving.id
        ));
        self.catalog.moving.insert(shard, moving);
    }

    fn go_on(&mut self, shard: ShardId, moving: Moving) -> Verdict {
        let (by, ask) = match moving.step {
            Step::Planned => {
                let Some(no) = self.leader(moving.from) else {
                    return Ok(());
                };
                // From the seal on it takes nothing: the heir must be there.
                let heir = self.nodes[no - 1].group(moving.to);
                if heir.is_none_or(|heir| heir.status().leader.is_none()) {
                    return Ok(());
                }
                (moving.from, seal(shard, &moving))
            }
            Step::Told { seal, lacks, until } => return self.decide(shard, moving, seal, lacks, until),
            // A leader whose copy of the catalog is behind seals once more.
            Step::GivenUp if self.rng.one_in(3) => (moving.from, seal(shard, &moving)),
            Step::GivenUp => (moving.from, unseal(shard, &moving)),
            Step::Sealed(sealed) => (moving.to, adopt(shard, &moving, sealed)),
            Step::Adopted(sealed) => {
                if self.reaches_back(moving.from) || self.reaches_back(moving.to) {
                    // A leader whose copy of the catalog is behind does it again.
                    if self.now >= moving.busy && self.rng.one_in(4) {
                        let ask = adopt(shard, &moving, sealed);
                        self.ask_move(shard, moving, moving.to, ask)?;
                    }
                    return Ok(());
                }
                self.note(format_args!("{shard}: move {} is over", moving.id));
                self.catalog.moving.remove(&shard);
                return Ok(());
            }
        };
        if self.now < moving.busy {
            return Ok(());
        }
        self.ask_move(shard, moving, by, ask)
    }

    fn ask_move(&mut self, shard: ShardId, moving: Moving, by: GroupId, ask: Ask) -> Verdict {
        let Some(no) = self.leader(by) else { return Ok(()) };
        // Shorter than an answer may take: some is asked again by the next leader while the last one's is on its way.
        let busy = self.now + self.rng.range(100, 1_500) * MS;
        if let Some(known) = self.catalog.moving.get_mut(&shard) {
            known.busy = busy;
        }
        self.note(format_args!(
            "n{no} is asked: {shard} move {}, {:?}",
            moving.id, moving.step
        ));
        self.ask(no, by, ask, Asker::Move(shard, moving.id)).map(drop)
    }

    /// Whether a running replica of the group still has its last seal or adoption in its log.
    fn reaches_back(&self, group: GroupId) -> bool {
        let floor = self.catalog.floor(group).get();
        let replicas = self.nodes.iter().filter_map(|node| node.group(group));
        let mut purged = replicas.map(|replica| replica.log().purged().map_or(0, |id| id.index));
        purged.any(|purged| purged < floor)
    }

    /// A seal or an adoption was answered.
    pub fn move_told(&mut self, shard: ShardId, move_id: u64, told: &Told) -> Verdict {
        let Told::Applied(index, _, applied) = told else {
            self.note(format_args!("{shard} move {move_id}: {told:?}"));
            return Ok(());
        };
        self.note(format_args!("{shard} move {move_id}: #{index} {applied:?}"));
        let Some(moving) = self.catalog.moving.get(&shard).copied().filter(|m| m.id == move_id) else {
            return Ok(());
        };
        let step = match (moving.step, applied) {
            (step, Applied::Command(GroupOutcome::Sealed { tail, digest, .. })) => {
                let sealed = pb::Seal {
                    index: *index,
                    tail: tail.get(),
                    digest: *digest,
                };
                let acked = self.invariants.acked_stays.tail(shard);
                if step == Step::Planned {
                    self.invariants.seal_before_adopt.sealed(shard, move_id, *tail, acked)?;
                    let nodes = self.nodes_of(moving.from);
                    Step::Told {
                        seal: sealed,
                        lacks: nodes.iter().map(|no| 1u64 << no).sum(),
                        until: self.now + self.rng.range(200, 2_000) * MS,
                    }
                } else {
                    let (Step::Told { seal: first, .. } | Step::Sealed(first) | Step::Adopted(first)) = step else {
                        return Ok(());
                    };
                    if (first.tail, first.digest) != (sealed.tail, sealed.digest) {
                        let what = format!("{shard} move {move_id}: {first:?} and {sealed:?}");
                        return Err(broken("a seal is said twice the same", what));
                    }
                    return Ok(());
                }
            }
            (Step::GivenUp, Applied::Command(GroupOutcome::Unsealed)) => {
                self.note(format_args!("{shard}: move {move_id} is over, it stays"));
                self.catalog.given_up.push((shard, moving));
                self.catalog.moving.remove(&shard);
                return Ok(());
            }
            (Step::Sealed(sealed), Applied::Command(GroupOutcome::Adopted { tail, existed })) => {
                if tail.get() < sealed.tail || (!existed && tail.get() != sealed.tail) {
                    let what = format!("{shard} move {move_id}: {sealed:?}, adopted at {tail}");
                    return Err(broken("a shard is adopted where it was sealed", what));
                }
                self.catalog.raise(moving.to, *index);
                self.catalog.owners.insert(shard, moving.to);
                self.catalog.adoptions += 1;
                if !existed {
                    self.catalog.first_adoptions.insert((shard, move_id));
                }
                Step::Adopted(sealed)
            }
            (Step::Adopted(_), Applied::Command(GroupOutcome::Adopted { existed: true, .. })) => return Ok(()),
            // The first one in the log may be the last that is answered: by a node that does not lead any more.
            (Step::Adopted(sealed), Applied::Command(GroupOutcome::Adopted { tail, existed: false })) => {
                let is_first = self.catalog.first_adoptions.insert((shard, move_id));
                if !is_first || tail.get() != sealed.tail {
                    let what = format!("{shard} move {move_id}: {sealed:?}, adopted anew at {tail}");
                    return Err(broken("a shard is adopted once, where it was sealed", what));
                }
                return Ok(());
            }
            (step, applied) => {
                let what = format!("{shard} move {move_id}, {step:?}: {applied:?}");
                return Err(broken("a step of a move is answered", what));
            }
        };
        self.catalog.moving.insert(shard, Moving { step, ..moving });
        Ok(())
    }
}
