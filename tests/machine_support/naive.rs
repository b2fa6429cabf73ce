//! The rules of a shard written down as plainly as can be, without any care for speed, memory or disk: what the machine
//! is compared with.

use std::collections::BTreeMap;

use mainstem::base::RetryClass;
use mainstem::machine::{Duplicate, DuplicateItem, ItemOutcome, Refusal, StoredItem};
use mainstem::model::limits::PRODUCER_ANSWERS_MAX;
use mainstem::model::{Filter, Sequence, Term, TimeUs};
use mainstem::wire::internal::v1::{ProducerStamp, ShardConfig};
use mainstem::wire::v1::{DiscardPolicy, Expectation};

use super::Record;

#[derive(Debug, Clone)]
pub struct Message {
    pub sequence: u64,
    pub subject: String,
    pub size: u64,
    pub time: u64,
}

#[derive(Debug, Clone)]
pub struct Remembered {
    pub id: String,
    pub sequence: u64,
    pub time: u64,
}

#[derive(Debug, Clone)]
pub struct Producer {
    pub epoch: u64,
    pub last: u64,
    pub time: u64,
    pub answers: BTreeMap<u64, ItemOutcome>,
}

#[derive(Debug, Clone)]
pub struct Item {
    pub records: Vec<Record>,
    pub producer: Option<ProducerStamp>,
    pub expect: Option<Expectation>,
}

#[derive(Debug)]
pub struct Naive {
    pub config: ShardConfig,
    pub retained: Vec<Message>,
    pub tail: u64,
    pub clock: u64,
    pub ids: Vec<Remembered>,
    pub producers: BTreeMap<u64, Producer>,
}

impl Naive {
    pub fn new(config: ShardConfig) -> Self {
        Self {
            config,
            retained: vec![],
            tail: 1,
            clock: 0,
            ids: vec![],
            producers: BTreeMap::new(),
        }
    }

    pub fn floor(&self) -> u64 {
        self.retained.first().map_or(self.tail, |message| message.sequence)
    }

    pub fn bytes(&self) -> u64 {
        self.retained.iter().map(|message| message.size).sum()
    }

    pub fn last_by_subject(&self, subject: &str) -> u64 {
        let mut of_subject = self.retained.iter().filter(|message| message.subject == subject);
        of_subject.next_back().map_or(0, |message| message.sequence)
    }

    fn forget_ids(&mut self) {
        let (clock, window) = (self.clock, self.config.duplicate_window_us);
        self.ids.retain(|known| known.time + window > clock);
    }

    fn trim(&mut self) {
        let limits = self.config.limits.unwrap_or_default();
        if limits.discard == DiscardPolicy::New as i32 {
            return;
        }
        while self.retained.len() as u64 > limits.max_messages.unwrap_or(u64::MAX)
            || self.bytes() > limits.max_bytes.unwrap_or(u64::MAX)
        {
            self.retained.remove(0);
        }
    }

    pub fn publish(&mut self, time: u64, term: u64, items: &[Item]) -> Vec<ItemOutcome> {
        self.clock = self.clock.max(time);
        self.forget_ids();
        let outcomes = items.iter().map(|item| self.item(term, item)).collect();
        self.trim();
        outcomes
    }

    fn item(&mut self, term: u64, item: &Item) -> ItemOutcome {
        let Some(stamp) = item.producer else {
            return self.store(term, item);
        };
        if let Some(outcome) = self.check_producer(stamp) {
            return outcome;
        }
        let outcome = self.store(term, item);
        let uses_up = match &outcome {
            ItemOutcome::Stored(_) | ItemOutcome::AllDuplicates(_) => true,
            ItemOutcome::Refused(refusal) => refusal.retry() == RetryClass::CannotWork,
        };
        if uses_up {
            let clock = self.clock;
            let producer = self.producers.get_mut(&stamp.producer_id).unwrap();
            producer.last += 1;
            producer.time = clock;
            producer.answers.insert(stamp.sequence, outcome.clone());
            while producer.answers.len() > PRODUCER_ANSWERS_MAX {
                producer.answers.pop_first();
            }
        }
        outcome
    }

    fn check_producer(&mut self, stamp: ProducerStamp) -> Option<ItemOutcome> {
        let refuse = |refusal| Some(ItemOutcome::Refused(refusal));
        if stamp.sequence == 0 {
            return refuse(Refusal::ProducerSequenceZero);
        }
        let max = self.config.producers_max;
        let fresh = Producer {
            epoch: stamp.epoch,
            last: 0,
            time: self.clock,
            answers: BTreeMap::new(),
        };
        match self.producers.get(&stamp.producer_id) {
            None if stamp.sequence != 1 => return refuse(Refusal::UnknownProducer),
            None if self.producers.len() >= max as usize => return refuse(Refusal::TooManyProducers { max }),
            None => {
                self.producers.insert(stamp.producer_id, fresh);
            }
            Some(known) if stamp.epoch < known.epoch => return refuse(Refusal::Fenced { epoch: known.epoch }),
            Some(known) if stamp.epoch > known.epoch => {
                if stamp.sequence != 1 {
                    return refuse(Refusal::OutOfOrder { expected: 1 });
                }
                assert!(known.time <= self.clock);
                self.producers.insert(stamp.producer_id, fresh);
            }
            Some(known) if stamp.sequence > known.last + 1 => {
                return refuse(Refusal::OutOfOrder {
                    expected: known.last + 1,
                });
            }
            Some(known) if stamp.sequence == known.last + 1 => {}
            Some(known) => {
                let oldest = known.answers.keys().next().copied().unwrap_or(known.last + 1);
                return match known.answers.get(&stamp.sequence) {
                    None => refuse(Refusal::AnswerForgotten { oldest }),
                    Some(answer) => Some(self.again(answer.clone())),
                };
            }
        }
        None
    }

    fn again(&self, answer: ItemOutcome) -> ItemOutcome {
        let tail = Sequence::new(self.tail);
        let unknown = |mut duplicates: Vec<Duplicate>| {
            duplicates.iter_mut().for_each(|duplicate| duplicate.original = None);
            duplicates
        };
        match answer {
            ItemOutcome::Stored(stored) => ItemOutcome::Stored(StoredItem {
                tail,
                duplicates: match stored.last.get() >= self.floor() {
                    true => unknown(stored.duplicates),
                    false => vec![],
                },
                whole_duplicate: true,
                ..stored
            }),
            ItemOutcome::AllDuplicates(item) => ItemOutcome::AllDuplicates(DuplicateItem {
                tail,
                duplicates: unknown(item.duplicates),
                whole_duplicate: true,
                ..item
            }),
            ItemOutcome::Refused(refusal) => ItemOutcome::Refused(refusal),
        }
    }

    fn store(&mut self, term: u64, item: &Item) -> ItemOutcome {
        let limits = self.config.limits.unwrap_or_default();
        let max = (4u64 << 20)
            .min(limits.max_message_bytes.map_or(u64::MAX, u64::from))
            .min(limits.max_bytes.unwrap_or(u64::MAX));
        if item.records.iter().any(|record| record.size() > max) {
            return ItemOutcome::Refused(Refusal::MessageTooLarge { max });
        }
        let mut duplicates = vec![];
        let mut stored = vec![];
        let mut fresh: Vec<Remembered> = vec![];
        for (position, record) in item.records.iter().enumerate() {
            let sequence = self.tail + stored.len() as u64;
            if let Some(id) = record.id.as_ref().filter(|_| self.config.duplicate_window_us > 0) {
                if let Some(known) = self.ids.iter().chain(&fresh).find(|known| known.id == *id) {
                    duplicates.push(Duplicate {
                        position: position as u32,
                        original: (known.sequence >= self.call_floor()).then_some(Sequence::new(known.sequence)),
                    });
                    continue;
                }
                fresh.push(Remembered {
                    id: id.clone(),
                    sequence,
                    time: self.clock,
                });
            }
            stored.push(Message {
                sequence,
                subject: record.subject.clone(),
                size: record.size(),
                time: self.clock,
            });
        }
        let append_time = TimeUs::new(self.clock);
        if stored.is_empty() {
            return ItemOutcome::AllDuplicates(DuplicateItem {
                tail: Sequence::new(self.tail),
                append_time,
                term: Term::new(term),
                duplicates,
                whole_duplicate: false,
            });
        }
        if let Some(refusal) = self.refusal(item, &stored, fresh.len()) {
            return ItemOutcome::Refused(refusal);
        }
        let first = self.tail;
        self.tail += stored.len() as u64;
        self.retained.extend(stored);
        self.ids.extend(fresh);
        ItemOutcome::Stored(StoredItem {
            first: Sequence::new(first),
            last: Sequence::new(self.tail - 1),
            tail: Sequence::new(self.tail),
            append_time,
            term: Term::new(term),
            duplicates,
            whole_duplicate: false,
        })
    }

    /// Retention is applied after the whole entry, so within it the floor is what it was.
    fn call_floor(&self) -> u64 {
        self.floor()
    }

    fn refusal(&self, item: &Item, stored: &[Message], fresh: usize) -> Option<Refusal> {
        let limits = self.config.limits.unwrap_or_default();
        if let Some(expect) = &item.expect {
            let actual = Sequence::new(self.tail - 1);
            if expect.last_sequence.is_some_and(|expected| expected != actual.get()) {
                return Some(Refusal::LastSequence { actual });
            }
            if let Some(subject) = &expect.subject {
                if !self.config.subject_in_one_shard {
                    return Some(Refusal::SubjectExpectationUnsupported);
                }
                let actual = self.last_by_subject(&subject.subject);
                if actual != subject.last_sequence {
                    let actual = Sequence::new(actual);
                    return Some(Refusal::SubjectLastSequence { actual });
                }
            }
        }
        let max = self.config.duplicate_ids_max;
        if fresh > max as usize {
            return Some(Refusal::TooManyIds { max });
        }
        if fresh > 0 && self.ids.len() + fresh > max as usize {
            return Some(Refusal::IdsFull { max });
        }
        if limits.discard == DiscardPolicy::New as i32 {
            let bytes: u64 = stored.iter().map(|message| message.size).sum();
            let max_messages = limits.max_messages.unwrap_or(u64::MAX);
            let max_bytes = limits.max_bytes.unwrap_or(u64::MAX);
            if stored.len() as u64 > max_messages || bytes > max_bytes {
                return Some(Refusal::LargerThanStream);
            }
            if (self.retained.len() + stored.len()) as u64 > max_messages || self.bytes() + bytes > max_bytes {
                return Some(Refusal::StreamFull);
            }
        }
        None
    }

    /// Messages removed, producers forgotten.
    pub fn expire(&mut self, time: u64) -> (u64, u64) {
        self.clock = self.clock.max(time);
        self.forget_ids();
        let (messages, producers) = (self.retained.len(), self.producers.len());
        let (clock, idle) = (self.clock, self.config.producer_idle_us);
        self.producers.retain(|_, producer| producer.time + idle > clock);
        if let Some(age) = self.config.limits.unwrap_or_default().max_age_us {
            self.retained.retain(|message| message.time + age > time);
        }
        self.trim();
        (
            (messages - self.retained.len()) as u64,
            (producers - self.producers.len()) as u64,
        )
    }

    pub fn purge(&mut self, before: Option<u64>, keep: Option<u64>, filter: &str) -> u64 {
        let filter = Filter::parse(if filter.is_empty() { ">" } else { filter }).unwrap();
        let matching: Vec<u64> = self
            .retained
            .iter()
            .filter(|message| message.sequence < before.unwrap_or(u64::MAX) && filter.matches(&message.subject))
            .map(|message| message.sequence)
            .collect();
        let gone = &matching[..matching.len().saturating_sub(keep.unwrap_or(0) as usize)];
        self.retained.retain(|message| !gone.contains(&message.sequence));
        gone.len() as u64
    }

    pub fn update(&mut self, config: ShardConfig) {
        self.forget_ids();
        self.config = config;
        self.forget_ids();
        self.trim();
    }
}
