//! Commands, from the environment and from a Unix socket: one line in, one line out.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::str::FromStr;
use std::sync::atomic::Ordering::Relaxed;

use crate::config::{self, Rule};
use crate::{power, world};

/// Carries out one command; the answer, or what is wrong with it.
pub fn run(line: &str) -> Result<String, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ok = || Ok(String::new());
    match words.as_slice() {
        ["power-fail", rest @ ..] => {
            needs_power()?;
            let seed = arg(rest.first(), 0)?;
            power::fail(world::hold(), seed, config::STEPS.load(Relaxed))
        }
        ["power-fail-after", steps, rest @ ..] => {
            needs_power()?;
            config::POWER_SEED.store(arg(rest.first(), 0)?, Relaxed);
            let steps: u64 = arg(Some(steps), 0)?;
            config::POWER_AT.store(config::STEPS.load(Relaxed) + steps.max(1), Relaxed);
            ok()
        }
        ["sync-delay-us", us] => {
            config::SYNC_DELAY_US.store(arg(Some(us), 0)?, Relaxed);
            ok()
        }
        [what @ ("fail-sync" | "fail-write"), "off"] => {
            rules(what).clear();
            ok()
        }
        [what @ ("fail-sync" | "fail-write"), rest @ ..] => {
            let nth: u64 = arg(rest.first(), 1)?;
            let errno = match rest.get(2).copied() {
                None | Some("EIO") => libc::EIO,
                Some("ENOSPC") => libc::ENOSPC,
                Some(other) => return Err(format!("no such error: {other}")),
            };
            rules(what).add(Rule {
                pass: nth.saturating_sub(1),
                times: arg(rest.get(1), 1)?,
                errno,
                path: rest.get(3).unwrap_or(&"").to_string(),
            });
            ok()
        }
        ["space", "unlimited"] => {
            config::SPACE_LIMITED.store(false, Relaxed);
            ok()
        }
        ["space", bytes] => {
            config::SPACE_LEFT.store(arg(Some(bytes), 0)?, Relaxed);
            config::SPACE_LIMITED.store(true, Relaxed);
            ok()
        }
        ["clock-offset-us", us] => {
            config::CLOCK_OFFSET_US.store(arg(Some(us), 0)?, Relaxed);
            ok()
        }
        ["syncs-lie", on @ ("on" | "off")] => {
            config::SYNCS_LIE.store(*on == "on", Relaxed);
            ok()
        }
        ["names", with @ ("strict" | "with-files")] => {
            config::NAMES_WITH_FILES.store(*with == "with-files", Relaxed);
            ok()
        }
        ["audit"] => {
            needs_power()?;
            let wrong = world::hold().audit(false);
            if wrong.is_empty() {
                ok()
            } else {
                Err(format!("written behind our back: {}", wrong.join("; ")))
            }
        }
        ["stats"] => {
            let world = world::hold();
            Ok(format!(
                "steps={} writes={} written_bytes={} syncs={} dir_syncs={} unsynced_bytes={} pending_names={} space_left={}",
                config::STEPS.load(Relaxed),
                config::WRITES.load(Relaxed),
                config::WRITTEN_BYTES.load(Relaxed),
                config::SYNCS.load(Relaxed),
                config::DIR_SYNCS.load(Relaxed),
                world.unsynced_bytes(),
                world.names.pending(),
                config::SPACE_LEFT.load(Relaxed),
            ))
        }
        _ => Err(format!("no such command: {line}")),
    }
}

fn needs_power() -> Result<(), String> {
    config::on(&config::POWER)
        .then_some(())
        .ok_or_else(|| "start with MAINSTEM_FAULTS_POWER=1".into())
}

fn rules(what: &str) -> &'static config::Rules {
    if what == "fail-sync" {
        &config::FAIL_SYNCS
    } else {
        &config::FAIL_WRITES
    }
}

fn arg<T: FromStr>(word: Option<&&str>, default: T) -> Result<T, String> {
    match word {
        None => Ok(default),
        Some(w) => w.parse().map_err(|_| format!("not a number: {w}")),
    }
}

/// Answers commands on a socket for as long as the process lives.
pub fn listen(path: &str) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // SAFETY: signal sets are plain data; the thread inherits the mask and the old one is put back.
    let old = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        old
    };
    let spawned = std::thread::Builder::new().name("faults".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // One talker at a time is enough for a test.
            let _ = serve(stream);
        }
    });
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut()) };
    spawned.map(drop)
}

fn serve(stream: UnixStream) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let answer = match run(&line?) {
            Ok(text) => format!("ok {text}\n"),
            Err(text) => format!("error {text}\n"),
        };
        out.write_all(answer.as_bytes())?;
    }
    Ok(())
}
