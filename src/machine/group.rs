//! All the machines of one group: routes a command to the shard, or to the catalog, that it is for.

use std::collections::BTreeMap;

use super::meta::{MetaMachine, MetaOutcome};
use super::outcome::{ExpireOutcome, ItemOutcome, PurgeOutcome, UpdateOutcome};
use super::port::{ShardSink, ShardView, ViewError};
use super::shard::ShardMachine;
use super::{AdoptFault, ApplyError, FEATURE_LEVEL, UnknownFeature};
use crate::model::subject::SubjectError;
use crate::model::{GroupId, LogIndex, Revision, Sequence, ShardId, Term, TimeUs};
use crate::wire::internal::v1::{self as pb, group_command::Op};

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
pub enum GroupOutcome {
    /// The shard is there; it was before if `existed`.
    Created { existed: bool },
    /// Of an update of a shard's settings.
    Updated(UpdateOutcome),
    /// The shard is gone; it was not there if not `existed`.
    Removed { existed: bool },
    /// One for each item, in order.
    Published(Vec<ItemOutcome>),
    /// Of an expiry.
    Expired(ExpireOutcome),
    /// Of a purge; the error is of its filter, and nothing was done.
    Purged(Result<PurgeOutcome, SubjectError>),
    /// Of a change of the catalog.
    Meta(MetaOutcome),
    /// The shard takes nothing any more in this group; `tail` and `digest` are what its adoption must find.
    Sealed { tail: Sequence, digest: u64, existed: bool },
    /// The shard is open in this group, and stays in it: its move was given up.
    Unsealed,
    /// The shard is of this group from now on; it was before if `existed`.
    Adopted { tail: Sequence, existed: bool },
    /// The shard was sealed here: it belongs to that group, or will in a moment. Nothing was done.
    Moved { to: GroupId },
    /// The shard is not here: nothing was done.
    NoShard,
}

/// The group, and the index in its log, that this node's own replica of it must have applied before the command is applied
/// here. Two groups never wait for each other: an adoption is proposed after its seal is committed, so what it waits for
/// is older than itself.
pub fn waits_for(command: &pb::GroupCommand) -> Option<(GroupId, LogIndex)> {
    match &command.op {
        Some(Op::AdoptShard(adopt)) => {
            let seal = adopt.seal.as_ref()?;
            Some((GroupId::new(adopt.from_group), LogIndex::new(seal.index)))
        }
        Some(_) | None => None,
    }
}

/// Whether an adoption finds what it needs, or nothing more to do: then it does not wait, and who sealed the shard may be gone.
pub fn is_adoptable(command: &pb::GroupCommand, view: &dyn ShardView) -> Result<bool, ViewError> {
    match &command.op {
        Some(Op::AdoptShard(adopt)) => ShardMachine::is_adoptable(view, adopt),
        Some(_) | None => Ok(false),
    }
}

/// The machines of one group.
#[derive(Debug)]
pub struct GroupMachine {
    group: GroupId,
    shards: BTreeMap<ShardId, ShardMachine>,
    meta: Option<MetaMachine>,
}

impl GroupMachine {
    /// A data group with the shards loaded from its records.
    pub fn data(group: GroupId, shards: impl IntoIterator<Item = ShardMachine>) -> Self {
        Self {
            group,
            shards: shards.into_iter().map(|shard| (shard.shard(), shard)).collect(),
            meta: None,
        }
    }

    /// The meta group.
    pub fn meta_group(meta: MetaMachine) -> Self {
        Self {
            group: GroupId::META,
            shards: BTreeMap::new(),
            meta: Some(meta),
        }
    }

    /// Which group this is.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// A shard of this group.
    pub fn shard(&self, shard: ShardId) -> Option<&ShardMachine> {
        self.shards.get(&shard)
    }

    /// All shards, by id.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &ShardMachine> {
        self.shards.values()
    }

    /// The catalog, in the meta group.
    pub fn meta(&self) -> Option<&MetaMachine> {
        self.meta.as_ref()
    }

    /// Applies the content of an entry of this term. An error is no answer: the replica must not go on.
    pub fn apply(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        term: Term,
        command: &pb::GroupCommand,
    ) -> Result<GroupOutcome, ApplyError> {
        if command.feature_level == 0 || command.feature_level > FEATURE_LEVEL {
            return Err(UnknownFeature::Level {
                found: command.feature_level,
            }
            .into());
        }
        let op = command.op.as_ref().ok_or(UnknownFeature::Command)?;
        if self.meta.is_some() != matches!(op, Op::Meta(_)) {
            return Err(UnknownFeature::WrongGroup.into());
        }
        Ok(match op {
            Op::CreateShard(create) => self.create(view, sink, create)?,
            Op::UpdateShard(update) => match self.owned(update.shard_id) {
                Ok(shard) => {
                    let config = update.config.clone().ok_or(UnknownFeature::Command)?;
                    GroupOutcome::Updated(shard.apply_update(view, sink, Revision::new(update.revision), config)?)
                }
                Err(answer) => answer,
            },
            Op::RemoveShard(remove) => match self.owned(remove.shard_id) {
                Ok(_) => {
                    let shard = self.shards.remove(&ShardId::new(remove.shard_id));
                    shard.expect("it was found").apply_remove(sink);
                    GroupOutcome::Removed { existed: true }
                }
                Err(GroupOutcome::NoShard) => GroupOutcome::Removed { existed: false },
                Err(answer) => answer,
            },
            Op::Publish(publish) => match self.owned(publish.shard_id) {
                Ok(shard) => GroupOutcome::Published(shard.apply_publish(view, sink, term, publish)?),
                Err(answer) => answer,
            },
            Op::Expire(expire) => match self.owned(expire.shard_id) {
                Ok(shard) => GroupOutcome::Expired(shard.apply_expire(view, sink, TimeUs::new(expire.time_us))?),
                Err(answer) => answer,
            },
            Op::Purge(purge) => match self.owned(purge.shard_id) {
                Ok(shard) => GroupOutcome::Purged(shard.apply_purge(view, sink, purge)?),
                Err(answer) => answer,
            },
            Op::SealShard(seal) => self.seal(sink, seal),
            Op::UnsealShard(unseal) => self.unseal(sink, unseal),
            Op::AdoptShard(adopt) => self.adopt(view, sink, adopt)?,
            Op::Meta(command) => match &mut self.meta {
                Some(meta) => GroupOutcome::Meta(meta.apply(sink, command)?),
                None => return Err(UnknownFeature::WrongGroup.into()),
            },
        })
    }

    /// A shard that is here and not sealed; else the answer.
    fn owned(&mut self, shard: u64) -> Result<&mut ShardMachine, GroupOutcome> {
        match self.shards.get_mut(&ShardId::new(shard)) {
            None => Err(GroupOutcome::NoShard),
            Some(shard) => match shard.seal() {
                Some(seal) => Err(GroupOutcome::Moved {
                    to: GroupId::new(seal.to_group),
                }),
                None => Ok(shard),
            },
        }
    }

    fn seal(&mut self, sink: &mut dyn ShardSink, seal: &pb::SealShard) -> GroupOutcome {
        let Some(shard) = self.shards.get_mut(&ShardId::new(seal.shard_id)) else {
            return GroupOutcome::NoShard;
        };
        let existed = match shard.seal().copied() {
            Some(known) if known.move_id != seal.move_id => {
                return GroupOutcome::Moved {
                    to: GroupId::new(known.to_group),
                };
            }
            Some(_) => true,
            None if shard.apply_seal(sink, GroupId::new(seal.to_group), seal.move_id) => false,
            None => return GroupOutcome::Unsealed,
        };
        GroupOutcome::Sealed {
            tail: shard.tail(),
            digest: shard.digest(),
            existed,
        }
    }

    fn unseal(&mut self, sink: &mut dyn ShardSink, unseal: &pb::UnsealShard) -> GroupOutcome {
        let Some(shard) = self.shards.get_mut(&ShardId::new(unseal.shard_id)) else {
            return GroupOutcome::NoShard;
        };
        match shard.seal() {
            Some(later) if later.move_id > unseal.move_id => GroupOutcome::Moved {
                to: GroupId::new(later.to_group),
            },
            Some(_) | None => {
                shard.apply_unseal(sink, unseal.move_id);
                GroupOutcome::Unsealed
            }
        }
    }

    fn adopt(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        adopt: &pb::AdoptShard,
    ) -> Result<GroupOutcome, ApplyError> {
        let id = ShardId::new(adopt.shard_id);
        let known = self.shards.get(&id);
        if let Some(shard) = known.filter(|shard| shard.origin().is_some_and(|o| o.move_id >= adopt.move_id)) {
            return Ok(GroupOutcome::Adopted {
                tail: shard.tail(),
                existed: true,
            });
        }
        if ShardMachine::went_on(view, adopt)? {
            return Ok(GroupOutcome::NoShard);
        }
        if let Some(shard) = known {
            // One that went away from here may come back; one that never went cannot come.
            if shard.seal().is_none() {
                return Err(AdoptFault::NotSealed {
                    shard: id,
                    from: GroupId::new(adopt.from_group),
                }
                .into());
            }
        }
        let shard = ShardMachine::apply_adopt(view, sink, self.group, adopt)??;
        let tail = shard.tail();
        self.shards.insert(id, shard);
        Ok(GroupOutcome::Adopted { tail, existed: false })
    }

    fn create(
        &mut self,
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        create: &pb::CreateShard,
    ) -> Result<GroupOutcome, ApplyError> {
        let id = ShardId::new(create.shard_id);
        // One that went to another group is not in this one's records any more.
        let existed =
            self.shards.contains_key(&id) || view.shard_state(id)?.is_some_and(|state| state.group != self.group);
        if !existed {
            let config = create.config.clone().unwrap_or_default();
            self.shards
                .insert(id, ShardMachine::create(sink, id, self.group, config));
        }
        Ok(GroupOutcome::Created { existed })
    }
}
