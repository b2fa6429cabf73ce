//! Which file descriptors are watched. Read without a lock on every call, so that everything else costs next to nothing.

use std::sync::atomic::{AtomicU32, Ordering};

const MAX: usize = 1 << 16;

const NOTHING: u32 = 0;
const DIRECTORY: u32 = 1;
const FILE: u32 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Directory,
    /// A regular file open for writing.
    File,
}

static TABLE: [AtomicU32; MAX] = [const { AtomicU32::new(NOTHING) }; MAX];

fn slot(fd: i32) -> Option<&'static AtomicU32> {
    usize::try_from(fd).ok().and_then(|i| TABLE.get(i))
}

pub fn get(fd: i32) -> Option<Kind> {
    match slot(fd)?.load(Ordering::Acquire) {
        DIRECTORY => Some(Kind::Directory),
        FILE => Some(Kind::File),
        _ => None,
    }
}

pub fn set(fd: i32, kind: Option<Kind>) {
    let value = match kind {
        None => NOTHING,
        Some(Kind::Directory) => DIRECTORY,
        Some(Kind::File) => FILE,
    };
    if let Some(slot) = slot(fd) {
        slot.store(value, Ordering::Release);
    }
}
