//! What happened between two looks at the cluster.

use std::collections::BTreeMap;

use crate::model::{GroupId, NodeId, Term};
use crate::wire::v1::{self, cluster_event::Kind};

/// A look at the cluster.
#[derive(Debug, Clone, Default)]
pub(in crate::control) struct Look {
    pub time_us: u64,
    pub nodes: Vec<v1::Node>,
    pub groups: Vec<v1::GroupReport>,
    pub problems: Vec<v1::Problem>,
}

/// Remembers the last look.
#[derive(Debug, Default)]
pub struct Watcher {
    last: Option<Last>,
}

#[derive(Debug, Default)]
struct Last {
    nodes: BTreeMap<u64, (bool, i32, u64)>,
    leaders: BTreeMap<u64, (u64, Option<u64>)>,
    changes: BTreeMap<u64, u64>,
    problems: BTreeMap<(i32, Option<u64>, Option<u64>, String), v1::Problem>,
}

impl Watcher {
    /// What is new since the last look; nothing at the first.
    pub(in crate::control) fn see(&mut self, look: &Look) -> Vec<v1::ClusterEvent> {
        let now = Last {
            nodes: look
                .nodes
                .iter()
                .map(|n| (n.node_id, (n.live, n.state, n.incarnation)))
                .collect(),
            leaders: look
                .groups
                .iter()
                .map(|g| (g.group_id, (g.term, g.leader_node)))
                .collect(),
            changes: look
                .groups
                .iter()
                .filter_map(|g| Some((g.group_id, g.change.as_ref()?.started_us)))
                .collect(),
            problems: look.problems.iter().map(|p| (key(p), p.clone())).collect(),
        };
        let mut events = Vec::new();
        if let Some(last) = &self.last {
            let mut tell = |text: String, kind: Kind| {
                events.push(v1::ClusterEvent {
                    time_us: look.time_us,
                    text,
                    kind: Some(kind),
                });
            };
            nodes(last, &look.nodes, &mut tell);
            groups(last, &now, &look.groups, &look.nodes, &mut tell);
            for (key, problem) in &now.problems {
                if !last.problems.contains_key(key) {
                    tell(
                        format!("problem: {}", problem.text),
                        Kind::Problem(v1::ProblemAppeared {
                            problem: Some(problem.clone()),
                        }),
                    );
                }
            }
            for (key, problem) in &last.problems {
                if !now.problems.contains_key(key) {
                    tell(
                        format!("solved: {}", problem.text),
                        Kind::Solved(v1::ProblemSolved {
                            problem: Some(problem.clone()),
                        }),
                    );
                }
            }
        }
        self.last = Some(now);
        events
    }
}

/// The same problem keeps its key while its figures change.
fn key(problem: &v1::Problem) -> (i32, Option<u64>, Option<u64>, String) {
    // Of one node there are several alarms.
    let text = match problem.kind() {
        v1::ProblemKind::Alarm => problem.text.clone(),
        v1::ProblemKind::Unspecified
        | v1::ProblemKind::NodeSilent
        | v1::ProblemKind::Leaderless
        | v1::ProblemKind::NoQuorum
        | v1::ProblemKind::UnderReplicated
        | v1::ProblemKind::Damaged => String::new(),
    };
    (problem.kind, problem.node_id, problem.group_id, text)
}

fn nodes(last: &Last, nodes: &[v1::Node], tell: &mut dyn FnMut(String, Kind)) {
    for node in nodes {
        let (name, id) = (&node.name, NodeId::new(node.node_id));
        let known = last.nodes.get(&node.node_id);
        let (was_live, was_state, was) = known.copied().unwrap_or((false, node.state, 0));
        if node.live && (!was_live || was != node.incarnation) {
            let text = match known {
                None => format!("node {name} ({id}) has joined"),
                Some(_) if was != node.incarnation => format!("node {name} ({id}) has started again"),
                Some(_) => format!("node {name} ({id}) is there again"),
            };
            tell(
                text,
                Kind::NodeUp(v1::NodeUp {
                    node_id: node.node_id,
                    name: name.clone(),
                    incarnation: node.incarnation,
                }),
            );
        }
        if !node.live && was_live {
            tell(
                format!("node {name} ({id}) does not answer: {}", node.silence),
                Kind::NodeDown(v1::NodeDown {
                    node_id: node.node_id,
                    name: name.clone(),
                    reason: node.silence.clone(),
                }),
            );
        }
        if node.state != was_state {
            let state = match node.state() {
                v1::NodeState::Unspecified => "in a state that this version does not know",
                v1::NodeState::Active => "active",
                v1::NodeState::Draining => "being drained",
                v1::NodeState::Removed => "removed",
            };
            tell(
                format!("node {name} ({id}) is {state}"),
                Kind::NodeState(v1::NodeStateChanged {
                    node_id: node.node_id,
                    name: name.clone(),
                    state: node.state,
                }),
            );
        }
    }
}

fn groups(last: &Last, now: &Last, groups: &[v1::GroupReport], nodes: &[v1::Node], tell: &mut dyn FnMut(String, Kind)) {
    let name = |id: u64| {
        let known = nodes.iter().find(|n| n.node_id == id);
        known.map_or_else(|| NodeId::new(id).to_string(), |n| n.name.clone())
    };
    for group in groups {
        let id = if group.group_id == GroupId::META.get() {
            "the meta group".to_owned()
        } else {
            GroupId::new(group.group_id).to_string()
        };
        // A new group's first leader is no change.
        let before = last.leaders.get(&group.group_id).copied();
        if let Some((term, leader)) = before
            && (leader, term) != (group.leader_node, group.term)
            && (leader != group.leader_node || group.leader_node.is_some())
        {
            let text = match group.leader_node {
                Some(node) => format!("{id} is led by {} ({})", name(node), Term::new(group.term)),
                None => format!("{id} has no leader"),
            };
            tell(
                text,
                Kind::Leader(v1::LeaderChanged {
                    group_id: group.group_id,
                    term: group.term,
                    leader_node: group.leader_node,
                    former_leader_node: leader,
                }),
            );
        }
        let begun = now.changes.get(&group.group_id);
        let had = last.changes.get(&group.group_id);
        if had.is_some() && begun != had {
            tell(
                format!("{id}: the change of its replicas is over"),
                Kind::ChangeEnded(v1::ChangeEnded {
                    group_id: group.group_id,
                }),
            );
        }
        if begun.is_some() && begun != had {
            let why = group.change.as_ref().map(|c| c.why.clone()).unwrap_or_default();
            tell(
                format!("{id}: a change of its replicas has begun: {why}"),
                Kind::ChangeStarted(v1::ChangeStarted {
                    group_id: group.group_id,
                    change: group.change.clone(),
                }),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(live: bool, leader: Option<u64>, term: u64) -> Look {
        Look {
            time_us: 1,
            nodes: vec![v1::Node {
                node_id: 2,
                name: "b".into(),
                live,
                incarnation: 1,
                ..v1::Node::default()
            }],
            groups: vec![v1::GroupReport {
                group_id: 7,
                term,
                leader_node: leader,
                ..v1::GroupReport::default()
            }],
            problems: Vec::new(),
        }
    }

    fn texts(events: &[v1::ClusterEvent]) -> Vec<&str> {
        events.iter().map(|e| e.text.as_str()).collect()
    }

    #[test]
    fn what_changed_is_told_once() {
        let mut watcher = Watcher::default();
        assert!(watcher.see(&look(true, Some(2), 3)).is_empty());
        assert!(watcher.see(&look(true, Some(2), 3)).is_empty());
        let events = watcher.see(&look(false, None, 3));
        assert_eq!(texts(&events), ["node b (n2) does not answer: ", "g7 has no leader"]);
        // Terms go by while nobody is elected.
        assert!(watcher.see(&look(false, None, 4)).is_empty());
        let events = watcher.see(&look(true, Some(2), 5));
        assert_eq!(texts(&events), ["node b (n2) is there again", "g7 is led by b (t5)"]);
    }
}
