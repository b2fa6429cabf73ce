//! Crash rounds: publish under load, die, come back, and everything that was acknowledged must be there, once, in
//! order, unchanged.
//!
//! `ROUNDS` and `SEED` come from the environment: `make torture ROUNDS=100 SEED=7`.
#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::load::{Load, Shape};
use harness::{History, Node, Options, seed, setting};
use mainstem::wire::v1;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const STREAMS: [&str; 2] = ["one", "many"];

async fn streams(node: &Node) -> Vec<v1::Stream> {
    let api = node.api().await;
    vec![
        api.create_simple(STREAMS[0], 1).await,
        api.create_simple(STREAMS[1], 4).await,
    ]
}

/// Reads everything back and compares it with the history.
async fn verify(node: &Node, history: &History) -> Result<String, Vec<String>> {
    let api = node.api().await;
    let mut told = String::new();
    for stream in STREAMS {
        let stored = api
            .read_all(stream)
            .await
            .map_err(|e| vec![format!("reading {stream}: {e:?}")])?;
        let tally = history.check(stream, &stored)?;
        told += &format!(
            " {stream}: {} messages, {} batches known, {} unknown there, {} not",
            tally.messages, tally.acked_batches, tally.unknown_there, tally.unknown_absent
        );
    }
    Ok(told)
}

fn shape_of_round(round: u64) -> Shape {
    // Now and then enough to fill memory tables, so that flushes and compactions are hit too.
    if round % 10 == 3 {
        Shape {
            records_max: 60,
            payload_max: 60_000,
        }
    } else {
        Shape::default()
    }
}

/// Every other start, roughly, with buffers so small that flushes, compactions and purges of the log happen all the time.
fn buffers(rng: &mut StdRng) -> Vec<String> {
    let small = [
        "--storage-log-write-buffer",
        "16MiB",
        "--storage-state-write-buffer",
        "4MiB",
        "--storage-flush-interval",
        "100ms",
        "--storage-blob-file",
        "1MiB",
    ];
    match rng.random_bool(0.5) {
        true => small.map(String::from).to_vec(),
        false => Vec::new(),
    }
}

/// Everything stored is read and compared in each round: beyond this a new node takes over.
const BATCHES_MAX: u64 = 60_000;

#[tokio::test(flavor = "multi_thread")]
async fn kill_rounds() {
    let (rounds, seed) = (setting("ROUNDS", 4), seed("kill_rounds"));
    let mut rng = StdRng::seed_from_u64(seed);
    let mut node = Node::start(Options::plain()).await;
    let mut history = Arc::new(History::default());
    let mut load = Load::new(history.clone(), &streams(&node).await, seed, Shape::default());
    let mut slowest = Duration::ZERO;
    let mut acked = 0;
    for round in 1..=rounds {
        if history.acked_batches() > BATCHES_MAX {
            acked += history.acked_batches();
            node = Node::start(Options::plain()).await;
            history = Arc::new(History::default());
            load = Load::new(history.clone(), &streams(&node).await, rng.random(), Shape::default());
        }
        load.shape(shape_of_round(round));
        let running = load.start(&node.client_addr());
        history
            .wait_acked(history.acked_batches() + rng.random_range(1..400))
            .await;
        node.kill9().await;
        (load, _) = running.join().await;
        node.options.flags = buffers(&mut rng);
        if rng.random_bool(0.3) {
            // It dies again on its way up.
            node.launch();
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..60_000))).await;
            node.kill9().await;
        }
        node.restart().await;
        slowest = slowest.max(node.ready_in);
        match verify(&node, &history).await {
            Ok(told) => println!("round {round}/{rounds}: ready in {:?},{told}", node.ready_in),
            Err(wrong) => panic!("SEED={seed} round {round}: {wrong:#?}"),
        }
    }
    println!(
        "kill_rounds: {rounds} rounds, {} batches acknowledged, slowest start {slowest:?}",
        acked + history.acked_batches()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn power_rounds() {
    let (rounds, seed) = (setting("ROUNDS", 4), seed("power_rounds"));
    let mut rng = StdRng::seed_from_u64(seed);
    let mut node = Node::start(Options::powered()).await;
    let mut history = Arc::new(History::default());
    let mut load = Load::new(history.clone(), &streams(&node).await, seed, Shape::default());
    let mut acked = 0;
    for round in 1..=rounds {
        if history.acked_batches() > BATCHES_MAX {
            acked += history.acked_batches();
            node = Node::start(Options::powered()).await;
            history = Arc::new(History::default());
            load = Load::new(history.clone(), &streams(&node).await, rng.random(), Shape::default());
        }
        load.shape(shape_of_round(round));
        node.faults(&format!(
            "power-fail-after {} {}",
            rng.random_range(20..4_000),
            rng.random::<u64>()
        ));
        let running = load.start(&node.client_addr());
        let status = node.wait_exit().await;
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "{status}\n{}",
            node.log()
        );
        (load, _) = running.join().await;
        let accident = node.log();
        node.options.flags = buffers(&mut rng);
        if rng.random_bool(0.3) {
            // The power fails again while the node recovers.
            node.options.run = vec![format!(
                "power-fail-after {} {}",
                rng.random_range(1..80),
                rng.random::<u64>()
            )];
            node.launch();
            if node.try_ready().await.is_ok() {
                node.power_fail(rng.random()).await;
            }
            node.options.run.clear();
        }
        node.launch();
        if let Err(status) = node.try_ready().await {
            panic!(
                "SEED={seed} round {round}: no start after a power failure: {status}\n{accident}\n{}",
                node.log()
            );
        }
        match verify(&node, &history).await {
            Ok(told) => println!("round {round}/{rounds}: ready in {:?},{told}", node.ready_in),
            Err(wrong) => panic!("SEED={seed} round {round}: {wrong:#?}\n{accident}"),
        }
        node.faults("audit");
    }
    println!(
        "power_rounds: {rounds} rounds, {} batches acknowledged",
        acked + history.acked_batches()
    );
}

/// The rounds above would find a loss: on a disk that says it synced and did not, they do. Either acknowledged
/// messages are missing and the check says so, or the node itself notices and refuses to start.
#[tokio::test(flavor = "multi_thread")]
async fn a_lying_disk_is_noticed() {
    let seed = seed("a_lying_disk_is_noticed");
    let mut rng = StdRng::seed_from_u64(seed);
    let rounds = 6;
    let mut noticed = 0;
    for _ in 0..rounds {
        let mut node = Node::start(Options::powered()).await;
        let history = Arc::new(History::default());
        let load = Load::new(
            history.clone(),
            &streams(&node).await,
            rng.random::<u32>().into(),
            Shape::default(),
        );
        node.faults("syncs-lie on");
        let running = load.start(&node.client_addr());
        history.wait_acked(200).await;
        node.power_fail(rng.random()).await;
        running.join().await;
        node.launch();
        let fine = match node.try_ready().await {
            Ok(()) => verify(&node, &history).await.is_ok(),
            Err(_) => false,
        };
        noticed += u32::from(!fine);
    }
    assert!(noticed > 0, "SEED={seed}: {rounds} disks lied and nobody noticed");
    println!("{noticed} of {rounds} lying disks noticed");
}
