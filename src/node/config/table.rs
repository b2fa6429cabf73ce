//! Every setting, in one table: key, type, flag, environment variable, range, help. The file reader, the flags, the
//! environment, `--print-config` and `docs/reference/config.md` are made from it.

use std::fmt::Write as _;

use super::Config;
use super::human::{Human, Kind};

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// The section of the file.
    pub section: &'static str,
    /// The key within the section.
    pub field: &'static str,
    /// The long flag, without dashes.
    pub flag: &'static str,
    /// The environment variable.
    pub env: &'static str,
    pub kind: Kind,
    /// Lowest and highest, written as a value.
    pub range: Option<(&'static str, &'static str)>,
    pub help: &'static str,
    set: fn(&mut Config, &str) -> Result<(), String>,
    show: fn(&Config) -> Option<String>,
}

impl Setting {
    /// "section.field".
    pub fn key(&self) -> String {
        format!("{}.{}", self.section, self.field)
    }

    /// Reads `text` into the configuration.
    pub fn set(&self, config: &mut Config, text: &str) -> Result<(), String> {
        (self.set)(config, text)
    }

    /// The value in the configuration, as text; none: not set.
    pub fn show(&self, config: &Config) -> Option<String> {
        (self.show)(config).filter(|text| !text.is_empty())
    }

    /// What is allowed, for errors and the reference.
    pub fn allowed(&self) -> String {
        match self.range {
            Some((low, high)) => format!("{low} to {high}"),
            None => self.kind.allowed(),
        }
    }

    /// The default as the reference shows it.
    pub fn default_text(&self) -> String {
        match (self.section, self.field) {
            ("node", "name") => "the host's name".into(),
            _ => self.show(&Config::default()).unwrap_or_else(|| "not set".into()),
        }
    }

    /// The value as TOML.
    pub fn toml(&self, text: &str) -> String {
        if self.kind.is_quoted() {
            toml::Value::String(text.to_owned()).to_string()
        } else {
            text.to_owned()
        }
    }
}

/// The setting with this key.
pub fn find(section: &str, field: &str) -> Option<&'static Setting> {
    SETTINGS
        .iter()
        .find(|setting| setting.section == section && setting.field == field)
}

/// The sections with what they are about, in the order of the reference.
pub const SECTIONS: &[(&str, &str)] = &[
    ("node", "This node."),
    ("cluster", "The cluster it belongs to."),
    (
        "listen",
        "Where it listens. An address that others can reach needs TLS or `insecure`.",
    ),
    ("tls", "TLS of the client listener. Paths are of PEM files."),
    (
        "limits",
        "What bounds memory and connections. Overload is refused early, as not processed.",
    ),
    (
        "storage",
        "The store. The defaults suit a machine with 2 cores and 2 GiB.",
    ),
    ("raft", "Replication."),
    (
        "clock",
        "Messages expire by the wall clock. One that is far off must not empty a stream.",
    ),
    ("log", "Log lines go to standard error."),
];

macro_rules! settings {
    ($($section:ident . $field:ident : $type:ty, $flag:literal, $env:literal, $range:expr, $help:literal;)*) => {
        /// Every setting, section by section.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            section: stringify!($section),
            field: stringify!($field),
            flag: $flag,
            env: $env,
            kind: <$type as Human>::KIND,
            range: $range,
            help: $help,
            set: |config, text| {
                config.$section.$field = <$type as Human>::read(text, $range)?;
                Ok(())
            },
            show: |config| Human::show(&config.$section.$field),
        }),*];
    };
}

use super::human::{Addresses, ByteSize, ClientAuth, LogFilter, LogFormat, Tags};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

settings! {
    node.name: String, "name", "MAINSTEM_NAME", None,
        "The node's name, for people.";
    node.data_dir: PathBuf, "data-dir", "MAINSTEM_DATA_DIR", None,
        "Where the data is. Created if it is missing; one process at a time.";
    node.drain_timeout: Duration, "drain-timeout", "MAINSTEM_DRAIN_TIMEOUT", Some(("0s", "1h")),
        "How long a node that is told to stop waits for its clients to leave and for publishes to be acknowledged.";
    node.zone: Option<String>, "zone", "MAINSTEM_ZONE", None,
        "What fails together with this node: a rack, a room, a data centre. Replicas are spread over zones.";

    node.tags: Option<Tags>, "tags", "MAINSTEM_TAGS", None,
        "What placement may ask of this node, KEY=VALUE with commas between, such as disk=ssd,rack=7: `stream create --placement tag:disk=ssd`.";

    cluster.name: String, "cluster-name", "MAINSTEM_CLUSTER_NAME", None,
        "The cluster's name. Nodes of another name are refused.";
    cluster.bootstrap: bool, "bootstrap", "MAINSTEM_BOOTSTRAP", None,
        "Found a cluster with this node as its first. On a data directory that is in a cluster already: just a restart.";
    cluster.join: Option<Addresses>, "join", "MAINSTEM_JOIN", None,
        "Join a cluster through any of these nodes: HOST:PORT of their peer listeners, with commas between. On a data directory that is in a cluster already: just a restart.";
    cluster.token_file: Option<PathBuf>, "token-file", "MAINSTEM_TOKEN_FILE", None,
        "A file with the cluster's token, the same on every node: who holds it is let in. It is proven, never sent. Only nodes that all listen on loopback may go without.";
    cluster.replace_after: Duration, "replace-after", "MAINSTEM_REPLACE_AFTER", Some(("1s", "30days")),
        "With --bootstrap: how long a node may be gone before its replicas are made anew on others. Set once, when the cluster is founded.";

    listen.client: SocketAddr, "listen", "MAINSTEM_LISTEN", None,
        "For clients: gRPC.";
    listen.peer: Option<SocketAddr>, "peer-listen", "MAINSTEM_PEER_LISTEN", None,
        "For the other nodes of the cluster. Not set: a node without peers.";
    listen.advertise_client: Option<Addresses>, "advertise-client", "MAINSTEM_ADVERTISE_CLIENT", None,
        "Where clients find this node, HOST:PORT. Not set: the address it listens on.";
    listen.advertise_peer: Option<Addresses>, "advertise-peer", "MAINSTEM_ADVERTISE_PEER", None,
        "Where the other nodes find this one, HOST:PORT. Not set: the address it listens on.";
    listen.monitor: SocketAddr, "monitor-listen", "MAINSTEM_MONITOR_LISTEN", None,
        "For health checks and reports: plain HTTP.";
    listen.prometheus: Option<SocketAddr>, "prometheus-listen-on", "MAINSTEM_PROMETHEUS_LISTEN_ON", None,
        "For metrics alone: plain HTTP. Not set: the monitor listener serves them.";
    listen.ports_file: Option<PathBuf>, "ports-file", "MAINSTEM_PORTS_FILE", None,
        "A JSON file with the addresses in use and the process id, written when the node is ready, removed when it stops.";
    listen.insecure: bool, "insecure", "MAINSTEM_INSECURE", None,
        "Allow addresses that others can reach without TLS.";

    tls.cert: Option<PathBuf>, "tls-cert", "MAINSTEM_TLS_CERT", None,
        "The server's certificate chain. Switches TLS on.";
    tls.key: Option<PathBuf>, "tls-key", "MAINSTEM_TLS_KEY", None,
        "Its private key.";
    tls.client_ca: Option<PathBuf>, "tls-client-ca", "MAINSTEM_TLS_CLIENT_CA", None,
        "The authority that signs client certificates. Not set: none is asked for.";
    tls.client_auth: ClientAuth, "tls-client-auth", "MAINSTEM_TLS_CLIENT_AUTH", None,
        "Whether a client must show a certificate, where client_ca is set.";
    tls.peer_ca: Option<PathBuf>, "tls-peer-ca", "MAINSTEM_TLS_PEER_CA", None,
        "The authority that signs the nodes' certificates. Switches TLS between nodes on: each shows tls.cert to the others.";

    limits.publish_memory: ByteSize, "publish-memory", "MAINSTEM_PUBLISH_MEMORY", Some(("16MiB", "3GiB")),
        "Bytes of publishes in the node, from their arrival to their acknowledgement.";
    limits.read_memory: ByteSize, "read-memory", "MAINSTEM_READ_MEMORY", Some(("16MiB", "3GiB")),
        "Bytes of messages read for clients and not yet sent; docs/reference/memory.md says how it is shared.";
    limits.connections_max: u32, "connections-max", "MAINSTEM_CONNECTIONS_MAX", Some(("1", "100000")),
        "Client connections at a time.";
    limits.connection_requests_max: u32, "connection-requests-max", "MAINSTEM_CONNECTION_REQUESTS_MAX", Some(("1", "100000")),
        "Requests and sessions at a time on one connection.";
    limits.stream_window: ByteSize, "stream-window", "MAINSTEM_STREAM_WINDOW", Some(("64KiB", "1GiB")),
        "HTTP/2 flow control: bytes a client may send on one request or session before the node has taken them.";
    limits.connection_window: ByteSize, "connection-window", "MAINSTEM_CONNECTION_WINDOW", Some(("64KiB", "1GiB")),
        "HTTP/2 flow control: the same over all requests and sessions of a connection.";
    limits.sessions_max: u32, "sessions-max", "MAINSTEM_SESSIONS_MAX", Some(("1", "1000000")),
        "Publish and read sessions at a time, over all connections.";

    storage.log_write_buffer: ByteSize, "storage-log-write-buffer", "MAINSTEM_STORAGE_LOG_WRITE_BUFFER", Some(("16MiB", "4GiB")),
        "One write buffer of the log; at most two exist. Several times that of the state, so that most entries are purged before they are written twice.";
    storage.state_write_buffer: ByteSize, "storage-state-write-buffer", "MAINSTEM_STORAGE_STATE_WRITE_BUFFER", Some(("4MiB", "4GiB")),
        "The state is flushed when this much was written to it; at most two such buffers exist.";
    storage.block_cache: ByteSize, "storage-block-cache", "MAINSTEM_STORAGE_BLOCK_CACHE", Some(("4MiB", "1TiB")),
        "Cache of blocks read from disk, shared by log and state.";
    storage.flush_interval: Duration, "storage-flush-interval", "MAINSTEM_STORAGE_FLUSH_INTERVAL", Some(("100ms", "1h")),
        "The state is also flushed when this has passed since its last flush, so that an idle stream does not pin the log.";
    storage.flush_min: ByteSize, "storage-flush-min", "MAINSTEM_STORAGE_FLUSH_MIN", Some(("0", "1GiB")),
        "Less than this is flushed only after twelve such intervals.";
    storage.min_free: ByteSize, "storage-min-free", "MAINSTEM_STORAGE_MIN_FREE", Some(("1MiB", "1TiB")),
        "Below this much free space publishes are refused, as not processed; reads go on.";
    storage.commit_batch_max: ByteSize, "storage-commit-batch-max", "MAINSTEM_STORAGE_COMMIT_BATCH_MAX", Some(("64KiB", "64MiB")),
        "Most bytes in one synced write; a single larger request still goes alone.";
    storage.min_blob: ByteSize, "storage-min-blob", "MAINSTEM_STORAGE_MIN_BLOB", Some(("0", "64MiB")),
        "Batches of at least this size go to blob files, which compaction does not rewrite.";
    storage.blob_file: ByteSize, "storage-blob-file", "MAINSTEM_STORAGE_BLOB_FILE", Some(("1MiB", "16GiB")),
        "A blob file is closed at this size.";
    storage.space_interval: Duration, "storage-space-interval", "MAINSTEM_STORAGE_SPACE_INTERVAL", Some(("10ms", "1m")),
        "How often free space is looked at.";
    storage.reclaim_interval: Duration, "storage-reclaim-interval", "MAINSTEM_STORAGE_RECLAIM_INTERVAL", Some(("100ms", "1h")),
        "How often, at most, space of removed messages is reclaimed.";
    storage.garbage_ratio_max: f64, "storage-garbage-ratio-max", "MAINSTEM_STORAGE_GARBAGE_RATIO_MAX", Some(("0.01", "1.0")),
        "Blob garbage is collected when its share of all blob bytes is above this …";
    storage.garbage_min: ByteSize, "storage-garbage-min", "MAINSTEM_STORAGE_GARBAGE_MIN", Some(("0", "1TiB")),
        "… and it is at least this much.";

    raft.pool_groups: u32, "raft-pool-groups", "MAINSTEM_RAFT_POOL_GROUPS", Some(("1", "256")),
        "Raft groups that share the shards of ordinary streams. Read when a data directory is first made.";
    raft.heartbeat: Duration, "raft-heartbeat", "MAINSTEM_RAFT_HEARTBEAT", Some(("20ms", "10s")),
        "How often leaders tell their followers that they live. This and the next two: of nodes with peers, and the same on all of them.";
    raft.election_min: Duration, "raft-election-min", "MAINSTEM_RAFT_ELECTION_MIN", Some(("40ms", "1m")),
        "A follower asks for votes after a silence of election_max and then a time between election_min …";
    raft.election_max: Duration, "raft-election-max", "MAINSTEM_RAFT_ELECTION_MAX", Some(("60ms", "2m")),
        "… and election_max.";
    raft.snapshot_rate: ByteSize, "raft-snapshot-rate", "MAINSTEM_RAFT_SNAPSHOT_RATE", Some(("0", "1TiB")),
        "Most bytes a second that this node sends of snapshots, to replicas that are new or too far behind for the log, of all of them together; and as many that it receives. At least 1MiB, or 0: as fast as it goes. What a replica has already does not travel, and reading it to find that out counts a quarter.";

    clock.max_offline: Duration, "clock-max-offline", "MAINSTEM_CLOCK_MAX_OFFLINE", Some(("1m", "100years")),
        "A start is believed to be no longer after the last run than this. When the wall clock says more (or less than nothing), the `clock_jump` alarm is on, nothing expires and time goes on from the last run, until the clock is put right or accepted. A week: longer than most repairs take, shorter than the jumps that broken clocks make.";
    clock.accept: bool, "accept-clock", "MAINSTEM_ACCEPT_CLOCK", None,
        "Believe the wall clock at this start, whatever it says: give it once, as a flag, after looking at the clock. What has expired by that clock is removed.";

    log.level: LogFilter, "log-level", "MAINSTEM_LOG_LEVEL", None,
        "Which lines are written: off, error, warn, info, debug, trace, or directives by module such as `info,mainstem::raft=debug`.";
    log.format: LogFormat, "log-format", "MAINSTEM_LOG_FORMAT", None,
        "How: for people, or one JSON object a line.";
}

/// The reference page: `docs/reference/config.md`.
pub fn reference() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         `mainstem server` takes each setting from a TOML file (`--config FILE`, or `MAINSTEM_CONFIG`), from the \
         environment, or from a flag; later ones win over earlier ones. Unknown keys are refused. \
         `mainstem server --print-config` prints what is in effect, as TOML, and where each value came from.\n\n\
         Sizes are written as `65536`, `64KiB`, `128MiB`, `2GiB`, `10GB`; durations as `250ms`, `5s`, `2m`, `1h`. \
         `none` takes away what a lower layer has set.\n\n\
         <!-- Made from src/node/config/table.rs; `UPDATE_DOCS=1 cargo test --release --test docs_sync` writes it anew. -->\n",
    );
    for (section, about) in SECTIONS {
        write!(
            page,
            "\n## [{section}]\n\n{about}\n\n| key | flag | environment | default | allowed | what |\n|---|---|---|---|---|---|\n"
        )
        .expect("a string takes any text");
        for setting in SETTINGS.iter().filter(|setting| setting.section == *section) {
            writeln!(
                page,
                "| `{}` | `--{}` | `{}` | {} | {} | {} |",
                setting.field,
                setting.flag,
                setting.env,
                setting.default_text(),
                setting.allowed(),
                setting.help
            )
            .expect("a string takes any text");
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_table_is_regular() {
        let mut flags = BTreeSet::new();
        let mut keys = BTreeSet::new();
        for setting in SETTINGS {
            assert!(flags.insert(setting.flag), "--{} twice", setting.flag);
            assert!(keys.insert(setting.key()), "{} twice", setting.key());
            let env = format!("MAINSTEM_{}", setting.flag.replace('-', "_").to_uppercase());
            assert_eq!(setting.env, env, "the variable follows the flag");
            assert!(
                SECTIONS.iter().any(|(section, _)| *section == setting.section),
                "{}",
                setting.section
            );
            assert!(
                !setting.help.contains('|') && !setting.allowed().contains('|'),
                "{}: cells",
                setting.key()
            );
        }
    }

    #[test]
    fn every_default_can_be_written_and_is_within_its_range() {
        let default = Config::default();
        for setting in SETTINGS {
            let Some(text) = setting.show(&default) else { continue };
            let mut config = Config::default();
            setting
                .set(&mut config, &text)
                .unwrap_or_else(|error| panic!("{}: {error}", setting.key()));
            assert_eq!(config, default, "{}", setting.key());
        }
    }
}
