//! Configuration: defaults, a TOML file, the environment, flags; each overrides those before it, and each value knows
//! where it came from.

pub mod args;
pub mod file;
pub mod human;
pub mod rules;
pub mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use args::{DevArgs, ServerArgs};
pub use human::{Addresses, ByteSize, ClientAuth, LogFilter, LogFormat, Tags};
use table::{SECTIONS, SETTINGS, Setting};

use crate::raft::RaftTimings;

/// What a node is told. Every field is in [`table::SETTINGS`], which says what it means.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub node: NodeSection,
    pub cluster: ClusterSection,
    pub listen: ListenSection,
    pub tls: TlsSection,
    pub limits: LimitsSection,
    pub storage: StorageSection,
    pub raft: RaftSection,
    pub clock: ClockSection,
    pub log: LogSection,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NodeSection {
    pub name: String,
    /// Empty: not set, which only `--print-config` bears.
    pub data_dir: PathBuf,
    pub drain_timeout: Duration,
    pub zone: Option<String>,
    pub tags: Option<Tags>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ClusterSection {
    pub name: String,
    pub bootstrap: bool,
    pub join: Option<Addresses>,
    pub token_file: Option<PathBuf>,
    pub replace_after: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ListenSection {
    pub client: SocketAddr,
    /// Not set: a node without peers.
    pub peer: Option<SocketAddr>,
    pub advertise_client: Option<Addresses>,
    pub advertise_peer: Option<Addresses>,
    pub monitor: SocketAddr,
    pub prometheus: Option<SocketAddr>,
    pub ports_file: Option<PathBuf>,
    pub insecure: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TlsSection {
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub client_ca: Option<PathBuf>,
    pub client_auth: ClientAuth,
    pub peer_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct LimitsSection {
    pub publish_memory: ByteSize,
    pub read_memory: ByteSize,
    pub connections_max: u32,
    pub connection_requests_max: u32,
    pub stream_window: ByteSize,
    pub connection_window: ByteSize,
    pub sessions_max: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StorageSection {
    pub log_write_buffer: ByteSize,
    pub state_write_buffer: ByteSize,
    pub block_cache: ByteSize,
    pub flush_interval: Duration,
    pub flush_min: ByteSize,
    pub min_free: ByteSize,
    pub commit_batch_max: ByteSize,
    pub min_blob: ByteSize,
    pub blob_file: ByteSize,
    pub space_interval: Duration,
    pub reclaim_interval: Duration,
    pub garbage_ratio_max: f64,
    pub garbage_min: ByteSize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct RaftSection {
    pub pool_groups: u32,
    pub heartbeat: Duration,
    pub election_min: Duration,
    pub election_max: Duration,
    /// Bytes a second; 0: no bound.
    pub snapshot_rate: ByteSize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ClockSection {
    pub max_offline: Duration,
    pub accept: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct LogSection {
    pub level: LogFilter,
    pub format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        let timings = RaftTimings::default();
        Self {
            node: NodeSection {
                name: host_name(),
                data_dir: PathBuf::new(),
                drain_timeout: Duration::from_secs(20),
                zone: None,
                tags: None,
            },
            cluster: ClusterSection {
                name: "mainstem".into(),
                bootstrap: false,
                join: None,
                token_file: None,
                replace_after: Duration::from_secs(300),
            },
            listen: ListenSection {
                client: SocketAddr::from(([127, 0, 0, 1], 7411)),
                peer: None,
                advertise_client: None,
                advertise_peer: None,
                monitor: SocketAddr::from(([127, 0, 0, 1], 7413)),
                prometheus: None,
                ports_file: None,
                insecure: false,
            },
            tls: TlsSection {
                cert: None,
                key: None,
                client_ca: None,
                client_auth: ClientAuth::Optional,
                peer_ca: None,
            },
            limits: LimitsSection {
                publish_memory: ByteSize::mib(64),
                read_memory: ByteSize::mib(64),
                connections_max: 1_024,
                connection_requests_max: 1_024,
                stream_window: ByteSize::mib(4),
                connection_window: ByteSize::mib(16),
                sessions_max: 4_096,
            },
            storage: StorageSection {
                log_write_buffer: ByteSize::mib(128),
                state_write_buffer: ByteSize::mib(16),
                block_cache: ByteSize::mib(64),
                flush_interval: Duration::from_secs(5),
                flush_min: ByteSize::mib(1),
                min_free: ByteSize::mib(512),
                commit_batch_max: ByteSize::mib(8),
                min_blob: ByteSize(1_024),
                blob_file: ByteSize::mib(64),
                space_interval: Duration::from_millis(250),
                reclaim_interval: Duration::from_secs(10),
                garbage_ratio_max: 0.2,
                garbage_min: ByteSize::mib(16),
            },
            raft: RaftSection {
                pool_groups: 4,
                heartbeat: timings.heartbeat,
                election_min: timings.election_min,
                election_max: timings.election_max,
                snapshot_rate: ByteSize::mib(128),
            },
            clock: ClockSection {
                max_offline: Duration::from_secs(7 * 24 * 3_600),
                accept: false,
            },
            log: LogSection {
                level: LogFilter("info".into()),
                format: LogFormat::Text,
            },
        }
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "node".into())
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    /// Given by the command itself (`mainstem dev`).
    Command(&'static str),
    File {
        path: PathBuf,
        line: usize,
    },
    Env(&'static str),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Command(name) => write!(f, "mainstem {name}"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Env(name) => write!(f, "environment {name}"),
            Origin::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// Everything that is wrong with the configuration, a line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);

/// A configuration with the origin of each value.
#[derive(Debug, Clone, PartialEq)]
pub struct Effective {
    pub config: Config,
    /// By key; those not in here are defaults.
    pub origins: BTreeMap<String, Origin>,
    /// What looks like a mistake but may not be one.
    pub warnings: Vec<String>,
}

impl Effective {
    /// Reads file, environment and flags over `presets`: values that a command sets before the user has a say.
    /// `env` gives a variable's value. What is read is well-formed, but not yet checked as a whole: see
    /// [`Effective::check`].
    pub fn load(
        args: &ServerArgs,
        env: &dyn Fn(&str) -> Option<String>,
        presets: &[(&'static Setting, String, &'static str)],
    ) -> Result<Self, ConfigError> {
        let mut effective = Effective {
            config: Config::default(),
            origins: BTreeMap::new(),
            warnings: Vec::new(),
        };
        let mut wrong = Vec::new();
        for (setting, text, command) in presets {
            effective.apply(setting, text, Origin::Command(command), &mut wrong);
        }
        let path = args
            .config
            .clone()
            .or_else(|| env("MAINSTEM_CONFIG").filter(|s| !s.is_empty()).map(PathBuf::from));
        if let Some(path) = path {
            effective.read_file(&path, &mut wrong);
        }
        for setting in SETTINGS {
            if let Some(text) = env(setting.env) {
                effective.apply(setting, &text, Origin::Env(setting.env), &mut wrong);
            }
        }
        for (setting, text) in &args.settings {
            effective.apply(setting, text, Origin::Flag(setting.flag), &mut wrong);
        }
        if wrong.is_empty() {
            Ok(effective)
        } else {
            Err(ConfigError(wrong))
        }
    }

    fn read_file(&mut self, path: &Path, wrong: &mut Vec<String>) {
        let input = match std::fs::read_to_string(path) {
            Ok(input) => input,
            Err(error) => {
                wrong.push(format!(
                    "cannot read the configuration file {}: {error}",
                    path.display()
                ));
                return;
            }
        };
        match file::read(&input) {
            Ok(found) => {
                for file::Found { setting, text, line } in found {
                    self.apply(
                        setting,
                        &text,
                        Origin::File {
                            path: path.to_owned(),
                            line,
                        },
                        wrong,
                    );
                }
            }
            Err(complaints) => wrong.extend(complaints.into_iter().map(|complaint| match complaint.line {
                Some(line) => format!("{}:{line}: {}", path.display(), complaint.message),
                None => format!("{}: {}", path.display(), complaint.message),
            })),
        }
    }

    fn apply(&mut self, setting: &'static Setting, text: &str, origin: Origin, wrong: &mut Vec<String>) {
        match setting.set(&mut self.config, text) {
            Ok(()) => {
                self.origins.insert(setting.key(), origin);
            }
            Err(error) => wrong.push(format!("{origin}: {}: {error}", setting.key())),
        }
    }

    /// Notes variables that begin like ours, and are nearly but not quite one of ours. They are not refused: the
    /// command line has variables of its own.
    pub fn note_misspelt(&mut self, names: impl Iterator<Item = String>) {
        for name in names.filter(|name| name.starts_with("MAINSTEM_")) {
            // The command line's own, and those of the test libraries.
            let others = [
                "MAINSTEM_CONFIG",
                "MAINSTEM_SERVER",
                "MAINSTEM_CONTEXT",
                "MAINSTEM_NAMESPACE",
            ];
            let known = others.contains(&name.as_str()) || SETTINGS.iter().any(|setting| setting.env == name);
            if known {
                continue;
            }
            let close = SETTINGS
                .iter()
                .map(|setting| setting.env)
                .filter(|env| is_one_slip(&name, env));
            let slip = file::nearest(&name, close);
            if let Some(env) = slip {
                self.warnings.push(format!(
                    "the environment variable {name} is not known; did you mean {env}?"
                ));
            }
        }
    }

    /// Checks what concerns several settings at once.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = rules::check(&self.config);
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(ConfigError(wrong))
        }
    }

    /// Where the value of this setting came from.
    pub fn origin(&self, setting: &Setting) -> Origin {
        self.origins.get(&setting.key()).cloned().unwrap_or(Origin::Default)
    }

    /// As a TOML file that gives the same configuration, with the origin of each value.
    pub fn print(&self) -> String {
        let mut page = String::new();
        for (section, _) in SECTIONS {
            if !page.is_empty() {
                page.push('\n');
            }
            page.push_str(&format!("[{section}]\n"));
            for setting in SETTINGS.iter().filter(|setting| setting.section == *section) {
                let origin = self.origin(setting);
                page.push_str(&match setting.show(&self.config) {
                    Some(text) => format!("{} = {} # {origin}\n", setting.field, setting.toml(&text)),
                    None => format!("# {} is not set ({origin})\n", setting.field),
                });
            }
        }
        page
    }
}

fn is_one_slip(name: &str, env: &str) -> bool {
    file::nearest(name, std::iter::once(env)).is_some_and(|_| name.len().abs_diff(env.len()) <= 2)
}

#[cfg(test)]
mod tests;
