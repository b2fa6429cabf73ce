//! Asynchronous publishing: how many messages a second are acknowledged.

use anyhow::Result;

use crate::contest::{PublishLoad, Publishes, alternate};
use crate::lab::Lab;
use crate::limit::Limit;
use crate::mainstem::Mainstem;
use crate::nats::{Nats, missing};
use crate::report::{Against, Bar, Row, Rows};

const UNIT: &str = "msg/s";

/// Random messages of 128 bytes.
pub async fn small(lab: &Lab, name: &str, subjects: usize) -> Result<Vec<Row>> {
    let load = PublishLoad::new(lab, 128, subjects);
    let rivals = [
        Rival::nats(lab, false, Some(Bar::RatioAtLeast(3.0)), Some(Bar::RatioAtLeast(6.0))),
        Rival::limit(Bar::RatioAtLeast(0.4), Some(Bar::RatioAtLeast(0.6))),
    ];
    against_rivals(lab, name, &load, &rivals).await
}

/// Random messages of 1 KiB.
pub async fn kibibyte(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let load = PublishLoad::new(lab, 1_024, 1);
    let rivals = [
        Rival::nats(lab, true, Some(Bar::RatioAtLeast(10.0)), None),
        Rival::limit(Bar::RatioAtLeast(0.5), None),
        Rival::nats(lab, false, None, Some(Bar::RatioAtLeast(1.2))),
    ];
    against_rivals(lab, name, &load, &rivals).await
}

/// Random messages of 128 bytes on three replicas.
pub async fn replicated_small(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let load = replicated(PublishLoad::new(lab, 128, 1));
    let rivals = [
        Rival::nats(lab, false, Some(Bar::RatioAtLeast(3.0)), Some(Bar::RatioAtLeast(5.0))),
        Rival::limit(Bar::RatioAtLeast(0.35), Some(Bar::RatioAtLeast(0.5))),
    ];
    against_rivals(lab, name, &load, &rivals).await
}

/// Random messages of 1 KiB on three replicas.
pub async fn replicated_kibibyte(lab: &Lab, name: &str) -> Result<Vec<Row>> {
    let load = replicated(PublishLoad::new(lab, 1_024, 1));
    let rivals = [
        Rival::nats(lab, true, Some(Bar::RatioAtLeast(2.0)), None),
        Rival::limit(Bar::RatioAtLeast(0.5), None),
        Rival::nats(lab, false, None, Some(Bar::RatioAtLeast(1.5))),
    ];
    against_rivals(lab, name, &load, &rivals).await
}

fn replicated(load: PublishLoad) -> PublishLoad {
    PublishLoad { replicas: 3, ..load }
}

/// Whom Mainstem is compared with, and what the comparison must show.
struct Rival {
    contestant: Box<dyn Publishes>,
    bar: Option<Bar>,
    stretch: Option<Bar>,
    /// Why it cannot take part, if so.
    missing: Option<String>,
}

impl Rival {
    fn nats(lab: &Lab, sync_always: bool, bar: Option<Bar>, stretch: Option<Bar>) -> Self {
        Self {
            contestant: Box::new(Nats::new(sync_always)),
            bar,
            stretch,
            missing: missing(lab, sync_always),
        }
    }

    fn limit(bar: Bar, stretch: Option<Bar>) -> Self {
        Self {
            contestant: Box::new(Limit),
            bar: Some(bar),
            stretch,
            missing: None,
        }
    }
}

/// One row for each rival.
async fn against_rivals(lab: &Lab, name: &str, load: &PublishLoad, rivals: &[Rival]) -> Result<Vec<Row>> {
    let mut contestants: Vec<&dyn Publishes> = vec![&Mainstem];
    contestants.extend(rivals.iter().filter(|r| r.missing.is_none()).map(|r| &*r.contestant));
    let outcome = alternate(lab, load, &contestants).await?;
    let rates_of = |contestant: &str| {
        let which = contestants.iter().position(|c| c.name() == contestant);
        which.map_or(&[][..], |n| &outcome.rates[n])
    };

    let mut rows = Rows::new(name, lab.run, lab.conditions());
    for (what, value) in load.conditions() {
        rows.condition(&what, value);
    }
    for (what, value) in &outcome.told {
        rows.condition(what, value);
    }
    let own = rates_of(Mainstem.name());
    for rival in rivals {
        let rival_name = rival.contestant.name();
        let against = Against {
            name: rival_name,
            rounds: rates_of(rival_name),
        };
        rows.push(
            &format!("{name}/{rival_name}"),
            UNIT,
            own,
            Some(against),
            rival.bar,
            rival.stretch,
        );
        if let Some(why) = &rival.missing {
            rows.note(why);
        }
    }
    Ok(rows.done())
}
