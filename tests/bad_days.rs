//! Things that happen to a server: its disk fills up, fails, is damaged or is another's; its clock jumps; it is told to
//! stop while it is busy.
#![allow(clippy::unwrap_used)]

mod harness;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use harness::api::{Api, Event, Failure, Read};
use harness::damage::flip_blob_bit;
use harness::load::{Load, Shape};
use harness::{History, Node, Options, until};
use mainstem::wire::v1;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tonic::Code;

fn message(subject: &str, payload: Vec<u8>) -> v1::Message {
    v1::Message {
        subject: subject.into(),
        payload: payload.into(),
        ..Default::default()
    }
}

/// The n-th payload of a stream: told by its number alone.
fn payload(n: u64, size: usize) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = n.to_le_bytes().to_vec();
    while out.len() < size.max(8) {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.extend(state.to_le_bytes());
    }
    out.truncate(size.max(8));
    out
}

/// Publishes payload `n` to `s`; it must get sequence `n`.
async fn publish(api: &Api, n: u64, size: usize) -> Result<(), Failure> {
    let answer = api.publish("s", vec![message("s", payload(n, size))]).await?;
    assert_eq!(answer.acks[0].sequence, n);
    Ok(())
}

/// Sequences 1..=last are there with their payloads, and nothing else; `more` more may be.
fn check(stored: &[Read], last: u64, more: u64, size: usize) {
    let n = stored.len() as u64;
    assert!(
        (last..=last + more).contains(&n),
        "{n} messages are stored, {last} were acknowledged"
    );
    for (m, n) in stored.iter().zip(1..) {
        assert_eq!(m.sequence, n);
        assert!(m.record.payload == payload(n, size), "sequence {n} was changed");
    }
}

fn alarmed(info: &v1::GetServerInfoResponse, alarm: &str) -> bool {
    info.alarms.iter().any(|a| a == alarm)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_publishes_serves_reads_and_recovers() {
    const SIZE: usize = 100_000;
    let options = Options::faulty()
        .flag("--storage-min-free", "32MiB")
        .flag("--storage-space-interval", "10ms")
        .flag("--storage-log-write-buffer", "16MiB")
        .flag("--storage-state-write-buffer", "8MiB");
    let mut node = Node::start(options).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    let mut n = 0;
    for round in 0..2 {
        node.faults("space 100000000");
        let refusal = loop {
            match publish(&api, n + 1, SIZE).await {
                Ok(()) => n += 1,
                Err(e) => break e,
            }
            assert!(n < 5_000, "the disk should be full by now: {}", node.faults("stats"));
        };
        let told = (refusal.code, refusal.reason.as_str(), refusal.retry.as_str());
        assert_eq!(
            told,
            (Code::ResourceExhausted, "DISK_LOW", "did_not_happen"),
            "{refusal:?}"
        );
        assert!(n > 0);
        // It stays so, in every way of publishing; and reads go on.
        let mut session = api.session_on("s").await.unwrap();
        let batch = harness::batch::encode(&[harness::batch::Record::new("s", "x")], harness::batch::Codec::None);
        let e = session.ask(1, batch).await.unwrap_err();
        assert_eq!(
            (e.reason.as_str(), e.retry.as_str()),
            ("DISK_LOW", "did_not_happen"),
            "{e:?}"
        );
        check(&api.read_all("s").await.unwrap(), n, 0, SIZE);
        let last = api.get("s", 0, n).await.unwrap();
        assert_eq!(last.message.unwrap().payload, payload(n, SIZE));
        assert!(
            alarmed(&api.info().await.unwrap(), "disk_low"),
            "{:?}",
            api.info().await.unwrap().alarms
        );
        // Space returns, and with it publishing; the second time after a restart.
        node.faults("space unlimited");
        until("publishing goes on", async || publish(&api, n + 1, SIZE).await.is_ok()).await;
        n += 1;
        until("the alarm ends", async || {
            !alarmed(&api.info().await.unwrap(), "disk_low")
        })
        .await;
        if round == 1 {
            node.kill9().await;
            node.restart().await;
        }
    }
    let api = node.api().await;
    check(&api.read_all("s").await.unwrap(), n, 0, SIZE);
    publish(&api, n + 1, SIZE).await.unwrap();
}

/// A write that fails although free space was told stops the node; nothing that was acknowledged is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_stops_the_node_and_loses_nothing() {
    for (what, fault) in [
        ("a sync of the log", "fail-sync 1 1000000 EIO /log/"),
        ("a write to the log", "fail-write 1 1000000 EIO /log/"),
        ("a write to the log, disk full", "fail-write 1 1000000 ENOSPC /log/"),
        ("the third sync from now, and only that", "fail-sync 3 1 EIO /log/"),
    ] {
        let mut node = Node::start(Options::faulty()).await;
        let api = node.api().await;
        api.create_simple("s", 1).await;
        for n in 1..=50 {
            publish(&api, n, 1_000).await.unwrap();
        }
        node.faults(fault);
        let mut last = 50;
        let failure = loop {
            match publish(&api, last + 1, 1_000).await {
                Ok(()) => last += 1,
                Err(e) => break e,
            }
            assert!(last < 10_000, "{what}: nothing fails");
        };
        assert_ne!(failure.retry, "cannot_work", "{what}: {failure:?}");
        assert_ne!(
            failure.retry, "did_not_happen",
            "{what}: it may be on the disk: {failure:?}"
        );
        let status = node.wait_exit().await;
        assert!(!status.success(), "{what}: {status}");
        assert!(
            node.log().contains("restart"),
            "{what}: says what to do:\n{}",
            node.log()
        );
        node.restart().await;
        let api = node.api().await;
        let stored = api.read_all("s").await.unwrap();
        check(&stored, last, 1, 1_000);
        publish(&api, stored.len() as u64 + 1, 1_000).await.unwrap();
    }
}

/// The state's own disk trouble loses nothing either: it is made again from the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_flush_of_the_state_loses_nothing() {
    let options = Options::faulty()
        .flag("--storage-state-write-buffer", "4MiB")
        .flag("--storage-flush-interval", "100ms")
        .flag("--storage-flush-min", "0");
    let mut node = Node::start(options).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    publish(&api, 1, 20_000).await.unwrap();
    node.faults("fail-sync 1 1000000 EIO /state/");
    let mut last = 1;
    while last < 1_000 && publish(&api, last + 1, 20_000).await.is_ok() {
        last += 1;
    }
    if node.runs() {
        node.kill9().await;
    } else {
        node.wait_exit().await;
    }
    node.restart().await;
    check(&node.api().await.read_all("s").await.unwrap(), last, 1, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_per_directory() {
    let node = Node::start(Options::plain()).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    let mut second = Node::new("second", Options::plain());
    second.set_data(node.data());
    second.launch();
    let status = second.try_ready().await.unwrap_err();
    assert!(!status.success());
    let log = second.log();
    assert!(
        log.contains(&node.pid().to_string()) && log.contains("in use"),
        "names the other process:\n{log}"
    );
    publish(&api, 1, 10).await.unwrap();
    check(&api.read_all("s").await.unwrap(), 1, 0, 10);
}

/// A node with some of everything on disk, killed; acknowledged: 1..=the number returned.
async fn node_with_data(size: usize) -> (Node, u64) {
    let options = Options::plain()
        .flag("--storage-log-write-buffer", "16MiB")
        .flag("--storage-state-write-buffer", "4MiB")
        .flag("--storage-flush-interval", "200ms")
        .flag("--storage-flush-min", "0");
    let mut node = Node::start(options).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    let last = 24_000_000 / size as u64;
    for n in 1..=last {
        publish(&api, n, size).await.unwrap();
    }
    let flushed = async || {
        harness::files(&node.data().join("state"))
            .iter()
            .any(|f| f.extension().is_some_and(|e| e == "sst"))
    };
    until("the state is flushed", flushed).await;
    for n in last + 1..=last + 20 {
        publish(&api, n, size).await.unwrap();
    }
    node.kill9().await;
    (node, last + 20)
}

/// Immutable files are linked, the others copied.
fn clone_data(from: &Path, to: &Path) {
    for file in harness::files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        if file.extension().is_some_and(|e| e == "sst" || e == "blob") {
            std::fs::hard_link(&file, &target).unwrap();
        } else {
            std::fs::copy(&file, &target).unwrap();
        }
    }
}

/// `log/000012.log` and `log/000015.log` are of one kind.
fn kind(file: &Path) -> String {
    let name: String = file
        .to_str()
        .unwrap()
        .chars()
        .map(|c| if c.is_ascii_digit() { '#' } else { c })
        .collect();
    let mut kind = name.replace("##", "#");
    while kind.contains("##") {
        kind = kind.replace("##", "#");
    }
    kind
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    /// A bit at this part of the file, in thousandths.
    Flip(u64),
    /// A bit so many bytes before the end.
    FlipFromEnd(u64),
    Cut(u64),
    CutFromEnd(u64),
    Remove,
}

fn damage(file: &Path, how: Damage) {
    let mut bytes = std::fs::read(file).unwrap();
    let n = bytes.len() as u64;
    let mut flip = |at: u64| {
        if let Some(byte) = bytes.get_mut(at as usize) {
            *byte ^= 0x08;
        }
    };
    match how {
        Damage::Flip(part) => flip(n * part / 1000),
        Damage::FlipFromEnd(back) => flip(n.saturating_sub(back)),
        Damage::Cut(part) => bytes.truncate((n * part / 1000) as usize),
        Damage::CutFromEnd(back) => bytes.truncate(n.saturating_sub(back) as usize),
        Damage::Remove => {}
    }
    // Not in place: the file may be a link to the original.
    std::fs::remove_file(file).unwrap();
    if !matches!(how, Damage::Remove) {
        std::fs::write(file, bytes).unwrap();
    }
}

/// Nobody else has what a lone node has: what is damaged is told as that, and nothing new is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_alone_withholds_what_is_damaged() {
    const SIZE: usize = 20_000;
    const COUNT: u64 = 20;
    let mut rng = StdRng::seed_from_u64(harness::seed("a_node_alone_withholds_what_is_damaged"));
    let mut node = Node::start(Options::plain()).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    for n in 1..=COUNT {
        publish(&api, n, SIZE).await.unwrap();
    }
    node.term();
    node.wait_exit().await;
    println!("{:?}", flip_blob_bit(node.data(), &mut rng));
    node.restart().await;
    let api = node.api().await;
    let mut refused = 0;
    for n in 1..=COUNT {
        match api.get("s", 0, n).await {
            Ok(m) => assert!(m.message.unwrap().payload == payload(n, SIZE), "{n} was changed"),
            Err(failure) => {
                let told = (failure.code, failure.reason.as_str(), failure.retry.as_str());
                assert_eq!(told, (Code::DataLoss, "DAMAGED", "cannot_work"), "{failure:?}");
                refused += 1;
            }
        }
    }
    // A bit between two records, which nobody reads, is possible and rare.
    assert!(refused <= 1, "{refused} of {COUNT} are withheld for one bit");
    if refused == 1 {
        let failure = api.read_all("s").await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::DataLoss, "DAMAGED"));
        let failure = publish(&api, COUNT + 1, SIZE).await.unwrap_err();
        assert_eq!(
            (failure.reason.as_str(), failure.retry.as_str()),
            ("DAMAGED", "cannot_work")
        );
        assert!(alarmed(&api.info().await.unwrap(), "damaged"));
    }
    assert!(node.runs());
}

/// What became of a node with a damaged file.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Verdict {
    /// It did not start, with exit code 6, and said why.
    Stopped,
    /// It started, and does not serve what is damaged.
    Withheld,
    /// Everything that was acknowledged is served, unchanged.
    Unhurt,
}

async fn verdict(node: &mut Node, last: u64, size: usize) -> Result<Verdict, String> {
    node.launch();
    if let Err(status) = node.try_ready().await {
        let log = node.log();
        let lower = log.to_lowercase();
        if status.code() != Some(6) {
            return Err(format!("ended with {status} instead of exit code 6:\n{log}"));
        }
        if !["damage", "corrupt", "missing", "does not match", "cannot be read"]
            .iter()
            .any(|w| lower.contains(w))
        {
            return Err(format!("does not say what is wrong:\n{log}"));
        }
        if !["restore", "backup", "replace", "remove", "to do"]
            .iter()
            .any(|w| lower.contains(w))
        {
            return Err(format!("does not say what to do:\n{log}"));
        }
        return Ok(Verdict::Stopped);
    }
    let api = node.api().await;
    let result = api.read_all("s").await;
    // Also by way of the indexes.
    let get = api.get("s", 0, last).await;
    if node.runs() {
        node.kill9().await;
    } else {
        node.wait_exit().await;
    }
    let log = node.log();
    let withheld = |e: &Failure| {
        let said = log.to_lowercase();
        let said = said.contains("damage") || said.contains("corrupt");
        match (e.code, said) {
            (Code::DataLoss, true) => Ok(Verdict::Withheld),
            // Its catalog is the damaged part: it is reported, and the shard is not served.
            (Code::Unavailable, true) => Ok(Verdict::Withheld),
            _ => Err(format!("reading fails with {e:?}, log:\n{log}")),
        }
    };
    match (result, get) {
        (Err(e), _) => withheld(&e),
        (Ok(stored), get) => {
            if stored.len() as u64 != last {
                return Err(format!(
                    "{} of {last} messages are served, silently\n{log}",
                    stored.len()
                ));
            }
            for (m, n) in stored.iter().zip(1..) {
                if m.sequence != n || m.record.payload != payload(n, size) {
                    return Err(format!("sequence {n} is served with another content"));
                }
            }
            match get {
                Err(e) => withheld(&e),
                Ok(m) if m.message.as_ref().unwrap().payload == payload(last, size) => Ok(Verdict::Unhurt),
                Ok(m) => Err(format!("get({last}) is served wrong: {:?}", m.sequence)),
            }
        }
    }
}

/// Every kind of file, each kind of damage. `DAMAGE=all` takes every file instead of one or two of each kind.
#[tokio::test(flavor = "multi_thread")]
async fn damage_to_any_file_is_found_out_or_does_no_harm() {
    const SIZE: usize = 30_000;
    let seed = harness::seed("damage_to_any_file");
    let all = std::env::var("DAMAGE").is_ok_and(|d| d == "all");
    let (mut node, last) = node_with_data(SIZE).await;
    let original = node.data().to_path_buf();
    let mut kinds = std::collections::BTreeMap::<String, Vec<std::path::PathBuf>>::new();
    for file in harness::files(&original) {
        let file = file.strip_prefix(&original).unwrap().to_path_buf();
        kinds.entry(kind(&file)).or_default().push(file);
    }
    let how = [
        Damage::Flip(seed % 1000),
        Damage::Flip(500),
        Damage::FlipFromEnd(1 + seed % 64),
        Damage::Cut(500),
        Damage::CutFromEnd(1 + seed % 40),
        Damage::Cut(0),
        Damage::Remove,
    ];
    let mut wrong = Vec::new();
    let mut table = std::collections::BTreeMap::<String, Vec<Verdict>>::new();
    for (kind, files) in &kinds {
        let chosen = if all {
            files.clone()
        } else {
            vec![files[0].clone(), files[files.len() - 1].clone()]
        };
        let chosen: std::collections::BTreeSet<_> = chosen.into_iter().collect();
        for file in chosen {
            for how in how {
                let place = node.place().join("copy");
                let _ = std::fs::remove_dir_all(&place);
                clone_data(&original, &place);
                damage(&place.join(&file), how);
                node.set_data(&place);
                match verdict(&mut node, last, SIZE).await {
                    Ok(v) => table.entry(kind.clone()).or_default().push(v),
                    Err(e) => wrong.push(format!("{} {how:?}: {e}", file.display())),
                }
            }
        }
    }
    for (kind, verdicts) in &table {
        let count = |v| verdicts.iter().filter(|x| **x == v).count();
        println!(
            "{kind}: {} stopped, {} withheld, {} unhurt",
            count(Verdict::Stopped),
            count(Verdict::Withheld),
            count(Verdict::Unhurt)
        );
    }
    assert!(
        wrong.is_empty(),
        "SEED={seed}: {} cases:\n{}",
        wrong.len(),
        wrong.join("\n====\n")
    );
    // The test itself must bite: damage to what holds the data cannot go unnoticed.
    for must in ["log/#.log", "state/#.sst"] {
        let verdicts = table
            .get(must)
            .unwrap_or_else(|| panic!("no {must} among {:?}", table.keys()));
        assert!(verdicts.iter().any(|v| *v != Verdict::Unhurt), "{must}: {verdicts:?}");
    }
}

fn rewrite_sealed(file: &Path, change: impl Fn(&str) -> String) {
    let text = std::fs::read_to_string(file).unwrap();
    let body = &text[..text.trim_end().rfind('\n').unwrap() + 1];
    let body = change(body);
    std::fs::write(file, format!("{body}crc {:08x}\n", crc32fast::hash(body.as_bytes()))).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_a_newer_version_is_left_alone() {
    let mut node = Node::start(Options::plain()).await;
    node.api().await.create_simple("s", 1).await;
    node.kill9().await;
    rewrite_sealed(&node.data().join("FORMAT"), |body| {
        assert!(body.starts_with("mainstem-data 1"), "{body}");
        body.replace("mainstem-data 1", "mainstem-data 9")
    });
    let before: Vec<_> = harness::files(node.data())
        .into_iter()
        .map(|f| (std::fs::read(&f).unwrap(), f))
        .collect();
    node.launch();
    let status = node.try_ready().await.unwrap_err();
    assert!(!status.success());
    let log = node.log();
    assert!(log.contains('9') && log.contains("newer"), "says what and why:\n{log}");
    for (bytes, file) in before {
        if file.file_name().is_some_and(|n| n != "LOCK") {
            assert!(std::fs::read(&file).unwrap() == bytes, "{} was changed", file.display());
        }
    }
}

/// Parts of different directories do not make one: another node's, or the same node's of another day.
#[tokio::test(flavor = "multi_thread")]
async fn parts_of_another_directory_are_found_out() {
    let mut old = Node::start(Options::plain()).await;
    let api = old.api().await;
    api.create_simple("s", 1).await;
    for n in 1..=100 {
        publish(&api, n, 1_000).await.unwrap();
    }
    old.kill9().await;
    let older = old.place().join("older");
    harness::copy_dir(old.data(), &older);
    old.restart().await;
    let api = old.api().await;
    for n in 101..=200 {
        publish(&api, n, 1_000).await.unwrap();
    }
    old.kill9().await;
    let mut other = Node::start(Options::plain()).await;
    let api = other.api().await;
    api.create_simple("s", 1).await;
    for n in 1..=300 {
        publish(&api, n, 1_000).await.unwrap();
    }
    other.kill9().await;
    let original = old.data().to_path_buf();
    for (what, from, part) in [
        ("another node's log", other.data().to_path_buf(), "log"),
        ("another node's state", other.data().to_path_buf(), "state"),
        ("its own log of yesterday", older.clone(), "log"),
        ("its own state of yesterday", older, "state"),
    ] {
        let place = old.place().join("mixed");
        let _ = std::fs::remove_dir_all(&place);
        harness::copy_dir(&original, &place);
        std::fs::remove_dir_all(place.join(part)).unwrap();
        harness::copy_dir(&from.join(part), &place.join(part));
        old.set_data(&place);
        match verdict(&mut old, 200, 1_000).await {
            Ok(v) => println!("{what}: {v:?}"),
            Err(e) => panic!("{what}: {e}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_a_year_ahead_expires_nothing() {
    let year_us = 365 * 24 * 3600 * 1_000_000u64;
    let node = Node::start(Options::faulty()).await;
    let api = node.api().await;
    let aged = |name: &str, max_age_us| v1::StreamSpec {
        name: name.into(),
        limits: Some(v1::Limits {
            max_age_us: Some(max_age_us),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.create(aged("s", 3_600_000_000)).await.unwrap();
    for n in 1..=100 {
        publish(&api, n, 100).await.unwrap();
    }
    // Expiry as such works, or the rest would prove nothing.
    api.create(aged("short", 500_000)).await.unwrap();
    api.publish("short", vec![message("short", vec![1])]).await.unwrap();
    until("a message of the short stream expires", async || {
        let shard = &api.stream("short").await.unwrap().shards[0];
        shard.floor == shard.tail && shard.tail == 2
    })
    .await;
    for offset in [format!("{year_us}"), format!("-{year_us}")] {
        node.faults(&format!("clock-offset-us {offset}"));
        until("the alarm", async || alarmed(&api.info().await.unwrap(), "clock_jump")).await;
        // Long enough for every periodic thing to have happened. There is no event to wait for: nothing happens.
        tokio::time::sleep(Duration::from_secs(3)).await;
        check(&api.read_all("s").await.unwrap(), 100, 0, 100);
        node.faults("clock-offset-us 0");
        until("the end of the alarm", async || {
            !alarmed(&api.info().await.unwrap(), "clock_jump")
        })
        .await;
    }
    // Time has not run away in between: what is published now is stamped with now.
    publish(&api, 101, 100).await.unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_micros() as u64;
    let stamped = api.get("s", 0, 101).await.unwrap().append_time_us;
    assert!(stamped.abs_diff(now) < 60_000_000, "stamped {stamped}, it is {now}");
    check(&api.read_all("s").await.unwrap(), 101, 0, 100);
}

/// The same for a restart: the time at which the node last ran is known, and a wall clock that is far from it is not
/// believed until somebody vouches for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_a_clock_a_year_ahead_expires_nothing() {
    let year_us = 365 * 24 * 3600 * 1_000_000u64;
    let now_us = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.unwrap().as_micros() as u64
    };
    let mut node = Node::start(Options::faulty()).await;
    let api = node.api().await;
    let limits = v1::Limits {
        max_age_us: Some(3_600_000_000),
        ..Default::default()
    };
    let spec = v1::StreamSpec {
        name: "s".into(),
        limits: Some(limits),
        ..Default::default()
    };
    api.create(spec).await.unwrap();
    for n in 1..=50 {
        publish(&api, n, 100).await.unwrap();
    }
    let mut last = 50;
    for (offset, orderly) in [(format!("{year_us}"), false), (format!("-{year_us}"), true)] {
        if orderly {
            node.term();
            assert!(node.wait_exit().await.success());
        } else {
            node.kill9().await;
        }
        node.options = Options::faulty().run(&format!("clock-offset-us {offset}"));
        node.restart().await;
        let api = node.api().await;
        until("the alarm", async || alarmed(&api.info().await.unwrap(), "clock_jump")).await;
        assert!(
            node.log().contains("--accept-clock"),
            "says what to do:\n{}",
            node.log()
        );
        // Long enough for every periodic thing to have happened. There is no event to wait for: nothing happens.
        tokio::time::sleep(Duration::from_secs(3)).await;
        // What is published meanwhile is stamped by the time that went on, not by the clock that is off.
        last += 1;
        publish(&api, last, 100).await.unwrap();
        let stamped = api.get("s", 0, last).await.unwrap().append_time_us;
        assert!(
            stamped.abs_diff(now_us()) < 600_000_000,
            "stamped {stamped}, it is {}",
            now_us()
        );
        check(&api.read_all("s").await.unwrap(), last, 0, 100);
        // The clock is put right: no restart is needed.
        node.faults("clock-offset-us 0");
        until("the end of the alarm", async || {
            !alarmed(&api.info().await.unwrap(), "clock_jump")
        })
        .await;
        last += 1;
        publish(&api, last, 100).await.unwrap();
        check(&api.read_all("s").await.unwrap(), last, 0, 100);
    }
    // An operator vouches for the clock: then what is a year old expires. So it was this that kept it.
    node.kill9().await;
    node.options = Options::faulty().run(&format!("clock-offset-us {year_us}"));
    node.options.flags.push("--accept-clock".into());
    node.restart().await;
    let api = node.api().await;
    until("everything expires", async || {
        let shard = &api.stream("s").await.unwrap().shards[0];
        shard.floor == shard.tail && shard.tail == last + 1
    })
    .await;
    assert!(!alarmed(&api.info().await.unwrap(), "clock_jump"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_says_go_away_and_keeps_everything() {
    let mut node = Node::start(Options::plain()).await;
    let history = Arc::new(History::default());
    let api = node.api().await;
    let streams = vec![api.create_simple("one", 1).await, api.create_simple("many", 4).await];
    let mut follower = api
        .read(v1::ReadOpen {
            stream: "one".into(),
            ..Default::default()
        })
        .await
        .unwrap();
    let load = Load::new(history.clone(), &streams, 1, Shape::default());
    let running = load.start(&node.client_addr());
    history.wait_acked(300).await;
    node.term();
    let told = async {
        loop {
            match follower.next().await {
                Ok(Some(Event::GoAway(away))) => return away,
                Ok(Some(_)) => {}
                other => panic!("the reader was not told: {other:?}"),
            }
        }
    };
    let away = tokio::time::timeout(harness::PATIENCE, told)
        .await
        .expect("a reader is told");
    assert!(!away.cursor.is_empty(), "and where to go on: {away:?}");
    let (_load, ends) = running.join().await;
    assert_eq!(ends.away, 4, "every producer is told: {:?}", ends.failures);
    for failure in &ends.failures {
        assert_ne!(failure.retry, "cannot_work", "{failure:?}");
    }
    let status = node.wait_exit().await;
    assert!(status.success(), "{status}\n{}", node.log());
    node.restart().await;
    let api = node.api().await;
    for stream in ["one", "many"] {
        let stored = api.read_all(stream).await.unwrap();
        let tally = history
            .check(stream, &stored)
            .unwrap_or_else(|wrong| panic!("{wrong:#?}"));
        println!("{stream}: {tally:?}");
        assert_eq!(
            tally.unknown_there + tally.unknown_absent,
            0,
            "every batch was answered: {tally:?}"
        );
    }
}
