//! A data directory as an earlier version left it is opened, served whole, and written on.
//!
//! `tests/golden/data-v1.tar.gz` holds a directory (`data/`) whose node was killed, and what it served before
//! (`expected.tsv`). While format 1 is not released it may be made anew, when the format changes on purpose:
//! `cargo test --release --test golden_data -- --ignored`. From the first release on it stays, and a later format gets a
//! file of its own beside it.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::api::Api;
use harness::batch::{Codec, Record, encode};
use harness::messages::message_of;
use harness::{Node, Options, until};
use mainstem::wire::v1;
use prost::Message as _;

/// Ten years: what is removed can still be brought back when the directory is opened.
const GRACE_US: u64 = 10 * 365 * 24 * 3_600 * 1_000_000;
const STREAMS: [&str; 5] = ["plain", "zipped", "purged", "limited", "keyed"];

fn archive() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data-v1.tar.gz")
}

fn specs() -> Vec<v1::StreamSpec> {
    let named = |name: &str| v1::StreamSpec {
        name: name.into(),
        ..Default::default()
    };
    vec![
        v1::StreamSpec {
            description: "everything a record can have".into(),
            metadata: [("owner".to_string(), "golden".to_string())].into(),
            ..named("plain")
        },
        v1::StreamSpec {
            subjects: vec!["zip.>".into(), "also.*.zip".into()],
            shards: 2,
            duplicate_window_us: Some(86_400_000_000),
            duplicate_ids_max: Some(5_000),
            ..named("zipped")
        },
        named("purged"),
        v1::StreamSpec {
            limits: Some(v1::Limits {
                max_messages: Some(50),
                max_bytes: Some(10_000_000),
                max_message_bytes: Some(100_000),
                ..Default::default()
            }),
            dedicated: true,
            ..named("limited")
        },
        v1::StreamSpec {
            shards: 3,
            partitioning: Some(v1::Partitioning {
                by: Some(v1::partitioning::By::Key(v1::ByKey {})),
            }),
            ..named("keyed")
        },
        named("removed"),
    ]
}

fn record(stream: &str, n: u32) -> Record {
    let mut record = Record::new(
        &format!("{stream}.{}", n % 7),
        format!("{stream} {n} ").repeat(1 + n as usize % 5),
    );
    if n.is_multiple_of(2) {
        record = record.id(&format!("{stream}-{n}"));
    }
    if n.is_multiple_of(3) {
        record.headers = vec![
            ("n".into(), n.to_string().into_bytes()),
            ("binary".into(), vec![0, 255, n as u8]),
        ];
    }
    if n.is_multiple_of(5) {
        record.key = Some(n.to_be_bytes().to_vec());
        record.event_time_us = Some(1_700_000_000_000_000 + u64::from(n));
    }
    record
}

/// Batches of ten, in sessions, for a stream of one shard.
async fn publish_batches(api: &Api, stream: &str, from: u32, to: u32, codec: Codec) {
    let mut session = api.session_on(stream).await.unwrap();
    for (sequence, first) in (1..).zip((from..to).step_by(10)) {
        let records: Vec<_> = (first..to.min(first + 10)).map(|n| record(stream, n)).collect();
        session.ask(sequence, encode(&records, codec)).await.unwrap();
    }
}

/// Some of everything. `round` 0 is written, flushed and stopped in order; `round` 1 stays in the log alone.
async fn fill(api: &Api, round: u32) {
    let (from, to) = (round * 60, round * 60 + 60);
    publish_batches(api, "plain", from, to, Codec::None).await;
    publish_batches(api, "purged", from, to, Codec::Zstd).await;
    publish_batches(api, "limited", from, to, Codec::Lz4).await;
    publish_batches(api, "removed", from, from + 10, Codec::None).await;
    for n in from..to {
        // To the shard where each belongs, compressed: some twice, which the stream finds out.
        for _ in 0..1 + n % 2 {
            let mut zipped = record("zip", n);
            zipped.message_id = Some(format!("zip-{n}"));
            api.publish("zipped", vec![message_of(&zipped)]).await.unwrap();
        }
        let mut keyed = record("keyed", n);
        keyed.key = Some(format!("key {}", n % 9).into_bytes());
        api.publish("keyed", vec![message_of(&keyed)]).await.unwrap();
    }
    let purge = |upto, filter: &str| v1::PurgeStreamRequest {
        name: "purged".into(),
        upto: Some(upto),
        filter: filter.into(),
        ..Default::default()
    };
    use v1::purge_stream_request::Upto;
    let front = purge(Upto::BeforeSequence(u64::from(from) + 15), "");
    let holes = purge(Upto::BeforeSequence(u64::from(to) - 5), "purged.3");
    for request in [front, holes] {
        let purged = api.streams().purge_stream(request).await.unwrap().into_inner();
        assert!(purged.purged_messages > 0);
    }
}

/// What a node serves, a line each: streams with their settings, then their messages.
async fn served(api: &Api, streams: &[&str]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
    let mut out = String::new();
    for name in streams {
        let s = api.stream(name).await.unwrap();
        let settings = hex(&s.spec.unwrap().encode_to_vec());
        let map = s.map.unwrap();
        writeln!(
            out,
            "stream\t{name}\t{}\t{}\t{}\t{}\t{}\t{settings}",
            s.stream_id, s.epoch, s.revision, s.created_us, map.epoch
        )
        .unwrap();
        for shard in s.shards {
            writeln!(
                out,
                "shard\t{name}\t{}\t{}\t{}\t{}\t{}\t{}",
                shard.index, shard.shard_id, shard.group_id, shard.floor, shard.tail, shard.messages
            )
            .unwrap();
        }
        let mut messages = api.read_all(name).await.unwrap();
        messages.sort_by_key(|m| (m.shard, m.sequence));
        for m in messages {
            let crc = crc32fast::hash(&m.record.content());
            writeln!(
                out,
                "message\t{name}\t{}\t{}\t{}\t{}\t{crc:08x}",
                m.shard, m.sequence, m.append_time_us, m.record.subject
            )
            .unwrap();
        }
    }
    out
}

fn tar(dir: &Path, args: &[&str]) {
    let done = Command::new("tar").current_dir(dir).args(args).status();
    assert!(done.expect("tar is installed").success(), "tar {args:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes the golden directory anew"]
async fn make_the_golden_directory() {
    let options = Options::plain()
        .flag("--name", "golden")
        .flag("--cluster-name", "golden")
        .flag("--storage-log-write-buffer", "16MiB")
        .flag("--storage-state-write-buffer", "4MiB");
    let quick = options
        .clone()
        .flag("--storage-flush-interval", "100ms")
        .flag("--storage-flush-min", "0");
    let mut node = Node::start(quick).await;
    let api = node.api().await;
    for spec in specs() {
        api.create(spec).await.unwrap();
    }
    fill(&api, 0).await;
    let flushed = async || {
        let files = harness::files(&node.data().join("state"));
        files.iter().any(|f| f.extension().is_some_and(|e| e == "sst"))
    };
    until("the state is flushed", flushed).await;
    node.term();
    assert!(node.wait_exit().await.success());
    node.options = options.flag("--storage-flush-interval", "1h");
    node.restart().await;
    let api = node.api().await;
    fill(&api, 1).await;
    let edit = v1::UpdateStreamRequest {
        spec: Some(v1::StreamSpec {
            name: "zipped".into(),
            description: "edited".into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["description".into()],
        }),
        expected_revision: Some(1),
        request_id: String::new(),
    };
    api.streams().update_stream(edit).await.unwrap();
    let all: Vec<&str> = STREAMS.into_iter().chain(["removed"]).collect();
    let expected = served(&api, &all).await;
    let remove = v1::DeleteStreamRequest {
        name: "removed".into(),
        grace_us: Some(GRACE_US),
        ..Default::default()
    };
    api.streams().delete_stream(remove).await.unwrap();
    node.kill9().await;

    let place = tempfile::tempdir().unwrap();
    harness::copy_dir(node.data(), &place.path().join("data"));
    std::fs::write(place.path().join("expected.tsv"), expected).unwrap();
    for file in harness::files(place.path()) {
        // Locks, and the engine's own diary.
        let name = file.file_name().unwrap().to_str().unwrap();
        if name == "LOCK" || name == "LOG" || name.starts_with("LOG.old") {
            std::fs::remove_file(file).unwrap();
        }
    }
    let archive = archive();
    tar(
        place.path(),
        &[
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mtime=2000-01-01",
            "-czf",
            archive.to_str().unwrap(),
            "data",
            "expected.tsv",
        ],
    );
    let size = std::fs::metadata(&archive).unwrap().len();
    println!("{} has {size} bytes", archive.display());
    assert!(size < 200 << 10, "{size} bytes are too many for the repository");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_format_1_is_served_whole_and_written_on() {
    let place = tempfile::tempdir().unwrap();
    tar(place.path(), &["-xzf", archive().to_str().unwrap()]);
    let expected = std::fs::read_to_string(place.path().join("expected.tsv")).unwrap();
    let of = |streams: &[&str]| -> Vec<String> {
        let mine = |line: &&str| streams.contains(&line.split('\t').nth(1).unwrap());
        expected.lines().filter(mine).map(str::to_owned).collect()
    };
    let data = place.path().canonicalize().unwrap().join("data");
    let mut node = Node::new("golden", Options::plain().flag("--cluster-name", "golden"));
    node.set_data(&data);
    node.restart().await;
    let api = node.api().await;

    let found = served(&api, &STREAMS).await;
    let found: Vec<&str> = found.lines().collect();
    let wanted = of(&STREAMS);
    assert!(wanted.len() > 350, "the golden directory has some hundred messages");
    for (found, wanted) in found.iter().zip(&wanted) {
        assert_eq!(found, wanted);
    }
    assert_eq!(found.len(), wanted.len());
    // It has what it is meant to test.
    let shard = async |name: &str| api.stream(name).await.unwrap().shards[0].clone();
    let limited = shard("limited").await;
    assert_eq!((limited.floor, limited.tail, limited.messages), (71, 121, 50));
    let purged = shard("purged").await;
    assert!(
        purged.floor > 1 && purged.messages < purged.tail - purged.floor,
        "{purged:?}"
    );
    // By way of the indexes too.
    for n in 100..120 {
        let wanted = record("plain", n);
        let found = api.get("plain", 0, u64::from(n) + 1).await.unwrap().message.unwrap();
        assert_eq!(found, message_of(&wanted));
        let by = v1::get_request::By::LastBySubject(v1::GetLastBySubject {
            subject: format!("plain.{}", n % 7),
        });
        let request = v1::GetRequest {
            stream: "plain".into(),
            by: Some(by),
            ..Default::default()
        };
        let last = api.reader().get(request).await.unwrap().into_inner().message.unwrap();
        assert_eq!(
            last.sequence,
            (114..=120).find(|s| (s - 1) % 7 == u64::from(n) % 7).unwrap()
        );
    }
    // What was removed comes back as it was.
    let undelete = v1::UndeleteStreamRequest {
        name: "removed".into(),
        ..Default::default()
    };
    api.streams().undelete_stream(undelete).await.unwrap();
    let messages = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|l| l.starts_with("message"));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(
        messages(&served(&api, &["removed"]).await),
        messages(&of(&["removed"]).join("\n"))
    );

    // It is written on, where it ended, and survives a crash.
    for stream in ["plain", "purged", "limited", "removed"] {
        let tail = shard(stream).await.tail;
        let ack = api
            .publish(stream, vec![message_of(&record(stream, 999))])
            .await
            .unwrap()
            .acks[0];
        assert_eq!((ack.sequence, ack.duplicate), (tail, false), "{stream}");
        assert_eq!(shard(stream).await.tail, tail + 1);
    }
    let all: Vec<&str> = STREAMS.into_iter().chain(["removed"]).collect();
    let before = served(&api, &all).await;
    node.kill9().await;
    node.restart().await;
    assert_eq!(served(&node.api().await, &all).await, before);
    node.term();
    assert!(node.wait_exit().await.success());
    node.restart().await;
    assert_eq!(served(&node.api().await, &all).await, before);
}
