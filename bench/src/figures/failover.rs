//! How long a shard does without a leader: when its leader's process is killed, and when it hands over.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mainstem::client::proto::StreamSpec;
use mainstem::client::{Client, Message, Publisher, Target};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::lab::{Lab, millis};
use crate::mainstem::{STREAM, Server};
use crate::payload::Payloads;
use crate::report::{Bar, Row, Rows, number};

const NODES: usize = 3;
const MESSAGE_BYTES: usize = 128;
/// Longer than anything that is measured here.
const PATIENCE: Duration = Duration::from_secs(60);

/// The last ack of the publishing loop.
#[derive(Debug, Clone, Copy)]
struct Acked {
    sequence: u64,
    term: u64,
    at: Instant,
}

/// One message after the other, each when the last was acknowledged, all the time.
struct Loop {
    acked: watch::Receiver<Acked>,
    stop: CancellationToken,
    task: JoinHandle<Result<u64>>,
}

impl Loop {
    async fn start(client: &Client) -> Result<Self> {
        let publisher = client.publisher(STREAM).open().await?;
        let begin = Acked {
            sequence: 0,
            term: 0,
            at: Instant::now(),
        };
        let (tell, acked) = watch::channel(begin);
        let stop = CancellationToken::new();
        let task = tokio::spawn(publish(publisher, tell, stop.clone()));
        let mut started = Self { acked, stop, task };
        started.after(0).await?;
        Ok(started)
    }

    /// Waits for the first ack of a later term.
    async fn after(&mut self, term: u64) -> Result<Acked> {
        let later = self.acked.wait_for(|acked| acked.term > term);
        match tokio::time::timeout(PATIENCE, later).await {
            Ok(Ok(acked)) => Ok(*acked),
            // The loop has ended: it knows why.
            Ok(Err(_)) => {
                self.stop.cancel();
                anyhow::bail!("the publishing loop has ended")
            }
            Err(_) => anyhow::bail!("no ack of a later leader within {PATIENCE:?}"),
        }
    }

    fn last(&self) -> Acked {
        *self.acked.borrow()
    }

    /// How many messages were acknowledged.
    async fn end(self) -> Result<u64> {
        self.stop.cancel();
        self.task.await?
    }
}

async fn publish(publisher: Publisher, tell: watch::Sender<Acked>, stop: CancellationToken) -> Result<u64> {
    let payloads = Payloads::new(MESSAGE_BYTES, 0);
    let mut sent = 0;
    while !stop.is_cancelled() {
        let message = Message::new(format!("{STREAM}.0"), payloads.nth(sent));
        let ack = publisher.publish(&message).await?.await?;
        sent += 1;
        ensure!(
            ack.sequence == Some(sent),
            "message {sent} was stored at {:?}",
            ack.sequence
        );
        tell.send_replace(Acked {
            sequence: sent,
            term: ack.term,
            at: Instant::now(),
        });
    }
    publisher.close().await?;
    Ok(sent)
}

async fn cluster(lab: &Lab) -> Result<(Server, Client)> {
    let server = Server::cluster(lab, NODES, None).await?;
    let spec = StreamSpec {
        name: STREAM.to_owned(),
        replicas: NODES as u32,
        ..StreamSpec::default()
    };
    server.create_as(spec).await?;
    let client = server.client().await?;
    Ok((server, client))
}

fn rows_of(lab: &Lab, name: &str, times: usize) -> Rows {
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("rounds", times);
    rows.condition("replicas", NODES);
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition("shards", 1);
    rows.condition(
        "publishers",
        "1, one message at a time, from one client that knows all nodes",
    );
    rows.condition(
        "counted",
        "until the first ack of a later term; all messages stored once, in order, and every publish succeeds",
    );
    rows
}

/// The leader's process is killed with SIGKILL while messages are published, again and again.
pub async fn kills(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let kills = if lab.quick { 3 } else { 50 };
    let (mut server, client) = cluster(lab).await?;
    let mut publishing = Loop::start(&client).await?;
    let mut seconds = Vec::new();
    for kill in 0..kills {
        let leader = server.leader(STREAM).await?;
        let before = publishing.last();
        let begin = Instant::now();
        server.kill(leader)?;
        let acked = publishing.after(before.term).await?;
        seconds.push((acked.at - begin).as_secs_f64());
        eprintln!(
            "  kill {:>2}: n{} led; next ack after {} ms, message {}",
            kill + 1,
            leader + 1,
            number(millis(acked.at - begin)),
            acked.sequence
        );
        server.restart(leader).await?;
        server.healthy().await?;
    }
    let acknowledged = publishing.end().await?;
    let stored = server.stored(STREAM).await?.messages;
    ensure!(
        stored == acknowledged,
        "{stored} messages stored, {acknowledged} acknowledged"
    );

    let mut rows = rows_of(lab, name, kills);
    rows.condition(
        "killed",
        "the process of the shard's leader, with SIGKILL; then started again, until all is well",
    );
    rows.push(
        name,
        "s",
        &seconds,
        None,
        Some(Bar::ValueBelow(0.6)),
        Some(Bar::ValueBelow(0.25)),
    );
    rows.note(format!("the median of {kills} kills"));
    let worst = seconds.iter().copied().max_by(f64::total_cmp);
    rows.push(
        &format!("{name}/worst"),
        "s",
        worst.as_slice(),
        None,
        Some(Bar::ValueBelow(2.0)),
        None,
    );
    Ok(rows.done())
}

/// The leader is told to hand over while messages are published, again and again.
pub async fn step_downs(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let times = if lab.quick { 5 } else { 50 };
    let (server, client) = cluster(lab).await?;
    let mut publishing = Loop::start(&client).await?;
    let (mut acked_ms, mut answered_ms) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let before = publishing.last();
        let shard = Target::Shard {
            stream: STREAM.to_owned(),
            index: 0,
        };
        let begin = Instant::now();
        client.step_down(shard, "").await?;
        answered_ms.push(millis(begin.elapsed()));
        let acked = publishing.after(before.term).await?;
        acked_ms.push(millis(acked.at - begin));
        // The new one is to know that the others follow before it hands over itself.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let acknowledged = publishing.end().await?;
    let stored = server.stored(STREAM).await?.messages;
    ensure!(
        stored == acknowledged,
        "{stored} messages stored, {acknowledged} acknowledged"
    );

    let mut rows = rows_of(lab, name, times);
    rows.push(
        name,
        "ms",
        &acked_ms,
        None,
        Some(Bar::ValueBelow(100.0)),
        Some(Bar::ValueBelow(30.0)),
    );
    rows.note("from the call to the next leader's first ack, the median");
    rows.push(&format!("{name}/answer"), "ms", &answered_ms, None, None, None);
    rows.note("until the call was answered");
    Ok(rows.done())
}
