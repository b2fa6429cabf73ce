//! What a shard's task sends to another node, and waits for: the answer of a leader elsewhere, a new leader, a new group.

use bytes::Bytes;
use prost::Message;
use tokio::time::Instant;

use super::error::PublishError;
use super::ingest::Outcome;
use super::relay_codec::outcome_from_pb;
use super::route::Router;
use crate::base::RetryClass;
use crate::model::{GroupId, NodeId, ShardId};
use crate::raft::ProposeError;
use crate::raft::transport::CallError;
use crate::wire::internal as pb;

/// What became of an entry.
pub(super) enum Answer {
    Each(Vec<Outcome>),
    All(PublishError),
    /// The shard is not in the group that was asked: nothing was done.
    NoShard,
}

/// What the leader's node said of an entry.
pub(super) fn relayed(router: &Router, node: NodeId, group: GroupId, answer: Result<Bytes, CallError>) -> Answer {
    let unknown = || Answer::All(ProposeError::Unknown { group }.into());
    let answer = match answer {
        Ok(answer) => answer,
        Err(e) => return Answer::All(call_failed(router, node, group, &e)),
    };
    match pb::RelayPublished::decode(answer).ok().and_then(|a| a.result) {
        Some(pb::relay_published::Result::Outcomes(outcomes)) => {
            let outcomes = outcomes.outcomes.into_iter();
            let outcomes: Vec<Outcome> = outcomes.map(|o| outcome_from_pb(group, o)).collect();
            // A leader without a quorum may be one no more: others are asked as well.
            match outcomes.iter().all(is_without_quorum) {
                true => router.lost(group, node),
                false => router.leads(group, node),
            }
            // The whole shard has moved: all of an entry, or nothing.
            match outcomes.first() {
                Some(Err(e @ PublishError::Moved { .. })) => Answer::All(e.clone()),
                Some(_) | None => Answer::Each(outcomes),
            }
        }
        Some(pb::relay_published::Result::Elsewhere(elsewhere)) => {
            router.told(group, node, &elsewhere);
            Answer::All(ProposeError::NotLeader { group, leader: None }.into())
        }
        None => unknown(),
    }
}

fn is_without_quorum(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Err(PublishError::Propose(ProposeError::NotLeader { .. })
            | PublishError::NoQuorum { .. }
            | PublishError::Unconfirmed { .. })
    )
}

/// What a call that was not answered is to its batches.
pub(super) fn call_failed(router: &Router, node: NodeId, group: GroupId, e: &CallError) -> PublishError {
    router.lost(group, node);
    tracing::debug!(%group, %node, error = %e, "a publish could not be passed on");
    match e.retry {
        RetryClass::DidNotHappen => ProposeError::NotLeader { group, leader: None }.into(),
        RetryClass::MayHaveHappened => ProposeError::Unknown { group }.into(),
        RetryClass::CannotWork => ProposeError::Stopped {
            group,
            reason: e.message.clone(),
        }
        .into(),
    }
}

/// Returns at that time, or when the replica here hears of a leader; or, for a shard that is on its way to another group, when
/// that has it.
pub(super) async fn pause(
    router: &Router,
    shard: ShardId,
    group: GroupId,
    heir: Option<GroupId>,
    until: Option<Instant>,
) {
    let wait = tokio::time::sleep_until(until.unwrap_or_else(Instant::now));
    if let Some(heir) = heir {
        let mut changes = router.view.watch();
        let adopted = async {
            while router.view.owner_of(shard).is_some_and(|owner| owner != heir) {
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            () = wait => {}
            () = adopted => {}
        }
        return;
    }
    let Some(replica) = router.groups.get(group) else {
        return wait.await;
    };
    let mut leader = replica.watch_leader();
    let heard = async {
        while leader.changed().await.is_ok() {
            if leader.borrow().leader.is_some() {
                return;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = wait => {}
        () = heard => {}
    }
}
