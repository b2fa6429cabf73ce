//! Ways round the other hooks: refused so that the caller falls back on writing, or the end of the process.

use std::ffi::CStr;
use std::path::Path;

use libc::{c_char, c_int, c_long, c_uint, c_void, off_t, size_t, ssize_t};

use crate::fds::{self, Kind};
use crate::{paths, real};

fn watched(fd: c_int) -> bool {
    fds::get(fd) == Some(Kind::File)
}

fn stop(what: &str, fd: c_int) -> ! {
    crate::violation(what, &paths::of_fd(fd).unwrap_or_default())
}

/// "Not here": callers then read and write.
fn refuse() -> ssize_t {
    real::set_errno(libc::EINVAL);
    -1
}

unsafe fn mmap_any(at: *mut c_void, n: size_t, prot: c_int, flags: c_int, fd: c_int, off: off_t) -> *mut c_void {
    if fd >= 0 && prot & libc::PROT_WRITE != 0 && flags & libc::MAP_TYPE != libc::MAP_PRIVATE && watched(fd) {
        stop("a shared writable mapping of", fd);
    }
    // SAFETY: same contract; likewise below.
    unsafe { real::mmap(at, n, prot, flags, fd, off) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(at: *mut c_void, n: size_t, prot: c_int, flags: c_int, fd: c_int, off: off_t) -> *mut c_void {
    unsafe { mmap_any(at, n, prot, flags, fd, off) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    at: *mut c_void,
    n: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    off: off_t,
) -> *mut c_void {
    unsafe { mmap_any(at, n, prot, flags, fd, off) }
}

unsafe fn fopen_any(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    let writes = unsafe { CStr::from_ptr(mode) }
        .to_bytes()
        .iter()
        .any(|b| b"wa+".contains(b));
    if let (true, Some(at)) = (writes, unsafe { paths::below(libc::AT_FDCWD, path) }) {
        crate::violation("fopen for writing of", &at);
    }
    unsafe { real::fopen(path, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fopen(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    unsafe { fopen_any(path, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    unsafe { fopen_any(path, mode) }
}

/// Cutting by path, which nothing that we run does.
#[unsafe(no_mangle)]
unsafe extern "C" fn truncate(path: *const c_char, to: off_t) -> c_int {
    let c_path = path;
    if let Some(at) = unsafe { paths::below(libc::AT_FDCWD, path) } {
        crate::violation("truncate by path of", &at);
    }
    let fd = unsafe { real::openat(libc::AT_FDCWD, c_path, libc::O_WRONLY | libc::O_CLOEXEC, 0) };
    if fd < 0 {
        return -1;
    }
    let r = unsafe { real::ftruncate(fd, to) };
    unsafe { real::close(fd) };
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    n: size_t,
    flags: c_uint,
) -> ssize_t {
    if watched(to) {
        return refuse();
    }
    unsafe { real::copy_file_range(from, from_at, to, to_at, n, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendfile(to: c_int, from: c_int, at: *mut off_t, n: size_t) -> ssize_t {
    if watched(to) {
        return refuse();
    }
    unsafe { real::sendfile(to, from, at, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendfile64(to: c_int, from: c_int, at: *mut off_t, n: size_t) -> ssize_t {
    unsafe { sendfile(to, from, at, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn splice(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    n: size_t,
    flags: c_uint,
) -> ssize_t {
    if watched(to) {
        return refuse();
    }
    unsafe { real::splice(from, from_at, to, to_at, n, flags) }
}

/// Raw system calls. Six arguments are passed on; a caller that gave fewer does not notice.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long {
    match number {
        libc::SYS_write
        | libc::SYS_pwrite64
        | libc::SYS_writev
        | libc::SYS_pwritev
        | libc::SYS_pwritev2
        | libc::SYS_fsync
        | libc::SYS_fdatasync
        | libc::SYS_ftruncate
        | libc::SYS_fallocate
            if watched(a as c_int) =>
        {
            stop("a raw system call on", a as c_int)
        }
        libc::SYS_copy_file_range if watched(c as c_int) => return refuse() as c_long,
        libc::SYS_io_uring_setup if paths::watched().is_some() => crate::violation("io_uring", Path::new("in use")),
        _ => {}
    }
    unsafe { real::syscall(number, a, b, c, d, e, f) }
}
