//! Absolute, tidy paths below the watched directory. No allocation before a path is known to be below it.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use libc::{c_char, c_int};

/// The watched directory as it was named, and as it really is.
static WATCHED: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();

pub fn watch(dir: &str) {
    let named = tidy(Path::new(dir));
    let real = match (std::fs::canonicalize(&named), named.parent(), named.file_name()) {
        (Ok(real), _, _) => real,
        (Err(_), Some(parent), Some(name)) => std::fs::canonicalize(parent)
            .map(|p| p.join(name))
            .unwrap_or_else(|_| named.clone()),
        (Err(_), _, _) => named.clone(),
    };
    let _ = WATCHED.set((named, real));
}

pub fn watched() -> Option<&'static Path> {
    WATCHED.get().map(|(_, real)| real.as_path())
}

/// Makes a path absolute and takes out `.`, `..` and doubled slashes.
fn tidy(path: &Path) -> PathBuf {
    let mut out = if path.is_absolute() {
        PathBuf::new()
    } else {
        std::env::current_dir().unwrap_or_default()
    };
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            Component::Normal(_) | Component::RootDir | Component::Prefix(_) => out.push(part),
        }
    }
    out
}

/// The path, if it is the watched directory, below it, or its parent (which holds its name).
///
/// # Safety
/// `path` is a C string.
pub unsafe fn below(dir: c_int, path: *const c_char) -> Option<PathBuf> {
    let (named, real) = WATCHED.get()?;
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    let path = if path.first() == Some(&b'/') {
        // Cheap test first, and without allocation: the allocator itself opens files.
        if !starts_like(path, named) && !starts_like(path, real) {
            // Without allocation too: a path of the parent's length at most.
            let parent = real.parent()?;
            return (path == parent.as_os_str().as_bytes()).then(|| parent.to_path_buf());
        }
        tidy(Path::new(OsStr::from_bytes(path)))
    } else if dir == libc::AT_FDCWD {
        tidy(Path::new(OsStr::from_bytes(path)))
    } else {
        let base = of_fd(dir)?;
        tidy(&base.join(OsStr::from_bytes(path)))
    };
    if let Ok(rest) = path.strip_prefix(named) {
        return Some(if rest.as_os_str().is_empty() {
            real.clone()
        } else {
            real.join(rest)
        });
    }
    let known = path.starts_with(real) || real.parent() == Some(path.as_path());
    known.then_some(path)
}

fn starts_like(path: &[u8], dir: &Path) -> bool {
    // Up to the first component that could be written in another way ("//", "/./").
    let dir = dir.as_os_str().as_bytes();
    path.starts_with(dir) || path.windows(2).any(|w| w == b"//" || w == b"/.")
}

/// Where a descriptor points to.
pub fn of_fd(fd: c_int) -> Option<PathBuf> {
    let link = CString::new(format!("/proc/self/fd/{fd}")).ok()?;
    let mut buf = [0u8; 4096];
    // SAFETY: the buffer's length is given.
    let n = unsafe { libc::readlink(link.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
    let n = usize::try_from(n).ok()?;
    Some(PathBuf::from(OsStr::from_bytes(&buf[..n])))
}

pub fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}
