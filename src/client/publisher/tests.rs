#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tonic::Code;

use super::*;
use crate::client::testing::{Fault, Peer};

const OVERLOAD: Fault = Fault::Refuse {
    reason: "OVERLOADED",
    code: Code::ResourceExhausted,
    retry: v1::RetryClass::DidNotHappen,
};
const FULL: Fault = Fault::Refuse {
    reason: reason::STREAM_FULL,
    code: Code::ResourceExhausted,
    retry: v1::RetryClass::DidNotHappen,
};

async fn within<T>(f: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), f).await.expect("in time")
}

fn message(n: usize) -> Message {
    Message::new(format!("s.{}", n % 7), format!("payload {n}"))
}

#[tokio::test]
async fn acks_come_in_order_and_tell_the_place() {
    let peer = Peer::start(3).await;
    let publisher = peer.client().publisher("s").batch_messages(10).open().await.unwrap();
    let mut acks = Vec::new();
    for n in 0..1_000 {
        acks.push(publisher.publish(&message(n)).await.unwrap());
    }
    let mut last: HashMap<u32, u64> = HashMap::new();
    let mut placed = HashMap::new();
    for (n, ack) in acks.into_iter().enumerate() {
        let ack = within(ack).await.unwrap();
        let sequence = ack.sequence.unwrap();
        assert!(
            last.insert(ack.shard, sequence).is_none_or(|before| before < sequence),
            "out of order"
        );
        placed.insert((ack.shard, sequence), n);
    }
    for (shard, messages) in peer.stored().into_iter().enumerate() {
        for ((subject, payload), sequence) in messages.into_iter().zip(1u64..) {
            let n = placed.remove(&(shard as u32, sequence)).unwrap();
            assert_eq!((subject, payload), (message(n).subject, message(n).payload));
        }
    }
    assert!(placed.is_empty(), "acknowledged but not stored");
    within(publisher.close()).await.unwrap();
}

#[tokio::test]
async fn a_lone_message_does_not_linger() {
    let peer = Peer::start(1).await;
    let publisher = peer
        .client()
        .publisher("s")
        .linger(Duration::from_secs(3_600))
        .open()
        .await
        .unwrap();
    for n in 0..3 {
        let ack = publisher.publish(&message(n)).await.unwrap();
        within(ack).await.unwrap();
    }
}

#[tokio::test]
async fn messages_behind_one_on_its_way_share_a_batch() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.push_back(Fault::Silence);
    let publisher = peer
        .client()
        .publisher("s")
        .linger(Duration::from_millis(200))
        .open()
        .await
        .unwrap();
    let first = publisher.publish(&message(0)).await.unwrap();
    while peer.state.lock().batches == 0 {
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    for n in 1..100 {
        publisher.send("s", &message(n).payload).await.unwrap();
    }
    while peer.state.lock().batches == 1 {
        tokio::task::yield_now().await;
    }
    assert!(
        begun.elapsed() >= Duration::from_millis(190),
        "did not linger: {:?}",
        begun.elapsed()
    );
    assert_eq!(peer.state.lock().batches, 2, "ninety-nine messages in one batch");
    drop(publisher);
    assert_eq!(within(first).await.unwrap_err().retry, RetryClass::MayHaveHappened);
}

/// Whatever goes wrong on the way, each message is stored once, in order, where its ack says.
#[tokio::test]
async fn trouble_neither_loses_nor_repeats_nor_reorders() {
    for _ in 0..8 {
        let seed: u64 = rand::rng().random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let shards = rng.random_range(1..4);
        let peer = Peer::start(shards).await;
        {
            let mut state = peer.state.lock();
            for _ in 0..rng.random_range(20..200) {
                let fault = match rng.random_range(0..12) {
                    0 => Fault::StoreAndBreak,
                    1 => Fault::Break,
                    2 | 3 => OVERLOAD,
                    4 => Fault::StoreAndDoubt,
                    5 => Fault::GoAway,
                    6 => Fault::Refuse {
                        reason: "NO_QUORUM",
                        code: Code::Unavailable,
                        retry: v1::RetryClass::MayHaveHappened,
                    },
                    _ => Fault::None,
                };
                state.faults.push_back(fault);
            }
        }
        let told = Arc::new(Mutex::new(Vec::new()));
        let hook = Arc::clone(&told);
        let publisher = peer
            .client()
            .publisher("s")
            .batch_messages(rng.random_range(1..40))
            .codec([Codec::None, Codec::Lz4, Codec::Zstd][rng.random_range(0..3)])
            .linger(Duration::from_micros(rng.random_range(0..2_000)))
            .on_batch(move |b| hook.lock().push((b.ordinals.to_vec(), b.outcome.unwrap().clone())))
            .open()
            .await
            .unwrap();
        let count = rng.random_range(1_000..3_000);
        let mut acks = Vec::new();
        for n in 0..count {
            if rng.random_bool(0.3) {
                acks.push((n, publisher.publish(&message(n)).await.unwrap()));
            } else {
                publisher.send(&message(n).subject, &message(n).payload).await.unwrap();
            }
            if rng.random_bool(0.02) {
                tokio::time::sleep(Duration::from_micros(rng.random_range(0..2_000))).await;
            }
        }
        within(publisher.flush()).await.unwrap();
        let stored = peer.stored();
        for (n, ack) in acks {
            let ack = within(ack).await.unwrap();
            let at = &stored[ack.shard as usize][ack.sequence.unwrap() as usize - 1];
            assert_eq!(*at, (message(n).subject, message(n).payload), "seed {seed}");
        }
        let mut numbers = Vec::new();
        for shard in &stored {
            let of_shard: Vec<usize> = shard
                .iter()
                .map(|(_, p)| {
                    std::str::from_utf8(p)
                        .unwrap()
                        .strip_prefix("payload ")
                        .unwrap()
                        .parse()
                        .unwrap()
                })
                .collect();
            assert!(
                of_shard.is_sorted_by(|a, b| a < b),
                "seed {seed}: reordered or repeated"
            );
            numbers.extend(of_shard);
        }
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..count), "seed {seed}: lost or repeated");
        // The hook was told of every message once, with its place.
        let mut ordinals = Vec::new();
        for (ranges, receipt) in told.lock().iter() {
            let mut sequence = receipt.first.unwrap();
            for n in ranges.iter().flat_map(|&(a, b)| a..=b) {
                let at = &stored[receipt.shard as usize][sequence as usize - 1];
                assert_eq!(at.1, message(n as usize).payload, "seed {seed}");
                sequence += 1;
                ordinals.push(n);
            }
            assert_eq!(receipt.last.unwrap() + 1, sequence, "seed {seed}");
        }
        ordinals.sort_unstable();
        assert!(ordinals.iter().copied().eq(0..count as u64), "seed {seed}");
        within(publisher.close()).await.unwrap();
    }
}

#[tokio::test]
async fn memory_is_bounded() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.extend(vec![Fault::Silence; 1_000]);
    let publisher = peer
        .client()
        .publisher("s")
        .memory_bytes(100_000)
        .batch_bytes(10_000)
        .open()
        .await
        .unwrap();
    let payload = [0u8; 1_000];
    let mut taken = 0;
    while tokio::time::timeout(Duration::from_millis(300), publisher.send("s", &payload))
        .await
        .is_ok()
    {
        taken += 1;
        assert!(taken < 100, "more than 100,000 bytes were taken");
    }
    assert!(taken > 90, "only {taken} were taken");
}

#[tokio::test]
async fn room_comes_back_with_the_acks() {
    let peer = Peer::start(1).await;
    let publisher = peer
        .client()
        .publisher("s")
        .memory_bytes(20_000)
        .linger(Duration::from_secs(60))
        .open()
        .await
        .unwrap();
    let payload = [0u8; 1_000];
    within(async {
        for _ in 0..1_000 {
            publisher.send("s", &payload).await.unwrap();
        }
        publisher
            .send_all(&vec![Message::new("s", payload.to_vec()); 1_000])
            .await
            .unwrap();
        publisher.flush().await.unwrap();
    })
    .await;
    assert_eq!(peer.stored()[0].len(), 2_000);
}

#[tokio::test]
async fn one_bad_batch_fails_alone() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.extend([
        Fault::None,
        Fault::Reject {
            reason: "EXPECTATION_FAILED",
        },
        OVERLOAD,
    ]);
    let publisher = peer.client().publisher("s").batch_messages(1).open().await.unwrap();
    let mut acks = Vec::new();
    for n in 0..4 {
        acks.push(within(publisher.publish(&message(n)).await.unwrap()).await);
    }
    assert!(acks[1].as_ref().unwrap_err().is_expectation_failed());
    let sequences: Vec<_> = acks.iter().filter_map(|a| a.as_ref().ok()?.sequence).collect();
    assert_eq!(sequences, [1, 2, 3]);
    assert!(within(publisher.flush()).await.unwrap_err().is_expectation_failed());
    within(publisher.flush()).await.unwrap();
}

#[tokio::test]
async fn a_full_stream_refuses_and_later_messages_go_on() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.extend([Fault::None, FULL, FULL]);
    let publisher = peer
        .client()
        .publisher("s")
        .batch_messages(1)
        .linger(Duration::ZERO)
        .open()
        .await
        .unwrap();
    let mut acks = Vec::new();
    for n in 0..6 {
        acks.push(publisher.publish(&message(n)).await.unwrap());
    }
    let mut outcomes = Vec::new();
    for ack in acks {
        outcomes.push(within(ack).await);
    }
    let refused: Vec<_> = outcomes.iter().filter_map(|o| o.as_ref().err()).collect();
    assert_eq!(refused.len(), 2);
    assert!(
        refused
            .iter()
            .all(|e| e.reason == reason::STREAM_FULL && e.retry == RetryClass::DidNotHappen)
    );
    let stored = peer.stored();
    let acked: Vec<_> = (0..6)
        .filter(|&n| outcomes[n].is_ok())
        .map(|n| message(n).payload)
        .collect();
    assert_eq!(stored[0].iter().map(|(_, p)| p.clone()).collect::<Vec<_>>(), acked);
}

#[tokio::test]
async fn a_message_that_cannot_be_is_refused_at_once() {
    let peer = Peer::start(1).await;
    let publisher = peer.client().publisher("s").open().await.unwrap();
    for bad in [
        Message::new("", "x"),
        Message::new("a.*", "x"),
        Message::new("a", vec![0; 5 << 20]),
    ] {
        assert_eq!(publisher.publish(&bad).await.unwrap_err().reason, reason::BAD_MESSAGE);
    }
    let ack = publisher.publish(&message(1)).await.unwrap();
    assert_eq!(within(ack).await.unwrap().sequence, Some(1));
    // Larger than a batch is meant to be, but allowed.
    within(publisher.publish(&Message::new("a", vec![0; 4_000_000])).await.unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn when_patience_ends_each_message_says_whether_it_may_have_happened() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.extend([Fault::Break]);
    let publisher = peer
        .client()
        .publisher("s")
        .batch_messages(1)
        .retry_for(Duration::from_millis(200))
        .open()
        .await
        .unwrap();
    peer.state.lock().refuse_open = Some((Code::Unavailable, "not now"));
    let mut acks = Vec::new();
    for n in 0..20 {
        acks.push(publisher.publish(&message(n)).await.unwrap());
    }
    let mut classes = Vec::new();
    for ack in acks {
        classes.push(within(ack).await.unwrap_err().retry);
    }
    assert_eq!(classes[0], RetryClass::MayHaveHappened, "it was sent");
    assert_eq!(
        classes[19],
        RetryClass::DidNotHappen,
        "it is past the window, so it never was"
    );
    assert!(publisher.publish(&message(0)).await.is_err(), "the publisher is over");
    assert!(within(publisher.flush()).await.is_err());
}

#[tokio::test]
async fn a_stream_that_is_not_there_is_told_at_once() {
    let peer = Peer::start(1).await;
    peer.state.lock().refuse_open = Some((Code::NotFound, "no such stream"));
    let e = within(peer.client().publisher("s").open()).await.unwrap_err();
    assert!(e.is_not_found());
}

#[tokio::test]
async fn nobody_listening_is_unavailable_and_did_not_happen() {
    let peer = Peer::start(1).await;
    let mut config = crate::client::ClientConfig::new([peer.address.to_string()]);
    drop(peer);
    config.retry_for = Duration::from_millis(100);
    let client = crate::client::Client::new(config).unwrap();
    // The listener closes when the aborted task is dropped.
    let e = within(async {
        loop {
            match client.publisher("s").open().await {
                Ok(p) => drop(p),
                Err(e) if e.retry == RetryClass::DidNotHappen => return e,
                Err(_) => {}
            }
        }
    })
    .await;
    assert!(e.is_unavailable());
    assert_eq!(e.reason, reason::UNREACHABLE);
    assert!(e.message.contains("no server answers at 127.0.0.1"), "{e}");
}

#[tokio::test]
async fn closing_answers_everything_first() {
    let peer = Peer::start(2).await;
    peer.state.lock().faults.extend([OVERLOAD, Fault::StoreAndBreak]);
    let publisher = peer
        .client()
        .publisher("s")
        .linger(Duration::from_secs(60))
        .open()
        .await
        .unwrap();
    for n in 0..500 {
        publisher.send(&message(n).subject, b"x").await.unwrap();
    }
    within(publisher.close()).await.unwrap();
    assert_eq!(peer.stored().iter().map(Vec::len).sum::<usize>(), 500);
}

#[tokio::test]
async fn dropping_tells_those_who_wait() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.extend(vec![Fault::Silence; 100]);
    let publisher = peer.client().publisher("s").open().await.unwrap();
    let sent = publisher.publish(&message(0)).await.unwrap();
    while peer.state.lock().batches == 0 {
        tokio::task::yield_now().await;
    }
    drop(publisher);
    let e = within(sent).await.unwrap_err();
    assert_eq!(
        (e.reason.as_str(), e.retry),
        (reason::CLOSED, RetryClass::MayHaveHappened)
    );
}

#[tokio::test]
async fn a_server_that_never_answers_is_given_up() {
    let peer = Peer::start(1).await;
    peer.state.lock().faults.extend(vec![Fault::Silence; 10]);
    let publisher = peer
        .client()
        .publisher("s")
        .retry_for(Duration::from_millis(200))
        .open()
        .await
        .unwrap();
    let ack = publisher.publish(&message(0)).await.unwrap();
    let e = within(ack).await.unwrap_err();
    assert_eq!(
        (e.reason.as_str(), e.retry),
        (reason::TIMED_OUT, RetryClass::MayHaveHappened)
    );
}

/// Not to try again is not the same as not to try.
#[tokio::test]
async fn without_retries_every_batch_is_tried_once() {
    let peer = Peer::start(1).await;
    let open = async || {
        let client = peer.client();
        let publisher = client.publisher("s").batch_messages(1).retry_for(Duration::ZERO);
        publisher.open().await.unwrap()
    };
    let publisher = open().await;
    let mut acks = Vec::new();
    for n in 0..200 {
        acks.push(publisher.publish(&message(n)).await.unwrap());
    }
    for ack in acks {
        within(ack).await.unwrap();
    }
    // What is refused is not sent again …
    peer.state.lock().faults.push_back(OVERLOAD);
    let ack = publisher.publish(&message(200)).await.unwrap();
    let e = within(ack).await.unwrap_err();
    assert_eq!((e.reason.as_str(), e.retry), ("OVERLOADED", RetryClass::DidNotHappen));
    assert_eq!(peer.stored()[0].len(), 200);
    // … nor what may have happened.
    let publisher = open().await;
    peer.state.lock().faults.push_back(Fault::StoreAndBreak);
    let ack = publisher.publish(&message(201)).await.unwrap();
    assert_eq!(within(ack).await.unwrap_err().retry, RetryClass::MayHaveHappened);
    assert_eq!(peer.stored()[0].len(), 201);
}

/// An idle producer is forgotten after a while; the publisher goes on under the next epoch, and nothing is lost.
#[tokio::test]
async fn a_producer_that_was_forgotten_begins_again() {
    let peer = Peer::start(3).await;
    let publisher = peer.client().publisher("s").batch_messages(5).open().await.unwrap();
    for round in 0..5 {
        for n in 0..200 {
            let payload = message(n + 200 * round).payload;
            publisher.send(&message(n).subject, &payload).await.unwrap();
        }
        within(publisher.flush()).await.unwrap();
        peer.state.lock().forget_producers();
    }
    within(publisher.close()).await.unwrap();
    let mut stored: Vec<_> = peer
        .stored()
        .into_iter()
        .flatten()
        .map(|(_, payload)| payload)
        .collect();
    let mut expected: Vec<_> = (0..1_000).map(|n| message(n).payload).collect();
    stored.sort();
    expected.sort();
    assert_eq!(stored, expected);
}

/// Not a test: prints what publishing costs, the peer's work included. `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn cost() {
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<u64> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split(' ')
            .filter_map(|f| f.parse().ok())
            .collect();
        // After the state: user time is the 11th number, system time the 12th, in hundredths of a second.
        (fields[10] + fields[11]) as f64 / 100.0
    };
    for shards in [1, 4] {
        let peer = Peer::start(shards).await;
        peer.state.lock().forget = true;
        let publisher = peer.client().publisher("s").open().await.unwrap();
        let payload = [7u8; 128];
        let count = 3_000_000;
        let (cpu, begun) = (ticks(), Instant::now());
        let mut pushing = 0.0;
        for n in 0..count / 1_000 {
            let subject = format!("subject.{}", n % 50);
            let pushed = Instant::now();
            for _ in 0..1_000 {
                publisher.send(&subject, &payload).await.unwrap();
            }
            pushing += pushed.elapsed().as_secs_f64();
        }
        publisher.flush().await.unwrap();
        println!(
            "{shards} shard(s): {:.2} M/s, {:.0} ns of CPU per message, {:.0} ns in `send`",
            count as f64 / begun.elapsed().as_secs_f64() / 1e6,
            (ticks() - cpu) / count as f64 * 1e9,
            pushing / count as f64 * 1e9
        );
    }
}
