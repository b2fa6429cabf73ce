//! From kill -9 to the next ack.

use std::time::Instant;

use anyhow::{Result, ensure};
use mainstem::client::proto::Limits;

use crate::lab::Lab;
use crate::mainstem::{STREAM, Server};
use crate::report::{Bar, Row, Rows, number};

const MESSAGE_BYTES: usize = 1_024;
/// Published before each further kill, so that there is something to recover.
const BETWEEN_BYTES: u64 = 32 << 20;

/// Killed right after the last ack, while the state has not flushed what was published last.
pub async fn with_data(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let stored_bytes: u64 = if lab.quick { 64 << 20 } else { 1 << 30 };
    let mut messages = stored_bytes / MESSAGE_BYTES as u64;
    let mut server = Server::start(lab, None).await?;
    server.create(STREAM, 1, Limits::default()).await?;
    server.fill(STREAM, MESSAGE_BYTES, messages, 2).await?;

    let (mut ready, mut acked) = (Vec::new(), Vec::new());
    for round in 0..lab.rounds {
        server.kill(0)?;
        let begin = Instant::now();
        let until_ready = server.restart(0).await?;
        server.publish_one(STREAM).await?;
        let until_acked = begin.elapsed();
        messages += 1;
        ready.push(until_ready.as_secs_f64());
        acked.push(until_acked.as_secs_f64());
        eprintln!(
            "  round {}: ready after {} s, first ack after {} s",
            round + 1,
            number(until_ready.as_secs_f64()),
            number(until_acked.as_secs_f64())
        );
        let stored = server.stored(STREAM).await?.messages;
        ensure!(
            stored == messages,
            "{stored} messages after the restart, {messages} acknowledged"
        );
        let more = BETWEEN_BYTES / MESSAGE_BYTES as u64;
        server.fill(STREAM, MESSAGE_BYTES, more, 2).await?;
        messages += more;
    }
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition("stored", format!("{} MiB", stored_bytes >> 20));
    rows.condition("subjects", 1);
    rows.condition("shards", 1);
    rows.condition("killed", "with SIGKILL, right after the last of a run of acks");
    rows.push(name, "s", &acked, None, Some(Bar::ValueBelow(2.0)), None);
    rows.note("from starting the process to the first ack of a new client");
    rows.push(&format!("{name}/ready"), "s", &ready, None, None, None);
    rows.note("from starting the process to its ports file, written once it serves");
    Ok(rows.done())
}
