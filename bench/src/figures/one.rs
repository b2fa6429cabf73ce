//! One message at a time: how long an ack takes when nothing else is on its way.

use anyhow::Result;

use crate::contest::{PublishLoad, settle};
use crate::lab::Lab;
use crate::mainstem::Mainstem;
use crate::nats::{Nats, missing};
use crate::report::{Against, Bar, Row, Rows, number};

/// Two rows: the median, with a bar (at most so many times nats-server's), and the 99th percentile, told.
pub async fn one_at_a_time(lab: &Lab, name: &str, replicas: u32, stretch: f64) -> Result<Vec<Row>> {
    let load = PublishLoad {
        replicas,
        ..PublishLoad::new(lab, 128, 1)
    };
    let nats = Nats::new(true);
    let nats_missing = missing(lab, true);
    // [own, its]; of each the medians and the 99th percentiles, in milliseconds.
    let mut p50: [Vec<f64>; 2] = Default::default();
    let mut p99: [Vec<f64>; 2] = Default::default();
    for round in 0..lab.rounds {
        for place in 0..2 {
            let which = (round + place) % 2;
            let contestant = ["mainstem", "nats-always"][which];
            if !lab.takes_part(contestant) || (which == 1 && nats_missing.is_some()) {
                continue;
            }
            settle(lab.scratch()).await?;
            let times = match which {
                0 => Mainstem::one_at_a_time(lab, &load).await?,
                _ => nats.one_at_a_time(lab, &load).await?,
            };
            let millis = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
            p50[which].push(millis(0.5));
            p99[which].push(millis(0.99));
            eprintln!(
                "  round {}: {contestant:<12} p50 {} ms, p99 {} ms",
                round + 1,
                number(millis(0.5)),
                number(millis(0.99))
            );
        }
    }
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    for (what, value) in load.conditions() {
        rows.condition(&what, value);
    }
    rows.condition("window", "one message");
    rows.condition("mainstem.sync", "before each ack");
    rows.condition("mainstem.indexes", "all: subjects, message ids, time");
    rows.condition("nats-always.sync", "always: before each ack");
    let against = |rounds| {
        Some(Against {
            name: "nats-always",
            rounds,
        })
    };
    rows.push(
        name,
        "ms",
        &p50[0],
        against(&p50[1]),
        Some(Bar::RatioAtMost(1.0)),
        Some(Bar::RatioAtMost(stretch)),
    );
    if let Some(why) = nats_missing {
        rows.note(why);
    }
    rows.push(&format!("{name}/p99"), "ms", &p99[0], against(&p99[1]), None, None);
    Ok(rows.done())
}
