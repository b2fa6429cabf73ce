//! The network of a node without peers: every other replica is unreachable. A group with one voter never uses it.

use std::future::Future;

use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{AnyError, OptionalSend, Snapshot};

use super::state_machine::GroupSnapshot;
use super::types::{LeaderId, Mainstem, Vote};
use openraft::impls::EmptyNode;

/// Makes connections to nowhere.
#[derive(Debug, Clone, Default)]
pub struct NoPeers;

/// A connection to nowhere.
#[derive(Debug)]
pub struct NoPeer {
    target: u64,
}

impl NoPeer {
    fn unreachable(&self) -> Unreachable<Mainstem> {
        Unreachable::new(&AnyError::error(format!(
            "replica r{} is on another node, and this node has no peers",
            self.target
        )))
    }
}

impl RaftNetworkFactory<Mainstem> for NoPeers {
    type Network = NoPeer;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> NoPeer {
        NoPeer { target }
    }
}

impl RaftNetworkV2<Mainstem> for NoPeer {
    type SnapshotData = GroupSnapshot;

    async fn append_entries(
        &mut self,
        _rpc: AppendEntriesRequest<Mainstem>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Mainstem>, RPCError<Mainstem>> {
        Err(RPCError::Unreachable(self.unreachable()))
    }

    async fn vote(
        &mut self,
        _rpc: VoteRequest<Mainstem>,
        _option: RPCOption,
    ) -> Result<VoteResponse<Mainstem>, RPCError<Mainstem>> {
        Err(RPCError::Unreachable(self.unreachable()))
    }

    async fn full_snapshot(
        &mut self,
        _vote: Vote,
        _snapshot: Snapshot<LeaderId, u64, EmptyNode, GroupSnapshot>,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Mainstem>, StreamingError<Mainstem>> {
        Err(StreamingError::Unreachable(self.unreachable()))
    }
}
