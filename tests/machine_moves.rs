//! A shard sealed in one group and adopted in another, over random histories: what was stored is there with the same
//! sequences, producers and ids go on, and only one of the two groups ever writes.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod catalog_support;
mod machine_support;

use catalog_support::Catalog;
use machine_support::{GROUP, Record, SHARD, Store, encode};
use mainstem::machine::group::{is_adoptable, waits_for};
use mainstem::machine::port::ShardView as _;
use mainstem::machine::{
    AdoptFault, ApplyError, GroupMachine, GroupOutcome, ItemOutcome, MetaOutcome, MetaRefusal, ShardMachine,
};
use mainstem::model::batch::Codec;
use mainstem::model::{GroupId, LogIndex, Sequence, Term};
use mainstem::wire::internal::v1::{self as pb, group_command::Op, meta_command::Op as MetaOp};
use proptest::prelude::*;

const TO: GroupId = GroupId::new(9);
const BACK: u64 = 3;

fn config() -> pb::ShardConfig {
    pb::ShardConfig {
        stream_id: "00".repeat(16),
        epoch: 1,
        duplicate_window_us: 1_000,
        duplicate_ids_max: 100,
        producers_max: 10,
        producer_idle_us: 100_000,
        subject_in_one_shard: true,
        ..pb::ShardConfig::default()
    }
}

fn command(op: Op) -> pb::GroupCommand {
    pb::GroupCommand {
        feature_level: 1,
        op: Some(op),
    }
}

fn apply(machine: &mut GroupMachine, store: &Store, op: Op) -> Result<GroupOutcome, ApplyError> {
    machine.apply(store, &mut store.clone(), Term::new(1), &command(op))
}

fn create() -> Op {
    Op::CreateShard(pb::CreateShard {
        shard_id: SHARD.get(),
        config: Some(config()),
    })
}

fn publish(time_us: u64, producer: u64, sequence: u64, id: Option<String>) -> Op {
    let record = Record {
        subject: "a".into(),
        id,
        payload: 10,
    };
    Op::Publish(pb::Publish {
        shard_id: SHARD.get(),
        time_us,
        items: vec![pb::PublishItem {
            batch: encode(&[record], Codec::None),
            producer: Some(pb::ProducerStamp {
                producer_id: producer,
                epoch: 1,
                sequence,
            }),
            expect: None,
        }],
    })
}

fn seal(to: GroupId, move_id: u64) -> Op {
    Op::SealShard(pb::SealShard {
        shard_id: SHARD.get(),
        to_group: to.get(),
        move_id,
    })
}

fn unseal(move_id: u64) -> Op {
    Op::UnsealShard(pb::UnsealShard {
        shard_id: SHARD.get(),
        move_id,
    })
}

fn adopt(from: GroupId, move_id: u64, tail: Sequence, digest: u64) -> Op {
    Op::AdoptShard(pb::AdoptShard {
        shard_id: SHARD.get(),
        from_group: from.get(),
        move_id,
        seal: Some(pb::Seal {
            index: 77,
            tail: tail.get(),
            digest,
        }),
    })
}

fn sealed(outcome: GroupOutcome) -> (Sequence, u64, bool) {
    let GroupOutcome::Sealed { tail, digest, existed } = outcome else {
        panic!("{outcome:?}");
    };
    (tail, digest, existed)
}

fn first_of(outcome: GroupOutcome) -> (Sequence, bool) {
    let GroupOutcome::Published(items) = &outcome else {
        panic!("{outcome:?}");
    };
    let [ItemOutcome::Stored(stored)] = items.as_slice() else {
        panic!("{outcome:?}");
    };
    (stored.first, stored.whole_duplicate)
}

/// A leader that does not know that the shard went on, and came back, proposes what is over.
#[test]
fn an_adoption_that_is_over_is_of_no_effect() {
    let store = Store::new(false);
    let mut from = GroupMachine::data(GROUP, []);
    let mut to = GroupMachine::data(TO, []);
    apply(&mut from, &store, create()).unwrap();
    let (tail, digest, _) = sealed(apply(&mut from, &store, seal(TO, 5)).unwrap());
    apply(&mut to, &store, adopt(GROUP, 5, tail, digest)).unwrap();
    apply(&mut to, &store, publish(100, 1, 1, None)).unwrap();
    let (tail_2, digest_2, _) = sealed(apply(&mut to, &store, seal(GROUP, 6)).unwrap());
    apply(&mut from, &store, adopt(TO, 6, tail_2, digest_2)).unwrap();
    store.0.borrow_mut().writes.clear();
    // As after a restart, too, when only what is recorded as the group's is loaded.
    for late in [&mut to, &mut GroupMachine::data(TO, [])] {
        for op in [create(), adopt(GROUP, 5, tail, digest), unseal(5)] {
            let outcome = apply(late, &store, op).unwrap();
            assert!(
                matches!(
                    outcome,
                    GroupOutcome::NoShard
                        | GroupOutcome::Moved { to: GROUP }
                        | GroupOutcome::Created { existed: true }
                        | GroupOutcome::Adopted { existed: true, .. }
                ),
                "{outcome:?}"
            );
        }
    }
    assert!(store.0.borrow().writes.is_empty());
    // From there on it goes on.
    let (tail, digest, _) = sealed(apply(&mut from, &store, seal(TO, 7)).unwrap());
    let outcome = apply(&mut to, &store, adopt(GROUP, 7, tail, digest)).unwrap();
    assert_eq!(outcome, GroupOutcome::Adopted { tail, existed: false });
}

#[test]
fn a_move_that_was_given_up_is_none() {
    let store = Store::new(false);
    let mut from = GroupMachine::data(GROUP, []);
    assert_eq!(apply(&mut from, &store, unseal(5)).unwrap(), GroupOutcome::NoShard);
    apply(&mut from, &store, create()).unwrap();
    apply(&mut from, &store, publish(100, 1, 1, Some("x".into()))).unwrap();
    let (tail, digest, _) = sealed(apply(&mut from, &store, seal(TO, 5)).unwrap());
    assert_eq!(apply(&mut from, &store, unseal(5)).unwrap(), GroupOutcome::Unsealed);
    // It goes on where it was, and no other group takes it.
    assert_eq!(
        first_of(apply(&mut from, &store, publish(200, 1, 2, None)).unwrap()),
        (tail, false)
    );
    let taken = apply(&mut GroupMachine::data(TO, []), &store, adopt(GROUP, 5, tail, digest));
    assert!(
        matches!(taken, Err(ApplyError::Adopt(AdoptFault::NotSealed { .. }))),
        "{taken:?}"
    );
    // A seal of it that comes late is of no effect, also where it never was sealed, and after a restart.
    for again in [seal(TO, 5), seal(TO, 4), unseal(5), unseal(4)] {
        assert_eq!(apply(&mut from, &store, again).unwrap(), GroupOutcome::Unsealed);
    }
    let mut again = GroupMachine::data(GROUP, [store.load()]);
    assert_eq!(apply(&mut again, &store, seal(TO, 5)).unwrap(), GroupOutcome::Unsealed);
    assert_eq!(
        first_of(apply(&mut again, &store, publish(300, 1, 3, None)).unwrap()),
        (tail.plus(1), false)
    );
    // The next move goes its way; what is told of the one before does not open it again.
    let (tail, digest, existed) = sealed(apply(&mut again, &store, seal(TO, 6)).unwrap());
    assert_eq!((tail, existed), (Sequence::new(4), false));
    assert_eq!(
        apply(&mut again, &store, unseal(5)).unwrap(),
        GroupOutcome::Moved { to: TO }
    );
    let outcome = apply(&mut GroupMachine::data(TO, []), &store, adopt(GROUP, 6, tail, digest)).unwrap();
    assert_eq!(outcome, GroupOutcome::Adopted { tail, existed: false });
}

#[test]
fn nothing_of_a_sealed_shard_changes() {
    let store = Store::new(false);
    let mut from = GroupMachine::data(GROUP, []);
    apply(&mut from, &store, create()).unwrap();
    apply(&mut from, &store, publish(100, 1, 1, Some("x".into()))).unwrap();
    let (tail, digest, existed) = sealed(apply(&mut from, &store, seal(TO, 5)).unwrap());
    assert_eq!((tail, existed), (Sequence::new(2), false));
    store.0.borrow_mut().writes.clear();
    let ops = [
        publish(200, 1, 2, None),
        Op::Expire(pb::Expire {
            shard_id: SHARD.get(),
            time_us: 1 << 40,
        }),
        Op::Purge(pb::Purge {
            shard_id: SHARD.get(),
            ..pb::Purge::default()
        }),
        Op::UpdateShard(pb::UpdateShard {
            shard_id: SHARD.get(),
            config: Some(config()),
            revision: 9,
        }),
        Op::RemoveShard(pb::RemoveShard { shard_id: SHARD.get() }),
        seal(GroupId::new(11), 6),
    ];
    for op in ops {
        let text = format!("{op:?}");
        let outcome = apply(&mut from, &store, op).unwrap();
        assert_eq!(outcome, GroupOutcome::Moved { to: TO }, "{text}");
    }
    assert_eq!(
        sealed(apply(&mut from, &store, seal(TO, 5)).unwrap()),
        (tail, digest, true)
    );
    assert_eq!(store.0.borrow().writes, Vec::<String>::new());
    assert_eq!(from.shard(SHARD).unwrap().next_expiry(), None);
    // The same from one that was loaded anew.
    let mut again = GroupMachine::data(GROUP, [store.load()]);
    assert_eq!(
        sealed(apply(&mut again, &store, seal(TO, 5)).unwrap()),
        (tail, digest, true)
    );
    let outcome = apply(&mut again, &store, publish(200, 1, 2, None)).unwrap();
    assert_eq!(outcome, GroupOutcome::Moved { to: TO });
}

#[test]
fn an_adoption_must_find_what_the_seal_said() {
    let store = Store::new(false);
    let mut from = GroupMachine::data(GROUP, []);
    let fault = |store: &Store, op: Op| match apply(&mut GroupMachine::data(TO, []), store, op) {
        Err(ApplyError::Adopt(fault)) => fault,
        other => panic!("{other:?}"),
    };
    let not_sealed = |found: AdoptFault| assert!(matches!(found, AdoptFault::NotSealed { .. }), "{found}");
    not_sealed(fault(&store, adopt(GROUP, 5, Sequence::new(2), 0)));
    apply(&mut from, &store, create()).unwrap();
    apply(&mut from, &store, publish(100, 1, 1, None)).unwrap();
    not_sealed(fault(&store, adopt(GROUP, 5, Sequence::new(2), 0)));
    let (tail, digest, _) = sealed(apply(&mut from, &store, seal(TO, 5)).unwrap());
    // Another move, another group, another shard of things.
    not_sealed(fault(&store, adopt(GROUP, 6, tail, digest)));
    not_sealed(fault(&store, adopt(GroupId::new(4), 5, tail, digest)));
    for (tail, digest) in [(tail.plus(1), digest), (tail, digest ^ 1)] {
        let found = fault(&store, adopt(GROUP, 5, tail, digest));
        assert!(matches!(found, AdoptFault::Differs { .. }), "{found}");
    }
    let entry = command(adopt(GROUP, 5, tail, digest));
    assert_eq!(waits_for(&entry), Some((GROUP, LogIndex::new(77))));
    assert_eq!(waits_for(&command(create())), None);
    // What it needs is here, though who sealed it were gone; and again once it was adopted. Another move's is not.
    let other = command(adopt(GROUP, 6, tail, digest));
    let adoptable = |entry: &pb::GroupCommand| is_adoptable(entry, &store).unwrap();
    assert!(adoptable(&entry) && !adoptable(&other) && !adoptable(&command(create())));
    let mut to = GroupMachine::data(TO, []);
    apply(&mut to, &store, adopt(GROUP, 5, tail, digest)).unwrap();
    assert!(adoptable(&entry) && !adoptable(&other));
}

/// What happens to a shard.
#[derive(Debug, Clone)]
enum Step {
    Publish { producer: u64, again: bool, id: Option<u8> },
    Wait(u64),
    Expire,
    Move,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u64..4, any::<bool>(), prop::option::of(0u8..6))
            .prop_map(|(producer, again, id)| Step::Publish { producer, again, id }),
        2 => (1u64..700).prop_map(Step::Wait),
        1 => Just(Step::Expire),
        2 => Just(Step::Move),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// One shard that goes between three groups, and one that stays: every answer and all that is stored is the same.
    #[test]
    fn a_shard_that_moves_is_as_one_that_stays(steps in prop::collection::vec(step(), 1..60)) {
        let (store, still_store) = (Store::new(false), Store::new(false));
        let mut still = GroupMachine::data(GROUP, []);
        let mut groups: Vec<GroupMachine> =
            (0..BACK).map(|n| GroupMachine::data(GroupId::new(GROUP.get() + n), [])).collect();
        let mut at = 0;
        apply(&mut groups[0], &store, create()).unwrap();
        apply(&mut still, &still_store, create()).unwrap();
        let (mut time, mut moves) = (1_000, 0);
        let mut sequences = [0u64; 4];
        for step in steps {
            match step {
                Step::Publish { producer, again, id } => {
                    let last = &mut sequences[producer as usize];
                    if !again || *last == 0 {
                        *last += 1;
                    }
                    let op = publish(time, producer, *last, id.map(|id| format!("id{id}")));
                    let here = apply(&mut groups[at], &store, op.clone()).unwrap();
                    prop_assert_eq!(&here, &apply(&mut still, &still_store, op.clone()).unwrap());
                    // Where it was before, it is answered where it went; where it never was, not at all.
                    for (n, group) in groups.iter_mut().enumerate().filter(|(n, _)| *n != at) {
                        let before = store.0.borrow().writes.len();
                        let there = apply(group, &store, op.clone()).unwrap();
                        prop_assert!(
                            matches!(there, GroupOutcome::Moved { .. } | GroupOutcome::NoShard),
                            "group {n}: {there:?}"
                        );
                        prop_assert_eq!(store.0.borrow().writes.len(), before, "only the owner writes");
                    }
                }
                Step::Wait(us) => time += us,
                Step::Expire => {
                    let op = Op::Expire(pb::Expire { shard_id: SHARD.get(), time_us: time });
                    let here = apply(&mut groups[at], &store, op.clone()).unwrap();
                    prop_assert_eq!(here, apply(&mut still, &still_store, op).unwrap());
                }
                Step::Move => {
                    moves += 1;
                    let to = (at + 1) % groups.len();
                    let (from_id, to_id) = (groups[at].group(), groups[to].group());
                    let (tail, digest, _) = sealed(apply(&mut groups[at], &store, seal(to_id, moves)).unwrap());
                    let op = adopt(from_id, moves, tail, digest);
                    let first = apply(&mut groups[to], &store, op.clone()).unwrap();
                    prop_assert_eq!(first, GroupOutcome::Adopted { tail, existed: false });
                    let again = apply(&mut groups[to], &store, op).unwrap();
                    prop_assert_eq!(again, GroupOutcome::Adopted { tail, existed: true });
                    at = to;
                }
                Step::Restart => {
                    let shard: ShardMachine = store.load();
                    prop_assert_eq!(shard.group(), groups[at].group());
                    groups[at] = GroupMachine::data(shard.group(), [shard]);
                }
            }
            let (here, there) = (groups[at].shard(SHARD).unwrap(), still.shard(SHARD).unwrap());
            prop_assert_eq!(here.digest(), there.digest());
        }
        prop_assert_eq!(&store.0.borrow().batches, &still_store.0.borrow().batches);
        prop_assert_eq!(&store.0.borrow().postings, &still_store.0.borrow().postings);
    }
}

#[test]
fn a_producer_goes_on_in_the_new_group() {
    let store = Store::new(false);
    let mut from = GroupMachine::data(GROUP, []);
    let mut to = GroupMachine::data(TO, []);
    apply(&mut from, &store, create()).unwrap();
    apply(&mut from, &store, publish(100, 1, 1, None)).unwrap();
    let (tail, digest, _) = sealed(apply(&mut from, &store, seal(TO, 1)).unwrap());
    apply(&mut to, &store, adopt(GROUP, 1, tail, digest)).unwrap();
    // Sent again, because the answer was lost on the way.
    assert_eq!(
        first_of(apply(&mut to, &store, publish(150, 1, 1, None)).unwrap()),
        (Sequence::new(1), true)
    );
    assert_eq!(
        first_of(apply(&mut to, &store, publish(150, 1, 2, None)).unwrap()),
        (Sequence::new(2), false)
    );
}

/// Groups count their terms each for itself: a shard may come to one whose term is lower than that of its last answers.
#[test]
fn a_shard_may_come_to_a_group_of_a_lower_term() {
    let store = Store::new(false);
    let at = |machine: &mut GroupMachine, term, op| {
        let term = Term::new(term);
        machine.apply(&store, &mut store.clone(), term, &command(op)).unwrap()
    };
    let mut from = GroupMachine::data(GROUP, []);
    at(&mut from, 7, create());
    let (first, again) = first_of(at(&mut from, 7, publish(100, 1, 1, None)));
    assert!(!again);
    let (tail, digest, _) = sealed(at(&mut from, 7, seal(TO, 5)));
    let mut to = GroupMachine::data(TO, []);
    at(&mut to, 2, adopt(GROUP, 5, tail, digest));
    let (second, again) = first_of(at(&mut to, 2, publish(200, 1, 2, None)));
    assert!(second > first && !again);
    // The answers are told again as they were, also from what was written.
    assert_eq!(first_of(at(&mut to, 2, publish(300, 1, 1, None))), (first, true));
    let found = store.shard_state(SHARD).unwrap().unwrap();
    let producers = found.producers.iter().map(|(id, record)| (*id, record.as_ref()));
    let blocks = found.id_blocks.iter().map(|(at, block)| (*at, block.as_ref()));
    let loaded = ShardMachine::load(SHARD, TO, &found.record, producers, blocks).unwrap();
    let mut loaded = GroupMachine::data(TO, [loaded]);
    let GroupOutcome::Published(items) = at(&mut loaded, 3, publish(400, 1, 1, None)) else {
        panic!("not published");
    };
    let [ItemOutcome::Stored(stored)] = items.as_slice() else {
        panic!("{items:?}");
    };
    assert_eq!((stored.first, stored.term), (first, Term::new(7)));
}

#[test]
fn a_move_that_is_given_up_leaves_the_shard_where_it_is() {
    let mut catalog = Catalog::new(3);
    let (stream_id, shard_id, from) = catalog.stream("s", 3, false);
    let plan = || {
        MetaOp::PlanShardMove(pb::PlanShardMove {
            shard_id,
            stream_id: stream_id.clone(),
            ..pb::PlanShardMove::default()
        })
    };
    let moving = |catalog: &Catalog| catalog.machine.stream_by_name("default", "s").unwrap().shards[0].moving;
    let abort = |move_id| {
        MetaOp::AbortShardMove(pb::AbortShardMove {
            shard_id,
            stream_id: stream_id.clone(),
            move_id,
            why: "it was removed".into(),
        })
    };
    catalog.done(plan());
    let first = moving(&catalog).unwrap();
    assert!(matches!(
        catalog.refused(abort(first.move_id + 1)),
        MetaRefusal::StaleEpoch { .. }
    ));
    let outcome = catalog.done(abort(first.move_id));
    assert!(
        matches!(outcome, MetaOutcome::ShardMoved { to, .. } if to.get() == from),
        "{outcome:?}"
    );
    assert_eq!(moving(&catalog), None);
    assert!(
        catalog.machine.group(GroupId::new(first.to_group)).is_none(),
        "its new group goes"
    );
    assert_eq!(catalog.group(from).shards, 1);
    let sealed = |move_id| {
        MetaOp::ShardSealed(pb::ShardSealed {
            shard_id,
            stream_id: stream_id.clone(),
            move_id,
            seal: Some(pb::Seal {
                index: 3,
                tail: 1,
                digest: 1,
            }),
        })
    };
    let give_up = |move_id| {
        MetaOp::GiveUpShardMove(pb::GiveUpShardMove {
            shard_id,
            stream_id: stream_id.clone(),
            move_id,
            why: "a node is away".into(),
        })
    };
    // What is decided first counts: once it is given up its seal is not taken any more, and it is over when it is unsealed.
    catalog.done(plan());
    let second = moving(&catalog).unwrap();
    assert!(second.to_group > first.to_group && second.move_id > first.move_id);
    catalog.form(second.to_group);
    catalog.done(give_up(second.move_id));
    catalog.done(give_up(second.move_id));
    let refusal = catalog.refused(sealed(second.move_id));
    assert!(refusal.to_string().contains("was given up"), "{refusal}");
    assert!(
        matches!(catalog.refused(plan()), MetaRefusal::InFlight { .. }),
        "not over yet"
    );
    catalog.done(abort(second.move_id));
    assert_eq!(moving(&catalog), None);
    assert_eq!(catalog.group(from).shards, 1);
    // Once its seal is told there is no way back.
    catalog.done(plan());
    let third = moving(&catalog).unwrap();
    catalog.form(third.to_group);
    catalog.done(sealed(third.move_id));
    for back in [abort(third.move_id), give_up(third.move_id)] {
        let refusal = catalog.refused(back);
        assert!(refusal.to_string().contains("can only go on"), "{refusal}");
    }
}
