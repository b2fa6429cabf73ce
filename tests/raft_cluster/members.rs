//! Members are added, made voters, removed; leadership is handed over.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mainstem::base::RetryClass;
use mainstem::raft::{ChangeError, Origin};

use super::lab::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_fourth_replica_learns_votes_and_the_first_one_goes() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..40, 300).await;

    let new = lab.add().await;
    let fourth = replica(GROUP, 4);
    let joining = lab
        .node(new)
        .groups
        .start_as(GROUP, fourth, Origin::Join)
        .await
        .unwrap();
    assert_eq!(joining.status().leader, None);
    let refused = lab
        .node(new)
        .groups
        .start_as(GROUP, replica(GROUP, 9), Origin::Join)
        .await;
    assert!(refused.is_err(), "two replicas of a group on one node");

    let leader = lab.leader(GROUP).await;
    let group = lab.node(leader).group(GROUP);
    group.add_learner(fourth).await.unwrap();
    assert!(group.members().learners.contains(&fourth));
    group.wait_caught_up(fourth, PATIENCE).await.unwrap();
    lab.converge(GROUP).await;

    // The leader itself goes: it tells the others first, and another one leads.
    let gone = replica(GROUP, leader as u64 + 1);
    let voters: BTreeSet<_> = (1..=4).map(|n| replica(GROUP, n)).filter(|r| *r != gone).collect();
    group.change_membership(voters.clone()).await.unwrap();
    until("the removed leader is stopped", || {
        lab.node(leader).groups.get(GROUP).is_none()
    })
    .await;
    lab.publish(GROUP, 40..60, 300).await;
    lab.converge(GROUP).await;
    lab.holds(new, GROUP, 0..60);
    let now = lab.leader(GROUP).await;
    assert_ne!(now, leader);
    let group = lab.node(now).group(GROUP);
    until("the report has every answer", || {
        let replicas = group.report().replicas;
        replicas.iter().all(|r| r.voter && r.lag == 0 && r.matched.is_some())
    })
    .await;
    let report = group.report();
    drop(group);
    assert_eq!(report.members.voters, voters);
    assert!(!report.members.joint && report.members.learners.is_empty());
    assert_eq!(report.replicas.len(), 3);
    assert!(report.last_quorum_ack.is_some_and(|a| a < PATIENCE));
    assert_eq!(report.leader.leader, Some(replica(GROUP, now as u64 + 1)));
    // The group goes on without one of its new members.
    let other = (0..4).find(|at| *at != leader && *at != now).unwrap();
    lab.kill(other).await;
    lab.publish(GROUP, 60..70, 300).await;
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_a_reason() {
    let mut lab = Lab::new(2, Settings::default()).await;
    lab.found(GROUP, 2).await;
    let leader = lab.leader(GROUP).await;
    let group = lab.node(leader).group(GROUP);
    let unknown = BTreeSet::from([replica(GROUP, 1), replica(GROUP, 2), replica(GROUP, 3)]);
    let error = group.change_membership(unknown).await.unwrap_err();
    assert!(matches!(error, ChangeError::Refused { .. }), "{error}");
    assert_eq!(error.retry_class(), RetryClass::CannotWork);
    let error = group.transfer_leader(replica(GROUP, 9), PATIENCE).await.unwrap_err();
    assert!(matches!(error, ChangeError::Refused { .. }), "{error}");
    let follower = lab.node(1 - leader).group(GROUP);
    let error = follower.add_learner(replica(GROUP, 3)).await.unwrap_err();
    assert!(
        matches!(error, ChangeError::NotLeader { leader: Some(l), .. } if l == replica(GROUP, leader as u64 + 1)),
        "{error}"
    );
    let store = lab.add().await;
    let none = lab
        .node(store)
        .groups
        .start_as(GROUP, replica(GROUP, 3), Origin::Restart)
        .await;
    assert!(none.err().unwrap().to_string().contains("no log"));
    drop((group, follower));
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_handed_over_without_loss() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..20, 300).await;
    let mut taken = Vec::new();
    for round in 0..6 {
        let leader = lab.leader(GROUP).await;
        let to = replica(GROUP, (leader as u64 + 1) % 3 + 1);
        let group = lab.node(leader).group(GROUP);
        let begun = Instant::now();
        if round % 2 == 0 {
            group.transfer_leader(to, PATIENCE).await.unwrap();
            taken.push(begun.elapsed());
            assert_eq!(group.status().leader, Some(to));
        } else {
            group.step_down(PATIENCE).await.unwrap();
            taken.push(begun.elapsed());
            assert!(!group.status().is_leader);
        }
        lab.publish(GROUP, 20 + round * 5..25 + round * 5, 300).await;
    }
    taken.sort();
    println!("hand-overs took {taken:?}");
    assert!(taken[0] < Duration::from_secs(5), "{taken:?}");
    lab.converge(GROUP).await;
    for at in 0..3 {
        lab.holds(at, GROUP, 0..50);
    }
    lab.end().await;
}
