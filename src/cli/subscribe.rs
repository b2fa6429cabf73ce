//! `mainstem sub`.

use std::io::{self, BufWriter, Write as _};
use std::time::{Duration, Instant};

use clap::Args;

use super::connect::{Connect, Globals};
use super::failure::{Exit, Failure};
use super::output::{self, message_json, printable};
use super::units::{self, show_age_us, show_count, show_size, show_time_us};
use crate::client::proto;
use crate::client::{MessageBatch, ReadEvent, Reader, RecordView, Start, StoredMessage};

/// Prints the messages of a stream, in the order of each shard, and ends when everything stored was printed. With
/// --follow, goes on with new ones. When the connection breaks, reading goes on where it ended.
#[derive(Debug, Args)]
pub struct SubArgs {
    /// The stream
    stream: String,

    /// Where to begin: beginning, new, a sequence, last-N (of each shard), a time (2026-01-31T12:00:00Z), or so long ago
    /// (10m)
    #[arg(long, value_name = "WHERE", default_value = "beginning", value_parser = units::start)]
    from: Start,

    /// Go on with new messages
    #[arg(long, short = 'f')]
    follow: bool,

    /// Only messages whose subject matches, e.g. `orders.*.eu` or `orders.>`; can be repeated
    #[arg(long, value_name = "FILTER")]
    filter: Vec<String>,

    /// End after so many messages
    #[arg(long, short = 'n', value_name = "N", value_parser = units::count)]
    count: Option<u64>,

    /// Only this shard; can be repeated
    #[arg(long, value_name = "INDEX")]
    shard: Vec<u32>,

    /// Print the payloads only, as they are, each followed by --delimiter
    #[arg(long, conflicts_with = "jsonl")]
    raw: bool,

    /// Print each message as a line of JSON, as `mainstem pub --jsonl` reads it
    #[arg(long)]
    jsonl: bool,

    /// With --raw: what follows each payload, with the escapes \n \r \t \0 \\
    #[arg(long, value_name = "TEXT", default_value = "\\n", value_parser = units::separator, allow_hyphen_values = true)]
    delimiter: Bytes,

    #[command(flatten)]
    consistency: ConsistencyArg,

    /// How long to try again when the server is away; `0s`: try once
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = units::duration)]
    retry_for: Duration,

    /// Print no status
    #[arg(long, short = 'q')]
    quiet: bool,

    #[command(flatten)]
    connect: Connect,
}

type Bytes = std::vec::Vec<u8>;

/// `--consistency`.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct ConsistencyArg {
    /// `local`: what a replica has applied, even without a leader or a quorum; how recent that is, is told
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Consistency::Linearizable)]
    consistency: Consistency,
}

/// What a read may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Consistency {
    /// Everything acknowledged before the read began; the leader is asked
    Linearizable,
    /// What a replica has applied: perhaps not the newest
    Local,
}

impl ConsistencyArg {
    pub(super) fn get(self) -> proto::Consistency {
        match self.consistency {
            Consistency::Linearizable => proto::Consistency::Linearizable,
            Consistency::Local => proto::Consistency::Local,
        }
    }
}

/// "shard 0 as n2 has it: up to sequence 41; it heard from the leader 12 ms ago".
pub(super) fn freshness_note(fresh: &proto::Freshness) -> String {
    let heard = match fresh.heard_ago_us {
        Some(ago) => format!("in touch with the leader {} ago", show_age_us(ago)),
        None => "not in touch with a leader since it started".to_owned(),
    };
    let behind = match fresh.unapplied_entries {
        0 => String::new(),
        n => format!(", {} entries not applied yet", show_count(n)),
    };
    format!(
        "shard {} as n{} has it: up to sequence {}, {heard}{behind}",
        fresh.shard,
        fresh.node_id,
        fresh.tail.saturating_sub(1)
    )
}

pub(super) fn freshness_json(fresh: &proto::Freshness) -> serde_json::Value {
    serde_json::json!({
        "shard": fresh.shard, "node_id": fresh.node_id, "tail": fresh.tail, "heard_ago_us": fresh.heard_ago_us,
        "unapplied_entries": fresh.unapplied_entries,
    })
}

/// Counts of what was printed.
#[derive(Debug, Default)]
struct Done {
    messages: u64,
    bytes: u64,
}

impl SubArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let mut builder = self
            .connect
            .client(globals)?
            .with_consistency(self.consistency.get())
            .reader(&self.stream)
            .from(self.from.clone())
            .shards(self.shard.iter().copied());
        builder = builder.retry_for(self.retry_for);
        for filter in &self.filter {
            builder = builder.filter(filter);
        }
        if !self.follow {
            builder = builder.stop_at_tail();
        }
        if let Some(count) = self.count {
            // No use in having the server send what is not wanted.
            builder = builder.credit(count.clamp(1, 1_000_000), 16 << 20);
        }
        let mut reader = builder.open().await?;
        let begun = Instant::now();
        let mut done = Done::default();
        let result = tokio::select! {
            result = self.print(&mut reader, &mut done) => result,
            _ = tokio::signal::ctrl_c() => Ok(()),
        };
        if !self.quiet {
            let next: Vec<_> = reader
                .positions()
                .iter()
                .map(|(s, q)| format!("shard {s}: {q}"))
                .collect();
            output::status(format!(
                "{} messages, {} of payload in {:.2} s; next sequence of {}",
                show_count(done.messages),
                show_size(done.bytes),
                begun.elapsed().as_secs_f64(),
                next.join(", "),
            ));
        }
        result?;
        match self.count {
            Some(wanted) if done.messages < wanted && !self.follow && done.messages == 0 && wanted > 0 => {
                Err(Failure::new(Exit::NotFound, "there is no such message"))
            }
            Some(_) | None => Ok(()),
        }
    }

    async fn print(&self, reader: &mut Reader, done: &mut Done) -> Result<(), Failure> {
        let mut out = BufWriter::with_capacity(1 << 18, io::stdout());
        if self.count == Some(0) {
            return Ok(());
        }
        while let Some(event) = reader.next_event().await? {
            match event {
                ReadEvent::Batch(batch) => {
                    for (sequence, record) in &batch {
                        self.message(&mut out, &batch, sequence, &record)?;
                        done.messages += 1;
                        done.bytes += record.payload.len() as u64;
                        if Some(done.messages) == self.count {
                            return Ok(out.flush()?);
                        }
                    }
                    if self.follow {
                        out.flush()?;
                    }
                }
                ReadEvent::Truncated { shard, from, to } => {
                    output::status(format!(
                        "sequences {from} to {} of shard {shard} are no longer stored",
                        to - 1
                    ));
                }
                ReadEvent::CaughtUp { freshness, .. } => {
                    out.flush()?;
                    for fresh in freshness.iter().filter(|_| !self.quiet && !self.follow) {
                        output::status(freshness_note(fresh));
                    }
                }
                ReadEvent::Heartbeat { .. } => out.flush()?,
            }
        }
        Ok(out.flush()?)
    }

    fn message(
        &self,
        out: &mut impl io::Write,
        batch: &MessageBatch,
        sequence: u64,
        record: &RecordView<'_>,
    ) -> io::Result<()> {
        if self.raw {
            out.write_all(record.payload)?;
            return out.write_all(&self.delimiter);
        }
        if self.jsonl {
            let message = batch.to_owned_message(sequence, record);
            serde_json::to_writer(&mut *out, &message_json(&message))?;
            return out.write_all(b"\n");
        }
        write!(
            out,
            "{}:{sequence} {} {} ",
            batch.shard,
            show_time_us(batch.append_time_us),
            record.subject
        )?;
        out.write_all(printable(record.payload, usize::MAX).as_bytes())?;
        out.write_all(b"\n")
    }
}

/// A message for people, in several lines.
pub(super) fn describe(m: &StoredMessage) -> String {
    let mut pairs = vec![
        ("sequence", format!("{} of shard {}", m.sequence, m.shard)),
        ("time", show_time_us(m.append_time_us)),
        ("subject", m.subject.clone()),
    ];
    if let Some(key) = &m.key {
        pairs.push(("key", printable(key, 200)));
    }
    if let Some(id) = &m.message_id {
        pairs.push(("message id", printable(id.as_bytes(), 300)));
    }
    if let Some(time) = m.event_time_us {
        pairs.push(("event time", show_time_us(time)));
    }
    for (name, value) in &m.headers {
        pairs.push(("header", format!("{name}: {}", printable(value, 200))));
    }
    pairs.push(("payload", show_size(m.payload.len() as u64)));
    output::pairs(&pairs)
}
