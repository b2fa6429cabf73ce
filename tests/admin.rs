//! Administration through the API of a real node: what a repeated request is answered.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::api::{Api, Failure};
use harness::{Node, Options, until};
use mainstem::wire::v1;

async fn update(
    api: &Api,
    description: &str,
    expected_revision: Option<u64>,
    request_id: &str,
) -> Result<v1::Stream, Failure> {
    let request = v1::UpdateStreamRequest {
        spec: Some(v1::StreamSpec {
            name: "s".into(),
            description: description.into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["description".into()],
        }),
        expected_revision,
        request_id: request_id.into(),
    };
    Ok(api.streams().update_stream(request).await?.into_inner().stream.unwrap())
}

async fn delete(
    api: &Api,
    grace_us: u64,
    expected_revision: Option<u64>,
    request_id: &str,
) -> Result<v1::Stream, Failure> {
    let request = v1::DeleteStreamRequest {
        name: "s".into(),
        grace_us: Some(grace_us),
        expected_revision,
        request_id: request_id.into(),
        ..Default::default()
    };
    Ok(api.streams().delete_stream(request).await?.into_inner().stream.unwrap())
}

async fn undelete(api: &Api, request_id: &str) -> Result<v1::Stream, Failure> {
    let request = v1::UndeleteStreamRequest {
        name: "s".into(),
        request_id: request_id.into(),
        ..Default::default()
    };
    Ok(api
        .streams()
        .undelete_stream(request)
        .await?
        .into_inner()
        .stream
        .unwrap())
}

fn told(stream: &v1::Stream) -> (u64, String) {
    (stream.revision, stream.spec.clone().unwrap().description)
}

/// A client that lost an answer asks again with the same request id. What it expected is no longer so, because its own
/// request was carried out: it must get the answer it lost, not a refusal.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_gets_the_answer_it_lost() {
    let mut node = Node::start(Options::plain()).await;
    let mut api = node.api().await;
    api.create_simple("s", 1).await;
    let first = update(&api, "one", Some(1), "r1").await.unwrap();
    assert_eq!(told(&first), (2, "one".into()));
    // Another request with the same expectation is refused …
    let e = update(&api, "two", Some(1), "r2").await.unwrap_err();
    assert_eq!(
        (e.reason.as_str(), e.metadata["actual"].as_str()),
        ("REVISION_MISMATCH", "2")
    );
    // … the repeated one is answered as before; also after a restart, and when others have changed the stream since.
    assert_eq!(
        told(&update(&api, "one", Some(1), "r1").await.unwrap()),
        (2, "one".into())
    );
    node.kill9().await;
    node.restart().await;
    api = node.api().await;
    assert_eq!(
        told(&update(&api, "one", Some(1), "r1").await.unwrap()),
        (2, "one".into())
    );
    let later = update(&api, "three", Some(2), "r3").await.unwrap();
    assert_eq!(told(&later), (3, "three".into()));
    assert_eq!(
        told(&update(&api, "one", Some(1), "r1").await.unwrap()),
        (2, "one".into())
    );
    assert_eq!(
        told(&api.stream("s").await.unwrap()),
        (3, "three".into()),
        "nothing was done again"
    );

    // A removal, and a return.
    let removed = delete(&api, 3_600_000_000, Some(3), "d1").await.unwrap();
    assert_eq!((removed.revision, removed.state()), (4, v1::StreamState::Removed));
    let again = delete(&api, 3_600_000_000, Some(3), "d1").await.unwrap();
    assert_eq!((again.revision, again.state()), (4, v1::StreamState::Removed));
    let back = undelete(&api, "u1").await.unwrap();
    assert_eq!((back.revision, back.state()), (5, v1::StreamState::Active));
    assert_eq!(undelete(&api, "u1").await.unwrap().revision, 5);
    assert_eq!(
        delete(&api, 3_600_000_000, Some(3), "d1").await.unwrap().revision,
        4,
        "told as it was; it is not removed a second time"
    );
    assert_eq!(api.stream("s").await.unwrap().state(), v1::StreamState::Active);

    // Even when there is no such stream any more.
    delete(&api, 0, None, "d2").await.unwrap();
    let list = || v1::ListStreamsRequest {
        include_removed: true,
        ..Default::default()
    };
    until("the stream is forgotten", async || {
        api.streams()
            .list_streams(list())
            .await
            .unwrap()
            .into_inner()
            .streams
            .is_empty()
    })
    .await;
    assert_eq!(
        told(&update(&api, "one", Some(1), "r1").await.unwrap()),
        (2, "one".into())
    );
    assert_eq!(undelete(&api, "u1").await.unwrap().revision, 5);
    let e = update(&api, "four", None, "r4").await.unwrap_err();
    assert_eq!(e.reason, "STREAM_NOT_FOUND");

    // An id is of one request.
    let e = delete(&api, 0, None, "r1").await.unwrap_err();
    assert_eq!(e.reason, "REQUEST_ID_REUSED");
    let e = update(&api, "five", None, "d1").await.unwrap_err();
    assert_eq!(e.reason, "REQUEST_ID_REUSED");
    let e = update(&api, "six", None, &"x".repeat(129)).await.unwrap_err();
    assert_eq!((e.reason.as_str(), e.retry.as_str()), ("BAD_REQUEST", "cannot_work"));
}
