//! openraft's values ⇄ the records of `internal.proto`. Storage adds version and CRC.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::impls::EmptyNode;
use prost::Message;

use super::types::{Entry, LeaderId, LogId, Membership, Proposal, StoredMembership, Vote};
use crate::wire::internal as pb;

fn bad(what: &str, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {why}"))
}

pub fn log_id_to_pb(id: &LogId) -> pb::LogId {
    pb::LogId {
        term: id.leader_id.term,
        leader: id.leader_id.node_id,
        index: id.index,
    }
}

pub fn log_id_from_pb(id: &pb::LogId) -> LogId {
    LogId::new(
        LeaderId {
            term: id.term,
            node_id: id.leader,
        },
        id.index,
    )
}

pub fn encode_log_id(id: &LogId) -> Bytes {
    log_id_to_pb(id).encode_to_vec().into()
}

pub fn decode_log_id(raw: &[u8]) -> io::Result<LogId> {
    let id = pb::LogId::decode(raw).map_err(|e| bad("log id", e))?;
    Ok(log_id_from_pb(&id))
}

pub fn vote_to_pb(vote: &Vote) -> pb::Vote {
    pb::Vote {
        term: vote.leader_id.term,
        leader: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub fn vote_from_pb(vote: &pb::Vote) -> Vote {
    if vote.committed {
        Vote::new_committed(vote.term, vote.leader)
    } else {
        Vote::new(vote.term, vote.leader)
    }
}

pub fn encode_vote(vote: &Vote) -> Bytes {
    vote_to_pb(vote).encode_to_vec().into()
}

pub fn decode_vote(raw: &[u8]) -> io::Result<Vote> {
    let vote = pb::Vote::decode(raw).map_err(|e| bad("vote", e))?;
    Ok(vote_from_pb(&vote))
}

fn membership_to_pb(m: &Membership) -> pb::Membership {
    pb::Membership {
        configs: m
            .get_joint_config()
            .iter()
            .map(|set| pb::VoterSet {
                replicas: set.iter().copied().collect(),
            })
            .collect(),
        replicas: m.nodes().map(|(id, _)| *id).collect(),
    }
}

fn membership_from_pb(m: &pb::Membership) -> io::Result<Membership> {
    let configs: Vec<BTreeSet<u64>> = m
        .configs
        .iter()
        .map(|set| set.replicas.iter().copied().collect())
        .collect();
    let nodes: BTreeMap<u64, EmptyNode> = m.replicas.iter().map(|id| (*id, EmptyNode::new())).collect();
    // The initial membership of a group that was never initialised has no voters, which `new` refuses.
    if configs.iter().all(BTreeSet::is_empty) && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|e| bad("membership", e))
}

/// The payload's bytes are shared, not copied.
pub fn entry_to_pb(entry: &Entry) -> pb::LogEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => pb::log_entry::Payload::Blank(pb::Blank {}),
        EntryPayload::Normal(proposal) => pb::log_entry::Payload::Command(proposal.0.clone()),
        EntryPayload::Membership(m) => pb::log_entry::Payload::Membership(membership_to_pb(m)),
    };
    pb::LogEntry {
        id: Some(log_id_to_pb(&entry.log_id)),
        payload: Some(payload),
    }
}

pub fn encode_entry(entry: &Entry) -> Bytes {
    entry_to_pb(entry).encode_to_vec().into()
}

pub fn decode_entry(raw: Bytes) -> io::Result<Entry> {
    entry_from_pb(pb::LogEntry::decode(raw).map_err(|e| bad("log entry", e))?)
}

pub fn entry_from_pb(entry: pb::LogEntry) -> io::Result<Entry> {
    let id = entry.id.as_ref().ok_or_else(|| bad("log entry", "it has no id"))?;
    let payload = match entry.payload {
        Some(pb::log_entry::Payload::Blank(_)) => EntryPayload::Blank,
        Some(pb::log_entry::Payload::Command(raw)) => EntryPayload::Normal(Proposal(raw)),
        Some(pb::log_entry::Payload::Membership(m)) => EntryPayload::Membership(membership_from_pb(&m)?),
        None => return Err(bad("log entry", "its payload is of a kind this version does not know")),
    };
    Ok(Entry {
        log_id: log_id_from_pb(id),
        payload,
    })
}

pub fn stored_membership_to_pb(stored: &StoredMembership) -> pb::StoredMembership {
    pb::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_pb),
        membership: Some(membership_to_pb(stored.membership())),
    }
}

pub fn stored_membership_from_pb(stored: pb::StoredMembership) -> io::Result<StoredMembership> {
    let membership = membership_from_pb(&stored.membership.unwrap_or_default())?;
    Ok(StoredMembership::new(
        stored.log_id.as_ref().map(log_id_from_pb),
        membership,
    ))
}

/// What is written with every apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    /// Last applied entry.
    pub applied: Option<LogId>,
    /// The membership in force there.
    pub membership: StoredMembership,
    /// The snapshot that the state was last installed from, if it ever was.
    pub installed: Option<LogId>,
}

pub fn encode_marker(applied: Option<&LogId>, membership: &StoredMembership, installed: Option<&LogId>) -> Bytes {
    pb::AppliedMarker {
        last_applied: applied.map(log_id_to_pb),
        membership: Some(stored_membership_to_pb(membership)),
        installed: installed.map(log_id_to_pb),
    }
    .encode_to_vec()
    .into()
}

impl Marker {
    pub fn decode(raw: &[u8]) -> io::Result<Self> {
        let marker = pb::AppliedMarker::decode(raw).map_err(|e| bad("applied marker", e))?;
        Ok(Self {
            applied: marker.last_applied.as_ref().map(log_id_from_pb),
            membership: stored_membership_from_pb(marker.membership.unwrap_or_default())?,
            installed: marker.installed.as_ref().map(log_id_from_pb),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn id(term: u64, node: u64, index: u64) -> LogId {
        LogId::new(LeaderId { term, node_id: node }, index)
    }

    #[test]
    fn every_payload_survives_the_round_trip() {
        let joint = Membership::new(
            vec![BTreeSet::from([1, 2]), BTreeSet::from([2, 3])],
            BTreeMap::from([1, 2, 3, 4].map(|n| (n, EmptyNode::new()))),
        )
        .unwrap();
        for payload in [
            EntryPayload::Blank,
            EntryPayload::Normal(Proposal(Bytes::from_static(b"command"))),
            EntryPayload::Membership(joint.clone()),
        ] {
            let entry = Entry {
                log_id: id(3, 7, 42),
                payload,
            };
            assert_eq!(decode_entry(encode_entry(&entry)).unwrap(), entry);
        }
        let stored = StoredMembership::new(Some(id(1, 1, 1)), joint);
        let marker = Marker {
            applied: Some(id(3, 7, 42)),
            membership: stored,
            installed: Some(id(2, 7, 40)),
        };
        let raw = encode_marker(marker.applied.as_ref(), &marker.membership, marker.installed.as_ref());
        assert_eq!(Marker::decode(&raw).unwrap(), marker);
        for vote in [Vote::new(4, 2), Vote::new_committed(5, 2)] {
            assert_eq!(decode_vote(&encode_vote(&vote)).unwrap(), vote);
        }
    }

    #[test]
    fn an_unknown_payload_is_refused() {
        // Field 9 does not exist: an entry of a newer version.
        let mut raw = pb::LogEntry {
            id: Some(log_id_to_pb(&id(1, 1, 1))),
            payload: None,
        }
        .encode_to_vec();
        raw.extend_from_slice(&[0x4a, 0x01, 0x00]);
        let err = decode_entry(raw.into()).unwrap_err();
        assert!(err.to_string().contains("does not know"), "{err}");
    }
}
