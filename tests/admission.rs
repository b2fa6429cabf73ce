//! What a server takes in hand, and what it refuses: all of a publish or nothing of it, and no more memory than told.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::api::Api;
use harness::batch::{Codec, Record, encode};
use harness::{Node, Options, until};
use mainstem::wire::v1;
use tonic::Code;

fn message(subject: &str, payload: Vec<u8>) -> v1::Message {
    v1::Message {
        subject: subject.into(),
        payload: payload.into(),
        ..Default::default()
    }
}

/// A subject of each of the two shards of stream `s`.
async fn a_subject_in_each(api: &Api) -> [String; 2] {
    let mut found = [None, None];
    for n in 0.. {
        let subject = format!("s.{n}");
        let ack = api.publish("s", vec![message(&subject, vec![0])]).await.unwrap().acks[0];
        found[ack.shard as usize].get_or_insert(subject);
        if let [Some(first), Some(second)] = &found {
            return [first.clone(), second.clone()];
        }
    }
    unreachable!("some subject hashes to each shard")
}

/// A publish over two shards for whose second part there is no memory is refused as not processed, and the first part
/// is not stored either.
#[tokio::test(flavor = "multi_thread")]
async fn a_publish_over_shards_is_refused_before_any_shard_has_it() {
    const PUBLISH_USED: &str = "base_budget_used_bytes{budget=\"publish\"}";
    let node = Node::start(Options::faulty().flag("--publish-memory", "16MiB")).await;
    let api = node.api().await;
    api.create_simple("s", 2).await;
    let subjects = a_subject_in_each(&api).await;
    until("nothing is in hand", async || node.metric(PUBLISH_USED).await == 0.0).await;
    let before = api.read_all("s").await.unwrap().len();
    // While the disk is busy a session's batch holds half of the memory.
    node.faults("sync-delay-us 10000000");
    let mut session = api.session_on("s").await.unwrap();
    let shard = api.stream("s").await.unwrap().shards[0].index;
    let records: Vec<_> = (0..2)
        .map(|_| Record::new(&subjects[shard as usize], vec![7; 4_000_000]))
        .collect();
    let batch = v1::PublishBatch {
        shard,
        map_epoch: session.map_epoch(),
        producer_sequence: 1,
        batch: encode(&records, Codec::None),
        expect: None,
    };
    assert!(session.send(batch).await);
    until("the batch is in hand", async || node.metric(PUBLISH_USED).await > 8e6).await;
    // Either part would fit, both do not.
    let parts = |payload: &[u8]| -> Vec<v1::Message> {
        let messages = subjects.iter().flat_map(|s| [s, s]);
        messages.map(|s| message(s, payload.to_vec())).collect()
    };
    let refusal = api.publish("s", parts(&vec![9; 2_500_000])).await.unwrap_err();
    assert_eq!(
        (refusal.code, refusal.reason.as_str(), refusal.retry.as_str()),
        (Code::ResourceExhausted, "OVERLOADED", "did_not_happen"),
        "{refusal:?}"
    );
    node.faults("sync-delay-us 0");
    match session.next().await.unwrap() {
        Some(v1::publish_session_response::Frame::Ack(_)) => {}
        other => panic!("{other:?}"),
    }
    let stored = api.read_all("s").await.unwrap();
    assert_eq!(stored.len(), before + 2, "only the session's batch was stored");
    assert!(stored.iter().all(|m| m.record.payload.first() != Some(&9)));
    // With room again, the same publish is stored whole.
    until("the memory is back", async || node.metric(PUBLISH_USED).await == 0.0).await;
    let acks = api.publish("s", parts(&vec![9; 2_500_000])).await.unwrap().acks;
    assert_eq!(acks.len(), 4);
    assert_eq!(api.read_all("s").await.unwrap().len(), before + 6);
}
