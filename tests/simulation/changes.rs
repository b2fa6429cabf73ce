//! Members that come and go, and leaders that hand over: what a group's catalog would ask for, step by step, whoever leads
//! meanwhile.

use std::collections::BTreeSet;

use mainstem::model::{GroupId, ReplicaId};
use mainstem::raft::{Members, Origin};

use super::ask::Ask;
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
        Ok(())
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
        // A node never gets a second replica of a group.
        let free: Vec<NodeNo> = (1..=self.scene.nodes)
            .filter(|no| !self.nodes[no - 1].wanted.iter().any(|w| w.group == group))
            .filter(|no| !self.former.contains(&(group, *no)))
            .collect();
        if free.is_empty() || !self.rng.one_in(6) {
            return Ok(());
        }
        let (no, old) = (*self.rng.pick(&free), *self.rng.pick(&voters));
        let new = replica(group, no);
        self.place(new, no);
        let wanted = Wanted {
            group,
            replica: new,
            origin: Origin::Join,
        };
        self.note(format_args!("{group}: {new} on n{no} is to come, {old} to go"));
        let node = self.node(no);
        node.wanted.push(wanted.clone());
        node.start_replica(wanted);
        self.swaps.insert(group, Swap { new, old });
        self.slice(no)
    }

    /// A replica has left its group. Its node learns of that, or starts it again and again.
    fn given_up(&mut self, group: GroupId, old: ReplicaId) {
        self.note(format_args!("{group}: {old} has gone"));
        if let Some(no) = self.places.get(&old).copied() {
            self.former.insert((group, no));
            if self.rng.one_in(2) {
                self.node(no).wanted.retain(|w| w.replica != old);
            }
        }
    }
}
