//! Many replicated streams: what they cost while nothing happens, how fast all of them are led again, and whether many
//! that publish at once are as fast as one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use mainstem::client::proto::StreamSpec;
use mainstem::client::{Client, Message};
use tokio::task::JoinSet;

use crate::contest::{Meter, settle};
use crate::lab::Lab;
use crate::mainstem::Server;
use crate::payload::Payloads;
use crate::report::{Against, Bar, Row, Rows, number};

const NODES: usize = 3;
/// Streams that are made at a time.
const MAKERS: usize = 32;
/// After the streams are made, until what that left to do is done: flushes by time, purges.
const SETTLE: Duration = Duration::from_secs(20);
const MESSAGE_BYTES: usize = 128;
const YIELD_EVERY: u64 = 64;
/// There are as many publishers as streams: each has little memory, so that all of them fit into the client.
const PUBLISHER_BYTES: usize = 128 << 10;
const BATCH_BYTES: usize = 32 << 10;

fn stream(n: usize) -> String {
    format!("s{n}")
}

/// So many streams of three replicas. How long making them took.
async fn make(client: &Client, streams: usize) -> Result<Duration> {
    let begin = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let mut makers = JoinSet::new();
    for _ in 0..MAKERS {
        let (client, next) = (client.clone(), next.clone());
        makers.spawn(async move {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= streams {
                    return anyhow::Ok(());
                }
                let spec = StreamSpec {
                    name: stream(n),
                    replicas: NODES as u32,
                    ..StreamSpec::default()
                };
                client
                    .create_stream(spec)
                    .await
                    .with_context(|| format!("stream {n}"))?;
                if n > 0 && n % 1_000 == 0 {
                    eprintln!("  {n} streams after {} s", number(begin.elapsed().as_secs_f64()));
                }
            }
        });
    }
    while let Some(done) = makers.join_next().await {
        done??;
    }
    Ok(begin.elapsed())
}

/// One stream of each group that holds any.
async fn one_of_each_group(client: &Client) -> Result<Vec<String>> {
    let report = client.cluster_report(None, Vec::new()).await?;
    let groups: BTreeMap<u64, String> = report.shards.into_iter().map(|s| (s.group_id, s.stream)).collect();
    Ok(groups.into_values().collect())
}

/// A message to each of these, at once: when the last was acknowledged, all their groups are led.
async fn publish_to(client: &Client, streams: &[String]) -> Result<()> {
    let all = streams.iter().map(|name| async move {
        let publisher = client.publisher(name).open().await?;
        let message = Message::new(format!("{name}.0"), "is it led?");
        publisher.publish(&message).await?.await?;
        publisher.close().await
    });
    try_join_all(all).await?;
    Ok(())
}

/// Processor time and memory of the nodes while nothing happens, and a kill.
pub async fn idle(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let (streams, looked) = match lab.quick {
        true => (500, Duration::from_secs(5)),
        false => (10_000, Duration::from_secs(30)),
    };
    settle(lab.scratch()).await?;
    let mut server = Server::cluster(lab, NODES, None).await?;
    let client = server.client().await?;
    let making = make(&client, streams).await?;
    let groups = one_of_each_group(&client).await?;
    tokio::time::sleep(if lab.quick { SETTLE / 10 } else { SETTLE }).await;

    let (begin, before) = (Instant::now(), server.cpu()?);
    tokio::time::sleep(looked).await;
    let cores = (server.cpu()? - before).as_secs_f64() / begin.elapsed().as_secs_f64();
    let memory = server.nodes().iter().map(|node| node.process().resident_bytes());
    let memory = memory.collect::<Result<Vec<u64>>>()?;
    let most = memory.iter().copied().max().context("no node")? as f64 / f64::from(1 << 20);

    // The first node: it founded the cluster, so it leads most.
    let victim = server.leader(&groups[0]).await?;
    let begin = Instant::now();
    server.kill(victim)?;
    publish_to(&client, &groups).await?;
    let led_again = begin.elapsed();
    let report = client.cluster_report(None, Vec::new()).await?;
    let summary = report.summary.unwrap_or_default();
    ensure!(
        summary.shards == streams as u64 && summary.leaderless_shards == 0,
        "{} shards, {} of them without a leader",
        summary.shards,
        summary.leaderless_shards
    );

    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("rounds", 1);
    rows.condition("replicas", NODES);
    rows.condition("streams", streams);
    rows.condition("shards", 1);
    rows.condition("groups", groups.len());
    rows.condition("made_in", format!("{:.1} s, {MAKERS} at a time", making.as_secs_f64()));
    rows.condition("looked_for", format!("{} s", looked.as_secs()));
    rows.condition(
        "memory_of_each",
        memory
            .iter()
            .map(|b| format!("{} MiB", b >> 20))
            .collect::<Vec<_>>()
            .join(", "),
    );
    rows.push(name, "cores", &[cores], None, Some(Bar::ValueBelow(0.25)), None);
    rows.note("processor time of all three nodes per second");
    rows.push(
        &format!("{name}/memory"),
        "MiB",
        &[most],
        None,
        Some(Bar::ValueBelow(1_024.0)),
        None,
    );
    rows.note("resident memory of the node that has most");
    let led = format!("{name}/led-again");
    rows.push(
        &led,
        "s",
        &[led_again.as_secs_f64()],
        None,
        Some(Bar::ValueBelow(5.0)),
        None,
    );
    rows.note("from kill -9 of a node that led to an ack from each group; then no shard is without a leader");
    Ok(rows.done())
}

/// So many publishers, each to the stream that `stream_of` says. Messages a second.
async fn turn(lab: &Lab, server: &Server, publishers: usize, stream_of: impl Fn(usize) -> String) -> Result<f64> {
    settle(lab.scratch()).await?;
    let meter = Meter::new(publishers);
    let client = server.client().await?;
    let opening = (0..publishers).map(|n| {
        let (client, counted, name) = (&client, meter.clone(), stream_of(n));
        async move {
            let builder = client
                .publisher(&name)
                .batch_bytes(BATCH_BYTES)
                .memory_bytes(PUBLISHER_BYTES);
            let builder = builder.on_batch(move |report| {
                if report.outcome.is_ok() {
                    counted.add(n, u64::from(report.messages));
                }
            });
            anyhow::Ok((name, builder.open().await?))
        }
    });
    let opened = join_all(opening).await.into_iter().collect::<Result<Vec<_>>>()?;
    let payloads = Payloads::new(MESSAGE_BYTES, 0);
    let mut tasks = JoinSet::new();
    for (name, publisher) in opened {
        let (payloads, meter, subject) = (payloads.clone(), meter.clone(), format!("{name}.0"));
        tasks.spawn(async move {
            let mut number = 0;
            while !meter.stopped() {
                publisher.send(&subject, &payloads.nth(number)).await?;
                number += 1;
                if number % YIELD_EVERY == 0 {
                    tokio::task::yield_now().await;
                }
            }
            publisher.close().await
        });
    }
    let (rate, _) = meter.measure(lab.warmup, lab.measure, || ()).await;
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(rate)
}

/// A thousand streams among ten thousand, each with a publisher, against one stream with a thousand publishers.
pub async fn publishing(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let (streams, publishers) = if lab.quick { (200, 100) } else { (10_000, 1_000) };
    let server = Server::cluster(lab, NODES, None).await?;
    let client = server.client().await?;
    make(&client, streams).await?;
    let (mut many, mut one) = (Vec::new(), Vec::new());
    for round in 0..lab.rounds {
        for place in 0..2 {
            let which = (round + place) % 2;
            let rate = match which {
                0 => turn(lab, &server, publishers, |n| stream(n * (streams / publishers))).await?,
                _ => turn(lab, &server, publishers, |_| stream(1)).await?,
            };
            eprintln!(
                "  round {}: {:<12} {:>12} msg/s",
                round + 1,
                ["many streams", "one stream"][which],
                number(rate)
            );
            [&mut many, &mut one][which].push(rate);
        }
    }
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("replicas", NODES);
    rows.condition("streams", format!("{publishers} of {streams}, one shard each"));
    rows.condition("publishers", format!("{publishers}, each with a connection of its own"));
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition("batch", format!("{} KiB at most", BATCH_BYTES >> 10));
    rows.condition(
        "window",
        format!("{} KiB unacknowledged per publisher", PUBLISHER_BYTES >> 10),
    );
    let against = Some(Against {
        name: "one stream",
        rounds: &one,
    });
    let (bar, stretch) = (Some(Bar::RatioAtLeast(0.7)), Some(Bar::RatioAtLeast(1.0)));
    rows.push(name, "msg/s", &many, against, bar, stretch);
    Ok(rows.done())
}
