//! Calls of the layers above, from node to node, over the sessions that carry the replicas' own requests: publishes and
//! reads for shards led elsewhere, proposals for the catalog, reports.
//!
//! What a call may cost is bounded on both sides: its bytes have a place in the peer's budget until it is answered, and
//! take at most half of it, so that the appends a call may wait for always have room; the number of calls under way is
//! bounded per session; and a call ends on both sides when its patience does.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::RwLock;
use tokio::time::Instant;

use super::link::Peers;
use super::outbox::Lane;
use super::session::{Asked, Places, Session};
use crate::base::RetryClass;
use crate::model::NodeId;
use crate::model::limits::GRPC_MESSAGE_BYTES_MAX;
use crate::wire::internal as pb;

pub use pb::PeerMethod;

/// A call's payload, and an answer's, at most.
pub const PAYLOAD_BYTES_MAX: usize = GRPC_MESSAGE_BYTES_MAX;

/// Serves calls of peers. `call` is entered in the order in which a peer's calls of a method arrive; what must keep
/// order is done before the future is returned. Neither `call` nor the future may block: both run in the task that
/// serves the peer's whole session. The future is dropped when the caller's patience ends or its session does.
pub trait PeerService: Send + Sync + 'static {
    fn call(&self, from: NodeId, method: PeerMethod, payload: Bytes) -> BoxFuture<'static, Result<Bytes, CallFailure>>;
}

/// The callee's refusal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CallFailure {
    pub message: String,
    pub retry: RetryClass,
}

/// Why a call has no answer. A peer that is down, or as busy as allowed: it did not happen. Lost under way or timed
/// out: it may have happened. Refused: as the callee says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    pub message: String,
    pub retry: RetryClass,
    /// The callee itself said so: it was reached.
    pub refused: bool,
}

impl CallError {
    fn not_sent(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            retry: RetryClass::DidNotHappen,
            refused: false,
        }
    }

    fn lost(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            retry: RetryClass::MayHaveHappened,
            refused: false,
        }
    }
}

/// A call that is on its way. Dropped, it goes on at the peer, and nobody hears of it.
pub struct CallUnderWay {
    answer: BoxFuture<'static, Result<Bytes, CallError>>,
}

impl CallUnderWay {
    /// Waits for the answer, for what is left of the call's patience.
    pub async fn answer(self) -> Result<Bytes, CallError> {
        self.answer.await
    }
}

impl Peers {
    /// Calls a service of a node; at this node, it is entered directly. `patience` bounds the whole call.
    pub async fn call(
        &self,
        node: NodeId,
        method: PeerMethod,
        payload: Bytes,
        patience: Duration,
    ) -> Result<Bytes, CallError> {
        self.begin_call(node, method, payload, patience).await?.answer().await
    }

    /// As [`call`](Self::call), but returns when the call is queued: of two calls of a method, the one for which this
    /// returned first is entered first, as long as the session lives.
    pub async fn begin_call(
        &self,
        node: NodeId,
        method: PeerMethod,
        payload: Bytes,
        patience: Duration,
    ) -> Result<CallUnderWay, CallError> {
        let deadline = Instant::now() + patience;
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(CallError {
                message: format!("a call of {} bytes is larger than {PAYLOAD_BYTES_MAX}", payload.len()),
                retry: RetryClass::CannotWork,
                refused: false,
            });
        }
        if node == self.0.config.identity.node {
            let work = self.0.services.serve(node, method.into(), payload, millis(patience));
            let answer = work.map(move |answer| taken(node, Some(answer)));
            return Ok(CallUnderWay { answer: answer.boxed() });
        }
        let session = self.session_with(node, patience).await.map_err(CallError::not_sent)?;
        let places = tokio::time::timeout_at(deadline, session.places(payload.len()))
            .await
            .map_err(|_| {
                CallError::not_sent(format!(
                    "node {node} has as many calls unanswered as allowed; try again"
                ))
            })?
            .ok_or_else(|| CallError::not_sent(format!("node {node} is down: {}", session.reason())))?;
        let asked = send(&session, places, method, payload, deadline)
            .map_err(|reason| CallError::not_sent(format!("node {node} is down: {reason}")))?;
        let answer = async move {
            match tokio::time::timeout_at(deadline, asked.answer()).await {
                Ok(Ok(pb::call_answer::Result::Service(answer))) => taken(node, Some(answer)),
                Ok(Ok(
                    pb::call_answer::Result::Heartbeat(_)
                    | pb::call_answer::Result::Vote(_)
                    | pb::call_answer::Result::Transfer(_)
                    | pb::call_answer::Result::Error(_),
                )) => taken(node, None),
                Ok(Err(reason)) => Err(CallError::lost(format!("the session with node {node} ended: {reason}"))),
                Err(_) => Err(CallError::lost(format!(
                    "node {node} did not answer within {patience:?}"
                ))),
            }
        };
        Ok(CallUnderWay { answer: answer.boxed() })
    }

    /// Lets a service serve calls of some methods, until [`shutdown`](Self::shutdown). Others are refused: cannot work.
    pub fn serve_calls(&self, methods: impl IntoIterator<Item = PeerMethod>, service: Arc<dyn PeerService>) {
        let mut all = self.0.services.0.write();
        for method in methods {
            all.insert(method.into(), service.clone());
        }
    }
}

fn send(
    session: &Arc<Session>,
    places: Places,
    method: PeerMethod,
    payload: Bytes,
    deadline: Instant,
) -> Result<Asked, String> {
    // By method, not by size: calls of a method must not overtake each other.
    let lane = if matches!(method, PeerMethod::Publish | PeerMethod::MetaPropose) {
        Lane::Bulk
    } else {
        Lane::Urgent
    };
    let bytes = 128 + payload.len();
    let left = deadline.saturating_duration_since(Instant::now());
    session.begin(lane, bytes, Some(places), |call| {
        pb::peer_message::Kind::Service(pb::ServiceCall {
            call,
            method: method.into(),
            payload,
            patience_ms: millis(left),
        })
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// An answer as the caller gets it.
fn taken(node: NodeId, answer: Option<pb::ServiceAnswer>) -> Result<Bytes, CallError> {
    match answer.and_then(|a| a.result) {
        Some(pb::service_answer::Result::Payload(payload)) => Ok(payload),
        Some(pb::service_answer::Result::Refusal(refusal)) => Err(CallError {
            retry: match refusal.retry() {
                pb::PeerRetry::DidNotHappen => RetryClass::DidNotHappen,
                pb::PeerRetry::CannotWork => RetryClass::CannotWork,
                // One that this version does not know is the worst of all.
                pb::PeerRetry::MayHaveHappened | pb::PeerRetry::Unspecified => RetryClass::MayHaveHappened,
            },
            message: refusal.message,
            refused: true,
        }),
        None => Err(CallError::lost(format!(
            "node {node} answered in a way that this version does not know"
        ))),
    }
}

/// The services of a node, by method.
#[derive(Default)]
pub(super) struct Services(RwLock<HashMap<i32, Arc<dyn PeerService>>>);

impl Services {
    /// Enters a call. The answer comes within the caller's patience, or not at all: then nobody waits for it.
    pub fn serve(
        &self,
        from: NodeId,
        method: i32,
        payload: Bytes,
        patience_ms: u64,
    ) -> BoxFuture<'static, pb::ServiceAnswer> {
        let known = PeerMethod::try_from(method).ok();
        let service = self.0.read().get(&method).cloned();
        let (Some(method), Some(service)) = (known, service) else {
            let refusal = CallFailure {
                message: format!("this node serves no calls of method {method}"),
                retry: RetryClass::CannotWork,
            };
            return std::future::ready(answer_of(Err(refusal))).boxed();
        };
        let work = service.call(from, method, payload);
        async move {
            let patience = Duration::from_millis(patience_ms);
            let result = tokio::time::timeout(patience, work).await.unwrap_or_else(|_| {
                Err(CallFailure {
                    message: format!("the call was not done within {patience:?}"),
                    retry: RetryClass::MayHaveHappened,
                })
            });
            answer_of(result)
        }
        .boxed()
    }

    /// The answer to one call too many.
    pub fn overloaded() -> pb::ServiceAnswer {
        answer_of(Err(CallFailure {
            message: "the node serves as many calls of this peer as it takes; try again".into(),
            retry: RetryClass::DidNotHappen,
        }))
    }

    /// Lets go of every service.
    pub fn clear(&self) {
        self.0.write().clear();
    }
}

fn answer_of(result: Result<Bytes, CallFailure>) -> pb::ServiceAnswer {
    let result = match result {
        Ok(payload) if payload.len() <= PAYLOAD_BYTES_MAX => pb::service_answer::Result::Payload(payload),
        Ok(payload) => pb::service_answer::Result::Refusal(pb::ServiceRefusal {
            message: format!(
                "the answer of {} bytes is larger than {PAYLOAD_BYTES_MAX}",
                payload.len()
            ),
            retry: pb::PeerRetry::MayHaveHappened.into(),
        }),
        Err(failure) => pb::service_answer::Result::Refusal(pb::ServiceRefusal {
            message: failure.message,
            retry: match failure.retry {
                RetryClass::DidNotHappen => pb::PeerRetry::DidNotHappen,
                RetryClass::MayHaveHappened => pb::PeerRetry::MayHaveHappened,
                RetryClass::CannotWork => pb::PeerRetry::CannotWork,
            }
            .into(),
        }),
    };
    pb::ServiceAnswer { result: Some(result) }
}
