//! Writing, cutting and reserving.

use std::sync::atomic::Ordering::Relaxed;

use libc::{c_int, c_void, iovec, off_t, size_t, ssize_t};

use crate::fds::{self, Kind};
use crate::world::{self, stat_fd};
use crate::{config, paths, real};

/// A write of `n` bytes at `at` (or at the descriptor's own position). `write` does it, for at most so many bytes.
fn written(fd: c_int, n: usize, at: Option<off_t>, write: impl FnOnce(usize) -> ssize_t) -> ssize_t {
    config::WRITES.fetch_add(1, Relaxed);
    if let Some(e) = config::FAIL_WRITES.hit(|| paths::of_fd(fd)) {
        real::set_errno(e);
        return -1;
    }
    if !config::slow() {
        let r = write(n);
        config::WRITTEN_BYTES.fetch_add(r.max(0) as u64, Relaxed);
        return r;
    }
    let mut world = world::hold();
    let size = stat_fd(fd).map_or(0, |s| s.st_size as u64);
    // SAFETY: these calls take numbers only.
    let from = unsafe {
        if real::fcntl(fd, libc::F_GETFL, 0) & libc::O_APPEND != 0 {
            size
        } else {
            at.unwrap_or_else(|| libc::lseek(fd, 0, libc::SEEK_CUR)) as u64
        }
    };
    let growth = (from + n as u64).saturating_sub(size);
    let missing = growth - config::take_space(growth);
    if missing >= n as u64 && n > 0 && missing > 0 {
        config::give_space(growth - missing);
        real::set_errno(libc::ENOSPC);
        return -1;
    }
    let n = n - missing as usize;
    if config::on(&config::POWER) {
        world.touch(fd, size, from, from + n as u64);
    }
    let r = write(n);
    let errno = real::errno();
    config::WRITTEN_BYTES.fetch_add(r.max(0) as u64, Relaxed);
    if config::on(&config::POWER) {
        world.changed(fd);
        world.step();
    }
    real::set_errno(errno);
    r
}

fn watched(fd: c_int) -> bool {
    fds::get(fd) == Some(Kind::File)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t {
    // SAFETY: same contract, and never more bytes than the caller gave; likewise below.
    if !watched(fd) {
        return unsafe { real::write(fd, buf, n) };
    }
    written(fd, n, None, |n| unsafe { real::write(fd, buf, n) })
}

unsafe fn pwrite_any(fd: c_int, buf: *const c_void, n: size_t, at: off_t) -> ssize_t {
    if !watched(fd) {
        return unsafe { real::pwrite(fd, buf, n, at) };
    }
    written(fd, n, Some(at), |n| unsafe { real::pwrite(fd, buf, n, at) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite(fd: c_int, buf: *const c_void, n: size_t, at: off_t) -> ssize_t {
    unsafe { pwrite_any(fd, buf, n, at) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite64(fd: c_int, buf: *const c_void, n: size_t, at: off_t) -> ssize_t {
    unsafe { pwrite_any(fd, buf, n, at) }
}

unsafe fn length(iov: *const iovec, n: c_int) -> usize {
    (0..usize::try_from(n).unwrap_or(0))
        .map(|i| unsafe { (*iov.add(i)).iov_len })
        .sum()
}

/// Of several buffers only the first is written where not all fit: a short write, which is allowed.
unsafe fn vector(fd: c_int, iov: *const iovec, n: c_int, at: Option<off_t>, all: impl FnOnce() -> ssize_t) -> ssize_t {
    if !watched(fd) {
        return all();
    }
    let bytes = unsafe { length(iov, n) };
    written(fd, bytes, at, |granted| {
        if granted == bytes {
            return all();
        }
        let first = unsafe { &*iov };
        let granted = granted.min(first.iov_len);
        match at {
            None => unsafe { real::write(fd, first.iov_base, granted) },
            Some(at) => unsafe { real::pwrite(fd, first.iov_base, granted, at) },
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn writev(fd: c_int, iov: *const iovec, n: c_int) -> ssize_t {
    unsafe { vector(fd, iov, n, None, || real::writev(fd, iov, n)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev(fd: c_int, iov: *const iovec, n: c_int, at: off_t) -> ssize_t {
    unsafe { vector(fd, iov, n, Some(at), || real::pwritev(fd, iov, n, at)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev64(fd: c_int, iov: *const iovec, n: c_int, at: off_t) -> ssize_t {
    unsafe { vector(fd, iov, n, Some(at), || real::pwritev(fd, iov, n, at)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev2(fd: c_int, iov: *const iovec, n: c_int, at: off_t, flags: c_int) -> ssize_t {
    let place = (at >= 0).then_some(at);
    unsafe { vector(fd, iov, n, place, || real::pwritev2(fd, iov, n, at, flags)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev64v2(fd: c_int, iov: *const iovec, n: c_int, at: off_t, flags: c_int) -> ssize_t {
    unsafe { pwritev2(fd, iov, n, at, flags) }
}

/// A change of size or of a range, other than by writing.
fn reshaped(fd: c_int, plan: impl FnOnce(u64) -> Option<(u64, u64, i64)>, act: impl FnOnce() -> c_int) -> c_int {
    if !watched(fd) || !config::slow() {
        return act();
    }
    let mut world = world::hold();
    let size = stat_fd(fd).map_or(0, |s| s.st_size as u64);
    if let Some((from, to, growth)) = plan(size) {
        if growth > 0 && config::on(&config::SPACE_LIMITED) && config::SPACE_LEFT.load(Relaxed) < growth {
            real::set_errno(libc::ENOSPC);
            return -1;
        }
        if from < to && config::on(&config::POWER) {
            world.touch(fd, size, from, to);
        }
        if growth < 0 {
            config::give_space(growth.unsigned_abs());
        }
    }
    let r = act();
    let errno = real::errno();
    if config::on(&config::POWER) {
        world.changed(fd);
        world.step();
    }
    real::set_errno(errno);
    r
}

unsafe fn ftruncate_any(fd: c_int, to: off_t) -> c_int {
    let plan = |size: u64| {
        let to = to.max(0) as u64;
        // Growing makes a hole: it takes no space.
        Some((
            to.min(size),
            to.max(size),
            if to < size { -((size - to) as i64) } else { 0 },
        ))
    };
    reshaped(fd, plan, || unsafe { real::ftruncate(fd, to) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate(fd: c_int, to: off_t) -> c_int {
    unsafe { ftruncate_any(fd, to) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate64(fd: c_int, to: off_t) -> c_int {
    unsafe { ftruncate_any(fd, to) }
}

unsafe fn fallocate_any(fd: c_int, mode: c_int, at: off_t, n: off_t) -> c_int {
    let plan = |size: u64| {
        let (from, to) = (at.max(0) as u64, at.saturating_add(n).max(0) as u64);
        let grows = to.saturating_sub(size) as i64;
        match mode {
            // Space is asked for, nothing can be seen. It is counted when it is written.
            libc::FALLOC_FL_KEEP_SIZE => Some((0, 0, grows)),
            0 => Some((size, to, grows)),
            // Punched, zeroed, collapsed …: everything from there on may change.
            _ => Some((from.min(size), to.max(size), 0)),
        }
    };
    reshaped(fd, plan, || unsafe { real::fallocate(fd, mode, at, n) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, at: off_t, n: off_t) -> c_int {
    unsafe { fallocate_any(fd, mode, at, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, at: off_t, n: off_t) -> c_int {
    unsafe { fallocate_any(fd, mode, at, n) }
}

unsafe fn posix_fallocate_any(fd: c_int, at: off_t, n: off_t) -> c_int {
    // Gives the error back instead of setting it.
    let before = real::errno();
    let r = unsafe { fallocate_any(fd, 0, at, n) };
    let error = if r == 0 { 0 } else { real::errno() };
    real::set_errno(before);
    error
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_fallocate(fd: c_int, at: off_t, n: off_t) -> c_int {
    unsafe { posix_fallocate_any(fd, at, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_fallocate64(fd: c_int, at: off_t, n: off_t) -> c_int {
    unsafe { posix_fallocate_any(fd, at, n) }
}
