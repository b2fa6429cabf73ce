//! The checker itself: histories that are wrong in one way each, and must be found out.

use super::harness::History;
use super::harness::api::Read;
use super::harness::batch::Record;
use super::harness::history::{Expect, same};

const STREAM: &str = "s";

/// A history of three acknowledged batches of one producer, of two records each, and what is therefore stored.
fn three() -> (History, Vec<Read>) {
    let history = History::default();
    let line = history.producer();
    let mut stored = Vec::new();
    for n in 0..3 {
        let (number, records) = send(&history, line, 2);
        let first = stored.len() as u64 + 1;
        assert_eq!(first, 2 * n + 1);
        store(&mut stored, &records);
        history.acked(number, 0, first, first + 1);
    }
    (history, stored)
}

fn send(history: &History, line: u64, n: usize) -> (u64, Vec<Record>) {
    let mut records: Vec<Record> = (0..n).map(|i| Record::new("s.a", format!("payload {i}"))).collect();
    let number = history.sending(STREAM, 0, line, &mut records);
    (number, records)
}

fn store(stored: &mut Vec<Read>, records: &[Record]) {
    for record in records {
        stored.push(Read {
            shard: 0,
            sequence: stored.len() as u64 + 1,
            append_time_us: 1_000 + stored.len() as u64,
            record: record.clone(),
        });
    }
}

/// Gives everything its sequence by its place.
fn renumber(stored: &mut [Read]) {
    for (m, sequence) in stored.iter_mut().zip(1..) {
        m.sequence = sequence;
        m.append_time_us = 1_000 + sequence;
    }
}

#[track_caller]
fn finds(history: &History, stored: &[Read], what: &str) {
    match history.check(STREAM, stored) {
        Ok(tally) => panic!("nothing was found: {tally:?}"),
        Err(wrong) => assert!(
            wrong.iter().any(|w| w.contains(what)),
            "{what:?} is not among {wrong:#?}"
        ),
    }
}

#[test]
fn a_right_history_passes() {
    let (history, stored) = three();
    let tally = history.check(STREAM, &stored).unwrap();
    assert_eq!((tally.messages, tally.acked_batches), (6, 3));
}

#[test]
fn a_lost_batch_is_found() {
    let (history, mut stored) = three();
    stored.truncate(4);
    finds(&history, &stored, "acknowledged at 5, now nothing");
}

#[test]
fn a_lost_batch_whose_place_was_taken_is_found() {
    let (history, mut stored) = three();
    stored.drain(2..4);
    renumber(&mut stored);
    finds(&history, &stored, "acknowledged at 3, now nothing");
}

#[test]
fn half_a_batch_is_found() {
    let (history, mut stored) = three();
    stored.truncate(5);
    finds(&history, &stored, "acknowledged at 5, now 1 records at 5..=5");
}

#[test]
fn a_doubled_batch_is_found() {
    let (history, mut stored) = three();
    let again = stored[..2].to_vec();
    stored.extend(again);
    renumber(&mut stored);
    finds(&history, &stored, "acknowledged at 1, now 4 records");
}

#[test]
fn a_doubled_batch_of_unknown_outcome_is_found() {
    let (history, mut stored) = three();
    let (number, records) = send(&history, 0, 1);
    history.gave_up(number);
    store(&mut stored, &records);
    store(&mut stored, &records);
    finds(&history, &stored, "unknown outcome, found in part or twice");
}

#[test]
fn reordered_batches_are_found() {
    let (history, mut stored) = three();
    let line = history.producer();
    let (one, first) = send(&history, line, 1);
    let (two, second) = send(&history, line, 1);
    history.gave_up(one);
    history.gave_up(two);
    store(&mut stored, &second);
    store(&mut stored, &first);
    finds(&history, &stored, "sent earlier, is at 8");
}

#[test]
fn a_gap_is_found() {
    let (history, mut stored) = three();
    stored.remove(2);
    finds(&history, &stored, "sequence 4: expected 3");
}

#[test]
fn changed_content_is_found() {
    let (history, mut stored) = three();
    stored[3].record.payload.push(0);
    finds(&history, &stored, "was changed");
}

#[test]
fn a_message_from_nowhere_is_found() {
    let (history, mut stored) = three();
    store(
        &mut stored,
        &[Record::new("s.a", "from nowhere, and long enough to have a mark")],
    );
    finds(&history, &stored, "not one of ours");
}

#[test]
fn a_refused_batch_that_is_there_is_found() {
    let (history, mut stored) = three();
    let (number, records) = send(&history, 0, 1);
    history.refused(number);
    store(&mut stored, &records);
    finds(&history, &stored, "Refused before, now 1 records at 7..=7");
}

#[test]
fn two_answers_for_one_batch_are_found() {
    let (history, stored) = three();
    history.acked(1, 0, 3, 4);
    finds(&history, &stored, "was at 1, and is now acknowledged at 3");
}

/// What a check has found is not forgotten: an unknown outcome is decided once.
#[test]
fn an_unknown_outcome_that_changes_is_found() {
    let (history, mut stored) = three();
    let (number, records) = send(&history, 0, 1);
    history.gave_up(number);
    let tally = history.check(STREAM, &stored).unwrap();
    assert_eq!(tally.unknown_absent, 1);
    store(&mut stored, &records);
    finds(&history, &stored, "Absent before, now 1 records");
}

#[test]
fn what_a_reader_saw_and_is_gone_is_found() {
    let (history, mut stored) = three();
    let (number, records) = send(&history, 0, 1);
    history.gave_up(number);
    store(&mut stored, &records);
    history.saw(STREAM, &stored);
    stored.pop();
    finds(&history, &stored, "a reader saw it, and it is gone");
}

#[test]
fn what_a_reader_saw_otherwise_is_found() {
    let (history, stored) = three();
    let mut other = stored[1].clone();
    other.record.payload.push(1);
    history.saw(STREAM, &[other]);
    finds(&history, &stored, "a reader saw something else there");
}

#[test]
fn a_replica_that_differs_is_found() {
    let (_, stored) = three();
    same(STREAM, ("node 0", &stored), ("node 1", &stored)).unwrap();
    let mut other = stored.clone();
    other[2].record.payload[0] ^= 1;
    let wrong = same(STREAM, ("node 0", &stored), ("node 1", &other)).unwrap_err();
    assert!(wrong.contains("sequence 3"), "{wrong}");
    let mut other = stored.clone();
    other[4].append_time_us += 1;
    let wrong = same(STREAM, ("node 0", &stored), ("node 1", &other)).unwrap_err();
    assert!(wrong.contains("sequence 5"), "{wrong}");
    let wrong = same(STREAM, ("node 0", &stored), ("node 1", &stored[..5])).unwrap_err();
    assert!(wrong.contains("6 messages at node 0, 5 at node 1"), "{wrong}");
}

#[test]
fn a_stale_read_is_found() {
    let (history, mut stored) = three();
    let before = history.tail(STREAM, 0);
    assert_eq!(before, 7);
    history.read_to("node 1", STREAM, 0, before, 7);
    history.check(STREAM, &stored).unwrap();
    // What was acknowledged before it began.
    history.read_to("node 1", STREAM, 0, before, 6);
    finds(&history, &stored, "came to tail 6, after 7 was known: stale");
    // What another read has seen, though nobody has acknowledged it.
    let (number, records) = send(&history, 0, 1);
    history.gave_up(number);
    store(&mut stored, &records);
    history.read_to("node 1", STREAM, 0, 7, 8);
    history.read_to("node 2", STREAM, 0, history.tail(STREAM, 0), 7);
    finds(
        &history,
        &stored,
        "a read at node 2 came to tail 7, after 8 was known: stale",
    );
}

#[test]
fn an_expectation_that_did_not_hold_is_found() {
    for (expect, holds) in [
        (Expect::Last(6), true),
        (Expect::Last(5), false),
        (
            Expect::OfSubject {
                subject: "s.a".into(),
                last: 6,
            },
            true,
        ),
        (
            Expect::OfSubject {
                subject: "s.a".into(),
                last: 4,
            },
            false,
        ),
        (
            Expect::OfSubject {
                subject: "s.b".into(),
                last: 0,
            },
            true,
        ),
    ] {
        let (history, mut stored) = three();
        let (number, records) = send(&history, 0, 1);
        history.expects(number, expect);
        store(&mut stored, &records);
        history.acked(number, 0, 7, 7);
        if holds {
            assert_eq!(history.check(STREAM, &stored).unwrap().expectations, 1);
        } else {
            finds(&history, &stored, "though it expected");
        }
    }
}

#[test]
fn an_expectation_that_was_refused_wrongly_is_found() {
    let (history, stored) = three();
    let (number, _) = send(&history, 0, 1);
    history.expects(number, Expect::Last(6));
    history.expectation_failed(number, 6, 7);
    finds(&history, &stored, "what it expected was found, and refused");
    let (history, stored) = three();
    let (number, _) = send(&history, 0, 1);
    history.expects(number, Expect::Last(6));
    history.expectation_failed(number, 4, 7);
    finds(
        &history,
        &stored,
        "refused because of sequence 4, when 6 was acknowledged",
    );
}
