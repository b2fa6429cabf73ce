//! A preload library for Linux that gives an unsuspecting program power failures, slow, failing and full disks, and
//! clock jumps. The program is the real one, with all its C++; it needs no changes and knows nothing of it.
//!
//! ```text
//! LD_PRELOAD=libmainstem_faults.so MAINSTEM_FAULTS_DIR=/data MAINSTEM_FAULTS_POWER=1 program …
//! ```
//!
//! | variable | what |
//! |---|---|
//! | `MAINSTEM_FAULTS_DIR` | the directory whose files are watched; without it only syncs (of all files) and the clock are |
//! | `MAINSTEM_FAULTS_POWER` | `1`: keep track of unsynced writes, so that the power can fail |
//! | `MAINSTEM_FAULTS_SIDE` | where files are kept that lost their name but not yet for good (same file system); default: the directory's name and `.faults` |
//! | `MAINSTEM_FAULTS_SOCKET` | path of a Unix socket to take commands on, outside of the directory |
//! | `MAINSTEM_FAULTS_SYNC_MS` | each sync takes this much longer, in milliseconds (may be a fraction) |
//! | `MAINSTEM_FAULTS_RUN` | commands to carry out at the start, separated by `;` |
//!
//! Commands, each answered with `ok …` or `error …` on one line:
//!
//! | command | what |
//! |---|---|
//! | `power-fail [SEED]` | now: unsynced writes are lost in part, torn, or kept; unsynced names are taken back; the process dies as by SIGKILL. No answer |
//! | `power-fail-after STEPS [SEED]` | the same at the n-th step (write, begin or end of a sync, name) from now |
//! | `sync-delay-us US` | each sync takes this much longer |
//! | `fail-sync [NTH [TIMES [ERRNO [PATH]]]]`, `fail-write …` | the n-th sync (write) from now, and as many after it as said, fail with EIO or ENOSPC, of files whose path contains PATH; `off` |
//! | `space BYTES`, `space unlimited` | only so many more bytes fit on the disk; statvfs says so; removals give bytes back |
//! | `clock-offset-us US` | the wall clock (only) is off by this much |
//! | `syncs-lie on`, `off` | syncs do nothing and say they did: a check must notice |
//! | `names strict`, `names with-files` | names become durable only by a sync of their directory (POSIX), or also by any file's sync (ext4, xfs) |
//! | `audit` | is every file as long as what went through here made it? |
//! | `stats` | counters |
//!
//! A file that was changed in a way that the library cannot see (a shared writable mapping, a raw system call, an
//! `fopen` for writing) would make its verdicts worthless: it aborts the process where it sees one coming, and `audit`
//! finds the rest.
#![allow(unsafe_code)]
// The hooks are left out of the unit tests, which would otherwise run under them.
#![cfg_attr(test, allow(dead_code))]

mod config;
mod control;
mod fds;
#[cfg(not(test))]
mod hooks;
mod layer;
mod names;
mod paths;
mod power;
mod real;
mod rng;
mod world;

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

/// Something went round the library.
fn violation(what: &str, path: &Path) -> ! {
    let text = format!("faults: {what} {}: aborting\n", path.display());
    // SAFETY: the buffer's length is given.
    unsafe {
        real::write(2, text.as_ptr().cast(), text.len());
        libc::abort()
    }
}

#[cfg_attr(not(test), used, unsafe(link_section = ".init_array"))]
#[cfg_attr(test, allow(dead_code))]
static START: extern "C" fn() = start;

extern "C" fn start() {
    let var = |name: &str| std::env::var(format!("MAINSTEM_FAULTS_{name}")).ok();
    let fatal = |what: String| -> ! { violation(&what, Path::new("")) };
    if let Some(dir) = var("DIR") {
        paths::watch(&dir);
    }
    if let Some(ms) = var("SYNC_MS") {
        match ms.parse::<f64>() {
            Ok(ms) => config::SYNC_DELAY_US.store((ms * 1000.0) as u64, Relaxed),
            Err(_) => fatal(format!("MAINSTEM_FAULTS_SYNC_MS is not a number: {ms}")),
        }
    }
    if let (Some(dir), Some("1")) = (paths::watched(), var("POWER").as_deref()) {
        let side = var("SIDE").map_or_else(|| dir.with_extension("faults"), Into::into);
        if let Err(e) = std::fs::create_dir_all(&side) {
            fatal(format!("cannot make {}: {e}", side.display()));
        }
        let mut world = world::hold();
        // Names that an earlier run kept there are of no use any more.
        for old in std::fs::read_dir(&side).into_iter().flatten().flatten() {
            let old = paths::c(&old.path());
            // SAFETY: the path is a C string.
            unsafe { real::unlinkat(libc::AT_FDCWD, old.as_ptr(), 0) };
        }
        world.side = side;
        world.audit(true);
        drop(world);
        config::POWER.store(true, Relaxed);
    }
    for line in var("RUN")
        .iter()
        .flat_map(|l| l.split(';'))
        .filter(|l| !l.trim().is_empty())
    {
        if let Err(e) = control::run(line) {
            fatal(format!("MAINSTEM_FAULTS_RUN: {e}"));
        }
    }
    if let Some(socket) = var("SOCKET")
        && let Err(e) = control::listen(&socket)
    {
        fatal(format!("cannot listen on {socket}: {e}"));
    }
}
