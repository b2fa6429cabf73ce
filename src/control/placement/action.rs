//! What the planner asks for.

use std::fmt;

use crate::model::{GroupId, NodeId, ReplicaId, ShardId, StreamId};
use crate::wire::internal::v1::{self as pb, ChangeReason, meta_command::Op};

/// One thing to do, and why; or why it cannot be done yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Action {
    pub step: Step,
    /// For people.
    pub why: String,
    /// What must happen first; `None`: it can be done now.
    pub blocked: Option<String>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Begin a change of a group's replicas: learners on `add`, then one joint change.
    ChangeReplicas {
        group: GroupId,
        epoch: u64,
        add: Vec<NodeId>,
        remove: Vec<ReplicaId>,
        reason: ChangeReason,
        why: String,
    },
    /// Give the change of this epoch up. If the joint change may be under way, the group's leader must show that it is not.
    AbortChange { group: GroupId, epoch: u64, why: String },
    /// Let the leader hand over.
    TransferLeader {
        group: GroupId,
        from: ReplicaId,
        to: ReplicaId,
    },
    /// Begin to move a shard to a new group on the same nodes.
    SplitShard {
        stream: StreamId,
        shard: ShardId,
        from: GroupId,
    },
    /// Propose `SealShard` in `from`, and report it.
    SealShard {
        stream: StreamId,
        shard: ShardId,
        move_id: u64,
        from: GroupId,
        to: GroupId,
    },
    /// Propose `UnsealShard` in `group`, and report it: the move was given up.
    UnsealShard {
        stream: StreamId,
        shard: ShardId,
        move_id: u64,
        group: GroupId,
    },
    /// Propose `AdoptShard` in `to`, and report it.
    AdoptShard {
        stream: StreamId,
        shard: ShardId,
        move_id: u64,
        from: GroupId,
        to: GroupId,
        seal: pb::Seal,
    },
    /// The logs of both groups are purged as far as is needed: the move is over.
    FinishMove {
        stream: StreamId,
        shard: ShardId,
        move_id: u64,
    },
    /// Let these replicas of the meta group vote, and no others.
    SetMetaVoters { epoch: u64, voters: Vec<ReplicaId> },
    /// Give the node another replica of the meta group: the one it has is damaged.
    RenewMetaReplica { node: NodeId, replica: ReplicaId },
    /// There is nothing that could be done: always blocked.
    Hold { group: GroupId },
}

impl Step {
    /// The group that it is about, if it is about one.
    pub fn group(&self) -> Option<GroupId> {
        match self {
            Step::ChangeReplicas { group, .. }
            | Step::AbortChange { group, .. }
            | Step::TransferLeader { group, .. }
            | Step::UnsealShard { group, .. }
            | Step::Hold { group } => Some(*group),
            Step::SplitShard { from, .. } | Step::SealShard { from, .. } => Some(*from),
            Step::AdoptShard { to, .. } => Some(*to),
            Step::SetMetaVoters { .. } | Step::RenewMetaReplica { .. } => Some(GroupId::META),
            Step::FinishMove { .. } => None,
        }
    }

    /// The command to be proposed to the meta group; `None` if the step is one of a data group's leader.
    pub fn command(&self) -> Option<Op> {
        match self {
            Step::ChangeReplicas {
                group,
                epoch,
                add,
                remove,
                reason,
                why,
            } => Some(Op::PlanReplicaChange(pb::PlanReplicaChange {
                group_id: group.get(),
                base_epoch: *epoch,
                add_nodes: add.iter().map(|node| node.get()).collect(),
                remove_replicas: remove.iter().map(|replica| replica.get()).collect(),
                reason: *reason as i32,
                why: why.clone(),
            })),
            Step::AbortChange { group, epoch, why } => Some(Op::AbortChange(pb::AbortChange {
                group_id: group.get(),
                epoch: *epoch,
                membership: None,
                why: why.clone(),
            })),
            Step::SplitShard { stream, shard, .. } => Some(Op::PlanShardMove(pb::PlanShardMove {
                shard_id: shard.get(),
                stream_id: stream.to_string(),
                to_group: None,
                reason: ChangeReason::Scale as i32,
            })),
            Step::FinishMove { stream, shard, move_id } => Some(Op::ShardMoveDone(pb::ShardMoveDone {
                shard_id: shard.get(),
                stream_id: stream.to_string(),
                move_id: *move_id,
            })),
            Step::SetMetaVoters { epoch, voters } => Some(Op::SetMetaVoters(pb::SetMetaVoters {
                base_epoch: *epoch,
                voters: voters.iter().map(|replica| replica.get()).collect(),
            })),
            Step::RenewMetaReplica { node, replica } => Some(Op::RenewMetaReplica(pb::RenewMetaReplica {
                node_id: node.get(),
                replica_id: replica.get(),
            })),
            Step::TransferLeader { .. }
            | Step::SealShard { .. }
            | Step::UnsealShard { .. }
            | Step::AdoptShard { .. }
            | Step::Hold { .. } => None,
        }
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::ChangeReplicas { group, add, remove, .. } => {
                write!(f, "{group}:")?;
                if !add.is_empty() {
                    write!(f, " add a replica on {}", list(add))?;
                }
                if !remove.is_empty() {
                    write!(f, "{} remove {}", if add.is_empty() { "" } else { "," }, list(remove))?;
                }
                Ok(())
            }
            Step::AbortChange { group, .. } => write!(f, "{group}: abort the change under way"),
            Step::TransferLeader { group, from, to } => write!(f, "{group}: hand leadership from {from} to {to}"),
            Step::SplitShard { shard, from, .. } => write!(f, "{shard}: split out of {from}"),
            Step::SealShard { shard, from, .. } => write!(f, "{shard}: seal in {from}"),
            Step::UnsealShard { shard, group, .. } => write!(f, "{shard}: unseal in {group}"),
            Step::AdoptShard { shard, to, .. } => write!(f, "{shard}: adopt in {to}"),
            Step::FinishMove { shard, .. } => write!(f, "{shard}: the move is over"),
            Step::SetMetaVoters { voters, .. } => write!(f, "meta group: let {} vote", list(voters)),
            Step::RenewMetaReplica { node, replica } => write!(f, "meta group: replace {replica} on {node}"),
            Step::Hold { group } => write!(f, "{group}: nothing can be done"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.why)?;
        match &self.blocked {
            Some(blocked) => write!(f, " [blocked: {blocked}]"),
            None => Ok(()),
        }
    }
}
