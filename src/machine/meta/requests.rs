//! The answers to recent request ids.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use prost::Message;

use super::{MetaOutcome, MetaRefusal};
use crate::machine::LoadError;
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::limits::{REQUEST_MEMORY_US, REQUESTS_BYTES_MAX, REQUESTS_MAX};
use crate::wire::internal::v1 as pb;

/// Expired answers dropped with one entry at most.
const DROPPED_MAX: usize = 1_000;

#[derive(Debug, Default)]
pub(super) struct Requests {
    by_id: BTreeMap<String, Request>,
    by_time: BTreeSet<(u64, String)>,
    bytes: usize,
}

#[derive(Debug)]
struct Request {
    record: pb::RequestRecord,
    bytes: usize,
}

impl Requests {
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let record = pb::RequestRecord::decode(bytes).map_err(|error| LoadError::new("a request", error))?;
        if decode_outcome(&record).is_none() {
            return Err(LoadError::new("a request", "its outcome is of an unknown kind"));
        }
        self.insert(record, bytes.len());
        Ok(())
    }

    fn insert(&mut self, record: pb::RequestRecord, bytes: usize) {
        self.bytes += bytes;
        self.by_time.insert((record.time_us, record.request_id.clone()));
        let old = self.by_id.insert(record.request_id.clone(), Request { record, bytes });
        if let Some(old) = old {
            self.bytes -= old.bytes;
            self.by_time.remove(&(old.record.time_us, old.record.request_id));
        }
    }

    /// The answer that was given to this id, if it is remembered.
    pub fn get(&self, id: &str, time_us: u64) -> Option<(u64, MetaOutcome)> {
        let request = self.by_id.get(id)?;
        if is_over(request.record.time_us, time_us) {
            return None;
        }
        Some((request.record.digest, decode_outcome(&request.record)?))
    }

    /// Drops what need not be remembered any more.
    pub fn forget(&mut self, sink: &mut dyn ShardSink, time_us: u64) {
        for _ in 0..DROPPED_MAX {
            match self.by_time.first() {
                Some((at, _)) if is_over(*at, time_us) => {}
                Some(_) | None => break,
            }
            let Some((_, id)) = self.by_time.pop_first() else { break };
            if let Some(request) = self.by_id.remove(&id) {
                self.bytes -= request.bytes;
            }
            sink.drop_meta(MetaKind::Request, id.as_bytes());
        }
    }

    pub fn is_full(&self) -> bool {
        self.by_id.len() >= REQUESTS_MAX || self.bytes >= REQUESTS_BYTES_MAX
    }

    pub fn remember(&mut self, sink: &mut dyn ShardSink, id: &str, time_us: u64, digest: u64, outcome: &MetaOutcome) {
        let Some(mut record) = encode_outcome(outcome) else {
            return;
        };
        record.request_id = id.to_string();
        record.time_us = time_us;
        record.digest = digest;
        let bytes = record.encode_to_vec();
        sink.put_meta(MetaKind::Request, id.as_bytes(), &bytes);
        self.insert(record, bytes.len());
    }
}

/// The answer that a request's stored record holds for this command, if it is still remembered at this time. For a
/// proposer that would refuse a request: what it checks (a revision, a name) may have been changed by the very request
/// that is repeated.
pub fn remembered(record: &[u8], op: &pb::meta_command::Op, time_us: u64) -> Result<Option<MetaOutcome>, LoadError> {
    let mut requests = Requests::default();
    requests.load(record)?;
    let Some(id) = requests.by_id.keys().next().cloned() else {
        return Ok(None);
    };
    Ok(check(&requests, &id, time_us, digest(op)))
}

fn is_over(at_us: u64, now_us: u64) -> bool {
    at_us.saturating_add(REQUEST_MEMORY_US) <= now_us
}

/// Only what was done is remembered: what was refused may be tried again. Joins and ends of moves are not: incarnations
/// and move ids tell a repetition. Disk format.
fn encode_outcome(outcome: &MetaOutcome) -> Option<pb::RequestRecord> {
    let mut record = pb::RequestRecord::default();
    let (code, stream) = match outcome {
        MetaOutcome::StreamCreated(stream) => (1, stream),
        MetaOutcome::StreamExisted(stream) => (2, stream),
        MetaOutcome::StreamActivated(stream) => (3, stream),
        MetaOutcome::StreamUpdated(stream) => (4, stream),
        MetaOutcome::StreamRemoved(stream) => (5, stream),
        MetaOutcome::StreamUndeleted(stream) => (6, stream),
        MetaOutcome::StreamDoomed(stream) => (7, stream),
        MetaOutcome::StreamForgotten(stream) => (8, stream),
        MetaOutcome::ShardMoving(stream) => (12, stream),
        MetaOutcome::NodeChanged(node) => {
            record.outcome = 9;
            record.node = Some(pb::NodeRecord::clone(node));
            return Some(record);
        }
        MetaOutcome::ClusterChanged(cluster) => {
            record.outcome = 10;
            record.cluster = Some(pb::ClusterRecord::clone(cluster));
            return Some(record);
        }
        MetaOutcome::GroupChanged(group) => {
            record.outcome = 11;
            record.group = Some(pb::GroupRecord::clone(group));
            return Some(record);
        }
        MetaOutcome::ShardMoved { .. }
        | MetaOutcome::ClusterInitialised { .. }
        | MetaOutcome::NodeRegistered { .. }
        | MetaOutcome::Refused(_) => return None,
    };
    record.outcome = code;
    record.stream = Some(pb::StreamRecord::clone(stream));
    Some(record)
}

fn decode_outcome(record: &pb::RequestRecord) -> Option<MetaOutcome> {
    let stream = || Some(Arc::new(record.stream.clone()?));
    Some(match record.outcome {
        1 => MetaOutcome::StreamCreated(stream()?),
        2 => MetaOutcome::StreamExisted(stream()?),
        3 => MetaOutcome::StreamActivated(stream()?),
        4 => MetaOutcome::StreamUpdated(stream()?),
        5 => MetaOutcome::StreamRemoved(stream()?),
        6 => MetaOutcome::StreamUndeleted(stream()?),
        7 => MetaOutcome::StreamDoomed(stream()?),
        8 => MetaOutcome::StreamForgotten(stream()?),
        9 => MetaOutcome::NodeChanged(Arc::new(record.node.clone()?)),
        10 => MetaOutcome::ClusterChanged(Arc::new(record.cluster.clone()?)),
        11 => MetaOutcome::GroupChanged(Arc::new(record.group.clone()?)),
        12 => MetaOutcome::ShardMoving(stream()?),
        _ => return None,
    })
}

/// What tells whether a repeated id is the same request: its kind and its name, and for a new stream all of its spec.
/// What the proposer chooses anew for each attempt is not part of it.
pub(super) fn digest(op: &pb::meta_command::Op) -> u64 {
    use pb::meta_command::Op;
    let node = |id: u64| format!("n{id}");
    let (kind, namespace, name, spec) = match op {
        // What is unreachable now is no part of what is asked.
        Op::JoinNode(join) => return digest_of(11, &node(join.node_id)),
        Op::DrainNode(drain) => return digest_of(12, &node(drain.node_id)),
        Op::UndrainNode(undrain) => return digest_of(13, &node(undrain.node_id)),
        Op::RemoveNode(remove) => return digest_of(14, &node(remove.node_id)),
        Op::SetClusterVersion(_)
        | Op::UpdateSettings(_)
        | Op::SetMetaVoters(_)
        | Op::RenewMetaReplica(_)
        | Op::GroupFormed(_)
        | Op::PlanReplicaChange(_)
        | Op::ReplicaCaughtUp(_)
        | Op::ChangeCommitted(_)
        | Op::AbortChange(_)
        | Op::ReplicaGone(_)
        | Op::PlanShardMove(_)
        | Op::ShardSealed(_)
        | Op::ShardAdopted(_)
        | Op::ShardMoveDone(_)
        | Op::AbortShardMove(_)
        | Op::GiveUpShardMove(_) => {
            let mut bytes = Vec::new();
            op.encode(&mut bytes);
            return xxhash_rust::xxh3::xxh3_64(&bytes);
        }
        Op::InitCluster(init) => (3, "", init.cluster_id.as_str(), None),
        Op::RegisterNode(node) => (4, "", node.name.as_str(), None),
        Op::CreateStream(create) => (5, "", "", create.spec.as_ref()),
        Op::ActivateStream(activate) => (6, "", activate.stream_id.as_str(), None),
        Op::UpdateStream(update) => (7, update.namespace.as_str(), update.name.as_str(), None),
        Op::RemoveStream(remove) => (8, remove.namespace.as_str(), remove.name.as_str(), None),
        Op::UndeleteStream(undelete) => (9, undelete.namespace.as_str(), undelete.name.as_str(), None),
        Op::ForgetStream(forget) => (10, "", forget.stream_id.as_str(), None),
    };
    let mut bytes = vec![kind];
    bytes.extend_from_slice(namespace.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(name.as_bytes());
    if let Some(spec) = spec {
        bytes.extend_from_slice(&spec.encode_to_vec());
    }
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

fn digest_of(kind: u8, name: &str) -> u64 {
    let mut bytes = vec![kind, 0];
    bytes.extend_from_slice(name.as_bytes());
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

/// Whether an id is already answered, reused, or may be given to this request.
pub(super) fn check(requests: &Requests, id: &str, time_us: u64, digest: u64) -> Option<MetaOutcome> {
    match requests.get(id, time_us) {
        Some((known, outcome)) if known == digest => Some(outcome),
        Some(_) => Some(MetaOutcome::Refused(MetaRefusal::RequestIdReused {
            request_id: id.to_string(),
        })),
        None if requests.is_full() => Some(MetaOutcome::Refused(MetaRefusal::RequestsFull)),
        None => None,
    }
}
