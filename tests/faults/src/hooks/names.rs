//! Making, moving and removing names.

use std::path::PathBuf;

use libc::{AT_FDCWD, c_char, c_int, c_uint, mode_t};

use crate::names::What;
use crate::world::{self, is_file, stat_path};
use crate::{config, paths, real};

/// Bytes that come free when the last name of a file goes.
fn freed(path: &std::path::Path) -> u64 {
    stat_path(path)
        .filter(|s| is_file(s) && s.st_nlink == 1)
        .map_or(0, |s| s.st_size as u64)
}

unsafe fn rename_any(from_dir: c_int, from: *const c_char, to_dir: c_int, to: *const c_char, flags: c_uint) -> c_int {
    // SAFETY: same contract; likewise below.
    let act = || unsafe { real::renameat2(from_dir, from, to_dir, to, flags) };
    let (from, to) = unsafe { (paths::below(from_dir, from), paths::below(to_dir, to)) };
    let (Some(from), Some(to)) = (from, to) else {
        return act();
    };
    if !config::slow() {
        return act();
    }
    if flags & (libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT) != 0 {
        crate::violation("an exchange of names is not kept track of:", &to);
    }
    let mut world = world::hold();
    let free = if from == to { 0 } else { freed(&to) };
    let power = config::on(&config::POWER);
    let replaced = if power { world.keep(&to) } else { None };
    let r = act();
    let errno = real::errno();
    if r == 0 {
        config::give_space(free);
        if power {
            world.moved(&from, &to, replaced);
            world.step();
        }
    } else {
        world.unkeep(replaced);
    }
    real::set_errno(errno);
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    unsafe { rename_any(AT_FDCWD, from, AT_FDCWD, to, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn renameat(from_dir: c_int, from: *const c_char, to_dir: c_int, to: *const c_char) -> c_int {
    unsafe { rename_any(from_dir, from, to_dir, to, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn renameat2(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    flags: c_uint,
) -> c_int {
    unsafe { rename_any(from_dir, from, to_dir, to, flags) }
}

unsafe fn unlink_any(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    let act = || unsafe { real::unlinkat(dir, path, flags) };
    let Some(at) = (unsafe { paths::below(dir, path) }) else {
        return act();
    };
    if !config::slow() {
        return act();
    }
    let mut world = world::hold();
    let power = config::on(&config::POWER);
    let free = freed(&at);
    let is_dir = flags & libc::AT_REMOVEDIR != 0;
    let kept: Option<PathBuf> = if power && !is_dir { world.keep(&at) } else { None };
    let r = act();
    let errno = real::errno();
    if r == 0 {
        config::give_space(free);
        if power {
            world.names.record(
                &at,
                if is_dir {
                    What::RemovedDir
                } else {
                    What::Removed { kept }
                },
            );
            world.step();
        }
    } else {
        world.unkeep(kept);
    }
    real::set_errno(errno);
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    unsafe { unlink_any(AT_FDCWD, path, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    unsafe { unlink_any(dir, path, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    unsafe { unlink_any(AT_FDCWD, path, libc::AT_REMOVEDIR) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn remove(path: *const c_char) -> c_int {
    let r = unsafe { unlink_any(AT_FDCWD, path, 0) };
    if r != 0 && real::errno() == libc::EISDIR {
        return unsafe { unlink_any(AT_FDCWD, path, libc::AT_REMOVEDIR) };
    }
    r
}

/// A new name, made by `act`.
unsafe fn made(dir: c_int, path: *const c_char, what: What, act: impl FnOnce() -> c_int) -> c_int {
    if !config::on(&config::POWER) {
        return act();
    }
    let Some(at) = (unsafe { paths::below(dir, path) }) else {
        return act();
    };
    let mut world = world::hold();
    let r = act();
    let errno = real::errno();
    if r == 0 {
        world.names.record(&at, what);
        world.step();
    }
    real::set_errno(errno);
    r
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    unsafe { made(AT_FDCWD, path, What::MadeDir, || real::mkdirat(AT_FDCWD, path, mode)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mkdirat(dir: c_int, path: *const c_char, mode: mode_t) -> c_int {
    unsafe { made(dir, path, What::MadeDir, || real::mkdirat(dir, path, mode)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn link(from: *const c_char, to: *const c_char) -> c_int {
    unsafe {
        made(AT_FDCWD, to, What::Made, || {
            real::linkat(AT_FDCWD, from, AT_FDCWD, to, 0)
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn linkat(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    flags: c_int,
) -> c_int {
    unsafe {
        made(to_dir, to, What::Made, || {
            real::linkat(from_dir, from, to_dir, to, flags)
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn symlink(from: *const c_char, to: *const c_char) -> c_int {
    unsafe { made(AT_FDCWD, to, What::Made, || real::symlinkat(from, AT_FDCWD, to)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn symlinkat(from: *const c_char, dir: c_int, to: *const c_char) -> c_int {
    unsafe { made(dir, to, What::Made, || real::symlinkat(from, dir, to)) }
}
