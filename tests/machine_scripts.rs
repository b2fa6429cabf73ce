//! Examples as text: tests/machine_scripts/*.txt. Lines that begin with `> ` are commands, what follows up to the next
//! one (or an empty line) is what they answer. `MACHINE_REWRITE=1` writes the answers down anew: look at the difference.
//!
//! ```text
//! > create max_messages=3 discard=new window=100 ids=5 keyed
//! > publish time=100 a a#id b:50 | c p=1.1.1 | d last=3 | e last:a=2
//! > expire time=200
//! > purge before=5 keep=1 filter=a.*
//! > update max_messages=2
//! > restart
//! > writes
//! ```
//!
//! A record is a subject, `#id` if it has one, `:n` for a payload of n bytes (10). `|` separates items. `p=` is producer,
//! epoch, sequence.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod machine_support;

use std::fmt::Write;
use std::path::Path;

use machine_support::{GROUP, Record, SHARD, Store, encode};
use mainstem::machine::{Duplicate, GroupMachine, GroupOutcome, ItemOutcome, ShardMachine};
use mainstem::model::batch::Codec;
use mainstem::model::{Sequence, Term, TimeUs};
use mainstem::wire::internal::v1::{self as pb, group_command::Op};
use mainstem::wire::v1::{DiscardPolicy, Expectation, Limits, SubjectExpectation};

struct Script {
    machine: GroupMachine,
    store: Store,
    revision: u64,
    seen: usize,
}

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn number<T: std::str::FromStr>(words: &[&str], name: &str) -> Option<T> {
    option(words, name).map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn config(words: &[&str]) -> pb::ShardConfig {
    pb::ShardConfig {
        stream_id: "00".repeat(16),
        epoch: 1,
        shard_index: 0,
        limits: Some(Limits {
            max_age_us: number(words, "max_age"),
            max_bytes: number(words, "max_bytes"),
            max_messages: number(words, "max_messages"),
            max_message_bytes: number(words, "max_message_bytes"),
            discard: match option(words, "discard") {
                Some("new") => DiscardPolicy::New as i32,
                Some("old") | None => DiscardPolicy::Old as i32,
                Some(other) => panic!("discard={other}"),
            },
        }),
        duplicate_window_us: number(words, "window").unwrap_or(100),
        duplicate_ids_max: number(words, "ids").unwrap_or(10),
        producers_max: number(words, "producers").unwrap_or(10),
        producer_idle_us: number(words, "idle").unwrap_or(1_000),
        subject_in_one_shard: !words.contains(&"keyed"),
    }
}

fn item(words: &[&str]) -> pb::PublishItem {
    let mut records = vec![];
    let mut expect = Expectation::default();
    let mut producer = None;
    for word in words {
        if word.starts_with("time=") {
            continue;
        } else if let Some(stamp) = word.strip_prefix("p=") {
            let numbers: Vec<u64> = stamp.split('.').map(|n| n.parse().unwrap()).collect();
            producer = Some(pb::ProducerStamp {
                producer_id: numbers[0],
                epoch: numbers[1],
                sequence: numbers[2],
            });
        } else if let Some(last) = word.strip_prefix("last=") {
            expect.last_sequence = Some(last.parse().unwrap());
        } else if let Some(last) = word.strip_prefix("last:") {
            let (subject, last) = last.split_once('=').unwrap();
            expect.subject = Some(SubjectExpectation {
                subject: subject.into(),
                last_sequence: last.parse().unwrap(),
            });
        } else {
            let (word, payload) = word.split_once(':').unwrap_or((word, "10"));
            let (subject, id) = word
                .split_once('#')
                .map_or((word, None), |(subject, id)| (subject, Some(id)));
            records.push(Record {
                subject: subject.into(),
                id: id.map(str::to_string),
                payload: payload.parse().unwrap(),
            });
        }
    }
    pb::PublishItem {
        batch: encode(&records, Codec::None),
        producer,
        expect: (expect != Expectation::default()).then_some(expect),
    }
}

fn duplicates(found: &[Duplicate]) -> String {
    let one = |duplicate: &Duplicate| match duplicate.original {
        Some(sequence) => format!("{} of {sequence}", duplicate.position),
        None => format!("{}", duplicate.position),
    };
    match found {
        [] => String::new(),
        found => format!(", duplicates {}", found.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

fn outcome_text(outcome: &ItemOutcome) -> String {
    match outcome {
        ItemOutcome::Stored(stored) => format!(
            "stored {}-{} at {}{}{}",
            stored.first,
            stored.last,
            stored.append_time,
            duplicates(&stored.duplicates),
            if stored.whole_duplicate { ", sent before" } else { "" },
        ),
        ItemOutcome::AllDuplicates(item) => format!(
            "nothing stored{}{}",
            duplicates(&item.duplicates),
            if item.whole_duplicate { ", sent before" } else { "" },
        ),
        ItemOutcome::Refused(refusal) => {
            format!("{} ({}): {refusal}", refusal.reason(), refusal.retry().as_str())
        }
    }
}

impl Script {
    fn new() -> Self {
        Self {
            machine: GroupMachine::data(GROUP, []),
            store: Store::new(false),
            revision: 0,
            seen: 0,
        }
    }

    fn shard(&self) -> &ShardMachine {
        self.machine.shard(SHARD).expect("`create` comes first")
    }

    fn apply(&mut self, op: Op) -> GroupOutcome {
        let command = pb::GroupCommand {
            feature_level: 1,
            op: Some(op),
        };
        let view = self.store.clone();
        self.machine
            .apply(&view, &mut self.store, Term::new(1), &command)
            .unwrap()
    }

    fn state(&self) -> String {
        let shard = self.shard();
        let retained: Vec<u64> = self
            .store
            .retained(shard.floor())
            .into_iter()
            .map(|(sequence, _)| sequence)
            .collect();
        let due = shard.next_expiry().map_or("never".to_string(), |due| due.to_string());
        format!(
            "floor {}, tail {}, {} bytes, retained {retained:?}, expiry {due}\n",
            shard.floor(),
            shard.tail(),
            shard.bytes(),
        )
    }

    fn run(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let shard_id = SHARD.get();
        let time_us = number(&words, "time").unwrap_or(0);
        let mut out = String::new();
        match words[0] {
            "create" => {
                let config = Some(config(&words[1..]));
                self.apply(Op::CreateShard(pb::CreateShard { shard_id, config }));
            }
            "publish" => {
                let items = words[1..].split(|word| *word == "|").map(item).collect();
                let publish = pb::Publish {
                    shard_id,
                    time_us,
                    items,
                };
                let GroupOutcome::Published(outcomes) = self.apply(Op::Publish(publish)) else {
                    panic!("no such shard");
                };
                for outcome in &outcomes {
                    writeln!(out, "{}", outcome_text(outcome)).unwrap();
                }
            }
            "expire" => {
                let needed = self.shard().needs_expiry(TimeUs::new(time_us));
                let GroupOutcome::Expired(outcome) = self.apply(Op::Expire(pb::Expire { shard_id, time_us })) else {
                    panic!("no such shard");
                };
                let needed = if needed { "needed" } else { "not needed" };
                writeln!(
                    out,
                    "{needed}: {} messages, {} producers",
                    outcome.messages, outcome.producers
                )
                .unwrap();
            }
            "purge" => {
                let purge = pb::Purge {
                    shard_id,
                    before_sequence: number(&words, "before"),
                    keep: number(&words, "keep"),
                    filter: option(&words, "filter").unwrap_or("").into(),
                    from_sequence: None,
                };
                match self.apply(Op::Purge(purge)) {
                    GroupOutcome::Purged(Ok(outcome)) => writeln!(out, "{} messages", outcome.messages).unwrap(),
                    GroupOutcome::Purged(Err(error)) => writeln!(out, "{error}").unwrap(),
                    other => panic!("{other:?}"),
                }
            }
            "update" => {
                self.revision += 1;
                let update = pb::UpdateShard {
                    shard_id,
                    config: Some(config(&words[1..])),
                    revision: number(&words, "revision").unwrap_or(self.revision),
                };
                writeln!(out, "{:?}", self.apply(Op::UpdateShard(update))).unwrap();
            }
            "remove" => {
                writeln!(out, "{:?}", self.apply(Op::RemoveShard(pb::RemoveShard { shard_id }))).unwrap();
                return out;
            }
            "last" => {
                let last = self.shard().last_by_subject(&self.store, words[1]).unwrap();
                writeln!(out, "{}", last.map_or("none".to_string(), |s: Sequence| s.to_string())).unwrap();
                return out;
            }
            "restart" => self.machine = GroupMachine::data(GROUP, [self.store.load()]),
            "writes" => {
                let state = self.store.0.borrow();
                for write in &state.writes[self.seen..] {
                    if ["posting", "holes", "drop"].iter().any(|kind| write.starts_with(kind)) {
                        writeln!(out, "{write}").unwrap();
                    }
                }
                self.seen = state.writes.len();
                return out;
            }
            other => panic!("{other}?"),
        }
        out + &self.state()
    }
}

fn run_file(path: &Path) -> (String, String) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut script = Script::new();
    let mut found = String::new();
    let mut answering = false;
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("> ") {
            writeln!(found, "{line}").unwrap();
            found += &script.run(command);
            answering = true;
        } else if line.is_empty() || !answering {
            answering = false;
            writeln!(found, "{line}").unwrap();
        }
    }
    (text, found)
}

#[test]
fn scripts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine_scripts");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let (expected, found) = run_file(&path);
        if std::env::var_os("MACHINE_REWRITE").is_some() {
            std::fs::write(&path, &found).unwrap();
        } else {
            for (expected, found) in expected.lines().zip(found.lines()) {
                assert_eq!(found, expected, "{}", path.display());
            }
            assert_eq!(found.len(), expected.len(), "{}", path.display());
        }
        count += 1;
    }
    assert!(count >= 5, "the scripts are there");
}

#[test]
fn entries_of_newer_versions_stop_the_replica() {
    let mut machine = GroupMachine::data(GROUP, []);
    let store = Store::new(false);
    let mut apply = |feature_level, op| {
        let command = pb::GroupCommand { feature_level, op };
        machine.apply(&store, &mut store.clone(), Term::new(1), &command)
    };
    let remove = || Some(Op::RemoveShard(pb::RemoveShard { shard_id: 1 }));
    assert_eq!(apply(1, remove()).unwrap(), GroupOutcome::Removed { existed: false });
    assert!(apply(0, remove()).is_err());
    assert!(apply(2, remove()).unwrap_err().to_string().contains("feature level 2"));
    assert!(apply(1, None).is_err());
    assert!(apply(1, Some(Op::Meta(pb::MetaCommand::default()))).is_err());
    let publish = pb::Publish {
        shard_id: 1,
        time_us: 1,
        items: vec![],
    };
    assert_eq!(apply(1, Some(Op::Publish(publish))).unwrap(), GroupOutcome::NoShard);
}
