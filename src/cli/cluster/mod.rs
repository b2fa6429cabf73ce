//! `mainstem cluster`.

mod health;
mod json;
mod show;

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json as value;

use super::connect::{Connect, Globals};
use super::failure::Failure;
use super::output::{self, Format, FormatArg};
use super::units::{self, show_time_ms};

pub(super) use json::{groups_json, node_json, shards_json};
pub(super) use show::shard_page;

/// Look at the cluster: nodes, leaders, replicas, quorums, and what is on its way
#[derive(Debug, Args)]
pub struct ClusterArgs {
    #[command(subcommand)]
    command: ClusterCommand,
    #[command(flatten)]
    connect: Connect,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Show who the cluster is, and who leads its catalog
    Info {
        #[command(flatten)]
        format: FormatArg,
    },
    /// List the nodes and what they hold
    Nodes {
        /// Also those that were removed
        #[arg(long)]
        removed: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Say whether all is well: exits with 0, or with 10 and what is wrong
    Health(health::HealthArgs),
    /// Show leaders, replicas and quorums of every shard, and what is on its way
    Report {
        /// Only shards with a problem, or with something on its way
        #[arg(long)]
        problems: bool,
        /// Also groups without shards
        #[arg(long)]
        groups: bool,
        /// Show it again and again, until interrupted
        #[arg(long)]
        watch: bool,
        /// With --watch: how often
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = units::duration)]
        interval: Duration,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Follow what happens: leaders, nodes, changes, problems
    Events {
        /// How often to look at other nodes
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = units::duration)]
        interval: Duration,
        /// End after so many events
        #[arg(long, value_name = "N", value_parser = units::count)]
        count: Option<u64>,
        /// As it does in any case
        #[arg(long, hide = true)]
        watch: bool,
        /// How to print; json: one document a line
        #[command(flatten)]
        format: FormatArg,
    },
    /// Show what the planner would do to heal, drain and balance, and why
    Balance {
        /// Only show it. The cluster does it by itself, so there is no other way to call this
        #[arg(long, required = true)]
        dry_run: bool,
        #[command(flatten)]
        format: FormatArg,
    },
}

impl ClusterArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let client = self.connect.client(globals)?;
        match self.command {
            ClusterCommand::Info { format } => {
                let cluster = client.cluster().await?;
                match format.format {
                    Format::Json => output::json(&json::cluster_json(&cluster)),
                    Format::Table => output::data(show::cluster(&cluster).as_bytes()),
                }
            }
            ClusterCommand::Nodes { removed, format } => {
                let nodes = client.nodes(removed).await?;
                match format.format {
                    Format::Json => output::json(&value!(nodes.iter().map(json::node_json).collect::<Vec<_>>())),
                    Format::Table => output::line(show::nodes(&nodes)),
                }
            }
            ClusterCommand::Health(args) => args.run(&client).await,
            ClusterCommand::Report {
                problems,
                groups,
                watch,
                interval,
                format,
            } => loop {
                let report = client.cluster_report(None, Vec::new()).await?;
                let planned = client.plan().await?;
                match format.format {
                    Format::Json => output::json(&json::report_json(&report, &planned))?,
                    Format::Table => {
                        if watch {
                            output::clear_screen()?;
                        }
                        output::data(show::report(&report, &planned, problems, groups).as_bytes())?;
                    }
                }
                if !watch {
                    return Ok(());
                }
                tokio::time::sleep(interval).await;
            },
            ClusterCommand::Events {
                interval,
                count,
                watch: _,
                format,
            } => {
                let interval = u64::try_from(interval.as_micros()).unwrap_or(u64::MAX);
                let mut events = client.watch_cluster(Some(interval)).await?;
                let mut told = 0;
                while let Some(event) = events.next().await? {
                    match format.format {
                        Format::Json => output::line(json::event_json(&event))?,
                        Format::Table => output::line(format!("{}  {}", show_time_ms(event.time_us), event.text))?,
                    }
                    told += 1;
                    if count.is_some_and(|count| told >= count) {
                        break;
                    }
                }
                Ok(())
            }
            ClusterCommand::Balance { dry_run: _, format } => {
                let plan = client.plan().await?;
                match format.format {
                    Format::Json => output::json(&json::plan_json(&plan)),
                    Format::Table if plan.actions.is_empty() => {
                        output::status("nothing to do: every replica is where it should be");
                        Ok(())
                    }
                    Format::Table => output::line(show::plan(&plan)),
                }
            }
        }
    }
}
