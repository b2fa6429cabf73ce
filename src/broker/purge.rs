//! Purges of shards that are led elsewhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;

use super::error::PublishError;
use super::relay::{Answer, encoded, malformed, refused};
use super::route::Route;
use super::{Broker, ShardAccess};
use crate::base::RetryClass;
use crate::machine::GroupOutcome;
use crate::model::{GroupId, ShardId};
use crate::raft::transport::PeerMethod;
use crate::raft::{Applied, ProposeError};
use crate::wire::internal as pb;
use pb::relay_purged::Result as Told;

/// How long a leader is looked for.
const ELECTION: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);
/// One entry's purge is answered in this time, or its outcome is unknown.
const PATIENCE: Duration = Duration::from_secs(10);

impl Broker {
    /// Purges a shard at its leader's node. Gives the number of messages removed.
    pub async fn purge_at_leader(&self, access: &ShardAccess, purge: pb::Purge) -> Result<u64, PublishError> {
        let shard = access.place.shard;
        let mut purged = 0;
        let mut next = Some(purge);
        while let Some(purge) = next {
            let done = self.purge_once(shard, access.place.group, purge).await?;
            purged += done.messages;
            next = done.next;
        }
        Ok(purged)
    }

    async fn purge_once(
        &self,
        shard: ShardId,
        known: GroupId,
        purge: pb::Purge,
    ) -> Result<pb::RelayPurgeDone, PublishError> {
        let mut group = known;
        let begun = Instant::now();
        while begun.elapsed() < ELECTION {
            // It may be on its way to another one.
            group = self.view().owner_of(shard).unwrap_or(known);
            let unknown = || PublishError::from(ProposeError::Unknown { group });
            let call = pb::RelayPurge {
                group_id: group.get(),
                purge: Some(purge.clone()),
            };
            let payload: Bytes = call.encode_to_vec().into();
            let node = match (&self.router().peers, self.router().route(group)) {
                (Some(peers), Route::Here(_)) => Some((peers, peers.node())),
                (Some(peers), Route::There(node)) => Some((peers, node)),
                (Some(_), Route::Nowhere) | (None, _) => None,
            };
            if let Some((peers, node)) = node {
                match peers.call(node, PeerMethod::Purge, payload.clone(), PATIENCE).await {
                    Ok(answer) => match pb::RelayPurged::decode(answer).ok().and_then(|a| a.result) {
                        Some(Told::Done(done)) => return Ok(done),
                        Some(Told::Elsewhere(elsewhere)) => self.router().told(group, node, &elsewhere),
                        Some(Told::Refused(text)) => return Err(PublishError::BadMessage(text)),
                        None => return Err(unknown()),
                    },
                    // Sent twice it would take what was published in between.
                    Err(e) if e.retry != RetryClass::DidNotHappen => return Err(unknown()),
                    Err(_) => self.router().lost(group, node),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        let waited = begun.elapsed();
        Err(PublishError::NoLeader { group, waited })
    }
}

/// Proposes one purge, if the group is led here.
pub(super) async fn serve(broker: Arc<Broker>, payload: Bytes) -> Answer {
    let call = pb::RelayPurge::decode(payload).map_err(malformed)?;
    let purge = call.purge.ok_or_else(|| malformed("it purges nothing"))?;
    let id = GroupId::new(call.group_id);
    let answer = |told| encoded(&pb::RelayPurged { result: Some(told) });
    let elsewhere = || answer(Told::Elsewhere(broker.router().elsewhere(id)));
    let Some(group) = broker.groups().get(id).filter(|g| g.leads()) else {
        return elsewhere();
    };
    let command = pb::GroupCommand {
        feature_level: broker.view().feature_level(),
        op: Some(pb::group_command::Op::Purge(purge)),
    };
    let outcome = match group.propose(command.encode_to_vec().into()).await {
        Ok(mut pending) => pending.wait().await,
        Err(e) => Err(e),
    };
    match outcome {
        Ok((_, _, Applied::Command(GroupOutcome::Purged(Ok(done))))) => answer(Told::Done(pb::RelayPurgeDone {
            messages: done.messages,
            next: done.next,
        })),
        Ok((_, _, Applied::Command(GroupOutcome::Purged(Err(e))))) => answer(Told::Refused(e.to_string())),
        Ok((_, _, Applied::Command(GroupOutcome::Moved { to }))) => {
            Err(refused(format!("the shard has just been moved to {to}")))
        }
        Ok((_, _, Applied::Command(_) | Applied::Done)) => {
            answer(Told::Refused("the shard is not there any more".into()))
        }
        Err(ProposeError::NotLeader { .. }) => elsewhere(),
        Err(e) => Err(crate::raft::transport::CallFailure {
            message: e.to_string(),
            retry: e.retry_class(),
        }),
    }
}
