//! The machine that a simulation believes to run on: its clock, its randomness, its sleep and its syncs.
//!
//! The functions below take the place of libc's in this test binary. On a thread that has [entered](enter) a simulation
//! time is what the simulation says, random bytes come from its seed (those of hash maps and of `rand`, too), waiting for
//! events never waits but tells the simulation until when it would have, and what was synced is written down, so that a
//! power failure can take the rest. On every other thread (RocksDB has some) they do what they always do.
//!
//! So nothing in the product has to be told of the simulation to repeat itself exactly.
#![allow(unsafe_code)] // Functions with the names of libc's, and the system calls behind them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use libc::{c_int, c_long, c_void};

/// What the monotonic clock shows when a simulation begins.
const MONOTONIC_S: u64 = 1_000_000;
/// What the wall clock shows then.
const WALL_S: u64 = 1_750_000_000;

/// A file as a power failure would leave it, at worst.
#[derive(Debug, Clone, Default)]
pub struct Synced {
    pub len: u64,
    /// Only of small files.
    pub content: Option<Vec<u8>>,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(0) };
    /// Set when a runtime would wait: until when, if anything would end the wait by itself.
    static IDLE: Cell<Option<Option<u64>>> = const { Cell::new(None) };
    static SLICE: RefCell<Option<Waker>> = const { RefCell::new(None) };
    static SYNCED: RefCell<BTreeMap<PathBuf, Synced>> = const { RefCell::new(BTreeMap::new()) };
    /// Of so many syncs of a write-ahead log one is skipped; 0: none.
    static SKIP_ONE_IN: Cell<u64> = const { Cell::new(0) };
    /// Random bytes given so far.
    static DRAWN: Cell<u64> = const { Cell::new(0) };
}

/// SplitMix64.
pub fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Makes this thread, which must be a new one, the thread of a simulation.
pub fn enter(seed: u64) {
    RANDOM.set(seed ^ 0x005E_ED0F_0571_0000);
    NOW_NS.set(0);
    INSIDE.set(true);
    mainstem::base::blocking::run_in_place_on_this_thread();
}

/// Nanoseconds since the simulation began.
pub fn set_now(now_ns: u64) {
    NOW_NS.set(now_ns);
}

/// The simulated disk forgets to sync, once in so many times.
pub fn skip_one_sync_in(n: u64) {
    SKIP_ONE_IN.set(n);
}

/// How many random bytes were asked for so far.
pub fn drawn() -> u64 {
    DRAWN.get()
}

/// What was synced of a file; nothing, if it never was.
pub fn synced(path: &Path) -> Synced {
    SYNCED.with_borrow(|all| all.get(path).cloned().unwrap_or_default())
}

/// Notes that a file is on disk as it is.
pub fn note_synced(path: &Path, synced: Synced) {
    SYNCED.with_borrow_mut(|all| drop(all.insert(path.to_owned(), synced)));
}

/// Ends when every task of the runtime waits; with the time until which, in nanoseconds, if a timer runs.
pub struct UntilIdle;

impl Future for UntilIdle {
    type Output = Option<u64>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u64>> {
        match IDLE.take() {
            Some(until) => {
                SLICE.set(None);
                Poll::Ready(until)
            }
            None => {
                SLICE.set(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

fn put_time(out: *mut libc::timespec, seconds: u64, nanos: u64) {
    // SAFETY: the caller of `clock_gettime` gives a place for the time.
    unsafe {
        (*out).tv_sec = seconds as libc::time_t;
        (*out).tv_nsec = nanos as c_long;
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, out: *mut libc::timespec) -> c_int {
    let base = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => WALL_S,
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_MONOTONIC_RAW | libc::CLOCK_BOOTTIME => {
            MONOTONIC_S
        }
        _ => 0,
    };
    if base == 0 || !INSIDE.get() {
        // SAFETY: the system call that libc makes, with the caller's arguments.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock as c_long, out) } as c_int;
    }
    let now = NOW_NS.get();
    put_time(out, base + now / 1_000_000_000, now % 1_000_000_000);
    0
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, len: usize, flags: libc::c_uint) -> isize {
    if !INSIDE.get() {
        // SAFETY: the system call that libc makes, with the caller's arguments.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) } as isize;
    }
    DRAWN.set(DRAWN.get() + len as u64);
    let mut state = RANDOM.get();
    for at in 0..len {
        let byte = (mix(&mut state) >> 32) as u8;
        // SAFETY: the caller gives a buffer of `len` bytes.
        unsafe { buffer.cast::<u8>().add(at).write(byte) };
    }
    RANDOM.set(state);
    len as isize
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(epoll: c_int, events: *mut libc::epoll_event, max: c_int, timeout: c_int) -> c_int {
    let inside = INSIDE.get();
    let timeout_now = if inside { 0 } else { timeout };
    // SAFETY: the system call that libc makes, with the caller's arguments but the timeout.
    let found = unsafe {
        libc::syscall(
            libc::SYS_epoll_wait,
            c_long::from(epoll),
            events,
            c_long::from(max),
            c_long::from(timeout_now),
        )
    } as c_int;
    if !inside || found != 0 || timeout == 0 {
        return found;
    }
    // Nothing to do before the timeout: back to the simulation, which knows what comes next.
    let until = u64::try_from(timeout).ok().map(|ms| NOW_NS.get() + ms * 1_000_000);
    IDLE.set(Some(until));
    let slice = SLICE.with_borrow(Clone::clone);
    if let Some(waker) = slice {
        waker.wake();
    }
    0
}

/// What is written down of a sync; false: it did not take place.
fn note_sync(fd: c_int) -> bool {
    let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{fd}")) else {
        return true;
    };
    let is_wal = path.extension().is_some_and(|e| e.as_bytes() == b"log");
    if is_wal && SKIP_ONE_IN.get() > 0 {
        let mut state = RANDOM.get();
        let skipped = mix(&mut state).is_multiple_of(SKIP_ONE_IN.get());
        RANDOM.set(state);
        if skipped {
            return false;
        }
    }
    let is_witness = path.file_name().is_some_and(|n| n.as_bytes() == b"witness");
    if is_wal || is_witness {
        let len = std::fs::metadata(&path).map_or(0, |m| m.len());
        let content = is_witness.then(|| std::fs::read(&path).unwrap_or_default());
        note_synced(&path, Synced { len, content });
    }
    true
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    if !INSIDE.get() {
        // SAFETY: the system call that libc makes, with the caller's argument.
        return unsafe { libc::syscall(libc::SYS_fdatasync, c_long::from(fd)) } as c_int;
    }
    note_sync(fd);
    0
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    if !INSIDE.get() {
        // SAFETY: the system call that libc makes, with the caller's argument.
        return unsafe { libc::syscall(libc::SYS_fsync, c_long::from(fd)) } as c_int;
    }
    note_sync(fd);
    0
}

/// Overwrites a file from its beginning.
pub fn overwrite(path: &Path, content: &[u8]) -> std::io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all_at(content, 0)
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(out: *mut libc::timeval, _zone: *mut c_void) -> c_int {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for the time is given; so does the caller.
    unsafe {
        clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
        (*out).tv_sec = now.tv_sec;
        (*out).tv_usec = now.tv_nsec / 1_000;
    }
    0
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(out: *mut libc::time_t) -> libc::time_t {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for the time is given; the caller's, if there is one, too.
    unsafe {
        clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
        if !out.is_null() {
            *out = now.tv_sec;
        }
    }
    now.tv_sec
}
