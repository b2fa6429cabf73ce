//! Flipped bits, truncations and missing files, in every kind of file of a data directory: found at open or at read,
//! never served, never silently forgotten.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstem::machine::port::{MetaKind, ShardSink, ShardView};
use mainstem::model::{GroupId, LogIndex, Sequence, ShardId, StoredBatch, Term, TimeUs};
use mainstem::storage::{Done, OpenError, StorageError, Store, StoreOptions};
use rand::{Rng, SeedableRng};

fn options(dir: &Path) -> StoreOptions {
    StoreOptions {
        log_write_buffer_bytes: 256 << 10,
        state_write_buffer_bytes: 256 << 10,
        block_cache_bytes: 1 << 20,
        min_free_bytes: 0,
        flush_interval: Duration::from_secs(3600),
        reclaim_interval: Duration::from_secs(3600),
        ..StoreOptions::new(dir)
    }
}

fn open(dir: &Path) -> Result<Arc<Store>, OpenError> {
    Store::open(options(dir), None)
}

fn wait<T>(ask: impl FnOnce(Done) -> T) {
    let (tx, rx) = std::sync::mpsc::channel();
    ask(Box::new(move |r| tx.send(r).unwrap()));
    rx.recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
}

fn content(seed: u64, bytes: usize) -> Bytes {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let mut content = vec![0; bytes];
    rng.fill(&mut content[..]);
    Bytes::from(content)
}

/// Everything the log holds.
type LogContent = BTreeMap<u64, (Option<Bytes>, Option<u64>, Vec<(u64, Bytes)>)>;

fn log_content(store: &Store) -> Result<LogContent, StorageError> {
    let mut all = LogContent::new();
    for group in store.log().groups() {
        let meta = store.log().meta(group)?;
        let entries = match (meta.first, meta.last) {
            (Some(first), Some(last)) => {
                let read = store.log().read(group, first, last.next(), usize::MAX)?;
                assert_eq!(read.len() as u64, last.get() - first.get() + 1);
                read.into_iter().map(|(i, b)| (i.get(), b)).collect()
            }
            _ => Vec::new(),
        };
        all.insert(group.get(), (meta.vote, meta.purged.map(|(i, _)| i.get()), entries));
    }
    Ok(all)
}

/// Everything the state holds, as text; an error if any of it cannot be read.
fn state_content(store: &Store) -> Result<Vec<String>, String> {
    let state = store.state();
    let mut out = Vec::new();
    for shard in 1..=3 {
        let shard = ShardId::new(shard);
        for batch in state.batches(shard, Sequence::new(0)) {
            let batch = batch.map_err(|e| e.to_string())?;
            let holes = state.holes(shard, batch.base).map_err(|e| e.to_string())?;
            out.push(format!("{shard} {batch:?} {holes:?}"));
        }
        state
            .postings(shard, "", |subject, base, list| {
                out.push(format!("{shard} {subject} {base} {list:?}"));
                true
            })
            .map_err(|e| e.to_string())?;
        out.push(format!("{:?}", state.id_blocks(shard).map_err(|e| e.to_string())?));
        out.push(format!("{:?}", state.producers(shard).map_err(|e| e.to_string())?));
    }
    out.push(format!("{:?}", state.shards().map_err(|e| e.to_string())?));
    out.push(format!(
        "{:?}",
        state.meta_records(MetaKind::Node).map_err(|e| e.to_string())?
    ));
    for (group, _) in state.applied_groups() {
        out.push(format!("{:?}", state.applied(group).map_err(|e| e.to_string())?));
    }
    Ok(out)
}

/// A directory with tables, several WAL files and blob files, ended by a kill.
fn make(dir: &Path) -> (LogContent, Vec<String>) {
    {
        // Two runs, so that WAL files of both are there.
        let store = open(dir).unwrap();
        for n in 0..60u64 {
            for group in 1..=3 {
                let entries = vec![(LogIndex::new(n), content(n * 10 + group, 3000))];
                wait(|d| store.log().append(GroupId::new(group), entries, d));
            }
        }
        wait(|d| store.log().save_vote(GroupId::new(2), Bytes::from_static(b"vote 2"), d));
        fill_state(&store, 0..40);
        store.state().flush().unwrap();
        wait(|d| {
            store
                .log()
                .purge(GroupId::new(1), LogIndex::new(30), Bytes::from_static(b"id"), d)
        });
    }
    let store = open(dir).unwrap();
    for n in 60..100u64 {
        for group in 1..=3 {
            let entries = vec![(LogIndex::new(n), content(n * 10 + group, 3000))];
            wait(|d| store.log().append(GroupId::new(group), entries, d));
        }
    }
    wait(|d| store.log().save_vote(GroupId::new(3), Bytes::from_static(b"vote 3"), d));
    fill_state(&store, 40..80);
    store.state().flush().unwrap();
    let contents = (log_content(&store).unwrap(), state_content(&store).unwrap());
    assert_eq!(contents.0[&1].1, Some(30));
    assert_eq!(contents.0[&1].2.len(), 69);
    contents
}

fn fill_state(store: &Store, range: std::ops::Range<u64>) {
    for n in range {
        let mut b = store.state().batch();
        for shard in 1..=3 {
            let bytes = if n % 3 == 0 { 300 } else { 6000 };
            b.put_batch(
                ShardId::new(shard),
                &StoredBatch {
                    base: Sequence::new(n * 10 + 1),
                    append_time: TimeUs::new(n),
                    term: Term::new(1),
                    record_count: 11,
                    rejected: vec![3],
                    batch: content(n * 100 + shard, bytes),
                },
            );
            b.put_posting(
                ShardId::new(shard),
                &format!("s.{}", n % 5),
                Sequence::new(n * 10 + 1),
                &[0, 2],
            );
            b.put_ids(ShardId::new(shard), Sequence::new(n * 10 + 1), &content(n, 50));
            b.put_holes(ShardId::new(shard), Sequence::new(n * 10 + 1), &[1]);
            b.put_producer(ShardId::new(shard), n % 4, &content(n, 20));
            b.put_shard(ShardId::new(shard), GroupId::new(shard), &content(n, 30));
            b.set_applied(GroupId::new(shard), LogIndex::new(n), b"marker");
        }
        b.put_meta(MetaKind::Node, b"node", &content(n, 40));
        store.state().write(b).unwrap();
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            out.extend(files(&path));
        } else {
            out.push(path);
        }
    }
    out.sort();
    out
}

/// What may be damaged without anyone losing anything: texts for people, and a lock.
fn is_data(relative: &Path) -> bool {
    let name = relative.file_name().unwrap().to_str().unwrap();
    let place = relative.parent().unwrap().to_str().unwrap();
    !(name == "LOCK"
        || name.starts_with("LOG")
        || name.starts_with("OPTIONS")
        || name == "IDENTITY" && !place.is_empty())
}

struct Tally {
    at_open: usize,
    at_read: usize,
    harmless: usize,
}

/// Opens a damaged copy. Whatever is served must be what was written.
fn judge(dir: &Path, want: &(LogContent, Vec<String>), tally: &mut Tally, case: &str) {
    let store = match open(dir) {
        Ok(store) => store,
        Err(error) => {
            assert!(error.is_damage(), "{case}: {error}");
            tally.at_open += 1;
            return;
        }
    };
    match log_content(&store) {
        Ok(log) => assert!(log == want.0, "{case}: the log is not what was written"),
        Err(error) => panic!("{case}: damage in log/ is found at open, not later: {error}"),
    }
    match state_content(&store) {
        Ok(state) => {
            assert!(state == want.1, "{case}: the state is not what was written");
            tally.harmless += 1;
        }
        Err(error) => {
            assert!(error.contains("damaged data"), "{case}: {error}");
            assert!(store.first_damage().is_some(), "{case}: it is reported");
            tally.at_read += 1;
        }
    }
}

#[test]
fn every_file_with_a_flipped_bit_cut_short_or_missing() {
    let seed = 11;
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    let want = make(&golden);
    let mut kinds: BTreeMap<String, Tally> = BTreeMap::new();
    let rounds: usize = std::env::var("STORAGE_DAMAGE_ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(4);
    for file in files(&golden) {
        let relative = file.strip_prefix(&golden).unwrap().to_path_buf();
        if !is_data(&relative) {
            continue;
        }
        let length = fs::metadata(&file).unwrap().len() as usize;
        let kind = format!(
            "{}/{}",
            relative.parent().unwrap().display(),
            match relative.extension().and_then(|e| e.to_str()) {
                Some(ext) => ext,
                None => relative
                    .file_stem()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .split('-')
                    .next()
                    .unwrap(),
            }
        );
        let tally = kinds.entry(kind).or_insert(Tally {
            at_open: 0,
            at_read: 0,
            harmless: 0,
        });
        for round in 0..rounds * 2 + 1 {
            let work = dir.path().join("work");
            copy_dir(&golden, &work);
            let target = work.join(&relative);
            let case = if round == rounds * 2 {
                fs::remove_file(&target).unwrap();
                format!("{} removed", relative.display())
            } else if length == 0 {
                continue;
            } else if round % 2 == 0 {
                // The ends are where checks are forgotten.
                let at = match round {
                    0 => length - 1,
                    2 => length - 1 - rng.random_range(0..length.min(64)),
                    _ => rng.random_range(0..length),
                };
                let bit = rng.random_range(0..8);
                let mut bytes = fs::read(&target).unwrap();
                bytes[at] ^= 1 << bit;
                fs::write(&target, bytes).unwrap();
                format!("{} byte {at} of {length} bit {bit} flipped", relative.display())
            } else {
                let at = match round {
                    1 => length - 1,
                    3 => 0,
                    _ => rng.random_range(0..length),
                };
                let file = fs::OpenOptions::new().write(true).open(&target).unwrap();
                file.set_len(at as u64).unwrap();
                format!("{} cut from {length} to {at}", relative.display())
            };
            judge(&work, &want, tally, &case);
            fs::remove_dir_all(&work).unwrap();
        }
    }
    for (kind, tally) in &kinds {
        println!(
            "{kind:24} found at open {:3}, at read {:3}, harmless {:3}",
            tally.at_open, tally.at_read, tally.harmless
        );
    }
    for kind in [
        "log/log",
        "log/sst",
        "state/sst",
        "state/blob",
        "/witness",
        "/IDENTITY",
        "/FORMAT",
        "log/MANIFEST",
    ] {
        let tally = kinds
            .get(kind)
            .unwrap_or_else(|| panic!("no {kind} among {:?}", kinds.keys()));
        assert!(tally.at_open + tally.at_read > 0, "{kind}: nothing was ever found");
    }
}

/// The last WAL file that has anything in it.
fn last_wal(dir: &Path) -> PathBuf {
    files(&dir.join("log"))
        .into_iter()
        .rfind(|f| f.extension().is_some_and(|e| e == "log") && fs::metadata(f).unwrap().len() > 0)
        .unwrap()
}

/// Makes a log of `before` writes, keeps its witness, and adds one large write. Returns where that begins.
fn with_last_write(dir: &Path, before: u64) -> (Vec<u8>, u64) {
    let store = open(dir).unwrap();
    for n in 0..before {
        let entries = vec![(LogIndex::new(n), content(n, 500))];
        wait(|d| store.log().append(GroupId::new(1), entries, d));
    }
    let witness = fs::read(dir.join("witness")).unwrap();
    let begin = fs::metadata(last_wal(dir)).unwrap().len();
    let entries = (before..before + 20)
        .map(|n| (LogIndex::new(n), content(n, 5000)))
        .collect();
    wait(|d| store.log().append(GroupId::new(1), entries, d));
    (witness, begin)
}

fn last_index(dir: &Path) -> Result<Option<u64>, OpenError> {
    let store = open(dir)?;
    Ok(store.log().meta(GroupId::new(1)).unwrap().last.map(LogIndex::get))
}

#[test]
fn a_write_whose_sync_never_returned_may_be_torn_in_any_way() {
    let seed = 5;
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    let (older_witness, begin) = with_last_write(&golden, 30);
    for round in 0..40 {
        let work = dir.path().join("work");
        copy_dir(&golden, &work);
        let wal = last_wal(&work);
        let mut bytes = fs::read(&wal).unwrap();
        let end = bytes.len() as u64;
        // A power failure: each page of the last write may be missing or half there, the length may be anything.
        let mut hit = false;
        let mut at = begin;
        while at < end {
            let page_end = (at / 4096 + 1) * 4096;
            let to = page_end.min(end);
            if rng.random_bool(0.3) {
                let from = if rng.random_bool(0.3) {
                    rng.random_range(at..to)
                } else {
                    at
                };
                hit |= bytes[from as usize..to as usize].iter().any(|b| *b != 0);
                bytes[from as usize..to as usize].fill(0);
            }
            at = to;
        }
        if rng.random_bool(0.3) {
            bytes.truncate(rng.random_range(begin..end) as usize);
            hit = true;
        }
        fs::write(&wal, &bytes).unwrap();
        if hit {
            // With a witness that saw it, it was synced, and this is damage.
            let error = last_index(&work).expect_err("a synced write is missing");
            assert!(matches!(error, OpenError::LogDamaged { .. }), "{error}");
        }
        fs::write(work.join("witness"), &older_witness).unwrap();
        let last = last_index(&work).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert_eq!(last, Some(if hit { 29 } else { 49 }), "round {round}");
        // It goes on, and what it then writes is kept.
        {
            let store = open(&work).unwrap();
            let next = last.unwrap() + 1;
            let entries = vec![(LogIndex::new(next), content(9, 100))];
            wait(|d| store.log().append(GroupId::new(1), entries, d));
        }
        assert_eq!(last_index(&work).unwrap(), Some(last.unwrap() + 1));
        fs::remove_dir_all(&work).unwrap();
    }
}

#[test]
fn damage_before_the_last_write_is_found_even_without_its_witness() {
    let seed = 6;
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    let store = open(&golden).unwrap();
    let oldest_witness = fs::read(golden.join("witness")).unwrap();
    drop(store);
    let (_, begin) = with_last_write(&golden, 30);
    for round in 0..60 {
        let work = dir.path().join("work");
        copy_dir(&golden, &work);
        fs::write(work.join("witness"), &oldest_witness).unwrap();
        let wal = last_wal(&work);
        let mut bytes = fs::read(&wal).unwrap();
        let at = rng.random_range(0..begin) as usize;
        bytes[at] ^= 1 << rng.random_range(0..8);
        fs::write(&wal, bytes).unwrap();
        let error = last_index(&work).expect_err("damage in the middle");
        assert!(
            matches!(error, OpenError::LogDamaged { .. }),
            "round {round}, byte {at}: {error}"
        );
        fs::remove_dir_all(&work).unwrap();
    }
}

#[test]
fn a_write_that_was_never_finished_is_cut_and_kept_aside() {
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    let (_, begin) = with_last_write(&golden, 10);
    let wal = last_wal(&golden);
    let bytes = fs::read(&wal).unwrap();
    // A kill in the middle of the next write: the beginning of something.
    let mut longer = bytes.clone();
    longer.extend_from_slice(&bytes[begin as usize..begin as usize + 3000]);
    fs::write(&wal, &longer).unwrap();
    assert_eq!(last_index(&golden).unwrap(), Some(29));
    let aside: Vec<_> = files(&golden.join("aside"));
    assert_eq!(aside.len(), 1);
    let kept = fs::read(&aside[0]).unwrap();
    assert_eq!(fs::read(&wal).unwrap().len() + kept.len(), longer.len());
    // A missing write in the middle is not the same thing.
    let mut gap = fs::read(&wal).unwrap();
    gap.extend_from_slice(&[0; 40_000]);
    fs::write(&wal, &gap).unwrap();
    assert_eq!(last_index(&golden).unwrap(), Some(29));
}

#[test]
fn a_write_that_vanished_whole_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    let (older_witness, begin) = with_last_write(&golden, 10);
    let wal = last_wal(&golden);
    let file = fs::OpenOptions::new().write(true).open(&wal).unwrap();
    file.set_len(begin).unwrap();
    let error = last_index(&golden).expect_err("the witness saw more");
    assert!(error.to_string().contains("was synced"), "{error}");
    // Refusing changed nothing: the same again, and well again with the old witness.
    assert!(last_index(&golden).is_err());
    fs::write(golden.join("witness"), older_witness).unwrap();
    assert_eq!(last_index(&golden).unwrap(), Some(9));
}

#[test]
fn an_older_copy_of_the_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    with_last_write(&golden, 10);
    copy_dir(&golden.join("log"), &dir.path().join("old-log"));
    {
        let store = open(&golden).unwrap();
        let entries = vec![(LogIndex::new(30), content(1, 100))];
        wait(|d| store.log().append(GroupId::new(1), entries, d));
    }
    fs::remove_dir_all(golden.join("log")).unwrap();
    copy_dir(&dir.path().join("old-log"), &golden.join("log"));
    assert!(matches!(last_index(&golden), Err(OpenError::LogDamaged { .. })));
    fs::remove_dir_all(golden.join("log")).unwrap();
    assert!(matches!(last_index(&golden), Err(OpenError::LogDamaged { .. })));
}

#[test]
fn a_state_that_lost_what_the_log_has_purged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let golden = dir.path().join("golden");
    make(&golden);
    fs::remove_dir_all(golden.join("state")).unwrap();
    match open(&golden).map(|_| ()) {
        Err(OpenError::StateDamaged { .. }) => {}
        other => panic!("{other:?}"),
    }
    // An empty one of another store.
    let other = dir.path().join("other");
    drop(open(&other).unwrap());
    copy_dir(&other.join("state"), &golden.join("state"));
    match open(&golden).map(|_| ()) {
        Err(OpenError::StateDamaged { groups, .. }) => assert_eq!(groups, [GroupId::new(1)]),
        other => panic!("{other:?}"),
    }
}

/// The kind of a record tells where its content begins, and is read before its checksum: RocksDB would read for ever.
#[test]
fn a_manifest_with_a_changed_kind_of_record_is_refused() {
    for area in ["log", "state"] {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        let current = fs::read_to_string(dir.path().join(area).join("CURRENT")).unwrap();
        let manifest = dir.path().join(area).join(current.trim_end());
        let bytes = fs::read(&manifest).unwrap();
        let mut kinds = Vec::new();
        let mut at = 0;
        while at + 7 <= bytes.len() {
            kinds.push(at + 6);
            at += 7 + usize::from(u16::from_le_bytes([bytes[at + 4], bytes[at + 5]]));
        }
        assert!(
            kinds.len() > 1 && kinds.iter().all(|kind| bytes[*kind] == 1),
            "{kinds:?}"
        );
        for kind in kinds {
            let mut changed = bytes.clone();
            changed[kind] ^= 1 << 2;
            fs::write(&manifest, &changed).unwrap();
            let (tx, rx) = std::sync::mpsc::channel();
            let path = dir.path().to_owned();
            std::thread::spawn(move || tx.send(open(&path).map(drop)));
            match (area, rx.recv_timeout(Duration::from_secs(30)).unwrap()) {
                ("log", Err(OpenError::LogDamaged { file, .. })) => assert_eq!(file, manifest),
                ("state", Err(OpenError::StateDamaged { file, .. })) => assert_eq!(file, manifest),
                (_, other) => panic!("{area}, byte {kind}: {other:?}"),
            }
        }
        fs::write(&manifest, &bytes).unwrap();
        drop(open(dir.path()).unwrap());
    }
}
