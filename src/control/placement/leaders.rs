//! Who leads: away from drained nodes at once; else balanced to within one of each other, as far as the voters allow, and
//! left alone otherwise.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Planner, Step};
use crate::machine::placement::GroupShape;
use crate::model::{GroupId, NodeId, ReplicaId};

/// Hand-overs for balance in one plan.
const TRANSFERS_MAX: usize = 16;

/// A group, who leads it, who would.
type HandOver = (GroupId, ReplicaId, ReplicaId);
/// What could be handed over from one node to another.
type Edges = BTreeMap<NodeId, BTreeMap<NodeId, Vec<HandOver>>>;

impl Planner<'_> {
    /// The voter that should lead instead: live, current, on an active node, where the fewest lead.
    pub(super) fn successor(&self, group: &GroupShape, leader: ReplicaId, except: &[ReplicaId]) -> Option<ReplicaId> {
        self.heirs(group, leader)
            .filter(|(id, node)| !except.contains(id) && self.may_lead(*node))
            .min_by_key(|(id, node)| (self.nodes.get(node).map(|node| node.leaders), *id))
            .map(|(id, _)| id)
    }

    /// As [`Self::successor`], on a drained node if there is no other: for a leader that must go.
    pub(super) fn any_successor(
        &self,
        group: &GroupShape,
        leader: ReplicaId,
        except: &[ReplicaId],
    ) -> Option<ReplicaId> {
        let heir = || self.heirs(group, leader).find(|(id, _)| !except.contains(id));
        self.successor(group, leader, except).or_else(|| Some(heir()?.0))
    }

    /// Whether a node may be given something to lead.
    fn may_lead(&self, node: NodeId) -> bool {
        let stopping = self.reports.nodes.get(&node).is_some_and(|report| report.stopping);
        self.is_active(node) && !stopping
    }

    fn heirs(&self, group: &GroupShape, leader: ReplicaId) -> impl Iterator<Item = (ReplicaId, NodeId)> {
        let current = self.reports.groups.get(&group.id).map(|report| &report.current);
        group
            .voters()
            .filter(move |replica| replica.id != leader && current.is_some_and(|ids| ids.contains(&replica.id)))
            .filter(|replica| self.is_live(replica.node) && !self.reports.is_damaged(replica.node, replica.id))
            .map(|replica| (replica.id, replica.node))
    }

    /// Counts a hand-over.
    pub(super) fn move_leader(&mut self, group: &GroupShape, from: ReplicaId, to: ReplicaId) {
        let node_of = |id: ReplicaId| group.replica(id).map(|replica| replica.node);
        if let Some(node) = node_of(from).and_then(|id| self.nodes.get_mut(&id)) {
            node.leaders = node.leaders.saturating_sub(1);
        }
        if let Some(node) = node_of(to).and_then(|id| self.nodes.get_mut(&id)) {
            node.leaders += 1;
        }
    }

    fn leader_of(&self, group: &GroupShape) -> Option<(ReplicaId, NodeId)> {
        let leader = self.reports.groups.get(&group.id)?.leader;
        let replica = group.voters().find(|replica| replica.id == leader)?;
        Some((leader, replica.node))
    }

    pub(super) fn plan_leaders(&mut self) {
        self.lead_away();
        self.balance_leaders();
    }

    /// Leaders leave drained nodes before replicas do, whatever else the group is at.
    fn lead_away(&mut self) {
        let view = self.view;
        for group in view.groups.values() {
            let handed_over = |action: &super::Action| {
                matches!(action.step, Step::TransferLeader { .. }) && action.step.group() == Some(group.id)
            };
            let Some((from, node)) = self.leader_of(group) else {
                continue;
            };
            let joint = group.change.as_ref().is_some_and(|change| change.ready);
            if self.is_active(node) || !self.is_live(node) || joint || self.actions.iter().any(handed_over) {
                continue;
            }
            let Some(to) = self.successor(group, from, &[]) else {
                continue;
            };
            let why = format!("{} is drained", self.name(node));
            self.move_leader(group, from, to);
            let group = group.id;
            // A change that is only being planned waits for the next round.
            self.actions
                .retain(|action| action.step.group() != Some(group) || action.blocked.is_some());
            self.act(Step::TransferLeader { group, from, to }, why);
            self.busy.insert(group);
        }
    }

    /// A node with two more than another gives one away, if need be through nodes between them: each such path makes the
    /// sum of squares smaller, so it comes to an end.
    fn balance_leaders(&mut self) {
        let view = self.view;
        let mut edges = Edges::new();
        // What somebody has just done is not undone.
        let ordered = |group: &GroupShape| {
            let mut reports = self.reports.nodes.values();
            reports.any(|report| report.handed_over.contains(&group.id))
        };
        for group in view
            .groups
            .values()
            .filter(|group| !self.busy.contains(&group.id) && !ordered(group))
        {
            let Some((leader, from)) = self.leader_of(group) else {
                continue;
            };
            if !self.is_active(from) {
                continue;
            }
            for (heir, to) in self.heirs(group, leader).filter(|(_, to)| self.may_lead(*to)) {
                let ways = edges.entry(from).or_default().entry(to).or_default();
                ways.push((group.id, leader, heir));
            }
        }
        let mut moved: BTreeSet<GroupId> = BTreeSet::new();
        while moved.len() < TRANSFERS_MAX {
            let Some(path) = self.leader_path(&edges, &moved) else {
                break;
            };
            for (group, from, to) in path {
                moved.insert(group);
                let Some(shape) = view.groups.get(&group) else { continue };
                let node_of = |id| shape.replica(id).map_or(NodeId::new(0), |replica| replica.node);
                let why = format!(
                    "{} leads more groups than {}",
                    self.name(node_of(from)),
                    self.name(node_of(to))
                );
                self.move_leader(shape, from, to);
                self.busy.insert(group);
                self.act(Step::TransferLeader { group, from, to }, why);
            }
        }
    }

    /// Hand-overs that take one leader from a node to another that has at least two fewer.
    fn leader_path(&self, edges: &Edges, moved: &BTreeSet<GroupId>) -> Option<Vec<HandOver>> {
        let leaders = |id: &NodeId| self.nodes.get(id).map_or(0, |node| node.leaders);
        let mut starts: Vec<NodeId> = edges.keys().copied().collect();
        starts.sort_by_key(|id| (std::cmp::Reverse(leaders(id)), *id));
        for start in starts {
            let mut came: BTreeMap<NodeId, (NodeId, HandOver)> = BTreeMap::new();
            let mut todo = VecDeque::from([start]);
            let mut best: Option<(u32, usize, NodeId)> = None;
            let mut reached = 0;
            while let Some(node) = todo.pop_front() {
                reached += 1;
                if leaders(&node) + 2 <= leaders(&start) {
                    let found = (leaders(&node), reached, node);
                    best = Some(best.map_or(found, |best| best.min(found)));
                }
                for (next, ways) in edges.get(&node).into_iter().flatten() {
                    let way = ways.iter().find(|(group, _, _)| !moved.contains(group));
                    let Some(way) = way.filter(|_| *next != start && !came.contains_key(next)) else {
                        continue;
                    };
                    came.insert(*next, (node, *way));
                    todo.push_back(*next);
                }
            }
            let Some((_, _, mut at)) = best else { continue };
            let mut path = Vec::new();
            while let Some((before, way)) = came.get(&at) {
                path.push(*way);
                at = *before;
            }
            path.reverse();
            return Some(path);
        }
        None
    }
}
