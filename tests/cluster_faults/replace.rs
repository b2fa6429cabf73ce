//! What an operator does when a node's disk cannot be used any more: take the node out, let another one join.

use std::time::{Duration, Instant};

use mainstem::wire::v1;

use super::harness::{Api, Cluster, PATIENCE, until};

/// Takes node `i` out of the cluster by force, and lets a new node with an empty disk join.
pub async fn replace(cluster: &mut Cluster, i: usize) {
    if cluster[i].ended().await.is_none() && cluster[i].was_launched() {
        cluster.kill(i).await;
    }
    cluster[i].retire();
    let name = format!("node-{}", i + 1);
    let begun = Instant::now();
    let mut told = String::new();
    let awake = cluster.awake();
    until("the node is removed", async || {
        for at in &awake {
            let asked = async {
                let api = Api::connect(&cluster[*at].client_addr()).await.ok()?;
                let order = v1::RemoveNodeRequest {
                    node: name.clone(),
                    force: true,
                    ..v1::RemoveNodeRequest::default()
                };
                Some(api.cluster().remove_node(order).await)
            };
            match tokio::time::timeout(Duration::from_secs(10), asked).await {
                Ok(Some(Ok(_))) => return true,
                Ok(Some(Err(e))) if told != e.message() => {
                    println!("{name} is not removed: {}", e.message());
                    told = e.message().to_string();
                }
                Ok(Some(Err(_)) | None) | Err(_) => {}
            }
        }
        false
    })
    .await;
    let through = *awake.first().expect("a node to ask");
    cluster.join_through(through).await;
    println!(
        "{name} was replaced by node {} after {:.1?}",
        cluster.nodes.len() - 1,
        begun.elapsed()
    );
}

/// Waits until the cluster is well. A victim that runs and does not get well by itself is replaced.
pub async fn get_well(cluster: &mut Cluster, victims: &[usize]) {
    let begun = Instant::now();
    loop {
        let wrong = cluster.wrong().await;
        if wrong.is_empty() {
            return;
        }
        for &i in victims {
            let alive = !cluster[i].is_retired();
            if alive && cluster[i].ended().await.is_some() {
                println!("node {i} has ended: {}", cluster[i].last_words());
                replace(cluster, i).await;
            } else if alive && begun.elapsed() > PATIENCE / 3 {
                println!(
                    "node {i} is not well after {:.0?}, and is replaced: {wrong}",
                    begun.elapsed()
                );
                replace(cluster, i).await;
            }
        }
        assert!(
            begun.elapsed() < 2 * PATIENCE,
            "not well after {:?}:\n{wrong}",
            begun.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
