//! The cluster for programs.

use serde_json::{Value, json};

use super::show::{node_state, reason, replica_state};
use crate::client::proto::{
    ClusterEvent, GetClusterResponse, GetReportResponse, GroupReport, Node, PlanResponse, Problem, ProblemKind,
    ReplicaChangeReport, cluster_event::Kind,
};

pub(super) fn cluster_json(c: &GetClusterResponse) -> Value {
    let settings = c.settings.unwrap_or_default();
    json!({
        "cluster_id": c.cluster_id, "name": c.name, "version": c.version, "cluster_version": c.cluster_version,
        "cluster_version_known": c.cluster_version_known, "held_back_by": c.held_back_by,
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
        "used_bytes": n.used_bytes, "version": n.version, "cluster_version_max": n.cluster_version_max,
        "meta_role": n.meta_role,
        "registered_us": n.registered_us, "restarted_us": n.restarted_us, "last_heard_us": n.last_heard_us,
        "silence": n.silence, "alarms": n.alarms, "replicas_coming": n.replicas_coming,
        "replicas_leaving": n.replicas_leaving,
    })
}

fn change_json(change: &ReplicaChangeReport) -> Value {
    json!({
        "reason": reason(change), "why": change.why, "started_us": change.started_us, "add_nodes": change.add_nodes,
        "remove_nodes": change.remove_nodes, "waiting_for": change.waiting_for, "ready": change.ready,
        "bytes_left": change.bytes_left, "bytes_per_second": change.bytes_per_second,
    })
}

fn group_json(g: &GroupReport) -> Value {
    let replicas: Vec<_> = g
        .replicas
        .iter()
        .map(|r| {
            json!({
                "replica_id": r.replica_id, "node_id": r.node_id, "node": r.node_name, "state": replica_state(r),
                "leader": r.leader, "voter": r.voter, "lag_entries": r.lag_entries, "lag_bytes": r.lag_bytes,
                "lag_us": r.lag_us, "last_ack_us": r.last_ack_us, "offline_since_us": r.offline_since_us,
                "snapshot_bytes": r.snapshot_bytes, "snapshot_total_bytes": r.snapshot_total_bytes,
                "snapshot_bytes_per_second": r.snapshot_bytes_per_second,
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

pub(super) fn report_json(report: &GetReportResponse, planned: &PlanResponse) -> Value {
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
        "planned": actions_json(planned),
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

fn actions_json(plan: &PlanResponse) -> Value {
    let actions = plan.actions.iter();
    actions
        .map(|a| json!({ "action": a.action, "why": a.why, "blocked_by": a.blocked_by, "group_id": a.group_id }))
        .collect()
}

pub(super) fn plan_json(plan: &PlanResponse) -> Value {
    let silent = plan
        .silent_nodes
        .iter()
        .map(|n| json!({ "node_id": n.node_id, "reason": n.reason }));
    json!({ "actions": actions_json(plan), "silent_nodes": silent.collect::<Value>() })
}
