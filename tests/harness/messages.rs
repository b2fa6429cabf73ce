//! What a load publishes: subjects, records, codecs, at random from a seed.

use mainstem::wire::v1;
use rand::Rng;
use rand::rngs::StdRng;

use super::batch::{Codec, Record};

/// How large the load's messages are.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub records_max: u32,
    pub payload_max: u32,
}

/// Subjects of a stream, one or more for each of its shards.
pub fn subjects(stream: &v1::Stream) -> Vec<Vec<String>> {
    let name = &stream.spec.as_ref().unwrap().name;
    let map = stream.map.as_ref().expect("an active stream has a map");
    let mut of = vec![Vec::new(); stream.spec.as_ref().unwrap().shards.max(1) as usize];
    for i in 0u32.. {
        let subject = format!("{name}.{i}");
        let slot = (xxhash_rust::xxh3::xxh3_64(subject.as_bytes()) % 4096) as u32;
        let range = map
            .ranges
            .iter()
            .find(|r| (r.first..=r.last).contains(&slot))
            .expect("the map covers all slots");
        of[range.shard as usize].push(subject);
        if of.iter().all(|s| s.len() >= 3) {
            return of;
        }
    }
    unreachable!()
}

pub fn random_records(rng: &mut StdRng, subjects: &[String], shape: Shape) -> Vec<Record> {
    let n = rng.random_range(1..=shape.records_max);
    (0..n)
        .map(|_| {
            let subject = &subjects[rng.random_range(0..subjects.len())];
            let size = if rng.random_bool(0.8) {
                shape.payload_max / 4
            } else {
                shape.payload_max
            };
            let mut payload = vec![0; rng.random_range(0..=size) as usize];
            rng.fill(payload.as_mut_slice());
            let mut record = Record::new(subject, payload);
            if rng.random_bool(0.2) {
                record.headers.push(("h".into(), b"value".to_vec()));
            }
            if rng.random_bool(0.1) {
                record.event_time_us = Some(rng.random());
            }
            record
        })
        .collect()
}

pub fn random_codec(rng: &mut StdRng) -> Codec {
    match rng.random_range(0..4) {
        0 => Codec::Lz4,
        1 => Codec::Zstd,
        _ => Codec::None,
    }
}

/// A record as a simple client sends it.
pub fn message_of(r: &Record) -> v1::Message {
    v1::Message {
        subject: r.subject.clone(),
        payload: r.payload.clone().into(),
        headers: r
            .headers
            .iter()
            .map(|(n, v)| v1::Header {
                name: n.clone(),
                value: v.clone().into(),
            })
            .collect(),
        key: r.key.clone().map(Into::into),
        message_id: r.message_id.clone(),
        event_time_us: r.event_time_us,
    }
}
