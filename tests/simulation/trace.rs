//! What happened, in order. The same seed gives the same text.

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher as _};

/// Tells whether two traces are the same, of runs of the same program.
pub fn digest(trace: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(trace.as_bytes());
    hasher.finish()
}

#[derive(Debug, Default)]
pub struct Trace {
    text: String,
    /// Also to standard error, as it happens.
    pub loud: bool,
    /// Also every step of every node, and all that is sent.
    pub deep: bool,
}

impl Trace {
    pub fn note(&mut self, now_ns: u64, what: std::fmt::Arguments<'_>) {
        let from = self.text.len();
        // Writing to a string cannot fail.
        let _ = writeln!(
            self.text,
            "{}.{:06} {what}",
            now_ns / 1_000_000_000,
            now_ns / 1_000 % 1_000_000
        );
        if self.loud {
            eprint!("{}", &self.text[from..]);
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }
}
