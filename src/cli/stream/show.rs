//! Streams for people and programs.

use comfy_table::Table;
use serde_json::{Value, json};

use crate::cli::output;
use crate::cli::units::{show_count, show_duration_us, show_lag, show_size, show_time_us};
use crate::client::proto::{
    DiscardPolicy, Partitioning, Placement, Replica, Shard, Stream, StreamState, partitioning::By,
};

fn state(stream: &Stream) -> &'static str {
    match stream.state() {
        StreamState::Unspecified => "unknown",
        StreamState::Creating => "creating",
        StreamState::Active => "active",
        StreamState::Removed => "removed",
    }
}

/// Also what is wrong with its shards.
fn whole_state(stream: &Stream) -> String {
    let unled = stream.shards.iter().filter(|s| s.leader_node.is_none()).count();
    match (stream.state(), unled) {
        (StreamState::Active, 1..) => format!(
            "active; no leader answers for {unled} of {} shards",
            stream.shards.len()
        ),
        _ => state(stream).to_owned(),
    }
}

fn partitioning(p: Option<&Partitioning>) -> String {
    match p.and_then(|p| p.by.as_ref()) {
        None | Some(By::Subject(_)) => "subject".to_owned(),
        Some(By::Key(_)) => "key".to_owned(),
        Some(By::SubjectTokens(t)) => {
            let positions: Vec<_> = t.positions.iter().map(u32::to_string).collect();
            format!("tokens:{}", positions.join(","))
        }
    }
}

fn placement(placement: Option<&Placement>) -> String {
    let Some(Placement { zones, tags }) = placement.filter(|p| !p.zones.is_empty() || !p.tags.is_empty()) else {
        return "any node".to_owned();
    };
    let mut parts: Vec<_> = tags.iter().map(|(key, value)| format!("tag:{key}={value}")).collect();
    if !zones.is_empty() {
        parts.insert(0, format!("zone={}", zones.join(",")));
    }
    parts.join(" ")
}

fn total(stream: &Stream) -> (u64, u64) {
    (
        stream.shards.iter().map(|s| s.messages).sum(),
        stream.shards.iter().map(|s| s.bytes).sum(),
    )
}

pub(super) fn list(streams: &[Stream]) -> Table {
    let mut table = output::table(&[
        "name",
        "subjects",
        ">shards",
        ">replicas",
        ">messages",
        ">size",
        "last message",
        "created",
        "state",
    ]);
    for stream in streams {
        let spec = stream.spec.clone().unwrap_or_default();
        let (messages, bytes) = total(stream);
        let last = stream.shards.iter().filter_map(|s| s.last_time_us).max();
        table.add_row([
            spec.name,
            spec.subjects.join(", "),
            spec.shards.to_string(),
            spec.replicas.to_string(),
            show_count(messages),
            show_size(bytes),
            last.map(show_time_us).unwrap_or_default(),
            show_time_us(stream.created_us),
            whole_state(stream),
        ]);
    }
    table
}

pub(super) fn describe(stream: &Stream) -> String {
    let spec = stream.spec.clone().unwrap_or_default();
    let limits = spec.limits.unwrap_or_default();
    let (messages, bytes) = total(stream);
    let unlimited = || "no limit".to_owned();
    let mut pairs = vec![
        ("name", spec.name),
        ("namespace", spec.namespace),
        (
            "id",
            format!(
                "{} (epoch {}, revision {})",
                stream.stream_id, stream.epoch, stream.revision
            ),
        ),
        ("state", state(stream).to_owned()),
    ];
    if let Some(until) = stream.removed_until_us {
        pairs.push(("kept until", show_time_us(until)));
    }
    if !spec.description.is_empty() {
        pairs.push(("description", spec.description));
    }
    pairs.extend([
        ("created", show_time_us(stream.created_us)),
        ("subjects", spec.subjects.join("\n")),
        (
            "shards",
            format!("{}, by {}", spec.shards, partitioning(spec.partitioning.as_ref())),
        ),
        ("replicas", spec.replicas.to_string()),
        ("placement", placement(spec.placement.as_ref())),
        ("messages", show_count(messages)),
        ("size", show_size(bytes)),
        (
            "max age",
            limits.max_age_us.map(show_duration_us).unwrap_or_else(unlimited),
        ),
        (
            "max bytes",
            limits
                .max_bytes
                .map(|b| format!("{} per shard", show_size(b)))
                .unwrap_or_else(unlimited),
        ),
        (
            "max messages",
            limits
                .max_messages
                .map(|n| format!("{} per shard", show_count(n)))
                .unwrap_or_else(unlimited),
        ),
        (
            "max message size",
            limits
                .max_message_bytes
                .map(|b| show_size(b.into()))
                .unwrap_or_else(|| "the server's limit".to_owned()),
        ),
        (
            "when full",
            match limits.discard() {
                DiscardPolicy::Unspecified | DiscardPolicy::Old => "the oldest messages make room",
                DiscardPolicy::New => "new messages are refused",
            }
            .to_owned(),
        ),
        (
            "message ids",
            match spec.duplicate_window_us {
                Some(0) => "not remembered".to_owned(),
                Some(us) => format!("remembered for {}", show_duration_us(us)),
                None => "remembered for 2m".to_owned(),
            },
        ),
    ]);
    for (key, value) in spec.metadata {
        pairs.push(("metadata", format!("{key}={value}")));
    }
    output::pairs(&pairs)
}

pub(super) fn shards(stream: &Stream) -> Table {
    let mut table = output::table(&[
        ">shard",
        ">first",
        ">next",
        ">messages",
        ">size",
        "replicas",
        ">term",
        "last message",
        "notes",
    ]);
    for shard in &stream.shards {
        table.add_row([
            shard.index.to_string(),
            shard.floor.to_string(),
            shard.tail.to_string(),
            show_count(shard.messages),
            show_size(shard.bytes),
            replicas(shard),
            shard.term.to_string(),
            shard.last_time_us.map(show_time_us).unwrap_or_default(),
            notes(shard),
        ]);
    }
    table
}

fn name(replica: &Replica) -> String {
    match replica.node_name.as_str() {
        "" => format!("n{}", replica.node_id),
        name => name.to_owned(),
    }
}

/// "n1*, n2, n3!": the leader has a star; what is not current an exclamation mark; learners are in brackets.
fn replicas(shard: &Shard) -> String {
    let told = shard.replicas.iter().map(|r| {
        let mark = match r.state.as_str() {
            _ if r.leader => "*",
            "current" => "",
            _ => "!",
        };
        let text = format!("{}{mark}", name(r));
        if r.learner { format!("({text})") } else { text }
    });
    told.collect::<Vec<_>>().join(", ")
}

fn notes(shard: &Shard) -> String {
    let mut notes = Vec::new();
    if shard.leader_node.is_none() {
        notes.push("NO LEADER".to_owned());
    }
    for r in shard.replicas.iter().filter(|r| r.state != "current") {
        let lag = show_lag(r.lag_entries, Some(r.lag_bytes), Some(r.lag_us));
        let behind = if lag.is_empty() { lag } else { format!(", {lag} behind") };
        notes.push(format!("{} {}{behind}", name(r), r.state));
    }
    notes.join("; ")
}

pub(super) fn json(stream: &Stream) -> Value {
    let spec = stream.spec.clone().unwrap_or_default();
    let limits = spec.limits.unwrap_or_default();
    let shards: Vec<_> = stream
        .shards
        .iter()
        .map(|s| {
            let replicas: Vec<_> = s
                .replicas
                .iter()
                .map(|r| {
                    json!({
                        "replica_id": r.replica_id, "node_id": r.node_id, "leader": r.leader, "state": r.state,
                        "node": r.node_name, "learner": r.learner, "lag_entries": r.lag_entries,
                        "lag_bytes": r.lag_bytes, "lag_us": r.lag_us,
                    })
                })
                .collect();
            json!({
                "index": s.index, "shard_id": s.shard_id, "group_id": s.group_id, "leader_node": s.leader_node,
                "term": s.term, "floor": s.floor, "tail": s.tail, "messages": s.messages, "bytes": s.bytes,
                "first_time_us": s.first_time_us, "last_time_us": s.last_time_us, "replicas": replicas,
            })
        })
        .collect();
    let (messages, bytes) = total(stream);
    json!({
        "name": spec.name,
        "namespace": spec.namespace,
        "stream_id": stream.stream_id,
        "epoch": stream.epoch,
        "revision": stream.revision,
        "state": state(stream),
        "removed_until_us": stream.removed_until_us,
        "created_us": stream.created_us,
        "description": spec.description,
        "subjects": spec.subjects,
        "partition_by": partitioning(spec.partitioning.as_ref()),
        "replicas": spec.replicas,
        "placement": spec.placement.as_ref().map(|p| json!({ "zones": p.zones, "tags": p.tags })),
        "dedicated": spec.dedicated,
        "limits": {
            "max_age_us": limits.max_age_us,
            "max_bytes": limits.max_bytes,
            "max_messages": limits.max_messages,
            "max_message_bytes": limits.max_message_bytes,
            "discard": match limits.discard() {
                DiscardPolicy::Unspecified | DiscardPolicy::Old => "old",
                DiscardPolicy::New => "new",
            },
        },
        "duplicate_window_us": spec.duplicate_window_us,
        "duplicate_ids_max": spec.duplicate_ids_max,
        "metadata": spec.metadata,
        "messages": messages,
        "bytes": bytes,
        "shards": shards,
    })
}
