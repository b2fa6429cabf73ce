//! `mainstem node`.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};

use super::cluster::node_json;
use super::connect::{Connect, Globals};
use super::failure::{Exit, Failure};
use super::output::{self, Format, FormatArg};
use super::stream::confirm;
use super::units::{self, show_size};
use crate::client::Client;
use crate::client::proto::Node;

/// How often the progress of a drain is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Take nodes out of use, and back in
#[derive(Debug, Args)]
pub struct NodeArgs {
    #[command(subcommand)]
    command: NodeCommand,
    #[command(flatten)]
    connect: Connect,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Let a node hand over what it leads and give its replicas away; shows how far it is
    Drain {
        /// Its name, or its id (n2)
        node: String,
        /// Do not wait until it is empty
        #[arg(long)]
        no_wait: bool,
        /// Give up waiting after so long; the drain goes on [default: never]
        #[arg(long, value_name = "DURATION", value_parser = units::duration)]
        within: Option<Duration>,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Let a drained node take leaders and replicas again
    Undrain {
        /// Its name, or its id (n2)
        node: String,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Take a node out of the cluster for good
    #[command(visible_alias = "rm")]
    Remove {
        /// Its name, or its id (n2)
        node: String,
        /// Also while it holds replicas, so long as their groups keep a quorum without it
        #[arg(long)]
        force: bool,
        /// Also if groups lose their quorum, and with it their messages, for ever
        #[arg(long)]
        accept_loss: bool,
        /// Do not ask
        #[arg(long, short = 'y')]
        yes: bool,
        #[command(flatten)]
        format: FormatArg,
    },
}

fn told(node: &Node, format: FormatArg, text: &str) -> Result<(), Failure> {
    match format.format {
        Format::Json => output::json(&node_json(node)),
        Format::Table => {
            output::status(format!("node {} (n{}) {text}", node.name, node.node_id));
            Ok(())
        }
    }
}

impl NodeArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let client = self.connect.client(globals)?;
        match self.command {
            NodeCommand::Drain {
                node,
                no_wait,
                within,
                format,
            } => {
                let drained = client.drain_node(&node).await?;
                told(&drained, format, "is being drained")?;
                if no_wait {
                    return Ok(());
                }
                wait_empty(&client, &drained, within).await?;
                output::status(format!(
                    "it is empty: `mainstem node remove {0}` takes it out, `mainstem node undrain {0}` uses it again",
                    drained.name
                ));
                Ok(())
            }
            NodeCommand::Undrain { node, format } => {
                let node = client.undrain_node(&node).await?;
                told(&node, format, "takes leaders and replicas again")
            }
            NodeCommand::Remove {
                node,
                force,
                accept_loss,
                yes,
                format,
            } => {
                confirm(yes, &format!("Take node {node} out of the cluster for good?"))?;
                let removed = client.remove_node(&node, force, accept_loss).await?;
                told(&removed, format, "is removed")
            }
        }
    }
}

/// Waits until nothing is on the node any more, and tells how far it is.
async fn wait_empty(client: &Client, drained: &Node, within: Option<Duration>) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut said = String::new();
    loop {
        let nodes = client.nodes(false).await?;
        let node = nodes.iter().find(|n| n.node_id == drained.node_id);
        let Some(node) = node.filter(|n| n.replicas > 0 || n.leaders > 0) else {
            return Ok(());
        };
        let blocked = blocked(client, node).await?;
        let text = format!(
            "{} leaders, {} replicas, {} left{blocked}",
            node.leaders,
            node.replicas,
            show_size(node.bytes.unwrap_or(0)),
        );
        if text != said {
            output::status(&text);
            said = text;
        }
        if within.is_some_and(|within| begun.elapsed() >= within) {
            return Err(
                Failure::new(Exit::Failed, format!("the node still holds {} replicas", node.replicas))
                    .hint("the drain goes on; `mainstem cluster balance --dry-run` shows what it waits for"),
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What keeps the rest from moving, if anything.
async fn blocked(client: &Client, node: &Node) -> Result<String, Failure> {
    let plan = client.plan().await?;
    let report = client.cluster_report(None, Vec::new()).await?;
    let held: Vec<u64> = report
        .groups
        .iter()
        .filter(|g| g.replicas.iter().any(|r| r.node_id == node.node_id))
        .map(|g| g.group_id)
        .collect();
    let action = plan
        .actions
        .iter()
        .find(|a| !a.blocked_by.is_empty() && a.group_id.is_some_and(|g| held.contains(&g)));
    Ok(action.map_or_else(String::new, |a| format!("; {} waits: {}", a.action, a.blocked_by)))
}
