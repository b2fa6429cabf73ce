//! What other nodes ask of the shards here: publishes for those that are led here, reads of those that are replicated
//! here. One hop only: what this node cannot do itself it does not pass on, it says who can.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::error::{PublishError, ReadError};
use super::ingest::{Item, Outcome, ReplyTo};
use super::reader::{FILL_BYTES, damaged, storage};

use super::relay_codec::{outcome_to_pb, positions_from_pb, positions_to_pb};
use super::remote::{POLL, news};
use super::{Broker, purge};
use crate::base::RetryClass;
use crate::machine::port::ShardView;
use crate::model::limits::ENTRY_ITEMS_MAX;
use crate::model::{GroupId, LogIndex, NodeId, Sequence, ShardId, TimeUs};
use crate::raft::transport::{CallFailure, PeerMethod, PeerService};
use crate::raft::{BarrierError, Group, Groups, ProposeError, ShardShared};
use crate::wire::internal as pb;

/// Fetches of other nodes that are answered at a time: each holds about [`FILL_BYTES`] until it is sent.
const FETCHES_MAX: usize = 32;
/// How long a replica that is behind is waited for.
const CATCH_UP: Duration = Duration::from_secs(2);

/// The service. It does not keep the broker alive.
pub(super) struct Relay {
    broker: Weak<Broker>,
    fetches: Arc<Semaphore>,
}

/// Bytes of an answer, with the place they take until they are sent.
struct Held {
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A shard that has a replica here.
struct Here {
    group: Group,
    shared: Arc<ShardShared>,
}

impl Here {
    /// Err: the shard is in no replica that goes on here, and what was read of it may be missing something. To be asked after
    /// reading.
    fn stays(&self, groups: &Groups) -> Result<(), String> {
        match groups.holds(self.shared.group()) {
            true => Ok(()),
            false => Err(format!("the replica of {} has left this node", self.group.id)),
        }
    }
}

pub(super) type Answer = Result<Bytes, CallFailure>;

pub(super) fn refused(message: impl Into<String>) -> CallFailure {
    CallFailure {
        message: message.into(),
        retry: RetryClass::DidNotHappen,
    }
}

pub(super) fn malformed(e: impl std::fmt::Display) -> CallFailure {
    CallFailure {
        message: format!("the call cannot be read: {e}"),
        retry: RetryClass::CannotWork,
    }
}

/// What is damaged here cannot be read here.
fn unread(e: &ReadError) -> CallFailure {
    let is_damaged = matches!(e, ReadError::Damaged(_));
    CallFailure {
        message: e.to_string(),
        retry: match is_damaged {
            true => RetryClass::CannotWork,
            false => RetryClass::DidNotHappen,
        },
    }
}

pub(super) fn encoded(message: &impl Message) -> Answer {
    Ok(message.encode_to_vec().into())
}

impl Relay {
    pub const METHODS: [PeerMethod; 6] = [
        PeerMethod::Publish,
        PeerMethod::Positions,
        PeerMethod::Fetch,
        PeerMethod::Barrier,
        PeerMethod::Lookup,
        PeerMethod::Purge,
    ];

    pub fn new(broker: &Arc<Broker>) -> Arc<Self> {
        Arc::new(Self {
            broker: Arc::downgrade(broker),
            fetches: Arc::new(Semaphore::new(FETCHES_MAX)),
        })
    }
}

impl PeerService for Relay {
    fn call(&self, _from: NodeId, method: PeerMethod, payload: Bytes) -> BoxFuture<'static, Answer> {
        let Some(broker) = self.broker.upgrade() else {
            return std::future::ready(Err(refused("the node is stopping"))).boxed();
        };
        if method == PeerMethod::Publish {
            publish(&broker, payload)
        } else if method == PeerMethod::Fetch {
            match self.fetches.clone().try_acquire_owned() {
                Ok(place) => fetch(broker, payload, place).boxed(),
                Err(_) => std::future::ready(Err(refused("the node answers as many fetches as it may"))).boxed(),
            }
        } else if method == PeerMethod::Positions {
            positions(broker, payload).boxed()
        } else if method == PeerMethod::Barrier {
            barrier(broker, payload).boxed()
        } else if method == PeerMethod::Lookup {
            look_up(broker, payload).boxed()
        } else if method == PeerMethod::Purge {
            purge::serve(broker, payload).boxed()
        } else {
            std::future::ready(Err(malformed("it is of another service"))).boxed()
        }
    }
}

/// The items enter the shard's mailbox before this returns, so that calls keep their order.
fn publish(broker: &Arc<Broker>, payload: Bytes) -> BoxFuture<'static, Answer> {
    let call = match pb::RelayPublish::decode(payload) {
        Ok(call) if call.items.len() <= ENTRY_ITEMS_MAX => call,
        Ok(_) => return std::future::ready(Err(malformed("too many items"))).boxed(),
        Err(e) => return std::future::ready(Err(malformed(e))).boxed(),
    };
    let (shard, group) = (ShardId::new(call.shard_id), GroupId::new(call.group_id));
    if !broker.groups().get(group).is_some_and(|g| g.leads()) {
        let elsewhere = pb::relay_published::Result::Elsewhere(broker.router().elsewhere(group));
        let answer = pb::RelayPublished {
            result: Some(elsewhere),
        };
        return std::future::ready(encoded(&answer)).boxed();
    }
    let count = call.items.len();
    let bytes = call.items.iter().map(|item| item.batch.len()).sum();
    let permit = broker.admit(group).and_then(|()| {
        let permit = broker.publish_memory().try_acquire(bytes);
        permit.ok_or(PublishError::Overloaded {
            what: "memory for publishes",
        })
    });
    let mut permit = match permit {
        Ok(permit) => permit,
        Err(e) => {
            let outcome = outcome_to_pb(&Err(e));
            return std::future::ready(published(vec![outcome; count])).boxed();
        }
    };
    let (tx, mut replies) = mpsc::channel::<(u64, Outcome)>(count.max(1));
    let ingest = broker.ingest_of(shard, group);
    let submitted = Instant::now();
    for (item, tag) in call.items.into_iter().zip(0..) {
        let Some(part) = permit.split(item.batch.len()) else {
            break;
        };
        ingest.submit(Item {
            batch: item.batch,
            producer: item.producer,
            expect: item.expect,
            permit: part,
            relayed: true,
            reply: ReplyTo {
                tag,
                submitted,
                channel: tx.clone(),
            },
        });
    }
    async move {
        drop(tx);
        let unknown = outcome_to_pb(&Err(ProposeError::Unknown { group }.into()));
        let mut outcomes = vec![unknown; count];
        while let Some((tag, outcome)) = replies.recv().await {
            let slot = usize::try_from(tag).ok().and_then(|tag| outcomes.get_mut(tag));
            if let Some(slot) = slot {
                *slot = outcome_to_pb(&outcome);
            }
        }
        published(outcomes)
    }
    .boxed()
}

fn published(outcomes: Vec<pb::RelayOutcome>) -> Answer {
    let outcomes = pb::relay_published::Result::Outcomes(pb::RelayOutcomes { outcomes });
    encoded(&pb::RelayPublished { result: Some(outcomes) })
}

/// The shard, if there is a replica of its group here. An error: the replica is here, and the shard not, or not yet.
fn here(broker: &Broker, group: u64, shard: u64) -> Result<Option<Here>, CallFailure> {
    let (group, shard) = (GroupId::new(group), ShardId::new(shard));
    let Some(group) = broker.groups().get(group) else {
        return Ok(None);
    };
    match broker.groups().directory().get(shard) {
        // Who asks for the group that the shard was in a moment ago is as well served.
        Some(shared) if shared.group() == group.id || shared.came_from(group.id) => Ok(Some(Here { group, shared })),
        Some(_) | None => Err(refused(format!("{shard} is not, or not yet, in {} here", group.id))),
    }
}

async fn positions(broker: Arc<Broker>, payload: Bytes) -> Answer {
    let call = pb::RelayWatch::decode(payload).map_err(malformed)?;
    let answer = |result, freshness| {
        encoded(&pb::RelayWatched {
            result: Some(result),
            freshness,
        })
    };
    let Some(here) = here(&broker, call.group_id, call.shard_id)? else {
        let elsewhere = broker.router().elsewhere(GroupId::new(call.group_id));
        return answer(pb::relay_watched::Result::Elsewhere(elsewhere), None);
    };
    let (node, groups) = (broker.node(), broker.groups().clone());
    // While it waits it holds the shard, not the node.
    drop(broker);
    let mut watch = here.shared.watch();
    let at = match call.known.as_ref().map(positions_from_pb) {
        None => *watch.borrow(),
        Some(known) => {
            // Its sender lives in `here`; after the time, what there is is told.
            let _ = tokio::time::timeout(
                POLL,
                watch.wait_for(|at| news(at, &known) || here.stays(&groups).is_err()),
            )
            .await;
            here.shared.positions()
        }
    };
    here.stays(&groups).map_err(refused)?;
    let fresh = here.group.freshness();
    let fresh = pb::RelayFreshness {
        node_id: node.get(),
        heard_ago_us: fresh
            .heard
            .map(|ago| u64::try_from(ago.as_micros()).unwrap_or(u64::MAX)),
        unapplied_entries: fresh.unapplied,
    };
    answer(pb::relay_watched::Result::Positions(positions_to_pb(&at)), Some(fresh))
}

async fn barrier(broker: Arc<Broker>, payload: Bytes) -> Answer {
    let call = pb::RelayBarrier::decode(payload).map_err(malformed)?;
    let id = GroupId::new(call.group_id);
    let elsewhere = || {
        let result = pb::relay_barred::Result::Elsewhere(broker.router().elsewhere(id));
        encoded(&pb::RelayBarred { result: Some(result) })
    };
    let Some(group) = broker.groups().get(id) else {
        return elsewhere();
    };
    match group.read_index().await {
        Ok(applied) => {
            let shared = broker.groups().directory().get(ShardId::new(call.shard_id));
            // Of one that is sealed, only the group that adopts it can tell.
            let shared = shared.filter(|shared| shared.heir().is_none() && shared.group() == id);
            let result = pb::relay_barred::Result::Read(pb::RelayReadIndex {
                applied: applied.get(),
                positions: shared.map(|shared| positions_to_pb(&shared.positions())),
            });
            encoded(&pb::RelayBarred { result: Some(result) })
        }
        Err(BarrierError::NotLeader { .. }) => elsewhere(),
        Err(e @ (BarrierError::NoQuorum { .. } | BarrierError::Stopped { .. })) => Err(refused(e.to_string())),
    }
}

/// Waits until the replica here has applied as much as the caller has seen.
async fn caught_up(here: &Here, applied: u64, tail: Sequence) -> Result<(), CallFailure> {
    let behind = || refused(format!("the replica of {} here is behind", here.group.id));
    if applied > 0 && !here.group.wait_applied(LogIndex::new(applied), CATCH_UP).await {
        return Err(behind());
    }
    let mut watch = here.shared.watch();
    let reached = watch.wait_for(|at| at.tail >= tail || at.removed);
    match tokio::time::timeout(CATCH_UP, reached).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(behind()),
    }
}

async fn fetch(broker: Arc<Broker>, payload: Bytes, place: OwnedSemaphorePermit) -> Answer {
    let call = pb::RelayFetch::decode(payload).map_err(malformed)?;
    let Some(here) = here(&broker, call.group_id, call.shard_id)? else {
        let elsewhere = broker.router().elsewhere(GroupId::new(call.group_id));
        let result = pb::relay_fetched::Result::Elsewhere(elsewhere);
        return encoded(&pb::RelayFetched { result: Some(result) });
    };
    caught_up(&here, call.applied, Sequence::new(call.tail)).await?;
    let groups = broker.groups().clone();
    drop(broker);
    let from = Sequence::new(call.from);
    let bytes_max = usize::try_from(call.bytes_max).map_or(FILL_BYTES, |n| n.clamp(1, FILL_BYTES));
    let read = tokio::task::spawn_blocking(move || {
        let (shard, state) = (here.shared.shard, groups.state());
        let batches = match here.shared.recent_from(from, bytes_max) {
            Some(recent) => recent,
            None => state.read_batches(shard, from, bytes_max).map_err(storage)?,
        };
        let batches = batches.into_iter().map(|batch| {
            Ok(pb::RelayBatch {
                base: batch.base.get(),
                append_time_us: batch.append_time.get(),
                term: batch.term.get(),
                record_count: batch.record_count,
                holes: state.holes(shard, batch.base).map_err(damaged)?,
                rejected: batch.rejected,
                crc: crc32fast::hash(&batch.batch),
                batch: batch.batch,
            })
        });
        let batches = batches.collect::<Result<Vec<_>, ReadError>>()?;
        here.stays(&groups).map_err(ReadError::Unreachable)?;
        let result = pb::relay_fetched::Result::Batches(pb::RelayBatches { batches });
        Ok(pb::RelayFetched { result: Some(result) }.encode_to_vec())
    });
    let bytes = read
        .await
        .map_err(|e| refused(e.to_string()))?
        .map_err(|e| unread(&e))?;
    Ok(Bytes::from_owner(Held { bytes, _place: place }))
}

async fn look_up(broker: Arc<Broker>, payload: Bytes) -> Answer {
    let call = pb::RelayLookup::decode(payload).map_err(malformed)?;
    let answer = |result| encoded(&pb::RelayLookedUp { result: Some(result) });
    let Some(here) = here(&broker, call.group_id, call.shard_id)? else {
        let elsewhere = broker.router().elsewhere(GroupId::new(call.group_id));
        return answer(pb::relay_looked_up::Result::Elsewhere(elsewhere));
    };
    caught_up(&here, call.applied, Sequence::FIRST).await?;
    let shared = &here.shared;
    let number = match call.what.ok_or_else(|| malformed("it asks for nothing"))? {
        pb::relay_lookup::What::FirstAtUs(time) => broker
            .first_at_here(shared, TimeUs::new(time))
            .await
            .map(|found| found.map(Sequence::get)),
        pb::relay_lookup::What::LastBySubject(subject) => broker
            .last_by_subject_here(shared, &subject)
            .await
            .map(|found| found.map(Sequence::get)),
        pb::relay_lookup::What::Producer(producer) => {
            broker.producer_here(shared, producer.producer_id, producer.epoch)
        }
    };
    let number = number.map_err(|e| unread(&e))?;
    answer(pb::relay_looked_up::Result::Found(pb::RelayFound { number }))
}
