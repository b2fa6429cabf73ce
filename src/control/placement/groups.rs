//! What each group needs: lost replicas replaced, more or fewer of them, nodes drained, the placement kept.

use std::collections::BTreeMap;

use super::{Planner, Request, Step, place};
use crate::machine::placement::{GroupShape, ReplicaShape};
use crate::model::{NodeId, ReplicaId};
use crate::wire::internal::v1::{ChangeReason, NodeState};

/// What a voter should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fate {
    Stays,
    /// On a node that the placement does not allow.
    Misplaced,
    /// On a node that is drained.
    Drained,
    /// On a node that is gone, or damaged.
    Lost,
}

/// How a group stands.
pub(super) struct Standing<'a> {
    pub group: &'a GroupShape,
    /// Voters in the order of their making.
    pub voters: Vec<(&'a ReplicaShape, Fate)>,
    pub live: usize,
    pub leader: Option<ReplicaId>,
}

impl Standing<'_> {
    fn count(&self, fate: Fate) -> usize {
        self.voters.iter().filter(|(_, found)| *found == fate).count()
    }

    fn ids(&self, fate: Fate) -> Vec<ReplicaId> {
        let with = self.voters.iter().filter(|(_, found)| *found == fate);
        with.map(|(replica, _)| replica.id).collect()
    }

    /// Why nothing can be changed now.
    pub fn obstacle(&self) -> Option<String> {
        let needed = self.voters.len() / 2 + 1;
        if !self.group.formed {
            Some("the group is not formed yet".into())
        } else if self.live < needed {
            Some(format!("no quorum: {} live voters of the {needed} needed", self.live))
        } else if self.leader.is_none() {
            Some("the group has no leader".into())
        } else {
            None
        }
    }
}

impl Planner<'_> {
    pub(super) fn standing<'g>(&self, group: &'g GroupShape) -> Standing<'g> {
        let mut live = 0;
        let voters = group
            .voters()
            .map(|replica| {
                let damaged = self.reports.is_damaged(replica.node, replica.id);
                live += usize::from(self.is_live(replica.node) && !damaged);
                let lost = damaged || self.gone.contains(&replica.node);
                let fate = match self.nodes.get(&replica.node).filter(|_| !lost) {
                    None => Fate::Lost,
                    Some(node) if node.state == NodeState::Draining => Fate::Drained,
                    Some(node) if node.allowed_by(group.placement.as_ref()).is_err() => Fate::Misplaced,
                    Some(_) => Fate::Stays,
                };
                (replica, fate)
            })
            .collect();
        let leader = self.reports.groups.get(&group.id).map(|report| report.leader);
        Standing {
            group,
            voters,
            live,
            leader: leader.filter(|leader| group.voters().any(|replica| replica.id == *leader)),
        }
    }

    pub(super) fn plan_groups(&mut self) {
        let view = self.view;
        for group in view.groups.values() {
            self.check_change(group);
        }
        // All that is lost first, whatever the group's number: the slots of the nodes are few.
        let passes: [fn(&mut Self, &Standing<'_>) -> bool; 3] = [Self::heal, Self::scale, Self::relocate];
        for pass in passes {
            for group in view.groups.values() {
                if self.is_taken(group.id) {
                    continue;
                }
                let standing = self.standing(group);
                let before = self.actions.len();
                if pass(self, &standing) {
                    let ready = self.actions[before..].iter().any(|action| action.blocked.is_none());
                    match ready {
                        true => self.busy.insert(group.id),
                        false => self.held.insert(group.id),
                    };
                }
            }
        }
    }

    /// A change whose new replicas can never come is given up.
    fn check_change(&mut self, group: &GroupShape) {
        let Some(change) = &group.change else { return };
        let hopeless = change.add.iter().filter_map(|id| group.replica(*id)).find(|replica| {
            let lost = self.gone.contains(&replica.node) || self.reports.is_damaged(replica.node, replica.id);
            lost || self.state(replica.node) != NodeState::Active
        });
        let Some(replica) = hopeless else { return };
        let why = format!("{} cannot take {} any more", self.name(replica.node), replica.id);
        if change.ready {
            // Every learner had caught up: the leader is at it, and what becomes of it is seen afterwards.
            let group = group.id;
            self.blocked(Step::Hold { group }, why, "the joint change may be under way".into());
            return;
        }
        let step = Step::AbortChange {
            group: group.id,
            epoch: group.epoch,
            why: why.clone(),
        };
        self.act(step, why);
    }

    /// Replaces what is lost. True: the group is taken care of.
    fn heal(&mut self, standing: &Standing<'_>) -> bool {
        if standing.count(Fate::Lost) == 0 {
            return false;
        }
        let group = standing.group;
        let wanted = group.wanted as usize;
        let mut lost: Vec<&ReplicaShape> = Vec::new();
        for (replica, fate) in &standing.voters {
            if *fate == Fate::Lost {
                lost.push(replica);
            }
        }
        let remain = standing.voters.len() - lost.len();
        let names: Vec<String> = lost
            .iter()
            .map(|r| format!("{} on {}", r.id, self.name(r.node)))
            .collect();
        let why = format!("{} lost: {}", lost.len(), names.join(", "));
        let needed = wanted.saturating_sub(remain);
        let full = self.excluded(group);
        // A damaged replica's successor goes where it was, so that the spread stays.
        let mut add: Vec<NodeId> = lost
            .iter()
            .map(|replica| replica.node)
            .filter(|node| self.is_active(*node) && !full.contains_key(node))
            .filter(|node| self.nodes[node].allowed_by(group.placement.as_ref()).is_ok())
            .take(needed)
            .collect();
        let stay = standing.voters.iter().filter(|(_, fate)| *fate != Fate::Lost);
        let mut holding: Vec<NodeId> = stay.map(|(replica, _)| replica.node).collect();
        holding.extend(&add);
        let choice = place(
            &self.nodes,
            &Request {
                replicas: (needed - add.len()) as u32,
                holding,
                placement: group.placement.as_ref(),
                exclude: full,
            },
        );
        add.extend(&choice.nodes);
        // Never fewer voters before there are new ones: what has no successor stays, as a dead voter.
        let removable = match needed {
            0 => lost.len(),
            _ => add.len() + standing.voters.len().saturating_sub(wanted),
        };
        // Where a successor comes to the same node, its predecessor must go.
        lost.sort_by_key(|replica| !add.contains(&replica.node));
        let remove: Vec<ReplicaId> = lost.iter().take(removable).map(|replica| replica.id).collect();
        self.change(standing, add, remove, ChangeReason::Heal, why, choice.to_string())
    }

    /// More or fewer replicas. True: the group is taken care of.
    fn scale(&mut self, standing: &Standing<'_>) -> bool {
        let (now, wanted) = (standing.voters.len(), standing.group.wanted as usize);
        if now == 0 || wanted == 0 || now == wanted {
            return false;
        }
        let why = format!("{now} replicas, {wanted} wanted");
        if now < wanted {
            let choice = place(
                &self.nodes,
                &Request {
                    replicas: (wanted - now) as u32,
                    holding: standing.group.nodes_after().collect(),
                    placement: standing.group.placement.as_ref(),
                    exclude: self.excluded(standing.group),
                },
            );
            let text = choice.to_string();
            return self.change(standing, choice.nodes, Vec::new(), ChangeReason::Scale, why, text);
        }
        let remove = self.surplus(standing, now - wanted);
        self.change(standing, Vec::new(), remove, ChangeReason::Scale, why, String::new())
    }

    /// Which voters are missed least: those that should go anyway, cannot be reached, crowd a zone, or burden a node.
    fn surplus(&self, standing: &Standing<'_>, count: usize) -> Vec<ReplicaId> {
        let mut left: Vec<(&ReplicaShape, Fate)> = standing.voters.clone();
        let mut remove = Vec::new();
        for _ in 0..count {
            let mut in_zone: BTreeMap<&str, u32> = BTreeMap::new();
            for (replica, _) in &left {
                let zone = self.nodes.get(&replica.node).map_or("", |node| node.zone.as_str());
                *in_zone.entry(zone).or_default() += 1;
            }
            let worst = left.iter().enumerate().max_by_key(|(_, (replica, fate))| {
                let node = self.nodes.get(&replica.node);
                let zone = node.map_or("", |node| node.zone.as_str());
                (
                    *fate,
                    !self.is_live(replica.node),
                    in_zone.get(zone).copied(),
                    node.map(|node| node.replicas),
                    Some(replica.id) != standing.leader,
                    replica.id,
                )
            });
            let Some((at, _)) = worst else { break };
            remove.push(left.swap_remove(at).0.id);
        }
        remove
    }

    /// Away from drained nodes, and from those that the placement does not allow. True: the group is taken care of.
    fn relocate(&mut self, standing: &Standing<'_>) -> bool {
        let (fate, reason) = if standing.count(Fate::Drained) > 0 {
            (Fate::Drained, ChangeReason::Drain)
        } else if standing.count(Fate::Misplaced) > 0 {
            (Fate::Misplaced, ChangeReason::Move)
        } else {
            return false;
        };
        let going = standing.ids(fate);
        let names: Vec<String> = standing
            .voters
            .iter()
            .filter(|(_, found)| *found == fate)
            .map(|(replica, _)| self.name(replica.node))
            .collect();
        let why = match reason == ChangeReason::Drain {
            true => format!("{} is drained", names.join(", ")),
            false => format!("{} is not where its stream may be", names.join(", ")),
        };
        let full = self.full();
        // A slot of each node that gives one away, too.
        let free = standing
            .voters
            .iter()
            .filter(|(replica, found)| *found == fate && !full.contains_key(&replica.node))
            .count();
        if free == 0 {
            let blocked = "as many replicas are on their way from it as may be".to_string();
            self.hold(standing, why, blocked);
            return true;
        }
        let leaving: Vec<ReplicaId> = going
            .into_iter()
            .filter(|id| {
                let node = standing.group.replica(*id).map(|replica| replica.node);
                node.is_some_and(|node| !full.contains_key(&node))
            })
            .collect();
        let holding = standing
            .voters
            .iter()
            .filter(|(replica, _)| !leaving.contains(&replica.id))
            .map(|(replica, _)| replica.node)
            .collect();
        let mut exclude = self.excluded(standing.group);
        for id in &leaving {
            if let Some(replica) = standing.group.replica(*id) {
                exclude.insert(replica.node, "it gives its replica away".into());
            }
        }
        let choice = place(
            &self.nodes,
            &Request {
                replicas: leaving.len() as u32,
                holding,
                placement: standing.group.placement.as_ref(),
                exclude,
            },
        );
        let remove = leaving.into_iter().take(choice.nodes.len()).collect();
        let text = choice.to_string();
        self.change(standing, choice.nodes, remove, reason, why, text)
    }

    fn hold(&mut self, standing: &Standing<'_>, why: String, blocked: String) {
        let group = standing.group.id;
        self.blocked(Step::Hold { group }, why, blocked);
    }

    /// Decides a change, if it can be made now. A leader is not removed: it hands over first, or its successor comes first;
    /// but where it is the only voter, the change itself hands over. Always true: the group is taken care of.
    pub(super) fn change(
        &mut self,
        standing: &Standing<'_>,
        add: Vec<NodeId>,
        mut remove: Vec<ReplicaId>,
        reason: ChangeReason,
        why: String,
        choice: String,
    ) -> bool {
        if let Some(obstacle) = standing.obstacle() {
            self.hold(standing, why, obstacle);
            return true;
        }
        if let Some(leader) = standing.leader.filter(|leader| remove.contains(leader)) {
            // For balance alone no leader moves: that would be undone by the balance of leaders. Its successor comes first,
            // and the one too many goes afterwards.
            let successor = match reason == ChangeReason::Balance {
                true => None,
                false => self.any_successor(standing.group, leader, &remove),
            };
            match successor {
                Some(to) => {
                    let group = standing.group.id;
                    let from = leader;
                    self.move_leader(standing.group, from, to);
                    self.act(Step::TransferLeader { group, from, to }, why);
                    self.restless = true;
                    return true;
                }
                // It is the only one: the joint change makes its successor the leader at once. With both as voters for a while
                // the group would stand still if either of them went.
                None if standing.voters.len() == 1 && !add.is_empty() => {}
                None => remove.retain(|id| *id != leader),
            }
        }
        if add.is_empty() && remove.is_empty() {
            let blocked = match choice.is_empty() {
                true => "no other voter can lead".to_string(),
                false => format!("no node can take it:\n{choice}"),
            };
            self.hold(standing, why, blocked);
            return true;
        }
        // With those that are removed gone, the live ones must still be a majority.
        let removed_live = remove
            .iter()
            .filter_map(|id| standing.group.replica(*id))
            .filter(|replica| self.is_live(replica.node) && !self.reports.is_damaged(replica.node, replica.id))
            .count();
        let after = standing.voters.len() + add.len() - remove.len();
        let live_after = standing.live + add.len() - removed_live;
        if live_after < after / 2 + 1 {
            let blocked = format!("{live_after} of {after} voters would be live");
            self.hold(standing, why, blocked);
            return true;
        }
        for node in &add {
            *self.moving.entry(*node).or_default() += 1;
            if let Some(node) = self.nodes.get_mut(node) {
                node.replicas += 1;
            }
        }
        for replica in remove.iter().filter_map(|id| standing.group.replica(*id)) {
            *self.moving.entry(replica.node).or_default() += 1;
            if let Some(node) = self.nodes.get_mut(&replica.node) {
                node.replicas = node.replicas.saturating_sub(1);
            }
        }
        self.restless = true;
        let step = Step::ChangeReplicas {
            group: standing.group.id,
            epoch: standing.group.epoch,
            add,
            remove,
            reason,
            why: why.clone(),
        };
        self.act(step, why);
        true
    }
}
