//! A shard without a replica on this node, as readers here see it: its positions are followed by a long poll for as
//! long as anybody reads, its batches are fetched from a node that has them.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::ReadError;
use super::relay_codec::{positions_from_pb, positions_to_pb};
use super::route::{Ask, READ_PATIENCE, READ_PAUSE, Router, Told};
use crate::model::{GroupId, NodeId, Sequence, ShardId, StoredBatch, Term, TimeUs};
use crate::raft::transport::PeerMethod;
use crate::raft::{Freshness, Positions};
use crate::wire::internal as pb;

/// A poll for positions is answered after this at the latest …
pub(super) const POLL: Duration = Duration::from_secs(10);
/// … or given up, if the other node is silent.
const POLL_PATIENCE: Duration = Duration::from_secs(15);
/// How long a local read looks for a replica that answers.
const LOOK: Duration = Duration::from_secs(3);
/// After a poll that failed.
const POLL_PAUSE: Duration = Duration::from_millis(250);

/// A batch and the offsets of its records deleted since.
pub(super) type Fetched = (StoredBatch, Vec<u32>);

/// A shard that is replicated elsewhere.
pub struct RemoteShard {
    pub shard: ShardId,
    /// The group that has the shard where the catalog does not tell.
    first_group: GroupId,
    router: Arc<Router>,
    positions: watch::Sender<Positions>,
    /// Log index that a replica of this group must have applied to answer what was asked after the last barrier.
    applied: Mutex<(GroupId, u64)>,
    /// What the replica that was heard last said of itself, and when.
    fresh: Mutex<Option<(pb::RelayFreshness, Instant)>>,
}

/// Whether `at` has something that who knows `known` does not. A replica that is behind has nothing new.
pub(super) fn news(at: &Positions, known: &Positions) -> bool {
    at.tail > known.tail || at.floor > known.floor || (at.removed && !known.removed)
}

impl RemoteShard {
    pub(super) fn new(shard: ShardId, group: GroupId, router: Arc<Router>) -> Arc<Self> {
        Arc::new(Self {
            shard,
            first_group: group,
            router,
            positions: watch::Sender::new(Positions::initial()),
            applied: Mutex::new((group, 0)),
            fresh: Mutex::new(None),
        })
    }

    /// The group that has the shard now.
    fn group(&self) -> GroupId {
        self.router.view.owner_of(self.shard).unwrap_or(self.first_group)
    }

    /// What a replica of the group must have applied. Of another group's log nothing is known yet.
    fn applied(&self, group: GroupId) -> u64 {
        let (of, index) = *self.applied.lock();
        if of == group { index } else { 0 }
    }

    /// As far as was heard.
    pub fn positions(&self) -> Positions {
        *self.positions.borrow()
    }

    /// Wakes when more was heard.
    pub fn watch(&self) -> watch::Receiver<Positions> {
        self.positions.subscribe()
    }

    /// Takes an answer to `RelayWatch`.
    fn watched(&self, at: &pb::RelayPositions, fresh: Option<pb::RelayFreshness>) {
        if let Some(fresh) = fresh {
            *self.fresh.lock() = Some((fresh, Instant::now()));
        }
        self.heard(&positions_from_pb(at));
    }

    /// How recent the replica is that was heard last: its node, and what it said of itself.
    pub fn freshness(&self) -> Option<(NodeId, Freshness)> {
        let told = *self.fresh.lock();
        let (fresh, at) = told?;
        let freshness = Freshness {
            heard: fresh.heard_ago_us.map(|us| Duration::from_micros(us) + at.elapsed()),
            unapplied: fresh.unapplied_entries,
        };
        Some((NodeId::new(fresh.node_id), freshness))
    }

    /// Asks any replica how far it is.
    pub(super) async fn look(&self) -> Result<(), ReadError> {
        let (group, router) = (self.group(), &self.router);
        let call = pb::RelayWatch {
            group_id: group.get(),
            shard_id: self.shard.get(),
            known: None,
        };
        let asked = router.ask(
            group,
            Ask::AnyReplica,
            PeerMethod::Positions,
            call.encode_to_vec().into(),
            LOOK,
            parse_watched,
        );
        let (at, fresh) = asked.await?;
        self.watched(&at, fresh);
        Ok(())
    }

    /// Takes what a replica said. Replicas differ in how far they are: positions only ever grow.
    fn heard(&self, at: &Positions) {
        self.positions.send_if_modified(|known| {
            let changed = news(at, known);
            if at.tail >= known.tail {
                let floor = known.floor.max(at.floor);
                *known = Positions { floor, ..*at };
            } else {
                known.floor = known.floor.max(at.floor);
                known.removed |= at.removed;
            }
            changed
        });
    }

    /// Everything acknowledged before the call is seen by what is asked after it.
    pub(super) async fn barrier(&self) -> Result<(), ReadError> {
        let begun = Instant::now();
        loop {
            let group = self.group();
            match self.barrier_in(group).await {
                Ok(()) => return Ok(()),
                // It goes to another group in this moment; the catalog will tell.
                Err(ReadError::Unreachable(_)) if begun.elapsed() < READ_PATIENCE => {
                    tokio::time::sleep(READ_PAUSE).await;
                }
                Err(e) => return Err(e),
            }
        }
    }

    async fn barrier_in(&self, group: GroupId) -> Result<(), ReadError> {
        let read = self.router.read_index(group, self.shard).await?;
        {
            let mut applied = self.applied.lock();
            let before = if applied.0 == group { applied.1 } else { 0 };
            *applied = (group, before.max(read.applied));
        }
        match &read.positions {
            Some(at) => self.heard(&positions_from_pb(at)),
            None => {
                return Err(ReadError::Unreachable(format!("{} is not in {group} now", self.shard)));
            }
        }
        Ok(())
    }

    /// Batches from the one that holds `from` on. None: nothing is stored from there up to the tail that is known.
    pub(super) async fn fetch(&self, from: Sequence, bytes_max: usize) -> Result<Vec<Fetched>, ReadError> {
        let group = self.group();
        let call = pb::RelayFetch {
            group_id: group.get(),
            shard_id: self.shard.get(),
            from: from.get(),
            bytes_max: bytes_max as u64,
            applied: self.applied(group),
            tail: self.positions().tail.get(),
        };
        let parse = |answer: Bytes| match pb::RelayFetched::decode(answer).ok().and_then(|a| a.result) {
            Some(pb::relay_fetched::Result::Batches(batches)) => Told::Answer(batches.batches),
            Some(pb::relay_fetched::Result::Elsewhere(elsewhere)) => Told::Elsewhere(elsewhere),
            None => Told::Nonsense,
        };
        let payload = call.encode_to_vec().into();
        let batches = self
            .router
            .ask(group, Ask::AnyReplica, PeerMethod::Fetch, payload, READ_PATIENCE, parse)
            .await?;
        batches.into_iter().map(batch_from_pb).collect()
    }

    /// Looks something up; nothing if there is none.
    pub(super) async fn look_up(&self, what: pb::relay_lookup::What) -> Result<Option<u64>, ReadError> {
        let group = self.group();
        let call = pb::RelayLookup {
            group_id: group.get(),
            shard_id: self.shard.get(),
            applied: self.applied(group),
            what: Some(what),
        };
        let parse = |answer: Bytes| match pb::RelayLookedUp::decode(answer).ok().and_then(|a| a.result) {
            Some(pb::relay_looked_up::Result::Found(found)) => Told::Answer(found.number),
            Some(pb::relay_looked_up::Result::Elsewhere(elsewhere)) => Told::Elsewhere(elsewhere),
            None => Told::Nonsense,
        };
        let payload = call.encode_to_vec().into();
        self.router
            .ask(
                group,
                Ask::AnyReplica,
                PeerMethod::Lookup,
                payload,
                READ_PATIENCE,
                parse,
            )
            .await
    }
}

impl Router {
    /// Asks the leader's node for its read index.
    pub async fn read_index(&self, group: GroupId, shard: ShardId) -> Result<pb::RelayReadIndex, ReadError> {
        let call = pb::RelayBarrier {
            group_id: group.get(),
            shard_id: shard.get(),
        };
        let parse = |answer: Bytes| match pb::RelayBarred::decode(answer).ok().and_then(|a| a.result) {
            Some(pb::relay_barred::Result::Read(read)) => Told::Answer(read),
            Some(pb::relay_barred::Result::Elsewhere(elsewhere)) => Told::Elsewhere(elsewhere),
            None => Told::Nonsense,
        };
        let payload = call.encode_to_vec().into();
        self.ask(group, Ask::Leader, PeerMethod::Barrier, payload, READ_PATIENCE, parse)
            .await
    }
}

fn parse_watched(answer: Bytes) -> Told<(pb::RelayPositions, Option<pb::RelayFreshness>)> {
    let Ok(answer) = pb::RelayWatched::decode(answer) else {
        return Told::Nonsense;
    };
    match answer.result {
        Some(pb::relay_watched::Result::Positions(at)) => Told::Answer((at, answer.freshness)),
        Some(pb::relay_watched::Result::Elsewhere(elsewhere)) => Told::Elsewhere(elsewhere),
        None => Told::Nonsense,
    }
}

/// A batch as it came, checked.
fn batch_from_pb(batch: pb::RelayBatch) -> Result<Fetched, ReadError> {
    if crc32fast::hash(&batch.batch) != batch.crc || batch.rejected.len() > batch.record_count as usize {
        let base = batch.base;
        return Err(ReadError::Unreachable(format!(
            "the batch at {base} came damaged from another node"
        )));
    }
    let stored = StoredBatch {
        base: Sequence::new(batch.base),
        append_time: TimeUs::new(batch.append_time_us),
        term: Term::new(batch.term),
        record_count: batch.record_count,
        rejected: batch.rejected,
        batch: batch.batch,
    };
    Ok((stored, batch.holes))
}

/// Follows a shard's positions until nobody reads it any more.
pub(super) async fn follow(remote: Weak<RemoteShard>, router: Arc<Router>, token: CancellationToken) {
    loop {
        let Some((group, call)) = remote.upgrade().map(|remote| {
            let group = remote.group();
            let call = pb::RelayWatch {
                group_id: group.get(),
                shard_id: remote.shard.get(),
                known: Some(positions_to_pb(&remote.positions())),
            };
            (group, call)
        }) else {
            return;
        };
        let payload = call.encode_to_vec().into();
        let asked = router.ask(
            group,
            Ask::AnyReplica,
            PeerMethod::Positions,
            payload,
            POLL_PATIENCE,
            parse_watched,
        );
        let Some(answer) = token.run_until_cancelled(asked).await else {
            return;
        };
        match answer {
            Ok((at, fresh)) => {
                if let Some(remote) = remote.upgrade() {
                    remote.watched(&at, fresh);
                }
            }
            Err(e) => {
                tracing::debug!(%group, error = %e, "nobody tells the positions of a shard");
                if token
                    .run_until_cancelled(tokio::time::sleep(POLL_PAUSE))
                    .await
                    .is_none()
                {
                    return;
                }
            }
        }
    }
}
