//! Calls of the layers above over the peers' sessions.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use mainstem::base::RetryClass;
use mainstem::model::NodeId;
use mainstem::raft::transport::{CallFailure, PeerMethod, PeerService};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::lab::*;
use super::net::Proxy;

/// Answers with what came, when it may; remembers the order in which calls were entered.
struct Echo {
    entered: Mutex<Vec<Bytes>>,
    allowed: Arc<Semaphore>,
    under_way: Arc<AtomicUsize>,
}

impl Echo {
    fn new(allowed: usize) -> Arc<Self> {
        Arc::new(Self {
            entered: Mutex::default(),
            allowed: Arc::new(Semaphore::new(allowed)),
            under_way: Arc::default(),
        })
    }
}

/// Counts calls that were dropped, too.
struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PeerService for Echo {
    fn call(&self, from: NodeId, method: PeerMethod, payload: Bytes) -> BoxFuture<'static, Result<Bytes, CallFailure>> {
        assert_eq!((from, method), (NodeId::new(1), PeerMethod::Publish));
        self.entered.lock().push(payload.clone());
        self.under_way.fetch_add(1, Ordering::Relaxed);
        let under_way = UnderWay(self.under_way.clone());
        let allowed = self.allowed.clone();
        async move {
            let _under_way = under_way;
            allowed.acquire().await.unwrap().forget();
            match &payload[..] {
                b"refuse" => Err(CallFailure {
                    message: "as it wishes".into(),
                    retry: RetryClass::CannotWork,
                }),
                _ => Ok(payload),
            }
        }
        .boxed()
    }
}

const SECOND: NodeId = NodeId::new(2);

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_entered_in_order_and_answered_each_on_its_own() {
    let lab = Lab::new(2, Settings::default()).await;
    let echo = Echo::new(Semaphore::MAX_PERMITS);
    lab.node(1).peers.serve_calls([PeerMethod::Publish], echo.clone());
    let peers = &lab.node(0).peers;
    let mut calls = Vec::new();
    for n in 0..500u32 {
        // Large ones and small ones do not overtake each other.
        let payload = Bytes::from(vec![n as u8; if n % 3 == 0 { 100_000 } else { 10 } + n as usize]);
        let call = peers
            .begin_call(SECOND, PeerMethod::Publish, payload.clone(), PATIENCE)
            .await;
        calls.push((payload, tokio::spawn(call.unwrap().answer())));
    }
    let mut sent = Vec::new();
    for (payload, call) in calls {
        assert_eq!(call.await.unwrap().unwrap(), payload);
        sent.push(payload);
    }
    assert_eq!(*echo.entered.lock(), sent);
    let refused = peers
        .call(SECOND, PeerMethod::Publish, "refuse".into(), PATIENCE)
        .await
        .unwrap_err();
    assert_eq!(
        (refused.message.as_str(), refused.retry, refused.refused),
        ("as it wishes", RetryClass::CannotWork, true)
    );
    let unknown = peers
        .call(SECOND, PeerMethod::Lookup, "x".into(), PATIENCE)
        .await
        .unwrap_err();
    assert_eq!((unknown.retry, unknown.refused), (RetryClass::CannotWork, true));
    // A node may call itself.
    let own = Echo::new(Semaphore::MAX_PERMITS);
    peers.serve_calls([PeerMethod::Publish], own);
    let answer = peers
        .call(NodeId::new(1), PeerMethod::Publish, "own".into(), PATIENCE)
        .await;
    assert_eq!(answer.unwrap(), "own");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_leaves_unanswered_is_bounded_and_ends_with_its_patience() {
    let settings = Settings {
        tune: |config| config.inflight_bytes_max = 4 << 20,
        ..Settings::default()
    };
    let lab = Lab::new(2, settings).await;
    let echo = Echo::new(0);
    lab.node(1).peers.serve_calls([PeerMethod::Publish], echo.clone());
    let peers = &lab.node(0).peers;
    let short = Duration::from_secs(3);
    // Half of the budget is for calls: two of a mebibyte.
    let payload = Bytes::from(vec![7; 1 << 20]);
    let mut calls = Vec::new();
    for _ in 0..2 {
        calls.push(
            peers
                .begin_call(SECOND, PeerMethod::Publish, payload.clone(), PATIENCE)
                .await
                .unwrap(),
        );
    }
    let one_more = peers
        .call(SECOND, PeerMethod::Publish, payload.clone(), short)
        .await
        .unwrap_err();
    assert_eq!(
        (one_more.retry, one_more.refused),
        (RetryClass::DidNotHappen, false),
        "{one_more}"
    );
    until("both are entered", || echo.entered.lock().len() == 2).await;
    // Places come back with the answers, whether or not anybody looks at them.
    echo.allowed.add_permits(2);
    until("both are answered", || {
        let links = peers.links();
        links
            .iter()
            .any(|l| l.node == SECOND && l.up && l.unanswered_bytes == 0)
    })
    .await;
    for call in calls {
        assert_eq!(call.answer().await.unwrap(), payload);
    }
    // Not answered in time: it may have happened, and the callee stops working at it.
    let late = peers
        .call(SECOND, PeerMethod::Publish, "late".into(), short)
        .await
        .unwrap_err();
    assert_eq!(late.retry, RetryClass::MayHaveHappened, "{late}");
    until("the callee gave it up", || echo.under_way.load(Ordering::Relaxed) == 0).await;
    until("its place is free", || {
        peers.links().iter().all(|l| l.unanswered_bytes == 0)
    })
    .await;
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_down_was_not_called_and_one_that_ends_may_have_been() {
    let mut lab = Lab::new(2, Settings::default()).await;
    let echo = Echo::new(0);
    lab.node(1).peers.serve_calls([PeerMethod::Publish], echo.clone());
    let proxy = Proxy::new(lab.node(1).address.clone()).await;
    lab.node(0).map.set_node(SECOND, proxy.address.clone());
    let peers = lab.node(0).peers.clone();
    let call = peers
        .begin_call(SECOND, PeerMethod::Publish, "x".into(), PATIENCE)
        .await
        .unwrap();
    until("it is entered", || echo.entered.lock().len() == 1).await;
    lab.kill(1).await;
    let lost = call.answer().await.unwrap_err();
    assert_eq!(
        (lost.retry, lost.refused),
        (RetryClass::MayHaveHappened, false),
        "{lost}"
    );
    until("the link is down", || peers.links().iter().all(|l| !l.up)).await;
    let down = peers
        .call(SECOND, PeerMethod::Publish, "y".into(), Duration::from_secs(5))
        .await
        .unwrap_err();
    assert_eq!((down.retry, down.refused), (RetryClass::DidNotHappen, false), "{down}");
    let nobody = peers
        .call(NodeId::new(9), PeerMethod::Publish, "z".into(), PATIENCE)
        .await
        .unwrap_err();
    assert_eq!(nobody.retry, RetryClass::DidNotHappen, "{nobody}");
    assert_eq!(echo.entered.lock().len(), 1);
    lab.end().await;
}
