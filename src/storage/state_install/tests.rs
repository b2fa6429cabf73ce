#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use super::super::options::StoreOptions;
use super::super::store::Store;
use super::*;
use crate::model::{StoredBatch, Term, TimeUs};

const GROUP: GroupId = GroupId::new(7);

fn open(dir: &Path) -> Arc<Store> {
    let mut options = StoreOptions::new(dir);
    options.min_free_bytes = 0;
    // Values on both sides of the bound are in the files.
    options.min_blob_bytes = 512;
    Store::open(options, None).unwrap()
}

/// Puts some of everything. `seed` makes two stores differ.
fn fill(store: &Store, shards: &[u64], seed: u64) {
    for shard in shards.iter().map(|s| ShardId::new(*s)) {
        let mut batch = store.state().batch();
        batch.put_shard(shard, GROUP, &seed.to_le_bytes());
        batch.put_producer(shard, 5 + seed, b"producer");
        batch.put_ids(shard, Sequence::new(1), b"ids");
        batch.put_holes(shard, Sequence::new(11), &[1, 2]);
        for n in 0..50 {
            let base = Sequence::new(1 + n * 10);
            batch.put_posting(shard, "a.b", base, &[0, 3]);
            batch.put_batch(
                shard,
                &StoredBatch {
                    base,
                    append_time: TimeUs::new(n),
                    term: Term::new(seed),
                    record_count: 10,
                    rejected: vec![],
                    batch: vec![seed as u8; 100 + 50 * n as usize].into(),
                },
            );
        }
        batch.drop_batches(shard, Sequence::new(0), Sequence::new(21));
        batch.set_applied(GROUP, LogIndex::new(seed), b"marker");
        store.state().write(batch).unwrap();
    }
    store.state().flush().unwrap();
}

fn chunks(store: &Store) -> Vec<Bytes> {
    let mut out = Vec::new();
    let sink = |chunk: Bytes| {
        out.push(chunk);
        true
    };
    store
        .state()
        .export_group(GROUP, |_| (), move || Some(sink))
        .unwrap()
        .unwrap();
    out
}

fn stage(store: &Store, chunks: &[Bytes]) -> Result<StagedGroup, StageError> {
    let mut chunks = chunks.iter().cloned();
    store.state().stage_group(GROUP, || Ok(chunks.next()))
}

fn incoming(dir: &Path) -> usize {
    fs::read_dir(dir.join(INCOMING_DIR)).map_or(0, Iterator::count)
}

fn manifest(staged: &StagedGroup) -> Manifest {
    Manifest {
        group: GROUP,
        applied: LogIndex::new(90),
        marker: b"new marker".to_vec(),
        floors: staged.floors.clone(),
        files: staged.files.clone(),
    }
}

#[test]
fn an_installed_group_is_the_same_as_its_source_and_nothing_else_changes() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
    fill(&from, &[1, 2, 3], 40);
    fill(&to, &[2, 9], 20);
    let mut other = to.state().batch();
    other.put_shard(ShardId::new(50), GroupId::new(8), b"other");
    to.state().write(other).unwrap();
    let source = chunks(&from);
    let staged = stage(&to, &source).unwrap();
    assert_ne!(chunks(&to), source, "not visible before");
    let marker = b"new marker";
    to.state().install_group(staged, LogIndex::new(90), marker).unwrap();
    assert_eq!(chunks(&to), source);
    assert_eq!(to.state().batch_floor(ShardId::new(1)), Sequence::new(21));
    assert_eq!(to.state().durable_applied(GROUP), Some(LogIndex::new(90)));
    let shards: Vec<u64> = to.state().shards().unwrap().iter().map(|s| s.0.get()).collect();
    assert_eq!(shards, [1, 2, 3, 50]);
    // Compaction, which moves values into blob files, changes nothing that is read.
    to.compact_all_for_test();
    assert_eq!(chunks(&to), source);
    drop(to);
    let to = open(dirs[1].path());
    assert_eq!(chunks(&to), source);
    assert_eq!(to.state().applied(GROUP).unwrap().unwrap().1, marker[..]);
    assert_eq!(incoming(dirs[1].path()), 0);
}

#[test]
fn what_was_received_and_not_installed_is_gone_after_a_crash() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
    fill(&from, &[1, 2], 40);
    fill(&to, &[2], 20);
    let before = chunks(&to);
    let source = chunks(&from);
    drop(stage(&to, &source).unwrap());
    assert_eq!(incoming(dirs[1].path()), 0, "also without a crash");
    std::mem::forget(stage(&to, &source).unwrap());
    assert_eq!(incoming(dirs[1].path()), 1);
    drop(to);
    let to = open(dirs[1].path());
    assert_eq!(incoming(dirs[1].path()), 0);
    assert_eq!(chunks(&to), before);
}

#[test]
fn a_switch_that_was_begun_is_finished_at_the_next_start() {
    for again in [false, true] {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
        fill(&from, &[1, 2], 40);
        fill(&to, &[2, 4], 20);
        let source = chunks(&from);
        let staged = stage(&to, &source).unwrap();
        identity::write_atomically(&staged.dir, INSTALL_FILE, &manifest(&staged).to_text()).unwrap();
        if again {
            // The crash comes after everything was done, and before that was noted.
            let manifest = manifest(&staged);
            let copy = dirs[1].path().join(INCOMING_DIR).join("copy");
            fs::create_dir(&copy).unwrap();
            for file in fs::read_dir(&staged.dir).unwrap().map(Result::unwrap) {
                fs::copy(file.path(), copy.join(file.file_name())).unwrap();
            }
            to.state().finish_install(&staged.dir, &manifest).unwrap();
        }
        std::mem::forget(staged);
        drop(to);
        let to = open(dirs[1].path());
        assert_eq!(chunks(&to), source, "again: {again}");
        assert_eq!(to.state().durable_applied(GROUP), Some(LogIndex::new(90)));
        assert_eq!(incoming(dirs[1].path()), 0);
    }
}

#[test]
fn damage_and_what_does_not_belong_are_refused() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
    fill(&from, &[1], 40);
    let source = chunks(&from);
    let mut damaged = source[0].to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    assert!(stage(&to, &[damaged.into()]).is_err());
    assert!(stage(&to, &[source[0].slice(..source[0].len() - 1)]).is_err());
    assert!(
        stage(&to, &[source[0].clone(), source[0].clone()]).is_err(),
        "out of order"
    );
    let other = to.state().stage_group(GroupId::new(8), {
        let mut chunks = source.clone().into_iter();
        move || Ok(chunks.next())
    });
    assert!(matches!(other, Err(StageError::Refused(_))), "{other:?}");
    let ended = to.state().stage_group(GROUP, || Err("the sender has gone".into()));
    assert!(matches!(ended, Err(StageError::Ended(_))), "{ended:?}");
    assert_eq!(incoming(dirs[1].path()), 0);
}

#[test]
fn the_install_file_survives_the_round_trip() {
    let manifest = Manifest {
        group: GROUP,
        applied: LogIndex::new(9),
        marker: vec![0, 255, 16],
        floors: BTreeMap::from([(ShardId::new(3), Floors::default())]),
        files: vec![
            (Family::Index, "000000.sst".into()),
            (Family::Batches, "000001.sst".into()),
        ],
    };
    let text = manifest.to_text();
    assert_eq!(Manifest::parse(&text), Some(manifest));
    assert_eq!(Manifest::parse(&text.replace("shard 3", "shard 4")), None);
}
