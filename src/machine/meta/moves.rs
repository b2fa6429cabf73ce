//! A shard goes from one group to another on the same nodes: planned, sealed, adopted, done. At each moment one group
//! owns it: `group_id` of its placement. See docs/decisions/0004.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::place::new_replicas;
use super::{MetaMachine, MetaOutcome, MetaRefusal};
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::{GroupId, NodeId, ShardId, StreamId};
use crate::wire::internal::v1::{self as pb, MoveStep};
use crate::wire::v1::StreamState;

type Outcome = Result<MetaOutcome, MetaRefusal>;

fn bad(why: impl Into<String>) -> MetaRefusal {
    MetaRefusal::BadChange { why: why.into() }
}

fn only_on(shard: u64, moving: &pb::ShardMove) -> MetaRefusal {
    bad(format!(
        "shard {shard} is sealed: it can only go on to group {}",
        moving.to_group
    ))
}

fn nodes(group: &pb::GroupRecord) -> BTreeSet<u64> {
    group.replicas.iter().map(|replica| replica.node_id).collect()
}

impl MetaMachine {
    /// A shard that is on its way from or to this group.
    pub(super) fn move_of(&self, group: GroupId) -> Option<ShardId> {
        self.moves.get(&group)?.keys().next().copied()
    }

    /// The index of moves, from a stream's record.
    pub(super) fn index_moves(&mut self, stream: &pb::StreamRecord) {
        for (shard, moving) in moves(stream) {
            for group in [moving.from_group, moving.to_group] {
                self.moves
                    .entry(GroupId::new(group))
                    .or_default()
                    .insert(shard, *moving);
            }
        }
    }

    pub(super) fn unindex_moves(&mut self, stream: &pb::StreamRecord) {
        for (shard, moving) in moves(stream) {
            for group in [moving.from_group, moving.to_group].map(GroupId::new) {
                let Some(shards) = self.moves.get_mut(&group) else {
                    continue;
                };
                shards.remove(&shard);
                if shards.is_empty() {
                    self.moves.remove(&group);
                }
            }
        }
    }

    fn shard_of(&self, stream_id: &str, shard_id: u64) -> Result<(pb::StreamRecord, usize), MetaRefusal> {
        let not_found = || MetaRefusal::NotFound {
            name: format!("{stream_id} (shard {shard_id})"),
        };
        let id = StreamId::parse(stream_id).ok_or_else(not_found)?;
        let stream = pb::StreamRecord::clone(self.streams.get(&id).ok_or_else(not_found)?);
        let at = stream.shards.iter().position(|place| place.shard_id == shard_id);
        Ok((stream, at.ok_or_else(not_found)?))
    }

    /// The shard with its move, if it is this one.
    fn moving(
        &self,
        stream_id: &str,
        shard_id: u64,
        move_id: u64,
    ) -> Result<(pb::StreamRecord, usize, pb::ShardMove), MetaRefusal> {
        let (stream, at) = self.shard_of(stream_id, shard_id)?;
        let found = stream.shards[at].moving;
        let actual = found.as_ref().map_or(0, |moving| moving.move_id);
        let moving = found
            .filter(|_| actual == move_id)
            .ok_or_else(|| MetaRefusal::StaleEpoch {
                what: format!("the move of shard {shard_id}"),
                actual,
            })?;
        Ok((stream, at, moving))
    }

    fn put_move(
        &mut self,
        sink: &mut dyn ShardSink,
        mut stream: pb::StreamRecord,
        at: usize,
        moving: Option<pb::ShardMove>,
    ) -> Arc<pb::StreamRecord> {
        stream.shards[at].moving = moving;
        self.put_stream(sink, stream)
    }

    pub(super) fn plan_shard_move(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        plan: &pb::PlanShardMove,
    ) -> Outcome {
        let (stream, at) = self.shard_of(&plan.stream_id, plan.shard_id)?;
        let Some(cluster) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        let mut cluster = pb::ClusterRecord::clone(cluster);
        if stream.state() != StreamState::Active {
            return Err(bad(format!("stream {} is not active", stream.stream_id)));
        }
        if stream.shards[at].moving.is_some() {
            return Err(MetaRefusal::InFlight {
                what: format!("shard {} is on its way already", plan.shard_id),
            });
        }
        let from = self.known_group(stream.shards[at].group_id)?;
        self.may_move(&from)?;
        self.ends_moves(&from, |moving| moving.to_group == from.group_id)?;
        let to = match plan.to_group {
            Some(to) => {
                let to = self.known_group(to)?;
                self.may_move(&to)?;
                self.ends_moves(&to, |moving| moving.from_group == to.group_id)?;
                if to.group_id == from.group_id || nodes(&to) != nodes(&from) {
                    return Err(bad(format!(
                        "a shard moves between two groups on the same nodes; {} is on {:?}, {} on {:?}",
                        from.group_id,
                        nodes(&from),
                        to.group_id,
                        nodes(&to)
                    )));
                }
                to.group_id
            }
            None => {
                let group_id = cluster.next_group_id;
                cluster.next_group_id += 1;
                let spec = super::spec_of(&stream);
                let on: Vec<NodeId> = nodes(&from).into_iter().map(NodeId::new).collect();
                let group = pb::GroupRecord {
                    group_id,
                    replicas: new_replicas(&mut cluster, &on),
                    replica_count: spec.replicas,
                    placement: spec.placement.clone(),
                    ..pb::GroupRecord::default()
                };
                self.put_group(sink, group);
                group_id
            }
        };
        let move_id = cluster.next_move_id.max(1);
        cluster.next_move_id = move_id + 1;
        let moving = pb::ShardMove {
            move_id,
            from_group: from.group_id,
            to_group: to,
            step: MoveStep::Planned as i32,
            reason: plan.reason,
            started_us: time_us,
            ..pb::ShardMove::default()
        };
        let stream = self.put_move(sink, stream, at, Some(moving));
        self.put_cluster(sink, cluster);
        Ok(MetaOutcome::ShardMoving(stream))
    }

    /// While a shard moves, the members of both groups stay as they are.
    fn may_move(&self, group: &pb::GroupRecord) -> Result<(), MetaRefusal> {
        if group.change.is_some() || !group.formed {
            return Err(MetaRefusal::InFlight {
                what: format!("group {} is not formed, or has a change under way", group.group_id),
            });
        }
        Ok(())
    }

    /// A group gives shards away or takes some, never both at a time: where its state cannot be sent to another replica
    /// because of one that leaves it, the heir's can.
    fn ends_moves(&self, group: &pb::GroupRecord, begins: impl Fn(&pb::ShardMove) -> bool) -> Result<(), MetaRefusal> {
        let on_their_way = self.moves.get(&GroupId::new(group.group_id)).into_iter();
        let mut moves = on_their_way.flat_map(BTreeMap::values);
        match moves.find(|moving| begins(moving)) {
            None => Ok(()),
            Some(moving) => Err(MetaRefusal::InFlight {
                what: format!(
                    "a shard is on its way from group {} to group {}",
                    moving.from_group, moving.to_group
                ),
            }),
        }
    }

    pub(super) fn shard_sealed(&mut self, sink: &mut dyn ShardSink, sealed: &pb::ShardSealed) -> Outcome {
        let (stream, at, mut moving) = self.moving(&sealed.stream_id, sealed.shard_id, sealed.move_id)?;
        let seal = sealed.seal.as_ref().ok_or_else(|| bad("there is no seal"))?;
        match moving.step() {
            MoveStep::Planned => {}
            MoveStep::GivenUp => {
                return Err(bad(format!("the move of shard {} was given up", sealed.shard_id)));
            }
            MoveStep::Sealed | MoveStep::Adopted if moving.seal.as_ref() == Some(seal) => {
                return Ok(MetaOutcome::ShardMoving(Arc::new(stream)));
            }
            MoveStep::Sealed | MoveStep::Adopted | MoveStep::Unspecified => {
                return Err(bad(format!(
                    "shard {} has another seal: {:?}",
                    sealed.shard_id, moving.seal
                )));
            }
        }
        moving.step = MoveStep::Sealed as i32;
        moving.seal = Some(*seal);
        self.raise_log_floor(sink, moving.from_group, seal.index)?;
        let stream = self.put_move(sink, stream, at, Some(moving));
        self.raise_revision(sink);
        Ok(MetaOutcome::ShardMoving(stream))
    }

    pub(super) fn shard_adopted(&mut self, sink: &mut dyn ShardSink, adopted: &pb::ShardAdopted) -> Outcome {
        let (mut stream, at, mut moving) = self.moving(&adopted.stream_id, adopted.shard_id, adopted.move_id)?;
        match moving.step() {
            MoveStep::Sealed => {}
            MoveStep::Adopted => {
                // The entry of another leader is of no effect, but it is in the log all the same.
                self.raise_log_floor(sink, moving.to_group, adopted.index)?;
                return Ok(MetaOutcome::ShardMoving(Arc::new(stream)));
            }
            MoveStep::Planned | MoveStep::GivenUp | MoveStep::Unspecified => {
                return Err(bad(format!(
                    "shard {} is not sealed: seal before adopt",
                    adopted.shard_id
                )));
            }
        }
        let mut from = self.known_group(moving.from_group)?;
        from.shards = from.shards.saturating_sub(1);
        self.put_group(sink, from);
        let mut to = self.known_group(moving.to_group)?;
        to.shards += 1;
        self.put_group(sink, to);
        self.raise_log_floor(sink, moving.to_group, adopted.index)?;
        moving.step = MoveStep::Adopted as i32;
        moving.adopt_index = adopted.index;
        stream.shards[at].group_id = moving.to_group;
        let stream = self.put_move(sink, stream, at, Some(moving));
        self.raise_revision(sink);
        Ok(MetaOutcome::ShardMoving(stream))
    }

    pub(super) fn shard_move_done(&mut self, sink: &mut dyn ShardSink, done: &pb::ShardMoveDone) -> Outcome {
        let (stream, at, moving) = self.moving(&done.stream_id, done.shard_id, done.move_id)?;
        if moving.step() != MoveStep::Adopted {
            return Err(bad(format!("shard {} is not adopted yet", done.shard_id)));
        }
        let stream = self.put_move(sink, stream, at, None);
        let from = GroupId::new(moving.from_group);
        self.drop_if_empty(sink, from);
        self.raise_revision(sink);
        Ok(MetaOutcome::ShardMoved {
            stream,
            from,
            to: GroupId::new(moving.to_group),
        })
    }

    /// The shard stays where it is, and no seal of this move is told any more.
    pub(super) fn give_up_shard_move(&mut self, sink: &mut dyn ShardSink, up: &pb::GiveUpShardMove) -> Outcome {
        let (stream, at, mut moving) = self.moving(&up.stream_id, up.shard_id, up.move_id)?;
        match moving.step() {
            MoveStep::Planned => {}
            MoveStep::GivenUp => return Ok(MetaOutcome::ShardMoving(Arc::new(stream))),
            MoveStep::Sealed | MoveStep::Adopted | MoveStep::Unspecified => {
                return Err(only_on(up.shard_id, &moving));
            }
        }
        moving.step = MoveStep::GivenUp as i32;
        let stream = self.put_move(sink, stream, at, Some(moving));
        self.raise_revision(sink);
        Ok(MetaOutcome::ShardMoving(stream))
    }

    /// The shard stays where it is: it is not sealed, and whoever says so sees to it that it will not be.
    pub(super) fn abort_shard_move(&mut self, sink: &mut dyn ShardSink, abort: &pb::AbortShardMove) -> Outcome {
        let (stream, at, moving) = self.moving(&abort.stream_id, abort.shard_id, abort.move_id)?;
        match moving.step() {
            MoveStep::Planned | MoveStep::GivenUp => {}
            MoveStep::Sealed | MoveStep::Adopted | MoveStep::Unspecified => {
                return Err(only_on(abort.shard_id, &moving));
            }
        }
        let stream = self.put_move(sink, stream, at, None);
        let to = GroupId::new(moving.to_group);
        self.drop_if_empty(sink, to);
        self.raise_revision(sink);
        Ok(MetaOutcome::ShardMoved {
            stream,
            from: to,
            to: GroupId::new(moving.from_group),
        })
    }

    /// A group of a stream's own goes with its last shard.
    fn drop_if_empty(&mut self, sink: &mut dyn ShardSink, id: GroupId) {
        let empty = |group: &pb::GroupRecord| group.shards == 0 && !group.pooled;
        if self.groups.get(&id).is_some_and(|group| empty(group)) && self.move_of(id).is_none() {
            self.groups.remove(&id);
            sink.drop_meta(MetaKind::Group, &id.get().to_be_bytes());
        }
    }

    fn raise_log_floor(&mut self, sink: &mut dyn ShardSink, group: u64, index: u64) -> Result<(), MetaRefusal> {
        let mut group = self.known_group(group)?;
        group.log_floor = group.log_floor.max(index);
        self.put_group(sink, group);
        Ok(())
    }

    /// The shard of a stream that is on its way, if any.
    pub(super) fn moving_shard(&self, stream: &pb::StreamRecord) -> Option<ShardId> {
        moves(stream).next().map(|(shard, _)| shard)
    }
}

fn moves(stream: &pb::StreamRecord) -> impl Iterator<Item = (ShardId, &pb::ShardMove)> {
    stream
        .shards
        .iter()
        .filter_map(|place| Some((ShardId::new(place.shard_id), place.moving.as_ref()?)))
}
