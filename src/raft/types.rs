//! What openraft is told about our types.

use std::fmt;

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::impls::EmptyNode;

use crate::machine::GroupOutcome;

/// A `GroupCommand`, encoded. It stays encoded from the proposer to apply, so that a batch is never copied on the way.
#[derive(Clone, PartialEq, Eq)]
pub struct Proposal(pub Bytes);

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proposal({} bytes)", self.0.len())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// What an apply answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Applied {
    /// Blank and membership entries, and entries that were applied before.
    Done,
    /// Of a command.
    Command(GroupOutcome),
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Applied::Done => write!(f, "done"),
            Applied::Command(_) => write!(f, "command"),
        }
    }
}

openraft::declare_raft_types!(
    /// Replica ids are raft node ids; addresses are not in the membership.
    pub Mainstem:
        D = Proposal,
        R = Applied,
        NodeId = u64,
        Node = EmptyNode,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime,
);

/// Of openraft's clock.
pub type RaftInstant = openraft::alias::InstantOf<Mainstem>;
pub type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub type LogId = openraft::LogId<LeaderId>;
pub type Vote = openraft::impls::Vote<LeaderId>;
pub type Entry = openraft::Entry<LeaderId, EntryPayload<Proposal, u64, EmptyNode>>;
pub type Membership = openraft::Membership<u64, EmptyNode>;
pub type StoredMembership = openraft::StoredMembership<LeaderId, u64, EmptyNode>;
