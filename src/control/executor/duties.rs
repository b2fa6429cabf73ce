//! What the leader of a group has to do: tell the catalog that the group is formed, bring learners in, make the changes
//! of members that the catalog asks for, and tell when they are committed. Each is found from the catalog and the group
//! as they are, so that any leader goes on where another one stopped.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::TRANSFER;
use crate::control::Control;
use crate::control::meta::QUORUM_AGE;
use crate::control::view::ShardOnItsWay;
use crate::machine::placement::voters_of;
use crate::model::{GroupId, ReplicaId};
use crate::raft::{ChangeError, Group, Members, ProposeError};
use crate::wire::internal as pb;
use pb::meta_command::Op;

/// A replica that lacks no more than this and answers has (nearly) everything.
const LAG_MAX: u64 = 1_000;
/// One that has not answered for so long does not.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Looks without a change that tells of something.
pub(super) const LOOK: Duration = Duration::from_millis(300);
/// A change of members that is not done in this time is looked at again.
const CHANGE: Duration = Duration::from_secs(20);
/// A joint change that cannot be made for so long, because a new replica does not answer, is given up; so is the move of a
/// shard that cannot begin.
const GIVE_UP: Duration = Duration::from_secs(10);
/// Orders that wait.
const ORDERS_MAX: usize = 256;

/// Orders of the meta group's leader for groups led here.
#[derive(Default)]
pub struct Orders {
    /// Since when joint changes that are wanted cannot be made (by epoch), or moves of shards begin (by their number). A group
    /// never has both.
    impossible: Mutex<HashMap<(GroupId, u64), Instant>>,
    waiting: Mutex<VecDeque<(GroupId, ReplicaId)>>,
    more: Notify,
}

impl Orders {
    /// Whether something cannot be done, and could not for long.
    pub(super) fn is_hopeless(&self, key: (GroupId, u64)) -> bool {
        let mut impossible = self.impossible.lock();
        // What a leader before has left behind is of no use.
        impossible.retain(|(group, number), _| *group != key.0 || *number == key.1);
        impossible.entry(key).or_insert_with(Instant::now).elapsed() >= GIVE_UP
    }

    /// It can be done, or is given up.
    pub(super) fn possible(&self, key: (GroupId, u64)) {
        self.impossible.lock().remove(&key);
    }

    /// Lets the group be handed to a replica. What does not fit is ordered again in the next round.
    pub(super) fn transfer(&self, group: GroupId, to: ReplicaId) {
        let mut waiting = self.waiting.lock();
        if waiting.len() < ORDERS_MAX && !waiting.iter().any(|(id, _)| *id == group) {
            waiting.push_back((group, to));
            self.more.notify_one();
        }
    }
}

/// Replicas that have (nearly) everything, as their leader sees it, the leader among them.
pub(super) fn current(group: &Group) -> BTreeSet<ReplicaId> {
    let report = group.report();
    let has = |replica: &&crate::raft::ReplicaReport| {
        replica.replica == group.replica
            || (replica.matched.is_some()
                && replica.lag <= LAG_MAX
                && replica.last_ack.is_some_and(|ack| ack <= ANSWER_MAX))
    };
    report
        .replicas
        .iter()
        .filter(has)
        .map(|replica| replica.replica)
        .collect()
}

/// One thing to do.
// There is at most one per group, for as long as it takes to do it.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Duty {
    Tell(&'static str, Op),
    AddLearner(ReplicaId),
    RemoveLearner(ReplicaId),
    Change(BTreeSet<ReplicaId>),
    HandOver(ReplicaId),
    Seal(ShardOnItsWay),
    GiveUpMove(ShardOnItsWay, String),
    Unseal(ShardOnItsWay),
    Adopt(ShardOnItsWay),
}

/// Runs until cancelled: one duty per group at a time, groups side by side.
pub async fn serve_groups(control: Arc<Control>, token: CancellationToken) {
    let mut busy: HashSet<GroupId> = HashSet::new();
    let mut work: FuturesUnordered<BoxFuture<'static, GroupId>> = FuturesUnordered::new();
    let mut changes = control.view.watch();
    let mut events = control.groups.events();
    loop {
        changes.borrow_and_update();
        let orders: Vec<_> = control.orders.waiting.lock().drain(..).collect();
        for group in control.groups.all() {
            if busy.contains(&group.id) || !group.leads_quorum(QUORUM_AGE) {
                continue;
            }
            let ordered = orders
                .iter()
                .find(|(id, to)| *id == group.id && group.members().voters.contains(to));
            let duty = ordered.map(|(_, to)| Duty::HandOver(*to));
            if let Some(duty) = duty.or_else(|| control.duty_of(&group)) {
                busy.insert(group.id);
                let control = control.clone();
                work.push(async move { control.do_duty(group, duty).await }.boxed());
            }
        }
        tokio::select! {
            () = token.cancelled() => return,
            Some(done) = work.next(), if !work.is_empty() => drop(busy.remove(&done)),
            _ = changes.changed() => {}
            // Missed ones are made up for by looking.
            _ = events.recv() => {}
            () = control.orders.more.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// What is told to the catalog of a group's members.
fn told(members: &Members) -> pb::GroupMembership {
    pb::GroupMembership {
        voters: members.voters.iter().map(|id| id.get()).collect(),
        learners: members.learners.iter().map(|id| id.get()).collect(),
        index: members.index.get(),
    }
}

fn ids(raw: &[u64]) -> BTreeSet<ReplicaId> {
    raw.iter().map(|id| ReplicaId::new(*id)).collect()
}

/// Who shall vote once the change of a group, if there is one, is made.
fn wanted_voters(record: &pb::GroupRecord, voters: &BTreeSet<ReplicaId>) -> BTreeSet<ReplicaId> {
    let (add, remove) = match &record.change {
        Some(change) => (ids(&change.add), ids(&change.remove)),
        None => Default::default(),
    };
    voters.union(&add).filter(|id| !remove.contains(id)).copied().collect()
}

/// The next thing for the leader of a data group, `own`. A group that is still joint is so because the leader that began
/// its change has ended, or its call has: nobody goes on with that by himself.
fn data_duty(
    record: &pb::GroupRecord,
    own: ReplicaId,
    members: &Members,
    current: &BTreeSet<ReplicaId>,
) -> Option<Duty> {
    if !members.committed {
        return None;
    }
    let voters = voters_of(record).map(|replica| ReplicaId::new(replica.replica_id));
    let voters: BTreeSet<ReplicaId> = voters.collect();
    if members.joint {
        return Some(Duty::Change(wanted_voters(record, &voters)));
    }
    if !record.formed {
        let formed = Op::GroupFormed(pb::GroupFormed {
            group_id: record.group_id,
            membership: Some(told(members)),
        });
        return (members.voters == voters).then_some(Duty::Tell("a new group", formed));
    }
    let Some(change) = &record.change else {
        // Left over by a change that was given up.
        let stray = members
            .learners
            .iter()
            .find(|id| !record.replicas.iter().any(|replica| replica.replica_id == id.get()));
        return stray.map(|id| Duty::RemoveLearner(*id));
    };
    let add = ids(&change.add);
    if let Some(new) = add.iter().find(|id| !members.contains(**id)) {
        return Some(Duty::AddLearner(*new));
    }
    if !change.ready {
        let caught_up = record.replicas.iter().find(|replica| {
            let id = ReplicaId::new(replica.replica_id);
            add.contains(&id) && !replica.caught_up && current.contains(&id)
        });
        return caught_up.map(|replica| {
            let report = pb::ReplicaCaughtUp {
                group_id: record.group_id,
                epoch: change.epoch,
                replica_id: replica.replica_id,
            };
            Duty::Tell("a replica that has caught up", Op::ReplicaCaughtUp(report))
        });
    }
    let wanted = wanted_voters(record, &voters);
    if members.voters == wanted {
        let committed = pb::ChangeCommitted {
            group_id: record.group_id,
            epoch: change.epoch,
            membership: Some(told(members)),
        };
        return Some(Duty::Tell("a change of replicas", Op::ChangeCommitted(committed)));
    }
    if !wanted.contains(&own) {
        // A leader is never removed: it hands over to a voter that stays, or, if none does, goes on as the joint change
        // makes one: until then it has nobody to hand over to.
        let heir = wanted
            .iter()
            .find(|id| members.voters.contains(id) && current.contains(id));
        if let Some(heir) = heir {
            return Some(Duty::HandOver(*heir));
        }
    }
    Some(Duty::Change(wanted))
}

/// The next thing for the leader of the meta group.
fn meta_duty(wanted: &pb::MetaMembership, members: &Members, current: &BTreeSet<ReplicaId>) -> Option<Duty> {
    if !members.committed || wanted.voters.is_empty() {
        return None;
    }
    let (voters, learners) = (ids(&wanted.voters), ids(&wanted.learners));
    if members.joint {
        return Some(Duty::Change(voters));
    }
    let lacking = voters.union(&learners).find(|id| !members.contains(**id));
    if let Some(new) = lacking {
        return Some(Duty::AddLearner(*new));
    }
    if members.voters != voters {
        let ready = voters.difference(&members.voters).all(|id| current.contains(id));
        return ready.then_some(Duty::Change(voters));
    }
    let stray = members.learners.iter().find(|id| !learners.contains(id));
    stray.map(|id| Duty::RemoveLearner(*id))
}

fn not_proposed(group: GroupId, error: &ProposeError) -> ChangeError {
    match error {
        ProposeError::NotLeader { leader, .. } => ChangeError::NotLeader { group, leader: *leader },
        ProposeError::Stopped { reason, .. } => ChangeError::Stopped {
            group,
            reason: reason.clone(),
        },
        ProposeError::Unknown { .. } => ChangeError::Unknown { group },
    }
}

impl Control {
    fn duty_of(&self, group: &Group) -> Option<Duty> {
        let (members, current) = (group.members(), current(group));
        if group.id == GroupId::META {
            return meta_duty(&self.view.cluster()?.meta?, &members, &current);
        }
        let duty = data_duty(&*self.view.group_record(group.id)?, group.replica, &members, &current);
        duty.or_else(|| self.move_duty(group))
    }

    /// Makes the joint change that the catalog wants, if it still does, and while all new voters have everything: with one
    /// that is gone the group could stand still. What cannot be made for long is given up, with the proof for the catalog: a
    /// membership without the learners, from which no leader can make voters of them any more.
    async fn change_voters(&self, group: &Group, voters: &BTreeSet<ReplicaId>) -> Result<(), ChangeError> {
        let wanted = || self.duty_of(group) == Some(Duty::Change(voters.clone()));
        if self.barrier().await.is_err() || !wanted() {
            tokio::time::sleep(LOOK).await;
            return Ok(());
        }
        let key = (
            group.id,
            self.view.group_record(group.id).map_or(0, |record| record.epoch),
        );
        let (members, current) = (group.members(), current(group));
        let reached = voters.intersection(&current).count();
        let ready = voters.difference(&members.voters).all(|id| current.contains(id)) && reached * 2 > voters.len();
        if ready {
            self.orders.possible(key);
            return group.change_membership(voters.clone()).await.map(drop);
        }
        if !self.orders.is_hopeless(key) {
            tokio::time::sleep(LOOK).await;
            return Ok(());
        }
        self.orders.possible(key);
        let Some(record) = self.view.group_record(group.id) else {
            return Ok(());
        };
        let Some(change) = &record.change else { return Ok(()) };
        for id in ids(&change.add) {
            group.remove_learner(id).await?;
        }
        let left = group.members();
        if left.committed && !left.joint {
            let abort = pb::AbortChange {
                group_id: group.id.get(),
                epoch: change.epoch,
                membership: Some(told(&left)),
                why: "a new replica does not answer any more".into(),
            };
            self.tell_catalog("a change that is given up", Op::AbortChange(abort))
                .await;
        }
        Ok(())
    }

    async fn do_duty(&self, group: Group, duty: Duty) -> GroupId {
        let id = group.id;
        let work = async {
            match &duty {
                Duty::Tell(what, op) => {
                    if !self.tell_catalog(what, op.clone()).await {
                        // So that a catalog that says no is not asked again at once.
                        tokio::time::sleep(LOOK).await;
                    }
                    Ok(())
                }
                Duty::AddLearner(replica) => group.add_learner(*replica).await.map(drop),
                Duty::RemoveLearner(replica) => group.remove_learner(*replica).await.map(drop),
                Duty::Change(voters) if id == GroupId::META => group.change_membership(voters.clone()).await.map(drop),
                Duty::Change(voters) => self.change_voters(&group, voters).await,
                Duty::HandOver(to) => group.transfer_leader(*to, TRANSFER).await,
                Duty::Seal(on) => self.seal_shard(&group, on).await.map_err(|e| not_proposed(id, &e)),
                Duty::GiveUpMove(on, why) => {
                    self.give_move_up(&group, on, why.clone()).await;
                    Ok(())
                }
                Duty::Unseal(on) => self.unseal_shard(&group, on).await.map_err(|e| not_proposed(id, &e)),
                Duty::Adopt(on) => self.adopt_shard(&group, on).await.map_err(|e| not_proposed(id, &e)),
            }
        };
        match tokio::time::timeout(CHANGE, work).await {
            Ok(Ok(())) => {
                if let Duty::Change(voters) = &duty
                    && id == GroupId::META
                {
                    tracing::info!(voters = voters.len(), "the meta group's voters were changed");
                }
            }
            Ok(Err(error)) => {
                match error {
                    ChangeError::NotLeader { .. } | ChangeError::InProgress { .. } => {
                        tracing::debug!(group = %id, ?duty, %error, "not done; it is looked at again");
                    }
                    ChangeError::Refused { .. }
                    | ChangeError::TimedOut { .. }
                    | ChangeError::Stopped { .. }
                    | ChangeError::Unknown { .. } => {
                        tracing::warn!(group = %id, ?duty, %error, "not done; it is looked at again");
                    }
                }
                tokio::time::sleep(LOOK).await;
            }
            Err(_) => tracing::warn!(group = %id, ?duty, "not done within {CHANGE:?}; it is looked at again"),
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LogIndex;

    fn set(raw: &[u64]) -> BTreeSet<ReplicaId> {
        ids(raw)
    }

    fn members(voters: &[u64], learners: &[u64]) -> Members {
        Members {
            voters: set(voters),
            learners: set(learners),
            committed: true,
            index: LogIndex::new(9),
            ..Members::default()
        }
    }

    fn record(voters: &[u64], learners: &[u64], remove: &[u64], ready: bool) -> pb::GroupRecord {
        let replica = |role: pb::ReplicaRole| {
            move |id: &u64| pb::ReplicaRecord {
                replica_id: *id,
                node_id: *id,
                role: role.into(),
                ..pb::ReplicaRecord::default()
            }
        };
        let voters = voters.iter().map(replica(pb::ReplicaRole::Voter));
        let change = pb::ReplicaChange {
            epoch: 4,
            add: learners.to_vec(),
            remove: remove.to_vec(),
            ready,
            ..pb::ReplicaChange::default()
        };
        pb::GroupRecord {
            group_id: 7,
            formed: true,
            epoch: 4,
            replicas: voters
                .chain(learners.iter().map(replica(pb::ReplicaRole::Learner)))
                .collect(),
            change: (!learners.is_empty() || !remove.is_empty()).then_some(change),
            ..pb::GroupRecord::default()
        }
    }

    #[test]
    fn a_change_goes_step_by_step_whoever_leads() {
        let own = ReplicaId::new(1);
        let before = record(&[1, 2, 3], &[4], &[3], false);
        let step = |record: &pb::GroupRecord, members: &Members, current: &[u64]| {
            data_duty(record, own, members, &set(current))
        };
        assert_eq!(
            step(&before, &members(&[1, 2, 3], &[]), &[1, 2]),
            Some(Duty::AddLearner(ReplicaId::new(4)))
        );
        assert_eq!(step(&before, &members(&[1, 2, 3], &[4]), &[1, 2]), None, "it is behind");
        let caught_up = step(&before, &members(&[1, 2, 3], &[4]), &[1, 2, 4]);
        assert!(matches!(caught_up, Some(Duty::Tell(_, Op::ReplicaCaughtUp(_)))));
        let ready = record(&[1, 2, 3], &[4], &[3], true);
        assert_eq!(
            step(&ready, &members(&[1, 2, 3], &[4]), &[1, 2, 4]),
            Some(Duty::Change(set(&[1, 2, 4])))
        );
        let joint = Members {
            joint: true,
            ..members(&[1, 2, 3, 4], &[])
        };
        assert_eq!(
            step(&ready, &joint, &[1, 2, 4]),
            Some(Duty::Change(set(&[1, 2, 4]))),
            "whoever began it has ended"
        );
        let entered = Members {
            committed: false,
            ..joint
        };
        assert_eq!(step(&ready, &entered, &[1, 2, 4]), None, "it is under way");
        let done = step(&ready, &members(&[1, 2, 4], &[]), &[1, 2, 4]);
        assert!(matches!(done, Some(Duty::Tell(_, Op::ChangeCommitted(_)))));
        let over = record(&[1, 2, 4], &[], &[], false);
        assert_eq!(step(&over, &members(&[1, 2, 4], &[]), &[1, 2, 4]), None);
        assert_eq!(
            step(&over, &members(&[1, 2, 4], &[9]), &[1, 2, 4]),
            Some(Duty::RemoveLearner(ReplicaId::new(9)))
        );
    }

    #[test]
    fn a_leader_that_is_to_go_hands_over() {
        let ready = record(&[1, 2, 3], &[4], &[1], true);
        let duty = data_duty(&ready, ReplicaId::new(1), &members(&[1, 2, 3], &[4]), &set(&[1, 3, 4]));
        assert_eq!(duty, Some(Duty::HandOver(ReplicaId::new(3))));
    }

    #[test]
    fn a_group_is_formed_when_it_has_the_members_it_should() {
        let mut new = record(&[1, 2, 3], &[], &[], false);
        new.formed = false;
        let own = ReplicaId::new(2);
        assert_eq!(data_duty(&new, own, &members(&[1, 2], &[]), &set(&[1, 2])), None);
        let duty = data_duty(&new, own, &members(&[1, 2, 3], &[]), &set(&[2]));
        assert!(matches!(duty, Some(Duty::Tell(_, Op::GroupFormed(_)))));
    }

    #[test]
    fn the_meta_group_becomes_as_the_catalog_says() {
        let wanted = pb::MetaMembership {
            voters: vec![1, 2, 3],
            learners: vec![4],
            epoch: 1,
        };
        let step = |members: &Members, current: &[u64]| meta_duty(&wanted, members, &set(current));
        assert_eq!(
            step(&members(&[1], &[2]), &[1, 2]),
            Some(Duty::AddLearner(ReplicaId::new(3)))
        );
        assert_eq!(step(&members(&[1], &[2, 3, 4]), &[1, 2]), None, "one is behind");
        assert_eq!(
            step(&members(&[1], &[2, 3, 4]), &[1, 2, 3]),
            Some(Duty::Change(set(&[1, 2, 3])))
        );
        assert_eq!(
            step(&members(&[1, 2, 3], &[4, 5]), &[1, 2, 3]),
            Some(Duty::RemoveLearner(ReplicaId::new(5)))
        );
        assert_eq!(step(&members(&[1, 2, 3], &[4]), &[1, 2, 3]), None);
    }
}
