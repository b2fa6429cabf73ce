//! The meta group's voters: up to five, an odd number, over the zones; dead ones are replaced. Never fewer because a node
//! is gone: a dead voter stays until there is another to take its place.

use std::collections::{BTreeMap, BTreeSet};

use super::{Planner, Request, Step, place};
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::wire::internal::v1::NodeState;

impl Planner<'_> {
    pub(super) fn plan_meta(&mut self) {
        let meta = &self.view.meta;
        if meta.voters.is_empty() {
            return;
        }
        let replicas: BTreeMap<NodeId, ReplicaId> = self
            .nodes
            .values()
            .filter(|node| node.state != NodeState::Removed)
            .filter_map(|node| Some((node.id, node.meta_replica?)))
            .collect();
        let damaged: Vec<(NodeId, ReplicaId)> = replicas
            .iter()
            .map(|(node, replica)| (*node, *replica))
            .filter(|(node, replica)| self.reports.is_damaged(*node, *replica))
            .collect();
        if let Some((node, replica)) = damaged.first().copied() {
            let why = format!("its log on {} is damaged", self.name(node));
            let left = meta.voters.iter().filter(|id| **id != replica).count();
            let others = replicas
                .iter()
                .filter(|(_, id)| **id != replica && meta.voters.contains(id));
            let live = others.filter(|(node, _)| self.is_live(**node)).count();
            let step = Step::RenewMetaReplica { node, replica };
            match meta.voters.contains(&replica) && live < left / 2 + 1 {
                true => self.blocked(step, why, format!("{live} of the {left} other voters are live")),
                false => self.act(step, why),
            }
            return;
        }
        if self.meta_leads_away(&replicas) {
            return;
        }
        let step = |voters: &BTreeSet<ReplicaId>| Step::SetMetaVoters {
            epoch: meta.epoch,
            voters: voters.iter().copied().collect(),
        };
        let (wanted, why) = self.meta_voters(&replicas);
        if wanted == meta.voters {
            return;
        }
        let node_of = |id: &ReplicaId| replicas.iter().find(|(_, found)| *found == id).map(|(node, _)| *node);
        let live = |ids: &BTreeSet<ReplicaId>| {
            let live = ids
                .iter()
                .filter(|id| node_of(id).is_some_and(|node| self.is_live(node)));
            live.count()
        };
        let committed = &self.reports.meta.voters;
        let blocked = if committed != &meta.voters && !self.meta_stuck(committed, &node_of) {
            Some("the last change of the meta group's voters is under way".to_string())
        } else if live(&wanted) < wanted.len() / 2 + 1 {
            Some(format!("{} of {} voters would be live", live(&wanted), wanted.len()))
        } else {
            None
        };
        match blocked {
            Some(blocked) => self.blocked(step(&wanted), why, blocked),
            None => self.act(step(&wanted), why),
        }
    }

    /// Whether a voter-to-be is gone, so that the change under way can never end.
    fn meta_stuck(&self, committed: &BTreeSet<ReplicaId>, node_of: &dyn Fn(&ReplicaId) -> Option<NodeId>) -> bool {
        self.view
            .meta
            .voters
            .difference(committed)
            .any(|id| node_of(id).is_none_or(|node| self.gone.contains(&node)))
    }

    fn meta_leads_away(&mut self, replicas: &BTreeMap<NodeId, ReplicaId>) -> bool {
        let report = &self.reports.meta;
        let Some(from) = report.leader else { return false };
        let node = replicas.iter().find(|(_, id)| **id == from).map(|(node, _)| *node);
        let Some(node) = node.filter(|node| self.state(*node) == NodeState::Draining) else {
            return false;
        };
        let heir = replicas
            .iter()
            .find(|(node, id)| self.is_active(**node) && report.voters.contains(id) && report.current.contains(id));
        let Some((_, to)) = heir else { return false };
        let (group, to) = (GroupId::META, *to);
        let why = format!("{} is drained", self.name(node));
        self.act(Step::TransferLeader { group, from, to }, why);
        true
    }

    /// Who shall vote, and why that is a change.
    fn meta_voters(&self, replicas: &BTreeMap<NodeId, ReplicaId>) -> (BTreeSet<ReplicaId>, String) {
        let now = &self.view.meta.voters;
        let max = self.view.settings.meta_voters_max as usize;
        let of = |node: &NodeId| replicas.get(node).copied().unwrap_or_default();
        // Those that may stay, those that vote until there is another, those that could.
        let voters: Vec<NodeId> = replicas
            .keys()
            .copied()
            .filter(|node| now.contains(&of(node)))
            .collect();
        let (mut good, mut bad): (Vec<NodeId>, Vec<NodeId>) = voters
            .iter()
            .partition(|node| !self.gone.contains(node) && self.state(**node) == NodeState::Active);
        let spare = replicas
            .keys()
            .filter(|node| !now.contains(&of(node)) && self.is_active(**node))
            .count();
        let most = (good.len() + spare).min(max);
        let odd = if most % 2 == 0 { most.saturating_sub(1) } else { most };
        let size = odd.max(voters.len().min(max)).max(1);
        if good.len() > size {
            // Fewer are allowed than there were: the leader stays, and what spreads.
            let leader = self.reports.meta.leader;
            good = self.spread_meta(&good, size, |node| Some(of(&node)) == leader);
            bad.clear();
            let why = format!("{} voters, {size} are allowed", now.len());
            return (good.iter().map(&of).collect(), why);
        }
        let chosen = self.choose_meta(&good, &voters, replicas, size - good.len());
        let mut set = good.clone();
        set.extend(&chosen);
        // Who can be reached is better than who cannot.
        bad.sort_by_key(|node| (!self.is_live(*node), self.gone.contains(node), *node));
        set.extend(bad.iter().take(size - set.len()));
        let mut why = format!("{} of the {size} voters there should be", good.len());
        if set.iter().all(|node| now.contains(&of(node)))
            && chosen.is_empty()
            && bad.is_empty()
            && let Some((from, to)) = self.better_spread(&set, replicas)
        {
            set.retain(|node| *node != from);
            set.push(to);
            why = format!(
                "zone {:?} has several voters, {:?} fewer",
                self.meta_zone(from),
                self.meta_zone(to)
            );
        }
        (set.iter().map(&of).collect(), why)
    }

    fn meta_zone(&self, node: NodeId) -> &str {
        self.nodes.get(&node).map_or("", |node| node.zone.as_str())
    }

    /// Nodes for new voters. What data they hold plays no part: it changes all the time.
    fn choose_meta(
        &self,
        holding: &[NodeId],
        voters: &[NodeId],
        replicas: &BTreeMap<NodeId, ReplicaId>,
        count: usize,
    ) -> Vec<NodeId> {
        let mut nodes = self.nodes.clone();
        nodes.retain(|id, _| replicas.contains_key(id));
        for node in nodes.values_mut() {
            (node.replicas, node.leaders, node.bytes) = (0, 0, 0);
        }
        let others = voters.iter().filter(|node| !holding.contains(node));
        let request = Request {
            replicas: count as u32,
            holding: holding.to_vec(),
            placement: None,
            exclude: others.map(|node| (*node, "it votes".to_string())).collect(),
        };
        place(&nodes, &request).nodes
    }

    /// So many of these, over as many zones as there are.
    fn spread_meta(&self, nodes: &[NodeId], count: usize, first: impl Fn(NodeId) -> bool) -> Vec<NodeId> {
        let mut left: Vec<NodeId> = nodes.to_vec();
        let mut zones: BTreeMap<&str, u32> = BTreeMap::new();
        let mut chosen = Vec::new();
        while chosen.len() < count {
            let best = left
                .iter()
                .enumerate()
                .min_by_key(|(_, node)| {
                    let crowd = zones.get(self.meta_zone(**node)).copied().unwrap_or(0);
                    (!first(**node), !self.is_live(**node), crowd, **node)
                })
                .map(|(at, _)| at);
            let Some(at) = best else { break };
            let node = left.swap_remove(at);
            *zones.entry(self.meta_zone(node)).or_default() += 1;
            chosen.push(node);
        }
        chosen
    }

    /// A voter that shares its zone, and a node in a zone with at least two fewer voters. Never the leader.
    fn better_spread(&self, set: &[NodeId], replicas: &BTreeMap<NodeId, ReplicaId>) -> Option<(NodeId, NodeId)> {
        let leader = self.reports.meta.leader;
        for node in set.iter().filter(|node| replicas.get(node).copied() != leader) {
            let others: Vec<NodeId> = set.iter().copied().filter(|other| other != node).collect();
            let count = |zone: &str| others.iter().filter(|other| self.meta_zone(**other) == zone).count();
            let to = self.choose_meta(&others, set, replicas, 1);
            if let Some(to) = to.first()
                && count(self.meta_zone(*to)) < count(self.meta_zone(*node))
            {
                return Some((*node, *to));
            }
        }
        None
    }
}
