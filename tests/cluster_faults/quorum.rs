//! What a cluster says when too little of it is there, and that it does not say more than it knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstem::wire::v1;
use mainstem::wire::v1::publish_session_response::Frame;

use super::harness::api::Api;
use super::harness::batch::{Codec, Record, encode};
use super::harness::net::Flow;
use super::harness::{Cluster, Crowd, Failure, History, Options, PATIENCE, seed, until};
use super::random::{name_of, streams};
use super::verify;

const PROMISED: Duration = Duration::from_secs(2);
/// What the machine may add to it when it is busy.
const SLACK: Duration = Duration::from_secs(3);

fn message(text: &str) -> v1::Message {
    v1::Message {
        subject: "own".into(),
        payload: text.as_bytes().to_vec().into(),
        ..v1::Message::default()
    }
}

async fn publish(api: &Api, text: &str) -> Result<v1::MessageAck, Failure> {
    let answer = api.publish("own", vec![message(text)]).await?;
    Ok(answer.acks[0])
}

/// Publishes until it is acknowledged; returns the ack.
async fn acknowledged(api: &Api, text: &str) -> v1::MessageAck {
    let mut ack = None;
    until("a publish is acknowledged", async || {
        ack = publish(api, text).await.ok();
        ack.is_some()
    })
    .await;
    ack.expect("acknowledged")
}

/// Every answer comes in time, is not an ack, and has the numbers; those that say "not processed" are not stored.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_a_publish_is_refused_in_time() {
    let mut cluster = Cluster::networked(3, Options::plain()).await;
    streams(&cluster, true).await;
    cluster.wait().settled().await;
    // The leader is left: it does not know at first.
    let leader = cluster.wait().leader("own").await;
    let api = cluster[leader].api().await;
    acknowledged(&api, "before").await;
    let others: Vec<usize> = (0..3).filter(|i| *i != leader).collect();
    for &i in &others {
        cluster.kill(i).await;
    }
    let killed = Instant::now();
    let mut told = Vec::new();
    // Long enough to see a leader that does not know it yet, one that does, and no leader.
    while killed.elapsed() < Duration::from_secs(8) {
        let begun = Instant::now();
        let text = format!("without a quorum {}", told.len());
        let failure = publish(&api, &text).await.expect_err("there is no quorum");
        let took = begun.elapsed();
        println!(
            "{:?} after the kill, in {took:?}: {} {}",
            killed.elapsed(),
            failure.reason,
            failure.message
        );
        match failure.retry.as_str() {
            "did_not_happen" => assert_eq!(failure.reason, "NO_QUORUM", "{failure:?}"),
            // It was in the leader's log before that could know.
            "may_have_happened" => {
                assert_eq!(failure.reason, "OUTCOME_UNKNOWN", "{failure:?}");
                assert!(begun - killed < PROMISED, "{:?}: {failure:?}", begun - killed);
            }
            _ => panic!("{failure:?}"),
        }
        assert!(
            failure.message.contains("1 of its 3"),
            "it has the numbers: {failure:?}"
        );
        assert!(took < PROMISED + SLACK, "{took:?}: {failure:?}");
        told.push((text, failure));
    }
    assert!(
        told.last().is_some_and(|(_, f)| f.retry == "did_not_happen"),
        "a lost quorum is known after a while"
    );
    for i in others {
        cluster[i].restart().await;
    }
    acknowledged(&api, "after").await;
    let stored = api.read_all("own").await.unwrap();
    for (text, failure) in told {
        let times = stored.iter().filter(|m| m.record.payload == text.as_bytes()).count();
        match failure.retry.as_str() {
            "did_not_happen" => assert_eq!(times, 0, "{text}: {failure:?}"),
            _ => assert!(times <= 1, "{text}: stored {times} times"),
        }
    }
}

/// So does every batch of a session; and what ended as unknown is to be sent again before what was behind it is taken.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_a_session_is_told_in_time() {
    const FIRST: u64 = 2;
    let mut cluster = Cluster::networked(3, Options::plain()).await;
    streams(&cluster, true).await;
    cluster.wait().settled().await;
    let leader = cluster.wait().leader("own").await;
    let api = cluster[leader].api().await;
    let mut session = api.session_on("own").await.unwrap();
    let batch = |number: u64| encode(&[Record::new("own", number.to_string())], Codec::None);
    session.ask(1, batch(1)).await.unwrap();
    let others: Vec<usize> = (0..3).filter(|i| *i != leader).collect();
    for &i in &others {
        cluster.kill(i).await;
    }
    let killed = Instant::now();
    let (mut sent, mut told) = (Vec::new(), BTreeMap::new());
    while killed.elapsed() < Duration::from_secs(4) || told.len() < sent.len() {
        if killed.elapsed() < Duration::from_secs(4) {
            let number = FIRST + sent.len() as u64;
            sent.push(Instant::now());
            let frame = v1::PublishBatch {
                map_epoch: session.map_epoch(),
                producer_sequence: number,
                batch: batch(number),
                ..v1::PublishBatch::default()
            };
            assert!(session.send(frame).await);
        }
        let pause = tokio::time::sleep(Duration::from_millis(50));
        tokio::pin!(pause);
        loop {
            let frame = tokio::select! {
                frame = session.next() => frame.unwrap().expect("the session goes on"),
                () = &mut pause => break,
            };
            match frame {
                Frame::Error(error) => {
                    let begun = sent[usize::try_from(error.producer_sequence - FIRST).unwrap()];
                    told.insert(error.producer_sequence, (begun.elapsed(), Failure::from(error)));
                }
                Frame::Ack(ack) => panic!("there is no quorum: {ack:?}"),
                Frame::Opened(_)
                | Frame::GoAway(_)
                | Frame::Window(_)
                | Frame::Map(_)
                | Frame::Leaders(_)
                | Frame::Nodes(_) => {}
            }
        }
        assert!(
            killed.elapsed() < PATIENCE,
            "{} of {} are answered",
            told.len(),
            sent.len()
        );
    }
    let mut times: Vec<Duration> = told.values().map(|(took, _)| *took).collect();
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{} batches, told within {median:?} (median), {worst:?} (worst)",
        times.len()
    );
    assert!(median <= PROMISED && worst < PROMISED + SLACK, "{median:?}, {worst:?}");
    let mut unknown = Vec::new();
    for (number, (_, failure)) in &told {
        match failure.retry.as_str() {
            "did_not_happen" => {}
            "may_have_happened" => unknown.push(*number),
            _ => panic!("{failure:?}"),
        }
        assert!(
            failure.message.contains("1 of its 3"),
            "it has the numbers: {failure:?}"
        );
    }
    assert!(unknown.len() >= 2 && unknown[0] == FIRST, "{unknown:?}");
    for i in others {
        cluster[i].restart().await;
    }
    acknowledged(&api, "somebody else's").await;
    // Both are stored by now, most likely; but the first is not acknowledged yet.
    let failure = session
        .ask(unknown[1], batch(unknown[1]))
        .await
        .expect_err("it is behind");
    assert_eq!(failure.retry, "may_have_happened", "{failure:?}");
    // This one never left.
    let certain = unknown[unknown.len() - 1] + 1;
    let failure = session.ask(certain, batch(certain)).await.expect_err("it is behind");
    assert_eq!(
        (failure.retry.as_str(), failure.reason.as_str()),
        ("did_not_happen", "EARLIER_UNKNOWN")
    );
    for number in FIRST..FIRST + sent.len() as u64 {
        session.ask(number, batch(number)).await.unwrap();
    }
    let stored = api.read_all("own").await.unwrap();
    let numbers = stored
        .iter()
        .map(|m| String::from_utf8_lossy(&m.record.payload).into_owned());
    let numbers: Vec<u64> = numbers.filter_map(|text| text.parse().ok()).collect();
    assert_eq!(numbers, (1..FIRST + sent.len() as u64).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn more_replicas_than_live_nodes_are_refused_with_the_numbers() {
    let mut cluster = Cluster::networked(3, Options::plain()).await;
    cluster.kill(2).await;
    let api = cluster[0].api().await;
    let mut attempts = 0;
    let mut spec = v1::StreamSpec {
        name: "wanted".into(),
        replicas: 3,
        ..v1::StreamSpec::default()
    };
    let mut last = None;
    until("it is refused", async || match api.create(spec.clone()).await {
        // The death is not noticed in the same moment: two of three replicas are enough to create it.
        Ok(_) => {
            attempts += 1;
            spec.name = format!("wanted-{attempts}");
            false
        }
        Err(failure) => {
            let refused = failure.reason == "NOT_ENOUGH_NODES";
            last = Some(failure);
            refused
        }
    })
    .await;
    let failure = last.expect("refused");
    assert_eq!(failure.retry, "did_not_happen");
    assert!(
        failure.message.contains("3 replicas need 3 nodes") && failure.message.contains("2 of them live"),
        "{failure:?}"
    );
    cluster[2].restart().await;
    until("it works with all nodes", async || {
        api.create(spec.clone()).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_power_failure_of_all_nodes_at_once_loses_nothing() {
    let seed = seed("a_power_failure_of_all_nodes_at_once_loses_nothing");
    let mut cluster = Cluster::networked(3, Options::powered()).await;
    let streams = streams(&cluster, true).await;
    let names: Vec<String> = streams.iter().map(name_of).collect();
    let history = Arc::new(History::default());
    let crowd = Crowd::start(&history, &cluster.addresses(), &streams, seed);
    for round in 0..3 {
        history.wait_acked(history.acked_batches() + 300).await;
        cluster.power_fail(&[0, 1, 2], seed + 10 * round).await;
        for i in 0..3 {
            cluster[i].launch();
        }
        for i in 0..3 {
            cluster[i].ready().await;
        }
    }
    cluster.wait().healthy().await;
    let counts = crowd.stop().await;
    let tally = verify::at_every_node(&cluster, &history, &names).await;
    let tally = tally.unwrap_or_else(|wrong| panic!("SEED={seed}: {wrong:#?}"));
    println!("{tally:?}\n{counts}");
}

/// What happens to a leader so that another one takes its place while it does not know.
#[derive(Clone, Copy, Debug)]
enum Absence {
    Paused,
    /// Its bytes wait on the way, and arrive later.
    Held,
    Broken,
}

/// The leader is away; another one takes its place and acknowledges. Whatever is asked of the old one after that, on a
/// connection that it had before, is answered by what is true now, or not at all.
async fn an_old_leader(absence: Absence) {
    let mut cluster = Cluster::networked(3, Options::plain()).await;
    streams(&cluster, true).await;
    cluster.wait().settled().await;
    let leader = cluster.wait().leader("own").await;
    let other = (leader + 1) % 3;
    let (old, new) = (cluster[leader].api().await, cluster[other].api().await);
    let first = acknowledged(&old, "by the old leader").await;
    match absence {
        Absence::Paused => cluster.pause(leader),
        Absence::Held => cluster.isolate(leader, Flow::Held),
        Absence::Broken => cluster.isolate(leader, Flow::Broken),
    }
    // Only the new leader can acknowledge this.
    let second = acknowledged(&new, "by the new leader").await;
    assert!(
        second.sequence > first.sequence && second.term > first.term,
        "{first:?}, {second:?}"
    );
    // All of it begins after that ack: at a paused leader it waits in its sockets.
    let get = tokio::spawn({
        let old = old.clone();
        async move { old.get("own", 0, second.sequence).await }
    });
    let last = tokio::spawn({
        let old = old.clone();
        async move {
            let request = v1::GetRequest {
                namespace: String::new(),
                stream: "own".into(),
                by: Some(v1::get_request::By::LastBySubject(v1::GetLastBySubject {
                    subject: "own".into(),
                })),
                ..v1::GetRequest::default()
            };
            let answer = old.reader().get(request).await.map_err(Failure::from)?;
            Ok::<_, Failure>(answer.into_inner().message.expect("a message").sequence)
        }
    });
    let expecting = tokio::spawn({
        let old = old.clone();
        async move {
            let request = v1::PublishRequest {
                namespace: String::new(),
                stream: "own".into(),
                messages: vec![message("expects what the old leader has")],
                expect: Some(v1::Expectation {
                    last_sequence: Some(first.sequence),
                    subject: None,
                }),
            };
            old.publisher().publish(request).await.map_err(Failure::from)
        }
    });
    if matches!(absence, Absence::Paused) {
        // They have been sent when the kernel has them; nothing tells when. It is resumed soon after.
        tokio::time::sleep(Duration::from_millis(50)).await;
        cluster.resume(leader);
    }
    match get.await.unwrap() {
        Ok(message) => assert_eq!(message.sequence, second.sequence),
        Err(failure) => {
            println!("get: {} {}", failure.reason, failure.message);
            assert_eq!(failure.retry, "did_not_happen", "{absence:?}: stale: {failure:?}");
        }
    }
    match last.await.unwrap() {
        Ok(sequence) => assert!(sequence >= second.sequence, "{absence:?}: stale: {sequence}"),
        Err(failure) => {
            println!("last: {} {}", failure.reason, failure.message);
            assert_eq!(failure.retry, "did_not_happen", "{absence:?}: stale: {failure:?}");
        }
    }
    match expecting.await.unwrap() {
        Ok(answer) => panic!("{absence:?}: acknowledged by the old leader: {answer:?}"),
        Err(failure) => println!("publish: {} {}", failure.reason, failure.message),
    }
    cluster.reconnect();
    cluster.wait().healthy().await;
    let stored = old.read_all("own").await.unwrap();
    assert!(
        stored
            .iter()
            .all(|m| m.record.payload != b"expects what the old leader has"),
        "an expectation that did not hold was stored"
    );
    assert!(
        stored
            .iter()
            .any(|m| m.sequence == second.sequence && m.record.payload == b"by the new leader")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_leader_that_wakes_up_is_not_stale() {
    an_old_leader(Absence::Paused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_leader_is_not_stale() {
    an_old_leader(Absence::Held).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_connections_broke_is_not_stale() {
    an_old_leader(Absence::Broken).await;
}

/// A leader sends its entries before its own disk has them, and its followers' syncs are a quorum. When the power of
/// all fails, it alone may have lost what it acknowledged: it must not go on where its log ends now.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_lost_what_its_followers_have_does_not_write_over_it() {
    let seed = seed("a_leader_that_lost_what_its_followers_have_does_not_write_over_it");
    let mut cluster = Cluster::networked(3, Options::powered()).await;
    streams(&cluster, true).await;
    let mut acks = Vec::new();
    for round in 0..4 {
        let leader = cluster.wait().leader("own").await;
        let api = cluster[leader].api().await;
        acks.push((
            acknowledged(&api, &format!("round {round}")).await.sequence,
            format!("round {round}"),
        ));
        cluster.slow_disk(leader, Duration::from_secs(2));
        for n in 0..3 {
            let text = format!("round {round}, not on the leader's disk {n}");
            if let Ok(ack) = publish(&api, &text).await {
                acks.push((ack.sequence, text));
            }
        }
        cluster.power_fail(&[0, 1, 2], seed + 10 * round).await;
        // The leader is back before anybody else could take its place.
        cluster[leader].launch();
        cluster[leader].ready().await;
        for i in (0..3).filter(|i| *i != leader) {
            cluster[i].launch();
        }
        for i in (0..3).filter(|i| *i != leader) {
            cluster[i].ready().await;
        }
        let api = cluster[leader].api().await;
        let text = format!("round {round}, after the accident");
        acks.push((acknowledged(&api, &text).await.sequence, text));
        cluster.wait().healthy().await;
        for i in 0..3 {
            let stored = cluster[i].api().await.read_all("own").await.unwrap();
            for (sequence, text) in &acks {
                let there = stored.iter().find(|m| m.sequence == *sequence);
                assert!(
                    there.is_some_and(|m| m.record.payload == text.as_bytes()),
                    "SEED={seed} round {round}: {text:?} was acknowledged at {sequence}, node {i} has {there:?}"
                );
            }
        }
    }
}
