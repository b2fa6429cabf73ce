//! How full the disk is said to be.

use std::sync::atomic::Ordering::Relaxed;

use libc::{c_char, c_int, statfs as statfs_t, statvfs as statvfs_t};

use crate::{config, fds, paths, real};

fn left(block: u64) -> u64 {
    config::SPACE_LEFT.load(Relaxed).max(0) as u64 / block.max(1)
}

unsafe fn vfs(r: c_int, concerned: bool, out: *mut statvfs_t) -> c_int {
    if r == 0 && concerned && config::on(&config::SPACE_LIMITED) {
        // SAFETY: the call has filled it in.
        let out = unsafe { &mut *out };
        let blocks = left(out.f_frsize);
        out.f_bfree = blocks;
        out.f_bavail = blocks;
    }
    r
}

unsafe fn fs(r: c_int, concerned: bool, out: *mut statfs_t) -> c_int {
    if r == 0 && concerned && config::on(&config::SPACE_LIMITED) {
        // SAFETY: the call has filled it in.
        let out = unsafe { &mut *out };
        let blocks = left(out.f_bsize as u64);
        out.f_bfree = blocks;
        out.f_bavail = blocks;
    }
    r
}

unsafe fn below(path: *const c_char) -> bool {
    config::on(&config::SPACE_LIMITED) && unsafe { paths::below(libc::AT_FDCWD, path) }.is_some()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn statvfs(path: *const c_char, out: *mut statvfs_t) -> c_int {
    unsafe { vfs(real::statvfs(path, out), below(path), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn statvfs64(path: *const c_char, out: *mut statvfs_t) -> c_int {
    unsafe { vfs(real::statvfs(path, out), below(path), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fstatvfs(fd: c_int, out: *mut statvfs_t) -> c_int {
    unsafe { vfs(real::fstatvfs(fd, out), fds::get(fd).is_some(), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fstatvfs64(fd: c_int, out: *mut statvfs_t) -> c_int {
    unsafe { vfs(real::fstatvfs(fd, out), fds::get(fd).is_some(), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn statfs(path: *const c_char, out: *mut statfs_t) -> c_int {
    unsafe { fs(real::statfs(path, out), below(path), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn statfs64(path: *const c_char, out: *mut statfs_t) -> c_int {
    unsafe { fs(real::statfs(path, out), below(path), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fstatfs(fd: c_int, out: *mut statfs_t) -> c_int {
    unsafe { fs(real::fstatfs(fd, out), fds::get(fd).is_some(), out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fstatfs64(fd: c_int, out: *mut statfs_t) -> c_int {
    unsafe { fs(real::fstatfs(fd, out), fds::get(fd).is_some(), out) }
}
