//! Random schedules of accidents under load: nothing that was acknowledged is lost, doubled or reordered, no read is
//! stale, and when all is mended the cluster is well again by itself.
//!
//! `ROUNDS` and `SEED` come from the environment; a round's own seed is printed, and `ROUNDS=1 SEED=…` runs it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstem::wire::v1;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::harness::crowd::CONTENDED;
use super::harness::net::Link;
use super::harness::{Api, Cluster, Crowd, History, Options, PATIENCE, damage, seed, setting};
use super::replace::{get_well, replace};
use super::schedule::{Schedule, Step};
use super::verify;

fn spec(name: &str, replicas: u32, shards: u32, dedicated: bool) -> v1::StreamSpec {
    v1::StreamSpec {
        name: name.into(),
        replicas,
        shards,
        dedicated,
        ..v1::StreamSpec::default()
    }
}

/// Replicated in a group of its own, replicated in the pool, over two shards, contended for, and, where no disk is given
/// up, on one node alone.
pub async fn streams(cluster: &Cluster, single: bool) -> Vec<v1::Stream> {
    let api = cluster[0].api().await;
    let mut streams = Vec::new();
    for spec in [
        spec("own", 3, 1, true),
        spec("pooled", 3, 1, false),
        spec("wide", 3, 2, false),
        spec(CONTENDED, 3, 1, true),
        spec("single", 1, 1, false),
    ]
    .into_iter()
    .filter(|spec| single || spec.replicas > 1)
    {
        let begun = Instant::now();
        streams.push(loop {
            match api.create(spec.clone()).await {
                Ok(stream) => break stream,
                Err(e) => assert!(
                    e.retry != "cannot_work" && begun.elapsed() < PATIENCE,
                    "{e:?}, {:?}, {}",
                    api.stream(&spec.name).await,
                    cluster[0].log()
                ),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        });
    }
    streams
}

pub fn name_of(stream: &v1::Stream) -> String {
    stream.spec.as_ref().unwrap().name.clone()
}

async fn step_down(cluster: &mut Cluster, stream: &str) -> String {
    let Some(at) = cluster.awake().first().copied() else {
        return "nobody to ask".into();
    };
    let shard = v1::ShardAddress {
        namespace: String::new(),
        stream: stream.into(),
        index: 0,
    };
    let order = v1::StepDownRequest {
        target: Some(v1::step_down_request::Target::Shard(shard)),
        to_node: String::new(),
    };
    let asked = async {
        let api = Api::connect(&cluster[at].client_addr()).await.ok()?;
        Some(api.cluster().step_down(order).await)
    };
    match tokio::time::timeout(Duration::from_secs(3), asked).await {
        Ok(Some(Ok(done))) => {
            let done = done.into_inner();
            format!("node {} to node {}", done.from_node - 1, done.to_node - 1)
        }
        Ok(Some(Err(e))) => e.message().to_string(),
        Ok(None) | Err(_) => "no answer".into(),
    }
}

/// Lets one step happen; tells what came of it.
async fn take(cluster: &mut Cluster, step: &Step, streams: &[v1::Stream], rng: &mut StdRng) -> String {
    // One whose disk is damaged may have ended by itself.
    if let Step::Kill(i) | Step::Pause(i) | Step::SlowDisk(i, _) | Step::ClockJump(i, _) = step {
        cluster[*i].ended().await;
        if !cluster[*i].runs() {
            return "it has ended".into();
        }
    }
    match step {
        Step::Kill(i) => cluster.kill(*i).await,
        Step::PowerFail(which) => {
            let mut hit = Vec::new();
            for &i in which {
                cluster[i].ended().await;
                if cluster[i].runs() {
                    hit.push(i);
                }
            }
            cluster.power_fail(&hit, rng.random::<u32>().into()).await;
        }
        Step::Start(i) => cluster[*i].launch(),
        Step::Pause(i) => cluster.pause(*i),
        Step::Resume(i) => cluster.resume(*i),
        Step::Isolate(i, how) => cluster.isolate(*i, *how),
        Step::Partition(groups, how) => {
            let groups: Vec<&[usize]> = groups.iter().map(Vec::as_slice).collect();
            cluster.partition(&groups, *how);
        }
        Step::Cut(from, to) => cluster.cut(*from, *to),
        Step::Worsen(from, to, delay, loss) => {
            let link = Link {
                delay: *delay,
                loss: *loss,
                ..Link::default()
            };
            cluster.link(*from, *to, link);
        }
        Step::Reconnect => cluster.reconnect(),
        Step::SlowDisk(i, by) => cluster.slow_disk(*i, *by),
        Step::ClockJump(i, by) => cluster.clock_jump(*i, *by),
        Step::Flip(i, part) => {
            let data = stopped(cluster, *i).await;
            return damage::flip_bit(&data, *part, rng).unwrap_or("nothing there".into());
        }
        Step::Truncate(i, part) => {
            let data = stopped(cluster, *i).await;
            return damage::truncate(&data, *part, rng).unwrap_or("nothing there".into());
        }
        Step::Wipe(i) => {
            stopped(cluster, *i).await;
            cluster.wipe(*i);
        }
        Step::StepDown(n) => {
            let stream = name_of(&streams[n % streams.len()]);
            return format!("{stream}: {}", step_down(cluster, &stream).await);
        }
    }
    String::new()
}

/// Kills a node if it runs; returns where its data is.
async fn stopped(cluster: &mut Cluster, i: usize) -> std::path::PathBuf {
    cluster[i].ended().await;
    if cluster[i].runs() {
        cluster.kill(i).await;
    }
    cluster[i].data().to_path_buf()
}

/// Ends every trouble. Returns which of the victims did not come back.
async fn mend(cluster: &mut Cluster, victims: &[usize]) -> Vec<usize> {
    cluster.reconnect();
    for i in 0..cluster.nodes.len() {
        let node = &mut cluster[i];
        node.ended().await;
        if !node.runs() {
            node.launch();
        } else if node.is_paused() {
            node.resume();
        }
    }
    let mut lost = Vec::new();
    for i in 0..cluster.nodes.len() {
        let node = &mut cluster[i];
        match node.try_ready().await {
            Ok(()) => {
                node.faults("sync-delay-us 0");
                node.faults("clock-offset-us 0");
            }
            Err(status) if victims.contains(&i) => {
                println!("node {i} does not start, {status}: {}", node.last_words());
                lost.push(i);
            }
            Err(status) => panic!("node {i} does not start, {status}\n{}", node.log()),
        }
    }
    lost
}

pub async fn run(seed: u64) {
    let schedule = Schedule::random(seed);
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    let begun = Instant::now();
    let mut cluster = Cluster::networked(schedule.nodes, Options::powered()).await;
    let streams = streams(&cluster, schedule.victims.is_empty()).await;
    let names: Vec<String> = streams.iter().map(name_of).collect();
    let history = Arc::new(History::default());
    let crowd = Crowd::start(&history, &cluster.addresses(), &streams, rng.random());
    println!(
        "SEED={seed}: {} nodes, ready after {:.1?}",
        schedule.nodes,
        begun.elapsed()
    );
    history.wait_acked(50).await;
    for (step, pause) in &schedule.steps {
        let at = begun.elapsed();
        let acked = history.acked_batches();
        let told = take(&mut cluster, step, &streams, &mut rng).await;
        println!("SEED={seed} {:6.2} s, {acked} acked: {step:?} {told}", at.as_secs_f64());
        tokio::time::sleep(*pause).await;
        for i in 0..cluster.nodes.len() {
            let node = &mut cluster[i];
            let Some(status) = node.ended().await else { continue };
            // It was not told to.
            assert!(
                schedule.victims.contains(&i),
                "SEED={seed}: node {i} has ended by itself, {status}\n{}",
                node.log()
            );
            println!("node {i} has ended, {status}: {}", node.last_words());
        }
    }
    let acked = history.acked_batches();
    println!(
        "SEED={seed} {:6.2} s, {acked} acked: all is mended",
        begun.elapsed().as_secs_f64()
    );
    let lost = mend(&mut cluster, &schedule.victims).await;
    for &i in &lost {
        replace(&mut cluster, i).await;
    }
    get_well(&mut cluster, &schedule.victims).await;
    // Everybody gets on again.
    history.wait_acked(history.acked_batches() + 100).await;
    let counts = crowd.stop().await;
    let mended = begun.elapsed();
    let tally = verify::at_every_node(&cluster, &history, &names)
        .await
        .unwrap_or_else(|wrong| {
            panic!("SEED={seed}: {wrong:#?}\n{counts}");
        });
    if !schedule.victims.is_empty() {
        // What these reads were the first to find is made good now.
        tokio::time::sleep(Duration::from_secs(1)).await;
        get_well(&mut cluster, &schedule.victims).await;
    }
    for node in cluster.nodes.iter_mut().filter(|node| node.was_launched()) {
        node.faults("audit");
        node.term();
    }
    for node in cluster.nodes.iter_mut().filter(|node| node.was_launched()) {
        let status = node.wait_exit().await;
        assert!(status.success(), "SEED={seed}: {status}\n{}", node.log());
    }
    let compared = verify::on_disk(&mut cluster).unwrap_or_else(|wrong| panic!("SEED={seed}: {wrong:#?}"));
    println!(
        "SEED={seed} {:6.2} s, well after {:.2} s: {tally:?}, {compared} pairs of batches on disk\nSEED={seed}: {counts}",
        begun.elapsed().as_secs_f64(),
        mended.as_secs_f64(),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn random_schedules() {
    let (rounds, seed) = (setting("ROUNDS", 5), seed("random_schedules"));
    for round in 0..rounds {
        run(seed + round).await;
        println!("round {}/{rounds} is fine", round + 1);
    }
}
