//! A shard's way from one group to another: its former leader seals it, its new one adopts it. Each is found from the catalog,
//! so that any leader goes on where another one stopped, and each may be done again.

use prost::Message;

use super::duties::Duty;
use crate::control::Control;
use crate::control::view::ShardOnItsWay;
use crate::machine::GroupOutcome;
use crate::model::{GroupId, LogIndex};
use crate::raft::{Applied, Group, ProposeError};
use crate::wire::internal as pb;
use pb::MoveStep;
use pb::group_command::Op as GroupOp;
use pb::meta_command::Op;

impl Control {
    /// What the leader of a group has to do next for a shard that leaves it or comes to it.
    pub(super) fn move_duty(&self, group: &Group) -> Option<Duty> {
        self.view.moves_of(group.id).into_iter().find_map(|on| {
            let to = GroupId::new(on.moving.to_group);
            match on.moving.step() {
                // From the seal to the adoption the shard takes nothing: the heir must be there.
                MoveStep::Planned if to != group.id && self.can_adopt(to) => Some(Duty::Seal(on)),
                MoveStep::Sealed if to == group.id => Some(Duty::Adopt(on)),
                MoveStep::Planned | MoveStep::Sealed | MoveStep::Adopted | MoveStep::Unspecified => None,
            }
        })
    }

    /// Whether a group is formed and led. It has a replica here: both groups are on the same nodes.
    fn can_adopt(&self, to: GroupId) -> bool {
        let formed = self.view.group_record(to).is_some_and(|record| record.formed);
        let led = || self.groups.get(to).is_some_and(|group| group.status().leader.is_some());
        formed && led()
    }

    /// Seals a shard in the group that it leaves. A seal is not taken back: it is proposed only while the catalog wants it.
    pub(super) async fn seal_shard(&self, group: &Group, on: &ShardOnItsWay) -> Result<(), ProposeError> {
        if self.barrier().await.is_err() || !self.view.moves_of(group.id).contains(on) {
            return Ok(());
        }
        let seal = pb::SealShard {
            shard_id: on.shard.get(),
            to_group: on.moving.to_group,
            move_id: on.moving.move_id,
        };
        let (index, applied) = self.propose_indexed(group, GroupOp::SealShard(seal)).await?;
        let (shard_id, stream_id, move_id) = (on.shard.get(), on.stream.clone(), on.moving.move_id);
        match applied {
            Applied::Command(GroupOutcome::Sealed { tail, digest, .. }) => {
                let seal = pb::Seal {
                    index: index.get(),
                    tail: tail.get(),
                    digest,
                };
                tracing::info!(shard = %on.shard, group = %group.id, to = on.moving.to_group, %tail, "sealed");
                let sealed = pb::ShardSealed {
                    shard_id,
                    stream_id,
                    move_id,
                    seal: Some(seal),
                };
                self.tell_catalog("a seal", Op::ShardSealed(sealed)).await;
            }
            // It was removed with its stream: nothing can seal it any more.
            Applied::Command(GroupOutcome::NoShard) => {
                let abort = pb::AbortShardMove {
                    shard_id,
                    stream_id,
                    move_id,
                    why: "the shard was removed".into(),
                };
                self.tell_catalog("a shard that does not move", Op::AbortShardMove(abort))
                    .await;
            }
            other @ (Applied::Done | Applied::Command(_)) => {
                tracing::error!(shard = %on.shard, group = %group.id, ?other, "the shard cannot be sealed")
            }
        }
        Ok(())
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

    async fn propose_indexed(&self, group: &Group, op: GroupOp) -> Result<(LogIndex, Applied), ProposeError> {
        let command = pb::GroupCommand {
            feature_level: crate::machine::FEATURE_LEVEL,
            op: Some(op),
        };
        let (index, _, applied) = group.propose(command.encode_to_vec().into()).await?.wait().await?;
        Ok((index, applied))
    }
}
