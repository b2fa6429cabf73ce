//! `mainstem stream view` and `get`.

use std::io::{self, IsTerminal as _};

use clap::Args;
use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::output::{self, Format, FormatArg, message_json, printable};
use crate::cli::subscribe::{ConsistencyArg, describe, freshness_json, freshness_note};
use crate::cli::units::{self, show_size, show_time_us};
use crate::client::proto::get_request::By;
use crate::client::proto::{GetBySequence, GetFirstAtTime, GetLastBySubject};
use crate::client::{Client, Start};

/// Look at a page of messages
#[derive(Debug, Args)]
pub(super) struct ViewArgs {
    /// The stream
    name: String,
    /// Where to begin: beginning, a sequence, last-N (of each shard), a time, or so long ago
    #[arg(long, value_name = "WHERE", default_value = "last-10", value_parser = units::start)]
    from: Start,
    /// How many messages, at most 1,000
    #[arg(long, short = 'n', value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    count: u32,
    /// Only messages whose subject matches; can be repeated
    #[arg(long, value_name = "FILTER")]
    filter: Vec<String>,
    #[command(flatten)]
    consistency: ConsistencyArg,
    #[command(flatten)]
    format: FormatArg,
}

impl ViewArgs {
    pub(super) async fn run(self, client: &Client) -> Result<(), Failure> {
        let client = client.clone().with_consistency(self.consistency.get());
        let page = client.fetch(&self.name, self.from, self.filter, self.count).await?;
        if self.format.format == Format::Json {
            return output::json(&json!({
                "messages": page.messages.iter().map(message_json).collect::<Vec<_>>(),
                "caught_up": page.caught_up,
                "freshness": page.freshness.iter().map(freshness_json).collect::<Vec<_>>(),
            }));
        }
        let mut table = output::table(&[">shard", ">sequence", "time", "subject", ">size", "payload"]);
        for m in &page.messages {
            table.add_row([
                m.shard.to_string(),
                m.sequence.to_string(),
                show_time_us(m.append_time_us),
                m.subject.clone(),
                show_size(m.payload.len() as u64),
                printable(&m.payload, 60),
            ]);
        }
        for fresh in &page.freshness {
            output::status(freshness_note(fresh));
        }
        if page.messages.is_empty() {
            output::status("no messages there");
        } else {
            output::line(table)?;
        }
        if let Some(last) = page.messages.last().filter(|_| !page.caught_up) {
            output::status(format!("there is more: --from {}", last.sequence + 1));
        }
        Ok(())
    }
}

/// Get one message: its payload on the standard output, the rest on the standard error
#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// The stream
    name: String,
    /// The message's sequence
    #[arg(required_unless_present_any = ["last_by_subject", "at"], conflicts_with_all = ["last_by_subject", "at"])]
    sequence: Option<u64>,
    /// The last message with this subject
    #[arg(long, value_name = "SUBJECT", conflicts_with = "at")]
    last_by_subject: Option<String>,
    /// The first message at or after this time
    #[arg(long, value_name = "TIME", value_parser = units::time_us)]
    at: Option<u64>,
    /// Index of the shard
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    shard: u32,
    #[command(flatten)]
    consistency: ConsistencyArg,
    #[command(flatten)]
    format: FormatArg,
}

impl GetArgs {
    pub(super) async fn run(self, client: &Client) -> Result<(), Failure> {
        let shard = self.shard;
        let by = match (self.sequence, self.last_by_subject, self.at) {
            (Some(sequence), _, _) => By::Sequence(GetBySequence { shard, sequence }),
            (None, Some(subject), _) => By::LastBySubject(GetLastBySubject { subject }),
            (None, None, Some(time_us)) => By::FirstAtTime(GetFirstAtTime { shard, time_us }),
            (None, None, None) => return Err(Failure::usage("name the message: a sequence, a subject or a time")),
        };
        let client = client.clone().with_consistency(self.consistency.get());
        let (message, fresh) = client.get(&self.name, by).await?;
        if let Some(fresh) = &fresh {
            output::status(freshness_note(fresh));
        }
        if self.format.format == Format::Json {
            return output::json(&message_json(&message));
        }
        output::status(describe(&message).trim_end());
        output::data(&message.payload)?;
        if io::stdout().is_terminal() {
            output::data(b"\n")?;
        }
        Ok(())
    }
}
