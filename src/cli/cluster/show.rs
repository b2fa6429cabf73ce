//! The cluster for people and programs.

use std::collections::HashMap;

use comfy_table::Table;
use serde_json::{Value, json};

use crate::cli::output;
use crate::cli::units::{show_count, show_duration_us, show_size, show_time_us};
use crate::client::proto::{
    ClusterEvent, GetClusterResponse, GetReportResponse, GroupReport, Node, NodeState, PlanResponse, Problem,
    ProblemKind, ReplicaChangeReason, ReplicaChangeReport, ReplicaReport, ReplicaState, ShardReport,
    cluster_event::Kind,
};

fn node_state(node: &Node) -> &'static str {
    match node.state() {
        NodeState::Unspecified => "unknown",
        NodeState::Active => "active",
        NodeState::Draining => "draining",
        NodeState::Removed => "removed",
    }
}

fn replica_state(replica: &ReplicaReport) -> &'static str {
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

/// What is to be said of replicas that are not current.
fn lagging(group: &GroupReport, now_us: u64) -> String {
    let behind = group
        .replicas
        .iter()
        .filter(|r| r.state() != ReplicaState::Current)
        .map(|r| {
            let mut text = format!("{} {}", r.node_name, replica_state(r));
            if let Some(lag) = r.lag_entries.filter(|lag| *lag > 0) {
                text.push_str(&format!(", {} entries behind", show_count(lag)));
            }
            if let Some(bytes) = r.snapshot_bytes {
                text.push_str(&format!(", {} of a snapshot sent", show_size(bytes)));
            }
            if let Some(since) = r.offline_since_us {
                text.push_str(&format!(" for {}", ago(since, now_us)));
            }
            text
        });
    let mut notes: Vec<_> = behind.collect();
    if let Some(change) = &group.change {
        notes.push(change_text(change));
    }
    notes.join("; ")
}

fn ago(at_us: u64, now_us: u64) -> String {
    // To the second: more is noise.
    show_duration_us(now_us.saturating_sub(at_us) / 1_000_000 * 1_000_000)
}

fn reason(change: &ReplicaChangeReport) -> &'static str {
    match change.reason() {
        ReplicaChangeReason::Unspecified => "unknown",
        ReplicaChangeReason::Heal => "heal",
        ReplicaChangeReason::Scale => "scale",
        ReplicaChangeReason::Drain => "drain",
        ReplicaChangeReason::Move => "move",
        ReplicaChangeReason::Balance => "balance",
    }
}

fn change_text(change: &ReplicaChangeReport) -> String {
    let nodes = |ids: &[u64], sign: &str| ids.iter().map(|id| format!(" {sign}n{id}")).collect::<String>();
    let waits = match change.waiting_for.as_str() {
        "" => String::new(),
        text => format!(", waits: {text}"),
    };
    format!(
        "{}{}{} ({}){waits}",
        reason(change),
        nodes(&change.add_nodes, "+"),
        nodes(&change.remove_nodes, "-"),
        change.why
    )
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
pub(in crate::cli) fn shard_table<'a>(
    shards: impl Iterator<Item = &'a ShardReport>,
    report: &GetReportResponse,
) -> Table {
    let groups = group_names(report);
    let mut table = output::table(&[
        "shard",
        "group",
        "leader since",
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
        let mut notes = lagging(group, report.time_us);
        if shard.moving {
            notes = format!("moving between groups; {notes}");
        }
        if shard.leaderless {
            notes = format!("NO LEADER; {notes}");
        }
        table.add_row([
            format!("{}/{}", shard.stream, shard.index),
            format!("g{}", shard.group_id),
            group.leader_since_us.map(show_time_us).unwrap_or_default(),
            group.term.to_string(),
            replicas(group),
            quorum(group),
            group
                .last_quorum_ack_us
                .map(|at| format!("{} ago", ack_age(report.time_us.saturating_sub(at))))
                .unwrap_or_default(),
            shard.messages.map(show_count).unwrap_or_default(),
            shard.bytes.map(show_size).unwrap_or_default(),
            notes.trim_end_matches([' ', ';']).to_owned(),
        ]);
    }
    table
}

fn ack_age(us: u64) -> String {
    if us < 1_000_000 {
        format!("{} ms", us / 1_000)
    } else {
        show_duration_us(us / 1_000_000 * 1_000_000)
    }
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

pub(super) fn report(report: &GetReportResponse, only_problems: bool, with_groups: bool) -> String {
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
                lagging(group, report.time_us),
            ]);
        }
        page.push_str(&format!("\n{table}\n"));
    }
    for m in &report.moves {
        page.push_str(&format!(
            "\n{}/{}: on its way from g{} to g{}, {} for {}",
            m.stream,
            m.index,
            m.from_group,
            m.to_group,
            m.step,
            ago(m.started_us, report.time_us)
        ));
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
            format!("{} (cluster version {})", c.version, c.cluster_version),
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

pub(super) fn cluster_json(c: &GetClusterResponse) -> Value {
    let settings = c.settings.unwrap_or_default();
    json!({
        "cluster_id": c.cluster_id, "name": c.name, "version": c.version, "cluster_version": c.cluster_version,
        "revision": c.revision, "nodes": c.nodes, "live_nodes": c.live_nodes, "streams": c.streams,
        "shards": c.shards, "groups": c.groups, "answered_by": c.answered_by,
        "meta": c.meta.as_ref().map(group_json),
        "settings": {
            "meta_voters_max": settings.meta_voters_max,
            "replace_after_us": settings.replace_after_us,
            "moves_per_node_max": settings.moves_per_node_max,
        },
    })
}

pub(in crate::cli) fn node_json(n: &Node) -> Value {
    json!({
        "node_id": n.node_id, "name": n.name, "zone": n.zone, "tags": n.tags, "state": node_state(n), "live": n.live,
        "incarnation": n.incarnation, "client_address": n.client_address, "peer_address": n.peer_address,
        "replicas": n.replicas, "leaders": n.leaders, "bytes": n.bytes, "free_bytes": n.free_bytes,
        "used_bytes": n.used_bytes, "version": n.version, "meta_role": n.meta_role,
        "registered_us": n.registered_us, "restarted_us": n.restarted_us, "last_heard_us": n.last_heard_us,
        "silence": n.silence, "alarms": n.alarms, "replicas_coming": n.replicas_coming,
        "replicas_leaving": n.replicas_leaving,
    })
}

fn change_json(change: &ReplicaChangeReport) -> Value {
    json!({
        "reason": reason(change), "why": change.why, "started_us": change.started_us, "add_nodes": change.add_nodes,
        "remove_nodes": change.remove_nodes, "waiting_for": change.waiting_for, "ready": change.ready,
    })
}

fn group_json(g: &GroupReport) -> Value {
    let replicas: Vec<_> = g
        .replicas
        .iter()
        .map(|r| {
            json!({
                "replica_id": r.replica_id, "node_id": r.node_id, "node": r.node_name, "state": replica_state(r),
                "leader": r.leader, "voter": r.voter, "lag_entries": r.lag_entries, "last_ack_us": r.last_ack_us,
                "offline_since_us": r.offline_since_us, "snapshot_bytes": r.snapshot_bytes,
            })
        })
        .collect();
    json!({
        "group_id": g.group_id, "pooled": g.pooled, "shards": g.shards, "leader_node": g.leader_node,
        "leader_replica": g.leader_replica, "term": g.term, "leader_since_us": g.leader_since_us,
        "replicas": replicas, "voters": g.voters, "learners": g.learners, "quorum_have": g.quorum_have,
        "quorum_need": g.quorum_need, "last_quorum_ack_us": g.last_quorum_ack_us, "leaderless": g.leaderless,
        "under_replicated": g.under_replicated, "replicas_wanted": g.replicas_wanted,
        "change": g.change.as_ref().map(change_json), "epoch": g.epoch, "bytes": g.bytes,
    })
}

pub(in crate::cli) fn groups_json(report: &GetReportResponse) -> Value {
    report.groups.iter().map(group_json).collect()
}

pub(in crate::cli) fn shards_json(report: &GetReportResponse) -> Value {
    let shards = report.shards.iter().map(|s| {
        json!({
            "namespace": s.namespace, "stream": s.stream, "stream_id": s.stream_id, "index": s.index,
            "shard_id": s.shard_id, "group_id": s.group_id, "leader_node": s.leader_node, "floor": s.floor,
            "tail": s.tail, "messages": s.messages, "bytes": s.bytes, "last_time_us": s.last_time_us,
            "leaderless": s.leaderless, "under_replicated": s.under_replicated,
            "replicas_wanted": s.replicas_wanted, "moving": s.moving,
        })
    });
    shards.collect()
}

fn problem_json(p: &Problem) -> Value {
    let kind = match p.kind() {
        ProblemKind::Unspecified => "unknown",
        ProblemKind::NodeSilent => "node_silent",
        ProblemKind::Leaderless => "leaderless",
        ProblemKind::NoQuorum => "no_quorum",
        ProblemKind::UnderReplicated => "under_replicated",
        ProblemKind::Damaged => "damaged",
        ProblemKind::Alarm => "alarm",
    };
    json!({ "kind": kind, "text": p.text, "next": p.next, "node_id": p.node_id, "group_id": p.group_id })
}

fn summary_json(report: &GetReportResponse) -> Value {
    let s = report.summary.unwrap_or_default();
    json!({
        "shards": s.shards, "groups": s.groups, "leaderless_shards": s.leaderless_shards,
        "leaderless_groups": s.leaderless_groups, "under_replicated_shards": s.under_replicated_shards,
        "under_replicated_groups": s.under_replicated_groups, "no_quorum_groups": s.no_quorum_groups,
        "changes": s.changes, "moves": s.moves, "nodes": s.nodes, "live_nodes": s.live_nodes,
    })
}

pub(super) fn report_json(report: &GetReportResponse) -> Value {
    let silent = report
        .silent_nodes
        .iter()
        .map(|n| json!({ "node_id": n.node_id, "name": n.name, "reason": n.reason, "last_heard_us": n.last_heard_us }));
    let moves = report.moves.iter().map(|m| {
        json!({
            "namespace": m.namespace, "stream": m.stream, "index": m.index, "shard_id": m.shard_id,
            "from_group": m.from_group, "to_group": m.to_group, "step": m.step, "started_us": m.started_us,
        })
    });
    json!({
        "summary": summary_json(report),
        "meta": report.meta.as_ref().map(group_json),
        "shards": shards_json(report),
        "groups": groups_json(report),
        "moves": moves.collect::<Value>(),
        "problems": report.problems.iter().map(problem_json).collect::<Value>(),
        "silent_nodes": silent.collect::<Value>(),
        "time_us": report.time_us,
        "revision": report.revision,
        "answered_by": report.answered_by,
    })
}

pub(super) fn health_json(report: &GetReportResponse, well: bool) -> Value {
    json!({
        "healthy": well,
        "summary": summary_json(report),
        "problems": report.problems.iter().map(problem_json).collect::<Value>(),
    })
}

pub(super) fn event_json(event: &ClusterEvent) -> Value {
    let mut value = json!({ "time_us": event.time_us, "text": event.text });
    let (kind, more) = match &event.kind {
        None => ("unknown", json!({})),
        Some(Kind::Watching(w)) => ("watching", json!({ "revision": w.revision })),
        Some(Kind::Leader(l)) => (
            "leader",
            json!({
                "group_id": l.group_id, "term": l.term, "leader_node": l.leader_node,
                "former_leader_node": l.former_leader_node,
            }),
        ),
        Some(Kind::NodeUp(n)) => (
            "node_up",
            json!({ "node_id": n.node_id, "name": n.name, "incarnation": n.incarnation }),
        ),
        Some(Kind::NodeDown(n)) => (
            "node_down",
            json!({ "node_id": n.node_id, "name": n.name, "reason": n.reason }),
        ),
        Some(Kind::NodeState(n)) => ("node_state", json!({ "node_id": n.node_id, "name": n.name })),
        Some(Kind::ChangeStarted(c)) => (
            "change_started",
            json!({ "group_id": c.group_id, "change": c.change.as_ref().map(change_json) }),
        ),
        Some(Kind::ChangeEnded(c)) => ("change_ended", json!({ "group_id": c.group_id })),
        Some(Kind::Problem(p)) => ("problem", json!({ "problem": p.problem.as_ref().map(problem_json) })),
        Some(Kind::Solved(p)) => ("solved", json!({ "problem": p.problem.as_ref().map(problem_json) })),
    };
    if let (Some(all), Value::Object(more)) = (value.as_object_mut(), more) {
        all.insert("kind".to_owned(), kind.into());
        all.extend(more);
    }
    value
}

pub(super) fn plan(plan: &PlanResponse) -> Table {
    let mut table = output::table(&["action", "why", "blocked by"]);
    for action in &plan.actions {
        table.add_row([action.action.clone(), action.why.clone(), action.blocked_by.clone()]);
    }
    table
}

pub(super) fn plan_json(plan: &PlanResponse) -> Value {
    let actions = plan
        .actions
        .iter()
        .map(|a| json!({ "action": a.action, "why": a.why, "blocked_by": a.blocked_by, "group_id": a.group_id }));
    let silent = plan
        .silent_nodes
        .iter()
        .map(|n| json!({ "node_id": n.node_id, "reason": n.reason }));
    json!({ "actions": actions.collect::<Value>(), "silent_nodes": silent.collect::<Value>() })
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
