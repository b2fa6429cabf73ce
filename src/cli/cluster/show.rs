//! The cluster for people.

use std::collections::HashMap;

use comfy_table::Table;

use crate::cli::output;
use crate::cli::units::{show_age_us, show_count, show_duration_us, show_lag, show_size, show_time_us};
use crate::client::proto::{
    GetClusterResponse, GetReportResponse, GroupReport, Node, NodeState, PlanResponse, Problem, ReplicaChangeReason,
    ReplicaChangeReport, ReplicaReport, ReplicaState, ShardReport,
};

pub(super) fn node_state(node: &Node) -> &'static str {
    match node.state() {
        NodeState::Unspecified => "unknown",
        NodeState::Active => "active",
        NodeState::Draining => "draining",
        NodeState::Removed => "removed",
    }
}

pub(super) fn replica_state(replica: &ReplicaReport) -> &'static str {
    match replica.state() {
        ReplicaState::Unspecified => "unknown",
        ReplicaState::Current => "current",
        ReplicaState::Lagging => "lagging",
        ReplicaState::Offline => "offline",
        ReplicaState::Damaged => "damaged",
        ReplicaState::NotRunning => "starting",
        ReplicaState::Waiting => "waiting",
    }
}

/// "n1*, n2, n3!": the leader has a star; what is not current an exclamation mark; learners are in brackets.
fn replicas(group: &GroupReport) -> String {
    let told = group.replicas.iter().map(|replica| {
        let mark = match replica.state() {
            _ if replica.leader => "*",
            ReplicaState::Current => "",
            ReplicaState::Unspecified
            | ReplicaState::Lagging
            | ReplicaState::Offline
            | ReplicaState::Damaged
            | ReplicaState::NotRunning
            | ReplicaState::Waiting => "!",
        };
        let name = match replica.node_name.as_str() {
            "" => format!("n{}", replica.node_id),
            name => name.to_owned(),
        };
        if replica.voter {
            format!("{name}{mark}")
        } else {
            format!("({name}{mark})")
        }
    });
    told.collect::<Vec<_>>().join(", ")
}

/// What is to be said of replicas that are not current, and of what is on its way.
fn notes(group: &GroupReport, now_us: u64) -> String {
    let behind = group
        .replicas
        .iter()
        .filter(|r| r.state() != ReplicaState::Current)
        .map(|r| replica_note(r, now_us));
    let mut notes: Vec<_> = behind.collect();
    if let Some(change) = &group.change {
        notes.push(format!("{}{}", reason(change), signs(change)));
    }
    notes.join("; ")
}

/// "n3 offline for 2m 5s, 1,200 entries, 3.1 MiB, 2.4 s behind".
fn replica_note(r: &ReplicaReport, now_us: u64) -> String {
    let mut text = format!("{} {}", r.node_name, replica_state(r));
    if let Some(since) = r.offline_since_us {
        text.push_str(&format!(" for {}", ago(since, now_us)));
    }
    match (r.snapshot_bytes, r.snapshot_total_bytes) {
        (Some(sent), Some(total)) => {
            text.push_str(&format!(
                ", {} of a snapshot of {} sent",
                show_size(sent),
                show_size(total)
            ));
        }
        (Some(sent), None) => text.push_str(&format!(", {} of a snapshot sent", show_size(sent))),
        (None, _) => {}
    }
    match show_lag(r.lag_entries.unwrap_or(0), r.lag_bytes, r.lag_us).as_str() {
        "" => {}
        lag => text.push_str(&format!(", {lag} behind")),
    }
    text
}

fn ago(at_us: u64, now_us: u64) -> String {
    show_age_us(now_us.saturating_sub(at_us))
}

pub(super) fn reason(change: &ReplicaChangeReport) -> &'static str {
    match change.reason() {
        ReplicaChangeReason::Unspecified => "unknown",
        ReplicaChangeReason::Heal => "heal",
        ReplicaChangeReason::Scale => "scale",
        ReplicaChangeReason::Drain => "drain",
        ReplicaChangeReason::Move => "move",
        ReplicaChangeReason::Balance => "balance",
    }
}

/// " +n4 -n3".
fn signs(change: &ReplicaChangeReport) -> String {
    let nodes = |ids: &[u64], sign: &str| ids.iter().map(|id| format!(" {sign}n{id}")).collect::<String>();
    nodes(&change.add_nodes, "+") + &nodes(&change.remove_nodes, "-")
}

/// Changes of replicas and moves of shards under way: what, why, since when, what is left, what holds them up.
fn on_its_way(report: &GetReportResponse) -> Option<Table> {
    let changing: Vec<_> = report
        .meta
        .iter()
        .chain(&report.groups)
        .filter(|g| g.change.is_some())
        .collect();
    if changing.is_empty() && report.moves.is_empty() {
        return None;
    }
    let mut table = output::table(&["on its way", "why", ">for", ">left", ">rate", "waits for"]);
    for group in changing {
        let Some(change) = &group.change else { continue };
        let shards: Vec<_> = report.shards.iter().filter(|s| s.group_id == group.group_id).collect();
        let holds = match shards.as_slice() {
            [] => String::new(),
            [one] => format!(" ({}/{})", one.stream, one.index),
            [first, ..] => format!(" ({}/{} and {} more)", first.stream, first.index, shards.len() - 1),
        };
        let waits = match (change.waiting_for.as_str(), change.ready) {
            ("", true) => "the voters are being changed",
            ("", false) => "",
            (text, _) => text,
        };
        table.add_row([
            format!("g{}{holds}: {}{}", group.group_id, reason(change), signs(change)),
            change.why.clone(),
            ago(change.started_us, report.time_us),
            change.bytes_left.map(show_size).unwrap_or_default(),
            change
                .bytes_per_second
                .map(|b| format!("{}/s", show_size(b)))
                .unwrap_or_default(),
            waits.to_owned(),
        ]);
    }
    for m in &report.moves {
        table.add_row([
            format!("{}/{}: g{} to g{}", m.stream, m.index, m.from_group, m.to_group),
            "its stream gets groups of its own, or others".to_owned(),
            ago(m.started_us, report.time_us),
            String::new(),
            String::new(),
            match m.step.as_str() {
                "planned" => "to be sealed in the one group",
                "sealed" => "to be adopted by the other group",
                "adopted" => "to be forgotten by the former group",
                "given up" => "stays where it is",
                _ => "",
            }
            .to_owned(),
        ]);
    }
    Some(table)
}

fn quorum(group: &GroupReport) -> String {
    let missing = if group.quorum_have < group.quorum_need {
        format!(", {} needed", group.quorum_need)
    } else {
        String::new()
    };
    format!("{} of {}{missing}", group.quorum_have, group.voters)
}

/// Groups by id.
fn group_names(report: &GetReportResponse) -> HashMap<u64, &GroupReport> {
    report.groups.iter().map(|g| (g.group_id, g)).collect()
}

/// Shards with what their groups say.
fn shard_table<'a>(shards: impl Iterator<Item = &'a ShardReport>, report: &GetReportResponse) -> Table {
    let groups = group_names(report);
    let mut table = output::table(&[
        "shard",
        "group",
        ">led for",
        ">term",
        "replicas",
        "quorum",
        "last quorum ack",
        ">messages",
        ">size",
        "notes",
    ]);
    for shard in shards {
        let empty = GroupReport::default();
        let group = groups.get(&shard.group_id).copied().unwrap_or(&empty);
        let mut notes = notes(group, report.time_us);
        if shard.moving {
            notes = format!("moving between groups; {notes}");
        }
        if shard.leaderless {
            notes = format!("NO LEADER; {notes}");
        }
        table.add_row([
            format!("{}/{}", shard.stream, shard.index),
            format!("g{}", shard.group_id),
            group
                .leader_since_us
                .map(|at| ago(at, report.time_us))
                .unwrap_or_default(),
            group.term.to_string(),
            replicas(group),
            quorum(group),
            group
                .last_quorum_ack_us
                .map(|at| format!("{} ago", ago(at, report.time_us)))
                .unwrap_or_default(),
            shard.messages.map(show_count).unwrap_or_default(),
            shard.bytes.map(show_size).unwrap_or_default(),
            notes.trim_end_matches([' ', ';']).to_owned(),
        ]);
    }
    table
}

/// Shards, and what is on its way.
pub(in crate::cli) fn shard_page(report: &GetReportResponse) -> String {
    let mut page = format!("{}\n", shard_table(report.shards.iter(), report));
    if let Some(table) = on_its_way(report) {
        page.push_str(&format!("\n{table}\n"));
    }
    page
}

fn summary_line(report: &GetReportResponse) -> String {
    let s = report.summary.unwrap_or_default();
    format!(
        "{} of {} nodes answer · {} shards in {} groups: {} leaderless, {} under-replicated · {} changes and {} moves on \
         their way",
        s.live_nodes,
        s.nodes,
        show_count(s.shards),
        show_count(s.groups),
        show_count(s.leaderless_shards),
        show_count(s.under_replicated_shards),
        show_count(s.changes),
        show_count(s.moves),
    )
}

/// `planned` is what the planner would do next.
pub(super) fn report(
    report: &GetReportResponse,
    planned: &PlanResponse,
    only_problems: bool,
    with_groups: bool,
) -> String {
    let groups = group_names(report);
    let mut page = format!("{}\n", summary_line(report));
    if let Some(meta) = &report.meta {
        page.push_str(&format!(
            "meta group: {}, quorum {}, term {}\n",
            replicas(meta),
            quorum(meta),
            meta.term
        ));
    }
    let concerned = |shard: &&ShardReport| {
        let busy = groups.get(&shard.group_id).is_some_and(|g| g.change.is_some());
        !only_problems || shard.leaderless || shard.under_replicated || shard.moving || busy
    };
    if report.shards.iter().any(|s| concerned(&s)) {
        page.push_str(&format!(
            "\n{}\n",
            shard_table(report.shards.iter().filter(concerned), report)
        ));
    }
    let empty: Vec<_> = report
        .groups
        .iter()
        .filter(|g| g.shards == 0 && (with_groups || g.change.is_some()))
        .collect();
    if !empty.is_empty() {
        let mut table = output::table(&["group without shards", "replicas", "quorum", ">term", "notes"]);
        for group in empty {
            table.add_row([
                format!("g{}", group.group_id),
                replicas(group),
                quorum(group),
                group.term.to_string(),
                notes(group, report.time_us),
            ]);
        }
        page.push_str(&format!("\n{table}\n"));
    }
    if let Some(table) = on_its_way(report) {
        page.push_str(&format!("\n{table}\n"));
    }
    if !planned.actions.is_empty() {
        page.push_str(&format!("\n{}\n", plan(planned)));
    }
    page.push_str(&problems(&report.problems));
    page
}

fn problems(problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        text.push_str(&format!("\n! {}\n  next: {}\n", problem.text, problem.next));
    }
    text
}

pub(super) fn health(report: &GetReportResponse, well: bool) -> String {
    // Figures that move by themselves are no news.
    let line = summary_line(report);
    let verdict = if well { "healthy" } else { "unhealthy" };
    format!("{verdict}: {line}\n{}", problems(&report.problems))
}

pub(super) fn nodes(nodes: &[Node]) -> Table {
    let mut table = output::table(&[
        "node",
        "id",
        "zone",
        "state",
        "clients",
        "peers",
        ">replicas",
        ">leaders",
        ">size",
        ">free",
        "meta",
        "version",
        "notes",
    ]);
    for node in nodes {
        let mut notes = Vec::new();
        if !node.live && node.state() != NodeState::Removed {
            notes.push(format!("does not answer: {}", node.silence));
        }
        if let Some(at) = node.last_heard_us {
            notes.push(format!("last heard {}", show_time_us(at)));
        }
        if node.replicas_coming > 0 {
            notes.push(format!("{} replicas coming", node.replicas_coming));
        }
        if node.replicas_leaving > 0 {
            notes.push(format!("{} replicas leaving", node.replicas_leaving));
        }
        notes.extend(node.alarms.iter().map(|alarm| format!("alarm {alarm}")));
        if !node.tags.is_empty() {
            let tags: Vec<_> = node.tags.iter().map(|(k, v)| format!("{k}={v}")).collect();
            notes.push(tags.join(" "));
        }
        let live = if node.live || node.state() == NodeState::Removed {
            node_state(node).to_owned()
        } else {
            format!("{}, offline", node_state(node))
        };
        table.add_row([
            node.name.clone(),
            format!("n{}", node.node_id),
            node.zone.clone(),
            live,
            node.client_address.clone(),
            node.peer_address.clone(),
            node.replicas.to_string(),
            node.leaders.to_string(),
            node.bytes.map(show_size).unwrap_or_default(),
            node.free_bytes.map(show_size).unwrap_or_default(),
            node.meta_role.clone(),
            node.version.clone(),
            notes.join("; "),
        ]);
    }
    table
}

/// Who keeps the next cluster version from being in force.
fn held_back(c: &GetClusterResponse) -> String {
    if c.cluster_version_known <= c.cluster_version {
        return String::new();
    }
    let nodes: Vec<_> = c.held_back_by.iter().map(|id| format!("n{id}")).collect();
    match nodes.as_slice() {
        [] => format!("; {} comes into force now", c.cluster_version_known),
        nodes => format!(
            "; {} is held back by {}: upgrade or remove",
            c.cluster_version_known,
            nodes.join(", ")
        ),
    }
}

pub(super) fn cluster(c: &GetClusterResponse) -> String {
    let meta = c.meta.clone().unwrap_or_default();
    let settings = c.settings.unwrap_or_default();
    let leader = match meta.replicas.iter().find(|r| r.leader) {
        Some(leader) => format!(
            "{} (n{}), term {}, since {}",
            leader.node_name,
            leader.node_id,
            meta.term,
            meta.leader_since_us.map(show_time_us).unwrap_or_default()
        ),
        None => "none".to_owned(),
    };
    output::pairs(&[
        ("cluster", format!("{} ({})", c.name, c.cluster_id)),
        (
            "version",
            format!("{} (cluster version {}{})", c.version, c.cluster_version, held_back(c)),
        ),
        ("nodes", format!("{} of {} answer", c.live_nodes, c.nodes)),
        ("meta leader", leader),
        ("meta replicas", replicas(&meta)),
        ("meta quorum", quorum(&meta)),
        ("streams", show_count(c.streams)),
        ("shards", show_count(c.shards)),
        ("groups", show_count(c.groups)),
        ("catalog", format!("revision {}", c.revision)),
        (
            "a lost node is replaced after",
            show_duration_us(settings.replace_after_us),
        ),
        ("answered by", format!("n{}", c.answered_by)),
    ])
}

pub(super) fn plan(plan: &PlanResponse) -> Table {
    let mut table = output::table(&["planned", "why", "waits for"]);
    for action in &plan.actions {
        table.add_row([action.action.clone(), action.why.clone(), action.blocked_by.clone()]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_are_shown_with_their_marks() {
        let replica = |name: &str, leader, voter, state: ReplicaState| ReplicaReport {
            node_name: name.into(),
            leader,
            voter,
            state: state.into(),
            ..ReplicaReport::default()
        };
        let group = GroupReport {
            replicas: vec![
                replica("n1", true, true, ReplicaState::Current),
                replica("n2", false, true, ReplicaState::Current),
                replica("n3", false, true, ReplicaState::Offline),
                replica("n4", false, false, ReplicaState::Lagging),
            ],
            ..GroupReport::default()
        };
        assert_eq!(replicas(&group), "n1*, n2, n3!, (n4!)");
    }
}
