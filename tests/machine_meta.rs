//! The catalog's machine over random histories: what must always hold, the same answers and the same bytes from one that
//! is loaded anew before every command, and how long a create takes among ten thousand streams.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod machine_support;

use std::collections::BTreeMap;

use machine_support::Store;
use mainstem::machine::meta::remembered;
use mainstem::machine::port::MetaKind;
use mainstem::machine::{MetaMachine, MetaOutcome, MetaRefusal};
use mainstem::model::limits::REQUEST_MEMORY_US;
use mainstem::model::{Filter, GroupId, NodeId, StreamId};
use mainstem::wire::internal::v1::{self as pb, NodeState, meta_command::Op};
use mainstem::wire::spec::normalise;
use mainstem::wire::v1::{StreamSpec, StreamState};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

fn load(store: &Store) -> MetaMachine {
    let state = store.0.borrow();
    let records = state
        .meta
        .iter()
        .map(|((kind, key), record)| (*kind, key.as_slice(), record.as_slice()));
    MetaMachine::load(records).expect("what was written can be loaded")
}

/// One that runs on, and one that is loaded anew before every command.
struct Pair {
    machine: MetaMachine,
    store: Store,
    other: Store,
    time_us: u64,
}

impl Pair {
    fn new() -> Self {
        Self {
            machine: MetaMachine::new(),
            store: Store::new(false),
            other: Store::new(false),
            time_us: 1_000,
        }
    }

    fn apply(&mut self, request_id: &str, op: Op) -> MetaOutcome {
        let command = pb::MetaCommand {
            time_us: self.time_us,
            request_id: request_id.into(),
            op: Some(op),
        };
        let (revision, before) = (self.machine.revision(), self.store.0.borrow().meta.clone());
        let outcome = self.machine.apply(&mut self.store.clone(), &command).unwrap();
        let again = load(&self.other).apply(&mut self.other.clone(), &command).unwrap();
        assert_eq!(outcome, again);
        assert_eq!(self.store.0.borrow().writes, self.other.0.borrow().writes);
        let state = self.store.0.borrow();
        let catalog = |meta: &BTreeMap<(MetaKind, Vec<u8>), Vec<u8>>| -> Vec<_> {
            let records = meta.iter().filter(|((kind, _), _)| *kind != MetaKind::Request);
            records.map(|(key, record)| (key.clone(), record.clone())).collect()
        };
        if self.machine.cluster().is_some() {
            let changed = catalog(&before) != catalog(&state.meta);
            let raised = self.machine.revision() > revision;
            assert_eq!(
                changed, raised,
                "every change raises the revision, and nothing else does: {outcome:?}"
            );
        }
        drop(state);
        self.check();
        outcome
    }

    /// What must always hold.
    fn check(&self) {
        let machine = &self.machine;
        let mut live: Vec<(String, Vec<Filter>)> = vec![];
        let mut in_group: BTreeMap<u64, u32> = BTreeMap::new();
        let mut shard_ids = vec![];
        for stream in machine.streams() {
            let spec = stream.spec.as_ref().unwrap();
            for shard in &stream.shards {
                *in_group.entry(shard.group_id).or_default() += 1;
                shard_ids.push(shard.shard_id);
            }
            if stream.state() == StreamState::Removed {
                assert!(stream.removed_us.is_some());
                continue;
            }
            assert!(!stream.doomed);
            let found = machine.stream_by_name(&spec.namespace, &spec.name).unwrap();
            assert_eq!(found.stream_id, stream.stream_id, "names are unique among live streams");
            let filters: Vec<Filter> = spec.subjects.iter().map(|text| Filter::parse(text).unwrap()).collect();
            for (namespace, others) in &live {
                let overlap = others.iter().any(|a| filters.iter().any(|b| a.overlaps(b)));
                assert!(
                    !overlap || *namespace != spec.namespace,
                    "a subject belongs to one stream"
                );
            }
            live.push((spec.namespace.clone(), filters));
        }
        let unique = shard_ids.len();
        shard_ids.sort_unstable();
        shard_ids.dedup();
        assert_eq!(shard_ids.len(), unique, "shard ids are unique");
        let mut replica_ids = vec![];
        for group in machine.groups() {
            assert_eq!(group.shards, in_group.remove(&group.group_id).unwrap_or(0), "{group:?}");
            assert!(group.pooled || group.shards > 0);
            let mut nodes: Vec<u64> = group.replicas.iter().map(|replica| replica.node_id).collect();
            nodes.dedup();
            assert_eq!(nodes.len(), group.replicas.len(), "one replica of a group on a node");
            replica_ids.extend(group.replicas.iter().map(|replica| replica.replica_id));
        }
        assert!(in_group.is_empty(), "every group that holds a shard is known");
        let unique = replica_ids.len();
        replica_ids.sort_unstable();
        replica_ids.dedup();
        assert_eq!(replica_ids.len(), unique, "replica ids are unique");
    }
}

fn init() -> Op {
    Op::InitCluster(pb::InitCluster {
        cluster_id: "c".into(),
        cluster_name: "test".into(),
        pool_groups: 3,
    })
}

fn node(node_id: u64) -> Op {
    Op::RegisterNode(pb::RegisterNode {
        node_id,
        name: format!("node-{node_id}"),
        incarnation: 1,
        client_address: "127.0.0.1:1".into(),
    })
}

fn spec(name: &str, subjects: &[&str]) -> StreamSpec {
    normalise(&StreamSpec {
        name: name.into(),
        subjects: subjects.iter().map(|text| text.to_string()).collect(),
        ..StreamSpec::default()
    })
    .unwrap()
}

fn create(id: u128, spec: StreamSpec) -> Op {
    Op::CreateStream(pb::CreateStream {
        stream_id: StreamId::new(id).to_string(),
        spec: Some(spec),
        ..pb::CreateStream::default()
    })
}

const NAMES: [&str; 3] = ["a", "b", "c"];
const SUBJECTS: [&str; 6] = ["x", "x.>", "x.*", "y.1", "*.1", "z.>"];

#[derive(Debug, Clone)]
enum Step {
    Node(u64),
    Create {
        spec: Box<StreamSpec>,
        request: Option<u8>,
    },
    Activate(u8),
    Update {
        name: &'static str,
        subjects: Vec<&'static str>,
        off: u64,
        request: Option<u8>,
    },
    Remove {
        name: &'static str,
        grace_us: u64,
        request: Option<u8>,
    },
    Undelete {
        name: &'static str,
        by_id: Option<u8>,
    },
    Forget {
        id: u8,
        dropped: bool,
    },
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let name = || prop::sample::select(&NAMES[..]);
    let subjects = || prop::collection::vec(prop::sample::select(&SUBJECTS[..]), 1..3);
    let request = || prop::option::weighted(0.3, 0u8..4);
    let id = || 1u8..20;
    prop_oneof![
        1 => (1u64..4).prop_map(Step::Node),
        6 => (name(), subjects(), 0u32..4, 1u32..4, any::<bool>(), any::<bool>(), request()).prop_map(
            |(name, subjects, shards, replicas, dedicated, other, request)| {
                let mut spec = spec(name, &subjects);
                spec.shards = shards.max(1);
                spec.replicas = replicas;
                spec.dedicated = dedicated && replicas > 1;
                spec.namespace = if other { "other".into() } else { spec.namespace };
                Step::Create { spec: Box::new(spec), request }
            }
        ),
        3 => id().prop_map(Step::Activate),
        3 => (name(), subjects(), 0u64..2, request())
            .prop_map(|(name, subjects, off, request)| Step::Update { name, subjects, off, request }),
        4 => (name(), prop::sample::select(vec![0u64, 100, 10_000]), request())
            .prop_map(|(name, grace_us, request)| Step::Remove { name, grace_us, request }),
        2 => (name(), prop::option::of(id())).prop_map(|(name, by_id)| Step::Undelete { name, by_id }),
        4 => (id(), any::<bool>()).prop_map(|(id, dropped)| Step::Forget { id, dropped }),
        2 => prop::sample::select(vec![10u64, 150, REQUEST_MEMORY_US]).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("MACHINE_CASES").map_or(300, |text| text.parse().expect("a number")),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn holds_over_any_history(init_first in any::<bool>(), steps in prop::collection::vec(step(), 1..80)) {
        let mut pair = Pair::new();
        let first = if init_first { [init(), node(1)] } else { [node(1), init()] };
        for op in first {
            pair.apply("", op);
        }
        let mut next_id = 1u128;
        let name_of = |request: &Option<u8>| request.map_or(String::new(), |n| format!("request-{n}"));
        let hex = |id: u8| StreamId::new(u128::from(id)).to_string();
        for step in steps {
            match step {
                Step::Node(id) => drop(pair.apply("", node(id))),
                Step::Create { spec, request } => {
                    let nodes = pair.machine.nodes().count() as u32;
                    let wanted = spec.clone();
                    match pair.apply(&name_of(&request), create(next_id, *spec)) {
                        MetaOutcome::StreamCreated(stream) => {
                            next_id += 1;
                            prop_assert_eq!(stream.spec.as_ref(), Some(&*wanted));
                            prop_assert!(wanted.replicas <= nodes);
                            for shard in &stream.shards {
                                if let Some(group) = pair.machine.group(GroupId::new(shard.group_id)) {
                                    prop_assert_eq!(group.replicas.len() as u32, wanted.replicas);
                                    prop_assert_eq!(group.pooled, !wanted.dedicated);
                                }
                            }
                        }
                        MetaOutcome::StreamExisted(stream) => prop_assert_eq!(stream.spec.as_ref(), Some(&*wanted)),
                        MetaOutcome::Refused(_) => {}
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
                Step::Activate(id) => drop(pair.apply("", Op::ActivateStream(pb::ActivateStream { stream_id: hex(id) }))),
                Step::Update { name, subjects, off, request } => {
                    let current = pair.machine.stream_by_name("default", name).cloned();
                    let mut new = spec(name, &subjects);
                    let mut base_revision = off;
                    if let Some(current) = current {
                        base_revision += current.revision;
                        new = StreamSpec { subjects: new.subjects, ..current.spec.clone().unwrap() };
                    }
                    let update = pb::UpdateStream { namespace: "default".into(), name: name.into(), spec: Some(new), base_revision, ..pb::UpdateStream::default() };
                    pair.apply(&name_of(&request), Op::UpdateStream(update));
                }
                Step::Remove { name, grace_us, request } => {
                    let remove = pb::RemoveStream { namespace: "default".into(), name: name.into(), grace_us, expected_revision: None };
                    pair.apply(&name_of(&request), Op::RemoveStream(remove));
                }
                Step::Undelete { name, by_id } => {
                    let undelete = pb::UndeleteStream { namespace: "default".into(), name: name.into(), stream_id: by_id.map(hex) };
                    if let MetaOutcome::StreamUndeleted(stream) = pair.apply("", Op::UndeleteStream(undelete)) {
                        prop_assert_eq!(stream.state(), StreamState::Creating);
                        prop_assert_eq!(stream.removed_us, None);
                    }
                }
                Step::Forget { id, dropped } => {
                    let known = StreamId::parse(&hex(id)).and_then(|id| pair.machine.stream(id).cloned());
                    let forget = pb::ForgetStream { stream_id: hex(id), dropped };
                    if let MetaOutcome::StreamForgotten(_) = pair.apply("", Op::ForgetStream(forget)) {
                        prop_assert!(dropped && known.is_some_and(|stream| stream.doomed), "only in two steps");
                    }
                }
                Step::Wait(us) => pair.time_us += us,
            }
        }
    }
}

fn ready() -> Pair {
    let mut pair = Pair::new();
    pair.apply("", init());
    pair.apply("", node(1));
    pair
}

#[test]
fn a_repeated_request_gets_its_first_answer() {
    let mut pair = ready();
    let first = pair.apply("r", create(1, spec("a", &["a"])));
    // Another attempt brings another id for the stream.
    assert_eq!(pair.apply("r", create(2, spec("a", &["a"]))), first);
    let reused = pair.apply("r", create(3, spec("b", &["b"])));
    assert!(matches!(
        reused,
        MetaOutcome::Refused(MetaRefusal::RequestIdReused { .. })
    ));
    let remove = || {
        Op::RemoveStream(pb::RemoveStream {
            namespace: "default".into(),
            name: "a".into(),
            grace_us: 0,
            expected_revision: Some(1),
        })
    };
    let removed = pair.apply("remove", remove());
    assert!(matches!(removed, MetaOutcome::StreamRemoved(_)));
    assert_eq!(
        pair.apply("remove", remove()),
        removed,
        "though there is no such stream any more"
    );
    // A proposer finds the same in the stored record, and only for the same request.
    let record = pair.store.0.borrow().meta[&(MetaKind::Request, b"remove".to_vec())].clone();
    assert_eq!(remembered(&record, &remove(), pair.time_us).unwrap(), Some(removed));
    let other = create(1, spec("a", &["a"]));
    assert!(matches!(
        remembered(&record, &other, pair.time_us).unwrap(),
        Some(MetaOutcome::Refused(MetaRefusal::RequestIdReused { .. }))
    ));
    // What was refused may be tried again.
    let refused = pair.apply("again", create(4, spec("x", &["b.>", "x"])));
    assert!(matches!(refused, MetaOutcome::StreamCreated(_)));
    let overlap = pair.apply("later", create(5, spec("y", &["x"])));
    assert!(matches!(
        overlap,
        MetaOutcome::Refused(MetaRefusal::SubjectsOverlap { .. })
    ));
    pair.time_us += REQUEST_MEMORY_US;
    assert_eq!(remembered(&record, &remove(), pair.time_us).unwrap(), None);
    let after = pair.apply("r", create(6, spec("a", &["a"])));
    assert!(
        matches!(after, MetaOutcome::StreamCreated(_)),
        "forgotten after ten minutes"
    );
}

#[test]
fn shards_go_where_there_are_fewest() {
    let mut pair = ready();
    let wide = StreamSpec {
        shards: 7,
        ..spec("wide", &["w"])
    };
    pair.apply("", create(1, wide));
    let mut counts: Vec<u32> = pair.machine.groups().map(|group| group.shards).collect();
    counts.sort_unstable();
    assert_eq!(counts, [2, 2, 3]);
    let own = StreamSpec {
        shards: 2,
        dedicated: true,
        ..spec("own", &["o"])
    };
    pair.apply("", create(2, own));
    assert_eq!(pair.machine.groups().filter(|group| !group.pooled).count(), 2);
    let remove = pb::RemoveStream {
        namespace: "default".into(),
        name: "own".into(),
        grace_us: 0,
        expected_revision: None,
    };
    pair.apply("", Op::RemoveStream(remove));
    let forget = pb::ForgetStream {
        stream_id: StreamId::new(2).to_string(),
        dropped: true,
    };
    pair.apply("", Op::ForgetStream(forget));
    assert_eq!(pair.machine.groups().count(), 3, "groups of its own go with the stream");
}

#[test]
fn an_unknown_command_stops() {
    let command = pb::MetaCommand {
        time_us: 1,
        request_id: String::new(),
        op: None,
    };
    assert!(MetaMachine::new().apply(&mut Store::new(false), &command).is_err());
}

/// Not a figure, a bound: a create among ten thousand streams must not compare with each of them.
#[test]
fn ten_thousand_streams() {
    let mut machine = MetaMachine::new();
    let mut store = Store::new(false);
    let mut apply = |op| {
        let command = pb::MetaCommand {
            time_us: 1,
            request_id: String::new(),
            op: Some(op),
        };
        let outcome = machine.apply(&mut store, &command).unwrap();
        store.0.borrow_mut().writes.clear();
        outcome
    };
    apply(init());
    apply(node(1));
    let begun = std::time::Instant::now();
    for i in 0..10_000u128 {
        // All under one first token, which is the worst for an index by first token.
        let name = format!("s{i}");
        let spec = spec(&name, &[&format!("orders.{i}.>"), &format!("other.*.{i}")]);
        assert!(matches!(apply(create(i + 1, spec)), MetaOutcome::StreamCreated(_)));
    }
    let each = begun.elapsed() / 10_000;
    println!("{each:?} per create");
    assert!(each.as_millis() < 2, "{each:?} per create");
    let outcome = apply(create(20_000, spec("last", &["orders.777.x"])));
    let MetaOutcome::Refused(MetaRefusal::SubjectsOverlap { stream, theirs, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!((stream.as_str(), theirs.as_str()), ("s777", "orders.777.>"));
}

/// As a cluster of one node wrote them before there could be several: `kind key record`, in hex.
const FORMER: &str = include_str!("machine_support/former_catalog.hex");

#[test]
fn what_one_node_wrote_is_still_read() {
    let mut store = Store::new(false);
    for line in FORMER.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split(' ');
        let kind = match words.next().unwrap() {
            "cluster" => MetaKind::Cluster,
            "node" => MetaKind::Node,
            "group" => MetaKind::Group,
            "stream" => MetaKind::Stream,
            other => panic!("{other}"),
        };
        let bytes = |hex: &str| -> Vec<u8> {
            let digits = hex.as_bytes().chunks(2);
            digits
                .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
                .collect()
        };
        let key = bytes(words.next().unwrap());
        let record = bytes(words.next().unwrap());
        store.0.borrow_mut().meta.insert((kind, key), record);
    }
    let mut machine = load(&store);
    let cluster = machine.cluster().unwrap();
    assert_eq!(
        (cluster.cluster_name.as_str(), cluster.revision, cluster.meta.clone()),
        ("test", 7, None)
    );
    assert_eq!(machine.cluster_version(), 1);
    let record = machine.node(NodeId::new(11)).unwrap();
    assert_eq!(
        (record.name.as_str(), record.state(), record.incarnation),
        ("n1", NodeState::Active, 3)
    );
    let stream = machine.stream_by_name("default", "orders").unwrap();
    let group = GroupId::new(stream.shards[0].group_id);
    let shape = machine.shape();
    assert_eq!((shape.groups[&group].wanted, shape.groups[&group].formed), (1, false));
    assert!(shape.moves.is_empty() && shape.splits.is_empty());
    assert_eq!(shape.settings, Default::default());
    // Its next start makes it the first node of a cluster, with the replica that it has had all along.
    let mut apply = |op| {
        let command = pb::MetaCommand {
            time_us: 9_000,
            request_id: String::new(),
            op: Some(op),
        };
        machine.apply(&mut store, &command).unwrap()
    };
    apply(Op::JoinNode(pb::JoinNode {
        node_id: 11,
        name: "n1".into(),
        incarnation: 4,
        store_id: "s".into(),
        ..pb::JoinNode::default()
    }));
    apply(Op::JoinNode(pb::JoinNode {
        node_id: 12,
        name: "n2".into(),
        incarnation: 1,
        ..pb::JoinNode::default()
    }));
    let meta = machine.cluster().unwrap().meta.clone().unwrap();
    assert_eq!(
        (meta.voters, meta.learners),
        (vec![1], vec![4]),
        "r2 and r3 were given to the pool"
    );
    assert_eq!(machine.cluster().unwrap().next_replica_id, 5);
}
