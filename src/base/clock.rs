//! The clock. Time is stamped on the monotonic clock, anchored to the wall clock at start, so that a wall clock that
//! jumps moves no stamp: a clock a year ahead must not empty a stream.
//!
//! [`Clock::check`] compares the two clocks. Below [`DISAGREEMENT_US_MAX`] the stamps follow the wall clock slowly
//! ([`SLEW_PPM`]); from there on the stamps go on undisturbed, expiry pauses and the state says so, until the two
//! agree again (the wall clock was put right) or the process is restarted.
//!
//! A restart believes the wall clock only within bounds ([`Clock::resume`]): not when it is behind the time at which the
//! node last ran, and not when it is ahead of it by more than a node is meant to be down. Otherwise stamps go on from
//! where they ended, until the wall clock comes within these bounds or the operator vouches for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

/// From this disagreement between the wall clock and the monotonic one on, expiry pauses.
pub const DISAGREEMENT_US_MAX: u64 = 30_000_000;

/// How fast stamps follow a wall clock that disagrees by less: microseconds a second.
pub const SLEW_PPM: u64 = 1_000;

/// How often [`Clock::check`] should be called.
pub const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Where a [`Clock`] reads time.
pub trait TimeSource: Send + Sync + 'static {
    /// Microseconds since the Unix epoch, as the operating system tells it. May jump either way.
    fn wall_us(&self) -> u64;
    /// Microseconds since some fixed moment. Never goes back; counts time asleep where the system can.
    fn monotonic_us(&self) -> u64;
}

/// What the last check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockState {
    /// The clocks agree; the stamps are this far behind the wall clock (negative: ahead), in microseconds.
    Agree { behind_us: i64 },
    /// The clocks disagree too much: stamps go on by the monotonic clock, nothing expires.
    Jumped { behind_us: i64 },
    /// The wall clock was not believed at the start: stamps go on from where they had ended, nothing expires.
    Unconfirmed { behind_us: i64 },
}

impl ClockState {
    /// Whether expiry may go on.
    pub fn agrees(self) -> bool {
        match self {
            ClockState::Agree { .. } => true,
            ClockState::Jumped { .. } | ClockState::Unconfirmed { .. } => false,
        }
    }

    /// How far the stamps are behind the wall clock (negative: ahead), in microseconds.
    pub fn behind_us(self) -> i64 {
        match self {
            ClockState::Agree { behind_us }
            | ClockState::Jumped { behind_us }
            | ClockState::Unconfirmed { behind_us } => behind_us,
        }
    }

    /// What to tell the operator; nothing while the clocks agree.
    pub fn reason(self) -> Option<String> {
        let by = humantime::format_duration(Duration::from_secs(self.behind_us().unsigned_abs() / 1_000_000));
        let way = if self.behind_us() > 0 { "ahead of" } else { "behind" };
        match self {
            ClockState::Agree { .. } => None,
            ClockState::Jumped { .. } => Some(format!(
                "the wall clock is {by} {way} the time kept since the start: nothing expires until it is put right; \
                 if the wall clock is right, restart the node (with --accept-clock if it asks for it)"
            )),
            ClockState::Unconfirmed { .. } => Some(format!(
                "the wall clock is {by} {way} the time at which this node last ran: nothing expires, and time goes on \
                 from there, until it is put right; if the wall clock is right, restart the node with --accept-clock"
            )),
        }
    }
}

/// The clock of a node. Clones share everything.
#[derive(Clone)]
pub struct Clock {
    inner: Arc<Inner>,
}

struct Inner {
    source: Arc<dyn TimeSource>,
    /// Stamp less monotonic time; moved only by a check.
    offset_us: AtomicI64,
    /// The largest stamp given; stamps never go back, not even while the offset is slewed down.
    last_us: AtomicU64,
    /// Also makes checks take turns.
    checked: Mutex<Checked>,
    state: watch::Sender<ClockState>,
}

struct Checked {
    /// Monotonic time of the last check.
    at_us: u64,
    /// The wall clock is not believed until it is ahead of the stamps by no more than this.
    ahead_max_us: Option<u64>,
}

impl Clock {
    /// The operating system's clocks.
    pub fn system() -> Self {
        Self::new(Arc::new(System))
    }

    /// The operating system's clocks, after a pause: see [`Clock::resume`].
    pub fn system_after(last_us: u64, offline_max: Duration) -> Self {
        Self::resume(Arc::new(System), last_us, offline_max)
    }

    /// A clock that reads `source`. The stamps start at its wall clock.
    pub fn new(source: Arc<dyn TimeSource>) -> Self {
        let wall = source.wall_us();
        Self::at(source, wall, None)
    }

    /// The clock of a node that last stamped `last_us`. The wall clock is believed if it is not behind that by
    /// [`DISAGREEMENT_US_MAX`] and not ahead of it by more than `offline_max`. Otherwise the stamps start at `last_us`,
    /// and nothing expires until the wall clock comes within these bounds.
    pub fn resume(source: Arc<dyn TimeSource>, last_us: u64, offline_max: Duration) -> Self {
        let ahead_max_us = u64::try_from(offline_max.as_micros()).unwrap_or(u64::MAX);
        let wall = source.wall_us();
        if is_believable(difference(wall, last_us), ahead_max_us) {
            return Self::at(source, wall, None);
        }
        let clock = Self::at(source, last_us, Some(ahead_max_us));
        clock.check();
        clock
    }

    fn at(source: Arc<dyn TimeSource>, start_us: u64, ahead_max_us: Option<u64>) -> Self {
        let monotonic = source.monotonic_us();
        let offset = difference(start_us, monotonic);
        Self {
            inner: Arc::new(Inner {
                source,
                offset_us: AtomicI64::new(offset),
                last_us: AtomicU64::new(0),
                checked: Mutex::new(Checked {
                    at_us: monotonic,
                    ahead_max_us,
                }),
                state: watch::Sender::new(ClockState::Agree { behind_us: 0 }),
            }),
        }
    }

    /// Now, in microseconds since the Unix epoch: what messages are stamped with. Never goes back, never jumps.
    pub fn now_us(&self) -> u64 {
        let stamp = self.stamp_at(self.inner.source.monotonic_us());
        self.inner.last_us.fetch_max(stamp, Ordering::AcqRel).max(stamp)
    }

    /// Microseconds on the monotonic clock, for deadlines and durations.
    pub fn monotonic_us(&self) -> u64 {
        self.inner.source.monotonic_us()
    }

    /// Now, for the decision what has expired; none while the clocks disagree. Checks first, so that an expiry never
    /// runs ahead of the periodic check.
    pub fn expiry_now_us(&self) -> Option<u64> {
        self.check().agrees().then(|| self.now_us())
    }

    /// Compares the clocks, follows a small disagreement slowly, and says what was found. To be called every
    /// [`CHECK_EVERY`] or so; more often does no harm.
    pub fn check(&self) -> ClockState {
        let inner = &*self.inner;
        let mut checked = inner.checked.lock();
        let monotonic = inner.source.monotonic_us();
        let elapsed = monotonic.saturating_sub(checked.at_us);
        let mut behind = difference(inner.source.wall_us(), self.stamp_at(monotonic));
        if checked.ahead_max_us.is_some_and(|max| is_believable(behind, max)) {
            // Put right: as if the node had started now. Never back.
            checked.ahead_max_us = None;
            inner.offset_us.fetch_add(behind.max(0), Ordering::AcqRel);
            behind = behind.min(0);
        }
        let state = if checked.ahead_max_us.is_some() {
            checked.at_us = monotonic;
            ClockState::Unconfirmed { behind_us: behind }
        } else if behind.unsigned_abs() >= DISAGREEMENT_US_MAX {
            checked.at_us = monotonic;
            ClockState::Jumped { behind_us: behind }
        } else {
            let room = i64::try_from(elapsed.saturating_mul(SLEW_PPM) / 1_000_000).unwrap_or(i64::MAX);
            // Time too short to slew by a microsecond is left to the next check.
            if room > 0 || behind == 0 {
                checked.at_us = monotonic;
                inner.offset_us.fetch_add(behind.clamp(-room, room), Ordering::AcqRel);
            }
            ClockState::Agree { behind_us: behind }
        };
        inner.state.send_if_modified(|old| {
            let turned = old.agrees() != state.agrees();
            *old = state;
            turned
        });
        state
    }

    /// What the last check found; notified when the clocks begin or cease to agree.
    pub fn watch(&self) -> watch::Receiver<ClockState> {
        self.inner.state.subscribe()
    }

    fn stamp_at(&self, monotonic: u64) -> u64 {
        monotonic.saturating_add_signed(self.inner.offset_us.load(Ordering::Acquire))
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clock")
            .field("state", &*self.inner.state.borrow())
            .finish_non_exhaustive()
    }
}

/// Whether a wall clock that is so far ahead of (negative: behind) the last stamp may be right.
fn is_believable(ahead_us: i64, ahead_max_us: u64) -> bool {
    match u64::try_from(ahead_us) {
        Ok(ahead) => ahead <= ahead_max_us,
        Err(_) => ahead_us.unsigned_abs() < DISAGREEMENT_US_MAX,
    }
}

/// `a` less `b`, held within what an `i64` can tell.
fn difference(a: u64, b: u64) -> i64 {
    i64::try_from(i128::from(a) - i128::from(b)).unwrap_or(if a > b { i64::MAX } else { i64::MIN })
}

struct System;

impl System {
    // `std` offers the monotonic clock that stands still while the machine sleeps: after a suspended night the wall
    // clock would seem to have jumped. The one that counts on has no safe wrapper in `std`.
    #[allow(unsafe_code)]
    fn read(clock: libc::clockid_t) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec for the call to fill.
        let code = unsafe { libc::clock_gettime(clock, &raw mut time) };
        if code != 0 {
            return 0;
        }
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
        seconds.saturating_mul(1_000_000).saturating_add(nanos / 1_000)
    }
}

impl TimeSource for System {
    fn wall_us(&self) -> u64 {
        Self::read(libc::CLOCK_REALTIME)
    }

    #[cfg(target_os = "linux")]
    fn monotonic_us(&self) -> u64 {
        Self::read(libc::CLOCK_BOOTTIME)
    }

    #[cfg(not(target_os = "linux"))]
    fn monotonic_us(&self) -> u64 {
        Self::read(libc::CLOCK_MONOTONIC)
    }
}

/// A clock that a test moves by hand. Clones share the time.
#[derive(Clone, Debug)]
pub struct ManualClock {
    time: Arc<ManualTime>,
}

#[derive(Debug)]
struct ManualTime {
    wall_us: AtomicU64,
    monotonic_us: AtomicU64,
}

impl ManualClock {
    /// Both hands stand still; the wall clock at `wall_us`.
    pub fn new(wall_us: u64) -> Self {
        let time = ManualTime {
            wall_us: AtomicU64::new(wall_us),
            monotonic_us: AtomicU64::new(1_000_000),
        };
        Self { time: Arc::new(time) }
    }

    /// A clock that reads these hands.
    pub fn clock(&self) -> Clock {
        Clock::new(self.time.clone())
    }

    /// A clock that reads these hands, of a node that last stamped `last_us`.
    pub fn resume(&self, last_us: u64, offline_max: Duration) -> Clock {
        Clock::resume(self.time.clone(), last_us, offline_max)
    }

    /// Time passes on both hands.
    pub fn advance(&self, by: Duration) {
        let us = u64::try_from(by.as_micros()).unwrap_or(u64::MAX);
        self.time.monotonic_us.fetch_add(us, Ordering::AcqRel);
        self.time.wall_us.fetch_add(us, Ordering::AcqRel);
    }

    /// The wall clock jumps, by so many microseconds, either way.
    pub fn jump_wall_us(&self, by: i64) {
        let _ = self
            .time
            .wall_us
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |wall| {
                Some(wall.saturating_add_signed(by))
            });
    }
}

impl TimeSource for ManualTime {
    fn wall_us(&self) -> u64 {
        self.wall_us.load(Ordering::Acquire)
    }

    fn monotonic_us(&self) -> u64 {
        self.monotonic_us.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const START: u64 = 1_800_000_000_000_000;
    const YEAR_US: i64 = 365 * 24 * 3_600 * 1_000_000;

    #[test]
    fn stamps_follow_the_monotonic_clock_through_a_jump_of_a_year_either_way() {
        for jump in [YEAR_US, -YEAR_US] {
            let hands = ManualClock::new(START);
            let clock = hands.clock();
            let mut states = clock.watch();
            states.mark_unchanged();
            assert_eq!(clock.expiry_now_us(), Some(START));

            hands.jump_wall_us(jump);
            // Nobody has checked yet, and still nothing expires.
            assert_eq!(clock.expiry_now_us(), None);
            assert!(states.has_changed().unwrap());
            assert_eq!(*states.borrow_and_update(), ClockState::Jumped { behind_us: jump });
            for second in 1..=3_600 {
                hands.advance(Duration::from_secs(1));
                assert!(!clock.check().agrees());
                assert_eq!(clock.now_us(), START + second * 1_000_000);
            }
            let reason = clock.check().reason().unwrap();
            assert!(
                reason.contains(if jump > 0 { "ahead of" } else { "behind" }),
                "{reason}"
            );

            hands.jump_wall_us(-jump);
            assert_eq!(clock.check(), ClockState::Agree { behind_us: 0 });
            assert!(states.has_changed().unwrap(), "the end of the alarm is told");
            assert_eq!(clock.expiry_now_us(), Some(START + 3_600_000_000));
        }
    }

    #[test]
    fn a_restart_believes_the_wall_clock_only_within_bounds() {
        const DAY_US: i64 = 24 * 3_600 * 1_000_000;
        let week = Duration::from_secs(7 * 24 * 3_600);
        // So far is the wall clock ahead of the time when the node last ran.
        for (ahead, believed) in [
            (0, true),
            (7 * DAY_US, true),
            (7 * DAY_US + 1, false),
            (YEAR_US, false),
            (-29_999_999, true),
            (-30_000_000, false),
            (-YEAR_US, false),
        ] {
            let hands = ManualClock::new(START.saturating_add_signed(ahead));
            let clock = hands.resume(START, week);
            assert_eq!(clock.watch().borrow().agrees(), believed, "{ahead}");
            if believed {
                assert_eq!(clock.now_us(), START.saturating_add_signed(ahead));
                continue;
            }
            assert_eq!(clock.now_us(), START, "time goes on from where it ended");
            hands.advance(Duration::from_secs(3_600));
            assert_eq!(clock.expiry_now_us(), None);
            assert_eq!(clock.now_us(), START + 3_600_000_000);
            assert!(clock.check().reason().unwrap().contains("--accept-clock"));
            // Put right: the node was down for a day.
            hands.jump_wall_us(DAY_US - ahead);
            assert_eq!(clock.check(), ClockState::Agree { behind_us: 0 });
            assert_eq!(
                clock.expiry_now_us(),
                Some(START + 3_600_000_000 + DAY_US.unsigned_abs())
            );
            // From here on it is a clock like any other.
            hands.jump_wall_us(DAY_US);
            assert_eq!(clock.check(), ClockState::Jumped { behind_us: DAY_US });
        }
    }

    #[test]
    fn the_threshold_is_thirty_seconds() {
        for sign in [1, -1] {
            let hands = ManualClock::new(START);
            let clock = hands.clock();
            hands.jump_wall_us(sign * 29_999_999);
            assert!(clock.check().agrees());
            hands.jump_wall_us(sign);
            assert!(!clock.check().agrees());
        }
    }

    #[test]
    fn a_small_disagreement_is_followed_slowly_and_stamps_never_go_back() {
        for jump in [5_000_000_i64, -5_000_000] {
            let hands = ManualClock::new(START);
            let clock = hands.clock();
            hands.jump_wall_us(jump);
            let mut last = clock.now_us();
            let mut seconds = 0;
            while clock.check().behind_us() != 0 {
                hands.advance(Duration::from_secs(1));
                seconds += 1;
                let now = clock.now_us();
                assert!(now >= last, "went back from {last} to {now}");
                assert!(now - last <= 1_000_000 + 1_000, "jumped from {last} to {now}");
                last = now;
                assert!(seconds < 10_000, "never caught up");
            }
            assert_eq!(seconds, 5_001, "5 s at 1,000 ppm, and one more check to find it");
            assert_eq!(
                clock.now_us(),
                (START + seconds * 1_000_000).saturating_add_signed(jump)
            );
        }
    }

    #[test]
    fn many_checks_slew_no_faster_than_few() {
        let hands = ManualClock::new(START);
        let clock = hands.clock();
        hands.jump_wall_us(5_000_000);
        for _ in 0..100_000 {
            hands.advance(Duration::from_micros(100));
            clock.check();
        }
        let gained = clock.now_us() - START - 10_000_000;
        assert!(
            (9_900..=10_000).contains(&gained),
            "10 s at 1,000 ppm is 10,000 us, not {gained}"
        );
    }

    #[test]
    fn the_system_clock_runs() {
        let clock = Clock::system();
        let first = clock.now_us();
        assert!(first > 1_700_000_000_000_000);
        assert!(clock.now_us() >= first);
        assert!(clock.check().agrees());
        assert!(clock.monotonic_us() > 0);
    }
}
