//! A shard's way from one group to another: its former leader seals it, its new one adopts it. Each is found from the catalog,
//! so that any leader goes on where another one stopped, and each may be done again.
//!
//! The seal is told to the catalog, which decides the move, only when every replica of the former group has applied it and has
//! flushed that: from then on each node has what the adoption takes, whatever happens to logs (0048). If one does not answer, the
//! catalog decides that the shard stays, and its group unseals it.

use std::time::Duration;

use futures_util::future::join_all;
use prost::Message;

use super::duties::{Duty, LOOK};
use crate::base::blocking::run_blocking;
use crate::control::Control;
use crate::control::view::ShardOnItsWay;
use crate::machine::GroupOutcome;
use crate::model::{GroupId, LogIndex, NodeId, ReplicaId};
use crate::raft::transport::PeerMethod;
use crate::raft::{Applied, Group, ProposeError};
use crate::wire::internal as pb;
use pb::MoveStep;
use pb::group_command::Op as GroupOp;
use pb::meta_command::Op;

/// How long the replicas of a group may take to apply what it has, and with flushing it. Publishers wait meanwhile.
const APPLY: Duration = Duration::from_secs(1);
const FLUSH: Duration = Duration::from_secs(2);

/// What every replica of a group is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Applied,
    Flushed,
}

impl Control {
    /// What the leader of a group has to do next for a shard that leaves it or comes to it. Publishers wait for one that is to be
    /// unsealed: it goes first.
    pub(super) fn move_duty(&self, group: &Group) -> Option<Duty> {
        let moves = self.view.moves_of(group.id);
        let leaves = |on: &&ShardOnItsWay| on.moving.from_group == group.id.get();
        let given_up = |on: &&ShardOnItsWay| leaves(on) && on.moving.step() == MoveStep::GivenUp;
        if let Some(on) = moves.iter().find(given_up) {
            return Some(Duty::Unseal(on.clone()));
        }
        moves.into_iter().find_map(|on| {
            let to = GroupId::new(on.moving.to_group);
            match (on.moving.step(), leaves(&&on)) {
                // From the seal to the adoption the shard takes nothing: the heir must be there.
                (MoveStep::Planned, true) if self.can_adopt(to) => Some(Duty::Seal(on)),
                // While a shard is on its way no replica can be replaced: what it waits for may never come.
                (MoveStep::Planned, true) if self.orders.is_hopeless((group.id, on.moving.move_id)) => {
                    Some(Duty::GiveUpMove(on, format!("{to} is not formed, or has no leader")))
                }
                (MoveStep::Sealed, false) => Some(Duty::Adopt(on)),
                (
                    MoveStep::Planned
                    | MoveStep::Sealed
                    | MoveStep::Adopted
                    | MoveStep::GivenUp
                    | MoveStep::Unspecified,
                    _,
                ) => None,
            }
        })
    }

    /// Whether a group is formed and led. It has a replica here: both groups are on the same nodes.
    fn can_adopt(&self, to: GroupId) -> bool {
        let formed = self.view.group_record(to).is_some_and(|record| record.formed);
        let led = || self.groups.get(to).is_some_and(|group| group.status().leader.is_some());
        formed && led()
    }

    /// Seals a shard in the group that it leaves, while the catalog wants it, and if every replica is there to do so.
    pub(super) async fn seal_shard(&self, group: &Group, on: &ShardOnItsWay) -> Result<(), ProposeError> {
        if self.barrier().await.is_err() || !self.view.moves_of(group.id).contains(on) {
            return Ok(());
        }
        // Nobody is kept waiting for one that is away. What is flushed now is not to be flushed after the seal.
        let here = group.status().last_applied.unwrap_or_default();
        let asked = [(here, Ask::Applied), (here, Ask::Flushed)];
        if let Err(why) = self.ask_everywhere(group, &asked).await {
            let face = self.groups.directory().get(on.shard);
            let sealed = face.is_some_and(|face| face.heir().is_some());
            // A leader before has sealed it: publishers wait.
            if sealed || self.orders.is_hopeless((group.id, on.moving.move_id)) {
                self.give_move_up(group, on, why).await;
            } else {
                tracing::info!(shard = %on.shard, group = %group.id, why, "a shard cannot be sealed yet");
                tokio::time::sleep(LOOK).await;
            }
            return Ok(());
        }
        let seal = pb::SealShard {
            shard_id: on.shard.get(),
            to_group: on.moving.to_group,
            move_id: on.moving.move_id,
        };
        let (index, applied) = self.propose_indexed(group, GroupOp::SealShard(seal)).await?;
        match applied {
            Applied::Command(GroupOutcome::Sealed { tail, digest, .. }) => {
                let seal = pb::Seal {
                    index: index.get(),
                    tail: tail.get(),
                    digest,
                };
                if let Err(why) = self.ask_everywhere(group, &[(index, Ask::Flushed)]).await {
                    self.give_move_up(group, on, why).await;
                    return Ok(());
                }
                tracing::info!(shard = %on.shard, group = %group.id, to = on.moving.to_group, %tail, "sealed");
                let sealed = pb::ShardSealed {
                    shard_id: on.shard.get(),
                    stream_id: on.stream.clone(),
                    move_id: on.moving.move_id,
                    seal: Some(seal),
                };
                self.tell_catalog("a seal", Op::ShardSealed(sealed)).await;
            }
            // It was removed with its stream: nothing can seal it any more.
            Applied::Command(GroupOutcome::NoShard) => self.abort_move(on, "the shard was removed").await,
            // The catalog has decided so meanwhile.
            Applied::Command(GroupOutcome::Unsealed) => {}
            other @ (Applied::Done | Applied::Command(_)) => {
                tracing::error!(shard = %on.shard, group = %group.id, ?other, "the shard cannot be sealed")
            }
        }
        Ok(())
    }

    /// Lets the catalog decide that the shard stays.
    pub(super) async fn give_move_up(&self, group: &Group, on: &ShardOnItsWay, why: String) {
        tracing::warn!(shard = %on.shard, group = %group.id, to = on.moving.to_group, why, "the shard does not move");
        let up = pb::GiveUpShardMove {
            shard_id: on.shard.get(),
            stream_id: on.stream.clone(),
            move_id: on.moving.move_id,
            why,
        };
        match self
            .tell_catalog("a move that is given up", Op::GiveUpShardMove(up))
            .await
        {
            true => self.orders.possible((group.id, on.moving.move_id)),
            // The catalog has no leader, or says no.
            false => tokio::time::sleep(LOOK).await,
        }
    }

    /// Opens a shard again in the group that it stays in, once the catalog has decided so.
    pub(super) async fn unseal_shard(&self, group: &Group, on: &ShardOnItsWay) -> Result<(), ProposeError> {
        let unseal = pb::UnsealShard {
            shard_id: on.shard.get(),
            move_id: on.moving.move_id,
        };
        let (_, applied) = self.propose_indexed(group, GroupOp::UnsealShard(unseal)).await?;
        match applied {
            Applied::Command(GroupOutcome::Unsealed | GroupOutcome::NoShard) => {
                self.abort_move(on, "its group has it, unsealed").await;
            }
            other @ (Applied::Done | Applied::Command(_)) => {
                tracing::error!(shard = %on.shard, group = %group.id, ?other, "the shard cannot be unsealed")
            }
        }
        Ok(())
    }

    async fn abort_move(&self, on: &ShardOnItsWay, why: &str) {
        let abort = pb::AbortShardMove {
            shard_id: on.shard.get(),
            stream_id: on.stream.clone(),
            move_id: on.moving.move_id,
            why: why.into(),
        };
        self.tell_catalog("a shard that does not move", Op::AbortShardMove(abort))
            .await;
    }

    /// Returns when every replica of the group has done one thing after the other; or why not. Those of nodes that were removed
    /// never run again.
    async fn ask_everywhere(&self, group: &Group, asked: &[(LogIndex, Ask)]) -> Result<(), String> {
        let record = self.view.group_record(group.id).ok_or("its group is gone")?;
        let comes_back = |replica: &&pb::ReplicaRecord| {
            let node = self.view.node(NodeId::new(replica.node_id));
            node.is_none_or(|node| node.state() != pb::NodeState::Removed)
        };
        for (index, ask) in asked {
            let answers = record.replicas.iter().filter(comes_back).map(|replica| async move {
                let order = pb::FlushOrder {
                    group_id: group.id.get(),
                    replica_id: replica.replica_id,
                    index: index.get(),
                    only_applied: *ask == Ask::Applied,
                };
                let node = NodeId::new(replica.node_id);
                match self.order_flush(node, order).await {
                    true => Ok(()),
                    false => Err(format!(
                        "{node} has not said that its replica of {} has all of it",
                        group.id
                    )),
                }
            });
            join_all(answers).await.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    async fn order_flush(&self, node: NodeId, order: pb::FlushOrder) -> bool {
        let Some(peers) = self.peers.as_ref().filter(|_| node != self.facts.node) else {
            return self.flush(&order).await;
        };
        let ping = pb::NodePing {
            flush: Some(order),
            ..pb::NodePing::default()
        };
        let answer = peers
            .call(node, PeerMethod::NodePing, ping.encode_to_vec().into(), FLUSH)
            .await;
        let pong = answer.ok().and_then(|raw| pb::NodePong::decode(raw).ok());
        pong.is_some_and(|pong| pong.flushed)
    }

    /// Waits until the replica here has applied so much, and flushes. False: it is not here, or could not.
    pub(super) async fn flush(&self, order: &pb::FlushOrder) -> bool {
        let (id, index) = (GroupId::new(order.group_id), LogIndex::new(order.index));
        let replica = ReplicaId::new(order.replica_id);
        let Some(group) = self.groups.get(id).filter(|group| group.replica == replica) else {
            return false;
        };
        if !group.wait_applied(index, APPLY).await {
            return false;
        }
        if order.only_applied {
            return true;
        }
        let state = self.groups.state().clone();
        let flushed = move || {
            if state.durable_applied(id) < Some(index) {
                state.flush()?;
            }
            Ok::<_, crate::storage::StorageError>(state.durable_applied(id) >= Some(index))
        };
        run_blocking(flushed).await.is_ok_and(|done| done.unwrap_or(false))
    }

    /// Adopts a sealed shard in its new group, while the catalog wants it: a leader whose view is behind must not take it
    /// once more after it went on.
    pub(super) async fn adopt_shard(&self, group: &Group, on: &ShardOnItsWay) -> Result<(), ProposeError> {
        if self.barrier().await.is_err() || !self.view.moves_of(group.id).contains(on) {
            return Ok(());
        }
        let adopt = pb::AdoptShard {
            shard_id: on.shard.get(),
            from_group: on.moving.from_group,
            move_id: on.moving.move_id,
            seal: on.moving.seal,
        };
        let (index, applied) = self.propose_indexed(group, GroupOp::AdoptShard(adopt)).await?;
        match applied {
            Applied::Command(GroupOutcome::Adopted { tail, .. }) => {
                tracing::info!(shard = %on.shard, group = %group.id, from = on.moving.from_group, %tail, "adopted");
                let adopted = pb::ShardAdopted {
                    shard_id: on.shard.get(),
                    stream_id: on.stream.clone(),
                    move_id: on.moving.move_id,
                    index: index.get(),
                };
                self.tell_catalog("an adoption", Op::ShardAdopted(adopted)).await;
            }
            other @ (Applied::Done | Applied::Command(_)) => {
                tracing::error!(shard = %on.shard, group = %group.id, ?other, "the shard cannot be adopted")
            }
        }
        Ok(())
    }
}
