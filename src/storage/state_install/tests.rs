#![allow(clippy::unwrap_used)]
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::super::options::StoreOptions;
use super::super::state_stage::{INCOMING_DIR, StageError};
use super::super::store::Store;
use super::*;
use crate::model::{StoredBatch, Term, TimeUs};

pub(in crate::storage) const GROUP: GroupId = GroupId::new(7);

pub(in crate::storage) fn open(dir: &Path) -> Arc<Store> {
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

pub(in crate::storage) fn chunks(store: &Store) -> Vec<Bytes> {
    let mut out = Vec::new();
    let sink = |chunk: Bytes| {
        out.push(chunk);
        true
    };
    store.state().export_group(GROUP, sink).unwrap().unwrap();
    out
}

pub(in crate::storage) fn shards_of(store: &Store) -> ExportedShards {
    store
        .state()
        .view_group(GROUP, |view| Ok(view.shards().clone()))
        .unwrap()
}

/// Receives all that `from` has.
fn stage_all(store: &Store, from: &Store) -> StagedGroup {
    stage(store, from, &chunks(from)).unwrap()
}

fn stage(store: &Store, from: &Store, chunks: &[Bytes]) -> Result<StagedGroup, StageError> {
    let mut chunks = chunks.iter().cloned();
    store.state().stage_group(GROUP, shards_of(from), || Ok(chunks.next()))
}

pub(in crate::storage) fn incoming(dir: &Path) -> usize {
    fs::read_dir(dir.join(INCOMING_DIR)).map_or(0, Iterator::count)
}

fn manifest(staged: &StagedGroup) -> Manifest {
    Manifest::of(staged, &BTreeSet::new(), LogIndex::new(90), b"new marker", None)
}

/// Begins the switch, does as many of its steps, and crashes.
pub(in crate::storage) fn crash_in_install(
    store: Arc<Store>,
    staged: StagedGroup,
    sealed: &BTreeSet<ShardId>,
    applied: LogIndex,
    steps: usize,
) {
    let state = store.state();
    let base = state.applied(GROUP).unwrap().map(|(index, _)| index);
    let manifest = Manifest::of(&staged, sealed, applied, b"new marker", base);
    if manifest.keeps() {
        state.flush().unwrap();
    }
    let dir = staged.place.dir.clone();
    if steps > 0 {
        identity::write_atomically(&dir, INSTALL_FILE, &manifest.to_text()).unwrap();
    }
    if steps > 1 {
        state.remove_replaced(&manifest).unwrap();
    }
    if steps > 2 {
        state.take_files_over(&dir, &manifest, Family::Index).unwrap();
    }
    if steps > 3 {
        state.take_files_over(&dir, &manifest, Family::Batches).unwrap();
    }
    if steps > 4 {
        state.set_installed(&manifest).unwrap();
    }
    drop((staged, store));
}

/// As many as [`crash_in_install`] knows.
pub(in crate::storage) const INSTALL_STEPS: usize = 5;

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
    let staged = stage_all(&to, &from);
    assert_ne!(chunks(&to), source, "not visible before");
    let marker = b"new marker";
    to.state()
        .install_group(staged, &BTreeSet::new(), LogIndex::new(90), marker)
        .unwrap();
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

/// A shard that is sealed here and not in the snapshot was adopted by another group where that was made. Here that group's
/// replica may be behind, and no other node is sure to have it: it stays, whenever the install is cut short.
#[test]
fn a_sealed_shard_that_is_not_received_stays() {
    for steps in 0..=INSTALL_STEPS {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
        fill(&from, &[1, 2], 40);
        fill(&to, &[2, 8, 9], 20);
        let messages = |store: &Store, shard: u64| -> Vec<StoredBatch> {
            let batches = store.state().batches(ShardId::new(shard), Sequence::FIRST);
            batches.map(Result::unwrap).collect()
        };
        let (received, sealed) = (messages(&from, 2), messages(&to, 9));
        assert!(!sealed.is_empty());
        let staged = stage_all(&to, &from);
        let kept = BTreeSet::from([ShardId::new(2), ShardId::new(9)]);
        crash_in_install(to, staged, &kept, LogIndex::new(90), steps);
        let to = open(dirs[1].path());
        assert_eq!(messages(&to, 9), sealed, "after {steps} steps");
        let shards: Vec<u64> = to.state().shards().unwrap().iter().map(|s| s.0.get()).collect();
        match steps {
            0 => assert_eq!(shards, [2, 8, 9], "nothing was begun"),
            _ => {
                assert_eq!(shards, [1, 2, 9], "after {steps} steps");
                assert_eq!(messages(&to, 2), received, "what is received is not what stays");
            }
        }
    }
}

#[test]
fn what_was_received_and_not_installed_changes_nothing_and_goes_in_time() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
    fill(&from, &[1, 2], 40);
    fill(&to, &[2], 20);
    let before = chunks(&to);
    let staged = stage_all(&to, &from);
    to.state().sweep_incoming(Duration::ZERO);
    assert_eq!(incoming(dirs[1].path()), 1, "not what is being received");
    drop((staged, to));
    let to = open(dirs[1].path());
    assert_eq!(chunks(&to), before);
    to.state().sweep_incoming(Duration::from_secs(3_600));
    assert_eq!(incoming(dirs[1].path()), 1, "it may go on");
    to.state().sweep_incoming(Duration::ZERO);
    assert_eq!(incoming(dirs[1].path()), 0);
    let staged = stage_all(&to, &from);
    staged.discard();
    assert_eq!(incoming(dirs[1].path()), 0);
    assert_eq!(chunks(&to), before);
}

#[test]
fn a_switch_that_was_begun_is_finished_at_the_next_start() {
    for steps in 0..=INSTALL_STEPS {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
        fill(&from, &[1, 2], 40);
        fill(&to, &[2, 4], 20);
        let (before, source) = (chunks(&to), chunks(&from));
        let staged = stage_all(&to, &from);
        crash_in_install(to, staged, &BTreeSet::new(), LogIndex::new(90), steps);
        let to = open(dirs[1].path());
        let begun = steps > 0;
        assert_eq!(chunks(&to), if begun { source } else { before }, "{steps} steps");
        let applied = LogIndex::new(if begun { 90 } else { 20 });
        assert_eq!(to.state().durable_applied(GROUP), Some(applied));
        assert_eq!(incoming(dirs[1].path()), usize::from(!begun));
    }
}

#[test]
fn a_switch_does_not_go_on_over_a_state_that_lost_what_was_to_stay() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
    fill(&from, &[1], 40);
    let mut staged = stage_all(&to, &from);
    let (begin, _) = crate::storage::keys::batches_of(ShardId::new(1));
    staged.kept = vec![Stretch {
        from: Place::new(Family::Batches, begin),
        to: None,
    }];
    let mut manifest = manifest(&staged);
    manifest.base = Some(LogIndex::new(70));
    identity::write_atomically(&staged.place.dir, INSTALL_FILE, &manifest.to_text()).unwrap();
    drop((staged, to));
    let mut options = StoreOptions::new(dirs[1].path());
    options.min_free_bytes = 0;
    let refused = Store::open(options, None).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("install file"), "{refused}");
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
    let refused = |chunks: &[Bytes]| matches!(stage(&to, &from, chunks), Err(StageError::Refused(_)));
    assert!(refused(&[damaged.into()]));
    assert!(refused(&[source[0].slice(..source[0].len() - 1)]));
    assert!(refused(&[source[0].clone(), source[0].clone()]), "out of order");
    assert!(refused(&[Bytes::new()]));
    let state = to.state();
    let all = || {
        let mut chunks = source.clone().into_iter();
        move || Ok(chunks.next())
    };
    let other = state.stage_group(GroupId::new(8), shards_of(&from), all());
    assert!(matches!(other, Err(StageError::Refused(_))), "{other:?}");
    let unknown = state.stage_group(GROUP, ExportedShards::new(), all());
    assert!(matches!(unknown, Err(StageError::Refused(_))), "{unknown:?}");
    let mut floors = shards_of(&from);
    for floors in floors.values_mut() {
        floors.batches = Sequence::new(1);
    }
    let floors = state.stage_group(GROUP, floors, all());
    assert!(matches!(floors, Err(StageError::Refused(_))), "{floors:?}");
    let ended = state.stage_group(GROUP, shards_of(&from), || Err("the sender has gone".into()));
    assert!(matches!(ended, Err(StageError::Ended(_))), "{ended:?}");
}

#[test]
fn the_install_file_survives_the_round_trip() {
    let manifest = Manifest {
        group: GROUP,
        applied: LogIndex::new(9),
        marker: vec![0, 255, 16],
        shards: BTreeMap::from([(ShardId::new(3), Floors::default())]),
        files: vec![
            (Family::Index, "000000.sst".into()),
            (Family::Batches, "000001.sst".into()),
        ],
        kept: vec![(vec![0x10, 1], vec![0xFF; 32])],
        base: Some(LogIndex::new(7)),
        sealed: BTreeSet::from([ShardId::new(5)]),
    };
    let text = manifest.to_text();
    assert_eq!(Manifest::parse(&text), Some(manifest));
    assert_eq!(Manifest::parse(&text.replace("shard 3", "shard 4")), None);
    let old = identity::seal(
        "mainstem-install 1\ngroup 7\napplied 9\nmarker 00ff\nshard 3 1 2\nfile index 000000.sst\n".into(),
    );
    let old = Manifest::parse(&old).unwrap();
    assert_eq!((old.files.len(), old.kept.len(), old.base), (1, 0, None));
}
