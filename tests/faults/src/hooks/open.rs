//! Opening, duplicating and closing.

use libc::{c_char, c_int, mode_t};

use crate::fds::{self, Kind};
use crate::names::What;
use crate::world::{self, is_file, stat_fd, stat_path};
use crate::{config, paths, real};

unsafe fn open_at(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller calls `open` as C tells it to.
    let Some(at) = (unsafe { paths::below(dir, path) }) else {
        let fd = unsafe { real::openat(dir, path, flags, mode) };
        if fd >= 0 {
            fds::set(fd, None);
        }
        return fd;
    };
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
    let mut held = config::slow().then(world::hold);
    let before = held.as_ref().and_then(|_| stat_path(&at));
    if let (Some(world), Some(s)) = (&mut held, &before)
        && writes
        && flags & libc::O_TRUNC != 0
        && is_file(s)
    {
        if config::on(&config::POWER) {
            world.before_truncating_open(&at, s);
        }
        config::give_space(s.st_size as u64);
    }
    // SAFETY: as above.
    let fd = unsafe { real::openat(dir, path, flags, mode) };
    let errno = real::errno();
    if fd >= 0 {
        let kind = match stat_fd(fd) {
            Some(s) if is_file(&s) && writes => Some(Kind::File),
            Some(s) if s.st_mode & libc::S_IFMT == libc::S_IFDIR => Some(Kind::Directory),
            _ => None,
        };
        fds::set(fd, kind);
        if let Some(mut world) = held
            && config::on(&config::POWER)
        {
            let made = before.is_none() && flags & libc::O_CREAT != 0;
            if kind == Some(Kind::File) {
                world.opened(fd, &at, made);
            }
            if made {
                world.names.record(&at, What::Made);
                world.step();
            }
        }
    }
    real::set_errno(errno);
    fd
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: same contract; likewise below.
    unsafe { open_at(libc::AT_FDCWD, path, flags, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    unsafe { open_at(libc::AT_FDCWD, path, flags, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    unsafe { open_at(libc::AT_FDCWD, path, flags, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    unsafe { open_at(libc::AT_FDCWD, path, flags, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    unsafe { open_at(dir, path, flags, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    unsafe { open_at(dir, path, flags, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn creat(path: *const c_char, mode: mode_t) -> c_int {
    unsafe {
        open_at(
            libc::AT_FDCWD,
            path,
            libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC,
            mode,
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn creat64(path: *const c_char, mode: mode_t) -> c_int {
    unsafe {
        open_at(
            libc::AT_FDCWD,
            path,
            libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC,
            mode,
        )
    }
}

fn forget(fd: c_int) {
    if fds::get(fd).is_some() {
        if config::on(&config::POWER) {
            world::hold().closing(fd);
        }
        fds::set(fd, None);
    }
}

fn duplicated(from: c_int, to: c_int) {
    if to >= 0 && from != to {
        let kind = fds::get(from);
        fds::set(to, kind);
        if kind == Some(Kind::File) && config::on(&config::POWER) {
            world::hold().duplicated(from, to);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    // Before the number is free for another thread to get.
    forget(fd);
    unsafe { real::close(fd) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    let to = unsafe { real::dup(fd) };
    duplicated(fd, to);
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    if fd != to {
        forget(to);
    }
    let to = unsafe { real::dup2(fd, to) };
    duplicated(fd, to);
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    if fd != to {
        forget(to);
    }
    let to = unsafe { real::dup3(fd, to, flags) };
    duplicated(fd, to);
    to
}

unsafe fn fcntl_any(fd: c_int, cmd: c_int, arg: usize) -> c_int {
    let r = unsafe { real::fcntl(fd, cmd, arg) };
    if matches!(cmd, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
        duplicated(fd, r);
    }
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl(fd: c_int, cmd: c_int, arg: usize) -> c_int {
    unsafe { fcntl_any(fd, cmd, arg) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl64(fd: c_int, cmd: c_int, arg: usize) -> c_int {
    unsafe { fcntl_any(fd, cmd, arg) }
}
