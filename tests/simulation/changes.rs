//! Members that come and go, and leaders that hand over: what a group's catalog would ask for, step by step, whoever leads
//! meanwhile.

use std::collections::BTreeSet;

use mainstem::model::{GroupId, ReplicaId};
use mainstem::raft::{Members, Origin};

use super::ask::{Ask, Told};
use super::invariants::Verdict;
use super::net::{MS, NodeNo};
use super::node::{Wanted, replica};
use super::world::{Asker, Due, World};

/// A replica on its way into a group, and one on its way out.
#[derive(Debug, Clone, Copy)]
pub struct Swap {
    pub new: ReplicaId,
    pub old: ReplicaId,
}

/// One that lacks no more than this has nearly everything.
const LAG_MAX: u64 = 50;

impl World {
    /// The next step of each group, and when to look again.
    pub fn change(&mut self) -> Verdict {
        let next = self.now + self.rng.range(50, 400) * MS;
        self.at(next, Due::Change);
        for (group, _) in self.scene.groups.clone() {
            self.change_of(group)?;
        }
        for (old, (group, no)) in self.former.clone() {
            self.leave(group, old, no)?;
        }
        Ok(())
    }

    /// A node hears, sooner or later, that its replica was removed, and removes what that has left.
    fn leave(&mut self, group: GroupId, old: ReplicaId, no: NodeNo) -> Verdict {
        if self.nodes[no - 1].run.is_none() || self.is_clearing(old) || !(self.quiet || self.rng.one_in(4)) {
            return Ok(());
        }
        self.node(no).wanted.retain(|w| w.replica != old);
        self.note(format_args!("n{no} removes what {old} has left"));
        self.clear_out(no, group, old)
    }

    /// The node has removed it. Once in a while it believes later, from an old copy of the catalog, that it has it still.
    pub fn emptied(&mut self, old: ReplicaId, told: &Told) {
        self.note(format_args!("{old} is removed: {told:?}"));
        let Some((group, no)) = self.former.get(&old).copied().filter(|_| *told == Told::Done) else {
            return;
        };
        self.former.remove(&old);
        self.invariants.one_owner.emptied(old);
        if self.rng.one_in(2) {
            let gone = Wanted {
                group,
                replica: old,
                origin: Origin::Join,
                gone: true,
            };
            self.node(no).wanted.insert(0, gone);
        }
    }

    fn change_of(&mut self, group: GroupId) -> Verdict {
        let Some(leader_no) = self.leader(group) else {
            return Ok(());
        };
        let Some(leader) = self.nodes[leader_no - 1].group(group) else {
            return Ok(());
        };
        let members = leader.members();
        if !members.committed || self.now < self.busy.get(&group).copied().unwrap_or(0) {
            return Ok(());
        }
        let swap = match self.swaps.get(&group).copied() {
            // The leader that began it has ended.
            Some(swap) if members.joint => {
                let wanted = members.voters.iter().copied().filter(|r| *r != swap.old).collect();
                return self.ask_change(leader_no, group, Ask::Change(wanted));
            }
            Some(swap) if members.voters.contains(&swap.new) && !members.contains(swap.old) => {
                self.swaps.remove(&group);
                self.given_up(group, swap.old);
                return Ok(());
            }
            Some(swap) => swap,
            None if self.quiet => return Ok(()),
            None => return self.begin_change(group, leader_no, leader.replica, &members),
        };
        let report = leader.report();
        let lag = report.replicas.iter().find(|r| r.replica == swap.new).map(|r| r.lag);
        let ask = if !members.contains(swap.new) {
            Ask::AddLearner(swap.new)
        } else if members.voters.contains(&swap.new) {
            // It is there; the old one went before.
            return Ok(());
        } else if lag.is_some_and(|lag| lag <= LAG_MAX) {
            let heir = members.voters.iter().find(|r| **r != swap.old).copied();
            match heir {
                Some(heir) if leader.replica == swap.old && !self.rng.one_in(4) => Ask::HandOver(heir),
                _ => {
                    let wanted: BTreeSet<ReplicaId> = members
                        .voters
                        .iter()
                        .copied()
                        .filter(|r| *r != swap.old)
                        .chain([swap.new])
                        .collect();
                    Ask::Change(wanted)
                }
            }
        } else {
            return Ok(());
        };
        self.ask_change(leader_no, group, ask)
    }

    fn ask_change(&mut self, no: NodeNo, group: GroupId, ask: Ask) -> Verdict {
        let what = format!("{group} {ask:?}");
        self.note(format_args!("n{no} is asked: {what}"));
        // So that it is not asked again at once.
        self.busy.insert(group, self.now + 500 * MS);
        self.ask(no, group, ask, Asker::Change(what)).map(drop)
    }

    fn begin_change(&mut self, group: GroupId, leader_no: NodeNo, leader: ReplicaId, members: &Members) -> Verdict {
        let voters: Vec<ReplicaId> = members.voters.iter().copied().collect();
        if self.rng.one_in(3) {
            let to = *self.rng.pick(&voters);
            if to != leader {
                return self.ask_change(leader_no, group, Ask::HandOver(to));
            }
            return Ok(());
        }
        // Where shards are on their way nothing else changes.
        if self.catalog.moves(group) {
            return Ok(());
        }
        // A node gets another replica of a group once the former one's data is gone.
        let has = |no: NodeNo| self.nodes[no - 1].wanted.iter().any(|w| w.group == group && !w.gone);
        let had = |no: NodeNo| self.former.values().any(|left| *left == (group, no));
        let free: Vec<NodeNo> = (1..=self.scene.nodes).filter(|no| !has(*no) && !had(*no)).collect();
        if free.is_empty() || !self.rng.one_in(6) {
            return Ok(());
        }
        let (mut no, mut old) = (*self.rng.pick(&free), *self.rng.pick(&voters));
        if self.scene.moves && !self.rng.one_in(4) {
            // To where another group is, if that is elsewhere: only there can shards go.
            let others = self.scene.groups.iter().map(|(other, _)| *other);
            let other = others
                .filter(|other| *other != group)
                .flat_map(|other| self.nodes_of(other));
            let other: BTreeSet<NodeNo> = other.collect();
            let apart = |r: &&ReplicaId| self.places.get(*r).is_some_and(|at| !other.contains(at));
            match (free.iter().find(|no| other.contains(no)), voters.iter().find(apart)) {
                (Some(to), Some(from)) => (no, old) = (*to, *from),
                _ => return Ok(()),
            }
        }
        self.given += 1;
        let new = replica(group, 10 + self.given);
        self.place(new, no);
        let wanted = Wanted {
            group,
            replica: new,
            origin: Origin::Join,
            gone: false,
        };
        self.note(format_args!("{group}: {new} on n{no} is to come, {old} to go"));
        let floor = self.catalog.floor(group);
        let node = self.node(no);
        node.wanted.push(wanted.clone());
        node.start_replica(wanted, floor);
        self.swaps.insert(group, Swap { new, old });
        self.slice(no)
    }

    /// A replica has left its group.
    fn given_up(&mut self, group: GroupId, old: ReplicaId) {
        self.note(format_args!("{group}: {old} has gone"));
        if let Some(no) = self.places.get(&old).copied() {
            self.former.insert(old, (group, no));
        }
    }
}
