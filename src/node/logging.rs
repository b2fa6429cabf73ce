//! Log lines, to standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use super::config::{LogFormat, LogSection};

/// Installs the process's log. Once for a process; further calls (in tests) change nothing.
pub fn install(log: &LogSection) {
    let directives = directives(&log.level.0);
    // Where a line comes from is for those who look into the program.
    let is_plain = ["off", "error", "warn", "info"].contains(&log.level.0.trim());
    let filter = EnvFilter::try_new(&directives).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        .with_target(!is_plain)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // An error means that there is a log already.
    let _ = match log.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
    };
}

/// A level alone is about this program. Consensus warns of every call to a node that is down; what matters of that is told
/// once, by the layers that use it, and the rest is for those who name it.
fn directives(level: &str) -> String {
    if level.contains("openraft") {
        level.to_owned()
    } else if ["debug", "trace"].contains(&level.trim()) {
        format!("{level},openraft=warn")
    } else {
        format!("{level},openraft=off")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consensus_is_heard_by_those_who_ask() {
        for (level, directives_of) in [
            ("info", "info,openraft=off"),
            ("debug", "debug,openraft=warn"),
            ("info,mainstem::raft=debug", "info,mainstem::raft=debug,openraft=off"),
            ("warn,openraft=info", "warn,openraft=info"),
        ] {
            assert_eq!(directives(level), directives_of);
        }
    }
}
