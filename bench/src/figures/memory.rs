//! Memory while a lot is ingested.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mainstem::client::proto::Limits;

use crate::lab::Lab;
use crate::mainstem::{STREAM, Server};
use crate::report::{Against, Bar, Row, Rows, median};

const MESSAGE_BYTES: usize = 1_024;
const PUBLISHERS: u64 = 2;
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// Flat: the last quarter's median is at most so much above the second quarter's.
const FLAT: f64 = 1.1;

/// Resident memory of the server with its defaults; retention keeps the disk from filling.
pub async fn while_ingesting(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let (ingest, keep): (u64, u64) = if lab.quick {
        (256 << 20, 64 << 20)
    } else {
        (10 << 30, 3 << 30)
    };
    let messages = ingest / MESSAGE_BYTES as u64;
    let server = Server::start(lab, None).await?;
    server
        .create(
            STREAM,
            1,
            Limits {
                max_bytes: Some(keep),
                ..Limits::default()
            },
        )
        .await?;

    let mut mebibytes = Vec::new();
    {
        let filling = server.fill(STREAM, MESSAGE_BYTES, messages, PUBLISHERS);
        tokio::pin!(filling);
        let mut ticks = tokio::time::interval(SAMPLE_EVERY);
        loop {
            tokio::select! {
                done = &mut filling => {
                    done?;
                    break;
                }
                _ = ticks.tick() => mebibytes.push(server.process().resident_bytes()? as f64 / f64::from(1 << 20)),
            }
        }
    }
    let stored = server.stored(STREAM).await?;
    ensure!(
        stored.written == messages,
        "{} messages written of {messages}",
        stored.written
    );

    let peak = mebibytes.iter().copied().max_by(f64::total_cmp).context("no sample")?;
    let quarter = mebibytes.len() / 4;
    let second = median(&mebibytes[quarter..2 * quarter]).unwrap_or(peak);
    let last = median(&mebibytes[3 * quarter..]).unwrap_or(peak);

    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("rounds", 1);
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition("ingested", format!("{} MiB", ingest >> 20));
    rows.condition("retention", format!("max_bytes {} MiB", keep >> 20));
    rows.condition("subjects", 1);
    rows.condition("shards", 1);
    rows.condition("publishers", PUBLISHERS);
    rows.condition(
        "sampled",
        format!(
            "VmRSS, every {} ms: {} samples",
            SAMPLE_EVERY.as_millis(),
            mebibytes.len()
        ),
    );
    rows.push(
        name,
        "MiB",
        &[peak],
        None,
        Some(Bar::ValueBelow(700.0)),
        Some(Bar::ValueBelow(400.0)),
    );
    rows.note("the highest sample");
    let against = Against {
        name: "second quarter",
        rounds: &[second],
    };
    rows.push(
        &format!("{name}/flat"),
        "MiB",
        &[last],
        Some(against),
        Some(Bar::RatioAtMost(FLAT)),
        None,
    );
    rows.note("medians of the last and of the second quarter of the samples");
    Ok(rows.done())
}
