//! The C library's own functions, found behind this library by `dlsym(RTLD_NEXT)`. Everything inside this crate calls
//! these, never the interposed names: it would recurse.

use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{
    c_char, c_int, c_long, c_uint, c_void as cvoid, clockid_t, iovec, mode_t, off_t, pthread_cond_t, pthread_mutex_t,
    size_t, ssize_t, statfs as statfs_t, statvfs as statvfs_t, time_t, timespec,
};

macro_rules! real {
    ($( $(#[version = $version:literal])? fn $name:ident($($arg:ident: $t:ty),* $(,)?) -> $r:ty; )*) => { $(
        pub unsafe fn $name($($arg: $t),*) -> $r {
            static FOUND: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
            let mut p = FOUND.load(Ordering::Relaxed);
            if p.is_null() {
                let name = concat!(stringify!($name), "\0").as_ptr().cast::<c_char>();
                // SAFETY: the names are NUL-terminated literals.
                unsafe {
                    // Two versions of some functions are in the library; the old one has another layout.
                    $( p = libc::dlvsym(libc::RTLD_NEXT, name, concat!($version, "\0").as_ptr().cast()); )?
                    if p.is_null() {
                        p = libc::dlsym(libc::RTLD_NEXT, name);
                    }
                    if p.is_null() {
                        libc::abort();
                    }
                }
                FOUND.store(p, Ordering::Relaxed);
            }
            // SAFETY: the C declaration of this name has these types (variadic ones are called with all arguments).
            let f: unsafe extern "C" fn($($t),*) -> $r = unsafe { std::mem::transmute(p) };
            unsafe { f($($arg),*) }
        }
    )* };
}

real! {
    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    fn fopen(path: *const c_char, mode: *const c_char) -> *mut libc::FILE;
    fn close(fd: c_int) -> c_int;
    fn dup(fd: c_int) -> c_int;
    fn dup2(fd: c_int, to: c_int) -> c_int;
    fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int;
    fn fcntl(fd: c_int, cmd: c_int, arg: usize) -> c_int;
    fn write(fd: c_int, buf: *const cvoid, n: size_t) -> ssize_t;
    fn pwrite(fd: c_int, buf: *const cvoid, n: size_t, at: off_t) -> ssize_t;
    fn writev(fd: c_int, iov: *const iovec, n: c_int) -> ssize_t;
    fn pwritev(fd: c_int, iov: *const iovec, n: c_int, at: off_t) -> ssize_t;
    fn pwritev2(fd: c_int, iov: *const iovec, n: c_int, at: off_t, flags: c_int) -> ssize_t;
    fn fsync(fd: c_int) -> c_int;
    fn fdatasync(fd: c_int) -> c_int;
    fn sync_file_range(fd: c_int, at: off_t, n: off_t, flags: c_uint) -> c_int;
    fn ftruncate(fd: c_int, n: off_t) -> c_int;
    fn fallocate(fd: c_int, mode: c_int, at: off_t, n: off_t) -> c_int;
    fn copy_file_range(from: c_int, from_at: *mut off_t, to: c_int, to_at: *mut off_t, n: size_t, flags: c_uint) -> ssize_t;
    fn sendfile(to: c_int, from: c_int, at: *mut off_t, n: size_t) -> ssize_t;
    fn splice(from: c_int, from_at: *mut off_t, to: c_int, to_at: *mut off_t, n: size_t, flags: c_uint) -> ssize_t;
    fn renameat2(from_dir: c_int, from: *const c_char, to_dir: c_int, to: *const c_char, flags: c_uint) -> c_int;
    fn unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn linkat(from_dir: c_int, from: *const c_char, to_dir: c_int, to: *const c_char, flags: c_int) -> c_int;
    fn symlinkat(from: *const c_char, to_dir: c_int, to: *const c_char) -> c_int;
    fn mkdirat(dir: c_int, path: *const c_char, mode: mode_t) -> c_int;
    fn mmap(at: *mut cvoid, n: size_t, prot: c_int, flags: c_int, fd: c_int, off: off_t) -> *mut cvoid;
    fn statvfs(path: *const c_char, out: *mut statvfs_t) -> c_int;
    fn fstatvfs(fd: c_int, out: *mut statvfs_t) -> c_int;
    fn statfs(path: *const c_char, out: *mut statfs_t) -> c_int;
    fn fstatfs(fd: c_int, out: *mut statfs_t) -> c_int;
    fn clock_gettime(clock: clockid_t, out: *mut timespec) -> c_int;
    #[version = "GLIBC_2.3.2"]
    fn pthread_cond_timedwait(cond: *mut pthread_cond_t, m: *mut pthread_mutex_t, at: *const timespec) -> c_int;
    fn pthread_cond_clockwait(cond: *mut pthread_cond_t, m: *mut pthread_mutex_t, clock: clockid_t, at: *const timespec) -> c_int;
    fn pthread_mutex_timedlock(m: *mut pthread_mutex_t, at: *const timespec) -> c_int;
    fn sem_timedwait(s: *mut libc::sem_t, at: *const timespec) -> c_int;
    fn clock_nanosleep(clock: clockid_t, flags: c_int, at: *const timespec, left: *mut timespec) -> c_int;
    fn syscall(n: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long;
}

/// `time` asked of the real clock.
pub fn now() -> time_t {
    let mut t = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` outlives the call.
    unsafe { clock_gettime(libc::CLOCK_REALTIME, &mut t) };
    t.tv_sec
}

pub fn errno() -> c_int {
    // SAFETY: the location is this thread's own and always valid.
    unsafe { *libc::__errno_location() }
}

pub fn set_errno(e: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = e }
}
