//! The command line. Uses the client only; `main.rs` adds the commands that run a server.

mod bench;
mod cluster;
mod connect;
mod context;
mod failure;
mod info;
mod input;
mod markdown;
mod node;
mod output;
mod publish;
mod shard;
mod stream;
mod subscribe;
mod units;

use std::process::ExitCode;

use clap::Subcommand;

pub use connect::Globals;
pub use failure::{Exit, Failure};

/// Every command but those that run a server.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, change and remove streams, and look into them
    #[command(visible_alias = "str")]
    Stream(stream::StreamArgs),
    /// Publish messages: an argument, the lines of a file or of the standard input
    #[command(visible_alias = "publish")]
    Pub(publish::PubArgs),
    /// Read messages, and follow a stream
    #[command(visible_alias = "subscribe")]
    Sub(subscribe::SubArgs),
    /// Look at the cluster: nodes, leaders, replicas, quorums, and what is on its way
    Cluster(cluster::ClusterArgs),
    /// Look at shards, and tell their leaders and replicas where to be
    Shard(shard::ShardArgs),
    /// Take nodes out of use, and back in
    Node(node::NodeArgs),
    /// Measure publishing and reading
    Bench(bench::BenchArgs),
    /// Keep the addresses of clusters, so that they are typed once
    #[command(visible_alias = "ctx")]
    Context(context::ContextArgs),
    /// Show what a server says of itself: version, features, limits, alarms
    Info(info::InfoArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the reference of the command line as Markdown
    #[command(hide = true)]
    HelpMarkdown,
}

/// Runs a command to its end. `globals` is what stood before the command; `tree` is the whole command line, for
/// completions and the reference.
pub fn run(command: Command, globals: &Globals, tree: clap::Command) -> ExitCode {
    match execute(command, globals, tree) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn execute(command: Command, globals: &Globals, mut tree: clap::Command) -> Result<(), Failure> {
    match command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut tree, "mainstem", &mut script);
            output::data(&script)
        }
        Command::HelpMarkdown => output::data(markdown::reference(&mut tree).as_bytes()),
        Command::Context(args) => args.run(),
        Command::Stream(args) => block_on(args.run(globals)),
        Command::Pub(args) => block_on(args.run(globals)),
        Command::Sub(args) => block_on(args.run(globals)),
        Command::Bench(args) => block_on(args.run(globals)),
        Command::Cluster(args) => block_on(args.run(globals)),
        Command::Shard(args) => block_on(args.run(globals)),
        Command::Node(args) => block_on(args.run(globals)),
        Command::Info(args) => block_on(args.run(globals)),
    }
}

fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Exit::Failed, format!("cannot start: {e}")))?;
    runtime.block_on(command)
}
