//! The power failure itself: decide what is lost, stop every other thread where it is, put the disk into its state
//! after the accident, and die at once.
//!
//! Everything is decided and allocated before the others are stopped: one of them may hold the allocator's lock. The
//! world stays held, so no watched write can begin meanwhile; and a sync that had not returned never will, so nothing
//! can be acknowledged on the strength of it.

use std::ffi::CString;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_long};

use crate::layer::Fix;
use crate::names::Undo;
use crate::rng::Rng;
use crate::world::{Held, stat_fd};
use crate::{paths, real};

enum Step {
    Write(c_int, u64, Vec<u8>),
    Size(c_int, u64),
    Rename(CString, CString),
    Unlink(CString),
    MakeDir(CString),
}

pub fn fail(world: Held, seed: u64, step: u64) -> ! {
    let mut rng = Rng::new(seed);
    let mut steps = Vec::new();
    let mut told = format!("faults: power failure, seed {seed}, step {step}\n");
    for t in world.files.values().filter(|t| t.shadow >= 0 && !t.journal.is_clean()) {
        let size = stat_fd(t.shadow).map_or(0, |s| s.st_size as u64);
        let o = t.journal.power_failure(size, &mut rng);
        let _ = writeln!(
            told,
            "faults:   {}: {}, {} of {} blocks lost, {size} bytes before, {} after",
            t.path.display(),
            o.what,
            o.blocks_lost,
            o.blocks,
            o.size
        );
        for fix in o.fixes {
            steps.push(match fix {
                Fix::Write(at, bytes) => Step::Write(t.shadow, at, bytes),
                Fix::Size(n) => Step::Size(t.shadow, n),
            });
        }
    }
    let (undo, dirs) = world.names.power_failure(&mut rng);
    for (dir, lost, of) in dirs {
        let _ = writeln!(told, "faults:   {}: {lost} of {of} names lost", dir.display());
    }
    for (i, u) in undo.iter().enumerate() {
        let _ = writeln!(told, "faults:     {u:?}");
        steps.push(match u {
            Undo::Rename(from, to) => Step::Rename(paths::c(from), paths::c(to)),
            Undo::Unlink(path) => Step::Unlink(paths::c(path)),
            Undo::MakeDir(path) => Step::MakeDir(paths::c(path)),
            Undo::SetAside(path) => Step::Rename(
                paths::c(path),
                paths::c(&world.side.join(format!("never-was-{seed}-{i}"))),
            ),
        });
    }
    stop_others();
    // SAFETY: buffers and paths are ours and live; the process ends here.
    unsafe {
        for step in &steps {
            match step {
                Step::Write(fd, at, bytes) => {
                    let mut done = 0;
                    while done < bytes.len() {
                        let rest = &bytes[done..];
                        match real::pwrite(*fd, rest.as_ptr().cast(), rest.len(), (*at as usize + done) as i64) {
                            n if n > 0 => done += n as usize,
                            _ => break,
                        }
                    }
                }
                Step::Size(fd, n) => drop(real::ftruncate(*fd, *n as i64)),
                Step::Rename(from, to) => {
                    real::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), 0);
                }
                Step::Unlink(path) => drop(real::unlinkat(libc::AT_FDCWD, path.as_ptr(), 0)),
                Step::MakeDir(path) => drop(real::mkdirat(libc::AT_FDCWD, path.as_ptr(), 0o755)),
            }
        }
        real::write(2, told.as_ptr().cast(), told.len());
        loop {
            libc::kill(libc::getpid(), libc::SIGKILL);
        }
    }
}

static STOPPED: AtomicU32 = AtomicU32::new(0);

extern "C" fn stand_still(_: c_int) {
    STOPPED.fetch_add(1, Ordering::SeqCst);
    loop {
        // SAFETY: takes no arguments.
        unsafe { libc::pause() };
    }
}

/// Stops every other thread of the process for good. Allocates nothing.
fn stop_others() {
    const THREADS: usize = 4096;
    let signal = libc::SIGRTMAX() - 1;
    let mut signalled = [0i32; THREADS];
    let mut count = 0;
    // SAFETY: plain system calls on our own buffers; the directory entries are read within the length returned.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = stand_still as *const () as usize;
        libc::sigfillset(&mut action.sa_mask);
        libc::sigaction(signal, &action, std::ptr::null_mut());
        let (pid, me) = (libc::getpid(), libc::gettid());
        // A thread may be starting another while we look: go round until there is nothing new.
        for _ in 0..8 {
            let before = count;
            let dir = real::openat(
                libc::AT_FDCWD,
                c"/proc/self/task".as_ptr(),
                libc::O_RDONLY | libc::O_DIRECTORY,
                0,
            );
            let mut buf = [0u64; 2048];
            loop {
                let bytes = std::mem::size_of_val(&buf);
                let n = real::syscall(
                    libc::SYS_getdents64,
                    dir as usize,
                    buf.as_mut_ptr() as usize,
                    bytes,
                    0,
                    0,
                    0,
                );
                if n <= 0 {
                    break;
                }
                let mut at = 0;
                while (at as c_long) < n {
                    let entry = buf.as_ptr().cast::<u8>().add(at);
                    let length = entry.add(16).cast::<u16>().read_unaligned();
                    let tid = number(entry.add(19));
                    at += length as usize;
                    if tid > 0 && tid != me && count < THREADS && !signalled[..count].contains(&tid) {
                        signalled[count] = tid;
                        count += 1;
                        real::syscall(libc::SYS_tgkill, pid as usize, tid as usize, signal as usize, 0, 0, 0);
                    }
                }
            }
            real::close(dir);
            // Threads that block all signals (the allocator's own) are not waited for long: they write no files.
            for _ in 0..50 {
                if STOPPED.load(Ordering::SeqCst) as usize >= count {
                    break;
                }
                let ms = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 1_000_000,
                };
                real::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &ms, std::ptr::null_mut());
            }
            if count == before {
                break;
            }
        }
    }
}

/// # Safety
/// `text` is NUL-terminated.
unsafe fn number(mut text: *const u8) -> i32 {
    let mut n = 0i32;
    // SAFETY: the caller's promise.
    unsafe {
        while (*text).is_ascii_digit() {
            n = n * 10 + i32::from(*text - b'0');
            text = text.add(1);
        }
    }
    n
}
