//! All the machines of one group: routes a command to the shard, or to the catalog, that it is for.

use std::collections::BTreeMap;

use super::meta::{MetaMachine, MetaOutcome};
use super::outcome::{ExpireOutcome, ItemOutcome, PurgeOutcome, UpdateOutcome};
use super::port::{ShardSink, ShardView};
use super::shard::ShardMachine;
use super::{ApplyError, FEATURE_LEVEL, UnknownFeature};
use crate::model::subject::SubjectError;
use crate::model::{GroupId, Revision, ShardId, Term, TimeUs};
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
    /// The shard is not here: nothing was done.
    NoShard,
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
    pub fn shards(&self) -> impl Iterator<Item = &ShardMachine> {
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
            Op::CreateShard(create) => self.create(sink, create),
            Op::UpdateShard(update) => match self.shards.get_mut(&ShardId::new(update.shard_id)) {
                Some(shard) => {
                    let config = update.config.clone().ok_or(UnknownFeature::Command)?;
                    GroupOutcome::Updated(shard.apply_update(view, sink, Revision::new(update.revision), config)?)
                }
                None => GroupOutcome::NoShard,
            },
            Op::RemoveShard(remove) => {
                let shard = self.shards.remove(&ShardId::new(remove.shard_id));
                let existed = shard.is_some();
                if let Some(shard) = shard {
                    shard.apply_remove(sink);
                }
                GroupOutcome::Removed { existed }
            }
            Op::Publish(publish) => match self.shards.get_mut(&ShardId::new(publish.shard_id)) {
                Some(shard) => GroupOutcome::Published(shard.apply_publish(view, sink, term, publish)?),
                None => GroupOutcome::NoShard,
            },
            Op::Expire(expire) => match self.shards.get_mut(&ShardId::new(expire.shard_id)) {
                Some(shard) => GroupOutcome::Expired(shard.apply_expire(view, sink, TimeUs::new(expire.time_us))?),
                None => GroupOutcome::NoShard,
            },
            Op::Purge(purge) => match self.shards.get_mut(&ShardId::new(purge.shard_id)) {
                Some(shard) => GroupOutcome::Purged(shard.apply_purge(view, sink, purge)?),
                None => GroupOutcome::NoShard,
            },
            Op::Meta(command) => match &mut self.meta {
                Some(meta) => GroupOutcome::Meta(meta.apply(sink, command)?),
                None => return Err(UnknownFeature::WrongGroup.into()),
            },
        })
    }

    fn create(&mut self, sink: &mut dyn ShardSink, create: &pb::CreateShard) -> GroupOutcome {
        let id = ShardId::new(create.shard_id);
        let existed = self.shards.contains_key(&id);
        if !existed {
            let config = create.config.clone().unwrap_or_default();
            self.shards
                .insert(id, ShardMachine::create(sink, id, self.group, config));
        }
        GroupOutcome::Created { existed }
    }
}
