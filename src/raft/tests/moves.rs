//! A shard that goes from one group to another one and back, on a node with replicas of both.

use pb::group_command::Op;

use super::*;
use crate::raft::load;

const OTHER: GroupId = GroupId::new(8);

/// The shard goes from one group to the other; the entries that do it have this index in each.
async fn hand(store: &Store, from: (&mut GroupMachine, GroupId), to: (&mut GroupMachine, GroupId), index: u64) {
    let seal = Op::SealShard(pb::SealShard {
        shard_id: SHARD.get(),
        to_group: to.1.get(),
        move_id: index,
    });
    apply(from.0, vec![entry(index, seal)]).await;
    let sealed = load::machine(from.1, store.state(), &ShardDirectory::default()).unwrap();
    let sealed = sealed.shard(SHARD).unwrap();
    let adopt = Op::AdoptShard(pb::AdoptShard {
        shard_id: SHARD.get(),
        from_group: from.1.get(),
        move_id: index,
        seal: Some(pb::Seal {
            index,
            tail: sealed.tail().get(),
            digest: sealed.digest(),
        }),
    });
    apply(to.0, vec![entry(index, adopt)]).await;
}

/// A replica of the group that it was in for a while has ended and begun again in between: what is found of the shard is still
/// what is written to, and whoever reads it is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_comes_back_is_seen_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let context = context(&store);
    let open = |group| {
        let log = GroupLog::open(store.log().clone(), group).unwrap();
        GroupMachine::open(group, context.clone(), log).unwrap()
    };
    let (mut here, mut there) = (open(GROUP), open(OTHER));
    apply(&mut here, entries(4)).await;
    let read = context.directory.get(SHARD).unwrap();
    hand(&store, (&mut here, GROUP), (&mut there, OTHER), 5).await;
    assert_eq!((read.group(), read.positions().tail), (OTHER, Sequence::new(3)));
    drop(there);
    let mut there = open(OTHER);
    apply(&mut there, entries(7).split_off(5)).await;
    assert_eq!(read.positions().tail, Sequence::new(5));
    hand(&store, (&mut there, OTHER), (&mut here, GROUP), 8).await;
    apply(&mut here, entries(9).split_off(8)).await;
    let found = context.directory.get(SHARD).unwrap();
    assert_eq!((found.group(), found.heir()), (GROUP, None));
    assert_eq!(found.positions().tail, Sequence::new(6));
    assert_eq!(read.positions(), found.positions());
    assert_eq!(stored(&store).len(), 5);
}
