//! openraft's messages ⇄ `peer.proto`. Payloads of entries are shared on the way out and sliced on the way in, never
//! encoded again.

use std::io;

use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult, VoteRequest, VoteResponse};

use crate::raft::codec::{entry_from_pb, entry_to_pb, log_id_from_pb, log_id_to_pb, vote_from_pb, vote_to_pb};
use crate::raft::types::{Mainstem, Vote};
use crate::wire::internal as pb;

/// What an entry takes beside its payload.
const ENTRY_OVERHEAD: usize = 48;

fn missing(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a request without {what}"))
}

fn vote(vote: Option<&pb::Vote>) -> io::Result<Vote> {
    vote.map(vote_from_pb).ok_or_else(|| missing("a vote"))
}

pub fn append_to_pb(
    stream: u64,
    open: Option<pb::AppendOpen>,
    request: &AppendEntriesRequest<Mainstem>,
) -> (pb::Append, usize) {
    let entries: Vec<_> = request.entries.iter().map(entry_to_pb).collect();
    let bytes = entries
        .iter()
        .map(|e| {
            ENTRY_OVERHEAD
                + match &e.payload {
                    Some(pb::log_entry::Payload::Command(raw)) => raw.len(),
                    Some(pb::log_entry::Payload::Membership(m)) => 16 * (m.replicas.len() + 1) * (m.configs.len() + 1),
                    Some(pb::log_entry::Payload::Blank(_)) | None => 0,
                }
        })
        .sum::<usize>();
    let append = pb::Append {
        stream,
        open,
        vote: Some(vote_to_pb(&request.vote)),
        prev: request.prev_log_id.as_ref().map(log_id_to_pb),
        commit: request.leader_commit.as_ref().map(log_id_to_pb),
        entries,
    };
    (append, bytes + 128)
}

pub fn append_from_pb(append: pb::Append) -> io::Result<AppendEntriesRequest<Mainstem>> {
    Ok(AppendEntriesRequest {
        vote: vote(append.vote.as_ref())?,
        prev_log_id: append.prev.as_ref().map(log_id_from_pb),
        entries: append
            .entries
            .into_iter()
            .map(entry_from_pb)
            .collect::<io::Result<_>>()?,
        leader_commit: append.commit.as_ref().map(log_id_from_pb),
    })
}

pub fn appended_to_pb(result: &StreamAppendResult<Mainstem>) -> pb::appended::Result {
    match result {
        Ok(last) => pb::appended::Result::Matched(pb::Matched {
            last: last.as_ref().map(log_id_to_pb),
        }),
        Err(StreamAppendError::Conflict(at)) => pb::appended::Result::Conflict(log_id_to_pb(at)),
        Err(StreamAppendError::HigherVote(vote)) => pb::appended::Result::HigherVote(vote_to_pb(vote)),
    }
}

/// `Err`: the text of the other side's error.
pub fn appended_from_pb(result: Option<pb::appended::Result>) -> Result<StreamAppendResult<Mainstem>, String> {
    match result {
        Some(pb::appended::Result::Matched(m)) => Ok(Ok(m.last.as_ref().map(log_id_from_pb))),
        Some(pb::appended::Result::Conflict(at)) => Ok(Err(StreamAppendError::Conflict(log_id_from_pb(&at)))),
        Some(pb::appended::Result::HigherVote(vote)) => Ok(Err(StreamAppendError::HigherVote(vote_from_pb(&vote)))),
        Some(pb::appended::Result::Error(text)) => Err(text),
        None => Err("an answer of a kind this version does not know".into()),
    }
}

pub fn vote_request_from_pb(call: &pb::VoteCall) -> io::Result<VoteRequest<Mainstem>> {
    Ok(VoteRequest {
        vote: vote(call.vote.as_ref())?,
        last_log_id: call.last.as_ref().map(log_id_from_pb),
        leadership_transfer: call.leadership_transfer,
    })
}

pub fn vote_answer_to_pb(answer: &VoteResponse<Mainstem>) -> pb::VoteAnswer {
    pb::VoteAnswer {
        vote: Some(vote_to_pb(&answer.vote)),
        granted: answer.vote_granted,
        last: answer.last_log_id.as_ref().map(log_id_to_pb),
    }
}

pub fn vote_answer_from_pb(answer: &pb::VoteAnswer) -> io::Result<VoteResponse<Mainstem>> {
    Ok(VoteResponse::new(
        vote(answer.vote.as_ref())?,
        answer.last.as_ref().map(log_id_from_pb),
        answer.granted,
    ))
}

pub fn heartbeat_from_pb(call: &pb::Heartbeat) -> io::Result<AppendEntriesRequest<Mainstem>> {
    Ok(AppendEntriesRequest {
        vote: vote(call.vote.as_ref())?,
        prev_log_id: call.prev.as_ref().map(log_id_from_pb),
        entries: Vec::new(),
        leader_commit: call.commit.as_ref().map(log_id_from_pb),
    })
}
