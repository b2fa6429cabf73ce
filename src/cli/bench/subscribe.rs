//! The reading half of the bench: takes batches as they are stored and verifies each message.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use indicatif::ProgressBar;

use super::Load;
use super::content::{Content, now_us};
use super::report::{Latency, Read};
use crate::cli::failure::{Exit, Failure};
use crate::client::{Client, Reader, Start};

/// When reading ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// When everything stored was read.
    Tail,
    /// After so many messages, which are still being written.
    Count(u64),
}

/// A reader that is ready.
pub(super) struct Reading {
    reader: Reader,
    until: Until,
}

pub(super) async fn open(load: &Load, client: &Client, stream: &str, until: Until) -> Result<Reading, Failure> {
    let _ = load;
    let reader = client.reader(stream);
    let reader = match until {
        Until::Tail => reader.from(Start::Beginning).stop_at_tail(),
        Until::Count(_) => reader.from(Start::New),
    };
    Ok(Reading {
        reader: reader.open().await?,
        until,
    })
}

pub(super) async fn run(
    load: &Load,
    client: &Client,
    stream: &str,
    content: &Arc<Content>,
    bar: &ProgressBar,
    until: Until,
) -> Result<Read, Failure> {
    open(load, client, stream, until).await?.run(load, content, bar).await
}

/// What one publisher's messages look like so far.
#[derive(Debug, Default)]
struct Seen {
    messages: u64,
    /// Numbers seen, a bit each.
    numbers: Vec<u64>,
    twice: u64,
}

impl Reading {
    pub(super) async fn run(mut self, load: &Load, content: &Arc<Content>, bar: &ProgressBar) -> Result<Read, Failure> {
        let begun = Instant::now();
        let mut read = Read::default();
        let mut seen: HashMap<u32, Seen> = HashMap::new();
        let mut latency = Latency::new();
        // Per shard and publisher, the last number: a publisher's messages keep their order within a shard.
        let mut last: HashMap<(u32, u32), u64> = HashMap::new();
        while let Some(batch) = self.reader.next_batch().await? {
            let arrived = now_us();
            for (sequence, record) in &batch {
                read.messages += 1;
                read.bytes += record.payload.len() as u64;
                if load.no_verify {
                    continue;
                }
                let mark = content.read(record.payload).ok_or_else(|| {
                    Failure::new(
                        Exit::Failed,
                        format!("message {sequence} of shard {} is not what a bench wrote", batch.shard),
                    )
                    .hint("a stream with other messages needs --no-verify")
                })?;
                let before = last.insert((batch.shard, mark.publisher), mark.number);
                // A second bench on the same stream begins at 0 again.
                if before.is_some_and(|b| b >= mark.number && mark.number != 0 && load.stream.is_none()) {
                    return Err(Failure::new(
                        Exit::Failed,
                        format!("message {sequence} of shard {} is out of order", batch.shard),
                    ));
                }
                let of = seen.entry(mark.publisher).or_default();
                of.messages += 1;
                let word = (mark.number / 64) as usize;
                if word >= of.numbers.len() {
                    of.numbers.resize(word + 1, 0);
                }
                let bit = 1 << (mark.number % 64);
                of.twice += u64::from(of.numbers[word] & bit != 0);
                of.numbers[word] |= bit;
                if matches!(self.until, Until::Count(_)) {
                    latency.record_us(arrived.saturating_sub(mark.time_us));
                }
            }
            bar.inc(u64::from(batch.len()));
            if matches!(self.until, Until::Count(n) if read.messages >= n) {
                break;
            }
        }
        read.took = begun.elapsed();
        read.repeated = seen.values().map(|s| s.twice).sum();
        read.distinct = seen.values().map(|s| s.messages - s.twice).sum();
        read.latency = matches!(self.until, Until::Count(_)).then_some(latency);
        Ok(read)
    }
}

impl Read {
    /// Everything was read, once.
    pub(super) fn check_all(&self, load: &Load) -> Result<(), Failure> {
        if self.distinct == load.count && self.repeated == 0 {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Failed,
            format!(
                "{} messages were acknowledged, but {} different ones were read, {} of them more than once",
                load.count, self.distinct, self.repeated
            ),
        ))
    }
}
