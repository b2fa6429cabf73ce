//! `mainstem stream`.

mod look;
mod progress;
mod show;
mod spec;

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use self::spec::{CreateArgs, EditArgs};
use super::cluster::{groups_json, shard_page, shards_json};
use super::connect::{Connect, Globals};
use super::failure::{Exit, Failure};
use super::output::{self, Format, FormatArg};
use super::units::{self, show_count, show_time_us};
use crate::client::Purge;

/// Create, list, change and remove streams, and look into them
#[derive(Debug, Args)]
pub struct StreamArgs {
    #[command(subcommand)]
    command: StreamCommand,
    #[command(flatten)]
    connect: Connect,
}

#[derive(Debug, Subcommand)]
enum StreamCommand {
    /// Create a stream; creating the identical one again succeeds
    #[command(visible_alias = "add")]
    Create(Box<CreateArgs>),
    /// List the streams
    #[command(visible_alias = "list")]
    Ls {
        /// Only those whose name begins so
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// Also removed ones that `undelete` can bring back
        #[arg(long)]
        removed: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Show a stream, its limits and its shards
    Info {
        /// The stream
        name: String,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Show the leaders, replicas and quorums of a stream's shards
    Report {
        /// The stream
        name: String,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Change a stream; only what is named is changed
    Edit(Box<EditArgs>),
    /// Remove a stream; for a while, `undelete` brings it back
    #[command(visible_alias = "delete")]
    Rm {
        /// The stream
        name: String,
        /// How long it can be brought back [default: 1h]
        #[arg(long, value_name = "DURATION", value_parser = units::duration)]
        grace: Option<Duration>,
        /// Remove it without a way back
        #[arg(long, conflicts_with = "grace")]
        now: bool,
        /// Do not ask
        #[arg(long, short = 'y')]
        yes: bool,
    },
    /// Bring back a removed stream
    Undelete {
        /// The stream
        name: String,
        /// Which, where several removed streams had that name [default: the one removed last]
        #[arg(long, value_name = "STREAM_ID")]
        id: Option<String>,
    },
    /// Remove messages of a stream
    Purge {
        /// The stream
        name: String,
        /// Keep the last N messages of each shard (that match the filter)
        #[arg(long, value_name = "N", value_parser = units::count, conflicts_with = "before")]
        keep: Option<u64>,
        /// Remove everything below this sequence
        #[arg(long, value_name = "SEQ")]
        before: Option<u64>,
        /// Only messages whose subject matches
        #[arg(long, value_name = "FILTER", default_value = "", hide_default_value = true)]
        filter: String,
        /// Only this shard; can be repeated
        #[arg(long, value_name = "INDEX")]
        shard: Vec<u32>,
        /// Do not ask
        #[arg(long, short = 'y')]
        yes: bool,
    },
    /// Look at a page of messages
    View(look::ViewArgs),
    /// Get one message: its payload on the standard output, the rest on the standard error
    Get(look::GetArgs),
}

/// Asks before something that cannot be undone, if there is somebody to ask.
pub(super) fn confirm(yes: bool, question: &str) -> Result<(), Failure> {
    if yes || !io::stdin().is_terminal() {
        return Ok(());
    }
    let mut err = io::stderr().lock();
    write!(err, "{question} This cannot be undone. [y/N] ")?;
    err.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::new(Exit::Failed, "not confirmed, nothing was changed").hint("--yes does not ask")),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl StreamArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let client = self.connect.client(globals)?;
        match self.command {
            StreamCommand::Create(args) => {
                let (spec, format) = args.spec()?;
                let (stream, existed) = client.create_stream(spec).await?;
                if format == Format::Json {
                    return output::json(&json!({ "existed": existed, "stream": show::json(&stream) }));
                }
                let name = stream.spec.as_ref().map(|s| s.name.clone()).unwrap_or_default();
                output::status(if existed {
                    format!("stream {name} was there before, just like that")
                } else {
                    format!("stream {name} is created")
                });
                output::data(show::describe(&stream).as_bytes())
            }
            StreamCommand::Ls {
                prefix,
                removed,
                format,
            } => {
                let streams = client.list_streams_with(&prefix, removed).await?;
                match format.format {
                    Format::Json => output::json(&json!(streams.iter().map(show::json).collect::<Vec<_>>())),
                    Format::Table if streams.is_empty() => {
                        output::status("no streams; `mainstem stream create NAME` makes one");
                        Ok(())
                    }
                    Format::Table => output::line(show::list(&streams)),
                }
            }
            StreamCommand::Info { name, format } => {
                let stream = client.get_stream(&name).await?;
                match format.format {
                    Format::Json => output::json(&show::json(&stream)),
                    Format::Table => {
                        output::data(show::describe(&stream).as_bytes())?;
                        output::line(show::shards(&stream))
                    }
                }
            }
            StreamCommand::Report { name, format } => {
                let report = client.cluster_report(Some(&name), Vec::new()).await?;
                match format.format {
                    Format::Json => output::json(&json!({
                        "shards": shards_json(&report), "groups": groups_json(&report),
                    })),
                    Format::Table => output::data(shard_page(&report).as_bytes()),
                }
            }
            StreamCommand::Edit(args) => {
                let edit = args.change()?;
                let name = edit.spec.name.clone();
                let moves = edit.moves_replicas();
                let stream = client
                    .update_stream(edit.spec, edit.paths, edit.expected_revision)
                    .await?;
                match edit.format {
                    Format::Json => output::json(&show::json(&stream))?,
                    Format::Table => output::data(show::describe(&stream).as_bytes())?,
                }
                match moves && !edit.no_wait {
                    true => progress::wait(&client, &name, edit.within).await,
                    false => Ok(()),
                }
            }
            StreamCommand::Rm { name, grace, now, yes } => {
                let grace_us = if now { Some(0) } else { grace.map(micros) };
                if grace_us == Some(0) {
                    confirm(yes, &format!("Remove stream {name} and all its messages?"))?;
                }
                let stream = client.delete_stream(&name, grace_us).await?;
                output::status(match stream.removed_until_us.filter(|_| grace_us != Some(0)) {
                    Some(until) => format!(
                        "stream {name} is removed; until {} `mainstem stream undelete {name}` brings it back",
                        show_time_us(until)
                    ),
                    None => format!("stream {name} is removed"),
                });
                Ok(())
            }
            StreamCommand::Undelete { name, id } => {
                let stream = client.undelete_stream(&name, id).await?;
                output::status(format!("stream {name} is back"));
                output::data(show::describe(&stream).as_bytes())
            }
            StreamCommand::Purge {
                name,
                keep,
                before,
                filter,
                shard,
                yes,
            } => {
                let what = if keep.is_none() && before.is_none() && filter.is_empty() && shard.is_empty() {
                    "all messages"
                } else {
                    "these messages"
                };
                confirm(yes, &format!("Remove {what} of stream {name}?"))?;
                let purge = Purge {
                    shards: shard,
                    before_sequence: before,
                    keep,
                    filter,
                };
                let purged = client.purge_stream(&name, purge).await?;
                output::status(format!("{} messages are removed", show_count(purged)));
                Ok(())
            }
            StreamCommand::View(args) => args.run(&client).await,
            StreamCommand::Get(args) => args.run(&client).await,
        }
    }
}
