//! A disk whose sync takes 5 ms: whether shards share it.

use anyhow::Result;

use crate::contest::{PublishLoad, Publishes, settle};
use crate::lab::{Lab, millis};
use crate::mainstem::Mainstem;
use crate::report::{Against, Bar, Row, Rows, number};

const SYNC_MS: u64 = 5;
const SHARDS: [u32; 3] = [1, 100, 1_000];
/// The same in all: enough that each of 1,000 shards has some.
const SUBJECTS: usize = 10_000;
/// "Does not fall" allows for noise.
const NOISE: f64 = 0.95;

/// One row for each number of shards, against one shard.
pub async fn sharing(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let mut rates: [Vec<f64>; SHARDS.len()] = Default::default();
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    let sync = lab.sync_latency_preloaded(SYNC_MS)?;
    rows.condition(
        "sync_latency",
        format!("{:.3} ms (median of fdatasync under the preload library)", millis(sync)),
    );
    for round in 0..lab.rounds {
        for place in 0..SHARDS.len() {
            let which = (round + place) % SHARDS.len();
            let mut load = PublishLoad::new(lab, 128, SUBJECTS);
            load.shards = SHARDS[which];
            load.sync_ms = Some(SYNC_MS);
            settle(lab.scratch()).await?;
            let turn = Mainstem.publish(lab, &load).await?;
            eprintln!(
                "  round {}: {:>5} shards {:>12} msg/s",
                round + 1,
                load.shards,
                number(turn.rate)
            );
            rates[which].push(turn.rate);
            for (what, value) in load.conditions().into_iter().filter(|(what, _)| what != "shards") {
                rows.condition(&what, value);
            }
            for (what, value) in turn.told {
                rows.condition(&format!("mainstem-{}.{what}", load.shards), value);
            }
        }
    }
    let alone = format!("{name}-{}", SHARDS[0]);
    for (shards, own) in SHARDS.iter().zip(&rates) {
        let first = *shards == SHARDS[0];
        let against = (!first).then_some(Against {
            name: &alone,
            rounds: &rates[0],
        });
        let bar = (!first).then_some(Bar::RatioAtLeast(NOISE));
        rows.push(&format!("{name}-{shards}"), "msg/s", own, against, bar, None);
    }
    Ok(rows.done())
}
