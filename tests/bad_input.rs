//! Whatever a client sends, the answer says what is wrong with it and that nothing was stored; and nothing is stored.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::api::{Api, Failure};
use harness::batch::{self, Codec, Record};
use harness::{Node, Options};
use mainstem::wire::v1;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::Code;

async fn node_with_stream() -> (Node, Api) {
    let node = Node::start(Options::plain()).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    (node, api)
}

#[track_caller]
fn expect(what: &str, got: Result<impl std::fmt::Debug, Failure>, code: Code, reason: &str, retry: &str) {
    let e = got.expect_err(what);
    assert_eq!(
        (e.code, e.reason.as_str(), e.retry.as_str()),
        (code, reason, retry),
        "{what}: {e:?}"
    );
    assert!(e.message.len() > 10, "{what}: the message says nothing: {e:?}");
}

#[track_caller]
fn refused(what: &str, got: Result<impl std::fmt::Debug, Failure>, reason: &str) {
    expect(what, got, Code::InvalidArgument, reason, "cannot_work");
}

/// The batches that break the format, each with the rule it breaks.
fn broken_batches() -> Vec<(String, Vec<u8>)> {
    let records: Vec<Record> = (0..5).map(|i| Record::new("s.a", vec![i; 100])).collect();
    let good = batch::encode(&records, Codec::None).to_vec();
    let contents: Vec<Vec<u8>> = records.iter().map(Record::content).collect();
    let plain = batch::body(&contents);
    let len = plain.len() as u32;
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |what: &str, bytes: Vec<u8>| all.push((what.into(), bytes));

    add("empty", Vec::new());
    add("not a batch at all", b"hello, world, this is no batch at all".to_vec());
    for n in [1, 4, 23, 24, 25, good.len() / 2, good.len() - 1] {
        add(&format!("cut to {n} bytes"), good[..n].to_vec());
    }
    let mut more = good.clone();
    more.push(0);
    add("a byte too many", more);
    for (what, at, value) in [
        ("another magic", 0, 0x4e),
        ("version 0", 2, 0),
        ("version 2", 2, 2),
        ("codec 3", 3, 3),
        ("codec 255", 3, 255),
        ("a flag", 16, 1),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        add(&format!("{what}, CRC as it was"), bytes.clone());
        add(&format!("{what}, CRC correct"), batch::fix_crc(&bytes));
    }
    for (what, at) in [
        ("header", 5),
        ("CRC", 21),
        ("record length", 24),
        ("record CRC", 29),
        ("content", 60),
    ] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        add(&format!("a flipped bit in the {what}"), bytes);
    }
    let mut bytes = good.clone();
    bytes[60] ^= 1;
    add(
        "a flipped bit in a record, the batch's CRC correct",
        batch::fix_crc(&bytes),
    );
    for count in [0, 4, 6, 100_001, u32::MAX] {
        add(
            &format!("5 records, told as {count}"),
            batch::seal(0, count, &plain, len, 0),
        );
    }
    for told in [0, len - 1, len + 1, u32::MAX] {
        add(
            &format!("a body of {len} bytes, told as {told}"),
            batch::seal(0, 5, &plain, told, 0),
        );
    }
    let lz4 = lz4_flex::block::compress(&plain);
    let zstd = zstd::bulk::compress(&plain, 1).unwrap();
    for (codec, name, body) in [(1, "lz4", &lz4), (2, "zstd", &zstd)] {
        for told in [0, len - 1, len + 1, 17 << 20, u32::MAX] {
            add(
                &format!("{name}: {len} bytes, told as {told}"),
                batch::seal(codec, 5, body, told, 0),
            );
        }
        add(
            &format!("{name}: not compressed"),
            batch::seal(codec, 5, &plain, len, 0),
        );
        add(
            &format!("{name}: cut"),
            batch::seal(codec, 5, &body[..body.len() / 2], len, 0),
        );
        let mut junk = body.clone();
        junk.extend([1, 2, 3, 4]);
        add(
            &format!("{name}: followed by junk"),
            batch::seal(codec, 5, &junk, len, 0),
        );
    }
    // 16 MiB and a byte of zeros in a few kilobytes.
    let bomb = zstd::bulk::compress(&vec![0; (16 << 20) + 1], 1).unwrap();
    add(
        "zstd: more than 16 MiB when decompressed",
        batch::seal(2, 1, &bomb, (16 << 20) + 1, 0),
    );
    add(
        "zstd: more than it tells when decompressed",
        batch::seal(2, 1, &bomb, 100, 0),
    );

    let mut content = |what: &str, c: Vec<u8>| {
        let body = batch::body(&[c]);
        all.push((
            format!("a record with {what}"),
            batch::seal(0, 1, &body, body.len() as u32, 0),
        ));
    };
    let with = |mut r: Record, change: &dyn Fn(&mut Record)| {
        change(&mut r);
        r.content()
    };
    let one = || Record::new("s.a", "x");
    content("no content", Vec::new());
    content("only flags", vec![0]);
    content("a flag that is not known", {
        let mut c = one().content();
        c[0] = 16;
        c
    });
    content("a subject that runs past its end", vec![0, 200, b's']);
    content("no subject", vec![0, 0, b'x']);
    content("a subject that is not UTF-8", vec![0, 3, b's', 0xff, 0xfe, b'x']);
    content("a key that runs past its end", {
        let mut c = vec![1, 1, b's'];
        c.extend([0xff, 0xff]);
        c
    });
    content("an empty key", {
        let mut c = vec![1, 1, b's'];
        c.extend([0, 0]);
        c
    });
    content("a key of 1,025 bytes", with(one(), &|r| r.key = Some(vec![1; 1025])));
    content(
        "an empty message id",
        with(one(), &|r| r.message_id = Some(String::new())),
    );
    content("a message id that is not UTF-8", vec![2, 1, b's', 2, 0xff, 0xfe]);
    content("an event time that is cut", vec![4, 1, b's', 1, 2, 3]);
    content("headers that are flagged and not there", vec![8, 1, b's']);
    content("no headers, flagged", {
        let mut c = vec![8, 1, b's'];
        c.extend([0, 0]);
        c
    });
    content(
        "65 headers",
        with(one(), &|r| r.headers = vec![("h".into(), vec![]); 65]),
    );
    content(
        "a header without a name",
        with(one(), &|r| r.headers = vec![(String::new(), vec![1])]),
    );
    content("a header value that runs past its end", {
        let mut c = vec![8, 1, b's', 1, 0, 1, b'h'];
        c.extend(u32::MAX.to_le_bytes());
        c
    });
    // A record's own length may lie too.
    for told in [0u32, 1, 1_000_000, u32::MAX] {
        let c = one().content();
        let mut body = told.to_le_bytes().to_vec();
        body.extend(crc32fast::hash(&c).to_le_bytes());
        body.extend(&c);
        let sealed = batch::seal(0, 1, &body, body.len() as u32, 0);
        all.push((format!("a record of {} bytes, told as {told}", c.len()), sealed));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_batches_are_refused_and_use_up_their_number() {
    let (_node, api) = node_with_stream().await;
    let mut session = api.session_on("s").await.unwrap();
    let mut sequence = 0;
    let mut good = 0;
    for (what, bytes) in broken_batches() {
        sequence += 1;
        refused(&what, session.ask(sequence, bytes).await, "BAD_BATCH");
        sequence += 1;
        let ack = session
            .ask(sequence, batch::encode(&[Record::new("s", what.clone())], Codec::None))
            .await
            .unwrap();
        good += 1;
        assert_eq!(
            (ack.first, ack.last),
            (Some(good), Some(good)),
            "nothing else was stored, after: {what}"
        );
    }
    assert!(good > 60);
    assert_eq!(api.read_all("s").await.unwrap().len() as u64, good);
}

/// Random damage to a good batch: either refused, or (if nothing was hit that counts) stored as sent. Never a crash.
#[tokio::test(flavor = "multi_thread")]
async fn random_damage_never_gets_through() {
    let seed = harness::seed("random_damage_never_gets_through");
    let mut rng = StdRng::seed_from_u64(seed);
    let (_node, api) = node_with_stream().await;
    let mut session = api.session_on("s").await.unwrap();
    for i in 1..=1_000u64 {
        let codec = [Codec::None, Codec::Lz4, Codec::Zstd][rng.random_range(0..3)];
        let records: Vec<Record> = (0..rng.random_range(1..20))
            .map(|j| Record::new("s.x", vec![j; rng.random_range(0..300)]))
            .collect();
        let good = batch::encode(&records, codec).to_vec();
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bad.len());
            match rng.random_range(0..4) {
                0 => bad[at] ^= 1 << rng.random_range(0..8),
                1 => bad[at] = rng.random(),
                2 => bad.truncate(at.max(1)),
                _ => bad.insert(at, rng.random()),
            }
        }
        // Half of them with a correct outer CRC, so that what is inside gets looked at.
        if bad.len() > batch::HEADER && rng.random_bool(0.5) {
            bad = batch::fix_crc(&bad);
        }
        match session.ask(i, bad.clone()).await {
            Err(e) => assert_eq!(e.retry, "cannot_work", "SEED={seed}, batch {i}: {e:?}"),
            // Taken, so it has to be in order: our own decoder says so.
            Ok(_) => drop(batch::decode(&bad).unwrap_or_else(|e| panic!("SEED={seed}, batch {i} was taken: {e}"))),
        }
    }
    api.read_all("s").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_have_limits() {
    let (_node, api) = node_with_stream().await;
    let mut session = api.session_on("s").await.unwrap();
    assert!(session.opened.batch_bytes_max >= 8 << 20);
    let mut n = 0;
    let mut ask = async |records: Vec<Record>, codec| {
        n += 1;
        session.ask(n, batch::encode(&records, codec)).await
    };
    let message = |bytes: usize| {
        let mut r = Record::new("s", "");
        r.payload = vec![7; bytes - r.content().len()];
        r
    };
    ask(vec![message(4 << 20)], Codec::None)
        .await
        .expect("a message of 4 MiB");
    refused(
        "a message of 4 MiB and a byte",
        ask(vec![message((4 << 20) + 1)], Codec::None).await,
        "MESSAGE_TOO_LARGE",
    );
    refused(
        "the same, compressed",
        ask(vec![message((4 << 20) + 1)], Codec::Zstd).await,
        "MESSAGE_TOO_LARGE",
    );
    let three = vec![message(3 << 20), message(3 << 20), message(3 << 20)];
    refused(
        "a batch of 9 MiB",
        ask(three.clone(), Codec::None).await,
        "BATCH_TOO_LARGE",
    );
    ask(three, Codec::Zstd)
        .await
        .expect("9 MiB of records, compressed to less");
    ask(vec![Record::new("s", ""); 100_000], Codec::Lz4)
        .await
        .expect("100,000 records");
    refused(
        "100,001 records",
        ask(vec![Record::new("s", ""); 100_001], Codec::Lz4).await,
        "BAD_BATCH",
    );

    let plain = |payload: usize| v1::Message {
        subject: "s".into(),
        payload: vec![1; payload].into(),
        ..Default::default()
    };
    refused(
        "a unary publish of nothing",
        api.publish("s", vec![]).await,
        "NO_MESSAGES",
    );
    refused(
        "1,001 messages",
        api.publish("s", vec![plain(1); 1_001]).await,
        "TOO_MANY_MESSAGES",
    );
    refused(
        "a message over 4 MiB",
        api.publish("s", vec![plain(5 << 20)]).await,
        "MESSAGE_TOO_LARGE",
    );
    // Over gRPC's own limit there is no telling: the answer may come, or be lost to the stream that is reset while the
    // client still sends. The server goes on.
    let e = api.publish("s", vec![plain(17 << 20)]).await.unwrap_err();
    assert!(
        matches!(e.code, Code::OutOfRange | Code::ResourceExhausted | Code::Internal),
        "{e:?}"
    );
    api.publish("s", vec![plain(1)]).await.unwrap();

    let limits = v1::Limits {
        max_message_bytes: Some(100),
        ..Default::default()
    };
    let spec = v1::StreamSpec {
        name: "small".into(),
        limits: Some(limits),
        ..Default::default()
    };
    api.create(spec).await.unwrap();
    let message = v1::Message {
        subject: "small".into(),
        payload: vec![1; 200].into(),
        ..Default::default()
    };
    refused(
        "a message over its stream's limit",
        api.publish("small", vec![message]).await,
        "MESSAGE_TOO_LARGE",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn subjects_and_names_have_rules() {
    let (_node, api) = node_with_stream().await;
    let with = |subject: &str| {
        vec![v1::Message {
            subject: subject.into(),
            ..Default::default()
        }]
    };
    let long = format!("s.{}", "x".repeat(300));
    for subject in [
        "", ".", "s.", ".s", "s..a", "s.*", "s.>", "*", ">", "s.a*", "s a", "s.\ta", "s.\u{7f}", "s.\n", &long,
    ] {
        refused(
            &format!("publish to {subject:?}"),
            api.publish("s", with(subject)).await,
            "BAD_MESSAGE",
        );
        // A batch cannot carry a subject over 255 bytes at all.
        if (1..=255).contains(&subject.len()) {
            let mut session = api.session_on("s").await.unwrap();
            let batch = batch::encode(&[Record::new(subject, "x")], Codec::None);
            refused(
                &format!("a batch for {subject:?}"),
                session.ask(1, batch).await,
                "BAD_MESSAGE",
            );
        }
    }
    refused(
        "another's subject",
        api.publish("s", with("t.a")).await,
        "SUBJECT_NOT_IN_STREAM",
    );
    let e = api.publish("nowhere", with("s.a")).await;
    expect(
        "a stream that is not there",
        e,
        Code::NotFound,
        "STREAM_NOT_FOUND",
        "cannot_work",
    );
    let e = api.publish("", with("nowhere.a")).await;
    expect(
        "a subject of no stream",
        e,
        Code::NotFound,
        "NO_STREAM_FOR_SUBJECT",
        "cannot_work",
    );
    assert_eq!(
        api.read_all("s").await.unwrap().len(),
        0,
        "nothing of all that was stored"
    );

    let spec = |name: &str| v1::StreamSpec {
        name: name.into(),
        ..Default::default()
    };
    for name in [
        "",
        ".",
        "a.b",
        "a b",
        "a/b",
        "a*",
        "ä",
        "a\n",
        "x".repeat(256).as_str(),
        "x".repeat(300).as_str(),
    ] {
        refused(
            &format!("a stream named {name:?}"),
            api.create(spec(name)).await,
            "BAD_SPEC",
        );
    }
    api.create(v1::StreamSpec {
        subjects: vec!["long".into()],
        ..spec(&"x".repeat(255))
    })
    .await
    .unwrap();
    for subjects in [
        vec!["a..b"],
        vec![""],
        vec!["a.>.b"],
        vec!["a.b*"],
        vec!["q"; 65],
        vec![long.as_str()],
    ] {
        let subjects: Vec<String> = subjects.into_iter().map(Into::into).collect();
        let what = format!("subjects {subjects:?}");
        refused(
            &what,
            api.create(v1::StreamSpec { subjects, ..spec("t") }).await,
            "BAD_SPEC",
        );
    }
    let overlap = v1::StreamSpec {
        subjects: vec!["s.*".into()],
        ..spec("t")
    };
    let e = api.create(overlap).await;
    assert!(
        e.as_ref().is_err_and(|e| e.message.contains("\"s\"")),
        "names the other stream: {e:?}"
    );
    expect(
        "subjects of another stream",
        e,
        Code::AlreadyExists,
        "SUBJECTS_OVERLAP",
        "cannot_work",
    );
    for (what, spec) in [
        (
            "too many shards",
            v1::StreamSpec {
                shards: 1_025,
                ..spec("t")
            },
        ),
        (
            "too many replicas",
            v1::StreamSpec {
                replicas: 8,
                ..spec("t")
            },
        ),
        (
            "a long description",
            v1::StreamSpec {
                description: "x".repeat(5_000),
                ..spec("t")
            },
        ),
        (
            "a bad namespace",
            v1::StreamSpec {
                namespace: "a.b".into(),
                ..spec("t")
            },
        ),
        (
            "too many ids",
            v1::StreamSpec {
                duplicate_ids_max: Some(2_000_000),
                ..spec("t")
            },
        ),
    ] {
        refused(what, api.create(spec).await, "BAD_SPEC");
    }
    // More replicas than nodes: nothing wrong with the request, but this cluster cannot do it.
    let e = api
        .create(v1::StreamSpec {
            replicas: 3,
            ..spec("t")
        })
        .await
        .unwrap_err();
    assert!(e.message.contains('3') && !e.retry.is_empty(), "{e:?}");
    let e = api.create(v1::StreamSpec { shards: 2, ..spec("s") }).await;
    assert!(
        e.as_ref().is_err_and(|e| e.message.contains("shards")),
        "tells the difference: {e:?}"
    );
    expect(
        "another stream of the same name",
        e,
        Code::AlreadyExists,
        "STREAM_DIFFERS",
        "cannot_work",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_have_an_order() {
    let (_node, api) = node_with_stream().await;
    let batch = || batch::encode(&[Record::new("s", "x")], Codec::None);
    let mut session = api.session_on("s").await.unwrap();
    refused(
        "producer sequence 0",
        session.ask(0, batch()).await,
        "BAD_PRODUCER_SEQUENCE",
    );
    session.ask(1, batch()).await.unwrap();
    let e = session.ask(3, batch()).await;
    expect("a gap", e, Code::FailedPrecondition, "OUT_OF_ORDER", "did_not_happen");
    session.ask(2, batch()).await.unwrap();
    let again = session.ask(2, batch()).await.unwrap();
    assert!(again.duplicate && again.first == Some(2), "{again:?}");

    let open = |f: &dyn Fn(&mut v1::PublishOpen)| {
        let mut open = v1::PublishOpen {
            stream: "s".into(),
            ..Default::default()
        };
        f(&mut open);
        open
    };
    refused(
        "producer 0",
        api.session(open(&|o| o.producer_id = Some(0))).await.map(|_| ()),
        "BAD_PRODUCER",
    );
    let e = api.session(open(&|o| o.stream = "nowhere".into())).await.map(|_| ());
    expect(
        "a session on no stream",
        e,
        Code::NotFound,
        "STREAM_NOT_FOUND",
        "cannot_work",
    );

    // A higher epoch fences the lower one.
    let id = session.opened.producer_id;
    let mut higher = api
        .session(open(&|o| {
            o.producer_id = Some(id);
            o.producer_epoch = Some(2);
        }))
        .await
        .unwrap();
    higher.ask(1, batch()).await.unwrap();
    let e = session.ask(3, batch()).await;
    expect(
        "a fenced producer",
        e,
        Code::FailedPrecondition,
        "PRODUCER_FENCED",
        "cannot_work",
    );

    // A wrong shard, and a wrong map.
    let mut session = api.session_on("s").await.unwrap();
    let map_epoch = session.map_epoch();
    for (shard, map_epoch, reason, retry) in [
        (5, map_epoch, "NO_SUCH_SHARD", "cannot_work"),
        (0, map_epoch + 1, "MAP_CHANGED", "did_not_happen"),
    ] {
        let b = v1::PublishBatch {
            shard,
            map_epoch,
            producer_sequence: 1,
            batch: batch(),
            expect: None,
        };
        session.send(b).await;
        match session.next().await.unwrap() {
            Some(v1::publish_session_response::Frame::Error(e)) => {
                let e = Failure::from(e);
                assert_eq!((e.reason.as_str(), e.retry.as_str()), (reason, retry), "{e:?}");
            }
            other => panic!("{reason}: {other:?}"),
        }
    }
    assert_eq!(api.read_all("s").await.unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_checked_too() {
    let (_node, api) = node_with_stream().await;
    let message = v1::Message {
        subject: "s".into(),
        ..Default::default()
    };
    api.publish("s", vec![message]).await.unwrap();
    expect(
        "above the tail",
        api.get("s", 0, 2).await,
        Code::OutOfRange,
        "NOT_RETAINED",
        "cannot_work",
    );
    let e = api.get("s", 0, 0).await.unwrap_err();
    assert_eq!(e.retry, "cannot_work", "sequence 0: {e:?}");
    refused("no such shard", api.get("s", 7, 1).await, "NO_SUCH_SHARD");
    let open = |f: &dyn Fn(&mut v1::ReadOpen)| {
        let mut open = v1::ReadOpen {
            stream: "s".into(),
            ..Default::default()
        };
        f(&mut open);
        open
    };
    let first = async |open: v1::ReadOpen| match api.read(open).await {
        Err(e) => Err(e),
        Ok(mut reader) => reader.next().await,
    };
    refused(
        "a bad filter",
        first(open(&|o| o.filters = vec!["a..b".into()])).await,
        "BAD_FILTER",
    );
    let at = |at| Some(v1::StartPosition { at: Some(at) });
    let cursor = v1::start_position::At::Cursor(b"no cursor of ours".to_vec().into());
    refused(
        "a made-up cursor",
        first(open(&|o| o.start = at(cursor.clone()))).await,
        "BAD_CURSOR",
    );
    refused(
        "no such shard",
        first(open(&|o| o.shards = vec![9])).await,
        "NO_SUCH_SHARD",
    );
    let e = first(open(&|o| o.stream = "nowhere".into())).await;
    expect("no such stream", e, Code::NotFound, "STREAM_NOT_FOUND", "cannot_work");
    // None of it has hurt.
    assert_eq!(api.read_all("s").await.unwrap().len(), 1);
}
