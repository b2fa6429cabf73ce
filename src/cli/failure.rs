//! Exit codes, and errors that say what was wrong, whether it may have happened, and what to do next.

use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::client::{ClientError, RetryClass, reason};

/// How a command ends, besides well (0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It went wrong.
    Failed = 1,
    /// It was called wrongly.
    Usage = 2,
    /// There is no such stream, message or context.
    NotFound = 3,
    /// No server answered, or it cannot serve now.
    Unavailable = 4,
    /// A condition (`--expect-…`) did not hold.
    Expectation = 5,
    /// The cluster is not healthy.
    Unhealthy = 10,
}

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    /// The process's exit code.
    pub exit: Exit,
    /// What was wrong.
    pub message: String,
    /// Whether it may have happened; empty where that is no question.
    pub outcome: &'static str,
    /// What to do next.
    pub hint: Option<String>,
    /// The reader of our output went away: nobody wants to hear of it.
    quiet: bool,
}

impl Failure {
    /// A failure with nothing to add.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Failure {
            exit,
            message: message.into(),
            outcome: "",
            hint: None,
            quiet: false,
        }
    }

    /// A call that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The same with advice.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with something before the message.
    pub fn context(mut self, what: impl std::fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Tells the user, and returns the exit code.
    pub fn report(self) -> ExitCode {
        if self.quiet {
            return ExitCode::SUCCESS;
        }
        let mut err = io::stderr().lock();
        // Nothing can be done if the standard error is gone, too.
        let _ = writeln!(err, "error: {}", self.message);
        if !self.outcome.is_empty() {
            let _ = writeln!(err, "  outcome: {}", self.outcome);
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(err, "  next: {hint}");
        }
        ExitCode::from(self.exit as u8)
    }
}

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Self {
        let exit = if e.is_expectation_failed() {
            Exit::Expectation
        } else if e.is_not_found() || e.reason == "NOT_RETAINED" {
            Exit::NotFound
        } else if e.is_unavailable() || e.code == tonic::Code::ResourceExhausted {
            Exit::Unavailable
        } else if e.code == tonic::Code::InvalidArgument {
            Exit::Usage
        } else {
            Exit::Failed
        };
        let outcome = match e.retry {
            RetryClass::DidNotHappen => "nothing was changed",
            RetryClass::MayHaveHappened => "it may have happened; this is not known",
            RetryClass::CannotWork => "nothing was changed",
        };
        Failure {
            exit,
            outcome,
            hint: hint(&e),
            message: e.to_string(),
            quiet: false,
        }
    }
}

fn hint(e: &ClientError) -> Option<String> {
    if let Some(actual) = e.actual.filter(|_| e.is_expectation_failed()) {
        return Some(format!(
            "the last sequence is {actual}: look at what came since, then expect {actual}"
        ));
    }
    let advice = match e.reason.as_str() {
        reason::UNREACHABLE => {
            "start a server with `mainstem dev`, or name another with --server ADDRESS or `mainstem context use NAME`"
        }
        "STREAM_NOT_FOUND" => "`mainstem stream ls` lists the streams, `mainstem stream create NAME` makes one",
        "STREAM_REMOVED" => "`mainstem stream undelete NAME` brings it back",
        "NO_STREAM_FOR_SUBJECT" | "SUBJECT_NOT_IN_STREAM" => {
            "`mainstem stream info NAME` shows the subjects of a stream, --subject says which a message has"
        }
        "NOT_RETAINED" | "NO_MESSAGE" | "DELETED" => {
            "`mainstem stream info NAME` shows the first and the next sequence of each shard"
        }
        "STREAM_DIFFERS" => "`mainstem stream edit NAME` changes a stream, another name makes another",
        "REVISION_MISMATCH" => "`mainstem stream info NAME` shows the revision it has now",
        reason::STREAM_FULL => {
            "make room with `mainstem stream purge`, or raise the limits with `mainstem stream edit`"
        }
        "NODE_NOT_FOUND" | "NO_REPLICA_THERE" => {
            "`mainstem cluster nodes` lists the nodes, `mainstem shard ls` what they hold"
        }
        "NODE_HOLDS_REPLICAS" => "`mainstem node drain NODE` empties it first; --force removes it as it is",
        "WOULD_BREAK_QUORUM" => {
            "bring other nodes back first: `mainstem cluster health` shows what is missing; --accept-loss gives up what \
             cannot be kept"
        }
        "NOT_ENOUGH_NODES" => {
            "`mainstem cluster nodes` shows which nodes there are; add nodes, or ask for fewer replicas"
        }
        "GROUP_SHARED" => "--whole-group moves all of them",
        "LEADERLESS" | "NO_QUORUM" => "`mainstem cluster health` shows which nodes are missing",
        "HAND_OVER_FAILED" | "NODE_SILENT" => "`mainstem shard ls` shows who leads now and who could",
        "MESSAGE_IDS_FULL" => {
            "publish more slowly, or let the stream remember more: `mainstem stream edit NAME --duplicate-ids N`"
        }
        "DISK_LOW" => "make room on the node's disk, or purge streams; reading goes on",
        reason::BAD_CONFIG | reason::BAD_MESSAGE => return None,
        _ if e.is_not_found() => "`mainstem stream ls` lists the streams",
        _ => match e.retry {
            RetryClass::DidNotHappen => "try again",
            RetryClass::MayHaveHappened => {
                "check before you repeat it; a publish with --msg-id can be repeated without harm"
            }
            RetryClass::CannotWork => return None,
        },
    };
    Some(match &e.leader {
        Some(leader) => format!("{advice}; the node to ask is {leader}"),
        None => advice.to_owned(),
    })
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        let quiet = e.kind() == io::ErrorKind::BrokenPipe;
        Failure {
            quiet,
            ..Failure::new(Exit::Failed, e.to_string())
        }
    }
}
