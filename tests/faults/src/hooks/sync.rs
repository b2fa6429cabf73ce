//! Syncing.

use std::sync::atomic::Ordering::Relaxed;

use libc::{c_int, c_uint, off_t, timespec};

use crate::fds::{self, Kind};
use crate::{config, paths, real, world};

fn delay() {
    let us = config::SYNC_DELAY_US.load(Relaxed);
    if us > 0 {
        let time = timespec {
            tv_sec: (us / 1_000_000) as i64,
            tv_nsec: (us % 1_000_000 * 1000) as i64,
        };
        // SAFETY: `time` outlives the call. An interrupted sleep is short by little; a test does not mind.
        unsafe { real::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &time, std::ptr::null_mut()) };
    }
}

fn synced(fd: c_int, sync: impl FnOnce() -> c_int) -> c_int {
    let kind = fds::get(fd);
    if kind.is_none() {
        if paths::watched().is_none() {
            delay();
        }
        return sync();
    }
    let counter = if kind == Some(Kind::File) {
        &config::SYNCS
    } else {
        &config::DIR_SYNCS
    };
    counter.fetch_add(1, Relaxed);
    let power = config::on(&config::POWER);
    let lies = config::on(&config::SYNCS_LIE);
    let mut file = None;
    let mut names = 0;
    let mut dir = None;
    if power {
        // What is written while the sync runs is not covered by it.
        let mut world = world::hold();
        match kind {
            Some(Kind::File) => file = world.begin_sync(fd),
            _ => {
                dir = paths::of_fd(fd);
                names = world.names.begin_sync();
            }
        }
        world.step();
    }
    delay();
    let failure = config::FAIL_SYNCS.hit(|| paths::of_fd(fd));
    let r = match failure {
        Some(_) => -1,
        None if lies => 0,
        None => sync(),
    };
    let errno = failure.unwrap_or_else(real::errno);
    if power && !lies {
        let mut world = world::hold();
        if let Some(ticket) = file {
            world.end_sync(ticket, r == 0);
        } else if let (Some(dir), 0) = (dir, r) {
            let all = config::on(&config::NAMES_WITH_FILES);
            world.names_durable((!all).then_some(dir.as_path()), names);
        }
        // Durable, but nobody has been told yet: a good moment for an accident.
        world.step();
    }
    real::set_errno(errno);
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    // SAFETY: takes a number only; likewise below.
    synced(fd, || unsafe { real::fsync(fd) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    synced(fd, || unsafe { real::fdatasync(fd) })
}

/// Starts writing back and promises nothing: no metadata, no flush of the disk's cache. So nothing becomes durable.
#[unsafe(no_mangle)]
unsafe extern "C" fn sync_file_range(fd: c_int, at: off_t, n: off_t, flags: c_uint) -> c_int {
    unsafe { real::sync_file_range(fd, at, n, flags) }
}
