//! What a shard remembers of its producers, so that a batch sent again is answered as it was the first time.

use std::collections::{BTreeSet, HashMap, VecDeque};

use prost::Message;
use xxhash_rust::xxh3::Xxh3;

use crate::machine::LoadError;
use crate::machine::outcome::Refusal;
use crate::model::limits::PRODUCER_ANSWERS_MAX;
use crate::model::{Sequence, Term, TimeUs};
use crate::wire::internal::v1 as pb;

/// How a producer's batch was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// `count` messages from `first` on; with 0, all were duplicates and `first` is the tail of then.
    Stored {
        first: Sequence,
        count: u64,
        time: TimeUs,
        term: Term,
    },
    /// One of those that use up a number.
    Refused(Refusal),
}

/// What a stamp says of its batch.
pub(super) enum Check {
    /// The next in order: go on.
    Next,
    /// Sent before: this was the answer.
    Again(Answer),
    /// Not to be applied.
    Refused(Refusal),
}

#[derive(Debug)]
struct Producer {
    epoch: u64,
    /// Last one used up.
    sequence: u64,
    time: TimeUs,
    /// To `sequence`, `sequence` - 1, …: newest first.
    answers: VecDeque<Answer>,
    /// Changed by the publish being applied.
    dirty: bool,
}

#[derive(Debug, Default)]
pub(super) struct Producers {
    known: HashMap<u64, Producer>,
    by_time: BTreeSet<(TimeUs, u64)>,
    /// In the order of their first change.
    dirty: Vec<u64>,
}

impl Producers {
    pub fn load<'a>(records: impl IntoIterator<Item = (u64, &'a [u8])>) -> Result<Self, LoadError> {
        let mut producers = Self::default();
        for (id, bytes) in records {
            let fail = |why: &str| LoadError::new(format!("producer {id}"), why);
            let record = pb::ProducerRecord::decode(bytes).map_err(|error| fail(&error.to_string()))?;
            if record.producer_id != id || record.answers.len() % 4 != 0 {
                return Err(fail("the record is not of this producer, or malformed"));
            }
            let answers = record
                .answers
                .chunks_exact(4)
                .map(|numbers| decode_answer(&record, numbers))
                .collect::<Option<VecDeque<_>>>()
                .ok_or_else(|| fail("an answer is of an unknown kind"))?;
            let time = TimeUs::new(record.time_us);
            producers.by_time.insert((time, id));
            producers.known.insert(
                id,
                Producer {
                    epoch: record.epoch,
                    sequence: record.sequence,
                    time,
                    answers,
                    dirty: false,
                },
            );
        }
        Ok(producers)
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Epoch and last sequence used up.
    pub fn get(&self, id: u64) -> Option<(u64, u64)> {
        self.known.get(&id).map(|producer| (producer.epoch, producer.sequence))
    }

    /// Whether a batch with this stamp is to be applied. Makes the producer, or its new epoch, known: even if the batch is
    /// then refused as not processed, those sent after it must be recognised as out of order.
    pub fn check(&mut self, stamp: &pb::ProducerStamp, time: TimeUs, producers_max: u32) -> Check {
        let pb::ProducerStamp {
            producer_id,
            epoch,
            sequence,
        } = *stamp;
        if sequence == 0 {
            return Check::Refused(Refusal::ProducerSequenceZero);
        }
        let Some(producer) = self.known.get_mut(&producer_id) else {
            if sequence != 1 {
                return Check::Refused(Refusal::UnknownProducer);
            }
            if self.known.len() >= producers_max as usize {
                return Check::Refused(Refusal::TooManyProducers { max: producers_max });
            }
            let producer = Producer {
                epoch,
                sequence: 0,
                time,
                answers: VecDeque::new(),
                dirty: true,
            };
            self.known.insert(producer_id, producer);
            self.by_time.insert((time, producer_id));
            self.dirty.push(producer_id);
            return Check::Next;
        };
        if epoch < producer.epoch {
            return Check::Refused(Refusal::Fenced { epoch: producer.epoch });
        }
        if epoch > producer.epoch {
            if sequence != 1 {
                return Check::Refused(Refusal::OutOfOrder { expected: 1 });
            }
            producer.epoch = epoch;
            producer.sequence = 0;
            producer.answers.clear();
            self.touch(producer_id, time);
            return Check::Next;
        }
        let expected = producer.sequence + 1;
        if sequence > expected {
            return Check::Refused(Refusal::OutOfOrder { expected });
        }
        if sequence == expected {
            return Check::Next;
        }
        let back = producer.sequence - sequence;
        match usize::try_from(back).ok().and_then(|back| producer.answers.get(back)) {
            Some(answer) => Check::Again(*answer),
            None => Check::Refused(Refusal::AnswerForgotten {
                oldest: expected - producer.answers.len() as u64,
            }),
        }
    }

    /// The batch that [`Producers::check`] let pass was answered so: its number is used up.
    pub fn use_up(&mut self, id: u64, time: TimeUs, answer: Answer) {
        let producer = self
            .known
            .get_mut(&id)
            .expect("a producer that passed the check is known");
        producer.sequence += 1;
        producer.answers.push_front(answer);
        producer.answers.truncate(PRODUCER_ANSWERS_MAX);
        self.touch(id, time);
    }

    fn touch(&mut self, id: u64, time: TimeUs) {
        let producer = self.known.get_mut(&id).expect("a producer that is touched is known");
        if producer.time != time {
            self.by_time.remove(&(producer.time, id));
            self.by_time.insert((time, id));
            producer.time = time;
        }
        if !producer.dirty {
            producer.dirty = true;
            self.dirty.push(id);
        }
    }

    /// Hands out the record of each producer that changed since the last call.
    pub fn write_dirty(&mut self, tail: Sequence, term: Term, mut write: impl FnMut(u64, &[u8])) {
        let mut buffer = Vec::new();
        for id in self.dirty.drain(..) {
            let producer = self.known.get_mut(&id).expect("a producer that changed is known");
            producer.dirty = false;
            let mut record = pb::ProducerRecord {
                producer_id: id,
                epoch: producer.epoch,
                sequence: producer.sequence,
                time_us: producer.time.get(),
                answers: Vec::with_capacity(producer.answers.len() * 4),
                term: term.get(),
                tail: tail.get(),
            };
            for answer in &producer.answers {
                let numbers = encode_answer(&record, answer);
                record.answers.extend_from_slice(&numbers);
            }
            buffer.clear();
            record.encode(&mut buffer).expect("a vector grows");
            write(id, &buffer);
        }
    }

    /// Forgets those that were idle for `idle_us`; each is handed out.
    pub fn forget(&mut self, clock: TimeUs, idle_us: u64, mut dropped: impl FnMut(u64)) -> u64 {
        let mut count = 0;
        while let Some(&(time, id)) = self.by_time.first() {
            if time.plus_us(idle_us) > clock {
                break;
            }
            self.by_time.pop_first();
            self.known.remove(&id);
            dropped(id);
            count += 1;
        }
        count
    }

    /// Adds what is remembered of each.
    pub fn digest(&self, hash: &mut Xxh3) {
        for (time, id) in &self.by_time {
            let (epoch, sequence) = self.get(*id).unwrap_or_default();
            for number in [time.get(), *id, epoch, sequence] {
                hash.update(&number.to_le_bytes());
            }
        }
    }

    /// When the one that is idle longest was last heard of.
    pub fn oldest(&self) -> Option<TimeUs> {
        self.by_time.first().map(|(time, _)| *time)
    }
}

fn encode_answer(record: &pb::ProducerRecord, answer: &Answer) -> [u64; 4] {
    match *answer {
        Answer::Stored {
            first,
            count,
            time,
            term,
        } => [
            count * 2,
            record.tail - first.get(),
            record.time_us - time.get(),
            // Of a shard that came from another group it may be the higher one: groups count their terms each for itself.
            record.term.wrapping_sub(term.get()),
        ],
        Answer::Refused(refusal) => {
            let (code, figure) = refusal
                .to_stored()
                .expect("only refusals that use up a number are kept");
            [code * 2 + 1, figure, 0, 0]
        }
    }
}

fn decode_answer(record: &pb::ProducerRecord, numbers: &[u64]) -> Option<Answer> {
    let &[kind, figure, time, term] = numbers else {
        return None;
    };
    if kind % 2 == 1 {
        return Refusal::from_stored(kind / 2, figure).map(Answer::Refused);
    }
    Some(Answer::Stored {
        first: Sequence::new(record.tail.checked_sub(figure)?),
        count: kind / 2,
        time: TimeUs::new(record.time_us.checked_sub(time)?),
        term: Term::new(record.term.wrapping_sub(term)),
    })
}
