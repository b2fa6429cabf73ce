//! How much room there is, and refusing early when there is little.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::error::Area;
use super::metric_names as names;
use super::shared::Shared;

/// Bytes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// Free on the file system, for an unprivileged process, less what was accepted since it was measured.
    pub free: u64,
    /// Size of the file system.
    pub total: u64,
    /// Publishes are to be refused as not processed.
    pub low: bool,
    /// Held by both databases.
    pub held: u64,
    /// Estimate of what of it is live.
    pub live_estimate: u64,
}

/// One byte published may take up to this many on disk before anything is given back: WAL, blob file, flushed log.
const BYTES_PER_ACCEPTED_BYTE: u64 = 2;

/// Latest measurements.
#[derive(Debug, Default)]
pub(super) struct SpaceMeter {
    free: AtomicU64,
    total: AtomicU64,
    low: AtomicBool,
    pub held: AtomicU64,
    pub live: AtomicU64,
}

impl SpaceMeter {
    /// Asks the file system.
    pub fn measure(&self, dir: &Path, shared: &Shared) -> std::io::Result<()> {
        let (free, total) = file_system_space(dir)?;
        shared.accepted_bytes.store(0, Ordering::Relaxed);
        self.free.store(free, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        metrics::gauge!(names::SPACE_FREE_BYTES).set(free as f64);
        Ok(())
    }

    /// The state now, counting what was accepted since the last measurement.
    pub fn read(&self, min_free: u64, shared: &Shared) -> Space {
        let accepted = shared.accepted_bytes.load(Ordering::Relaxed);
        let free = self
            .free
            .load(Ordering::Relaxed)
            .saturating_sub(accepted.saturating_mul(BYTES_PER_ACCEPTED_BYTE));
        // Once low, it takes a quarter more to be well again, so that it does not flutter.
        let threshold = if self.low.load(Ordering::Relaxed) {
            min_free.saturating_add(min_free / 4)
        } else {
            min_free
        };
        let low = free < threshold;
        if low != self.low.swap(low, Ordering::Relaxed) {
            metrics::gauge!(names::SPACE_LOW).set(if low { 1.0 } else { 0.0 });
            if low {
                tracing::warn!(free, min_free, "little space left: publishes are refused");
            } else {
                tracing::info!(free, min_free, "there is space again");
            }
        }
        Space {
            free,
            total: self.total.load(Ordering::Relaxed),
            low,
            held: self.held.load(Ordering::Relaxed),
            live_estimate: self.live.load(Ordering::Relaxed),
        }
    }
}

/// Bytes that both databases hold in a data directory, and those that are free beside it. Blocks for a moment.
pub fn held_and_free(dir: &Path) -> std::io::Result<(u64, u64)> {
    let mut held = 0;
    for area in [Area::Log, Area::State] {
        for entry in std::fs::read_dir(dir.join(area.as_str()))? {
            match entry?.metadata() {
                Ok(file) => held += file.len(),
                // Databases that are open remove files.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok((held, file_system_space(dir)?.0))
}

/// Free and total bytes of the file system that holds `dir`.
#[allow(unsafe_code)]
fn file_system_space(dir: &Path) -> std::io::Result<(u64, u64)> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // There is no safe binding in the dependencies: a path that ends in zero and a buffer of the right type.
    let stat = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        stat.assume_init()
    };
    let block = stat.f_frsize;
    Ok((stat.f_bavail.saturating_mul(block), stat.f_blocks.saturating_mul(block)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_low_it_takes_a_quarter_more_to_be_well_again() {
        let (meter, shared) = (SpaceMeter::default(), Shared::new());
        let low = |free: u64, accepted: u64| {
            meter.free.store(free, Ordering::Relaxed);
            shared.accepted_bytes.store(accepted, Ordering::Relaxed);
            meter.read(1000, &shared).low
        };
        assert!(!low(1000, 0));
        assert!(low(1000, 1), "what was accepted counts before it is measured");
        assert!(low(1000, 0));
        assert!(low(1249, 0));
        assert!(!low(1250, 0));
        assert!(!low(1001, 0));
        assert!(low(0, u64::MAX));
    }
}
