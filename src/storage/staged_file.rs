//! The files of a group that is being received: tables as the engine takes them over, each with a note of the pieces in
//! it and the CRC of its bytes, written once it is complete.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rocksdb::{DBCompressionType, Options, SstFileWriter};

use super::identity;
use super::state_export::{ExportedShards, check};
use super::state_pieces::{Digest, Family, Place, take_record};
use super::state_stage::{StageError, io_error};
use crate::model::GroupId;

pub(super) const NOTE_SUFFIX: &str = ".toc";
/// A file of a family is closed at this size: a crash loses at most the open one, and a file with one piece that is out
/// of date is of no use. The index changes in many places.
const FILE_BYTES: [u64; 2] = [8 << 20, 32 << 20];

/// A complete file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StagedFile {
    pub family: Family,
    pub name: String,
    /// CRC-32 of all its bytes.
    crc: u32,
    pub records: u64,
    /// Of its pieces, as they travelled.
    pub bytes: u64,
    pub pieces: Vec<(Place, Digest)>,
}

impl StagedFile {
    pub fn note_name(&self) -> String {
        format!("{}{NOTE_SUFFIX}", self.name)
    }

    fn to_text(&self) -> String {
        let mut text = format!(
            "mainstem-staged 1\nfamily {}\nfile {:08x} {} {}\n",
            self.family.name(),
            self.crc,
            self.records,
            self.bytes
        );
        for (place, digest) in &self.pieces {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "piece {digest} {}", hex(&place.key));
        }
        identity::seal(text)
    }

    pub fn parse(name: &str, text: &str) -> Option<Self> {
        let mut lines = identity::unseal(text).ok()?.lines();
        if lines.next()? != "mainstem-staged 1" {
            return None;
        }
        let family = lines.next()?.strip_prefix("family ")?;
        let family = Family::ALL.into_iter().find(|f| f.name() == family)?;
        let mut numbers = lines.next()?.strip_prefix("file ")?.split(' ');
        let crc = u32::from_str_radix(numbers.next()?, 16).ok()?;
        let (records, bytes) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        let piece = |line: &str| {
            let (digest, key) = line.strip_prefix("piece ")?.split_once(' ')?;
            Some((Place::new(family, unhex(key)?), digest.parse().ok()?))
        };
        Some(Self {
            family,
            name: name.to_owned(),
            crc,
            records,
            bytes,
            pieces: lines.map(piece).collect::<Option<_>>()?,
        })
    }

    pub fn remove(&self, dir: &Path) {
        // The note first: a file without one is nothing.
        for name in [self.note_name(), self.name.clone()] {
            if let Err(error) = fs::remove_file(dir.join(&name))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(dir = %dir.display(), name, %error, "cannot remove a file that was received");
            }
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let two = |two: &[u8]| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok();
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks(2).map(two).collect()
}

fn crc_of(path: &Path) -> io::Result<u32> {
    let mut file = File::open(path)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// How the files are written, by family.
pub(super) struct TableOptions([Options; 2]);

impl TableOptions {
    pub fn new() -> Self {
        let of = |compression| {
            let mut options = Options::default();
            options.set_compression_type(compression);
            options
        };
        Self([of(DBCompressionType::Lz4), of(DBCompressionType::None)])
    }
}

/// Pieces into files.
pub(super) struct TableWriter<'o> {
    options: &'o TableOptions,
    dir: PathBuf,
    /// The next file's number.
    pub next: u32,
    open: Option<(SstFileWriter<'o>, StagedFile, Bytes)>,
    pub done: Vec<StagedFile>,
}

impl<'o> TableWriter<'o> {
    pub fn new(options: &'o TableOptions, dir: &Path, next: u32) -> Self {
        Self {
            options,
            dir: dir.to_owned(),
            next,
            open: None,
            done: Vec::new(),
        }
    }

    pub fn put(&mut self, piece: &Checked) -> Result<(), StageError> {
        let (family, first) = (piece.from.family, &piece.from.key);
        if let Some((writer, file, last)) = &self.open
            && (file.family != family || last >= first || writer.file_size() >= FILE_BYTES[family as usize])
        {
            self.close()?;
        }
        if self.open.is_none() {
            let name = format!("{:06}.sst", self.next);
            self.next += 1;
            let writer = SstFileWriter::create(&self.options.0[family as usize]);
            open_at(&writer, &self.dir.join(&name))?;
            let file = StagedFile {
                family,
                name,
                crc: 0,
                records: 0,
                bytes: 0,
                pieces: Vec::new(),
            };
            self.open = Some((writer, file, Bytes::new()));
        }
        let Some((writer, file, last)) = &mut self.open else {
            return Ok(());
        };
        for (key, value) in &piece.records {
            writer.put(key, value).map_err(io_error)?;
            *last = key.clone();
        }
        file.records += piece.records.len() as u64;
        file.bytes += piece.bytes;
        file.pieces.push((piece.from.clone(), piece.digest));
        Ok(())
    }

    /// Ends the open file: from here on it counts.
    pub fn close(&mut self) -> Result<(), StageError> {
        let Some((mut writer, mut file, _)) = self.open.take() else {
            return Ok(());
        };
        // The engine syncs it.
        writer.finish().map_err(io_error)?;
        file.crc = crc_of(&self.dir.join(&file.name)).map_err(io_error)?;
        identity::write_atomically(&self.dir, &file.note_name(), &file.to_text()).map_err(io_error)?;
        self.done.push(file);
        Ok(())
    }
}

fn open_at(writer: &SstFileWriter<'_>, path: &Path) -> Result<(), StageError> {
    writer.open(path).map_err(io_error)
}

/// A piece whose records may be part of the group.
pub(super) struct Checked {
    pub from: Place,
    digest: Digest,
    bytes: u64,
    pub records: Vec<(Bytes, Bytes)>,
}

impl Checked {
    pub fn new(group: GroupId, shards: &ExportedShards, data: Bytes) -> Result<Self, StageError> {
        let (digest, bytes) = (Digest::of(&data), data.len() as u64);
        let refused = |what: &str| StageError::Refused(what.into());
        let mut rest = data;
        let mut records: Vec<(Bytes, Bytes)> = Vec::new();
        let mut of = None;
        while !rest.is_empty() {
            let (family, key, value) = take_record(&mut rest).ok_or_else(|| refused("a record is cut short"))?;
            if *of.get_or_insert(family) != family {
                return Err(refused("a piece is of two families"));
            }
            if records.last().is_some_and(|(last, _)| *last >= key) {
                return Err(refused("its records are out of order"));
            }
            check(group, family, &key, &value, shards)?;
            records.push((key, value));
        }
        match (of, records.first()) {
            (Some(family), Some((first, _))) => Ok(Self {
                from: Place::new(family, first.clone()),
                digest,
                bytes,
                records,
            }),
            _ => Err(refused("a piece is empty")),
        }
    }

    pub fn last(&self) -> Place {
        let key = self.records.last().map_or(&self.from.key, |(key, _)| key);
        Place::new(self.from.family, key.clone())
    }
}

pub(super) fn digests(files: &[StagedFile]) -> HashSet<Digest> {
    files
        .iter()
        .flat_map(|f| f.pieces.iter().map(|(_, digest)| *digest))
        .collect()
}

pub(super) fn is_whole(dir: &Path, file: &StagedFile) -> bool {
    crc_of(&dir.join(&file.name)).is_ok_and(|crc| crc == file.crc)
}
