//! When how much was appended to a log: what a replica lacks, in bytes and in time. Bounded, and the finer the more
//! recent: what it tells of the past is right to within an eighth of its age.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Entries appended within this time are one mark.
const FINEST: Duration = Duration::from_millis(10);
/// Marks older than this many times the space between them are merged.
const COARSENESS: u32 = 8;
const MARKS_MAX: usize = 512;

/// What a replica lacks of a log. Lower bounds, where the log is older than the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogLag {
    pub bytes: u64,
    /// For how long the first entry that it lacks has been in the log.
    pub time: Duration,
}

/// Entries up to an index, inclusive, that were appended together.
#[derive(Debug, Clone, Copy)]
struct Mark {
    last: u64,
    /// Bytes of everything up to `last`, since the beginning of the trail.
    bytes: u64,
    /// When the first of them was appended.
    at: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// The trail knows of entries above this one.
    begins_after: u64,
    /// Bytes of everything up to `begins_after`; not zero once marks were dropped.
    begins_bytes: u64,
    marks: VecDeque<Mark>,
}

impl Trail {
    /// The entry at `index`, the next one, was appended.
    pub fn note(&mut self, index: u64, bytes: u64, now: Instant) {
        let total = match self.marks.back_mut() {
            Some(mark) if now.saturating_duration_since(mark.at) < FINEST => {
                mark.last = index;
                mark.bytes += bytes;
                return;
            }
            Some(mark) => mark.bytes,
            None => {
                self.begins_after = index.saturating_sub(1);
                self.begins_bytes
            }
        };
        self.marks.push_back(Mark {
            last: index,
            bytes: total + bytes,
            at: now,
        });
        if self.marks.len() >= MARKS_MAX {
            self.thin(now);
        }
    }

    /// Entries above `last` were taken away.
    pub fn truncate(&mut self, last: u64) {
        while let Some(mark) = self.marks.pop_back() {
            let (before, bytes_before) = self.end();
            if before >= last {
                continue;
            }
            if mark.last > last {
                let bytes = share(bytes_before, mark.bytes, last - before, mark.last - before);
                self.marks.push_back(Mark { last, bytes, ..mark });
            } else {
                self.marks.push_back(mark);
            }
            return;
        }
    }

    /// What somebody lacks who has everything up to `matched`, inclusive.
    pub fn lag(&self, matched: Option<u64>, now: Instant) -> LogLag {
        let (last, total) = self.end();
        let Some(matched) = matched.filter(|m| *m >= self.begins_after) else {
            // Also what is older, of which nothing is known.
            return LogLag {
                bytes: total.saturating_sub(self.begins_bytes),
                time: self
                    .marks
                    .front()
                    .map_or(Duration::ZERO, |mark| now.saturating_duration_since(mark.at)),
            };
        };
        if matched >= last {
            return LogLag::default();
        }
        let at = self.marks.partition_point(|mark| mark.last <= matched);
        let (before, bytes_before) = match at.checked_sub(1).and_then(|i| self.marks.get(i)) {
            Some(mark) => (mark.last, mark.bytes),
            None => (self.begins_after, self.begins_bytes),
        };
        let Some(mark) = self.marks.get(at) else {
            return LogLag::default();
        };
        let has = share(bytes_before, mark.bytes, matched - before, mark.last - before);
        LogLag {
            bytes: total - has,
            time: now.saturating_duration_since(mark.at),
        }
    }

    /// The last entry, and the bytes up to it.
    fn end(&self) -> (u64, u64) {
        match self.marks.back() {
            Some(mark) => (mark.last, mark.bytes),
            None => (self.begins_after, self.begins_bytes),
        }
    }

    fn thin(&mut self, now: Instant) {
        let mut kept: VecDeque<Mark> = VecDeque::with_capacity(MARKS_MAX);
        for (i, mark) in self.marks.iter().enumerate() {
            // A mark reaches up to the next one: the whole of what is merged must be short for its age.
            let end = self.marks.get(i + 1).map_or(now, |next| next.at);
            match kept.back_mut() {
                Some(before) if (end - before.at) * COARSENESS < now.saturating_duration_since(before.at) => {
                    before.last = mark.last;
                    before.bytes = mark.bytes;
                }
                Some(_) | None => kept.push_back(*mark),
            }
        }
        // Half of them, so that this is seldom done.
        while kept.len() > MARKS_MAX / 2
            && let Some(mark) = kept.pop_front()
        {
            self.begins_after = mark.last;
            self.begins_bytes = mark.bytes;
        }
        self.marks = kept;
    }
}

/// From `from` to `to`, so far as `part` is of `whole`.
fn share(from: u64, to: u64, part: u64, whole: u64) -> u64 {
    let bytes = u128::from(to - from) * u128::from(part) / u128::from(whole.max(1));
    from + u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_lag_is_what_was_appended_since() {
        let (mut trail, t) = (Trail::default(), Instant::now());
        assert_eq!(trail.lag(None, t), LogLag::default());
        // Twenty entries of 100 bytes, one in 20 ms; before them there were ten that nobody has seen.
        for i in 0..20u32 {
            trail.note(10 + u64::from(i), 100, t + 20 * i * MS);
        }
        let now = t + 1_000 * MS;
        assert_eq!(trail.lag(Some(29), now), LogLag::default());
        let lag = |bytes, ms| LogLag { bytes, time: ms * MS };
        assert_eq!(trail.lag(Some(28), now), lag(100, 620));
        assert_eq!(trail.lag(Some(9), now), lag(2_000, 1_000));
        // At least that.
        assert_eq!(trail.lag(Some(3), now), lag(2_000, 1_000));
        assert_eq!(trail.lag(None, now), lag(2_000, 1_000));
    }

    #[test]
    fn what_is_truncated_is_lacked_by_nobody() {
        let (mut trail, t) = (Trail::default(), Instant::now());
        for i in 0..100u32 {
            trail.note(u64::from(i), 10, t + i * MS);
        }
        trail.truncate(54);
        assert_eq!(trail.lag(Some(54), t + 200 * MS), LogLag::default());
        assert_eq!(trail.lag(Some(44), t + 200 * MS).bytes, 100);
        trail.note(55, 10, t + 300 * MS);
        assert_eq!(trail.lag(Some(54), t + 300 * MS).bytes, 10);
        trail.truncate(0);
        trail.note(1, 10, t + 300 * MS);
        assert_eq!(trail.lag(Some(0), t + 300 * MS).bytes, 10);
    }

    /// However long it grows, it stays small, and right to within an eighth.
    #[test]
    fn the_past_is_coarser() {
        let (mut trail, t) = (Trail::default(), Instant::now());
        let spaced = 15 * MS;
        let count = 200_000u32;
        for i in 0..count {
            trail.note(u64::from(i) + 1, 7, t + i * spaced);
            assert!(trail.marks.len() <= MARKS_MAX);
        }
        let now = t + count * spaced;
        let oldest = u32::try_from(trail.begins_after).expect("small") + 1;
        assert!(oldest < count / 2, "it reaches back: {oldest}");
        for behind in [1, 2, 10, 100, 1_000, 10_000, 100_000] {
            let lag = trail.lag(Some(u64::from(count - behind)), now);
            let (time, bytes) = (behind * spaced, u64::from(behind) * 7);
            let near = |told: f64, is: f64| (told - is).abs() <= is / 7.0 + 0.001;
            assert!(near(lag.time.as_secs_f64(), time.as_secs_f64()), "{behind}: {lag:?}");
            assert!(near(lag.bytes as f64, bytes as f64), "{behind}: {lag:?}");
        }
    }
}
