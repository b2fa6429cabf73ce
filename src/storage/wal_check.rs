//! Checks the write-ahead log of log/ before RocksDB opens it, and cuts a torn tail.
//!
//! RocksDB cannot tell a write that was torn by a power failure before its sync from one that was damaged after it:
//! the tolerant modes drop both, the strict one refuses both. We can, because every write ends with its number and a
//! rolling digest (`committer.rs`), because a write is only begun when the one before is synced, and because the
//! witness names a write that was synced:
//!
//! - a bad place with any good write after it was synced once: damage;
//! - a bad place at the end, with fewer writes before it than the witness names: damage;
//! - any other bad place at the end is the one write whose sync never returned: nobody was told of it. The tail is kept
//!   aside and cut, and RocksDB then opens a log without a fault in its strictest mode.
//!
//! The format read here: blocks of 32 KiB; in each, records of CRC-32C (masked, 4, over type and content), length (2),
//! type (1: whole, 2, 3, 4: first, middle, last part), content. Fewer than 7 bytes left in a block are filled up.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::committer::{BATCH_HEAD_BYTES, decode_batch_record, next_digest};
use super::crc32c::{crc32c, unmask};
use super::error::Area;
use super::identity::sync_dir;
use super::keys::Key;
use super::record::{FRAME_BYTES, unframe};
use super::witness::Mark;

/// Of RocksDB's log format, which manifests have as well: a file consists of blocks of so many bytes.
pub(super) const BLOCK: usize = 32 << 10;
/// Checksum (4), length of the content (2), kind (1).
pub(super) const HEADER: usize = 7;
const WHOLE: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// Longest value of the batch record: number and digest.
const RECORD_VALUE: usize = FRAME_BYTES + 16;
/// Put tag, key length, key, value length, value.
const RECORD_TAIL: usize = 4 + RECORD_VALUE;

/// What was found, when nothing was wrong.
#[derive(Debug, Default)]
pub(super) struct WalReport {
    /// Every write in the WAL files, ascending.
    pub marks: Vec<Mark>,
    /// Bytes cut off the end, if any.
    pub cut_bytes: u64,
}

impl WalReport {
    /// The digest at this number, if the write is still in the WAL.
    pub fn digest_at(&self, number: u64) -> Option<u64> {
        let at = self.marks.binary_search_by_key(&number, |m| m.number).ok()?;
        Some(self.marks[at].digest)
    }
}

/// What was wrong.
#[derive(Debug)]
pub(super) enum WalFault {
    Damaged { file: PathBuf, what: String },
    Io(std::io::Error),
}

impl From<std::io::Error> for WalFault {
    fn from(e: std::io::Error) -> Self {
        WalFault::Io(e)
    }
}

/// A place that cannot be read on from.
struct Bad {
    file: PathBuf,
    /// Where the last good record ends.
    at: u64,
    what: String,
}

/// Checks every WAL file, cuts a torn tail (kept in `aside`), and syncs what remains: what is recovered now counts as
/// durable from now on, even if it was never synced before.
pub(super) fn check(dir: &Path, aside: &Path, witness: Mark) -> Result<WalReport, WalFault> {
    let files = wal_files(dir)?;
    let mut report = WalReport::default();
    let mut bad: Option<Bad> = None;
    for path in &files {
        let scan = Scan::run(path, report.marks.last().copied())?;
        let damaged = |what: String| WalFault::Damaged {
            file: path.clone(),
            what,
        };
        if let Some(what) = scan.broken_chain {
            return Err(damaged(what));
        }
        if let Some(earlier) = &bad
            && !scan.marks.is_empty()
        {
            return Err(WalFault::Damaged {
                file: earlier.file.clone(),
                what: format!("{} at byte {}, with later writes after it", earlier.what, earlier.at),
            });
        }
        report.marks.extend(scan.marks);
        if let Some((at, what)) = scan.bad {
            if scan.good_after_bad {
                return Err(damaged(format!("{what} at byte {at}, with later writes after it")));
            }
            if bad.is_some() {
                return Err(damaged(format!(
                    "{what} at byte {at}, and the file before ends badly too"
                )));
            }
            bad = Some(Bad {
                file: path.clone(),
                at,
                what,
            });
        }
    }
    if let Some(digest) = report.digest_at(witness.number)
        && digest != witness.digest
    {
        return Err(WalFault::Damaged {
            file: dir.to_path_buf(),
            what: format!("write {} is not the one the witness saw", witness.number),
        });
    }
    if let Some(bad) = bad {
        let last = report.marks.last().map_or(0, |m| m.number);
        // With no write left at all, how far the log reached is known only from its tables; judge that after opening.
        if last < witness.number && !report.marks.is_empty() {
            return Err(WalFault::Damaged {
                file: bad.file,
                what: format!(
                    "{} at byte {}: it ends with write {last}, but write {} was synced",
                    bad.what, bad.at, witness.number
                ),
            });
        }
        report.cut_bytes = cut(&bad, aside)?;
    }
    for path in &files {
        File::open(path)?.sync_all()?;
    }
    sync_dir(dir)?;
    Ok(report)
}

/// The WAL files in order.
pub(super) fn wal_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let is_wal = path.extension().is_some_and(|e| e == "log");
        let number = path
            .file_stem()
            .and_then(|s| s.to_str())
            .and_then(|s| s.parse::<u64>().ok());
        if let (true, Some(number)) = (is_wal, number) {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

fn cut(bad: &Bad, aside: &Path) -> std::io::Result<u64> {
    let file = OpenOptions::new().read(true).write(true).open(&bad.file)?;
    let length = file.metadata()?.len();
    let cut_bytes = length - bad.at;
    let mut tail = Vec::new();
    std::io::Seek::seek(&mut &file, std::io::SeekFrom::Start(bad.at))?;
    (&file).read_to_end(&mut tail)?;
    if tail.iter().any(|&b| b != 0) {
        fs::create_dir_all(aside)?;
        let name = bad.file.file_name().and_then(|n| n.to_str()).unwrap_or("wal");
        let kept = aside.join(format!("torn-tail-{name}-{}", bad.at));
        fs::write(&kept, &tail)?;
        tracing::warn!(
            file = %bad.file.display(), at = bad.at, cut_bytes, kept = %kept.display(), what = bad.what,
            "the log ends with a write that was never synced; its bytes are kept aside and cut"
        );
    }
    file.set_len(bad.at)?;
    file.sync_all()?;
    Ok(cut_bytes)
}

/// One pass over one file.
struct Scan {
    marks: Vec<Mark>,
    /// First place that cannot be read on from: offset and what is there.
    bad: Option<(u64, String)>,
    /// A whole write was found after the bad place.
    good_after_bad: bool,
    /// Records are whole, but a write between them is missing or changed.
    broken_chain: Option<String>,
    /// The write before, in this file or the one before.
    before: Option<Mark>,
    /// A write was already read from this very file.
    in_file: bool,
    /// Content gathered of a record in parts, and where it began.
    parts: Option<(u64, Vec<u8>)>,
    /// End of the last good record.
    good_end: u64,
}

impl Scan {
    fn run(path: &Path, before: Option<Mark>) -> std::io::Result<Scan> {
        let mut scan = Scan {
            marks: Vec::new(),
            bad: None,
            good_after_bad: false,
            broken_chain: None,
            before,
            in_file: false,
            parts: None,
            good_end: 0,
        };
        let mut file = File::open(path)?;
        let mut chunk = vec![0; 32 * BLOCK];
        let mut offset = 0u64;
        loop {
            let n = read_full(&mut file, &mut chunk)?;
            for block in chunk[..n].chunks(BLOCK) {
                scan.block(offset, block);
                offset += block.len() as u64;
                if scan.broken_chain.is_some() || scan.good_after_bad {
                    return Ok(scan);
                }
            }
            if n < chunk.len() {
                break;
            }
        }
        if let Some((at, _)) = scan.parts.take() {
            scan.set_bad(at, "a write without its end");
        }
        Ok(scan)
    }

    fn set_bad(&mut self, at: u64, what: &str) {
        self.parts = None;
        if self.bad.is_none() {
            self.bad = Some((at.min(self.good_end), what.to_string()));
        }
    }

    fn block(&mut self, offset: u64, block: &[u8]) {
        let mut at = 0;
        while block.len() - at >= HEADER {
            match parse(&block[at..]) {
                Ok((kind, content)) => {
                    let end = at + HEADER + content.len();
                    self.record(offset + at as u64, offset + end as u64, kind, content);
                    at = end;
                }
                Err(what) => {
                    self.set_bad(offset + at as u64, what);
                    // Look for a record that begins anywhere later in this block: is this the end, or the middle?
                    match (at + 1..block.len().saturating_sub(HEADER)).find(|&i| parse(&block[i..]).is_ok()) {
                        Some(next) => at = next,
                        None => return,
                    }
                }
            }
        }
        let rest = &block[at..];
        let full_block = block.len() == BLOCK;
        if !rest.is_empty() && (!full_block || rest.iter().any(|&b| b != 0)) {
            self.set_bad(offset + at as u64, "a header cut short");
        }
    }

    fn record(&mut self, start: u64, end: u64, kind: u8, content: &[u8]) {
        match kind {
            WHOLE => {
                if self.parts.is_some() {
                    self.set_bad(start, "a write without its end");
                }
                self.write(content, end);
            }
            FIRST => {
                if self.parts.is_some() {
                    self.set_bad(start, "a write without its end");
                }
                self.parts = Some((start, content.to_vec()));
            }
            MIDDLE | LAST => {
                let Some((_, parts)) = &mut self.parts else {
                    self.set_bad(start, "a part without its beginning");
                    return;
                };
                parts.extend_from_slice(content);
                if kind == LAST
                    && let Some((_, whole)) = self.parts.take()
                {
                    self.write(&whole, end);
                }
            }
            // RocksDB's own notes (the predecessor of this file, …); it checks them itself.
            _ => self.good(end),
        }
    }

    fn good(&mut self, end: u64) {
        if self.bad.is_none() {
            self.good_end = end;
        }
    }

    fn write(&mut self, content: &[u8], end: u64) {
        let mark = match read_mark(content) {
            Ok(Some(mark)) => mark,
            Ok(None) => return self.good(end),
            Err(what) => {
                if self.bad.is_none() {
                    self.broken_chain = Some(what);
                }
                return;
            }
        };
        if self.bad.is_some() {
            self.good_after_bad = true;
            return;
        }
        let follows = self.before.is_some_and(|b| b.number + 1 == mark.number);
        if let Some(before) = self.before {
            // Between two files there may be a gap: files that are no longer needed go one by one.
            if self.in_file && !follows || mark.number <= before.number {
                self.broken_chain = Some(format!("write {} follows write {}", mark.number, before.number));
                return;
            }
            let records = &content[BATCH_HEAD_BYTES..content.len() - RECORD_TAIL];
            if follows && next_digest(before.digest, records) != mark.digest {
                self.broken_chain = Some(format!(
                    "write {} does not continue write {}",
                    mark.number, before.number
                ));
                return;
            }
        }
        self.before = Some(mark);
        self.in_file = true;
        self.marks.push(mark);
        self.good(end);
    }
}

/// A record at the front of `bytes`.
fn parse(bytes: &[u8]) -> Result<(u8, &[u8]), &'static str> {
    let crc = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let length = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
    let kind = bytes[6];
    if kind == 0 && length == 0 {
        return Err("empty space");
    }
    let Some(content) = bytes.get(HEADER..HEADER + length) else {
        return Err("a record that runs past its block");
    };
    if crc32c(&bytes[6..HEADER + length]) != unmask(crc) {
        return Err("a record with a wrong checksum");
    }
    Ok((kind, content))
}

/// The mark at the end of a write; `None` for a write without records, which RocksDB makes now and then.
fn read_mark(content: &[u8]) -> Result<Option<Mark>, String> {
    if content.len() == BATCH_HEAD_BYTES {
        return Ok(None);
    }
    let key = Key::BatchRecord.encode();
    let tail = content
        .len()
        .checked_sub(RECORD_TAIL)
        .filter(|&at| at >= BATCH_HEAD_BYTES)
        .map(|at| &content[at..]);
    let value = tail
        .and_then(|t| t.strip_prefix(&[1, key.len() as u8]))
        .and_then(|t| t.strip_prefix(&key[..]))
        .and_then(|t| t.strip_prefix(&[RECORD_VALUE as u8]))
        .ok_or("a write that does not end with its number")?;
    let payload = unframe(Area::Log, &key, value).map_err(|e| e.to_string())?;
    decode_batch_record(payload)
        .map(Some)
        .ok_or_else(|| "a write with an unreadable number".to_string())
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read(&mut buffer[n..]) {
            Ok(0) => break,
            Ok(k) => n += k,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}
