//! `mainstem shard`.

use clap::{Args, Subcommand};
use serde_json::json;

use super::cluster::{groups_json, shard_page, shards_json};
use super::connect::{Connect, Globals};
use super::failure::Failure;
use super::output::{self, Format, FormatArg};
use crate::client::Target;
use crate::client::proto::Node;

/// Look at shards, and tell their leaders and replicas where to be
#[derive(Debug, Args)]
pub struct ShardArgs {
    #[command(subcommand)]
    command: ShardCommand,
    #[command(flatten)]
    connect: Connect,
}

#[derive(Debug, Subcommand)]
enum ShardCommand {
    /// List shards with their leaders and replicas: `n1*` leads, `n3!` is not current, `(n4)` does not vote yet
    #[command(visible_alias = "list")]
    Ls {
        /// Only those of this stream
        stream: Option<String>,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Replace a replica by one on another node; returns when it has begun
    Move {
        #[command(flatten)]
        target: TargetArgs,
        /// The node that gives its replica away: its name, or its id (n2)
        #[arg(long, value_name = "NODE")]
        from: String,
        /// The node that gets it
        #[arg(long, value_name = "NODE")]
        to: String,
        /// Also if other shards share the group: all of them move
        #[arg(long)]
        whole_group: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Leaders
    Leader {
        #[command(subcommand)]
        command: LeaderCommand,
    },
}

#[derive(Debug, Subcommand)]
enum LeaderCommand {
    /// Let the leader hand over to another voter
    StepDown {
        #[command(flatten)]
        target: TargetArgs,
        /// The node that shall lead: its name, or its id (n2) [default: the one least behind]
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
        #[command(flatten)]
        format: FormatArg,
    },
}

/// Which shard or group.
#[derive(Debug, Args)]
struct TargetArgs {
    /// The shard: STREAM/INDEX, or STREAM alone for its only one
    #[arg(required_unless_present = "group", conflicts_with = "group", value_parser = shard)]
    shard: Option<(String, u32)>,
    /// Or the group: 7 or g7; 1 is the meta group
    #[arg(long, value_name = "ID", value_parser = group)]
    group: Option<u64>,
}

fn shard(text: &str) -> Result<(String, u32), String> {
    match text.split_once('/') {
        None => Ok((text.to_owned(), 0)),
        Some((stream, index)) => index
            .parse()
            .map(|index| (stream.to_owned(), index))
            .map_err(|_| format!("`{text}` is not STREAM/INDEX, e.g. ORDERS/0")),
    }
}

fn group(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix('g').unwrap_or(text);
    digits.parse().map_err(|_| format!("`{text}` is no group, e.g. g7"))
}

impl TargetArgs {
    fn target(self) -> Result<Target, Failure> {
        match (self.shard, self.group) {
            (Some((stream, index)), None) => Ok(Target::Shard { stream, index }),
            (None, Some(group)) => Ok(Target::Group(group)),
            (None, None) | (Some(_), Some(_)) => Err(Failure::usage("name a shard or a group")),
        }
    }
}

fn name(nodes: &[Node], id: u64) -> String {
    let known = nodes.iter().find(|n| n.node_id == id);
    known.map_or_else(|| format!("n{id}"), |n| n.name.clone())
}

impl ShardArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let client = self.connect.client(globals)?;
        match self.command {
            ShardCommand::Ls { stream, format } => {
                let report = client.cluster_report(stream.as_deref(), Vec::new()).await?;
                match format.format {
                    Format::Json => output::json(&json!({
                        "shards": shards_json(&report), "groups": groups_json(&report),
                    })),
                    Format::Table if report.shards.is_empty() => {
                        output::status("no shards; `mainstem stream create NAME` makes a stream");
                        Ok(())
                    }
                    Format::Table => output::data(shard_page(&report).as_bytes()),
                }
            }
            ShardCommand::Move {
                target,
                from,
                to,
                whole_group,
                format,
            } => {
                let moved = client.move_replica(target.target()?, &from, &to, whole_group).await?;
                if format.format == Format::Json {
                    return output::json(&json!({ "group_id": moved.group_id }));
                }
                output::status(format!(
                    "g{}: a replica goes from {from} to {to}; `mainstem cluster report --problems` shows how far it is",
                    moved.group_id
                ));
                Ok(())
            }
            ShardCommand::Leader {
                command: LeaderCommand::StepDown { target, to, format },
            } => {
                let done = client
                    .step_down(target.target()?, to.as_deref().unwrap_or_default())
                    .await?;
                if format.format == Format::Json {
                    return output::json(&json!({
                        "group_id": done.group_id, "from_node": done.from_node, "to_node": done.to_node,
                        "term": done.term, "took_us": done.took_us,
                    }));
                }
                let nodes = client.nodes(true).await?;
                let to = name(&nodes, done.to_node);
                output::status(if done.from_node == done.to_node {
                    format!("g{} is led by {to} already", done.group_id)
                } else {
                    format!(
                        "g{}: {} has handed over to {to} within {} ms (term {})",
                        done.group_id,
                        name(&nodes, done.from_node),
                        done.took_us.div_ceil(1_000),
                        done.term
                    )
                });
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_and_groups_by_name() {
        assert_eq!(shard("ORDERS/3"), Ok(("ORDERS".to_owned(), 3)));
        assert_eq!(shard("ORDERS"), Ok(("ORDERS".to_owned(), 0)));
        assert!(shard("ORDERS/x").is_err());
        assert_eq!((group("g7"), group("7")), (Ok(7), Ok(7)));
        assert!(group("seven").is_err());
    }
}
