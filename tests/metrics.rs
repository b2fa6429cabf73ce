//! What a node counts, while it does known work.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::batch::{Codec, Record, encode};
use harness::{Node, Options, until};
use mainstem::wire::v1;

fn message(subject: &str, id: Option<&str>) -> v1::Message {
    v1::Message {
        subject: subject.into(),
        payload: vec![1; 100].into(),
        message_id: id.map(str::to_owned),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_counts_what_it_does() {
    let node = Node::start(Options::plain()).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    let spec = v1::StreamSpec {
        name: "brief".into(),
        limits: Some(v1::Limits {
            max_age_us: Some(200_000),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.create(spec).await.unwrap();

    // Ten batches of twenty messages; one that is a duplicate, three that are refused in three places.
    let mut session = api.session_on("s").await.unwrap();
    let mut bytes = 0;
    for sequence in 1..=10 {
        let records: Vec<_> = (0..20).map(|_| Record::new("s", vec![7; 50])).collect();
        let batch = encode(&records, Codec::None);
        bytes += batch.len();
        session.ask(sequence, batch).await.unwrap();
    }
    let e = session
        .ask(20, encode(&[Record::new("s", "x")], Codec::None))
        .await
        .unwrap_err();
    assert_eq!(e.reason, "OUT_OF_ORDER");
    let e = session
        .ask(0, encode(&[Record::new("s", "x")], Codec::None))
        .await
        .unwrap_err();
    assert_eq!(e.reason, "BAD_PRODUCER_SEQUENCE");
    api.publish("brief", vec![message("brief", Some("a"))]).await.unwrap();
    api.publish("brief", vec![message("brief", Some("a"))]).await.unwrap();
    let request = v1::PublishRequest {
        stream: "s".into(),
        messages: vec![message("s", None)],
        expect: Some(v1::Expectation {
            last_sequence: Some(7),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(api.publisher().publish(request).await.is_err());

    let publishes =
        |outcome: &str, reason: &str| format!("broker_publishes_total{{outcome=\"{outcome}\",reason=\"{reason}\"}}");
    for (name, expected) in [
        (publishes("stored", "none"), 11.0),
        (publishes("duplicate", "none"), 1.0),
        (publishes("refused", "OUT_OF_ORDER"), 1.0),
        (publishes("refused", "BAD_PRODUCER_SEQUENCE"), 1.0),
        (publishes("refused", "EXPECTATION_FAILED"), 1.0),
        ("broker_published_messages_total".into(), 201.0),
        // Counted per batch that was handed to a shard, whatever came of it.
        ("broker_publish_duration_seconds_count".into(), 14.0),
        ("broker_entry_items_sum".into(), 14.0),
        ("api_open_sessions{kind=\"publish\"}".into(), 1.0),
        ("api_open_sessions{kind=\"read\"}".into(), 0.0),
    ] {
        assert_eq!(node.metric(&name).await, expected, "{name}");
    }
    let published = node.metric("broker_published_bytes_total").await;
    assert!(
        published > bytes as f64 && published < bytes as f64 + 1_000.0,
        "{published}"
    );
    let entries = node.metric("broker_entry_bytes_count").await;
    assert!((1.0..=14.0).contains(&entries), "{entries}");
    let proposals = node.metric("raft_proposals_total").await;
    assert!(proposals >= entries, "{proposals} proposals, {entries} entries");
    assert!(node.metric("raft_apply_duration_seconds_count").await > 0.0);

    // Twice the whole stream in a session, one message by itself, ten in an answer.
    for _ in 0..2 {
        assert_eq!(api.read_all("s").await.unwrap().len(), 200);
    }
    api.get("s", 0, 1).await.unwrap();
    let fetch = v1::FetchRequest {
        stream: "s".into(),
        max_messages: 10,
        ..Default::default()
    };
    api.reader().fetch(fetch).await.unwrap();
    assert_eq!(node.metric("broker_read_messages_total").await, 411.0);
    assert!(node.metric("broker_read_bytes_total").await > 2.0 * bytes as f64);

    until("the groups are counted", async || {
        node.metric("raft_held_groups").await == 5.0
    })
    .await;
    assert_eq!(
        node.metric("raft_led_groups").await,
        5.0,
        "the meta group and a pool of four"
    );
    assert_eq!(node.metric("raft_leader_changes_total").await, 0.0);
    until("a message has expired", async || {
        node.metric("broker_expiry_runs_total").await > 0.0
    })
    .await;
    drop(session);
    until("the session is over", async || {
        node.metric("api_open_sessions{kind=\"publish\"}").await == 0.0
    })
    .await;
}
