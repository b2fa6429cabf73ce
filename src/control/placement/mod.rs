//! Placement: one plan for everything that moves, so that healing, scaling, draining, balancing and the moves of shards
//! never fight. [`plan`] is pure: the catalog's shape, what the nodes and leaders reported and the time go in, actions
//! with their reasons come out. Repeated until nothing is left it reaches a point where it stays.
//!
//! Order of precedence: the meta group, shards that are on their way, lost replicas, replica counts, drained nodes, the
//! placement that streams ask for, shards to be split out, leaders, spread, load. A group does one thing at a time.

mod action;
mod balance;
mod groups;
mod leaders;
mod meta;
mod moves;
mod report;

use std::collections::{BTreeMap, BTreeSet};

pub use crate::machine::placement::{
    Choice, ClusterShape, GroupShape, NodeShape, Nodes, Request, Settings, Verdict, VerdictKind, place,
};
use crate::model::{GroupId, NodeId, TimeUs};
use crate::wire::internal::v1::NodeState;
pub use action::{Action, Step};
pub use report::{GroupReport, LIVE_FOR_US, MetaReport, NodeReport, Reports};

/// What is to be done now, in order of precedence. Those that are blocked say by what; the others can be done at once, all
/// of them. Planning again while they are being done is harmless: each carries the epoch that it was planned from.
pub fn plan(view: &ClusterShape, reports: &Reports, now: TimeUs) -> Vec<Action> {
    let mut planner = Planner::new(view, reports, now);
    planner.plan_meta();
    planner.plan_moves();
    planner.plan_groups();
    planner.plan_splits();
    planner.plan_leaders();
    planner.plan_balance();
    planner.actions
}

/// The cluster with what was reported and what is decided so far.
struct Planner<'a> {
    view: &'a ClusterShape,
    reports: &'a Reports,
    /// With liveness, and with what will be on each node when all that is under way or decided is done.
    nodes: Nodes,
    /// Nodes that are gone for good, as far as anyone can tell.
    gone: BTreeSet<NodeId>,
    /// Replicas that come to or leave each node.
    moving: BTreeMap<NodeId, u32>,
    /// Groups for which something is under way or decided.
    busy: BTreeSet<GroupId>,
    /// Groups that need something that cannot be had now. Who leads them may still change.
    held: BTreeSet<GroupId>,
    /// Some replica is on its way, or must go somewhere.
    restless: bool,
    actions: Vec<Action>,
}

impl<'a> Planner<'a> {
    fn new(view: &'a ClusterShape, reports: &'a Reports, now: TimeUs) -> Self {
        let mut nodes = view.nodes.clone();
        let mut gone = BTreeSet::new();
        for node in nodes.values_mut() {
            let report = reports.nodes.get(&node.id);
            node.replicas = 0;
            node.leaders = 0;
            node.bytes = report.map_or(0, |report| report.bytes);
            node.live = node.state != NodeState::Removed && reports.is_live(node.id, now);
            let silent_us = now.get().saturating_sub(reports.heard_of(node.id).get());
            if node.state == NodeState::Removed || silent_us > view.settings.replace_after_us {
                gone.insert(node.id);
            }
        }
        let mut moving: BTreeMap<NodeId, u32> = BTreeMap::new();
        let mut busy = BTreeSet::new();
        for group in view.groups.values() {
            for id in group.nodes_after() {
                if let Some(node) = nodes.get_mut(&id) {
                    node.replicas += 1;
                }
            }
            let leader = reports
                .groups
                .get(&group.id)
                .and_then(|report| group.replica(report.leader));
            if let Some(node) = leader.and_then(|leader| nodes.get_mut(&leader.node)) {
                node.leaders += 1;
            }
            if let Some(change) = &group.change {
                busy.insert(group.id);
                // What a group without a leader is at does not go on, and takes nobody's slot.
                let goes_on = reports.groups.contains_key(&group.id);
                for id in change.add.iter().chain(&change.remove).filter(|_| goes_on) {
                    if let Some(replica) = group.replica(*id) {
                        *moving.entry(replica.node).or_default() += 1;
                    }
                }
            }
        }
        for moving in &view.moves {
            busy.extend([moving.from, moving.to]);
        }
        Self {
            // Nor does it keep the others waiting.
            restless: busy.iter().any(|group| reports.groups.contains_key(group)),
            view,
            reports,
            nodes,
            gone,
            moving,
            busy,
            held: BTreeSet::new(),
            actions: Vec::new(),
        }
    }

    /// Whether nothing more can be decided for a group's replicas now.
    fn is_taken(&self, group: GroupId) -> bool {
        self.busy.contains(&group) || self.held.contains(&group)
    }

    fn is_live(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.live)
    }

    fn is_active(&self, node: NodeId) -> bool {
        self.nodes
            .get(&node)
            .is_some_and(|node| node.live && node.state == NodeState::Active)
    }

    fn state(&self, node: NodeId) -> NodeState {
        self.nodes.get(&node).map_or(NodeState::Removed, |node| node.state)
    }

    /// "n3 (name)".
    fn name(&self, node: NodeId) -> String {
        match self.nodes.get(&node) {
            Some(shape) => format!("{node} ({})", shape.name),
            None => node.to_string(),
        }
    }

    fn act(&mut self, step: Step, why: String) {
        self.actions.push(Action {
            step,
            why,
            blocked: None,
        });
    }

    fn blocked(&mut self, step: Step, why: String, blocked: String) {
        self.actions.push(Action {
            step,
            why,
            blocked: Some(blocked),
        });
    }

    /// Nodes that cannot take a replica of the group now, whatever it wants.
    fn excluded(&self, group: &GroupShape) -> BTreeMap<NodeId, String> {
        let leaving = group.leaving.iter();
        let mut excluded = self.full();
        excluded.extend(leaving.map(|id| (*id, "its former replica of the group is not yet set aside".to_string())));
        excluded
    }

    /// Nodes that have as many replicas on their way as they may.
    fn full(&self) -> BTreeMap<NodeId, String> {
        let max = self.view.settings.moves_per_node_max;
        self.moving
            .iter()
            .filter(|(_, count)| **count >= max)
            .map(|(id, count)| (*id, format!("{count} replicas are on their way to or from it")))
            .collect()
    }
}
