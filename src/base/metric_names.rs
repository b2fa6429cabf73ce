//! Every metric, in one table: name, kind, unit, labels, help. `docs/reference/metrics.md` is made from it, and a test
//! holds that no metric is emitted under a name that is not here, and that none is here that nobody emits.
//!
//! Names follow `<area>_<noun>_<unit>[_total]`: areas are those of the module map, counters and only counters end in
//! `_total`, and a counter of things needs no unit. Labels are from closed sets only: never a stream, a subject or an
//! address.

use std::fmt::Write as _;

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    /// As written in the reference.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    /// The constant by which code names it.
    pub constant: &'static str,
    pub kind: Kind,
    /// "bytes", "seconds", "messages" …: the last part of the name (before `_total`).
    pub unit: &'static str,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

macro_rules! metric_table {
    ($($constant:ident = $name:literal, $kind:ident, $unit:literal, [$($label:literal),*], $help:literal;)*) => {
        $(#[doc = $help] pub const $constant: &str = $name;)*

        /// Every metric.
        pub const ALL: &[Metric] = &[$(Metric {
            name: $name,
            constant: stringify!($constant),
            kind: Kind::$kind,
            unit: $unit,
            labels: &[$($label),*],
            help: $help,
        }),*];
    };
}

// Add a line here, use the constant, and run `cargo test --release --test docs_sync` with UPDATE_DOCS=1.
metric_table! {
    API_REQUESTS_TOTAL = "api_requests_total", Counter, "requests", ["method", "code"],
        "gRPC requests ended (for a session: when it ends), by method and gRPC status code.";
    API_REQUEST_DURATION_SECONDS = "api_request_duration_seconds", Histogram, "seconds", ["method"],
        "Time from a gRPC request's arrival to the head of its response: for a unary call, its answer; for a session, its opening.";
    API_OPEN_SESSIONS = "api_open_sessions", Gauge, "sessions", ["kind"],
        "Sessions open now, by kind: publish, read.";
    API_OPEN_REQUESTS = "api_open_requests", Gauge, "requests", ["method"],
        "gRPC requests and sessions open now.";
    BROKER_PUBLISHES_TOTAL = "broker_publishes_total", Counter, "publishes", ["outcome", "reason"],
        "Batches (of a session, or a unary publish's for one shard) by outcome: stored, duplicate, refused; for the refused the reason word of the errors' reference, else none.";
    BROKER_PUBLISHED_MESSAGES_TOTAL = "broker_published_messages_total", Counter, "messages", [],
        "Messages stored.";
    BROKER_PUBLISHED_BYTES_TOTAL = "broker_published_bytes_total", Counter, "bytes", [],
        "Bytes of stored batches, as encoded by their producers.";
    BROKER_READ_MESSAGES_TOTAL = "broker_read_messages_total", Counter, "messages", [],
        "Messages handed to clients, in sessions and in answers.";
    BROKER_READ_BYTES_TOTAL = "broker_read_bytes_total", Counter, "bytes", [],
        "Bytes of batches and messages handed to clients.";
    BROKER_PUBLISH_DURATION_SECONDS = "broker_publish_duration_seconds", Histogram, "seconds", [],
        "Time from a batch's arrival at its shard to its outcome.";
    BROKER_ENTRY_BYTES = "broker_entry_bytes", Histogram, "bytes", [],
        "Bytes of the batches in one log entry.";
    BROKER_ENTRY_ITEMS = "broker_entry_items", Histogram, "items", [],
        "Batches in one log entry.";
    BROKER_EXPIRY_RUNS_TOTAL = "broker_expiry_runs_total", Counter, "runs", [],
        "Times that a shard's messages, ids or producers were removed because of their age.";
    RAFT_PROPOSALS_TOTAL = "raft_proposals_total", Counter, "proposals", [],
        "Entries proposed to this node's groups.";
    RAFT_APPLY_DURATION_SECONDS = "raft_apply_duration_seconds", Histogram, "seconds", [],
        "Time to apply as many committed entries of one group as were at hand.";
    RAFT_HELD_GROUPS = "raft_held_groups", Gauge, "groups", [],
        "Groups that have a replica on this node.";
    RAFT_LED_GROUPS = "raft_led_groups", Gauge, "groups", [],
        "Groups that this node leads.";
    RAFT_LEADER_CHANGES_TOTAL = "raft_leader_changes_total", Counter, "changes", [],
        "Leaders that this node's replicas have learned of after their first: each is another leader, or the same one of a later term.";
    RAFT_PEER_SESSIONS = "raft_peer_sessions", Gauge, "sessions", [],
        "Sessions to other nodes that this node has made and that live: one for each node, if all is well.";
    RAFT_PEER_SENT_BYTES_TOTAL = "raft_peer_sent_bytes_total", Counter, "bytes", [],
        "About how many bytes were sent to other nodes on sessions: log entries, heartbeats, votes, calls, and answers to them. Snapshots are apart.";
    RAFT_PEER_RECEIVED_BYTES_TOTAL = "raft_peer_received_bytes_total", Counter, "bytes", [],
        "Bytes received from other nodes on sessions.";
    RAFT_PEER_UNANSWERED_BYTES = "raft_peer_unanswered_bytes", Gauge, "bytes", [],
        "Bytes that other nodes have not answered yet.";
    RAFT_PEER_CALLS_TOTAL = "raft_peer_calls_total", Counter, "calls", ["outcome"],
        "Calls of other nodes (heartbeats, votes, publishes and reads passed on, reports), by outcome: answered; lost: the session ended; given_up: nobody waited any more.";
    RAFT_PEER_ROUND_TRIP_SECONDS = "raft_peer_round_trip_seconds", Histogram, "seconds", [],
        "Time from a heartbeat or vote to its answer: the round trip to another node, and what either side was busy with.";
    RAFT_SNAPSHOT_SENT_BYTES_TOTAL = "raft_snapshot_sent_bytes_total", Counter, "bytes", [],
        "Bytes of snapshots sent to replicas that the log could not catch up.";
    RAFT_SNAPSHOT_RECEIVED_BYTES_TOTAL = "raft_snapshot_received_bytes_total", Counter, "bytes", [],
        "Bytes of snapshots received.";
    RAFT_SNAPSHOT_REUSED_BYTES_TOTAL = "raft_snapshot_reused_bytes_total", Counter, "bytes", [],
        "Bytes of snapshots that did not travel because this node had them already.";
    RAFT_SNAPSHOT_RUNNING_TRANSFERS = "raft_snapshot_running_transfers", Gauge, "transfers", ["way"],
        "Snapshots that travel now, by way: `sent` or `received`.";
    RAFT_SNAPSHOT_INSTALLS_TOTAL = "raft_snapshot_installs_total", Counter, "installs", [],
        "Snapshots sent from here that were installed.";
    RAFT_SNAPSHOT_FAILURES_TOTAL = "raft_snapshot_failures_total", Counter, "failures", [],
        "Snapshots that were not received to their end, or not installed.";
    NODE_CLIENT_CONNECTIONS = "node_client_connections", Gauge, "connections", [],
        "Client connections open now.";
    NODE_CONNECTION_REFUSALS_TOTAL = "node_connection_refusals_total", Counter, "refusals", [],
        "Client connections closed at once because as many as allowed were open.";
    NODE_ALARM_STATE = "node_alarm_state", Gauge, "state", ["alarm"],
        "1 while an alarm of this name is on, else 0.";
    NODE_READY_STATE = "node_ready_state", Gauge, "state", [],
        "1 while the node is ready to serve, else 0.";
    NODE_START_TIME_SECONDS = "node_start_time_seconds", Gauge, "seconds", [],
        "When the node started, in seconds since the Unix epoch.";
    NODE_CLOCK_DISAGREEMENT_SECONDS = "node_clock_disagreement_seconds", Gauge, "seconds", [],
        "How far the wall clock is ahead of the time stamped on messages (negative: behind).";
    NODE_STORED_STREAMS = "node_stored_streams", Gauge, "streams", [],
        "Streams this node holds.";
    NODE_STORED_MESSAGES = "node_stored_messages", Gauge, "messages", [],
        "Messages this node holds, over all shards.";
    NODE_STORED_BYTES = "node_stored_bytes", Gauge, "bytes", [],
        "Bytes of messages this node holds, over all shards, before compression.";
    NODE_DISK_USED_BYTES = "node_disk_used_bytes", Gauge, "bytes", [],
        "Bytes the data directory occupies.";
    NODE_DISK_FREE_BYTES = "node_disk_free_bytes", Gauge, "bytes", [],
        "Bytes free on the file system of the data directory.";
    BASE_BUDGET_USED_BYTES = "base_budget_used_bytes", Gauge, "bytes", ["budget"],
        "Bytes taken of a memory budget.";
    BASE_BUDGET_LIMIT_BYTES = "base_budget_limit_bytes", Gauge, "bytes", ["budget"],
        "The size of a memory budget.";
    BASE_BUDGET_REFUSALS_TOTAL = "base_budget_refusals_total", Counter, "refusals", ["budget"],
        "Requests refused because a memory budget was used up.";
    BASE_MAILBOX_DEPTH_ITEMS = "base_mailbox_depth_items", Gauge, "items", ["mailbox"],
        "Items waiting in mailboxes of this name.";
    BASE_MAILBOX_REFUSALS_TOTAL = "base_mailbox_refusals_total", Counter, "refusals", ["mailbox"],
        "Items refused because a mailbox was full.";
    BASE_TASK_FAILURES_TOTAL = "base_task_failures_total", Counter, "failures", [],
        "Tasks that panicked, or ended though they must not.";
}

/// Tells the installed recorder the kind, unit and help of every metric, and makes every counter without labels exist
/// from the start, so that a rate over it is right from its first step.
pub fn describe_all() {
    for metric in ALL {
        match metric.kind {
            Kind::Counter => {
                metrics::describe_counter!(metric.name, metric.help);
                if metric.labels.is_empty() {
                    metrics::counter!(metric.name).absolute(0);
                }
            }
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

/// The reference page: `docs/reference/metrics.md`.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         Served in the Prometheus text format at `/metrics` of the Prometheus listener (`--prometheus-listen-on`); where \
         none is given, of the monitor listener.\n\n\
         Names follow `<area>_<noun>_<unit>[_total]`. Labels come from closed sets: no metric has a label for a stream, a \
         subject or an address.\n\n\
         <!-- Made from src/base/metric_names.rs; `UPDATE_DOCS=1 cargo test --release --test docs_sync` writes it anew. -->\n\n\
         | name | kind | unit | labels | what |\n|---|---|---|---|---|\n",
    );
    let mut metrics: Vec<_> = ALL.iter().collect();
    metrics.sort_by_key(|metric| metric.name);
    for Metric {
        name,
        kind,
        unit,
        labels,
        help,
        constant: _,
    } in metrics
    {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        writeln!(
            page,
            "| `{name}` | {} | {unit} | {} | {help} |",
            kind.as_str(),
            labels.join(", ")
        )
        .expect("a string takes any text");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const AREAS: [&str; 9] = [
        "api", "base", "broker", "control", "machine", "monitor", "node", "raft", "storage",
    ];

    #[test]
    fn names_follow_the_rule() {
        let mut seen = BTreeSet::new();
        for metric in ALL {
            let name = metric.name;
            assert!(seen.insert(name), "{name} is there twice");
            let (area, _) = name.split_once('_').expect("a name has parts");
            assert!(AREAS.contains(&area), "{name}: unknown area");
            assert!(
                name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'),
                "{name}: characters"
            );
            assert_eq!(
                name.ends_with("_total"),
                metric.kind == Kind::Counter,
                "{name}: _total is for counters"
            );
            let stem = name.strip_suffix("_total").unwrap_or(name);
            assert!(
                stem.ends_with(&format!("_{}", metric.unit)),
                "{name}: must end in its unit {}",
                metric.unit
            );
            assert!(metric.help.ends_with('.'), "{name}: help is a sentence");
            assert!(!metric.help.contains('|'), "{name}: help is a cell of a table");
        }
    }
}
