//! How long it takes to make a replica from scratch, and what that costs those who publish meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mainstem::client::proto::{GroupReport, StreamSpec};
use mainstem::client::{Client, Target};
use tokio::task::JoinSet;

use crate::contest::{Meter, settle};
use crate::lab::Lab;
use crate::mainstem::{STREAM, Server};
use crate::payload::Payloads;
use crate::report::{Against, Bar, Row, Rows, number};

/// One more than the stream has replicas: the new one comes there.
const NODES: usize = 4;
const REPLICAS: u32 = 3;
const MESSAGE_BYTES: usize = 1_024;
const PUBLISHERS: usize = 2;
const YIELD_EVERY: u64 = 64;
const LOOK_EVERY: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(300);
const MIB: f64 = 1_048_576.0;

async fn group(client: &Client) -> Result<GroupReport> {
    let report = client.cluster_report(Some(STREAM), Vec::new()).await?;
    report.groups.into_iter().next().context("the stream has no group")
}

/// Waits until nothing is planned and the stream's replicas stay where they are: a cluster spreads its groups when it is new, and
/// when a replica was moved.
async fn spread(client: &Client) -> Result<()> {
    let begin = Instant::now();
    loop {
        let plan = client.plan().await?;
        let now = group(client).await?;
        if plan.actions.is_empty() && now.change.is_none() && now.replicas.len() == REPLICAS as usize {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < PATIENCE,
            "replicas are still moved after {PATIENCE:?}: {plan:?}"
        );
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Takes a follower's replica from its node and makes a new one on the node that has none. How long that took, until the
/// new one votes and the old one is gone.
async fn replace(client: &Client) -> Result<Duration> {
    let before = group(client).await?;
    let follower = before.replicas.iter().find(|replica| !replica.leader);
    let from = follower.context("there is no follower")?.node_name.clone();
    let nodes = client.nodes(false).await?;
    let free = nodes
        .iter()
        .find(|node| before.replicas.iter().all(|replica| replica.node_id != node.node_id));
    let to = free.context("every node has a replica")?.name.clone();
    let shard = Target::Shard {
        stream: STREAM.to_owned(),
        index: 0,
    };
    let begin = Instant::now();
    client.move_replica(shard, &from, &to, true).await?;
    loop {
        let now = group(client).await?;
        let there = now
            .replicas
            .iter()
            .any(|replica| replica.node_name == to && replica.voter);
        if there && now.change.is_none() && now.replicas.iter().all(|replica| replica.node_name != from) {
            return Ok(begin.elapsed());
        }
        ensure!(
            begin.elapsed() < PATIENCE,
            "no replica on {to} after {PATIENCE:?}: {:?}",
            now.change
        );
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Publishers that never stop before they are told.
async fn publish(client: &Client, meter: &Meter) -> Result<JoinSet<Result<()>>> {
    let mut tasks = JoinSet::new();
    for n in 0..PUBLISHERS {
        let counted = meter.clone();
        let builder = client.publisher(STREAM).on_batch(move |report| {
            if report.outcome.is_ok() {
                counted.add(n, u64::from(report.messages));
            }
        });
        let (publisher, meter) = (builder.open().await?, meter.clone());
        let payloads = Payloads::new(MESSAGE_BYTES, n as u64);
        tasks.spawn(async move {
            let (mut number, subject) = (0, format!("{STREAM}.0"));
            while !meter.stopped() {
                publisher.send(&subject, &payloads.nth(number)).await?;
                number += 1;
                if number % YIELD_EVERY == 0 {
                    tokio::task::yield_now().await;
                }
            }
            publisher.close().await?;
            Ok(())
        });
    }
    Ok(tasks)
}

fn rate(meter: &Meter, before: u64, elapsed: Duration) -> f64 {
    (meter.total() - before) as f64 / elapsed.as_secs_f64()
}

pub async fn from_scratch(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let bytes: u64 = if lab.quick { 64 << 20 } else { 1 << 30 };
    let (mut idle, mut loaded, mut alone, mut beside) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..lab.rounds {
        // A new cluster for each round: the stream grows under load.
        settle(lab.scratch()).await?;
        let server = Server::cluster(lab, NODES, None).await?;
        let spec = StreamSpec {
            name: STREAM.to_owned(),
            replicas: REPLICAS,
            dedicated: true,
            ..StreamSpec::default()
        };
        server.create_as(spec).await?;
        let client = server.client().await?;
        spread(&client).await?;
        server
            .fill(STREAM, MESSAGE_BYTES, bytes / MESSAGE_BYTES as u64, 2)
            .await?;
        let stored = server.stored(STREAM).await?.bytes as f64 / MIB;
        spread(&client).await?;
        let took = replace(&client).await?;
        idle.push(stored / took.as_secs_f64());
        spread(&client).await?;

        let meter = Meter::new(PUBLISHERS);
        let mut tasks = publish(&client, &meter).await?;
        tokio::time::sleep(lab.warmup).await;
        let (begin, before) = (Instant::now(), meter.total());
        tokio::time::sleep(lab.measure).await;
        alone.push(rate(&meter, before, begin.elapsed()));
        let stored = server.stored(STREAM).await?.bytes as f64 / MIB;
        let before = meter.total();
        let took = replace(&client).await?;
        beside.push(rate(&meter, before, took));
        loaded.push(stored / took.as_secs_f64());
        meter.stop();
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        eprintln!(
            "  round {}: {} MiB/s; beside publishers {} MiB/s, who got {} of {} msg/s",
            round + 1,
            number(idle[round]),
            number(loaded[round]),
            number(beside[round]),
            number(alone[round])
        );
    }
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("nodes", NODES);
    rows.condition("replicas", REPLICAS);
    rows.condition("stored", format!("{} MiB", bytes >> 20));
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition(
        "publishers",
        format!("{PUBLISHERS}, as fast as it goes, to the same stream"),
    );
    rows.condition("raft.snapshot_rate", "the default");
    rows.push(name, "MiB/s", &idle, None, Some(Bar::ValueAtLeast(100.0)), None);
    rows.note("what the stream held, by the time from the order until the new replica votes and the old one is gone");
    let against = Some(Against {
        name: "without",
        rounds: &alone,
    });
    let publishing = format!("{name}/publishing");
    rows.push(
        &publishing,
        "msg/s",
        &beside,
        against,
        Some(Bar::RatioAtLeast(0.7)),
        None,
    );
    rows.note("acknowledged while a replica is made, and just before");
    rows.push(&format!("{name}/under-load"), "MiB/s", &loaded, None, None, None);
    Ok(rows.done())
}
