//! What the disk pays: bytes written, and bytes held after trims.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mainstem::client::Purge;
use mainstem::client::proto::Limits;

use crate::contest::settle;
use crate::lab::Lab;
use crate::mainstem::{STREAM, Server};
use crate::process::disk_held_bytes;
use crate::report::{Against, Bar, Row, Rows, number};

const MESSAGE_BYTES: usize = 1_024;
const PUBLISHERS: u64 = 2;

/// Bytes that the server makes dirty in files per byte of payload, to its orderly end.
pub async fn write_amplification(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let ingest: u64 = if lab.quick { 256 << 20 } else { 4 << 30 };
    let messages = ingest / MESSAGE_BYTES as u64;
    let mut factors = Vec::new();
    for round in 0..lab.rounds.min(3) {
        settle(lab.scratch()).await?;
        let mut server = Server::start(lab, None).await?;
        server.create(STREAM, 1, Limits::default()).await?;
        server.fill(STREAM, MESSAGE_BYTES, messages, PUBLISHERS).await?;
        let stored = server.stored(STREAM).await?.messages;
        ensure!(stored == messages, "{stored} messages stored of {messages}");
        wait_until_quiet(&server).await?;
        let seen = server.process().written_bytes()?;
        let ended = server.terminate().await?;
        ensure!(ended.status.success(), "the server ended with {}", ended.status);
        // The kernel's account at the end holds what the last flush wrote; it cannot be less than what was seen.
        ensure!(
            ended.written_bytes >= seen,
            "{} bytes in the end, {seen} before",
            ended.written_bytes
        );
        factors.push(ended.written_bytes as f64 / ingest as f64);
        eprintln!(
            "  round {}: {} bytes written per byte",
            round + 1,
            number(factors[factors.len() - 1])
        );
    }
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("rounds", factors.len());
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition("ingested", format!("{} MiB", ingest >> 20));
    rows.condition("subjects", 1);
    rows.condition("shards", 1);
    rows.condition(
        "counted",
        "write_bytes of the kernel's account of the process, from its start to its orderly end",
    );
    rows.push(
        name,
        "bytes/byte",
        &factors,
        None,
        Some(Bar::ValueAtMost(2.6)),
        Some(Bar::ValueAtMost(2.2)),
    );
    Ok(rows.done())
}

/// Until the server has written nothing for 6 s: longer than it waits before it flushes by time.
async fn wait_until_quiet(server: &Server) -> Result<()> {
    const QUIET: Duration = Duration::from_secs(6);
    let (begin, mut since, mut last) = (Instant::now(), Instant::now(), server.process().written_bytes()?);
    while since.elapsed() < QUIET && begin.elapsed() < 20 * QUIET {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = server.process().written_bytes()?;
        // A node that idles still notes a few things now and then.
        if now > last + (1 << 20) {
            (since, last) = (Instant::now(), now);
        }
    }
    Ok(())
}

/// A stream of the trim figure: what is published to it and what may stay, in units.
struct Kept {
    stream: &'static str,
    published: u64,
    retention: Retention,
}

enum Retention {
    All,
    /// These many bytes.
    Bytes(u64),
    /// These many units' worth of messages.
    Messages(u64),
    Age(Duration),
    /// Purged by hand down to these many units' worth of messages.
    Purged(u64),
}

const AGE: Duration = Duration::from_secs(5);
const TRIM_TIME: Duration = Duration::from_secs(60);

/// In units of 128 MiB: 36 published, about 12 stay.
const MIX: [Kept; 5] = [
    Kept {
        stream: "all",
        published: 4,
        retention: Retention::All,
    },
    Kept {
        stream: "bytes",
        published: 8,
        retention: Retention::Bytes(2),
    },
    Kept {
        stream: "messages",
        published: 8,
        retention: Retention::Messages(2),
    },
    Kept {
        stream: "age",
        published: 8,
        retention: Retention::Age(AGE),
    },
    Kept {
        stream: "purged",
        published: 8,
        retention: Retention::Purged(4),
    },
];

/// Bytes held on disk 60 s after the last trim, per live byte.
pub async fn space_after_trim(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let unit: u64 = if lab.quick { 8 << 20 } else { 128 << 20 };
    let unit_messages = unit / MESSAGE_BYTES as u64;
    let server = Server::start(lab, None).await?;
    for kept in &MIX {
        let limits = match &kept.retention {
            Retention::All | Retention::Purged(_) => Limits::default(),
            Retention::Bytes(units) => Limits {
                max_bytes: Some(units * unit),
                ..Limits::default()
            },
            Retention::Messages(units) => Limits {
                max_messages: Some(units * unit_messages),
                ..Limits::default()
            },
            Retention::Age(age) => Limits {
                max_age_us: Some(u64::try_from(age.as_micros())?),
                ..Limits::default()
            },
        };
        server.create(kept.stream, 1, limits).await?;
    }
    // Side by side, so that every file on disk holds some of each.
    let most = MIX.iter().map(|k| k.published).max().context("no stream")?;
    for slice in 0..most {
        let filling = MIX
            .iter()
            .filter(|k| slice < k.published)
            .map(|k| server.fill(k.stream, MESSAGE_BYTES, unit_messages, 1));
        futures_util::future::try_join_all(filling).await?;
    }
    let client = server.client().await?;
    for kept in &MIX {
        if let Retention::Purged(units) = kept.retention {
            let purge = Purge {
                keep: Some(units * unit_messages),
                ..Purge::default()
            };
            client.purge_stream(kept.stream, purge).await?;
        }
    }
    let begin = Instant::now();
    while server.stored("age").await?.messages > 0 {
        ensure!(
            begin.elapsed() < TRIM_TIME,
            "messages of {AGE:?} age are not gone after {:?}",
            begin.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let trimmed = Instant::now();
    let mut live = 0;
    for kept in &MIX {
        let bytes = server.stored(kept.stream).await?.bytes;
        eprintln!(
            "  {:<10} {:>6} MiB published, {:>6} MiB live",
            kept.stream,
            (kept.published * unit) >> 20,
            bytes >> 20
        );
        live += bytes;
    }
    let mut reached = None;
    while trimmed.elapsed() < TRIM_TIME {
        let held = disk_held_bytes(&server.data_dir())?;
        if reached.is_none() && held as f64 <= 1.3 * live as f64 {
            reached = Some(trimmed.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let held = disk_held_bytes(&server.data_dir())?;
    for part in ["log", "state"] {
        let held = disk_held_bytes(&server.data_dir().join(part))?;
        eprintln!("  {part:<10} {:>6} MiB held", held >> 20);
    }

    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("rounds", 1);
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition(
        "published",
        format!("{} MiB", (MIX.iter().map(|k| k.published).sum::<u64>() * unit) >> 20),
    );
    rows.condition(
        "retention",
        "five streams side by side: no limit, max_bytes, max_messages, max_age 5 s, purged by hand",
    );
    rows.condition(
        "held",
        "blocks of all files in the data directory, 60 s after the last trim",
    );
    rows.condition(
        "1.3_reached_after",
        reached.map_or("not within 60 s".to_owned(), |after| {
            format!("{:.1} s", after.as_secs_f64())
        }),
    );
    let against = Against {
        name: "live bytes",
        rounds: &[mebibytes(live)],
    };
    rows.push(
        name,
        "MiB",
        &[mebibytes(held)],
        Some(against),
        Some(Bar::RatioAtMost(1.3)),
        None,
    );
    Ok(rows.done())
}
