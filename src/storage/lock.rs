//! One process per data directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use super::error::OpenError;

/// The file that is locked; it holds the process id as text.
pub const LOCK_FILE: &str = "LOCK";

/// Held for as long as either database is open.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes the lock or says who has it.
    pub fn take(dir: &Path) -> Result<DirLock, OpenError> {
        let io = |what, e: std::io::Error| OpenError::Io {
            dir: dir.to_path_buf(),
            what,
            detail: e.to_string(),
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(LOCK_FILE))
            .map_err(|e| io("opening the lock file", e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // The text is only told to a person; without it the lock is refused all the same.
                let _ = file.read_to_string(&mut pid);
                let pid = pid.trim();
                return Err(OpenError::Locked {
                    dir: dir.to_path_buf(),
                    pid: if pid.is_empty() { "unknown".into() } else { pid.into() },
                });
            }
            Err(TryLockError::Error(e)) => return Err(io("locking the directory", e)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|e| io("writing the lock file", e))?;
        Ok(DirLock { _file: file })
    }
}
