//! Everything that is kept in mind about the watched files, behind one lock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, stat};

use crate::layer::Journal;
use crate::names::{Names, What};
use crate::{config, paths, power, real};

/// Device and inode.
pub type Key = (u64, u64);

pub struct Tracked {
    pub path: PathBuf,
    pub journal: Journal,
    /// Our own descriptor, to read old content and to put it back; -1 until needed. It is closed only when the process
    /// has the file open nowhere else: closing any descriptor of a file drops the process's POSIX locks on it.
    pub shadow: c_int,
    open: u32,
}

impl Tracked {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            journal: Journal::default(),
            shadow: -1,
            open: 0,
        }
    }
}

#[derive(Default)]
pub struct World {
    pub files: BTreeMap<Key, Tracked>,
    pub names: Names,
    pub side: PathBuf,
    fds: BTreeMap<c_int, Key>,
    /// The size that every file should have, by what went through here.
    sizes: BTreeMap<Key, u64>,
    kept: u64,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

/// Exclusive hold of the world. No interposed function may be called while it is held.
pub struct Held(MutexGuard<'static, Option<World>>);

pub fn hold() -> Held {
    let mut guard = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_with(World::default);
    Held(guard)
}

impl std::ops::Deref for Held {
    type Target = World;
    fn deref(&self) -> &World {
        self.0.as_ref().unwrap_or_else(|| std::process::abort())
    }
}

impl std::ops::DerefMut for Held {
    fn deref_mut(&mut self) -> &mut World {
        self.0.as_mut().unwrap_or_else(|| std::process::abort())
    }
}

impl Held {
    /// Counts a step. The power may fail at it; then this does not return.
    pub fn step(self) {
        let step = config::STEPS.fetch_add(1, Ordering::Relaxed) + 1;
        let at = config::POWER_AT.load(Ordering::Relaxed);
        if at != 0 && step >= at && config::on(&config::POWER) {
            power::fail(self, config::POWER_SEED.load(Ordering::Relaxed), step);
        }
    }
}

pub fn stat_fd(fd: c_int) -> Option<stat> {
    // SAFETY: an all-zero stat is a valid value to be overwritten.
    unsafe {
        let mut s: stat = std::mem::zeroed();
        (libc::fstat(fd, &mut s) == 0).then_some(s)
    }
}

pub fn stat_path(path: &Path) -> Option<stat> {
    let path = paths::c(path);
    // SAFETY: as above; the path is a C string.
    unsafe {
        let mut s: stat = std::mem::zeroed();
        (libc::lstat(path.as_ptr(), &mut s) == 0).then_some(s)
    }
}

pub fn key(s: &stat) -> Key {
    (s.st_dev, s.st_ino)
}

pub fn is_file(s: &stat) -> bool {
    s.st_mode & libc::S_IFMT == libc::S_IFREG
}

impl World {
    /// A watched regular file was opened for writing.
    pub fn opened(&mut self, fd: c_int, path: &Path, made: bool) {
        let Some(s) = stat_fd(fd) else { return };
        let key = key(&s);
        if made {
            // The number may be that of a file that is gone.
            self.forget(key);
        }
        self.sizes.insert(key, s.st_size as u64);
        let tracked = self.files.entry(key).or_insert_with(|| Tracked::new(path));
        tracked.path = path.to_path_buf();
        tracked.open += 1;
        self.fds.insert(fd, key);
    }

    pub fn duplicated(&mut self, fd: c_int, to: c_int) {
        if let Some(&key) = self.fds.get(&fd) {
            self.fds.insert(to, key);
            if let Some(t) = self.files.get_mut(&key) {
                t.open += 1;
            }
        }
    }

    pub fn closing(&mut self, fd: c_int) {
        let Some(key) = self.fds.remove(&fd) else {
            return;
        };
        let Some(t) = self.files.get_mut(&key) else {
            return;
        };
        t.open = t.open.saturating_sub(1);
        self.drop_if_clean(key);
    }

    fn drop_if_clean(&mut self, key: Key) {
        if self
            .files
            .get(&key)
            .is_some_and(|t| t.open == 0 && t.journal.is_clean())
        {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: Key) {
        if let Some(t) = self.files.remove(&key)
            && t.shadow >= 0
        {
            // SAFETY: the descriptor is ours.
            unsafe { real::close(t.shadow) };
        }
    }

    /// Bytes `from..to` of an open file are about to change.
    pub fn touch(&mut self, fd: c_int, size: u64, from: u64, to: u64) {
        if let Some(&key) = self.fds.get(&fd) {
            self.touch_file(key, Path::new(&format!("/proc/self/fd/{fd}")), size, from, to);
        }
    }

    /// A file is about to be cut to nothing by being opened.
    pub fn before_truncating_open(&mut self, path: &Path, s: &stat) {
        let key = key(s);
        self.files.entry(key).or_insert_with(|| Tracked::new(path));
        self.touch_file(key, path, s.st_size as u64, 0, s.st_size as u64);
    }

    fn touch_file(&mut self, key: Key, way: &Path, size: u64, from: u64, to: u64) {
        let Some(t) = self.files.get_mut(&key) else {
            return;
        };
        if t.shadow < 0 {
            let way = paths::c(way);
            // SAFETY: the path is a C string.
            t.shadow = unsafe { real::openat(libc::AT_FDCWD, way.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC, 0) };
            if t.shadow < 0 {
                crate::violation("cannot keep the old content of", &t.path);
            }
        }
        let shadow = t.shadow;
        t.journal.touch(size, from, to, |at, out| {
            let mut n = 0;
            while n < out.len() {
                // SAFETY: the buffer's rest is given with its length.
                let r = unsafe {
                    libc::pread(
                        shadow,
                        out[n..].as_mut_ptr().cast(),
                        out.len() - n,
                        at as i64 + n as i64,
                    )
                };
                match usize::try_from(r) {
                    Ok(r) if r > 0 => n += r,
                    _ => break,
                }
            }
            n
        });
    }

    /// The file's size after a change that went through here.
    pub fn changed(&mut self, fd: c_int) {
        if let (Some(key), Some(s)) = (self.fds.get(&fd), stat_fd(fd)) {
            self.sizes.insert(*key, s.st_size as u64);
        }
    }

    pub fn begin_sync(&mut self, fd: c_int) -> Option<(Key, u64, u64)> {
        let key = *self.fds.get(&fd)?;
        let names = self.names.begin_sync();
        self.files.get_mut(&key).map(|t| (key, t.journal.begin_sync(), names))
    }

    pub fn end_sync(&mut self, (key, ticket, names): (Key, u64, u64), ok: bool) {
        if let Some(t) = self.files.get_mut(&key) {
            if ok {
                let size = stat_fd(t.shadow).map_or(0, |s| s.st_size as u64);
                t.journal.end_sync(ticket, size);
            } else {
                t.journal.fail_sync(ticket);
            }
        }
        self.drop_if_clean(key);
        if ok && config::on(&config::NAMES_WITH_FILES) {
            self.names_durable(None, names);
        }
    }

    pub fn names_durable(&mut self, dir: Option<&Path>, ticket: u64) {
        for kept in self.names.end_sync(dir, ticket) {
            let kept = paths::c(&kept);
            // SAFETY: the path is a C string.
            unsafe { real::unlinkat(libc::AT_FDCWD, kept.as_ptr(), 0) };
        }
    }

    /// Gives a file that is about to lose its name another one, aside.
    pub fn keep(&mut self, path: &Path) -> Option<PathBuf> {
        let s = stat_path(path)?;
        if s.st_mode & libc::S_IFMT == libc::S_IFDIR {
            return None;
        }
        self.kept += 1;
        let aside = self.side.join(format!("kept-{}", self.kept));
        let (from, to) = (paths::c(path), paths::c(&aside));
        // SAFETY: the paths are C strings.
        let r = unsafe { real::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), 0) };
        (r == 0).then_some(aside)
    }

    /// The removal or replacement did not happen after all.
    pub fn unkeep(&mut self, kept: Option<PathBuf>) {
        if let Some(kept) = kept {
            let kept = paths::c(&kept);
            // SAFETY: the path is a C string.
            unsafe { real::unlinkat(libc::AT_FDCWD, kept.as_ptr(), 0) };
        }
    }

    pub fn moved(&mut self, from: &Path, to: &Path, replaced: Option<PathBuf>) {
        if stat_path(to).is_some_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFDIR) {
            self.names.moved_dir(from, to);
        }
        for t in self.files.values_mut() {
            if let Ok(rest) = t.path.strip_prefix(from) {
                t.path = if rest.as_os_str().is_empty() {
                    to.to_path_buf()
                } else {
                    to.join(rest)
                };
            }
        }
        self.names.record(
            to,
            What::Renamed {
                from: from.to_path_buf(),
                replaced,
            },
        );
    }

    /// Every file below the watched directory, and whether its size is what went through here.
    pub fn audit(&mut self, learn: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut todo: Vec<PathBuf> = paths::watched().map(Path::to_path_buf).into_iter().collect();
        while let Some(dir) = todo.pop() {
            let Ok(entries) = std::fs::read_dir(&dir) else {
                continue;
            };
            for path in entries.flatten().map(|e| e.path()) {
                let Some(s) = stat_path(&path) else { continue };
                if s.st_mode & libc::S_IFMT == libc::S_IFDIR {
                    todo.push(path);
                } else if is_file(&s) {
                    let size = s.st_size as u64;
                    if learn {
                        self.sizes.insert(key(&s), size);
                    } else if self.sizes.get(&key(&s)) != Some(&size) {
                        wrong.push(format!(
                            "{} ({size} bytes, {:?} went through here)",
                            path.display(),
                            self.sizes.get(&key(&s))
                        ));
                    }
                }
            }
        }
        wrong
    }

    pub fn unsynced_bytes(&self) -> u64 {
        self.files.values().map(|t| t.journal.unsynced_bytes()).sum()
    }
}
