//! openraft's storage suite over the real storage, and one test for each trap that one node can fall into.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use openraft::impls::EmptyNode;
use openraft::storage::{IOFlushed, RaftLogStorage, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, RaftLogReader, StorageError};
use prost::Message;

use super::catalog::{MetaChange, MetaObserver};
use super::log_store::GroupLog;
use super::shard::{RecentBudget, ShardDirectory};
use super::state_machine::{GroupContext, GroupMachine};
use super::types::{Entry, LeaderId, LogId, Mainstem, Membership, Proposal};
use crate::model::batch::{BatchBuilder, Codec, RecordFields};
use crate::model::{GroupId, Sequence, ShardId};
use crate::storage::{Store, StoreOptions};
use crate::wire::internal as pb;

mod moves;
mod snapshots;

const GROUP: GroupId = GroupId::new(7);
const SHARD: ShardId = ShardId::new(3);

struct Nobody;

impl MetaObserver for Nobody {
    fn changed(&self, _changes: &[MetaChange]) {}
}

fn open_store(dir: &std::path::Path) -> Arc<Store> {
    Store::open(
        StoreOptions {
            dir: dir.to_owned(),
            min_free_bytes: 0,
            ..StoreOptions::default()
        },
        None,
    )
    .unwrap()
}

fn context(store: &Store) -> GroupContext {
    GroupContext {
        state: store.state().clone(),
        directory: Arc::new(ShardDirectory::default()),
        recent: RecentBudget::new(1 << 20),
        observer: Arc::new(Nobody),
        seals: Arc::default(),
        token: tokio_util::sync::CancellationToken::new(),
    }
}

fn open_group(store: &Store) -> (GroupLog, GroupMachine) {
    let log = GroupLog::open(store.log().clone(), GROUP).unwrap();
    let machine = GroupMachine::open(GROUP, context(store), log.clone()).unwrap();
    (log, machine)
}

struct Builder;

impl StoreBuilder<Mainstem, GroupLog, GroupMachine, (Arc<Store>, tempfile::TempDir)> for Builder {
    async fn build(&self) -> Result<((Arc<Store>, tempfile::TempDir), GroupLog, GroupMachine), StorageError<Mainstem>> {
        let dir = tempfile::tempdir().unwrap();
        let store = open_store(dir.path());
        let (log, machine) = open_group(&store);
        Ok(((store, dir), log, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openrafts_own_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}

fn id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

fn entry(index: u64, op: pb::group_command::Op) -> Entry {
    let command = pb::GroupCommand {
        feature_level: crate::machine::FEATURE_LEVEL,
        op: Some(op),
    };
    Entry {
        log_id: id(index),
        payload: EntryPayload::Normal(Proposal(command.encode_to_vec().into())),
    }
}

/// Entry 1: membership. Entry 2: the shard. From 3 on: one message each.
fn entries(upto: u64) -> Vec<Entry> {
    let mut out = vec![
        Entry {
            log_id: id(1),
            payload: EntryPayload::Membership(
                Membership::new(vec![BTreeSet::from([1])], BTreeMap::from([(1, EmptyNode::new())])).unwrap(),
            ),
        },
        entry(
            2,
            pb::group_command::Op::CreateShard(pb::CreateShard {
                shard_id: SHARD.get(),
                config: Some(pb::ShardConfig {
                    stream_id: format!("{:032x}", 5),
                    subject_in_one_shard: true,
                    producers_max: 10,
                    producer_idle_us: 1_000_000,
                    ..pb::ShardConfig::default()
                }),
            }),
        ),
    ];
    for index in 3..=upto {
        let mut builder = BatchBuilder::new();
        builder
            .push(&RecordFields {
                subject: "a.b",
                key: None,
                message_id: None,
                event_time: None,
                headers: &[],
                payload: format!("message of entry {index}").as_bytes(),
            })
            .unwrap();
        out.push(entry(
            index,
            pb::group_command::Op::Publish(pb::Publish {
                shard_id: SHARD.get(),
                time_us: index * 1_000,
                items: vec![pb::PublishItem {
                    batch: builder.build(Codec::None).unwrap(),
                    producer: None,
                    expect: None,
                }],
            }),
        ));
    }
    out.truncate(upto as usize);
    out
}

/// Appends and waits for the sync. Every log begins with entry 0.
async fn append(log: &mut GroupLog, mut entries: Vec<Entry>) {
    if log.last().is_none() {
        let blank = Entry {
            log_id: id(0),
            payload: EntryPayload::Blank,
        };
        entries.insert(0, blank);
    }
    let (tx, rx) = Mainstem::oneshot();
    log.append(entries, IOFlushed::signal(tx)).await.unwrap();
    rx.await.unwrap().unwrap();
}

async fn apply(machine: &mut GroupMachine, entries: Vec<Entry>) {
    machine
        .apply(stream::iter(entries.into_iter().map(|e| Ok((e, None)))))
        .await
        .unwrap();
}

fn stored(store: &Store) -> Vec<(Sequence, Bytes)> {
    store
        .state()
        .batches(SHARD, Sequence::FIRST)
        .map(|b| b.unwrap())
        .map(|b| (b.base, b.batch))
        .collect()
}

/// Trap A: a reader never skips a missing entry; purged ones are absent only at the front.
#[tokio::test(flavor = "multi_thread")]
async fn trap_a_purged_entries_are_absent_at_the_front_only() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let (mut log, _machine) = open_group(&store);
    append(&mut log, entries(10)).await;
    log.purge(id(4)).await.unwrap();
    for mut reader in [log.clone(), GroupLog::open(store.log().clone(), GROUP).unwrap()] {
        let got: Vec<u64> = reader
            .try_get_log_entries(1..=10)
            .await
            .unwrap()
            .iter()
            .map(|e| e.log_id.index)
            .collect();
        assert_eq!(got, (5..=10).collect::<Vec<_>>());
        assert!(!reader.limited_get_log_entries(5, 11).await.unwrap().is_empty());
    }
    let gap = log.append(entries(12).split_off(11), IOFlushed::noop()).await;
    assert!(gap.unwrap_err().to_string().contains("hole"));
}

/// A log whose every entry is purged opens, and goes on behind the purged ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_purged_to_its_end_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open_store(dir.path());
        let (mut log, mut machine) = open_group(&store);
        append(&mut log, entries(4)).await;
        apply(&mut machine, entries(4)).await;
        tokio::task::block_in_place(|| store.state().flush()).unwrap();
        log.purge(id(4)).await.unwrap();
        log.save_vote(&super::types::Vote::new(2, 1)).await.unwrap();
        tokio::task::block_in_place(|| store.close()).unwrap();
    }
    let store = open_store(dir.path());
    let (mut log, mut machine) = open_group(&store);
    assert_eq!(log.last(), Some(id(4)));
    assert_eq!(machine.applied_state().await.unwrap().0, Some(id(4)));
    assert!(machine.get_current_snapshot().await.unwrap().is_some());
    append(&mut log, entries(5).split_off(4)).await;
    assert_eq!(log.try_get_log_entries(0..=9).await.unwrap().len(), 1);
}

/// Trap C: `state/` ahead of the log. What is reported is clamped, and what is applied already is not applied again.
#[tokio::test(flavor = "multi_thread")]
async fn trap_c_state_ahead_of_the_log_is_clamped_and_not_applied_twice() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open_store(dir.path());
        let (mut log, mut machine) = open_group(&store);
        append(&mut log, entries(5)).await;
        apply(&mut machine, entries(8)).await;
        tokio::task::block_in_place(|| store.state().flush()).unwrap();
        tokio::task::block_in_place(|| store.close()).unwrap();
    }
    let store = open_store(dir.path());
    let (mut log, mut machine) = open_group(&store);
    let (applied, _) = machine.applied_state().await.unwrap();
    assert_eq!(applied, Some(id(5)));
    let before = stored(&store);
    assert_eq!(before.len(), 6);
    append(&mut log, entries(9).split_off(5)).await;
    apply(&mut machine, entries(9).split_off(5)).await;
    let after = stored(&store);
    assert_eq!(after[..6], before[..]);
    assert_eq!(after.len(), 7);
    assert_eq!(after[6].0, Sequence::new(7));
}

/// Trap D: a committed position beyond the durable log is clamped.
#[tokio::test(flavor = "multi_thread")]
async fn trap_d_committed_beyond_the_log_is_clamped() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open_store(dir.path());
        let (mut log, _machine) = open_group(&store);
        append(&mut log, entries(5)).await;
        log.save_committed(Some(id(9))).await.unwrap();
        // Rides along with the next synced write.
        append(&mut log, vec![]).await;
        log.save_vote(&super::types::Vote::new(2, 1)).await.unwrap();
        tokio::task::block_in_place(|| store.close()).unwrap();
    }
    let store = open_store(dir.path());
    let (mut log, _machine) = open_group(&store);
    assert_eq!(log.read_committed().await.unwrap(), Some(id(5)));
}

/// A snapshot that is not forced stands only for what a flush has made durable, so that the log is never purged
/// beyond it (trap C's other half).
#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_purged_no_further_than_state_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let (mut log, mut machine) = open_group(&store);
    append(&mut log, entries(8)).await;
    apply(&mut machine, entries(5)).await;
    assert!(machine.try_create_snapshot_builder(false).await.is_none());
    tokio::task::block_in_place(|| store.state().flush()).unwrap();
    apply(&mut machine, entries(8).split_off(5)).await;
    let mut builder = machine.try_create_snapshot_builder(false).await.unwrap();
    let snapshot = openraft::RaftSnapshotBuilder::build_snapshot(&mut builder)
        .await
        .unwrap();
    assert_eq!(snapshot.meta.last_log_id, Some(id(5)));
    assert!(machine.try_create_snapshot_builder(false).await.is_none());
}
