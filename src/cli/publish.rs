//! `mainstem pub`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use serde_json::json;

use super::connect::{Connect, Globals};
use super::failure::{Exit, Failure};
use super::input::{Records, Separator, parse_json};
use super::output;
use super::units::{self, show_count, show_size};
use crate::client::{BatchReport, Codec, Expect, Message, Publisher, RecordFields};

/// With MESSAGE, publishes it and prints where it was stored. Without, publishes the records of --file or of the
/// standard input; each is acknowledged when it is on disk, and the summary tells how many were.
#[derive(Debug, Args)]
pub struct PubArgs {
    /// The stream
    stream: String,

    /// The message; `-` or nothing: read the standard input
    message: Option<String>,

    /// Subject; `{n}` stands for the number of the message, from 1 [default: the stream's name]
    #[arg(long)]
    subject: Option<String>,

    /// Partition key; `{n}` as in --subject
    #[arg(long)]
    key: Option<String>,

    /// A header, as NAME:VALUE; can be repeated
    #[arg(long, short = 'H', value_name = "NAME:VALUE", value_parser = header)]
    header: Vec<(String, String)>,

    /// Message id for de-duplication; `{n}` as in --subject
    #[arg(long, value_name = "ID")]
    msg_id: Option<String>,

    /// Store the message only if this is the last sequence of its shard (0: there was none yet)
    #[arg(long, value_name = "SEQ")]
    expect_last_sequence: Option<u64>,

    /// Store the message only if this is the sequence of the last message with its subject (0: there is none)
    #[arg(long, value_name = "SEQ")]
    expect_last_subject_sequence: Option<u64>,

    /// Read records from this file
    #[arg(long, short = 'f', value_name = "FILE", conflicts_with = "message")]
    file: Option<PathBuf>,

    /// Each line is a message as JSON: subject, payload or payload_base64, key, message_id, event_time_us, headers
    #[arg(long, conflicts_with_all = ["record_separator", "delimiter"])]
    jsonl: bool,

    /// What separates records
    #[arg(
        long,
        value_enum,
        value_name = "WHAT",
        default_value = "newline",
        conflicts_with = "delimiter"
    )]
    record_separator: RecordSeparator,

    /// Text that separates records, with the escapes \n \r \t \0 \\; empty: the whole input is one message
    #[arg(long, value_name = "TEXT", value_parser = units::separator, allow_hyphen_values = true)]
    delimiter: Option<Bytes>,

    /// Compression of the batches
    #[arg(long, value_name = "CODEC", default_value = "none", value_parser = codec)]
    codec: Codec,

    /// Size at which a batch is sent
    #[arg(long, value_name = "SIZE", default_value = "256KiB", value_parser = units::size)]
    batch_bytes: u64,

    /// How long a batch waits for more messages while earlier ones are on their way
    #[arg(long, value_name = "DURATION", default_value = "1ms", value_parser = units::duration)]
    linger: Duration,

    /// How long to try again when the server is away or busy; `0s`: try once. A single MESSAGE is always tried once, see
    /// --connect-for
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = units::duration)]
    retry_for: Duration,

    /// Write a line of JSON for each acknowledged batch to this file: shard, first and last sequence, and `inputs`, the
    /// ranges of input records (from 0) that it holds
    #[arg(long, value_name = "FILE")]
    acks: Option<PathBuf>,

    /// Print no progress and no summary
    #[arg(long, short = 'q')]
    quiet: bool,

    #[command(flatten)]
    connect: Connect,
}

// clap would take a `Vec<u8>` for an argument that can be given several times.
type Bytes = std::vec::Vec<u8>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RecordSeparator {
    /// The end of the line
    Newline,
    /// Empty lines, any number of them
    BlankLine,
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once(':')
        .ok_or_else(|| format!("`{text}` is not NAME:VALUE"))?;
    Ok((name.trim().to_owned(), value.trim_start().to_owned()))
}

pub(super) fn codec(text: &str) -> Result<Codec, String> {
    Codec::parse(text).ok_or_else(|| format!("`{text}` is none of: none, lz4, zstd"))
}

/// A text in which `{n}` stands for the number of the message.
#[derive(Debug)]
struct Template {
    parts: Vec<String>,
    made: String,
}

impl Template {
    fn new(text: &str) -> Self {
        Template {
            parts: text.split("{n}").map(str::to_owned).collect(),
            made: text.to_owned(),
        }
    }

    fn with(&mut self, n: u64) -> &str {
        if self.parts.len() > 1 {
            self.made = self.parts.join(&n.to_string());
        }
        &self.made
    }
}

impl PubArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match &self.message {
            Some(message) if message != "-" => self.one(globals, message.clone()).await,
            Some(_) | None => self.many(globals).await,
        }
    }

    fn subject(&self) -> &str {
        self.subject.as_deref().unwrap_or(&self.stream)
    }

    fn expect(&self) -> Option<Expect> {
        if self.expect_last_sequence.is_none() && self.expect_last_subject_sequence.is_none() {
            return None;
        }
        Some(Expect {
            last_sequence: self.expect_last_sequence,
            subject_last_sequence: self
                .expect_last_subject_sequence
                .map(|s| (Template::new(self.subject()).with(1).to_owned(), s)),
        })
    }

    async fn one(&self, globals: &Globals, payload: String) -> Result<(), Failure> {
        let message = if self.jsonl {
            parse_json(payload.as_bytes(), self.subject()).map_err(Failure::usage)?
        } else {
            Message {
                subject: Template::new(self.subject()).with(1).to_owned(),
                payload: payload.into(),
                key: self.key.as_deref().map(|k| Template::new(k).with(1).to_owned().into()),
                message_id: self.msg_id.as_deref().map(|i| Template::new(i).with(1).to_owned()),
                headers: self.header.iter().map(|(n, v)| (n.clone(), v.clone().into())).collect(),
                event_time_us: None,
            }
        };
        let acks = self
            .connect
            .client(globals)?
            .publish(&self.stream, vec![message], self.expect())
            .await?;
        let ack = acks
            .first()
            .ok_or_else(|| Failure::new(Exit::Failed, "the server sent no ack"))?;
        if let Some(path) = &self.acks {
            let mut file = create(path)?;
            let line = json!({
                "stream_id": &*ack.stream_id, "shard": ack.shard, "first": ack.sequence, "last": ack.sequence,
                "tail": ack.tail, "messages": 1, "inputs": [[0, 0]], "duplicates": u32::from(ack.duplicate),
            });
            writeln!(file, "{line}")?;
        }
        if !self.quiet {
            output::status(match (ack.sequence, ack.duplicate) {
                (Some(s), false) => format!("stored: shard {}, sequence {s}", ack.shard),
                (Some(s), true) => format!("duplicate: stored before as shard {}, sequence {s}", ack.shard),
                (None, _) => format!("duplicate: stored before in shard {}", ack.shard),
            });
        }
        Ok(())
    }

    async fn many(&self, globals: &Globals) -> Result<(), Failure> {
        if self.expect().is_some() {
            return Err(Failure::usage(
                "an expectation is about one message: give it as MESSAGE",
            ));
        }
        if self.msg_id.as_ref().is_some_and(|id| !id.contains("{n}")) {
            return Err(Failure::usage(
                "all messages would have the same id; write for instance --msg-id 'import-{n}'",
            ));
        }
        let separator = match (&self.delimiter, self.record_separator) {
            (Some(bytes), _) => Separator::Bytes(bytes.clone()),
            (None, RecordSeparator::Newline) => Separator::Bytes(b"\n".to_vec()),
            (None, RecordSeparator::BlankLine) => Separator::BlankLine,
        };
        let (reader, size): (Box<dyn BufRead + Send>, Option<u64>) = match self.file.as_deref() {
            Some(path) if path != Path::new("-") => {
                let file =
                    File::open(path).map_err(|e| Failure::usage(format!("cannot read {}: {e}", path.display())))?;
                let size = file.metadata().ok().filter(|m| m.is_file()).map(|m| m.len());
                (Box::new(BufReader::with_capacity(1 << 20, file)), size)
            }
            Some(_) | None => {
                if io::stdin().is_terminal() && !self.quiet {
                    output::status("each line is a message; end with ctrl-D");
                }
                (Box::new(BufReader::with_capacity(1 << 16, io::stdin())), None)
            }
        };
        let ledger = Arc::new(Ledger::new(self, size)?);
        let hook = Arc::clone(&ledger);
        let publisher = self
            .connect
            .client(globals)?
            .publisher(&self.stream)
            .codec(self.codec)
            .batch_bytes(self.batch_bytes as usize)
            .linger(self.linger)
            .retry_for(self.retry_for)
            .on_batch(move |report| hook.note(report))
            .open()
            .await?;
        let begun = Instant::now();
        let fed = self.feed(&publisher, Records::new(reader, separator), &ledger).await;
        let taken = publisher.taken();
        let stored = publisher.close().await.map_err(Failure::from);
        ledger.summary(begun.elapsed(), taken);
        // What could not be stored explains more than why no more was taken.
        stored.and(fed)
    }

    async fn feed(
        &self,
        publisher: &Publisher,
        mut records: Records<Box<dyn BufRead + Send>>,
        ledger: &Ledger,
    ) -> Result<(), Failure> {
        let mut subject = Template::new(self.subject());
        let mut key = self.key.as_deref().map(Template::new);
        let mut id = self.msg_id.as_deref().map(Template::new);
        let headers: Vec<(&str, &[u8])> = self.header.iter().map(|(n, v)| (n.as_str(), v.as_bytes())).collect();
        let mut n = 0;
        loop {
            // Reading blocks this thread; the publisher's task has others.
            let Some(record) = records.next()? else { return Ok(()) };
            ledger.read.fetch_add(record.len() as u64 + 1, Ordering::Relaxed);
            n += 1;
            let at = |e: Failure| e.context(format!("record {n}"));
            let given = if self.jsonl {
                if record.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let message = parse_json(record, subject.with(n)).map_err(|e| at(Failure::usage(e)))?;
                publisher.send_all(std::slice::from_ref(&message)).await
            } else {
                let fields = RecordFields {
                    subject: subject.with(n),
                    key: key.as_mut().map(|k| k.with(n).as_bytes()),
                    message_id: id.as_mut().map(|i| i.with(n)),
                    event_time: None,
                    headers: &headers,
                    payload: record,
                };
                publisher.send_fields(&fields).await
            };
            given.map_err(|e| at(e.into()))?;
        }
    }
}

fn create(path: &Path) -> Result<File, Failure> {
    File::create(path).map_err(|e| Failure::from(e).context(format!("cannot write {}", path.display())))
}

/// Counts what was acknowledged, and writes it down.
#[derive(Debug)]
struct Ledger {
    bar: ProgressBar,
    quiet: bool,
    read: AtomicU64,
    acked: AtomicU64,
    bytes: AtomicU64,
    duplicates: AtomicU64,
    acks: Option<Mutex<File>>,
}

impl Ledger {
    fn new(args: &PubArgs, size: Option<u64>) -> Result<Self, Failure> {
        let bar = match size {
            _ if args.quiet => ProgressBar::hidden(),
            Some(size) => ProgressBar::new(size).with_style(
                ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg} {eta} left")
                    .expect("a good template"),
            ),
            None => ProgressBar::no_length()
                .with_style(ProgressStyle::with_template("{spinner} {bytes} {msg}").expect("a good template")),
        };
        let acks = args.acks.as_deref().map(create).transpose()?.map(Mutex::new);
        Ok(Ledger {
            bar,
            quiet: args.quiet,
            read: AtomicU64::new(0),
            acked: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            duplicates: AtomicU64::new(0),
            acks,
        })
    }

    fn note(&self, report: &BatchReport<'_>) {
        let Ok(receipt) = report.outcome else { return };
        if let Some(file) = &self.acks {
            let line = json!({
                "stream_id": &*receipt.stream_id,
                "shard": receipt.shard,
                "first": receipt.first,
                "last": receipt.last,
                "tail": receipt.tail,
                "messages": report.messages,
                "inputs": report.ordinals,
                "duplicates": receipt.duplicates.len(),
            });
            // One write for a whole line, unbuffered: whoever reads the file after a crash sees every ack.
            if let Err(e) = file.lock().write_all(format!("{line}\n").as_bytes()) {
                output::status(format!("cannot write the acks: {e}"));
            }
        }
        self.duplicates
            .fetch_add(receipt.duplicates.len() as u64, Ordering::Relaxed);
        self.bytes.fetch_add(report.bytes as u64, Ordering::Relaxed);
        let acked = self.acked.fetch_add(u64::from(report.messages), Ordering::Relaxed) + u64::from(report.messages);
        self.bar.set_position(self.read.load(Ordering::Relaxed));
        self.bar.set_message(format!("{} stored", show_count(acked)));
    }

    fn summary(&self, took: Duration, taken: u64) {
        self.bar.finish_and_clear();
        if self.quiet {
            return;
        }
        let acked = self.acked.load(Ordering::Relaxed);
        let bytes = self.bytes.load(Ordering::Relaxed);
        let seconds = took.as_secs_f64().max(1e-6);
        let of = if acked == taken {
            String::new()
        } else {
            format!(" of {}", show_count(taken))
        };
        let duplicates = match self.duplicates.load(Ordering::Relaxed) {
            0 => String::new(),
            n => format!(", {} of them duplicates", show_count(n)),
        };
        output::status(format!(
            "acknowledged {}{of} messages{duplicates}, {} in batches, in {seconds:.2} s: {} messages/s",
            show_count(acked),
            show_size(bytes),
            show_count((acked as f64 / seconds) as u64),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_and_headers() {
        let mut t = Template::new("a.{n}.b");
        assert_eq!(
            (t.with(1).to_owned(), t.with(12).to_owned()),
            ("a.1.b".to_owned(), "a.12.b".to_owned())
        );
        assert_eq!(Template::new("plain").with(3), "plain");
        assert_eq!(header("a: b:c"), Ok(("a".to_owned(), "b:c".to_owned())));
        assert!(header("a").is_err());
    }
}
