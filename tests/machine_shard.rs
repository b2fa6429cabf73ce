//! The shard's machine against the rules written down naively, over random histories; and against itself, restarted
//! after every entry, over a store that forgets nothing. A failure prints the smallest history found, and its seed goes
//! to `proptest-regressions/`.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod machine_support;

use std::collections::{HashMap, HashSet};

use machine_support::naive::{Item, Naive};
use machine_support::{Deferred, GROUP, Record, SHARD, Store, encode};
use mainstem::machine::port::ShardSink;
use mainstem::machine::{ItemOutcome, Refusal, ShardMachine, UpdateOutcome};
use mainstem::model::batch::Codec;
use mainstem::model::{Revision, Sequence, Term, TimeUs};
use mainstem::wire::internal::v1 as pb;
use mainstem::wire::v1::{DiscardPolicy, Expectation, Limits, SubjectExpectation};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const SUBJECTS: [&str; 5] = ["a", "a.x", "a.y", "b.x.1", "b.x.2"];
const FILTERS: [&str; 7] = ["", ">", "a", "a.*", "b.>", "*.x.1", "none"];

#[derive(Debug, Clone)]
struct PlannedItem {
    records: Vec<Record>,
    codec: Codec,
    /// Producer, epoch, and how far off the expected sequence.
    producer: Option<(u64, u64, i64)>,
    /// How far off the actual one.
    last_sequence: Option<i64>,
    subject: Option<(&'static str, i64)>,
}

#[derive(Debug, Clone)]
enum Op {
    Publish {
        advance: i64,
        items: Vec<PlannedItem>,
    },
    Expire {
        advance: i64,
    },
    Purge {
        before: Option<i64>,
        keep: Option<u64>,
        filter: &'static str,
    },
    Update {
        config: pb::ShardConfig,
    },
}

fn config() -> impl Strategy<Value = pb::ShardConfig> {
    let limits = (
        prop::option::of(100u64..1_000),
        prop::option::of(20u64..400),
        prop::option::of(1u64..20),
        prop::option::of(5u32..60),
        any::<bool>(),
    )
        .prop_map(|(max_age_us, max_bytes, max_messages, max_message_bytes, new)| Limits {
            max_age_us,
            max_bytes,
            max_messages,
            max_message_bytes,
            discard: match new {
                true => DiscardPolicy::New as i32,
                false => DiscardPolicy::Old as i32,
            },
        });
    (
        limits,
        prop::sample::select(vec![0u64, 50, 300, 1_000]),
        1u32..10,
        1u32..4,
        50u64..1_000,
        prop::bool::weighted(0.8),
    )
        .prop_map(|(limits, window, ids, producers, idle, together)| pb::ShardConfig {
            stream_id: "00".repeat(16),
            epoch: 1,
            shard_index: 0,
            limits: Some(limits),
            duplicate_window_us: window,
            duplicate_ids_max: ids,
            producers_max: producers,
            producer_idle_us: idle,
            subject_in_one_shard: together,
        })
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let record = (
        prop::sample::select(&SUBJECTS[..]),
        prop::option::weighted(0.4, 0u8..12),
        0usize..40,
    )
        .prop_map(|(subject, id, payload)| Record {
            subject: subject.into(),
            id: id.map(|id| format!("id-{id}")),
            payload,
        });
    prop::collection::vec(record, 1..7)
}

fn item() -> impl Strategy<Value = PlannedItem> {
    let off = || prop::sample::select(vec![0i64, 0, 0, -1, 1]);
    (
        records(),
        prop::sample::select(vec![Codec::None, Codec::None, Codec::Lz4, Codec::Zstd]),
        prop::option::weighted(
            0.5,
            (
                1u64..5,
                1u64..3,
                prop::sample::select(vec![0i64, 0, 0, 0, 1, -1, -2, -5]),
            ),
        ),
        prop::option::weighted(0.15, off()),
        prop::option::weighted(0.2, (prop::sample::select(&SUBJECTS[..]), off())),
    )
        .prop_map(|(records, codec, producer, last_sequence, subject)| PlannedItem {
            records,
            codec,
            producer,
            last_sequence,
            subject,
        })
}

fn op() -> impl Strategy<Value = Op> {
    let advance = || prop::sample::select(vec![0i64, 1, 10, 40, 100, 300, -20, -200]);
    prop_oneof![
        12 => (advance(), prop::collection::vec(item(), 1..5)).prop_map(|(advance, items)| Op::Publish { advance, items }),
        4 => advance().prop_map(|advance| Op::Expire { advance }),
        3 => (
            prop::option::of(-3i64..12),
            prop::option::of(0u64..6),
            prop::sample::select(&FILTERS[..]),
        ).prop_map(|(before, keep, filter)| Op::Purge { before, keep, filter }),
        1 => config().prop_map(|config| Op::Update { config }),
    ]
}

/// A machine with its store.
struct Replica {
    machine: ShardMachine,
    store: Store,
    restarts: bool,
}

impl Replica {
    fn new(config: &pb::ShardConfig, restarts: bool) -> Self {
        let store = Store::new(restarts);
        let machine = ShardMachine::create(&mut store.clone(), SHARD, GROUP, config.clone());
        Self {
            machine,
            store,
            restarts,
        }
    }

    fn apply<T>(&mut self, f: impl FnOnce(&mut ShardMachine, &Store, &mut dyn ShardSink) -> T) -> T {
        if !self.restarts {
            return f(&mut self.machine, &self.store.clone(), &mut self.store.clone());
        }
        let mut sink = Deferred::default();
        let outcome = f(&mut self.machine, &self.store, &mut sink);
        sink.commit(&self.store);
        self.machine = self.store.load();
        outcome
    }
}

/// Three of them, in step: the rules, one that runs on, one that restarts after each entry, over a store that drops no
/// batches and shows an entry's writes only when it is over.
struct Trio {
    naive: Naive,
    steady: Replica,
    restarted: Replica,
    time: u64,
    term: u64,
    revision: u64,
    /// What was sent under each producer's number: sent again, it is the same.
    sent: HashMap<(u64, u64, u64), Vec<Record>>,
}

impl Trio {
    fn new(config: pb::ShardConfig) -> Self {
        Self {
            steady: Replica::new(&config, false),
            restarted: Replica::new(&config, true),
            naive: Naive::new(config),
            time: 1_000,
            term: 1,
            revision: 0,
            sent: HashMap::new(),
        }
    }

    fn both<T: PartialEq + std::fmt::Debug>(
        &mut self,
        f: impl Fn(&mut ShardMachine, &Store, &mut dyn ShardSink) -> T,
    ) -> Result<T, TestCaseError> {
        let outcome = self.steady.apply(&f);
        prop_assert_eq!(&outcome, &self.restarted.apply(&f));
        Ok(outcome)
    }

    fn run(&mut self, op: &Op) -> Result<(), TestCaseError> {
        match op {
            Op::Publish { advance, items } => self.publish(*advance, items)?,
            Op::Expire { advance } => self.expire(*advance)?,
            Op::Purge { before, keep, filter } => {
                let before = before.map(|offset| self.naive.floor().saturating_add_signed(offset));
                let purge = pb::Purge {
                    shard_id: SHARD.get(),
                    before_sequence: before,
                    keep: *keep,
                    filter: filter.to_string(),
                    from_sequence: None,
                };
                let outcome = self.both(|m, v, s| m.apply_purge(v, s, &purge).unwrap().unwrap())?;
                prop_assert_eq!(outcome.messages, self.naive.purge(before, *keep, filter));
                prop_assert_eq!(outcome.next, None);
            }
            Op::Update { config } => {
                self.revision += 1;
                let revision = Revision::new(self.revision);
                let outcome = self.both(|m, v, s| m.apply_update(v, s, revision, config.clone()).unwrap())?;
                prop_assert_eq!(outcome, UpdateOutcome::Applied);
                self.naive.update(config.clone());
                // Told again, by a leader that does not know: nothing.
                let outcome =
                    self.both(|m, v, s| m.apply_update(v, s, revision, pb::ShardConfig::default()).unwrap())?;
                prop_assert_eq!(outcome, UpdateOutcome::Stale);
            }
        }
        self.compare()
    }

    fn publish(&mut self, advance: i64, planned: &[PlannedItem]) -> Result<(), TestCaseError> {
        self.time = self.time.saturating_add_signed(advance);
        if advance == 300 {
            self.term += 1;
        }
        let mut items = Vec::new();
        let mut sent = pb::Publish {
            shard_id: SHARD.get(),
            time_us: self.time,
            items: vec![],
        };
        let mut now = HashSet::new();
        for plan in planned {
            let mut records = plan.records.clone();
            let producer = plan.producer.map(|(producer_id, epoch, off)| {
                let known = self
                    .naive
                    .producers
                    .get(&producer_id)
                    .filter(|known| known.epoch == epoch);
                let last = known.map_or(0, |known| known.last);
                let sequence = (last + 1).saturating_add_signed(off);
                let key = (producer_id, epoch, sequence);
                match self.sent.get(&key) {
                    Some(before) if sequence <= last || now.contains(&key) => records = before.clone(),
                    Some(_) | None => drop(self.sent.insert(key, records.clone())),
                }
                now.insert(key);
                pb::ProducerStamp {
                    producer_id,
                    epoch,
                    sequence,
                }
            });
            let expect = (plan.last_sequence.is_some() || plan.subject.is_some()).then(|| Expectation {
                last_sequence: plan
                    .last_sequence
                    .map(|off| (self.naive.tail - 1).saturating_add_signed(off)),
                subject: plan.subject.map(|(subject, off)| SubjectExpectation {
                    subject: subject.into(),
                    last_sequence: self.naive.last_by_subject(subject).saturating_add_signed(off),
                }),
            });
            sent.items.push(pb::PublishItem {
                batch: encode(&records, plan.codec),
                producer,
                expect: expect.clone(),
            });
            items.push(Item {
                records,
                producer,
                expect,
            });
        }
        let term = Term::new(self.term);
        let outcomes = self.both(|m, v, s| m.apply_publish(v, s, term, &sent).unwrap())?;
        prop_assert_eq!(outcomes, self.naive.publish(self.time, self.term, &items));
        Ok(())
    }

    fn expire(&mut self, advance: i64) -> Result<(), TestCaseError> {
        self.time = self.time.saturating_add_signed(advance);
        let time = TimeUs::new(self.time);
        let needed = self.steady.machine.needs_expiry(time);
        prop_assert_eq!(needed, self.restarted.machine.needs_expiry(time));
        let writes = self.steady.store.0.borrow().writes.len();
        let outcome = self.both(|m, v, s| m.apply_expire(v, s, time).unwrap())?;
        let dropped_ids = self.steady.store.0.borrow().writes[writes..]
            .iter()
            .any(|write| write.starts_with("drop ids"));
        prop_assert!(
            !needed || outcome.messages > 0 || outcome.producers > 0 || dropped_ids,
            "an expiry that was said to be needed did nothing"
        );
        prop_assert_eq!((outcome.messages, outcome.producers), self.naive.expire(self.time));
        prop_assert!(!outcome.more);
        // What remains is not due yet.
        prop_assert!(!self.steady.machine.needs_expiry(time));
        Ok(())
    }

    fn compare(&self) -> Result<(), TestCaseError> {
        for replica in [&self.steady, &self.restarted] {
            let machine = &replica.machine;
            prop_assert_eq!(machine.tail().get(), self.naive.tail);
            prop_assert_eq!(machine.floor().get(), self.naive.floor());
            prop_assert_eq!(machine.messages(), self.naive.retained.len() as u64);
            prop_assert_eq!(machine.bytes(), self.naive.bytes());
            prop_assert_eq!(machine.ids(), self.naive.ids.len());
            prop_assert_eq!(machine.producers(), self.naive.producers.len());
            let first_time = self.naive.retained.first().map(|message| TimeUs::new(message.time));
            prop_assert_eq!(machine.first_time(), first_time);
            for (id, producer) in &self.naive.producers {
                prop_assert_eq!(machine.producer(*id), Some((producer.epoch, producer.last)));
            }
            for subject in SUBJECTS {
                let last = machine.last_by_subject(&replica.store, subject).unwrap();
                prop_assert_eq!(last.map_or(0, Sequence::get), self.naive.last_by_subject(subject));
            }
            let retained: Vec<(u64, String)> = self
                .naive
                .retained
                .iter()
                .map(|message| (message.sequence, message.subject.clone()))
                .collect();
            prop_assert_eq!(replica.store.retained(machine.floor()), retained);
        }
        let (steady, restarted) = (self.steady.store.0.borrow(), self.restarted.store.0.borrow());
        prop_assert_eq!(&steady.writes, &restarted.writes);
        // Within the slack, whatever is due is known to be.
        let due = self.steady.machine.next_expiry();
        prop_assert_eq!(due, self.restarted.machine.next_expiry());
        if let Some(oldest) = self.naive.ids.first() {
            let latest = oldest.time + self.naive.config.duplicate_window_us * 17 / 16;
            prop_assert!(due.is_some_and(|due| due.get() <= latest));
        }
        Ok(())
    }
}

/// `MACHINE_CASES=20000` for a longer run. A failure's seed is printed, and kept beside this file.
fn config_of_runs(cases: u32) -> ProptestConfig {
    let cases = std::env::var("MACHINE_CASES").map_or(cases, |text| text.parse().expect("a number"));
    ProptestConfig {
        cases,
        max_shrink_iters: 20_000,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config_of_runs(600))]

    #[test]
    fn agrees_with_the_rules_and_with_itself(config in config(), ops in prop::collection::vec(op(), 1..60)) {
        let mut trio = Trio::new(config);
        for op in &ops {
            trio.run(op)?;
        }
    }

    /// What no leader lets through is refused all the same, and the rest of the entry is applied.
    #[test]
    fn damaged_batches_are_refused(records in records(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let config = pb::ShardConfig { duplicate_window_us: 100, duplicate_ids_max: 100, ..pb::ShardConfig::default() };
        let mut replica = Replica::new(&config, true);
        let mut damaged = encode(&records, Codec::None).to_vec();
        let at = at.index(damaged.len());
        damaged[at] = value;
        let good = encode(&[Record { subject: "good".into(), id: None, payload: 1 }], Codec::None);
        let item = |batch: bytes::Bytes| pb::PublishItem { batch, producer: None, expect: None };
        let publish = pb::Publish { shard_id: SHARD.get(), time_us: 1, items: vec![item(damaged.into()), item(good)] };
        let outcomes = replica.apply(|m, v, s| m.apply_publish(v, s, Term::new(1), &publish).unwrap());
        prop_assert!(matches!(outcomes[1], ItemOutcome::Stored(_)));
        if let ItemOutcome::Refused(refusal) = &outcomes[0] {
            prop_assert_eq!(*refusal, Refusal::BadBatch);
            prop_assert_eq!(replica.machine.messages(), 1);
            prop_assert_eq!(replica.machine.ids(), 0);
        }
    }
}

fn plain_config(limits: Limits) -> pb::ShardConfig {
    pb::ShardConfig {
        limits: Some(limits),
        subject_in_one_shard: true,
        duplicate_ids_max: 1,
        producers_max: 10,
        producer_idle_us: 1 << 40,
        ..pb::ShardConfig::default()
    }
}

/// `count` batches of one message each, on subjects `s.0` … `s.9` in turn.
fn fill(replica: &mut Replica, count: usize, time_us: u64) {
    for i in 0..count {
        let record = Record {
            subject: format!("s.{}", i % 10),
            id: None,
            payload: 10,
        };
        let publish = pb::Publish {
            shard_id: SHARD.get(),
            time_us,
            items: vec![pb::PublishItem {
                batch: encode(&[record], Codec::None),
                producer: None,
                expect: None,
            }],
        };
        replica.apply(|m, v, s| m.apply_publish(v, s, Term::new(1), &publish).unwrap());
    }
}

/// More than one entry may do is done by several, and adds up to what was asked.
#[test]
fn large_purges_go_in_steps() {
    let purges: [(Option<u64>, Option<u64>, &str, u64); 6] = [
        (Some(9_001), None, "", 9_000),
        (None, Some(1_000), "", 9_000),
        (None, None, "s.3", 1_000),
        (None, Some(100), "s.3", 900),
        (Some(5_001), Some(10), "s.*", 4_990),
        (None, None, "", 10_000),
    ];
    for (before_sequence, keep, filter, expected) in purges {
        let mut replica = Replica::new(&plain_config(Limits::default()), false);
        fill(&mut replica, 10_000, 1);
        let mut next = Some(pb::Purge {
            shard_id: SHARD.get(),
            before_sequence,
            keep,
            filter: filter.into(),
            from_sequence: None,
        });
        let (mut purged, mut steps) = (0, 0);
        while let Some(purge) = next {
            let outcome = replica.apply(|m, v, s| m.apply_purge(v, s, &purge).unwrap().unwrap());
            purged += outcome.messages;
            next = outcome.next;
            steps += 1;
            // What comes meanwhile is not touched.
            fill(&mut replica, 5, 1);
            assert!(steps < 20);
        }
        assert_eq!(purged, expected, "{before_sequence:?} {keep:?} {filter:?}");
        assert_eq!(replica.machine.messages(), 10_000 - expected + steps * 5);
        assert_eq!(
            replica.store.retained(replica.machine.floor()).len() as u64,
            replica.machine.messages()
        );
    }
}

/// A limit that is lowered a lot is reached by expiry, step by step.
#[test]
fn lowered_limits_are_reached_in_steps() {
    let mut replica = Replica::new(&plain_config(Limits::default()), true);
    fill(&mut replica, 10_000, 1);
    let lowered = plain_config(Limits {
        max_messages: Some(10),
        ..Limits::default()
    });
    replica.apply(|m, v, s| m.apply_update(v, s, Revision::new(1), lowered.clone()).unwrap());
    let after_update = replica.machine.messages();
    assert!(after_update > 10 && after_update < 10_000);
    let mut steps = 0;
    while replica.machine.needs_expiry(TimeUs::new(2)) {
        let outcome = replica.apply(|m, v, s| m.apply_expire(v, s, TimeUs::new(2)).unwrap());
        assert!(outcome.messages > 0);
        steps += 1;
    }
    assert!((1..5).contains(&steps));
    assert_eq!((replica.machine.messages(), replica.machine.floor().get()), (10, 9_991));
}

/// A publish at the limit looks at what it removes, and at nothing else.
#[test]
fn publishing_at_the_limit_reads_little() {
    let config = plain_config(Limits {
        max_bytes: Some(50_000),
        ..Limits::default()
    });
    let mut replica = Replica::new(&config, false);
    let records = vec![
        Record {
            subject: "s".into(),
            id: None,
            payload: 97,
        };
        100
    ];
    let mut publish = pb::Publish {
        shard_id: SHARD.get(),
        time_us: 1,
        items: vec![pb::PublishItem {
            batch: encode(&records, Codec::None),
            producer: None,
            expect: None,
        }],
    };
    for _ in 0..10 {
        replica.apply(|m, v, s| m.apply_publish(v, s, Term::new(1), &publish).unwrap());
    }
    assert_eq!(replica.machine.bytes(), 50_000);
    let before = replica.store.0.borrow().reads;
    // Five records each time: twenty publishes move the floor over one batch.
    publish.items[0].batch = encode(&records[..5], Codec::None);
    for _ in 0..20 {
        replica.apply(|m, v, s| m.apply_publish(v, s, Term::new(1), &publish).unwrap());
    }
    assert_eq!(replica.machine.bytes(), 50_000);
    let reads = replica.store.0.borrow().reads - before;
    assert!(reads <= 3, "{reads} reads");
}

/// However many records of one subject an entry decompresses to, a posting is bounded.
#[test]
fn postings_are_bounded() {
    let mut replica = Replica::new(&plain_config(Limits::default()), true);
    let record = Record {
        subject: "s".into(),
        id: None,
        payload: 0,
    };
    let item = pb::PublishItem {
        batch: encode(&vec![record; 100_000], Codec::Zstd),
        producer: None,
        expect: None,
    };
    let publish = pb::Publish {
        shard_id: SHARD.get(),
        time_us: 1,
        items: vec![item; 6],
    };
    replica.apply(|m, v, s| m.apply_publish(v, s, Term::new(1), &publish).unwrap());
    let lengths: Vec<usize> = replica.store.0.borrow().postings.values().map(Vec::len).collect();
    assert_eq!(lengths, [524_288, 600_000 - 524_288]);
    let last = replica.machine.last_by_subject(&replica.store, "s").unwrap();
    assert_eq!(last, Some(Sequence::new(600_000)));
}

/// A producer's batch that comes twice within one entry, and a trim that reaches into the entry that causes it: neither
/// may depend on seeing what is only about to be written.
#[test]
fn an_entry_need_not_be_seen_before_it_is_written() {
    let config = plain_config(Limits {
        max_messages: Some(2),
        ..Limits::default()
    });
    let mut replica = Replica::new(&config, true);
    let record = Record {
        subject: "s".into(),
        id: None,
        payload: 1,
    };
    let item = |sequence| pb::PublishItem {
        batch: encode(&vec![record.clone(); 3], Codec::None),
        producer: Some(pb::ProducerStamp {
            producer_id: 1,
            epoch: 1,
            sequence,
        }),
        expect: None,
    };
    let publish = pb::Publish {
        shard_id: SHARD.get(),
        time_us: 1,
        items: vec![item(1), item(1), item(2)],
    };
    let outcomes = replica.apply(|m, v, s| m.apply_publish(v, s, Term::new(1), &publish).unwrap());
    let firsts: Vec<(u64, bool)> = outcomes
        .iter()
        .map(|outcome| match outcome {
            ItemOutcome::Stored(stored) => (stored.first.get(), stored.whole_duplicate),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(firsts, [(1, false), (1, true), (4, false)]);
    assert_eq!((replica.machine.floor().get(), replica.machine.messages()), (5, 2));
}

#[test]
fn a_clock_that_goes_back_expires_nothing_early() {
    let config = plain_config(Limits {
        max_age_us: Some(100),
        ..Limits::default()
    });
    let mut replica = Replica::new(&config, true);
    // A leader a year ahead stamps messages; the next one is right.
    let year = 365 * 24 * 3_600 * 1_000_000u64;
    fill(&mut replica, 1, year + 1_000);
    fill(&mut replica, 1, 1_000);
    assert_eq!(replica.machine.last_time(), Some(TimeUs::new(year + 1_000)));
    let outcome = replica.apply(|m, v, s| m.apply_expire(v, s, TimeUs::new(5_000)).unwrap());
    assert_eq!(outcome.messages, 0);
    assert_eq!(replica.machine.messages(), 2);
}

#[test]
fn records_that_do_not_fit_together_are_refused() {
    let config = pb::ShardConfig {
        duplicate_window_us: 1 << 40,
        ..plain_config(Limits::default())
    };
    let mut replica = Replica::new(&config, false);
    fill(&mut replica, 3, 1);
    let record = replica.store.0.borrow().shard.clone().unwrap();
    let load = |record: &[u8], producers: &[(u64, &[u8])], ids: &[(Sequence, &[u8])]| {
        ShardMachine::load(SHARD, GROUP, record, producers.iter().copied(), ids.iter().copied())
    };
    assert!(load(&record, &[], &[]).is_ok());
    assert!(load(&[], &[], &[]).is_err());
    assert!(load(&record[..record.len() - 1], &[], &[]).is_err());
    assert!(load(&record, &[(1, &[1, 2, 3])], &[]).is_err());
    assert!(
        load(&record, &[(1, &[])], &[]).is_err(),
        "the record of another producer"
    );
    let at = Sequence::new(1);
    assert!(load(&record, &[], &[(at, &[0xff])]).is_err());
    assert!(load(&record, &[], &[(at, &[]), (at, &[])]).is_err());
}

/// `cargo test --release --test machine_shard -- --ignored --nocapture`
#[test]
#[ignore = "prints how long it takes"]
fn how_fast() {
    struct Nowhere;
    use mainstem::machine::port::MetaKind;
    use mainstem::model::{GroupId, ShardId, StoredBatch};
    impl ShardSink for Nowhere {
        fn put_batch(&mut self, _: ShardId, batch: &StoredBatch) {
            std::hint::black_box(batch);
        }
        fn put_posting(&mut self, _: ShardId, subject: &str, _: Sequence, offsets: &[u32]) {
            std::hint::black_box((subject, offsets));
        }
        fn put_holes(&mut self, _: ShardId, _: Sequence, _: &[u32]) {}
        fn put_ids(&mut self, _: ShardId, _: Sequence, block: &[u8]) {
            std::hint::black_box(block);
        }
        fn drop_ids(&mut self, _: ShardId, _: Sequence) {}
        fn put_producer(&mut self, _: ShardId, _: u64, record: &[u8]) {
            std::hint::black_box(record);
        }
        fn drop_producer(&mut self, _: ShardId, _: u64) {}
        fn put_shard(&mut self, _: ShardId, _: GroupId, record: &[u8]) {
            std::hint::black_box(record);
        }
        fn drop_batches(&mut self, _: ShardId, _: Sequence, _: Sequence) {}
        fn drop_shard(&mut self, _: ShardId) {}
        fn put_meta(&mut self, _: MetaKind, _: &[u8], _: &[u8]) {}
        fn drop_meta(&mut self, _: MetaKind, _: &[u8]) {}
    }
    for (name, subjects, ids, per_batch, batches) in [
        ("1 subject", 1, false, 1_000, 10),
        ("1,000 subjects", 1_000, false, 1_000, 10),
        ("1,000 subjects, ids", 1_000, true, 1_000, 10),
        ("1 subject, 100 to a batch", 1, false, 100, 10),
        ("1,000 subjects, 1 to a batch", 1_000, false, 1, 1_000),
    ] {
        let config = pb::ShardConfig {
            duplicate_window_us: 50,
            duplicate_ids_max: 1_000_000,
            ..plain_config(Limits::default())
        };
        let mut machine = ShardMachine::create(&mut Nowhere, SHARD, GROUP, config);
        let mut publishes = Vec::new();
        for round in 0..100u64 {
            let items = (0..batches).map(|batch| {
                let records: Vec<Record> = (0..per_batch)
                    .map(|i| Record {
                        subject: format!("orders.region.{}", (i * 7 + batch) % subjects),
                        id: ids.then(|| format!("message-id-{round}-{batch}-{i}")),
                        payload: 128,
                    })
                    .collect();
                pb::PublishItem {
                    batch: encode(&records, Codec::None),
                    producer: Some(pb::ProducerStamp {
                        producer_id: 1,
                        epoch: 1,
                        sequence: round * batches as u64 + batch as u64 + 1,
                    }),
                    expect: None,
                }
            });
            publishes.push(pb::Publish {
                shard_id: SHARD.get(),
                time_us: round,
                items: items.collect(),
            });
        }
        let view = Store::new(false);
        let begun = std::time::Instant::now();
        for publish in &publishes {
            std::hint::black_box(
                machine
                    .apply_publish(&view, &mut Nowhere, Term::new(1), publish)
                    .unwrap(),
            );
        }
        let records = (publishes.len() * per_batch * batches) as u128;
        assert_eq!(u128::from(machine.messages()), records);
        println!("{name}: {} ns/record", begun.elapsed().as_nanos() / records);
    }
}
