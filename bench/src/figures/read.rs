//! Reading everything from the beginning.

use anyhow::Result;

use crate::contest::settle;
use crate::lab::Lab;
use crate::mainstem::{STREAM, Server};
use crate::nats::{NatsServer, missing};
use crate::payload::Payloads;
use crate::report::{Against, Bar, Row, Rows, number};

const MESSAGE_BYTES: usize = 128;

/// Both servers hold the same messages while they take turns; nats-server's turn is the better of its two ordered
/// consumers, pushed and pulled.
pub async fn from_the_beginning(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let messages: u64 = if lab.quick { 100_000 } else { 2_000_000 };
    let payloads = Payloads::new(MESSAGE_BYTES, 0);
    let own_part = lab.takes_part("mainstem");
    let nats_missing = missing(lab, false);
    let nats_part = lab.takes_part("nats-default") && nats_missing.is_none();

    let mut server = None;
    if own_part {
        let started = Server::start(lab, None).await?;
        started.create(STREAM, 1, Default::default()).await?;
        started.fill(STREAM, MESSAGE_BYTES, messages, 1).await?;
        server = Some(started);
    }
    let mut nats = None;
    let mut pull = false;
    if nats_part {
        let mut started = NatsServer::start(lab, false, 1).await?;
        started.fill(&payloads, messages).await?;
        let pushed = started.read(&payloads, messages, false).await?;
        let pulled = started.read(&payloads, messages, true).await?;
        pull = pulled > pushed;
        nats = Some(started);
    }

    let (mut own, mut its) = (Vec::new(), Vec::new());
    for round in 0..lab.rounds {
        settle(lab.scratch()).await?;
        for place in 0..2 {
            match ((round + place) % 2, &server, &nats) {
                (0, Some(server), _) => {
                    own.push(server.read(&payloads, messages).await?);
                    eprintln!(
                        "  round {}: {:<16} {:>12} msg/s",
                        round + 1,
                        "mainstem",
                        number(own[own.len() - 1])
                    );
                }
                (1, _, Some(nats)) => {
                    its.push(nats.read(&payloads, messages, pull).await?);
                    eprintln!(
                        "  round {}: {:<16} {:>12} msg/s",
                        round + 1,
                        "nats-default",
                        number(its[its.len() - 1])
                    );
                }
                _ => {}
            }
        }
    }

    let mut rows = Rows::new(name, lab.run, lab.conditions());
    rows.condition("message_bytes", format!("{MESSAGE_BYTES} (random payload)"));
    rows.condition("messages", messages);
    rows.condition("subjects", 1);
    rows.condition("shards", 1);
    rows.condition("readers", "1, every payload checked");
    rows.condition(
        "nats-default.consumer",
        if pull { "ordered, pulled" } else { "ordered, pushed" },
    );
    rows.condition("mainstem.credit", "the reader's default: 16 MiB");
    let against = Some(Against {
        name: "nats-default",
        rounds: &its,
    });
    rows.push(
        name,
        "msg/s",
        &own,
        against,
        Some(Bar::RatioAtLeast(5.0)),
        Some(Bar::RatioAtLeast(10.0)),
    );
    if let Some(why) = nats_missing {
        rows.note(why);
    }
    Ok(rows.done())
}
