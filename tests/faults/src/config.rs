//! What is switched on. Set from the environment and by the control socket, read without locks.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Unsynced writes are kept track of.
pub static POWER: AtomicBool = AtomicBool::new(false);
/// A file's sync also makes every name durable that was given before it (ext4, xfs); otherwise only the directory's.
pub static NAMES_WITH_FILES: AtomicBool = AtomicBool::new(false);
/// Syncs succeed and do nothing. For checking the checkers.
pub static SYNCS_LIE: AtomicBool = AtomicBool::new(false);
pub static SYNC_DELAY_US: AtomicU64 = AtomicU64::new(0);
pub static CLOCK_OFFSET_US: AtomicI64 = AtomicI64::new(0);

pub static SPACE_LIMITED: AtomicBool = AtomicBool::new(false);
/// Bytes that may still be written, while limited.
pub static SPACE_LEFT: AtomicI64 = AtomicI64::new(0);

/// Steps (writes, syncs begun and ended, names) since the start.
pub static STEPS: AtomicU64 = AtomicU64::new(0);
/// The power fails at this step; 0: never.
pub static POWER_AT: AtomicU64 = AtomicU64::new(0);
pub static POWER_SEED: AtomicU64 = AtomicU64::new(0);

pub static WRITES: AtomicU64 = AtomicU64::new(0);
pub static WRITTEN_BYTES: AtomicU64 = AtomicU64::new(0);
pub static SYNCS: AtomicU64 = AtomicU64::new(0);
pub static DIR_SYNCS: AtomicU64 = AtomicU64::new(0);

pub fn on(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

/// Whether calls must go through the lock.
pub fn slow() -> bool {
    on(&POWER) || on(&SPACE_LIMITED)
}

/// Makes some calls of one sort fail.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Matching calls to let pass first.
    pub pass: u64,
    /// Calls to fail after that.
    pub times: u64,
    pub errno: i32,
    /// Only files whose path contains this; empty: all.
    pub path: String,
}

pub struct Rules {
    set: AtomicBool,
    rules: Mutex<Vec<Rule>>,
}

pub static FAIL_SYNCS: Rules = Rules::new();
pub static FAIL_WRITES: Rules = Rules::new();

impl Rules {
    const fn new() -> Self {
        Self {
            set: AtomicBool::new(false),
            rules: Mutex::new(Vec::new()),
        }
    }

    fn rules(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, rule: Rule) {
        self.rules().push(rule);
        self.set.store(true, Ordering::Release);
    }

    pub fn clear(&self) {
        self.rules().clear();
        self.set.store(false, Ordering::Release);
    }

    /// The error that this call must return, if any.
    pub fn hit(&self, path: impl FnOnce() -> Option<std::path::PathBuf>) -> Option<i32> {
        if !self.set.load(Ordering::Acquire) {
            return None;
        }
        let path = path().unwrap_or_default();
        let path = path.to_string_lossy();
        for rule in self
            .rules()
            .iter_mut()
            .filter(|r| r.times > 0 && path.contains(&r.path))
        {
            if rule.pass > 0 {
                rule.pass -= 1;
            } else {
                rule.times -= 1;
                return Some(rule.errno);
            }
        }
        None
    }
}

/// Takes up to `wanted` bytes from the space that is left; returns how many were granted.
pub fn take_space(wanted: u64) -> u64 {
    if !on(&SPACE_LIMITED) {
        return wanted;
    }
    let granted = SPACE_LEFT.load(Ordering::Relaxed).max(0).min(wanted as i64);
    SPACE_LEFT.fetch_sub(granted, Ordering::Relaxed);
    granted as u64
}

pub fn give_space(bytes: u64) {
    if on(&SPACE_LIMITED) {
        SPACE_LEFT.fetch_add(bytes as i64, Ordering::Relaxed);
    }
}
