//! How long it takes until a new replicated stream takes messages.

use std::time::Instant;

use anyhow::Result;
use mainstem::client::proto::StreamSpec;
use mainstem::client::{Client, Message};

use crate::contest::settle;
use crate::lab::{Lab, millis};
use crate::mainstem::Server;
use crate::nats::{NatsServer, missing};
use crate::report::{Against, Bar, Row, Rows, median, number};

const NODES: usize = 3;

/// Milliseconds from the call to its answer; the stream then takes a message at once.
async fn create(client: &Client, name: String, dedicated: bool) -> Result<f64> {
    let spec = StreamSpec {
        name: name.clone(),
        replicas: NODES as u32,
        dedicated,
        ..StreamSpec::default()
    };
    let begin = Instant::now();
    client.create_stream(spec).await?;
    let took = millis(begin.elapsed());
    let message = Message::new(format!("{name}.0"), "the first");
    client.publish(&name, vec![message], None).await?;
    Ok(took)
}

/// Three rows: streams in groups that are there; the first stream of a cluster; streams with groups of their own.
pub async fn streams(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let (pooled, dedicated) = if lab.quick { (20, 3) } else { (200, 20) };
    let nats_missing = missing(lab, false);
    let (mut warm, mut first, mut own, mut its) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..lab.rounds {
        settle(lab.scratch()).await?;
        let server = Server::cluster(lab, NODES, None).await?;
        let client = server.client().await?;
        first.push(create(&client, "first".to_owned(), false).await?);
        let mut times = Vec::new();
        for n in 0..pooled {
            times.push(create(&client, format!("pooled-{n}"), false).await?);
        }
        warm.extend(median(&times));
        let mut times = Vec::new();
        for n in 0..dedicated {
            times.push(create(&client, format!("own-{n}"), true).await?);
        }
        own.extend(median(&times));
        eprintln!(
            "  round {}: {} ms, the first one {} ms, with a group of its own {} ms",
            round + 1,
            number(warm[round]),
            number(first[round]),
            number(own[round])
        );
        drop(server);
        if nats_missing.is_none() && lab.takes_part("nats-default") {
            settle(lab.scratch()).await?;
            let mut nats = NatsServer::start(lab, false, NODES).await?;
            let times: Vec<f64> = nats.create_streams(pooled / 4).await?.into_iter().map(millis).collect();
            its.extend(median(&times));
        }
    }
    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("replicas", NODES);
    rows.condition(
        "streams",
        format!("{pooled} and {dedicated} in each round, one after the other"),
    );
    let against = Some(Against {
        name: "nats-default",
        rounds: &its,
    });
    let (bar, stretch) = (Some(Bar::ValueBelow(50.0)), Some(Bar::ValueBelow(10.0)));
    rows.push(name, "ms", &warm, against, bar, stretch);
    rows.note("in a group of the pool, which is there: the median of each round's streams");
    rows.push(&format!("{name}/first"), "ms", &first, None, bar, stretch);
    rows.note("the first stream of a new cluster");
    rows.push(&format!("{name}/dedicated"), "ms", &own, None, bar, stretch);
    rows.note("with a new group of its own: the median of each round's streams");
    Ok(rows.done())
}
