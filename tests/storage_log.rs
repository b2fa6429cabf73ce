//! The log database: order, durability, purge, truncation, holes, quarantine.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use mainstem::model::{GroupId, LogIndex, NodeId, ReplicaId};
use mainstem::storage::{Done, LogDb, OpenError, StorageError, Store, StoreOptions};

fn options(dir: &std::path::Path) -> StoreOptions {
    StoreOptions {
        log_write_buffer_bytes: 4 << 20,
        state_write_buffer_bytes: 4 << 20,
        block_cache_bytes: 4 << 20,
        min_free_bytes: 0,
        ..StoreOptions::new(dir)
    }
}

fn open(dir: &std::path::Path) -> std::sync::Arc<Store> {
    Store::open(options(dir), None).unwrap()
}

fn wait<T>(ask: impl FnOnce(Done) -> T) -> Result<(), StorageError> {
    let (tx, rx) = mpsc::channel();
    ask(Box::new(move |r| tx.send(r).unwrap()));
    rx.recv_timeout(Duration::from_secs(30)).unwrap()
}

fn i(n: u64) -> LogIndex {
    LogIndex::new(n)
}

fn g(n: u64) -> GroupId {
    GroupId::new(n)
}

fn entries(from: u64, to: u64, tag: &str) -> Vec<(LogIndex, Bytes)> {
    (from..to).map(|n| (i(n), Bytes::from(format!("{tag}-{n}")))).collect()
}

fn append(log: &LogDb, group: GroupId, from: u64, to: u64, tag: &str) -> Result<(), StorageError> {
    wait(|done| log.append(group, entries(from, to, tag), done))
}

fn texts(log: &LogDb, group: GroupId, from: u64, to: u64) -> Vec<String> {
    log.read(group, i(from), i(to), usize::MAX)
        .unwrap()
        .into_iter()
        .map(|(_, b)| String::from_utf8(b.to_vec()).unwrap())
        .collect()
}

#[test]
fn what_was_acknowledged_is_there_after_a_drop_without_close() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        for group in 1..=20 {
            append(store.log(), g(group), 0, 50, &format!("g{group}")).unwrap();
            wait(|d| store.log().save_vote(g(group), Bytes::from(format!("vote{group}")), d)).unwrap();
        }
        store.log().save_committed(g(3), Bytes::from_static(b"c3"));
        append(store.log(), g(3), 50, 51, "g3").unwrap();
    }
    let store = open(dir.path());
    assert_eq!(store.identity().incarnation, 2);
    assert_eq!(store.log().groups().len(), 20);
    for group in 1..=20 {
        let meta = store.log().meta(g(group)).unwrap();
        let last = if group == 3 { 50 } else { 49 };
        assert_eq!((meta.first, meta.last), (Some(i(0)), Some(i(last))));
        assert_eq!(meta.vote, Some(Bytes::from(format!("vote{group}"))));
        let all = texts(store.log(), g(group), 0, last + 1);
        assert_eq!(all.len() as u64, last + 1);
        assert_eq!(all[49], format!("g{group}-49"));
    }
    assert_eq!(
        store.log().meta(g(3)).unwrap().committed,
        Some(Bytes::from_static(b"c3"))
    );
}

#[test]
fn completions_come_in_order_for_each_group_under_load_from_many_threads() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (tx, rx) = mpsc::channel();
    std::thread::scope(|scope| {
        for group in 1..=8u64 {
            let (log, tx) = (store.log().clone(), tx.clone());
            scope.spawn(move || {
                for n in 0..500u64 {
                    let tx = tx.clone();
                    let done: Done = Box::new(move |r| tx.send((group, n, r.is_ok())).unwrap());
                    if n % 50 == 49 {
                        log.save_vote(g(group), Bytes::from(n.to_string()), done);
                    } else {
                        let index = n - n / 50;
                        log.append(g(group), entries(index, index + 1, "x"), done);
                    }
                }
            });
        }
    });
    drop(tx);
    let mut next = [0u64; 9];
    for (group, n, ok) in rx.iter().take(8 * 500) {
        assert!(ok);
        assert_eq!(n, next[group as usize], "group {group} out of order");
        next[group as usize] += 1;
    }
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    for group in 1..=8 {
        let meta = store.log().meta(g(group)).unwrap();
        assert_eq!(meta.last, Some(i(489)));
        assert_eq!(meta.vote, Some(Bytes::from_static(b"499")));
    }
}

#[test]
fn purged_entries_are_gone_at_once_and_stay_gone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let log = store.log();
    append(log, g(7), 0, 200, "a").unwrap();
    let (tx, rx) = mpsc::channel();
    log.purge(
        g(7),
        i(149),
        Bytes::from_static(b"id149"),
        Box::new(move |r| tx.send(r).unwrap()),
    );
    assert!(matches!(
        log.read(g(7), i(149), i(200), 1 << 20),
        Err(StorageError::Purged { .. })
    ));
    rx.recv().unwrap().unwrap();
    assert_eq!(texts(log, g(7), 150, 1000).len(), 50);
    let meta = log.meta(g(7)).unwrap();
    assert_eq!((meta.first, meta.last), (Some(i(150)), Some(i(199))));
    assert_eq!(meta.purged, Some((i(149), Bytes::from_static(b"id149"))));
    // A lower marker changes nothing.
    wait(|d| log.purge(g(7), i(10), Bytes::from_static(b"id10"), d)).unwrap();
    assert_eq!(log.meta(g(7)).unwrap(), meta);
    // A marker beyond the end: the log goes on after it.
    wait(|d| log.purge(g(7), i(500), Bytes::from_static(b"id500"), d)).unwrap();
    let meta = log.meta(g(7)).unwrap();
    assert_eq!((meta.first, meta.last), (None, Some(i(500))));
    assert!(matches!(
        append(log, g(7), 500, 501, "b"),
        Err(StorageError::Gap { .. })
    ));
    assert!(matches!(
        append(log, g(7), 502, 503, "b"),
        Err(StorageError::Gap { .. })
    ));
    append(log, g(7), 501, 502, "b").unwrap();
    // State/ knows nothing of this group, so what was purged is nowhere any more.
    drop(store);
    match Store::open(options(dir.path()), None).map(|_| ()) {
        Err(OpenError::StateDamaged { groups, .. }) => assert_eq!(groups, vec![g(7)]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn truncated_entries_are_gone_at_once_and_can_be_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let log = store.log();
    append(log, g(2), 0, 200, "old").unwrap();
    let (tx, rx) = mpsc::channel();
    log.truncate_after(g(2), Some(i(9)), Box::new(move |r| tx.send(r).unwrap()));
    assert_eq!(texts(log, g(2), 5, 300).len(), 5);
    assert!(texts(log, g(2), 10, 300).is_empty());
    append(log, g(2), 10, 12, "new").unwrap();
    rx.recv().unwrap().unwrap();
    assert_eq!(texts(log, g(2), 9, 300), ["old-9", "new-10", "new-11"]);
    wait(|d| log.truncate_after(g(2), None, d)).unwrap();
    assert_eq!(log.meta(g(2)).unwrap().last, None);
    append(log, g(2), 5, 7, "again").unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(texts(store.log(), g(2), 5, 300), ["again-5", "again-6"]);
    assert_eq!(store.log().meta(g(2)).unwrap().first, Some(i(5)));
}

#[test]
fn an_append_with_a_gap_or_over_existing_entries_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let log = store.log();
    append(log, g(2), 0, 10, "a").unwrap();
    for (from, to) in [(11, 12), (9, 10), (0, 1)] {
        match append(log, g(2), from, to, "b") {
            Err(StorageError::Gap { expected, .. }) => assert_eq!(expected, i(10)),
            other => panic!("{other:?}"),
        }
    }
    append(log, g(2), 10, 11, "a").unwrap();
    assert_eq!(texts(log, g(2), 0, 100).len(), 11);
}

#[test]
fn reads_are_bounded_by_bytes_but_never_empty() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let log = store.log();
    let big: Vec<_> = (0..10).map(|n| (i(n), Bytes::from(vec![n as u8; 1000]))).collect();
    wait(|d| log.append(g(2), big, d)).unwrap();
    assert_eq!(log.read(g(2), i(0), i(10), 1).unwrap().len(), 1);
    assert_eq!(log.read(g(2), i(0), i(10), 2500).unwrap().len(), 2);
    assert_eq!(log.read(g(2), i(8), i(100), 1 << 20).unwrap().len(), 2);
    assert!(log.read(g(2), i(10), i(100), 1 << 20).unwrap().is_empty());
    assert!(log.read(g(99), i(0), i(100), 1 << 20).unwrap().is_empty());
}

#[test]
fn a_quarantined_group_is_kept_and_not_written() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        append(store.log(), g(5), 0, 10, "kept").unwrap();
        wait(|d| store.log().set_aside(g(5), d)).unwrap();
        assert!(matches!(
            append(store.log(), g(5), 10, 11, "no"),
            Err(StorageError::Quarantined(_))
        ));
        assert!(store.log().groups().is_empty());
    }
    let store = open(dir.path());
    assert!(store.log().groups().is_empty());
    assert_eq!(store.log().quarantined(), vec![g(5)]);
    assert_eq!(texts(store.log(), g(5), 0, 10).len(), 10);
}

#[test]
fn a_group_that_was_cleared_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let owner = |store: &Store| store.log().meta(g(5)).unwrap().owner;
    {
        let store = open(dir.path());
        let log = store.log();
        wait(|d| log.own(g(5), ReplicaId::new(7), d)).unwrap();
        append(log, g(5), 0, 200, "old").unwrap();
        append(log, g(6), 0, 3, "other").unwrap();
        wait(|d| log.save_vote(g(5), Bytes::from_static(b"vote"), d)).unwrap();
        wait(|d| log.purge(g(5), i(20), Bytes::from_static(b"id"), d)).unwrap();
        log.save_committed(g(5), Bytes::from_static(b"hint"));
        wait(|d| log.set_aside(g(5), d)).unwrap();
        assert_eq!(owner(&store), Some(ReplicaId::new(7)));
    }
    {
        let store = open(dir.path());
        let log = store.log();
        assert_eq!(owner(&store), Some(ReplicaId::new(7)));
        wait(|d| log.clear(g(5), Some(ReplicaId::new(7)), d)).unwrap();
        let left = log.meta(g(5)).unwrap();
        assert_eq!(
            (left.owner, left.retired, left.last),
            (None, Some(ReplicaId::new(7)), None)
        );
        assert!(log.quarantined().is_empty() && log.groups() == [g(6)]);
        wait(|d| log.own(g(5), ReplicaId::new(9), d)).unwrap();
        // Another replica's log may begin anywhere.
        append(log, g(5), 300, 303, "new").unwrap();
    }
    let store = open(dir.path());
    assert_eq!(owner(&store), Some(ReplicaId::new(9)));
    assert_eq!(store.log().meta(g(5)).unwrap().retired, Some(ReplicaId::new(7)));
    let meta = store.log().meta(g(5)).unwrap();
    assert_eq!((meta.vote, meta.purged, meta.first), (None, None, Some(i(300))));
    assert_eq!(texts(store.log(), g(5), 300, 303).len(), 3);
    assert_eq!(texts(store.log(), g(6), 0, 3).len(), 3);
}

#[test]
fn after_close_requests_fail_as_closed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.close().unwrap();
    assert!(matches!(
        append(store.log(), g(5), 0, 1, "x"),
        Err(StorageError::Closed)
    ));
}

#[test]
fn one_process_one_node_one_format() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(options(dir.path()), Some(NodeId::new(4))).unwrap();
    match Store::open(options(dir.path()), None).map(|_| ()) {
        Err(OpenError::Locked { pid, .. }) => assert_eq!(pid, std::process::id().to_string()),
        other => panic!("{other:?}"),
    }
    store.set_cluster("c1").unwrap();
    assert!(store.set_cluster("c2").is_err());
    drop(store);
    match Store::open(options(dir.path()), Some(NodeId::new(5))).map(|_| ()) {
        Err(OpenError::OtherNode { found, .. }) => assert_eq!(found, NodeId::new(4)),
        other => panic!("{other:?}"),
    }
    let store = open(dir.path());
    assert_eq!(store.identity().cluster_id.as_deref(), Some("c1"));
    assert_eq!(store.identity().incarnation, 2, "a refused open raises nothing");
    drop(store);
    let body = "mainstem-data 2\n";
    let text = format!("{body}crc {:08x}\n", crc32fast::hash(body.as_bytes()));
    std::fs::write(dir.path().join("FORMAT"), text).unwrap();
    match Store::open(options(dir.path()), None).map(|_| ()) {
        Err(OpenError::NewerFormat { found: 2, known: 1, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_folder_with_other_things_in_it_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.txt"), "mine").unwrap();
    match Store::open(options(dir.path()), None).map(|_| ()) {
        Err(OpenError::NotADataDir { why, .. }) => assert!(why.contains("thesis.txt")),
        other => panic!("{other:?}"),
    }
    let names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "only the lock was added: {names:?}");
}

#[test]
fn making_a_store_may_be_cut_short() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("INIT"), "being made\n").unwrap();
    std::fs::create_dir(dir.path().join("log")).unwrap();
    std::fs::write(dir.path().join("log/CURRENT"), "junk").unwrap();
    drop(open(dir.path()));
    assert!(!dir.path().join("INIT").exists());
    drop(open(dir.path()));
}
