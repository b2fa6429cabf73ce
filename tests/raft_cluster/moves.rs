//! A shard goes from one group to another on the same nodes, also on those that were not there.

use mainstem::machine::GroupOutcome;
use mainstem::model::{GroupId, LogIndex};
use mainstem::raft::{Applied, Origin};
use mainstem::wire::internal as pb;

use super::lab::*;

const HEIR: GroupId = GroupId::new(8);
const SHARD: mainstem::model::ShardId = SHARD_OF(GROUP);

async fn seal(lab: &Lab) -> pb::Seal {
    let op = pb::group_command::Op::SealShard(pb::SealShard {
        shard_id: SHARD.get(),
        to_group: HEIR.get(),
        move_id: 1,
    });
    let (index, applied) = lab.propose(GROUP, command(op)).await;
    let Applied::Command(GroupOutcome::Sealed { tail, digest, .. }) = applied else {
        panic!("not sealed: {applied:?}");
    };
    pb::Seal {
        index: index.get(),
        tail: tail.get(),
        digest,
    }
}

async fn adopt(lab: &Lab, seal: pb::Seal) -> LogIndex {
    let op = pb::group_command::Op::AdoptShard(pb::AdoptShard {
        shard_id: SHARD.get(),
        from_group: GROUP.get(),
        move_id: 1,
        seal: Some(seal),
    });
    let (index, applied) = lab.propose(HEIR, command(op)).await;
    assert!(
        matches!(applied, Applied::Command(GroupOutcome::Adopted { .. })),
        "not adopted: {applied:?}"
    );
    index
}

/// Publishes to the shard in its new group.
async fn publish_in_heir(lab: &Lab, range: std::ops::Range<u64>) {
    for n in range {
        let (_, applied) = lab.propose(HEIR, publish(SHARD, n, 300)).await;
        assert!(
            matches!(applied, Applied::Command(GroupOutcome::Published(_))),
            "{applied:?}"
        );
    }
}

/// Raises the floor of a group on a node, and waits until its log does not reach back behind it.
async fn purge_to(lab: &Lab, at: usize, id: GroupId, floor: LogIndex) {
    let (group, groups) = (lab.node(at).group(id), &lab.node(at).groups);
    group.set_floor(floor);
    for _ in 0..100 {
        groups.purge_to_floors().await;
        if !group.is_below_floor() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(!group.is_below_floor(), "{:?}", group.log().purged());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_adopts_when_its_own_copy_is_sealed() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    lab.found(HEIR, 3).await;
    lab.publish(GROUP, 0..20, 300).await;
    let away = (0..3)
        .find(|at| !lab.node(*at).group(GROUP).status().is_leader)
        .unwrap();
    lab.kill(away).await;
    lab.publish(GROUP, 20..40, 300).await;
    let sealed = seal(&lab).await;
    // What comes too late did not happen.
    let (_, late) = lab.propose(GROUP, publish(SHARD, 99, 300)).await;
    assert!(
        matches!(late, Applied::Command(GroupOutcome::Moved { to }) if to == HEIR),
        "{late:?}"
    );
    adopt(&lab, sealed).await;
    publish_in_heir(&lab, 40..60).await;
    // The new group's replica is there first: it waits for the other one.
    lab.start(away).await;
    for group in [HEIR, GROUP] {
        let id = replica(group, away as u64 + 1);
        let groups = &lab.node(away).groups;
        groups.start_as(group, id, Origin::Restart).await.unwrap();
    }
    lab.converge(GROUP).await;
    lab.converge(HEIR).await;
    for at in 0..3 {
        lab.holds(at, GROUP, 0..60);
        let face = lab.node(at).groups.directory().get(SHARD).unwrap();
        assert_eq!((face.group(), face.heir()), (HEIR, None), "node {at}");
    }
    // It is where it was after a restart of everything. Nothing was flushed: the adoption is applied again, and when its
    // group starts the other one, which has the seal, does not run yet.
    for at in 0..3 {
        lab.kill(at).await;
        lab.start(at).await;
        for group in [HEIR, GROUP] {
            let id = replica(group, at as u64 + 1);
            let started = lab.node(at).groups.start_as(group, id, Origin::Restart);
            let started = tokio::time::timeout(PATIENCE, started).await;
            started.expect("a start waits for no other group").unwrap();
        }
    }
    publish_in_heir(&lab, 60..70).await;
    lab.converge(HEIR).await;
    lab.holds(away, GROUP, 0..70);
    lab.end().await;
}

/// The node that was away has the seal, and its log lacks what came after. The snapshot of the former group, from where the
/// shard has been adopted, does not contain it; nor is a shard sent that is sealed.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_the_former_group_leaves_what_is_sealed() {
    let settings = Settings {
        keep: mainstem::raft::LogKeep {
            leader_bytes: 1,
            follower_bytes: 1,
        },
        ..Settings::default()
    };
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    lab.found(HEIR, 3).await;
    lab.publish(GROUP, 0..20, 300).await;
    let sealed = seal(&lab).await;
    lab.converge(GROUP).await;
    let leader = |group: GroupId| (0..3).find(|at| lab.node(*at).group(group).status().is_leader).unwrap();
    let away = (0..3).find(|at| ![leader(GROUP), leader(HEIR)].contains(at)).unwrap();
    lab.node(away).flush().await;
    lab.kill(away).await;
    adopt(&lab, sealed).await;
    publish_in_heir(&lab, 20..30).await;
    // The former group goes on with other things until its log does not reach back.
    let other = mainstem::model::ShardId::new(999);
    lab.propose(GROUP, create_shard(other)).await;
    let last = lab
        .node(lab.leader(GROUP).await)
        .group(GROUP)
        .status()
        .last_log
        .unwrap();
    for at in (0..3).filter(|at| *at != away) {
        purge_to(&lab, at, GROUP, last).await;
    }
    lab.start(away).await;
    let start = async |group| {
        let id = replica(group, away as u64 + 1);
        let groups = &lab.node(away).groups;
        groups.start_as(group, id, Origin::Restart).await.unwrap()
    };
    let former = start(GROUP).await;
    until("it has taken a snapshot", || {
        former.log().purged().is_some_and(|purged| purged.index >= last.get())
    })
    .await;
    lab.holds(away, GROUP, 0..20);
    drop((former, start(HEIR).await));
    lab.converge(HEIR).await;
    lab.converge(GROUP).await;
    for at in 0..3 {
        lab.holds(at, GROUP, 0..30);
        let face = lab.node(at).groups.directory().get(SHARD).unwrap();
        assert_eq!((face.group(), face.heir()), (HEIR, None), "node {at}");
    }
    lab.end().await;
}

/// A shard that went on to other nodes, and was sealed here while this node was away.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sealed_and_is_left_is_removed() {
    let mut lab = Lab::new(1, Settings::default()).await;
    lab.found(GROUP, 1).await;
    let (other, groups) = (mainstem::model::ShardId::new(999), lab.node(0).groups.clone());
    lab.propose(GROUP, create_shard(other)).await;
    lab.publish(GROUP, 0..20, 300).await;
    let start = async || {
        let id = replica(GROUP, 1);
        groups.start_as(GROUP, id, Origin::Restart).await.unwrap();
    };
    // One that is open is not touched.
    groups.drop_sealed(GROUP, SHARD).await.unwrap();
    start().await;
    lab.converge(GROUP).await;
    lab.holds(0, GROUP, 0..20);
    seal(&lab).await;
    groups.drop_sealed(GROUP, SHARD).await.unwrap();
    for _ in 0..2 {
        start().await;
        lab.converge(GROUP).await;
        assert!(groups.directory().get(SHARD).is_none());
        assert!(groups.directory().get(other).is_some());
        let (_, late) = lab.propose(GROUP, publish(SHARD, 99, 300)).await;
        assert!(matches!(late, Applied::Command(GroupOutcome::NoShard)), "{late:?}");
        groups.stop(GROUP).await;
    }
    drop(groups);
    lab.end().await;
}

/// While a shard of it is sealed and not adopted, a group's state is given to nobody; afterwards it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_shard_is_not_sent() {
    let mut lab = Lab::new(1, Settings::default()).await;
    lab.found(GROUP, 1).await;
    lab.found(HEIR, 1).await;
    lab.publish(GROUP, 0..20, 300).await;
    let sealed = seal(&lab).await;
    let new = lab.add().await;
    let learner = replica(GROUP, new as u64 + 1);
    let groups = lab.node(new).groups.clone();
    let floor = LogIndex::new(sealed.index);
    let joined = groups.start_at(GROUP, learner, Origin::Join, floor).await.unwrap();
    let leader = lab.node(0).group(GROUP);
    purge_to(&lab, 0, GROUP, floor).await;
    leader.add_learner(learner).await.unwrap();
    let early = leader.wait_caught_up(learner, std::time::Duration::from_secs(1)).await;
    assert!(early.is_err(), "it has got a shard that is sealed");
    assert_eq!(joined.status().last_applied, None);
    adopt(&lab, sealed).await;
    leader.wait_caught_up(learner, PATIENCE).await.unwrap();
    lab.converge(GROUP).await;
    assert!(lab.node(new).groups.directory().get(SHARD).is_none());
    drop((leader, joined));
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_replica_begins_with_entries_below_the_floor() {
    let mut lab = Lab::new(1, Settings::default()).await;
    lab.found(GROUP, 1).await;
    lab.found(HEIR, 1).await;
    lab.publish(GROUP, 0..20, 300).await;
    let sealed = seal(&lab).await;
    let floor = adopt(&lab, sealed).await;
    publish_in_heir(&lab, 20..30).await;
    let new = lab.add().await;
    let learner = replica(HEIR, new as u64 + 1);
    let groups = lab.node(new).groups.clone();
    let joined = groups.start_at(HEIR, learner, Origin::Join, floor).await.unwrap();
    let leader = lab.node(0).group(HEIR);
    leader.add_learner(learner).await.unwrap();
    // The adoption is still in the leader's log, from the beginning on; now it goes.
    assert_eq!(leader.log().purged(), None);
    publish_in_heir(&lab, 30..40).await;
    leader.set_floor(floor);
    assert!(leader.is_below_floor());
    purge_to(&lab, 0, HEIR, floor).await;
    leader.wait_caught_up(learner, PATIENCE).await.unwrap();
    lab.converge(HEIR).await;
    lab.holds(new, GROUP, 0..40);
    let begins = joined.log().purged().expect("it has taken a snapshot");
    assert!(begins.index >= floor.get(), "{begins:?}, {floor}");
    drop((leader, joined));
    lab.end().await;
}

/// After a start what is durable counts as the newest snapshot, and nothing is written that would make another one.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_replica_that_was_started_again_goes_to_its_floor_though_nothing_is_written() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    let at = (lab.leader(GROUP).await + 1) % 3;
    let applied = |lab: &Lab| lab.node(at).group(GROUP).status().last_applied.unwrap();
    lab.publish(GROUP, 0..10, 300).await;
    lab.converge(GROUP).await;
    purge_to(&lab, at, GROUP, applied(&lab)).await;
    lab.publish(GROUP, 10..20, 300).await;
    lab.converge(GROUP).await;
    lab.node(at).flush().await;
    lab.kill(at).await;
    lab.restart(at, GROUP).await;
    lab.converge(GROUP).await;
    purge_to(&lab, at, GROUP, applied(&lab)).await;
    lab.holds(at, GROUP, 0..20);
    lab.end().await;
}

/// What a replica leaves is removed, and another one begins anew; the old one never comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_another_replica_of_a_group_that_it_has_left() {
    let mut lab = Lab::new(2, Settings::default()).await;
    lab.found(GROUP, 1).await;
    lab.publish(GROUP, 0..20, 300).await;
    let old = replica(GROUP, 2);
    let groups = lab.node(1).groups.clone();
    groups.start_as(GROUP, old, Origin::Join).await.unwrap();
    let leader = lab.node(0).group(GROUP);
    leader.add_learner(old).await.unwrap();
    leader.wait_caught_up(old, PATIENCE).await.unwrap();
    lab.converge(GROUP).await;
    leader.remove_learner(old).await.unwrap();
    groups.clear_out(GROUP).await.unwrap();
    assert!(groups.left_here().is_empty(), "{:?}", groups.left_here());
    assert!(lab.node(1).export(GROUP).await.is_empty());
    let back = groups.start_as(GROUP, old, Origin::Join).await;
    assert!(back.err().unwrap().to_string().contains("does not come back"));
    lab.publish(GROUP, 20..30, 300).await;
    let new = mainstem::model::ReplicaId::new(old.get() + 50);
    for node in lab.running() {
        node.map.set_replica(new, lab.node(1).id);
    }
    groups.start_as(GROUP, new, Origin::Join).await.unwrap();
    leader.add_learner(new).await.unwrap();
    leader.wait_caught_up(new, PATIENCE).await.unwrap();
    lab.converge(GROUP).await;
    lab.holds(1, GROUP, 0..30);
    assert_eq!(groups.left_here(), [(GROUP, Some(new))]);
    drop((leader, groups));
    lab.end().await;
}
