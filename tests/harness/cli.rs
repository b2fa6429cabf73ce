//! The command line as a user of a cluster has it.

use std::path::Path;
use std::process::{Command, Stdio};

/// A line for a server (or several, by commas): with no settings but those that `config` has, and nothing to read.
pub fn cli(server: &str, config: impl AsRef<Path>, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstem"));
    command
        .args(line.split(' '))
        .env("MAINSTEM_SERVER", server)
        .env_remove("MAINSTEM_CONTEXT")
        .env("XDG_CONFIG_HOME", config.as_ref())
        .stdin(Stdio::null());
    command
}
