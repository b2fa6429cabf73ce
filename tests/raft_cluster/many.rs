//! Many groups over one connection for each direction of a pair of nodes.

use mainstem::model::GroupId;

use super::lab::*;

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_groups_share_the_connections() {
    let mut lab = Lab::new(3, Settings::default()).await;
    let groups: Vec<GroupId> = (100..164).map(GroupId::new).collect();
    for group in &groups {
        lab.found(*group, 3).await;
    }
    let work = groups.iter().map(|group| lab.publish(*group, 0..8, 2_000));
    futures_util::future::join_all(work).await;
    for group in &groups {
        lab.converge(*group).await;
        lab.holds(0, *group, 0..8);
    }
    for node in lab.running() {
        let links = node.peers.links();
        assert!(links.len() <= 2 && links.iter().all(|l| l.up), "{links:?}");
    }
    lab.end().await;
}
