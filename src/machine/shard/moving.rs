//! A shard's way from one group to another on the same nodes: sealed in the one, adopted in the other. Its records are
//! under keys that do not name the group, so nothing is copied: from the seal on the one writes nothing of it any more,
//! from the adoption on the other does.

use prost::Message;
use xxhash_rust::xxh3::Xxh3;

use super::ShardMachine;
use crate::machine::port::{ShardSink, ShardState, ShardView, ViewError};
use crate::model::{GroupId, Sequence, ShardId};
use crate::wire::internal::v1 as pb;

/// Why a replica cannot adopt. None of these is an answer: the replica must not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdoptFault {
    /// This replica's copy has not applied the seal: it was not waited for.
    #[error("shard {shard} is not sealed here yet by {from}: its seal must be applied first")]
    NotSealed { shard: ShardId, from: GroupId },
    /// This replica's copy is not what the seal said: one of them is damaged.
    #[error(
        "shard {shard} has tail {tail} and digest {digest:016x}, its seal said {sealed_tail} and {sealed_digest:016x}"
    )]
    Differs {
        shard: ShardId,
        tail: Sequence,
        digest: u64,
        sealed_tail: Sequence,
        sealed_digest: u64,
    },
    /// Its records do not make a machine.
    #[error("shard {shard} cannot be adopted: {why}")]
    Bad { shard: ShardId, why: String },
}

impl ShardMachine {
    /// Where it went, if this group has applied its seal.
    pub fn seal(&self) -> Option<&pb::ShardSeal> {
        self.seal.as_ref()
    }

    /// How it came to this group; `None` if it was created here.
    pub fn origin(&self) -> Option<&pb::ShardOrigin> {
        self.origin.as_ref()
    }

    /// Of everything that a replica must have in common with the others: counters, settings, producers, message ids. The
    /// same before and after the seal.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        let record = pb::ShardRecord {
            seal: None,
            origin: None,
            ..self.record()
        };
        hash.update(&record.encode_to_vec());
        self.producers.digest(&mut hash);
        self.ids.digest(&mut hash);
        hash.digest()
    }

    /// From here on nothing changes in this group. False: the move was given up, and nothing was done.
    pub fn apply_seal(&mut self, sink: &mut dyn ShardSink, to: GroupId, move_id: u64) -> bool {
        if move_id <= self.given_up {
            return false;
        }
        self.seal = Some(pb::ShardSeal {
            to_group: to.get(),
            move_id,
        });
        self.write(sink);
        true
    }

    /// The move is given up: whether it was sealed for it or not, it is open now, and a seal that comes late is of no effect.
    pub fn apply_unseal(&mut self, sink: &mut dyn ShardSink, move_id: u64) {
        self.seal = self.seal.take().filter(|seal| seal.move_id > move_id);
        self.given_up = self.given_up.max(move_id);
        self.write(sink);
    }

    /// The group that a shard is sealed for, by its record; one that cannot be read is for nobody.
    pub fn heir_in(record: &[u8]) -> Option<GroupId> {
        let seal = pb::ShardRecord::decode(record).ok()?.seal?;
        Some(GroupId::new(seal.to_group))
    }

    /// Whether the shard is here as its former group has left it for this move, or was adopted by it already.
    pub fn is_adoptable(view: &dyn ShardView, adopt: &pb::AdoptShard) -> Result<bool, ViewError> {
        let Some(found) = view.shard_state(ShardId::new(adopt.shard_id))? else {
            return Ok(false);
        };
        let Ok(record) = pb::ShardRecord::decode(found.record) else {
            return Ok(false);
        };
        let sealed = record.seal.is_some_and(|seal| seal.move_id == adopt.move_id);
        let adopted = record.origin.is_some_and(|origin| origin.move_id >= adopt.move_id);
        Ok(adopted || (sealed && found.group.get() == adopt.from_group))
    }

    /// Whether the shard has gone on since: the entry is that of a leader that did not know.
    pub fn went_on(view: &dyn ShardView, adopt: &pb::AdoptShard) -> Result<bool, ViewError> {
        let found = view.shard_state(ShardId::new(adopt.shard_id))?;
        // One that cannot be read is found by the adoption itself.
        let record = found.and_then(|state| pb::ShardRecord::decode(state.record).ok());
        let origin = record.and_then(|record| record.origin);
        Ok(origin.is_some_and(|origin| origin.move_id > adopt.move_id))
    }

    /// The shard in its new group, from what the former one left in the applied state.
    pub fn apply_adopt(
        view: &dyn ShardView,
        sink: &mut dyn ShardSink,
        group: GroupId,
        adopt: &pb::AdoptShard,
    ) -> Result<Result<Self, AdoptFault>, ViewError> {
        let shard = ShardId::new(adopt.shard_id);
        let found = view.shard_state(shard)?;
        Ok(Self::adopted(shard, group, adopt, found).inspect(|machine| machine.write_adopted(sink)))
    }

    fn write_adopted(&self, sink: &mut dyn ShardSink) {
        sink.put_shard(self.shard, self.group, &self.record().encode_to_vec());
    }

    fn adopted(
        shard: ShardId,
        group: GroupId,
        adopt: &pb::AdoptShard,
        found: Option<ShardState>,
    ) -> Result<Self, AdoptFault> {
        let bad = |why: String| AdoptFault::Bad { shard, why };
        let from = GroupId::new(adopt.from_group);
        let expected = adopt
            .seal
            .as_ref()
            .ok_or_else(|| bad("the entry holds no seal".into()))?;
        let state = found.filter(|state| state.group == from);
        let state = state.ok_or(AdoptFault::NotSealed { shard, from })?;
        let mut machine = Self::load(
            shard,
            group,
            &state.record,
            state.producers.iter().map(|(id, record)| (*id, record.as_ref())),
            state.id_blocks.iter().map(|(at, block)| (*at, block.as_ref())),
        )
        .map_err(|error| bad(error.to_string()))?;
        let is_ours = |seal: &pb::ShardSeal| seal.to_group == group.get() && seal.move_id == adopt.move_id;
        if !machine.seal.take().is_some_and(|seal| is_ours(&seal)) {
            return Err(AdoptFault::NotSealed { shard, from });
        }
        let (tail, digest) = (machine.tail(), machine.digest());
        if tail.get() != expected.tail || digest != expected.digest {
            return Err(AdoptFault::Differs {
                shard,
                tail,
                digest,
                sealed_tail: Sequence::new(expected.tail),
                sealed_digest: expected.digest,
            });
        }
        machine.origin = Some(pb::ShardOrigin {
            from_group: from.get(),
            move_id: adopt.move_id,
        });
        Ok(machine)
    }
}
