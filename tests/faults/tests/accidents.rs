//! The library under a real program of many threads: what was synced survives every accident, what was not is lost
//! often enough to matter, and a disk that lies about syncing is found out by the same check.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The library as it is now: `cargo test` alone leaves an older one in place.
fn library() -> PathBuf {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    BUILT
        .get_or_init(|| {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let built = Command::new(cargo)
                .args(["build", "--quiet", "--release", "-p", "mainstem-faults"])
                .status()
                .unwrap();
            assert!(built.success());
            let exe = std::env::current_exe().unwrap();
            exe.parent().unwrap().parent().unwrap().join("libmainstem_faults.so")
        })
        .clone()
}

/// This test binary again, under the library, as `role`.
fn start(role: &str, dir: &Path, settings: &[(&str, &str)]) -> Child {
    let mut c = Command::new(std::env::current_exe().unwrap());
    c.args(["victim", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_PRELOAD", library())
        .env("VICTIM_ROLE", role)
        .env("VICTIM_DIR", dir.join("data"))
        .env("MAINSTEM_FAULTS_DIR", dir.join("data"))
        .env("MAINSTEM_FAULTS_SOCKET", dir.join("socket"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, value) in settings {
        c.env(format!("MAINSTEM_FAULTS_{name}"), value);
    }
    fs::create_dir_all(dir.join("data")).unwrap();
    c.spawn().unwrap()
}

fn command(dir: &Path, line: &str) -> String {
    let mut s = UnixStream::connect(dir.join("socket")).unwrap();
    writeln!(s, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(s).read_line(&mut answer).unwrap();
    answer
}

fn fill(file: u64, at: u64) -> u8 {
    (file.wrapping_mul(31).wrapping_add(at).wrapping_mul(0x9e37_79b9) >> 7) as u8 | 1
}

/// What the victim does. Run by the other tests only.

#[test]
#[ignore = "the victim of the other tests"]
fn victim() {
    let Ok(role) = std::env::var("VICTIM_ROLE") else {
        return;
    };
    let dir = PathBuf::from(std::env::var("VICTIM_DIR").unwrap());
    match role.as_str() {
        "writer" => writer(&dir),
        "filler" => filler(&dir),
        "mapper" => mapper(&dir),
        "clock" => clock(),
        other => panic!("{other}"),
    }
}

fn say(line: &str) {
    std::io::stdout()
        .lock()
        .write_all(format!("@{line}\n").as_bytes())
        .unwrap();
}

/// Three threads: logs that are appended to and replaced, a cell that is overwritten, a name that is renamed over.
fn writer(dir: &Path) {
    let logs = dir.to_path_buf();
    let cell = dir.join("cell");
    let current = dir.to_path_buf();
    std::thread::spawn(move || {
        for file in 0u64.. {
            let path = logs.join(format!("log-{file}"));
            let mut f = OpenOptions::new()
                .create_new(true)
                .append(file % 2 == 0)
                .write(true)
                .open(&path)
                .unwrap();
            let mut at = 0u64;
            for record in 0..40u64 {
                let n = (file * 7919 + record * 104_729) % 5000 + 1;
                // In a few pieces, so that there is something to tear.
                let bytes: Vec<u8> = (at..at + n).map(|i| fill(file, i)).collect();
                for piece in bytes.chunks(1700) {
                    f.write_all(piece).unwrap();
                }
                at += n;
                if record % 3 != 2 {
                    f.sync_data().unwrap();
                    if record == 0 {
                        File::open(&logs).unwrap().sync_all().unwrap();
                    }
                    say(&format!("log {file} {at}"));
                }
            }
            if file >= 2 {
                fs::remove_file(logs.join(format!("log-{}", file - 2))).unwrap();
                say(&format!("gone {}", file - 2));
            }
        }
    });
    std::thread::spawn(move || {
        let f = File::create(&cell).unwrap();
        for n in 1u64.. {
            f.write_all_at(&n.to_le_bytes(), n % 3 * 8192).unwrap();
            f.sync_all().unwrap();
            if n == 3 {
                File::open(cell.parent().unwrap()).unwrap().sync_all().unwrap();
            }
            if n >= 3 {
                say(&format!("cell {n}"));
            }
        }
    });
    for n in 1u64.. {
        let tmp = current.join("tmp");
        let mut f = File::create(&tmp).unwrap();
        f.write_all(format!("{n:0100}").as_bytes()).unwrap();
        f.sync_all().unwrap();
        drop(f);
        fs::rename(&tmp, current.join("CURRENT")).unwrap();
        File::open(&current).unwrap().sync_all().unwrap();
        say(&format!("current {n}"));
    }
}

#[derive(Default)]
struct Said {
    logs: BTreeMap<u64, u64>,
    gone: Vec<u64>,
    cell: u64,
    current: u64,
}

fn said(out: &str) -> Said {
    let mut s = Said::default();
    for line in out.split('\n').filter_map(|l| l.split_once('@')).map(|(_, l)| l) {
        let words: Vec<&str> = line.split(' ').collect();
        let n = |i: usize| words.get(i).and_then(|w| w.parse::<u64>().ok());
        match (words[0], n(1), n(2)) {
            ("log", Some(file), Some(at)) => drop(s.logs.insert(file, at)),
            ("gone", Some(file), _) => {
                s.gone.push(file);
                s.logs.remove(&file);
            }
            ("cell", Some(v), _) => s.cell = v,
            ("current", Some(v), _) => s.current = v,
            _ => {}
        }
    }
    s
}

/// What is wrong on the disk, given what was said to be safe; and whether something unsynced was lost.
fn verdict(dir: &Path, said: &Said) -> (Vec<String>, bool) {
    let mut wrong = Vec::new();
    let mut lost = false;
    for (&file, &safe) in &said.logs {
        let now = fs::read(dir.join(format!("data/log-{file}"))).unwrap_or_default();
        if (now.len() as u64) < safe {
            wrong.push(format!("log {file}: {} of {safe} bytes", now.len()));
        } else if let Some(i) = (0..safe).find(|&i| now[i as usize] != fill(file, i)) {
            let until = (i..safe).take_while(|&i| now[i as usize] != fill(file, i)).count();
            wrong.push(format!(
                "log {file}: {until} bytes from {i} of {safe} are others: {:?}",
                &now[i as usize..][..8]
            ));
        }
        lost |= (safe..now.len() as u64).any(|i| now[i as usize] != fill(file, i));
    }
    let cell = fs::read(dir.join("data/cell")).unwrap_or_default();
    let at = |n: u64| {
        cell.get((n % 3 * 8192) as usize..)
            .and_then(|c| c.get(..8))
            .map(|c| u64::from_le_bytes(c.try_into().unwrap()))
    };
    for n in said.cell.saturating_sub(2).max(1)..=said.cell {
        match at(n) {
            Some(v) if v == n || v == n + 3 => {}
            v => wrong.push(format!("cell {n}: {v:?}")),
        }
    }
    let current = fs::read_to_string(dir.join("data/CURRENT")).unwrap_or_default();
    if said.current > 0 {
        match current.parse::<u64>() {
            Ok(v) if current.len() == 100 && (v == said.current || v == said.current + 1) => lost |= v == said.current,
            _ => wrong.push(format!("CURRENT: {current:?} after {}", said.current)),
        }
    }
    lost |= said.gone.iter().any(|g| dir.join(format!("data/log-{g}")).exists());
    (wrong, lost)
}

fn round(seed: u64, steps: u64, more: &str) -> (Said, Vec<String>, bool, String) {
    let tmp = tempfile::tempdir().unwrap();
    let run = format!("power-fail-after {steps} {seed}{more}");
    let child = start("writer", tmp.path(), &[("POWER", "1"), ("RUN", &run)]);
    let out = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.signal(), Some(9), "{}", err);
    assert!(err.contains("faults: power failure"), "{err}");
    let said = said(&String::from_utf8_lossy(&out.stdout));
    let (wrong, lost) = verdict(tmp.path(), &said);
    (said, wrong, lost, err)
}

#[test]
fn a_power_failure_loses_unsynced_writes_and_never_synced_ones() {
    let seed: u64 = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let rounds: u64 = std::env::var("ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(30);
    println!("seed {seed}, {rounds} rounds");
    let mut lossy = 0;
    let mut acked = 0;
    for i in 0..rounds {
        let steps = 5 + (seed + i) * 37 % 1500;
        let (said, wrong, lost, err) = round(seed + i, steps, "");
        assert!(wrong.is_empty(), "seed {} steps {steps}: {wrong:?}\n{err}", seed + i);
        lossy += u64::from(lost);
        acked += said.cell;
    }
    assert!(acked > rounds * 10, "only {acked} acknowledged");
    assert!(
        lossy > rounds / 3,
        "something unsynced was lost in only {lossy} of {rounds} rounds"
    );
}

#[test]
fn a_disk_that_lies_about_syncing_is_found_out() {
    let found = (0..10)
        .filter(|&i| !round(i, 400, ";syncs-lie on").1.is_empty())
        .count();
    assert!(found >= 8, "{found} of 10");
}

#[test]
fn the_power_fails_on_command_and_the_audit_is_clean() {
    let tmp = tempfile::tempdir().unwrap();
    let child = start("writer", tmp.path(), &[("POWER", "1")]);
    while !tmp.path().join("data/log-3").exists() {
        std::thread::yield_now();
    }
    assert_eq!(command(tmp.path(), "audit"), "ok \n");
    let stats = command(tmp.path(), "stats");
    assert!(stats.contains("syncs=") && !stats.contains(" syncs=0 "), "{stats}");
    assert!(command(tmp.path(), "no-such-thing").starts_with("error no such command"));
    fs::write(tmp.path().join("data/behind"), "x").unwrap();
    assert!(
        command(tmp.path(), "audit").contains("behind our back"),
        "a file that did not go through the library"
    );
    assert_eq!(command(tmp.path(), "power-fail 7"), "");
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.signal(), Some(9));
    let said = said(&String::from_utf8_lossy(&out.stdout));
    let (wrong, _) = verdict(tmp.path(), &said);
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Writes a block at a time until told otherwise, and says how each went.
fn filler(dir: &Path) {
    let mut f = File::create(dir.join("file")).unwrap();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let (what, r) = match line.as_str() {
            "write" => ("write", f.write(&[7; 1000]).map(|n| n as u64)),
            "sync" => ("sync", f.sync_data().map(|()| 0)),
            "free" => ("free", Ok(free(dir))),
            _ => ("remove", fs::remove_file(dir.join("file")).map(|()| 0)),
        };
        say(&match r {
            Ok(n) => format!("{what} {n}"),
            Err(e) => format!("{what} {:?}", e.raw_os_error().unwrap()),
        });
    }
}

#[allow(unsafe_code)]
fn free(dir: &Path) -> u64 {
    let path = std::ffi::CString::new(dir.to_str().unwrap()).unwrap();
    // SAFETY: the path is a C string, the result is filled in.
    unsafe {
        let mut s: libc::statvfs = std::mem::zeroed();
        assert_eq!(libc::statvfs(path.as_ptr(), &mut s), 0);
        s.f_bavail * s.f_frsize
    }
}

#[test]
fn a_full_disk_and_a_failing_one() {
    for power in ["0", "1"] {
        let tmp = tempfile::tempdir().unwrap();
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args(["victim", "--exact", "--ignored", "--nocapture"]);
        fs::create_dir_all(tmp.path().join("data")).unwrap();
        let mut child = c
            .env("LD_PRELOAD", library())
            .env("VICTIM_ROLE", "filler")
            .env("VICTIM_DIR", tmp.path().join("data"))
            .env("MAINSTEM_FAULTS_DIR", tmp.path().join("data"))
            .env("MAINSTEM_FAULTS_SOCKET", tmp.path().join("socket"))
            .env("MAINSTEM_FAULTS_POWER", power)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut to = child.stdin.take().unwrap();
        let mut from = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut ask = |what: &str| -> String {
            writeln!(to, "{what}").unwrap();
            from.by_ref()
                .map(Result::unwrap)
                .find_map(|l| l.split_once('@').map(|(_, l)| l.to_string()))
                .unwrap()
        };
        assert_eq!(ask("write"), "write 1000");
        command(tmp.path(), "space 2500");
        assert_eq!(ask("free"), "free 0", "less than a block");
        assert_eq!(
            (ask("write"), ask("write"), ask("write")),
            ("write 1000".into(), "write 1000".into(), "write 500".into())
        );
        assert_eq!(ask("write"), format!("write {}", libc::ENOSPC));
        command(tmp.path(), "space 81920");
        assert_eq!(ask("free"), "free 81920");
        assert_eq!(ask("write"), "write 1000");
        command(tmp.path(), "fail-sync 2 1 EIO file");
        assert_eq!(
            (ask("sync"), ask("sync"), ask("sync")),
            ("sync 0".into(), format!("sync {}", libc::EIO), "sync 0".into())
        );
        command(tmp.path(), "fail-write 1 2");
        assert_eq!(
            (ask("write"), ask("write"), ask("write")),
            (
                format!("write {}", libc::EIO),
                format!("write {}", libc::EIO),
                "write 1000".into()
            )
        );
        command(tmp.path(), "fail-write 1 1 EIO another-file");
        assert_eq!(ask("write"), "write 1000");
        command(tmp.path(), "space 0");
        assert_eq!(ask("write"), format!("write {}", libc::ENOSPC));
        assert_eq!(ask("remove"), "remove 0");
        assert_eq!(ask("write"), "write 1000", "the removal gave space back");
        command(tmp.path(), "space unlimited");
        let t = std::time::Instant::now();
        command(tmp.path(), "sync-delay-us 50000");
        ask("sync");
        assert!(t.elapsed().as_millis() >= 50);
        drop(to);
        assert!(child.wait().unwrap().success());
    }
}

#[allow(unsafe_code)]
fn mapper(dir: &Path) {
    let f = OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(dir.join("map"))
        .unwrap();
    f.set_len(4096).unwrap();
    // SAFETY: the mapping is not used.
    unsafe {
        let (prot, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, shared, f.as_raw_fd(), 0);
        say("mapped for reading");
        libc::mmap(std::ptr::null_mut(), 4096, prot, shared, f.as_raw_fd(), 0);
    }
    say("mapped for writing");
}

#[test]
fn nothing_is_written_through_a_mapping() {
    let tmp = tempfile::tempdir().unwrap();
    let out = start("mapper", tmp.path(), &[]).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{text}");
    assert!(text.contains("for reading") && !text.contains("for writing"), "{text}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("a shared writable mapping of"));
}

fn clock() {
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let start = Instant::now();
    let pair = (std::sync::Mutex::new(()), std::sync::Condvar::new());
    let held = pair.0.lock().unwrap();
    drop(pair.1.wait_timeout(held, Duration::from_millis(20)).unwrap());
    let waited = start.elapsed().as_millis();
    say(&format!("{wall} {waited}"));
}

#[test]
fn only_the_wall_clock_jumps() {
    let tmp = tempfile::tempdir().unwrap();
    let year = 365 * 24 * 3600u64;
    let out = start(
        "clock",
        tmp.path(),
        &[("RUN", &format!("clock-offset-us {}000000", year))],
    )
    .wait_with_output()
    .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let (wall, waited) = text
        .split_once('@')
        .unwrap()
        .1
        .lines()
        .next()
        .unwrap()
        .split_once(' ')
        .unwrap();
    let real = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let off = wall.parse::<u64>().unwrap() - real;
    assert!((year - 60..=year + 60).contains(&off), "{off}");
    assert!((20..10_000).contains(&waited.parse::<u64>().unwrap()), "{waited}");
}
