//! Mainstem itself: the real server as a process with its defaults, driven by its own Rust client.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use mainstem::client::proto::{Limits, StreamSpec};
use mainstem::client::{Client, Message, Publisher, Start};
use tokio::task::JoinSet;

use crate::contest::{Meter, PublishLoad, Publishes, Turn, tell_cpu};
use crate::lab::Lab;
use crate::node::Node;
use crate::payload::{Payloads, Subjects};
use crate::process::{Ended, Process, free_ports};

/// The stream of most figures; subjects `s.0` and so on are its own by default.
pub const STREAM: &str = "s";
const PUBLISHERS: usize = 2;
/// Messages between two chances for other tasks to run: giving a message to the publisher seldom waits.
const YIELD_EVERY: u64 = 128;
/// How long nodes may take to form a cluster in which nothing is wrong.
const FORM_TIME_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One node, or several that are a cluster.
pub struct Server {
    nodes: Vec<Node>,
}

impl Server {
    /// Starts one on an empty directory and waits until it is ready.
    pub async fn start(lab: &Lab, sync_ms: Option<u64>) -> Result<Self> {
        let mut node = Node::new(lab, Vec::new(), sync_ms)?;
        node.launch()?;
        node.ready().await?;
        Ok(Self { nodes: vec![node] })
    }

    /// Starts so many, each on an empty directory, and waits until nothing is wrong with their cluster.
    pub async fn cluster(lab: &Lab, nodes: usize, sync_ms: Option<u64>) -> Result<Self> {
        if nodes == 1 {
            return Self::start(lab, sync_ms).await;
        }
        // Theirs for good: they are started again, and the others look for them where they were.
        let ports = free_ports(2 * nodes)?;
        let listen = |port: u16| format!("127.0.0.1:{port}");
        let founder = listen(ports[1]);
        let nodes = ports.chunks(2).enumerate().map(|(n, ports)| {
            let role = match n {
                0 => vec!["--bootstrap".to_owned()],
                _ => vec!["--join".to_owned(), founder.clone()],
            };
            let own = [
                ("--name", node_name(n)),
                ("--zone", format!("zone-{n}")),
                ("--listen", listen(ports[0])),
                ("--peer-listen", listen(ports[1])),
            ];
            let own = own.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
            Node::new(lab, role.into_iter().chain(own).collect(), sync_ms)
        });
        let mut server = Self {
            nodes: nodes.collect::<Result<_>>()?,
        };
        server.nodes[0].launch()?;
        server.nodes[0].ready().await?;
        for node in &mut server.nodes[1..] {
            node.launch()?;
        }
        for node in &mut server.nodes[1..] {
            node.ready().await?;
        }
        server.healthy().await?;
        Ok(server)
    }

    /// A node for each replica, and the stream.
    async fn for_load(lab: &Lab, load: &PublishLoad) -> Result<Self> {
        let server = Self::cluster(lab, load.replicas as usize, load.sync_ms).await?;
        server
            .create_as(StreamSpec {
                name: STREAM.to_owned(),
                shards: load.shards,
                replicas: load.replicas,
                ..StreamSpec::default()
            })
            .await?;
        Ok(server)
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The process of the first node.
    pub fn process(&self) -> &Process {
        self.nodes[0].process()
    }

    /// Processor time that all nodes have used.
    pub fn cpu(&self) -> Result<Duration> {
        self.nodes.iter().map(|node| node.process().cpu()).sum()
    }

    /// kill -9 of a node.
    pub fn kill(&mut self, node: usize) -> Result<()> {
        self.nodes[node].kill()
    }

    /// Starts a node again on the same directory. How long that took, until it said that it is ready.
    pub async fn restart(&mut self, node: usize) -> Result<Duration> {
        let begin = Instant::now();
        self.nodes[node].launch()?;
        self.nodes[node].ready().await?;
        Ok(begin.elapsed())
    }

    /// Ends the first node in an orderly way.
    pub async fn terminate(&mut self) -> Result<Ended> {
        self.nodes[0].terminate().await
    }

    /// Of the first node.
    pub fn data_dir(&self) -> PathBuf {
        self.nodes[0].data_dir()
    }

    /// Waits until all nodes are there, nothing is wrong, and the meta group has its voters.
    pub async fn healthy(&self) -> Result<()> {
        let client = self.client().await?;
        let voters = [0, 1, 1, 3, 3][self.nodes.len().min(4)];
        let begin = Instant::now();
        loop {
            // Of no stream: a short one.
            let report = client.cluster_report(None, Vec::new()).await?;
            let live = report.summary.unwrap_or_default().live_nodes as usize;
            let meta = report.meta.unwrap_or_default();
            let wrong = match report.problems.first() {
                Some(problem) => problem.text.clone(),
                None if live < self.nodes.len() => format!("{live} nodes are live"),
                None if meta.voters < voters => format!("the meta group has {} voters", meta.voters),
                None => return Ok(()),
            };
            ensure!(
                begin.elapsed() < FORM_TIME_MAX,
                "the cluster is not well after {FORM_TIME_MAX:?}: {wrong}"
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The node that leads the only shard of a stream.
    pub async fn leader(&self, stream: &str) -> Result<usize> {
        let client = self.client().await?;
        let begin = Instant::now();
        loop {
            let report = client.cluster_report(Some(stream), Vec::new()).await?;
            if let Some(id) = report.shards.first().and_then(|shard| shard.leader_node) {
                let nodes = client.nodes(false).await?;
                let name = nodes.iter().find(|node| node.node_id == id).map(|node| &node.name);
                let known = (0..self.nodes.len()).find(|n| Some(&node_name(*n)) == name);
                return known.with_context(|| format!("node {id} is none of these"));
            }
            ensure!(begin.elapsed() < FORM_TIME_MAX, "{stream} has no leader");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// A connection of its own.
    pub async fn client(&self) -> Result<Client> {
        let addresses: Vec<&str> = self.nodes.iter().filter_map(Node::client_address).collect();
        Client::connect(&addresses.join(","))
            .await
            .context("connecting to the server")
    }

    /// Creates a stream of one replica, with the defaults but for what is given.
    pub async fn create(&self, name: &str, shards: u32, limits: Limits) -> Result<()> {
        self.create_as(StreamSpec {
            name: name.to_owned(),
            shards,
            limits: Some(limits),
            ..StreamSpec::default()
        })
        .await
    }

    /// Creates a stream.
    pub async fn create_as(&self, spec: StreamSpec) -> Result<()> {
        self.client()
            .await?
            .create_stream(spec)
            .await
            .context("creating the stream")?;
        Ok(())
    }

    /// Messages and stored bytes of a stream, all shards together.
    pub async fn stored(&self, stream: &str) -> Result<Stored> {
        let stream = self.client().await?.get_stream(stream).await?;
        Ok(Stored {
            messages: stream.shards.iter().map(|s| s.messages).sum(),
            written: stream.shards.iter().map(|s| s.tail.saturating_sub(1)).sum(),
            bytes: stream.shards.iter().map(|s| s.bytes).sum(),
        })
    }

    /// Publishes that many messages by several publishers and waits for all acks.
    pub async fn fill(&self, stream: &str, message_bytes: usize, messages: u64, publishers: u64) -> Result<()> {
        let mut tasks = JoinSet::new();
        for n in 0..publishers {
            let publisher = self.client().await?.publisher(stream).open().await?;
            let payloads = Payloads::new(message_bytes, n);
            let subject = format!("{stream}.0");
            let share = messages / publishers + u64::from(n < messages % publishers);
            tasks.spawn(async move {
                for number in 0..share {
                    publisher.send(&subject, &payloads.nth(number)).await?;
                    if number % YIELD_EVERY == 0 {
                        tokio::task::yield_now().await;
                    }
                }
                publisher.close().await
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    }

    /// Reads everything from the beginning, checking it. Messages a second. The stream has one shard and was filled by
    /// one publisher.
    pub async fn read(&self, payloads: &Payloads, messages: u64) -> Result<f64> {
        let client = self.client().await?;
        let begin = Instant::now();
        let mut reader = client
            .reader(STREAM)
            .from(Start::Beginning)
            .stop_at_tail()
            .open()
            .await?;
        let mut next = 1;
        while let Some(batch) = reader.next_batch().await? {
            for (sequence, message) in &batch {
                ensure!(sequence == next, "sequence {sequence} in place of {next}");
                ensure!(
                    payloads.is_nth(sequence - 1, message.payload),
                    "message {sequence} differs"
                );
                next += 1;
            }
        }
        let elapsed = begin.elapsed();
        ensure!(next - 1 == messages, "{} messages read of {messages}", next - 1);
        Ok(messages as f64 / elapsed.as_secs_f64())
    }

    /// One message, from a new connection to the ack.
    pub async fn publish_one(&self, stream: &str) -> Result<()> {
        let publisher = self.client().await?.publisher(stream).open().await?;
        publisher
            .publish(&Message::new(format!("{stream}.0"), "once more"))
            .await?
            .await?;
        publisher.close().await?;
        Ok(())
    }

    /// A metric's sum over all its labels and all nodes, if they tell their metrics.
    async fn metric(&self, name: &str) -> Option<f64> {
        let mut sum = None;
        for node in &self.nodes {
            sum = Some(sum.unwrap_or(0.0) + node.metric(name).await?);
        }
        sum
    }

    /// Bytes and requests per synced write so far, on average.
    async fn per_sync(&self) -> Option<(f64, f64)> {
        let writes = self.metric("storage_commit_bytes_count").await.filter(|n| *n > 0.0)?;
        let bytes = self.metric("storage_commit_bytes_sum").await?;
        let requests = self.metric("storage_commit_requests_sum").await?;
        Some((bytes / writes, requests / writes))
    }
}

/// As the nodes of a cluster are called.
fn node_name(index: usize) -> String {
    format!("n{}", index + 1)
}

#[derive(Debug, Clone, Copy)]
pub struct Stored {
    /// Retained.
    pub messages: u64,
    /// Ever.
    pub written: u64,
    /// Retained.
    pub bytes: u64,
}

/// The contestant.
pub struct Mainstem;

impl Mainstem {
    async fn turn(&self, lab: &Lab, load: &PublishLoad) -> Result<Turn> {
        let server = Server::for_load(lab, load).await?;
        let meter = Meter::new(PUBLISHERS);
        let mut publishers = JoinSet::new();
        for n in 0..PUBLISHERS {
            let counted = meter.clone();
            let publisher = server
                .client()
                .await?
                .publisher(STREAM)
                .batch_bytes(load.batch_bytes)
                .on_batch(move |report| {
                    if report.outcome.is_ok() {
                        counted.add(n, u64::from(report.messages));
                    }
                })
                .open()
                .await?;
            let payloads = Payloads::new(load.message_bytes, n as u64);
            let subjects = Subjects::new(STREAM, load.subjects);
            publishers.spawn(publish(publisher, payloads, subjects, meter.clone()));
        }
        let mut cpu = Vec::new();
        let (rate, messages) = meter
            .measure(load.warmup, load.measure, || cpu.push(server.cpu()))
            .await;
        let mut sent = 0;
        while let Some(done) = publishers.join_next().await {
            sent += done??;
        }
        let stored = server.stored(STREAM).await?.messages;
        ensure!(
            stored == sent && meter.total() == sent,
            "{sent} messages sent, {} acknowledged, {stored} stored",
            meter.total()
        );

        let mut told = BTreeMap::new();
        let mut tell = |name: &str, value: String| told.insert(name.to_owned(), value);
        tell("publishers", PUBLISHERS.to_string());
        tell("batch", format!("{} KiB at most", load.batch_bytes >> 10));
        tell(
            "window",
            "the publisher's default: 64 MiB unacknowledged, and the server's".to_owned(),
        );
        let sync = match load.replicas {
            1 => "before each ack",
            _ => "on a quorum, before each ack",
        };
        tell("sync", sync.to_owned());
        tell("indexes", "all: subjects, message ids, time".to_owned());
        if let Some((bytes, requests)) = server.per_sync().await {
            load.sync_bytes_seen(bytes as u64);
            tell("per_sync", format!("{bytes:.0} bytes, {requests:.1} appends"));
        }
        tell_cpu(&mut told, cpu, messages);
        Ok(Turn { rate, told })
    }

    /// Messages sent one after the other, each when the last was acknowledged: all times in microseconds.
    pub async fn one_at_a_time(lab: &Lab, load: &PublishLoad) -> Result<Histogram<u64>> {
        let server = Server::for_load(lab, load).await?;
        let publisher = server.client().await?.publisher(STREAM).open().await?;
        let payloads = Payloads::new(load.message_bytes, 0);
        let subjects = Subjects::new(STREAM, load.subjects);
        let mut times = Histogram::new(3)?;
        let begin = Instant::now();
        let mut sent = 0;
        while begin.elapsed() < load.warmup + load.measure {
            let message = Message::new(subjects.nth(sent), payloads.nth(sent));
            let one = Instant::now();
            let ack = publisher.publish(&message).await?.await?;
            let time = one.elapsed();
            sent += 1;
            if ack.sequence != Some(sent) {
                bail!("message {sent} was stored at {:?}", ack.sequence);
            }
            if begin.elapsed() > load.warmup {
                times.record(u64::try_from(time.as_micros())?)?;
            }
        }
        publisher.close().await?;
        Ok(times)
    }
}

impl Publishes for Mainstem {
    fn name(&self) -> &'static str {
        "mainstem"
    }

    fn publish<'a>(&'a self, lab: &'a Lab, load: &'a PublishLoad) -> BoxFuture<'a, Result<Turn>> {
        Box::pin(self.turn(lab, load))
    }
}

/// One publisher: as fast as it takes messages until the meter stops it, then every ack. How many it sent.
async fn publish(publisher: Publisher, payloads: Payloads, subjects: Subjects, meter: Meter) -> Result<u64> {
    let mut number = 0;
    while !meter.stopped() {
        for _ in 0..YIELD_EVERY {
            publisher.send(subjects.nth(number), &payloads.nth(number)).await?;
            number += 1;
        }
        tokio::task::yield_now().await;
    }
    publisher.close().await?;
    Ok(number)
}
