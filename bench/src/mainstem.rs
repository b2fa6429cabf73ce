//! Mainstem itself: the real server as a process with its defaults, driven by its own Rust client.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use mainstem::client::proto::{Limits, StreamSpec};
use mainstem::client::{Client, Message, Publisher, Start};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::contest::{Meter, PublishLoad, Publishes, Turn, tell_cpu};
use crate::lab::Lab;
use crate::payload::{Payloads, Subjects};
use crate::process::{Ended, Process};

/// The stream of most figures; subjects `s.0` and so on are its own by default.
pub const STREAM: &str = "s";
const PUBLISHERS: usize = 2;
/// Messages between two chances for other tasks to run: giving a message to the publisher seldom waits.
const YIELD_EVERY: u64 = 128;
const START_TIME_MAX: Duration = Duration::from_secs(60);
const STOP_TIME_MAX: Duration = Duration::from_secs(60);

/// A node with a data directory of its own.
pub struct Server {
    process: Process,
    client: String,
    prometheus: Option<String>,
    binary: PathBuf,
    /// The preload library and the milliseconds it adds to each sync.
    slow_sync: Option<(PathBuf, u64)>,
    // After the process, so that it is dead when its directory goes.
    dir: TempDir,
}

impl Server {
    /// Starts one on an empty directory and waits until it is ready.
    pub async fn start(lab: &Lab, sync_ms: Option<u64>) -> Result<Self> {
        ensure!(
            lab.mainstem.exists(),
            "no server at {}: build it first",
            lab.mainstem.display()
        );
        if sync_ms.is_some() {
            ensure!(
                lab.faults.exists(),
                "no preload library at {}: build it first",
                lab.faults.display()
            );
        }
        let dir = lab.dir()?;
        let binary = lab.mainstem.clone();
        let slow_sync = sync_ms.map(|ms| (lab.faults.clone(), ms));
        let (process, ports) = run(&binary, dir.path(), slow_sync.as_ref()).await?;
        Ok(Self {
            process,
            client: ports.client,
            prometheus: ports.prometheus,
            binary,
            slow_sync,
            dir,
        })
    }

    /// Starts it again on the same directory. How long that took, until it said that it is ready.
    pub async fn restart(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        let (process, ports) = run(&self.binary, self.dir.path(), self.slow_sync.as_ref()).await?;
        (self.process, self.client, self.prometheus) = (process, ports.client, ports.prometheus);
        Ok(begin.elapsed())
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    pub async fn terminate(&mut self) -> Result<Ended> {
        self.process.terminate(STOP_TIME_MAX).await
    }

    pub fn data_dir(&self) -> PathBuf {
        data_dir(self.dir.path())
    }

    /// A connection of its own.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.client).await.context("connecting to the server")
    }

    /// Creates a stream of one replica, with the defaults but for what is given.
    pub async fn create(&self, name: &str, shards: u32, limits: Limits) -> Result<()> {
        let spec = StreamSpec {
            name: name.to_owned(),
            shards,
            limits: Some(limits),
            ..StreamSpec::default()
        };
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

    /// A metric's sum over all its labels, if the server tells its metrics.
    async fn metric(&self, name: &str) -> Option<f64> {
        let mut connection = tokio::net::TcpStream::connect(self.prometheus.as_ref()?).await.ok()?;
        connection
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .await
            .ok()?;
        let mut text = String::new();
        connection.read_to_string(&mut text).await.ok()?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with([' ', '{'])
                .then(|| rest.rsplit_once(' ')?.1.parse::<f64>().ok())?
        });
        values.reduce(|a, b| a + b)
    }

    /// Bytes and requests per synced write so far, on average.
    async fn per_sync(&self) -> Option<(f64, f64)> {
        let writes = self.metric("storage_commit_bytes_count").await.filter(|n| *n > 0.0)?;
        let bytes = self.metric("storage_commit_bytes_sum").await?;
        let requests = self.metric("storage_commit_requests_sum").await?;
        Some((bytes / writes, requests / writes))
    }
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

struct Ports {
    client: String,
    prometheus: Option<String>,
}

fn data_dir(dir: &Path) -> PathBuf {
    dir.join("data")
}

async fn run(binary: &Path, dir: &Path, slow_sync: Option<&(PathBuf, u64)>) -> Result<(Process, Ports)> {
    let ports_file = dir.join("ports.json");
    // What a killed server left is not to be taken for the new one's.
    match std::fs::remove_file(&ports_file) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    let mut command = Command::new(binary);
    // Nothing from around us is to change its defaults.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MAINSTEM_") {
            command.env_remove(name);
        }
    }
    command
        .arg("server")
        .arg("--data-dir")
        .arg(data_dir(dir))
        .arg("--ports-file")
        .arg(&ports_file);
    for flag in ["--listen", "--monitor-listen", "--prometheus-listen-on"] {
        command.arg(flag).arg("127.0.0.1:0");
    }
    if let Some((library, sync_ms)) = slow_sync {
        command
            .env("LD_PRELOAD", library)
            .env("MAINSTEM_FAULTS_SYNC_MS", sync_ms.to_string());
    }
    let mut process = Process::start(command, dir)?;
    let ports = process
        .ready(START_TIME_MAX, || ports_in(&ports_file))
        .await
        .context("the server")?;
    Ok((process, ports))
}

fn ports_in(file: &Path) -> Option<Ports> {
    let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let address = |name| Some(ports.get(name)?.as_str()?.to_owned());
    Some(Ports {
        client: address("client")?,
        prometheus: address("prometheus"),
    })
}

/// The contestant.
pub struct Mainstem;

impl Mainstem {
    async fn turn(&self, lab: &Lab, load: &PublishLoad) -> Result<Turn> {
        let server = Server::start(lab, load.sync_ms).await?;
        server.create(STREAM, load.shards, Limits::default()).await?;
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
            .measure(load.warmup, load.measure, || cpu.push(server.process.cpu()))
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
        tell("sync", "before each ack".to_owned());
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
        let server = Server::start(lab, load.sync_ms).await?;
        server.create(STREAM, load.shards, Limits::default()).await?;
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
