//! The figures: what each measures and what it must reach.

mod create;
mod disk;
mod failover;
mod many;
mod memory;
mod one;
mod publish;
mod read;
mod rebuild;
mod restart;
mod shards;

use std::time::Duration;

use anyhow::{Result, bail};
use futures_util::future::BoxFuture;

use crate::lab::Lab;
use crate::report::Row;

/// One figure. Its name is stable: reports of different days are compared by it.
pub struct Figure {
    pub name: &'static str,
    pub about: &'static str,
    /// It is given up after this long.
    pub time_max: Duration,
    pub measure: for<'a> fn(&'a Lab, &'static str) -> BoxFuture<'a, Result<Vec<Row>>>,
}

const TIME_MAX: Duration = Duration::from_secs(20 * 60);

pub const ALL: &[Figure] = &[
    Figure {
        name: "pub-128-1subj",
        about: "128 B messages, asynchronous publish, one subject: 3 x nats-server's default, 40 % of the storage limit",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(publish::small(lab, name, 1)),
    },
    Figure {
        name: "pub-128-1000subj",
        about: "the same over 1,000 subjects",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(publish::small(lab, name, 1_000)),
    },
    Figure {
        name: "pub-1k",
        about: "1 KiB messages: 10 x nats-server with sync always, 50 % of the storage limit",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(publish::kibibyte(lab, name)),
    },
    Figure {
        name: "pub-one-p50",
        about: "one message at a time, time to the ack: not above nats-server with sync always",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(one::one_at_a_time(lab, name, 1, 0.7)),
    },
    Figure {
        name: "shards-5ms",
        about: "1, 100 and 1,000 shards on a disk whose sync takes 5 ms: the total rate does not fall",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(shards::sharing(lab, name)),
    },
    Figure {
        name: "read-128",
        about: "128 B messages read from the beginning: 5 x nats-server's ordered consumer",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(read::from_the_beginning(lab, name)),
    },
    Figure {
        name: "memory-10g",
        about: "resident memory while 10 GiB are ingested: flat, under 700 MiB",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(memory::while_ingesting(lab, name)),
    },
    Figure {
        name: "write-amp",
        about: "bytes written to disk per byte published, 1 KiB messages: 2.6 at most",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(disk::write_amplification(lab, name)),
    },
    Figure {
        name: "space-after-trim",
        about: "disk held 60 s after trims of mixed retentions: 1.3 x the live bytes at most",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(disk::space_after_trim(lab, name)),
    },
    Figure {
        name: "restart-1g",
        about: "kill -9 with 1 GiB stored, to the next ack: under 2 s",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(restart::with_data(lab, name)),
    },
    Figure {
        name: "r3-pub-128",
        about: "three nodes, 128 B messages, synced on a quorum: 3 x nats-server's default, 35 % of the storage limit",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(publish::replicated_small(lab, name)),
    },
    Figure {
        name: "r3-pub-1k",
        about: "the same with 1 KiB: 2 x nats-server with sync always, 50 % of the storage limit",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(publish::replicated_kibibyte(lab, name)),
    },
    Figure {
        name: "r3-pub-one-p50",
        about: "three nodes, one message at a time, time to the ack: not above nats-server with sync always",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(one::one_at_a_time(lab, name, 3, 0.6)),
    },
    Figure {
        name: "failover",
        about: "kill -9 of a shard's leader, to the next ack: median under 0.6 s, worst of 50 under 2 s",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(failover::kills(lab, name)),
    },
    Figure {
        name: "step-down",
        about: "a leader hands over, to the next leader's first ack: under 100 ms",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(failover::step_downs(lab, name)),
    },
    Figure {
        name: "idle-10k",
        about: "10,000 idle streams of three replicas: 0.25 core, 1 GiB a node; after a kill all are led within 5 s",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(many::idle(lab, name)),
    },
    Figure {
        name: "pub-1000",
        about: "1,000 replicated streams publishing against one with as many publishers: at least 0.7 x",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(many::publishing(lab, name)),
    },
    Figure {
        name: "create-r3",
        about: "creating a stream of three replicas: under 50 ms",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(create::streams(lab, name)),
    },
    Figure {
        name: "rebuild-1g",
        about: "a replica of 1 GiB from scratch: 100 MiB/s; beside it publishing loses less than 30 %",
        time_max: TIME_MAX,
        measure: |lab, name| Box::pin(rebuild::from_scratch(lab, name)),
    },
];

/// The figures named, in the order of the list; all if none is named.
pub fn choose(names: &[String]) -> Result<Vec<&'static Figure>> {
    for name in names {
        if !ALL.iter().any(|f| f.name == name) {
            let known: Vec<_> = ALL.iter().map(|f| f.name).collect();
            bail!("no figure is called {name}; there are {}", known.join(", "));
        }
    }
    Ok(ALL
        .iter()
        .filter(|f| names.is_empty() || names.iter().any(|n| n == f.name))
        .collect())
}
