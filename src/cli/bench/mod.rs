//! `mainstem bench`.

mod content;
mod publish;
mod report;
mod subscribe;

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use self::content::Content;
use self::report::Report;
use super::connect::{Connect, Globals};
use super::failure::{Exit, Failure};
use super::output;
use super::publish::codec;
use super::units;
use crate::client::proto::StreamSpec;
use crate::client::{Client, Codec};

/// Measures publishing and reading, and verifies every message. Without --stream, a stream is made for the purpose and
/// removed afterwards.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Publish: rate, and latency from publish to ack
    Pub(Load),
    /// Read from the beginning: rate
    Sub(Load),
    /// Publish and read at the same time: rates, and latency from publish to delivery
    Pubsub(Load),
}

/// The load, and where it goes.
#[derive(Debug, Clone, Args)]
struct Load {
    /// Number of messages
    #[arg(long, short = 'n', value_name = "N", default_value = "1M", value_parser = units::count)]
    count: u64,

    /// Size of a message's payload, at least 16
    #[arg(long, value_name = "SIZE", default_value = "128", value_parser = units::size)]
    size: u64,

    /// Number of subjects
    #[arg(long, value_name = "N", default_value = "1", value_parser = units::count)]
    subjects: u64,

    /// Number of publishers, each with a connection of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    publishers: u32,

    /// Shards of the stream that is made
    #[arg(long, value_name = "N", default_value_t = 1)]
    shards: u32,

    /// Size at which a batch is sent
    #[arg(long, value_name = "SIZE", default_value = "256KiB", value_parser = units::size)]
    batch_bytes: u64,

    /// Number of messages at which a batch is sent
    #[arg(long, value_name = "N", default_value = "10000", value_parser = units::count)]
    batch_messages: u64,

    /// How long a batch waits for more messages while earlier ones are on their way
    #[arg(long, value_name = "DURATION", default_value = "1ms", value_parser = units::duration)]
    linger: Duration,

    /// How much may be unacknowledged, per publisher
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = units::size)]
    in_flight: u64,

    /// Wait for each ack before the next message
    #[arg(long)]
    sync: bool,

    /// Give every message an id
    #[arg(long)]
    msg_ids: bool,

    /// Compression of the batches
    #[arg(long, value_name = "CODEC", default_value = "none", value_parser = codec)]
    codec: Codec,

    /// Use this stream; it is made if it is not there, and stays. `bench sub` reads what it holds
    #[arg(long, value_name = "NAME")]
    stream: Option<String>,

    /// Do not verify the content
    #[arg(long)]
    no_verify: bool,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    connect: Connect,
}

impl Load {
    fn content(&self) -> Arc<Content> {
        Arc::new(Content::new(self.size as usize))
    }

    fn bar(&self, total: Option<u64>) -> ProgressBar {
        let bar = match total {
            Some(total) => ProgressBar::new(total).with_style(
                ProgressStyle::with_template("{prefix:4} {bar:30} {human_pos}/{human_len} {per_sec} {eta} left")
                    .expect("a good template"),
            ),
            None => ProgressBar::no_length().with_style(
                ProgressStyle::with_template("{prefix:4} {spinner} {human_pos} {per_sec}").expect("a good template"),
            ),
        };
        if !io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar
    }
}

/// A stream for the bench, removed at the end if it was made for it.
struct Stage {
    client: Client,
    name: String,
    /// Of the messages, in turn.
    subjects: Vec<String>,
    temporary: bool,
}

impl Stage {
    async fn set(load: &Load, globals: &Globals) -> Result<Self, Failure> {
        let client = load.connect.client(globals)?;
        let temporary = load.stream.is_none();
        let name = match &load.stream {
            Some(name) => name.clone(),
            None => format!("bench-{:08x}", rand::random::<u32>()),
        };
        let stream = match client.get_stream(&name).await {
            Ok(stream) => stream,
            Err(e) if e.is_not_found() => {
                let spec = StreamSpec {
                    name: name.clone(),
                    shards: load.shards,
                    ..StreamSpec::default()
                };
                client.create_stream(spec).await?.0
            }
            Err(e) => return Err(e.into()),
        };
        let taken = stream.spec.unwrap_or_default().subjects;
        let subjects = subjects(&taken, load.subjects).ok_or_else(|| {
            Failure::usage(format!(
                "--subjects {}: stream {name} takes no so many: {}",
                load.subjects,
                taken.join(", ")
            ))
        })?;
        Ok(Stage {
            client,
            name,
            subjects,
            temporary,
        })
    }

    async fn clear(self) -> Result<(), Failure> {
        if self.temporary {
            self.client.delete_stream(&self.name, Some(0)).await?;
        }
        Ok(())
    }
}

/// So many subjects that a stream with these filters takes; `None`: it does not take so many.
fn subjects(filters: &[String], count: u64) -> Option<Vec<String>> {
    let is_wild = |token: &str| token == "*" || token == ">";
    let wild = filters.iter().find(|filter| filter.split('.').any(is_wild));
    let literal = || filters.iter().filter(|filter| !filter.split('.').any(is_wild));
    if literal().count() as u64 >= count {
        return Some(literal().take(usize::try_from(count).ok()?).cloned().collect());
    }
    let tokens: Vec<&str> = wild?.split('.').collect();
    let last = tokens.iter().rposition(|token| is_wild(token))?;
    let subject = |number: u64| {
        let told = tokens.iter().enumerate().map(|(i, token)| match *token {
            _ if i == last => number.to_string(),
            "*" => "bench".to_owned(),
            token => token.to_owned(),
        });
        told.collect::<Vec<_>>().join(".")
    };
    Some((0..count).map(subject).collect())
}

impl BenchArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let (load, kind) = match &self.command {
            BenchCommand::Pub(load) => (load, "pub"),
            BenchCommand::Sub(load) => (load, "sub"),
            BenchCommand::Pubsub(load) => (load, "pubsub"),
        };
        if load.size < content::PAYLOAD_BYTES_MIN as u64 || load.size > 4 << 20 {
            return Err(Failure::usage(format!(
                "--size {} is not within 16 bytes and 4 MiB",
                load.size
            )));
        }
        if load.count == 0 || load.subjects == 0 || load.publishers == 0 {
            return Err(Failure::usage(
                "--count, --subjects and --publishers must be at least 1",
            ));
        }
        let stage = Stage::set(load, globals).await?;
        let measured = tokio::select! {
            measured = measure(&self.command, load, &stage) => measured,
            _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Failed, "interrupted")),
        };
        // The stream goes even if the bench failed; why it failed matters more than why the stream stays.
        let cleared = stage.clear().await;
        let report = measured?;
        if load.json {
            output::json(&report.json(kind, load))?;
        } else {
            output::data(report.text(kind, load).as_bytes())?;
        }
        cleared
    }
}

async fn measure(command: &BenchCommand, load: &Load, stage: &Stage) -> Result<Report, Failure> {
    let content = load.content();
    match command {
        BenchCommand::Pub(_) => {
            let bar = load.bar(Some(load.count)).with_prefix("pub");
            let published = publish::run(load, &stage.client, &stage.name, &stage.subjects, &content, &bar).await?;
            bar.finish_and_clear();
            // What was acknowledged must be there: looked at after the clock has stopped.
            let verified = if load.no_verify || !stage.temporary {
                None
            } else {
                let bar = load.bar(Some(load.count)).with_prefix("look");
                let read =
                    subscribe::run(load, &stage.client, &stage.name, &content, &bar, subscribe::Until::Tail).await?;
                bar.finish_and_clear();
                read.check_all(load)?;
                Some(true)
            };
            Ok(Report {
                published: Some(published),
                read: None,
                verified,
            })
        }
        BenchCommand::Sub(_) => {
            if stage.temporary {
                let bar = load.bar(Some(load.count)).with_prefix("fill");
                let filling = Load {
                    sync: false,
                    ..load.clone()
                };
                publish::run(&filling, &stage.client, &stage.name, &stage.subjects, &content, &bar).await?;
                bar.finish_and_clear();
            }
            let bar = load.bar(stage.temporary.then_some(load.count)).with_prefix("sub");
            let read = subscribe::run(load, &stage.client, &stage.name, &content, &bar, subscribe::Until::Tail).await?;
            bar.finish_and_clear();
            if stage.temporary && !load.no_verify {
                read.check_all(load)?;
            }
            Ok(Report {
                published: None,
                read: Some(read),
                verified: (!load.no_verify).then_some(true),
            })
        }
        BenchCommand::Pubsub(_) => {
            let bar = load.bar(Some(load.count)).with_prefix("both");
            let hidden = ProgressBar::hidden();
            let until = subscribe::Until::Count(load.count);
            let reading = subscribe::open(load, &stage.client, &stage.name, until).await?;
            let (published, read) = tokio::try_join!(
                publish::run(load, &stage.client, &stage.name, &stage.subjects, &content, &hidden),
                reading.run(load, &content, &bar),
            )?;
            bar.finish_and_clear();
            if stage.temporary && !load.no_verify {
                read.check_all(load)?;
            }
            Ok(Report {
                published: Some(published),
                read: Some(read),
                verified: (!load.no_verify).then_some(true),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::subjects;

    #[test]
    fn subjects_are_those_that_the_stream_takes() {
        let of = |filters: &[&str], count| {
            let filters: Vec<String> = filters.iter().map(|f| (*f).to_owned()).collect();
            subjects(&filters, count).map(|all| all.join(" "))
        };
        assert_eq!(of(&["s", "s.>"], 1).as_deref(), Some("s"));
        assert_eq!(of(&["s", "s.>"], 2).as_deref(), Some("s.0 s.1"));
        assert_eq!(of(&["orders.>"], 1).as_deref(), Some("orders.0"));
        assert_eq!(
            of(&["orders.*.eu.*.x"], 2).as_deref(),
            Some("orders.bench.eu.0.x orders.bench.eu.1.x")
        );
        assert_eq!(of(&["a", "b"], 2).as_deref(), Some("a b"));
        assert_eq!(of(&["a", "b"], 3), None);
    }
}
