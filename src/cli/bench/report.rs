//! The result of a bench.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::Load;
use super::publish::per_second;
use crate::cli::output;
use crate::cli::units::{show_count, show_latency_us, show_size};

/// Latencies in microseconds, to three digits, up to ten minutes.
#[derive(Debug)]
pub(super) struct Latency(Histogram<u64>);

impl Latency {
    pub(super) fn new() -> Self {
        Latency(Histogram::new_with_bounds(1, 600_000_000, 3).expect("good bounds"))
    }

    pub(super) fn record(&mut self, took: Duration) {
        self.record_us(took.as_micros() as u64);
    }

    pub(super) fn record_us(&mut self, us: u64) {
        self.0.saturating_record(us.max(1));
    }

    pub(super) fn add(&mut self, other: &Latency) {
        self.0.add(&other.0).expect("the same bounds");
    }

    fn text(&self) -> String {
        let at = |q: f64| show_latency_us(self.0.value_at_quantile(q));
        format!(
            "p50 {}   p90 {}   p99 {}   p99.9 {}   max {}",
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            show_latency_us(self.0.max())
        )
    }

    fn json(&self) -> Value {
        let at = |q: f64| self.0.value_at_quantile(q);
        json!({
            "samples": self.0.len(), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p99_9": at(0.999),
            "max": self.0.max(),
        })
    }
}

#[derive(Debug)]
pub(super) struct Published {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) took: Duration,
    /// From publish to ack.
    pub(super) latency: Latency,
}

#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) took: Duration,
    pub(super) distinct: u64,
    pub(super) repeated: u64,
    /// From publish to delivery.
    pub(super) latency: Option<Latency>,
}

#[derive(Debug)]
pub(super) struct Report {
    pub(super) published: Option<Published>,
    pub(super) read: Option<Read>,
    pub(super) verified: Option<bool>,
}

fn rate(messages: u64, bytes: u64, took: Duration) -> String {
    format!(
        "{} messages/s, {:.1} MB/s, in {:.2} s",
        show_count(per_second(messages, took) as u64),
        per_second(bytes, took) / 1e6,
        took.as_secs_f64()
    )
}

impl Report {
    pub(super) fn text(&self, kind: &str, load: &Load) -> String {
        let mut pairs = vec![(
            "load",
            format!(
                "{kind}: {} messages of {}, {} subject(s), {} publisher(s){}, batches up to {}, codec {}",
                show_count(self.published.as_ref().map_or(load.count, |p| p.messages)),
                show_size(load.size),
                show_count(load.subjects),
                load.publishers,
                if load.sync { ", one at a time" } else { "" },
                show_size(load.batch_bytes),
                load.codec.as_str(),
            ),
        )];
        if let Some(p) = &self.published {
            pairs.push(("published", rate(p.messages, p.bytes, p.took)));
            pairs.push(("publish to ack", p.latency.text()));
        }
        if let Some(r) = &self.read {
            pairs.push(("read", rate(r.messages, r.bytes, r.took)));
            if let Some(latency) = &r.latency {
                pairs.push(("publish to delivery", latency.text()));
            }
        }
        let verified = match self.verified {
            Some(true) => "every message is there once, in order, with its content",
            Some(false) | None => "not verified",
        };
        pairs.push(("content", verified.to_owned()));
        output::pairs(&pairs)
    }

    pub(super) fn json(&self, kind: &str, load: &Load) -> Value {
        let half = |messages: u64, bytes: u64, took: Duration, latency: Option<&Latency>| {
            json!({
                "messages": messages,
                "bytes": bytes,
                "seconds": took.as_secs_f64(),
                "messages_per_second": per_second(messages, took),
                "mb_per_second": per_second(bytes, took) / 1e6,
                "latency_us": latency.map(Latency::json),
            })
        };
        json!({
            "kind": kind,
            "load": {
                "count": load.count, "size": load.size, "subjects": load.subjects, "publishers": load.publishers,
                "shards": load.shards, "batch_bytes": load.batch_bytes, "batch_messages": load.batch_messages,
                "linger_us": load.linger.as_micros() as u64, "in_flight_bytes": load.in_flight, "sync": load.sync,
                "msg_ids": load.msg_ids, "codec": load.codec.as_str(),
            },
            "published": self.published.as_ref().map(|p| half(p.messages, p.bytes, p.took, Some(&p.latency))),
            "read": self.read.as_ref().map(|r| half(r.messages, r.bytes, r.took, r.latency.as_ref())),
            "verified": self.verified,
        })
    }
}
