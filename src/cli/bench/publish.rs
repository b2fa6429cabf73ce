//! The publishing half of the bench.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use indicatif::ProgressBar;
use tokio::sync::mpsc;

use super::Load;
use super::content::{Content, Mark, now_us};
use super::report::{Latency, Published};
use crate::cli::failure::Failure;
use crate::client::{Client, ClientError, Message, PendingAck, Publisher, RecordFields};

/// One in so many messages has its latency measured, unless each waits for its ack.
const SAMPLE_EVERY: u64 = 32;
/// Samples on their way.
const SAMPLES: usize = 65_536;

/// Publishes the load; returns when everything is acknowledged.
pub(super) async fn run(
    load: &Load,
    client: &Client,
    stream: &str,
    subjects: &[String],
    content: &Arc<Content>,
    bar: &ProgressBar,
) -> Result<Published, Failure> {
    let mut publishers = Vec::new();
    for _ in 0..load.publishers {
        let bar = bar.clone();
        let publisher = client
            .publisher(stream)
            .codec(load.codec)
            .batch_bytes(load.batch_bytes as usize)
            .batch_messages(u32::try_from(load.batch_messages).unwrap_or(u32::MAX))
            .linger(load.linger)
            .memory_bytes(load.in_flight as usize)
            .on_batch(move |report| bar.inc(u64::from(report.messages)))
            .open()
            .await?;
        publishers.push(publisher);
    }
    let begun = Instant::now();
    // Gathered in one task; each publisher's session, which encodes and sends, has a task of its own.
    let shares = (0u32..)
        .zip(publishers)
        .map(|(index, p)| one(load, index, p, content, subjects));
    let mut latency = Latency::new();
    for part in try_join_all(shares).await? {
        latency.add(&part);
    }
    Ok(Published {
        messages: load.count,
        bytes: load.count * load.size,
        took: begun.elapsed(),
        latency,
    })
}

/// The share of one publisher: every `publishers`-th message.
async fn one(
    load: &Load,
    index: u32,
    publisher: Publisher,
    content: &Content,
    subjects: &[String],
) -> Result<Latency, ClientError> {
    let share =
        load.count / u64::from(load.publishers) + u64::from(u64::from(index) < load.count % u64::from(load.publishers));
    if load.sync {
        return one_by_one(load, index, share, publisher, content, subjects).await;
    }
    let (samples, mut waiting) = mpsc::channel::<(Instant, PendingAck)>(SAMPLES);
    let collect = async {
        let mut latency = Latency::new();
        while let Some((begun, ack)) = waiting.recv().await {
            // A failure is told by `close`.
            if ack.await.is_ok() {
                latency.record(begun.elapsed());
            }
        }
        Ok(latency)
    };
    let feed = async {
        let result = feed(load, index, share, &publisher, content, subjects, &samples).await;
        drop(samples);
        result?;
        publisher.close().await
    };
    let (latency, ()) = tokio::try_join!(collect, feed)?;
    Ok(latency)
}

async fn feed(
    load: &Load,
    index: u32,
    share: u64,
    publisher: &Publisher,
    content: &Content,
    subjects: &[String],
    samples: &mpsc::Sender<(Instant, PendingAck)>,
) -> Result<(), ClientError> {
    let mut payload = Vec::new();
    let mut id = String::new();
    for number in 0..share {
        content.write(
            Mark {
                publisher: index,
                number,
                time_us: now_us(),
            },
            &mut payload,
        );
        let subject = subjects[number as usize % subjects.len()].as_str();
        let sampled = number % SAMPLE_EVERY == 0 && samples.capacity() > 0;
        if sampled {
            let begun = Instant::now();
            let ack = publisher
                .publish(&message(load, subject, index, number, &payload))
                .await?;
            // There is room: nobody else sends.
            let _ = samples.try_send((begun, ack));
        } else {
            let message_id = load.msg_ids.then(|| {
                id = id_of(index, number);
                id.as_str()
            });
            publisher
                .send_fields(&RecordFields {
                    subject,
                    payload: &payload,
                    message_id,
                    ..RecordFields::default()
                })
                .await?;
        }
    }
    Ok(())
}

fn id_of(publisher: u32, number: u64) -> String {
    format!("{publisher}-{number}")
}

fn message(load: &Load, subject: &str, publisher: u32, number: u64, payload: &[u8]) -> Message {
    let message = Message::new(subject, payload.to_vec());
    if load.msg_ids {
        message.with_message_id(id_of(publisher, number))
    } else {
        message
    }
}

async fn one_by_one(
    load: &Load,
    index: u32,
    share: u64,
    publisher: Publisher,
    content: &Content,
    subjects: &[String],
) -> Result<Latency, ClientError> {
    let mut latency = Latency::new();
    let mut payload = Vec::new();
    for number in 0..share {
        content.write(
            Mark {
                publisher: index,
                number,
                time_us: now_us(),
            },
            &mut payload,
        );
        let subject = &subjects[number as usize % subjects.len()];
        let begun = Instant::now();
        publisher
            .publish(&message(load, subject, index, number, &payload))
            .await?
            .await?;
        latency.record(begun.elapsed());
    }
    publisher.close().await?;
    Ok(latency)
}

/// A rate per second.
pub(super) fn per_second(amount: u64, took: Duration) -> f64 {
    amount as f64 / took.as_secs_f64().max(1e-9)
}
