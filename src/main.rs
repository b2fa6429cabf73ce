//! The `mainstem` program: the server and the command line.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use mainstem::cli;
use mainstem::node::{self, DevArgs, ServerArgs};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Durable streams: an acknowledged message is on the disks of a quorum
#[derive(Debug, Parser)]
#[command(name = "mainstem", version, max_term_width = 110, arg_required_else_help = true)]
struct Mainstem {
    #[command(flatten)]
    globals: cli::Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a node for development with sane defaults, and print what to type next
    Dev(Box<DevArgs>),
    /// Run a node
    Server(Box<ServerArgs>),
    #[command(flatten)]
    Client(Box<cli::Command>),
}

fn main() -> ExitCode {
    let Mainstem { globals, command } = Mainstem::parse();
    match command {
        Command::Dev(args) => node::dev(&args),
        Command::Server(args) => node::server(&args),
        Command::Client(command) => cli::run(*command, &globals, Mainstem::command()),
    }
}
