//! The wall clock, which may be off. The monotonic clock never is, and a wait until a wall-clock time waits as long as
//! its caller meant to.

use std::sync::atomic::Ordering::Relaxed;

use libc::{c_int, c_void, clockid_t, pthread_cond_t, pthread_mutex_t, time_t, timespec, timeval};

use crate::{config, real};

fn offset_us() -> i64 {
    config::CLOCK_OFFSET_US.load(Relaxed)
}

fn is_wall(clock: clockid_t) -> bool {
    matches!(
        clock,
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE | libc::CLOCK_TAI
    )
}

fn shifted(t: timespec, us: i64) -> timespec {
    let ns = t.tv_nsec + us % 1_000_000 * 1000;
    timespec {
        tv_sec: t.tv_sec + us / 1_000_000 + ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: clockid_t, out: *mut timespec) -> c_int {
    // SAFETY: same contract; `out` was filled in when the call succeeds. Likewise below.
    let r = unsafe { real::clock_gettime(clock, out) };
    let us = offset_us();
    if us != 0 && r == 0 && is_wall(clock) {
        unsafe { *out = shifted(*out, us) };
    }
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn gettimeofday(out: *mut timeval, _zone: *mut c_void) -> c_int {
    let mut t = timespec { tv_sec: 0, tv_nsec: 0 };
    let r = unsafe { clock_gettime(libc::CLOCK_REALTIME, &mut t) };
    if r == 0 && !out.is_null() {
        unsafe {
            *out = timeval {
                tv_sec: t.tv_sec,
                tv_usec: t.tv_nsec / 1000,
            }
        };
    }
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn time(out: *mut time_t) -> time_t {
    let now = real::now() + offset_us() / 1_000_000;
    if !out.is_null() {
        unsafe { *out = now };
    }
    now
}

/// A deadline by our wall clock, told by the kernel's. Times this small are of the monotonic clock.
unsafe fn deadline(at: *const timespec) -> timespec {
    let at = unsafe { *at };
    if at.tv_sec < 1_000_000_000 {
        at
    } else {
        shifted(at, -offset_us())
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_cond_timedwait(
    cond: *mut pthread_cond_t,
    m: *mut pthread_mutex_t,
    at: *const timespec,
) -> c_int {
    unsafe { real::pthread_cond_timedwait(cond, m, &deadline(at)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_cond_clockwait(
    cond: *mut pthread_cond_t,
    m: *mut pthread_mutex_t,
    clock: clockid_t,
    at: *const timespec,
) -> c_int {
    unsafe { real::pthread_cond_clockwait(cond, m, clock, &deadline(at)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_mutex_timedlock(m: *mut pthread_mutex_t, at: *const timespec) -> c_int {
    unsafe { real::pthread_mutex_timedlock(m, &deadline(at)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sem_timedwait(s: *mut libc::sem_t, at: *const timespec) -> c_int {
    unsafe { real::sem_timedwait(s, &deadline(at)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clock_nanosleep(
    clock: clockid_t,
    flags: c_int,
    at: *const timespec,
    left: *mut timespec,
) -> c_int {
    if flags & libc::TIMER_ABSTIME != 0 && is_wall(clock) {
        return unsafe { real::clock_nanosleep(clock, flags, &deadline(at), left) };
    }
    unsafe { real::clock_nanosleep(clock, flags, at, left) }
}
