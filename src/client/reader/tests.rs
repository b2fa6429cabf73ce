#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::client::testing::Peer;

async fn filled(batches: usize, each: usize) -> Peer {
    let peer = Peer::start(1).await;
    let publisher = peer
        .client()
        .publisher("s")
        .batch_messages(each as u32)
        .open()
        .await
        .unwrap();
    let mut n = 0;
    for _ in 0..batches {
        for _ in 0..each {
            n += 1;
            publisher.send("a.b", format!("{n}").as_bytes()).await.unwrap();
        }
        publisher.flush().await.unwrap();
    }
    publisher.close().await.unwrap();
    peer
}

async fn rest(reader: &mut Reader) -> Vec<u64> {
    let mut got = Vec::new();
    let all = async {
        while let Some(m) = reader.next().await.unwrap() {
            assert_eq!(m.payload, m.sequence.to_string());
            got.push(m.sequence);
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all)
        .await
        .expect("in time");
    got
}

#[tokio::test]
async fn everything_once_and_in_order() {
    let peer = filled(20, 50).await;
    let mut reader = peer.client().reader("s").stop_at_tail().open().await.unwrap();
    assert!(rest(&mut reader).await.into_iter().eq(1..=1_000));
}

#[tokio::test]
async fn a_broken_session_goes_on_where_it_ended() {
    let peer = filled(20, 50).await;
    // Each session delivers two batches at most, the first ones begin in the middle of a batch.
    peer.state.lock().break_reads_after = Some(3);
    let start = Start::Sequence(77);
    let mut reader = peer
        .client()
        .reader("s")
        .from(start)
        .stop_at_tail()
        .open()
        .await
        .unwrap();
    let before = peer.state.lock().sessions;
    assert!(rest(&mut reader).await.into_iter().eq(77..=1_000));
    assert!(peer.state.lock().sessions > before + 5, "it did break");
}

#[tokio::test]
async fn new_is_judged_once() {
    let peer = filled(2, 10).await;
    peer.state.lock().break_reads_after = Some(1);
    let mut reader = peer
        .client()
        .reader("s")
        .from(Start::New)
        .stop_at_tail()
        .open()
        .await
        .unwrap();
    // Written after the reader was opened, and before it comes back after the break.
    let publisher = peer.client().publisher("s").open().await.unwrap();
    for n in 21..=25 {
        publisher
            .publish(&crate::client::Message::new("a", n.to_string()))
            .await
            .unwrap()
            .await
            .unwrap();
    }
    peer.state.lock().break_reads_after = None;
    assert_eq!(rest(&mut reader).await, [21, 22, 23, 24, 25]);
}

#[tokio::test]
async fn credit_is_given_back() {
    let peer = filled(40, 50).await;
    let mut reader = peer
        .client()
        .reader("s")
        .credit(120, 1 << 20)
        .stop_at_tail()
        .open()
        .await
        .unwrap();
    assert!(rest(&mut reader).await.into_iter().eq(1..=2_000));
    assert!(peer.state.lock().stop_reads_for_credit > 0, "the credit did bound it");
}

#[tokio::test]
async fn a_cursor_takes_reading_up_again() {
    let peer = filled(4, 10).await;
    let mut reader = peer.client().reader("s").open().await.unwrap();
    assert_eq!(reader.next_batch().await.unwrap().unwrap().len(), 10);
    let cursor = reader.cursor().unwrap().clone();
    let mut again = peer
        .client()
        .reader("s")
        .from(Start::Cursor(cursor))
        .stop_at_tail()
        .open()
        .await
        .unwrap();
    assert!(rest(&mut again).await.into_iter().eq(11..=40));
}

#[tokio::test]
async fn damage_on_the_way_is_an_error() {
    let peer = filled(3, 10).await;
    {
        let mut state = peer.state.lock();
        let mut bytes = state.shards[0][1].bytes.to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        state.shards[0][1].bytes = bytes.into();
    }
    let mut reader = peer.client().reader("s").stop_at_tail().open().await.unwrap();
    assert_eq!(reader.next_batch().await.unwrap().unwrap().len(), 10);
    let e = reader.next_batch().await.unwrap_err();
    assert_eq!(e.reason, reason::BAD_ANSWER);
    assert!(e.message.contains("sequence 11"), "{e}");
}
