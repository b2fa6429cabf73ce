//! Alarms: conditions that last, have a name and a reason, and need someone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use crate::base::clock::Clock;
use crate::base::metric_names as names;

/// The kinds of alarm. A closed set: the names are labels of metrics and part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AlarmKind {
    /// Little space is left where the data is; publishes are refused until there is more.
    DiskLow,
    /// The wall clock disagrees with the monotonic one; nothing expires.
    ClockJump,
    /// Stored data failed its checks. It is not served.
    Damaged,
    /// A write or sync failed: what is on disk is unknown until a restart.
    Poisoned,
    /// Data that the metadata does not know was found and put aside.
    Quarantine,
    /// A part of the process ended that must not.
    TaskFailed,
}

impl AlarmKind {
    /// Every kind.
    pub const ALL: [AlarmKind; 6] = [
        AlarmKind::DiskLow,
        AlarmKind::ClockJump,
        AlarmKind::Damaged,
        AlarmKind::Poisoned,
        AlarmKind::Quarantine,
        AlarmKind::TaskFailed,
    ];

    /// The name in metrics, reports and the API.
    pub fn as_str(self) -> &'static str {
        match self {
            AlarmKind::DiskLow => "disk_low",
            AlarmKind::ClockJump => "clock_jump",
            AlarmKind::Damaged => "damaged",
            AlarmKind::Poisoned => "poisoned",
            AlarmKind::Quarantine => "quarantine",
            AlarmKind::TaskFailed => "task_failed",
        }
    }

    /// Whether the node is unhealthy while this alarm is on: only a restart or a repair can help it.
    pub fn is_fatal(self) -> bool {
        match self {
            AlarmKind::Damaged | AlarmKind::Poisoned | AlarmKind::TaskFailed => true,
            AlarmKind::DiskLow | AlarmKind::ClockJump | AlarmKind::Quarantine => false,
        }
    }
}

impl fmt::Display for AlarmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An alarm that is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    pub kind: AlarmKind,
    /// What it is about ("group g3", "log"), or empty: the node.
    pub subject: String,
    /// A sentence for the operator.
    pub reason: String,
    /// Since when, in microseconds since the Unix epoch.
    pub since_us: u64,
}

type Active = BTreeMap<(AlarmKind, String), Alarm>;

/// The alarms of a node. Clones share them.
#[derive(Clone)]
pub struct Alarms {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Clock,
    active: watch::Sender<Arc<Active>>,
}

impl Alarms {
    /// No alarm is on.
    pub fn new(clock: Clock) -> Self {
        for kind in AlarmKind::ALL {
            metrics::gauge!(names::NODE_ALARM_STATE, "alarm" => kind.as_str()).set(0.0);
        }
        Self {
            inner: Arc::new(Inner {
                clock,
                active: watch::Sender::new(Arc::default()),
            }),
        }
    }

    /// Turns an alarm of the node on, or changes its reason.
    pub fn raise(&self, kind: AlarmKind, reason: impl Into<String>) {
        self.raise_for(kind, "", reason);
    }

    /// Turns an alarm about `subject` on, or changes its reason. Logged when it goes on.
    pub fn raise_for(&self, kind: AlarmKind, subject: &str, reason: impl Into<String>) {
        let reason = reason.into();
        let since_us = self.inner.clock.now_us();
        self.inner.active.send_if_modified(|active| {
            let key = (kind, subject.to_owned());
            match active.get(&key) {
                Some(known) if known.reason == reason => return false,
                Some(_) => {}
                None if kind.is_fatal() => {
                    tracing::error!(alarm = kind.as_str(), subject, reason, "alarm on");
                }
                None => tracing::warn!(alarm = kind.as_str(), subject, reason, "alarm on"),
            }
            let active = Arc::make_mut(active);
            active
                .entry(key)
                .and_modify(|alarm| alarm.reason.clone_from(&reason))
                .or_insert_with(|| Alarm {
                    kind,
                    subject: subject.to_owned(),
                    reason: reason.clone(),
                    since_us,
                });
            metrics::gauge!(names::NODE_ALARM_STATE, "alarm" => kind.as_str()).set(1.0);
            true
        });
    }

    /// Turns an alarm of the node off.
    pub fn clear(&self, kind: AlarmKind) {
        self.clear_for(kind, "");
    }

    /// Turns the alarm about `subject` off. Logged when it was on.
    pub fn clear_for(&self, kind: AlarmKind, subject: &str) {
        self.inner.active.send_if_modified(|active| {
            let key = (kind, subject.to_owned());
            if !active.contains_key(&key) {
                return false;
            }
            let active = Arc::make_mut(active);
            active.remove(&key);
            if !active.keys().any(|(other, _)| *other == kind) {
                metrics::gauge!(names::NODE_ALARM_STATE, "alarm" => kind.as_str()).set(0.0);
            }
            tracing::info!(alarm = kind.as_str(), subject, "alarm off");
            true
        });
    }

    /// Whether any alarm of this kind is on.
    pub fn is_on(&self, kind: AlarmKind) -> bool {
        self.inner.active.borrow().keys().any(|(other, _)| *other == kind)
    }

    /// The alarms that are on, by kind and subject.
    pub fn active(&self) -> Vec<Alarm> {
        self.inner.active.borrow().values().cloned().collect()
    }

    /// The names of the alarms that are on, each once, for the API.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self
            .inner
            .active
            .borrow()
            .keys()
            .map(|(kind, _)| kind.as_str())
            .collect();
        names.dedup();
        names
    }

    /// The first alarm that makes the node unhealthy.
    pub fn fatal(&self) -> Option<Alarm> {
        self.inner
            .active
            .borrow()
            .values()
            .find(|alarm| alarm.kind.is_fatal())
            .cloned()
    }

    /// Told at every change; read [`Alarms::active`] then.
    pub fn watch(&self) -> AlarmWatch {
        AlarmWatch(self.inner.active.subscribe())
    }
}

impl fmt::Debug for Alarms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.active()).finish()
    }
}

/// Waits for changes of the alarms.
pub struct AlarmWatch(watch::Receiver<Arc<Active>>);

impl AlarmWatch {
    /// Completes at the next change since this was made or last completed; false when the alarms are gone.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }

    /// Completes when an alarm of one of these kinds is on; never when the alarms are gone without one.
    pub async fn any_of(&mut self, kinds: &[AlarmKind]) -> Alarm {
        let of_these = |alarm: &&Alarm| kinds.contains(&alarm.kind);
        let found = self
            .0
            .wait_for(|active| active.values().any(|alarm| of_these(&alarm)))
            .await;
        let alarm = found.ok().and_then(|active| active.values().find(of_these).cloned());
        match alarm {
            Some(alarm) => alarm,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::ManualClock;
    use std::time::Duration;

    #[tokio::test]
    async fn raised_kept_changed_and_cleared() {
        let hands = ManualClock::new(1_000);
        let alarms = Alarms::new(hands.clock());
        let mut changes = alarms.watch();
        alarms.raise(AlarmKind::DiskLow, "3 MiB left");
        assert!(changes.changed().await);
        hands.advance(Duration::from_secs(1));
        alarms.raise(AlarmKind::DiskLow, "2 MiB left");
        let [alarm] = &alarms.active()[..] else {
            panic!("one alarm")
        };
        assert_eq!(
            (alarm.reason.as_str(), alarm.since_us),
            ("2 MiB left", 1_000),
            "the beginning is kept"
        );
        assert_eq!(alarms.fatal(), None);
        assert!(changes.changed().await);
        alarms.raise(AlarmKind::DiskLow, "2 MiB left");
        assert!(
            !changes.0.has_changed().expect("alarms live"),
            "the same again is no change"
        );
        alarms.clear(AlarmKind::DiskLow);
        assert!(!alarms.is_on(AlarmKind::DiskLow));
        assert!(alarms.names().is_empty());
    }

    #[tokio::test]
    async fn one_kind_about_two_things() {
        let alarms = Alarms::new(ManualClock::new(1).clock());
        let mut watch = alarms.watch();
        alarms.raise_for(AlarmKind::Damaged, "group g1", "checksum");
        alarms.raise_for(AlarmKind::Damaged, "group g2", "gap");
        alarms.raise(AlarmKind::ClockJump, "a year");
        assert_eq!(
            watch.any_of(&[AlarmKind::Poisoned, AlarmKind::Damaged]).await.subject,
            "group g1"
        );
        assert_eq!(alarms.names(), ["clock_jump", "damaged"]);
        alarms.clear_for(AlarmKind::Damaged, "group g1");
        assert_eq!(alarms.fatal().map(|alarm| alarm.subject), Some("group g2".into()));
        assert!(alarms.is_on(AlarmKind::Damaged));
    }
}
