//! Everything that is stored, read at every node, and again from the disks of nodes that have stopped, held against the
//! history.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstem::model::Sequence;
use mainstem::storage::{Store, StoreOptions};

use super::harness::api::{Api, Read};
use super::harness::history::{Tally, same};
use super::harness::{Cluster, History, PATIENCE};

/// Reads a stream at a node; what did not work is tried again, also where the node starts itself again meanwhile.
pub async fn read_all(cluster: &Cluster, i: usize, stream: &str) -> Vec<Read> {
    let begun = Instant::now();
    loop {
        let read = async {
            let api = Api::connect(&cluster[i].client_addr())
                .await
                .map_err(|e| e.to_string())?;
            Ok::<_, String>(api.read_all(stream).await)
        };
        let failure = match tokio::time::timeout(PATIENCE, read).await.expect("an answer") {
            Ok(Ok(all)) => return all,
            Ok(Err(failure)) => {
                let may_work = failure.retry != "cannot_work";
                assert!(may_work, "{stream} at node {i}: {failure:?}\n{}", cluster[i].log());
                format!("{failure:?}")
            }
            Err(failure) => failure,
        };
        assert!(
            begun.elapsed() < PATIENCE,
            "{stream} cannot be read at node {i}: {failure}\n{}",
            cluster[i].log()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Every node serves the same, and it is what the history says.
pub async fn at_every_node(cluster: &Cluster, history: &History, streams: &[String]) -> Result<Tally, Vec<String>> {
    let mut sum = Tally::default();
    let mut wrong = Vec::new();
    for stream in streams {
        let mut first: Option<(String, Vec<Read>)> = None;
        for i in (0..cluster.nodes.len()).filter(|i| cluster[*i].was_launched()) {
            let stored = read_all(cluster, i, stream).await;
            match history.check(stream, &stored) {
                Ok(tally) if first.is_none() => sum.add(&tally),
                Ok(_) => {}
                Err(what) => wrong.extend(what.into_iter().map(|w| format!("at node {i}: {w}"))),
            }
            match &first {
                None => first = Some((format!("node {i}"), stored)),
                Some((name, there)) => {
                    wrong.extend(same(stream, (name, there), (&format!("node {i}"), &stored)).err());
                }
            }
        }
    }
    if wrong.is_empty() { Ok(sum) } else { Err(wrong) }
}

/// Digest of each batch on a disk, by shard and first sequence.
type Copy = BTreeMap<u64, BTreeMap<u64, u128>>;

/// What the disks of stopped nodes hold, replica by replica, is the same wherever two of them hold something. Returns
/// how many batches were compared.
pub fn on_disk(cluster: &mut Cluster) -> Result<u64, Vec<String>> {
    let mut copies: Vec<Copy> = Vec::new();
    for (i, node) in cluster.nodes.iter_mut().enumerate() {
        assert!(!node.runs(), "node {i} runs");
        // One that was replaced holds what its damaged disk holds.
        copies.push(if node.is_retired() {
            Copy::new()
        } else {
            copy(node.data())?
        });
    }
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for (i, a) in copies.iter().enumerate() {
        for (j, b) in copies.iter().enumerate().skip(i + 1) {
            for (shard, here) in a {
                let Some(there) = b.get(shard) else { continue };
                for (base, digest) in here {
                    match there.get(base) {
                        Some(other) if other == digest => compared += 1,
                        other => wrong.push(format!(
                            "shard {shard}, batch at {base}: {digest:x} on the disk of node {i}, {other:x?} of node {j}"
                        )),
                    }
                }
                if here.len() != there.len() {
                    wrong.push(format!(
                        "shard {shard}: {} batches on the disk of node {i}, {} of node {j}",
                        here.len(),
                        there.len()
                    ));
                }
            }
        }
    }
    wrong.truncate(20);
    if wrong.is_empty() { Ok(compared) } else { Err(wrong) }
}

fn copy(data: &std::path::Path) -> Result<Copy, Vec<String>> {
    let store: Arc<Store> =
        Store::open(StoreOptions::new(data), None).map_err(|e| vec![format!("{}: {e}", data.display())])?;
    let mut copy = Copy::new();
    for (shard, _, _) in store.state().shards().map_err(|e| vec![e.to_string()])? {
        let batches = copy.entry(shard.get()).or_default();
        for batch in store.state().batches(shard, Sequence::FIRST) {
            let batch = batch.map_err(|e| vec![format!("{shard}: {e}")])?;
            batches.insert(
                batch.base.get(),
                xxhash_rust::xxh3::xxh3_128(format!("{batch:?}").as_bytes()),
            );
        }
    }
    store.close().map_err(|e| vec![e.to_string()])?;
    Ok(copy)
}
