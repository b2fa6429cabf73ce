//! Spread and load: only when nothing else is on its way, only where it helps for good. Each move makes a sum of squares
//! smaller, of a group's replicas by zone or of the nodes' replicas, so it comes to an end and never goes back.

use std::collections::BTreeMap;

use super::{Planner, Request, place};
use crate::machine::placement::{GroupShape, ReplicaShape};
use crate::model::NodeId;
use crate::wire::internal::v1::ChangeReason;

/// Nodes may differ by this many replicas before one is moved …
const UNEVEN_MIN: u32 = 2;
/// … or by this part of their mean, if that is more.
const UNEVEN_PART: u32 = 10;
/// Pairs of nodes that are looked at for one move, the most uneven first.
const PAIRS_MAX: usize = 64;

impl Planner<'_> {
    pub(super) fn plan_balance(&mut self) {
        if self.restless {
            return;
        }
        self.spread();
        if self.restless {
            return;
        }
        while self.level() {}
    }

    fn zone(&self, node: NodeId) -> &str {
        self.nodes.get(&node).map_or("", |node| node.zone.as_str())
    }

    /// How many voters of a group are in each zone, one of them left out.
    fn zones_without(&self, group: &GroupShape, without: &ReplicaShape) -> BTreeMap<&str, u32> {
        let mut zones = BTreeMap::new();
        for replica in group.voters().filter(|replica| replica.id != without.id) {
            *zones.entry(self.zone(replica.node)).or_default() += 1;
        }
        zones
    }

    /// Replicas that share a zone although another has none.
    fn spread(&mut self) {
        let view = self.view;
        for group in view.groups.values() {
            if self.is_taken(group.id) {
                continue;
            }
            let full = self.full();
            let mut found = None;
            for replica in group.voters().filter(|replica| !full.contains_key(&replica.node)) {
                let zones = self.zones_without(group, replica);
                let here = zones.get(self.zone(replica.node)).copied().unwrap_or(0);
                if here == 0 {
                    continue;
                }
                let mut exclude = self.excluded(group);
                exclude.insert(replica.node, "it gives its replica away".into());
                let request = Request {
                    replicas: 1,
                    holding: group.voters().filter(|r| r.id != replica.id).map(|r| r.node).collect(),
                    placement: group.placement.as_ref(),
                    exclude,
                };
                let Some(node) = place(&self.nodes, &request).nodes.first().copied() else {
                    continue;
                };
                let there = zones.get(self.zone(node)).copied().unwrap_or(0);
                if there < here {
                    found = Some((
                        replica,
                        node,
                        format!("zone {:?} holds {} of its replicas", self.zone(replica.node), here + 1),
                    ));
                    break;
                }
            }
            let Some((replica, node, why)) = found else { continue };
            let standing = self.standing(group);
            if standing.obstacle().is_some() {
                continue;
            }
            self.change(
                &standing,
                vec![node],
                vec![replica.id],
                ChangeReason::Balance,
                why,
                String::new(),
            );
            self.busy.insert(group.id);
        }
    }

    /// One replica from a node with many to one with few. False: there is none to be moved.
    fn level(&mut self) -> bool {
        let full = self.full();
        let mut nodes: Vec<(u32, NodeId)> = self
            .nodes
            .values()
            .filter(|node| self.is_active(node.id) && !full.contains_key(&node.id))
            .map(|node| (node.replicas, node.id))
            .collect();
        nodes.sort_unstable();
        let sum: u32 = nodes.iter().map(|(replicas, _)| replicas).sum();
        let mean = sum.checked_div(nodes.len() as u32).unwrap_or(0);
        let uneven = UNEVEN_MIN.max(mean / UNEVEN_PART);
        let mut pairs = Vec::new();
        for (most, from) in nodes.iter().rev() {
            for (least, to) in nodes.iter().take_while(|(least, _)| least + uneven < *most) {
                pairs.push((std::cmp::Reverse(most - least), *from, *to, *most, *least));
            }
        }
        pairs.sort_unstable();
        pairs.truncate(PAIRS_MAX);
        let view = self.view;
        let mut on: BTreeMap<NodeId, Vec<&GroupShape>> = BTreeMap::new();
        for group in view.groups.values().filter(|group| !self.is_taken(group.id)) {
            for replica in group.voters() {
                on.entry(replica.node).or_default().push(group);
            }
        }
        for (_, from, to, most, least) in pairs {
            let here = on.get(&from).map_or(&[][..], Vec::as_slice);
            let fits = |group: &&&GroupShape| self.may_move(group, from, to);
            // One that does not lead there is moved without a hand-over.
            let leads = |group: &GroupShape| {
                let leader = self.reports.groups.get(&group.id).map(|report| report.leader);
                group
                    .voters()
                    .any(|replica| replica.node == from && Some(replica.id) == leader)
            };
            let Some(group) = here
                .iter()
                .filter(fits)
                .min_by_key(|group| (leads(group), group.id))
                .copied()
            else {
                continue;
            };
            let Some(replica) = group.voters().find(|replica| replica.node == from) else {
                continue;
            };
            let why = format!(
                "{} holds {most} replicas, {} holds {least}",
                self.name(from),
                self.name(to)
            );
            let standing = self.standing(group);
            self.change(
                &standing,
                vec![to],
                vec![replica.id],
                ChangeReason::Balance,
                why,
                String::new(),
            );
            self.busy.insert(group.id);
            return true;
        }
        false
    }

    /// Whether a group's replica may go from one node to another without harm.
    fn may_move(&self, group: &GroupShape, from: NodeId, to: NodeId) -> bool {
        let Some(replica) = group.voters().find(|replica| replica.node == from) else {
            return false;
        };
        let allowed = self
            .nodes
            .get(&to)
            .is_some_and(|node| node.allowed_by(group.placement.as_ref()).is_ok());
        if !allowed
            || group.leaving.contains(&to)
            || group.nodes_after().any(|node| node == to)
            || self.standing(group).obstacle().is_some()
        {
            return false;
        }
        let zones = self.zones_without(group, replica);
        let count = |node| zones.get(self.zone(node)).copied().unwrap_or(0);
        count(to) <= count(from)
    }
}
