//! What is wrong with the cluster, and what to do.

use std::collections::BTreeMap;

use super::Gathered;
use crate::model::{GroupId, NodeId};
use crate::wire::v1::{self, ProblemKind, ReplicaState};

/// More are not told.
pub(in crate::control) const PROBLEMS_MAX: usize = 200;
/// Shards of a group that are named.
const NAMED_MAX: usize = 3;

/// `shards` names the shards of each group, "ORDERS/0".
pub(in crate::control) fn problems(
    gathered: &Gathered,
    groups: &[v1::GroupReport],
    shards: &BTreeMap<u64, Vec<String>>,
    name: &dyn Fn(NodeId) -> String,
) -> Vec<v1::Problem> {
    let mut found = Vec::new();
    let mut say = |kind: ProblemKind, node: Option<NodeId>, group: Option<u64>, text: String, next: &str| {
        found.push(v1::Problem {
            kind: kind.into(),
            text,
            next: next.to_owned(),
            node_id: node.map(|n| n.get()),
            group_id: group,
        });
    };
    for (node, reason) in &gathered.silent {
        say(
            ProblemKind::NodeSilent,
            Some(*node),
            None,
            format!("node {} does not answer: {reason}", name(*node)),
            "look at its log, and start it; if it never comes back, `mainstem node remove` takes it out",
        );
    }
    for (node, report) in &gathered.reports {
        for alarm in &report.alarms {
            let kind = if alarm == "damaged" {
                ProblemKind::Damaged
            } else {
                ProblemKind::Alarm
            };
            say(
                kind,
                Some(*node),
                None,
                format!("node {}: {alarm}", name(*node)),
                "its log and its /v1/status tell the reason",
            );
        }
    }
    let mut spare = Spare::default();
    for group in groups {
        let id = Some(group.group_id);
        let is_meta = group.group_id == GroupId::META.get();
        if group.shards == 0 && !is_meta {
            // One that is being formed has no leader yet.
            if group.formed {
                spare.see(group);
            }
            continue;
        }
        let what = describe(group, shards.get(&group.group_id), is_meta);
        let where_ = format!("{} of {} voters answer", group.quorum_have, group.voters);
        if group.leaderless {
            say(
                ProblemKind::Leaderless,
                None,
                id,
                format!("{what}: no leader; {where_}, {} are needed", group.quorum_need),
                if group.quorum_have < group.quorum_need {
                    "bring back the nodes that hold its other replicas"
                } else {
                    "it elects one within a second; if it does not, look at the logs of its nodes"
                },
            );
        } else if group.quorum_have < group.quorum_need {
            say(
                ProblemKind::NoQuorum,
                None,
                id,
                format!("{what}: no quorum; {where_}, {} are needed", group.quorum_need),
                "bring back the nodes that hold its other replicas",
            );
        } else if group.under_replicated {
            let current = group
                .replicas
                .iter()
                .filter(|r| r.voter && r.state() == ReplicaState::Current)
                .count();
            let next = match &group.change {
                Some(change) if change.waiting_for.is_empty() => "a change is under way: wait",
                Some(_) => "a change is under way; `mainstem cluster report` shows what it waits for",
                None => "bring its nodes back; what is gone for longer than `replace_after` is made anew elsewhere",
            };
            say(
                ProblemKind::UnderReplicated,
                None,
                id,
                format!("{what}: {current} of {} replicas are current", group.replicas_wanted),
                next,
            );
        }
    }
    for (kind, text, next) in spare.problems() {
        say(kind, None, None, text, next);
    }
    found.truncate(PROBLEMS_MAX);
    found
}

/// Groups without shards: nobody waits for them, but the next stream may be put there.
#[derive(Default)]
struct Spare {
    unled: Vec<GroupId>,
    thin: Vec<GroupId>,
}

impl Spare {
    fn see(&mut self, group: &v1::GroupReport) {
        let id = GroupId::new(group.group_id);
        if group.leaderless || group.quorum_have < group.quorum_need {
            self.unled.push(id);
        } else if group.under_replicated {
            self.thin.push(id);
        }
    }

    /// One problem for all, since there may be many: what it is, and what to do.
    fn problems(&self) -> Vec<(ProblemKind, String, &'static str)> {
        let told = |groups: &[GroupId]| {
            let named: Vec<_> = groups.iter().take(NAMED_MAX).map(GroupId::to_string).collect();
            match groups.len().saturating_sub(NAMED_MAX) {
                0 => named.join(", "),
                more => format!("{} and {more} more", named.join(", ")),
            }
        };
        let mut found = Vec::new();
        if !self.unled.is_empty() {
            let (count, groups) = (self.unled.len(), told(&self.unled));
            found.push((
                ProblemKind::NoQuorum,
                format!("{count} groups without shards have no leader or no quorum: {groups}"),
                "bring back the nodes that hold their other replicas",
            ));
        }
        if !self.thin.is_empty() {
            let (count, groups) = (self.thin.len(), told(&self.thin));
            found.push((
                ProblemKind::UnderReplicated,
                format!("{count} groups without shards are under-replicated: {groups}"),
                "bring their nodes back; what is gone for longer than `replace_after` is made anew elsewhere",
            ));
        }
        found
    }
}

fn describe(group: &v1::GroupReport, shards: Option<&Vec<String>>, is_meta: bool) -> String {
    if is_meta {
        return "the meta group".to_owned();
    }
    let id = GroupId::new(group.group_id);
    match shards {
        None => id.to_string(),
        Some(names) if names.len() <= NAMED_MAX => format!("{id} ({})", names.join(", ")),
        Some(names) => format!(
            "{id} ({} and {} more)",
            names[..NAMED_MAX].join(", "),
            names.len() - NAMED_MAX
        ),
    }
}
