//! nats-server with JetStream, driven by the official Rust client as well as that can be done.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use async_nats::jetstream::{self, consumer, context::ContextBuilder, stream};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::contest::{Meter, PublishLoad, Publishes, Turn, tell_cpu};
use crate::lab::Lab;
use crate::payload::{Payloads, Subjects};
use crate::process::{Process, free_ports};

const STREAM: &str = "bench";
const PUBLISHERS: usize = 2;
/// Messages in flight per publisher, of which the best is found before the first turn.
const WINDOWS: [usize; 3] = [256, 1_000, 4_000];
/// Generous: a full window at a slow disk's pace, one sync for each message.
const ACK_TIME_MAX: Duration = Duration::from_secs(120);

/// A nats-server to run.
#[derive(Debug, Clone)]
pub struct NatsBinary {
    path: PathBuf,
    pub version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// `sync_interval: always` came with this one.
const SYNC_ALWAYS_SINCE: Version = Version(2, 10, 0);

impl NatsBinary {
    /// The one named, which must work, or the one in PATH, which may be absent.
    pub fn find(named: Option<PathBuf>) -> Result<Option<Self>> {
        let must = named.is_some();
        // Debian puts it where only root's PATH looks.
        let candidates = match named {
            Some(path) => vec![path],
            None => vec!["nats-server".into(), "/usr/sbin/nats-server".into()],
        };
        for path in candidates {
            match Command::new(&path).arg("--version").output() {
                Ok(output) => {
                    let text = String::from_utf8_lossy(&output.stdout).into_owned();
                    let version = version_in(&text).with_context(|| format!("no version in {text:?}"))?;
                    return Ok(Some(Self { path, version }));
                }
                Err(e) if !must && e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| path.display().to_string()),
            }
        }
        Ok(None)
    }

    pub fn can_sync_always(&self) -> bool {
        self.version >= SYNC_ALWAYS_SINCE
    }
}

/// From "nats-server: v2.10.27"; what follows the third number does not matter.
fn version_in(text: &str) -> Option<Version> {
    let numbers = text.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
    let mut numbers = numbers.splitn(3, '.').map(|part| {
        part.split(|c: char| !c.is_ascii_digit())
            .next()
            .and_then(|digits| digits.parse().ok())
    });
    Some(Version(numbers.next()??, numbers.next()??, numbers.next()??))
}

/// Why a figure against nats-server cannot be had here, if so.
pub fn missing(lab: &Lab, sync_always: bool) -> Option<String> {
    match &lab.nats {
        None => Some("not measurable here: no nats-server found".to_owned()),
        Some(nats) if sync_always && !nats.can_sync_always() => Some(format!(
            "not measurable here: nats-server {} is too old, `sync_interval: always` came with {SYNC_ALWAYS_SINCE}",
            nats.version
        )),
        Some(_) => None,
    }
}

/// A running nats-server with an empty store, or several that are a cluster.
pub struct NatsServer {
    nodes: Vec<NatsNode>,
    /// Where clients connect first.
    preferred: usize,
}

struct NatsNode {
    process: Process,
    url: String,
    // After the process, so that it is dead when its directory goes.
    dir: TempDir,
}

impl NatsNode {
    /// `peers`: the ports at which the nodes of a cluster, this one among them, listen for each other; empty: none.
    fn launch(binary: &NatsBinary, lab: &Lab, sync_always: bool, peers: &[u16], own: usize) -> Result<Self> {
        let dir = lab.dir()?;
        let sync = if sync_always { "sync_interval: always" } else { "" };
        let place = dir.path().display();
        let mut config = format!(
            "listen: \"127.0.0.1:-1\"\nports_file_dir: \"{place}\"\njetstream {{\n  store_dir: \"{place}/store\"\n  \
             max_file_store: 64GB\n  {sync}\n}}\n",
        );
        if let Some(port) = peers.get(own) {
            let routes: Vec<_> = peers
                .iter()
                .map(|port| format!("\"nats-route://127.0.0.1:{port}\""))
                .collect();
            config += &format!(
                "server_name: n{own}\ncluster {{\n  name: bench\n  listen: \"127.0.0.1:{port}\"\n  routes: [{}]\n}}\n",
                routes.join(", ")
            );
        }
        let config_path = dir.path().join("nats.conf");
        std::fs::write(&config_path, config)?;
        let mut command = Command::new(&binary.path);
        command.arg("--config").arg(&config_path);
        let process = Process::start(command, dir.path())?;
        Ok(Self {
            process,
            url: String::new(),
            dir,
        })
    }

    async fn ready(&mut self) -> Result<()> {
        let ports = self
            .dir
            .path()
            .join(format!("nats-server_{}.ports", self.process.pid()));
        let ready = self.process.ready(Duration::from_secs(20), || url_in(&ports));
        self.url = ready.await.context("nats-server")?;
        Ok(())
    }
}

/// How long a new cluster may take until it makes a stream …
const FORM_TIME_MAX: Duration = Duration::from_secs(60);
/// … and one attempt at that.
const FORM_STEP_MAX: Duration = Duration::from_secs(2);

impl NatsServer {
    pub async fn start(lab: &Lab, sync_always: bool, nodes: usize) -> Result<Self> {
        if let Some(why) = missing(lab, sync_always) {
            bail!(why);
        }
        let binary = lab.nats.as_ref().context("a nats-server")?;
        let peers = match nodes {
            1 => Vec::new(),
            _ => free_ports(nodes)?,
        };
        let launched = (0..nodes).map(|own| NatsNode::launch(binary, lab, sync_always, &peers, own));
        let mut server = Self {
            nodes: launched.collect::<Result<_>>()?,
            preferred: 0,
        };
        for node in &mut server.nodes {
            node.ready().await?;
        }
        Ok(server)
    }

    /// Processor time that all nodes have used.
    pub fn cpu(&self) -> Result<Duration> {
        self.nodes.iter().map(|node| node.process.cpu()).sum()
    }

    async fn client(&self) -> Result<async_nats::Client> {
        async_nats::ConnectOptions::new()
            .client_capacity(8_192)
            .request_timeout(Some(ACK_TIME_MAX))
            .connect(&self.nodes[self.preferred].url)
            .await
            .context("connecting to nats-server")
    }

    async fn context(&self, window: usize) -> Result<jetstream::Context> {
        self.context_within(ACK_TIME_MAX, window).await
    }

    async fn context_within(&self, timeout: Duration, window: usize) -> Result<jetstream::Context> {
        Ok(ContextBuilder::new()
            .timeout(timeout)
            .max_ack_inflight(window)
            .build(self.client().await?))
    }

    /// One file stream over `subjects.>`: as many replicas as nodes, no limits, no de-duplication by id asked of it (no
    /// message has one). Clients connect to its leader from then on.
    async fn stream(&mut self, subjects: &str) -> Result<stream::Stream> {
        // A cluster without a leader yet does not answer at all.
        let context = self.context_within(FORM_STEP_MAX, 16).await?;
        let config = self.config(STREAM, subjects);
        let begin = Instant::now();
        let mut stream = loop {
            match context.create_stream(config.clone()).await {
                Ok(stream) => break stream,
                // A new cluster refuses for a while.
                Err(_) if self.nodes.len() > 1 && begin.elapsed() < FORM_TIME_MAX => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(error).context("creating the stream"),
            }
        };
        while self.nodes.len() > 1 {
            let leader = stream.info().await?.cluster.as_ref().and_then(|c| c.leader.clone());
            let known = (0..self.nodes.len()).find(|n| leader.as_deref() == Some(&format!("n{n}")));
            if let Some(leader) = known {
                self.preferred = leader;
                return self.context(16).await?.get_stream(STREAM).await.context("the stream");
            }
            ensure!(begin.elapsed() < FORM_TIME_MAX, "the stream has no leader");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(stream)
    }

    fn config(&self, name: &str, subjects: &str) -> stream::Config {
        stream::Config {
            name: name.to_owned(),
            subjects: vec![format!("{subjects}.>")],
            storage: stream::StorageType::File,
            num_replicas: self.nodes.len(),
            ..Default::default()
        }
    }

    /// Creates so many streams, one after the other: how long each took.
    pub async fn create_streams(&mut self, count: usize) -> Result<Vec<Duration>> {
        // The cluster is warm when it has made one.
        self.stream("warm").await?;
        let context = self.context(16).await?;
        let mut times = Vec::with_capacity(count);
        for n in 0..count {
            let config = self.config(&format!("s{n}"), &format!("s{n}"));
            let begin = Instant::now();
            context.create_stream(config).await.context("creating a stream")?;
            times.push(begin.elapsed());
        }
        Ok(times)
    }

    /// Publishes numbers from..to in order over one connection.
    pub async fn fill(&mut self, payloads: &Payloads, messages: u64) -> Result<()> {
        let mut stream = self.stream("s").await?;
        let window = 4_000;
        let context = self.context(window).await?;
        let mut acks = VecDeque::with_capacity(window);
        for number in 0..messages {
            if acks.len() == window {
                take_ack(&mut acks).await?;
            }
            acks.push_back(context.publish("s.0", payloads.nth(number)).await?);
        }
        while !acks.is_empty() {
            take_ack(&mut acks).await?;
        }
        let stored = stream.info().await?.state.messages;
        ensure!(stored == messages, "{stored} messages stored of {messages}");
        Ok(())
    }

    /// Reads everything by an ordered consumer, checking it. Messages a second.
    pub async fn read(&self, payloads: &Payloads, messages: u64, pull: bool) -> Result<f64> {
        let client = self.client().await?;
        let inbox = client.new_inbox();
        let context = jetstream::new(client);
        let stream = context.get_stream(STREAM).await?;
        let begin = Instant::now();
        let mut next = 0;
        let mut check = |message: &async_nats::Message| {
            ensure!(payloads.is_nth(next, &message.payload), "message {next} differs");
            next += 1;
            Ok(next == messages)
        };
        if pull {
            let config = consumer::pull::OrderedConfig::default();
            let mut all = stream.create_consumer(config).await?.messages().await?;
            while !check(&all.next().await.context("the end too early")??.message)? {}
        } else {
            let config = consumer::push::OrderedConfig {
                deliver_subject: inbox,
                ..Default::default()
            };
            let mut all = stream.create_consumer(config).await?.messages().await?;
            while !check(&all.next().await.context("the end too early")??.message)? {}
        }
        Ok(messages as f64 / begin.elapsed().as_secs_f64())
    }
}

fn url_in(ports_file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(ports_file).ok()?;
    let ports: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(ports.get("nats")?.get(0)?.as_str()?.to_owned())
}

/// The oldest ack.
async fn take_ack(acks: &mut VecDeque<jetstream::context::PublishAckFuture>) -> Result<()> {
    if let Some(ack) = acks.pop_front() {
        ack.await.context("a publish ack")?;
    }
    Ok(())
}

/// The contestant, with its default of syncing every two minutes, or with a sync before each ack.
pub struct Nats {
    sync_always: bool,
    window: OnceCell<usize>,
}

impl Nats {
    pub fn new(sync_always: bool) -> Self {
        Self {
            sync_always,
            window: OnceCell::new(),
        }
    }

    async fn turn(&self, lab: &Lab, load: &PublishLoad, window: usize) -> Result<Turn> {
        let mut server = NatsServer::start(lab, self.sync_always, load.replicas as usize).await?;
        let mut stream = server.stream("s").await?;
        let meter = Meter::new(PUBLISHERS);
        let mut publishers = JoinSet::new();
        for publisher in 0..PUBLISHERS {
            let context = server.context(window).await?;
            let payloads = Payloads::new(load.message_bytes, publisher as u64);
            let subjects = Subjects::new("s", load.subjects);
            publishers.spawn(publish(context, publisher, window, payloads, subjects, meter.clone()));
        }
        let mut cpu = Vec::new();
        let (rate, messages) = meter
            .measure(load.warmup, load.measure, || cpu.push(server.cpu()))
            .await;
        while let Some(done) = publishers.join_next().await {
            done??;
        }
        let stored = stream.info().await?.state.messages;
        ensure!(
            stored == meter.total(),
            "{stored} messages stored, {} acknowledged",
            meter.total()
        );
        let mut told = BTreeMap::new();
        told.insert("publishers".to_owned(), PUBLISHERS.to_string());
        told.insert(
            "window".to_owned(),
            format!("{window} messages per publisher (best of {WINDOWS:?})"),
        );
        let sync = if self.sync_always {
            "always: before each ack"
        } else {
            "its default: every 2 minutes"
        };
        told.insert("sync".to_owned(), sync.to_owned());
        tell_cpu(&mut told, cpu, messages);
        Ok(Turn { rate, told })
    }

    /// Messages sent one after the other, each when the last was acknowledged: all times in microseconds.
    pub async fn one_at_a_time(&self, lab: &Lab, load: &PublishLoad) -> Result<Histogram<u64>> {
        let mut server = NatsServer::start(lab, self.sync_always, load.replicas as usize).await?;
        let mut stream = server.stream("s").await?;
        let context = server.context(16).await?;
        let payloads = Payloads::new(load.message_bytes, 0);
        let subjects = Subjects::new("s", load.subjects);
        let mut times = Histogram::new(3)?;
        let begin = Instant::now();
        let mut sent = 0;
        while begin.elapsed() < load.warmup + load.measure {
            let one = Instant::now();
            let subject = subjects.nth(sent).to_owned();
            context.publish(subject, payloads.nth(sent)).await?.await?;
            sent += 1;
            if begin.elapsed() > load.warmup {
                times.record(one.elapsed().as_nanos() as u64 / 1_000)?;
            }
        }
        let stored = stream.info().await?.state.messages;
        ensure!(stored == sent, "{stored} messages stored, {sent} acknowledged");
        Ok(times)
    }
}

impl Publishes for Nats {
    fn name(&self) -> &'static str {
        if self.sync_always {
            "nats-always"
        } else {
            "nats-default"
        }
    }

    fn publish<'a>(&'a self, lab: &'a Lab, load: &'a PublishLoad) -> BoxFuture<'a, Result<Turn>> {
        Box::pin(async move {
            let window = self
                .window
                .get_or_try_init(|| async {
                    let trial = PublishLoad {
                        warmup: load.warmup / 2,
                        measure: load.measure / 4,
                        ..load.clone()
                    };
                    let mut best = (0.0, WINDOWS[0]);
                    for window in WINDOWS {
                        let rate = self.turn(lab, &trial, window).await?.rate;
                        if rate > best.0 {
                            best = (rate, window);
                        }
                    }
                    anyhow::Ok(best.1)
                })
                .await?;
            self.turn(lab, load, *window).await
        })
    }
}

/// One publisher: a full window in flight until the meter stops it, then every ack.
async fn publish(
    context: jetstream::Context,
    publisher: usize,
    window: usize,
    payloads: Payloads,
    subjects: Subjects,
    meter: Meter,
) -> Result<()> {
    let mut acks = VecDeque::with_capacity(window);
    let mut number = 0;
    while !meter.stopped() {
        if acks.len() == window {
            take_ack(&mut acks).await?;
            meter.add(publisher, 1);
        }
        let subject = subjects.nth(number).to_owned();
        acks.push_back(context.publish(subject, payloads.nth(number)).await?);
        number += 1;
    }
    while !acks.is_empty() {
        take_ack(&mut acks).await?;
        meter.add(publisher, 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        assert_eq!(version_in("nats-server: v2.9.10\n"), Some(Version(2, 9, 10)));
        assert_eq!(version_in("nats-server: v2.15.0-dev"), Some(Version(2, 15, 0)));
        assert_eq!(version_in("something else"), None);
        assert!(version_in("v2.9.10") < Some(SYNC_ALWAYS_SINCE));
        assert!(version_in("v2.10.27") > Some(SYNC_ALWAYS_SINCE));
    }
}
