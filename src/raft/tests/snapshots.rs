//! Installing a snapshot: traps B and E, and what a crash in between leaves.

use std::sync::atomic::{AtomicBool, Ordering};

use openraft::{EntryPayload, RaftLogReader, RaftSnapshotBuilder, Snapshot};

use super::super::load;
use super::super::snapshot::GroupSnapshot;
use super::*;

type Snap = Snapshot<LeaderId, u64, EmptyNode, GroupSnapshot>;

fn id_of(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: 1 }, index)
}

/// Entries 1 to 5 of term 1, as everywhere; from 6 on those of another term, which are not the same as in term 1.
fn entries_of(term: u64, upto: u64) -> Vec<Entry> {
    let mut all = entries(upto);
    for entry in all.iter_mut().skip(5) {
        entry.log_id = id_of(term, entry.log_id.index);
        if let EntryPayload::Normal(proposal) = &mut entry.payload {
            let mut command = pb::GroupCommand::decode(proposal.0.clone()).unwrap();
            if let Some(pb::group_command::Op::Publish(publish)) = &mut command.op {
                publish.time_us += term * 1_000_000;
            }
            proposal.0 = command.encode_to_vec().into();
        }
    }
    all
}

fn export(store: &Store) -> Vec<u8> {
    let mut out = Vec::new();
    let sink = |chunk: Bytes| {
        out.extend_from_slice(&chunk);
        true
    };
    tokio::task::block_in_place(|| store.state().export_group(GROUP, sink)).unwrap();
    out
}

/// A store that has applied entries up to `upto` of the given term, and a snapshot of it.
async fn donor(dir: &std::path::Path, term: u64, upto: u64) -> (Arc<Store>, Snap) {
    let store = open_store(dir);
    let (mut log, mut machine) = open_group(&store);
    append(&mut log, entries_of(term, upto)).await;
    apply(&mut machine, entries_of(term, upto)).await;
    let mut builder = machine.try_create_snapshot_builder(true).await.unwrap();
    builder.build_snapshot().await.unwrap();
    let snapshot = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(snapshot.meta.last_log_id, Some(id_of(term, upto)));
    (store, snapshot)
}

/// A store of which it is seen what the group's replica shows.
fn receiver(dir: &std::path::Path) -> (Arc<Store>, Arc<ShardDirectory>, GroupMachine) {
    let store = open_store(dir);
    let log = GroupLog::open(store.log().clone(), GROUP).unwrap();
    let context = context(&store);
    let directory = context.directory.clone();
    let machine = GroupMachine::open(GROUP, context, log).unwrap();
    (store, directory, machine)
}

/// Trap B: everything in (last applied, snapshot index] is replaced, also entries of the log that the snapshot's leader
/// does not have; and trap E: it is durable when the install returns, whatever of the rest comes to be done.
#[tokio::test(flavor = "multi_thread")]
async fn traps_b_and_e_an_install_replaces_everything_and_is_durable() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (donor, snapshot) = donor(dirs[0].path(), 3, 20).await;
    {
        let store = open_store(dirs[1].path());
        let (mut log, mut machine) = open_group(&store);
        // 6 to 12 were never committed.
        append(&mut log, entries_of(1, 12)).await;
        apply(&mut machine, entries_of(1, 5)).await;
        assert_ne!(export(&store), export(&donor));
        machine
            .install_snapshot(&snapshot.meta, snapshot.snapshot)
            .await
            .unwrap();
        assert_eq!(export(&store), export(&donor));
        assert_eq!(stored(&store), stored(&donor));
        assert_eq!(machine.applied_state().await.unwrap().0, Some(id_of(3, 20)));
        // The crash comes before the log is purged.
    }
    let store = open_store(dirs[1].path());
    assert_eq!(export(&store), export(&donor));
    let (mut log, mut machine) = open_group(&store);
    assert_eq!(log.last(), Some(id_of(1, 12)));
    let installed = machine.installed().unwrap();
    log.begin_behind(installed).await.unwrap();
    assert_eq!((log.last(), log.purged()), (Some(installed), Some(installed)));
    assert_eq!(machine.applied_state().await.unwrap().0, Some(id_of(3, 20)));
    // It goes on from there.
    append(&mut log, entries_of(3, 22).split_off(20)).await;
    apply(&mut machine, entries_of(3, 22).split_off(20)).await;
    assert_eq!(log.try_get_log_entries(0..=30).await.unwrap().len(), 2);
    assert_eq!(stored(&store).len(), 20);
    drop((log, machine, store));
    // And once more, with nothing to repair.
    let store = open_store(dirs[1].path());
    let (mut log, machine) = open_group(&store);
    log.begin_behind(machine.installed().unwrap()).await.unwrap();
    assert_eq!(log.last(), Some(id_of(3, 22)));
}

/// Entries behind the snapshot that its leader has stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_goes_on_behind_the_snapshot_is_kept() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_donor, snapshot) = donor(dirs[0].path(), 3, 20).await;
    let store = open_store(dirs[1].path());
    let (mut log, mut machine) = open_group(&store);
    append(&mut log, entries_of(3, 25)).await;
    apply(&mut machine, entries_of(3, 5)).await;
    machine
        .install_snapshot(&snapshot.meta, snapshot.snapshot)
        .await
        .unwrap();
    log.begin_behind(machine.installed().unwrap()).await.unwrap();
    assert_eq!((log.last(), log.purged()), (Some(id_of(3, 25)), Some(id_of(3, 20))));
}

/// A snapshot that is not ahead of what is applied changes nothing; an applied shard that is not in one goes.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_follows_an_install() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_donor, snapshot) = donor(dirs[0].path(), 3, 20).await;
    let (store, directory, mut machine) = receiver(dirs[1].path());
    let other = ShardId::new(99);
    let create = entry(
        2,
        pb::group_command::Op::CreateShard(pb::CreateShard {
            shard_id: other.get(),
            config: Some(pb::ShardConfig {
                stream_id: format!("{:032x}", 6),
                ..pb::ShardConfig::default()
            }),
        }),
    );
    apply(&mut machine, vec![create]).await;
    let face = directory.get(other).unwrap();
    assert!(!face.positions().removed);
    machine
        .install_snapshot(&snapshot.meta, snapshot.snapshot)
        .await
        .unwrap();
    assert!(face.positions().removed && directory.get(other).is_none());
    let tail = directory.get(SHARD).unwrap().positions().tail;
    assert_eq!(tail, Sequence::new(19));
    let loaded = load::machine(GROUP, store.state(), &directory).unwrap();
    assert_eq!(loaded.shards().map(|s| s.tail()).collect::<Vec<_>>(), [tail]);
    let meta = snapshot.meta.clone();
    machine.install_snapshot(&meta, GroupSnapshot::local(0)).await.unwrap();
    assert_eq!(directory.get(SHARD).unwrap().positions().tail, tail);
}

/// Who reads a shard while a snapshot takes the place of what is here never misses what was shown: the reader is told to look
/// elsewhere before anything goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_misses_nothing_during_an_install() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_donor, snapshot) = donor(dirs[0].path(), 3, 20).await;
    let (store, directory, mut machine) = receiver(dirs[1].path());
    apply(&mut machine, entries(12)).await;
    let (face, state) = (directory.get(SHARD).unwrap(), store.state().clone());
    let (read, ended) = (face.clone(), Arc::new(AtomicBool::new(false)));
    let end = ended.clone();
    let reader = tokio::task::spawn_blocking(move || {
        let mut looks = 0;
        while !end.load(Ordering::Acquire) {
            let tail = read.positions().tail;
            let found = state.read_batches(SHARD, Sequence::FIRST, usize::MAX).unwrap();
            let upto = found.last().map_or(Sequence::FIRST, |batch| batch.end());
            assert!(upto >= tail || read.group() != GROUP, "{upto} of {tail}");
            looks += 1;
        }
        looks
    });
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    machine
        .install_snapshot(&snapshot.meta, snapshot.snapshot)
        .await
        .unwrap();
    ended.store(true, Ordering::Release);
    assert!(reader.await.unwrap() > 0);
    let now = directory.get(SHARD).unwrap();
    assert!(face.group() != GROUP && !Arc::ptr_eq(&face, &now));
    assert_eq!((now.group(), now.positions().tail), (GROUP, Sequence::new(19)));
}
