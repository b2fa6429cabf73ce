//! What a failed operation says: what was wrong, whether it may have happened, and whom to ask instead.

use std::error::Error as _;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

pub use crate::base::RetryClass;
use crate::wire::{code_name, v1};

/// The `google.rpc.ErrorInfo` domain of Mainstem's own errors.
const DOMAIN: &str = "mainstem.dev";

/// Reasons that the client itself gives; those of the server are listed in `docs/reference/errors.md`.
pub mod reason {
    /// No address answered.
    pub const UNREACHABLE: &str = "UNREACHABLE";
    /// The connection broke during the call.
    pub const CONNECTION_LOST: &str = "CONNECTION_LOST";
    /// The publisher, reader or client was closed.
    pub const CLOSED: &str = "CLOSED";
    /// The server is stopping and asks its clients to go to another node.
    pub const GO_AWAY: &str = "GO_AWAY";
    /// The server is stopping.
    pub const STOPPING: &str = "STOPPING";
    /// The call took longer than allowed.
    pub const TIMED_OUT: &str = "TIMED_OUT";
    /// An address, certificate or option makes no sense.
    pub const BAD_CONFIG: &str = "BAD_CONFIG";
    /// A message is not valid: its subject, key, headers or size.
    pub const BAD_MESSAGE: &str = "BAD_MESSAGE";
    /// The server sent something that the protocol does not allow, or bytes that fail their checksum.
    pub const BAD_ANSWER: &str = "BAD_ANSWER";
    /// A condition of a publish did not hold; [`ClientError::actual`](super::ClientError::actual) is what was found.
    pub const EXPECTATION_FAILED: &str = "EXPECTATION_FAILED";
    /// The stream is full and discards new messages.
    pub const STREAM_FULL: &str = "STREAM_FULL";
    /// A batch came out of the order of its producer; an earlier one has to be sent again first.
    pub const OUT_OF_ORDER: &str = "OUT_OF_ORDER";
    /// The server does not know the producer (any more).
    pub const UNKNOWN_PRODUCER: &str = "UNKNOWN_PRODUCER";
    /// The stream's shard map has changed since the batch was made.
    pub const MAP_CHANGED: &str = "MAP_CHANGED";
}

/// A failed operation.
///
/// ```no_run
/// use mainstem::client::{Client, RetryClass};
///
/// # async fn example(client: Client) {
/// match client.get_stream("orders").await {
///     Ok(stream) => println!("{} shards", stream.shards.len()),
///     Err(e) if e.retry == RetryClass::CannotWork => eprintln!("fix the request: {e}"),
///     Err(e) => eprintln!("try again later: {e}"),
/// }
/// # }
/// ```
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} [{reason}]")]
pub struct ClientError {
    /// A stable word, such as `STREAM_NOT_FOUND`.
    pub reason: String,
    /// Whether the operation happened, and so whether to try again.
    pub retry: RetryClass,
    /// For people.
    pub message: String,
    /// The node to ask instead, where one is known.
    pub leader: Option<String>,
    /// For a failed expectation: the value found.
    pub actual: Option<u64>,
    /// The gRPC code.
    pub code: Code,
}

impl ClientError {
    /// An error found on this side before anything was sent.
    pub(crate) fn local(code: Code, reason: &str, message: impl Into<String>) -> Self {
        let retry = match code {
            Code::Unavailable | Code::ResourceExhausted | Code::Aborted => RetryClass::DidNotHappen,
            Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal => RetryClass::MayHaveHappened,
            Code::Ok
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss
            | Code::Unauthenticated => RetryClass::CannotWork,
        };
        ClientError {
            reason: reason.to_owned(),
            retry,
            message: message.into(),
            leader: None,
            actual: None,
            code,
        }
    }

    /// A message or option that cannot be sent as it is.
    pub(crate) fn invalid(reason: &str, message: impl Into<String>) -> Self {
        Self::local(Code::InvalidArgument, reason, message)
    }

    /// Something from the server that cannot be right.
    pub(crate) fn bad_answer(message: impl Into<String>) -> Self {
        Self::local(Code::DataLoss, reason::BAD_ANSWER, message)
    }

    /// The same error under another retry class.
    pub(crate) fn with_retry(mut self, retry: RetryClass) -> Self {
        self.retry = retry;
        self
    }

    /// Whether there is no such stream, message or other thing.
    pub fn is_not_found(&self) -> bool {
        self.code == Code::NotFound
    }

    /// Whether a condition of the publish did not hold.
    pub fn is_expectation_failed(&self) -> bool {
        self.reason == reason::EXPECTATION_FAILED
    }

    /// Whether the server could not be reached or cannot serve now.
    pub fn is_unavailable(&self) -> bool {
        self.code == Code::Unavailable
    }

    pub(crate) fn from_batch_error(e: &v1::BatchError) -> Self {
        let code = Code::from_i32(e.code);
        let retry = match e.retry() {
            v1::RetryClass::DidNotHappen => RetryClass::DidNotHappen,
            v1::RetryClass::CannotWork => RetryClass::CannotWork,
            // A class that this client does not know: assume the least.
            v1::RetryClass::MayHaveHappened | v1::RetryClass::Unspecified => RetryClass::MayHaveHappened,
        };
        ClientError {
            reason: e.reason.clone(),
            retry,
            message: e.message.clone(),
            leader: e.leader.clone(),
            actual: e.actual_sequence,
            code,
        }
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        if let Some(info) = status.get_details_error_info()
            && info.domain == DOMAIN
        {
            return ClientError {
                retry: info
                    .metadata
                    .get("retry")
                    .and_then(|w| RetryClass::parse(w))
                    .unwrap_or(RetryClass::MayHaveHappened),
                leader: info.metadata.get("leader").filter(|l| !l.is_empty()).cloned(),
                actual: info.metadata.get("actual").and_then(|a| a.parse().ok()),
                reason: info.reason,
                message: status.message().to_owned(),
                code: status.code(),
            };
        }
        if let Some(why) = connect_failure(&status) {
            return ClientError::local(Code::Unavailable, reason::UNREACHABLE, why);
        }
        // Not one of ours: a proxy, the transport, or this library's own limits spoke.
        let code = status.code();
        let message = match status.source() {
            Some(source) if !status.message().contains(&source.to_string()) => {
                format!("{}: {}", status.message(), root_cause(source))
            }
            Some(_) | None => status.message().to_owned(),
        };
        let base = ClientError::local(code, "", message);
        match code {
            Code::Unavailable => ClientError {
                reason: reason::CONNECTION_LOST.into(),
                ..base
            }
            .with_retry(RetryClass::MayHaveHappened),
            Code::DeadlineExceeded => ClientError {
                reason: reason::TIMED_OUT.into(),
                ..base
            },
            Code::Cancelled | Code::Unknown | Code::Internal => {
                // A broken connection is told under any of these, with the transport's error behind it.
                if status.source().is_some() {
                    ClientError {
                        reason: reason::CONNECTION_LOST.into(),
                        code: Code::Unavailable,
                        ..base
                    }
                    .with_retry(RetryClass::MayHaveHappened)
                } else {
                    ClientError {
                        reason: grpc_word(code).into(),
                        ..base
                    }
                }
            }
            Code::Ok
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss
            | Code::Unauthenticated => ClientError {
                reason: grpc_word(code).into(),
                ..base
            },
        }
    }
}

/// Why no connection could be made, if that is what went wrong: then nothing was sent.
fn connect_failure(status: &Status) -> Option<String> {
    let mut source = status.source();
    while let Some(e) = source {
        if e.is::<tonic::ConnectError>() {
            return Some(root_cause(e));
        }
        source = e.source();
    }
    None
}

fn root_cause(e: &(dyn std::error::Error + 'static)) -> String {
    let mut last = e;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string()
}

/// The word for a status of others: the code's own, but for those that have a reason of this client.
fn grpc_word(code: Code) -> &'static str {
    if code == Code::DeadlineExceeded {
        reason::TIMED_OUT
    } else if code == Code::Unavailable {
        reason::CONNECTION_LOST
    } else {
        code_name(code)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn the_servers_details_are_read() {
        let details = ErrorDetails::with_error_info(
            "EXPECTATION_FAILED",
            DOMAIN,
            HashMap::from([
                ("retry".to_owned(), "cannot_work".to_owned()),
                ("actual".to_owned(), "41".to_owned()),
                ("leader".to_owned(), "n2".to_owned()),
            ]),
        );
        let e = ClientError::from(Status::with_error_details(
            Code::FailedPrecondition,
            "expected 40",
            details,
        ));
        assert_eq!(
            (e.retry, e.actual, e.leader.as_deref()),
            (RetryClass::CannotWork, Some(41), Some("n2"))
        );
        assert!(e.is_expectation_failed());
        assert_eq!(e.to_string(), "expected 40 [EXPECTATION_FAILED]");
    }

    #[test]
    fn an_unknown_retry_word_is_taken_for_the_unknown_outcome() {
        let details =
            ErrorDetails::with_error_info("X", DOMAIN, HashMap::from([("retry".to_owned(), "what".to_owned())]));
        let e = ClientError::from(Status::with_error_details(Code::Aborted, "", details));
        assert_eq!(e.retry, RetryClass::MayHaveHappened);
    }

    #[test]
    fn statuses_of_others_are_classed_by_code() {
        let of = |code| ClientError::from(Status::new(code, "x")).retry;
        assert_eq!(of(Code::DeadlineExceeded), RetryClass::MayHaveHappened);
        assert_eq!(of(Code::Unavailable), RetryClass::MayHaveHappened);
        assert_eq!(of(Code::Internal), RetryClass::MayHaveHappened);
        assert_eq!(of(Code::Unimplemented), RetryClass::CannotWork);
        assert_eq!(of(Code::NotFound), RetryClass::CannotWork);
    }
}
