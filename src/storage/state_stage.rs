//! The state of one group while it is being received: table files in `incoming/GROUP/`, each with a note (`.toc`) of
//! the pieces in it and the CRC of its bytes, written once the file is complete. Nothing of it is visible.
//!
//! What is complete outlives a lost connection and a restart. Another attempt, from the same or another sender, tells
//! its pieces first: files of which all pieces are among them count as received; so does what the replica's own state
//! has (batches stay where they are, the index is copied). Only the rest travels.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::identity;
use super::staged_file::{Checked, NOTE_SUFFIX, StagedFile, TableOptions, TableWriter, is_whole};
use super::state::StateDb;
use super::state_export::ExportedShards;
use super::state_pieces::{Place, Stretch, common, united};
use crate::model::{GroupId, ShardId};

pub(super) const INCOMING_DIR: &str = "incoming";
pub(super) const INSTALL_FILE: &str = "INSTALL";
/// What was received for a transfer that does not go on is kept for so long.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(600);

/// Why nothing was staged. Nothing of the store has changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StageError {
    /// What was received is not an export of this format, or damaged.
    #[error("what was received is refused: {0}")]
    Refused(String),
    /// The source ended early.
    #[error("{0}")]
    Ended(String),
    #[error("cannot write what was received: {0}")]
    Io(String),
    #[error("a snapshot of {0} is being received already")]
    Busy(GroupId),
}

pub(super) fn io_error(e: impl std::fmt::Display) -> StageError {
    StageError::Io(e.to_string())
}

/// A group's place in `incoming/`, for one at a time.
pub(super) struct Incoming {
    pub db: StateDb,
    pub group: GroupId,
    pub dir: PathBuf,
}

impl Incoming {
    fn new(db: &StateDb, group: GroupId) -> Result<Self, StageError> {
        let dir = db.incoming().join(group.to_string());
        let mut receiving = db.0.receiving.lock();
        fs::create_dir_all(&dir).map_err(io_error)?;
        if !receiving.insert(group) {
            return Err(StageError::Busy(group));
        }
        Ok(Self {
            db: db.clone(),
            group,
            dir,
        })
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.db.0.receiving.lock().remove(&self.group);
    }
}

pub(super) fn remove_dir(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(dir = %dir.display(), %error, "cannot remove what was received; it is tried again later");
    }
}

/// A round of receiving.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Whole, as they were sent.
    pub records: u64,
    /// What was damaged on the way, to be sent again. United.
    pub again: Vec<Stretch>,
}

/// Whether all is here, and as it was received.
#[derive(Debug)]
pub enum Finish {
    Complete(StagedGroup),
    /// These stretches must come again: their files were damaged. United.
    Again(Staging, Vec<Stretch>),
}

/// A group that is being received. What of it is complete stays when this is dropped.
#[derive(Debug)]
pub struct Staging {
    pub(super) place: Incoming,
    pub(super) shards: ExportedShards,
    pub(super) files: Vec<StagedFile>,
    next_file: u32,
    /// Of every piece known, where it begins: each reaches up to the next.
    pub(super) starts: BTreeSet<Place>,
    /// Batches that stay where they are.
    pub(super) kept: Vec<Stretch>,
    /// The shards that they may be of.
    pub(super) kept_of: BTreeSet<ShardId>,
}

/// A received group, complete and on disk, but not visible.
#[derive(Debug)]
pub struct StagedGroup {
    pub(super) place: Incoming,
    pub(super) shards: ExportedShards,
    pub(super) files: Vec<StagedFile>,
    /// Batches that stay where they are. United, ascending.
    pub(super) kept: Vec<Stretch>,
    /// The shards that they may be of.
    pub(super) kept_of: BTreeSet<ShardId>,
    /// Records in the files.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl StagedGroup {
    /// Those of the group.
    pub fn shard_ids(&self) -> impl Iterator<Item = ShardId> + '_ {
        self.shards.keys().copied()
    }

    /// How many shards the group has.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// It is not needed.
    pub fn discard(self) {
        remove_dir(&self.place.dir);
    }
}

impl Staging {
    /// Begins to receive a group with these shards, or goes on with what is there. Reads every file that is there once.
    pub fn open(db: &StateDb, group: GroupId, shards: ExportedShards) -> Result<Self, StageError> {
        let place = Incoming::new(db, group)?;
        let mut files = Vec::new();
        let mut others = Vec::new();
        let mut next_file = 0;
        for entry in fs::read_dir(&place.dir).map_err(io_error)? {
            let name = entry.map_err(io_error)?.file_name().to_string_lossy().into_owned();
            let number = name.split('.').next().and_then(|n| n.parse::<u32>().ok());
            next_file = next_file.max(number.map_or(0, |n| n + 1));
            others.push(name);
        }
        others.sort();
        for note in others.iter().filter(|name| name.ends_with(NOTE_SUFFIX)) {
            let name = note.trim_end_matches(NOTE_SUFFIX);
            let text = fs::read_to_string(place.dir.join(note)).unwrap_or_default();
            match StagedFile::parse(name, &text) {
                Some(file) if is_whole(&place.dir, &file) => files.push(file),
                Some(_) | None => {
                    tracing::warn!(%group, name, "a file of a snapshot is damaged in incoming/; it is received again");
                }
            }
        }
        let kept: HashSet<String> = files.iter().flat_map(|f| [f.name.clone(), f.note_name()]).collect();
        for name in others.iter().filter(|name| !kept.contains(*name)) {
            fs::remove_file(place.dir.join(name)).map_err(io_error)?;
        }
        Ok(Self {
            place,
            shards,
            files,
            next_file,
            starts: BTreeSet::new(),
            kept: Vec::new(),
            kept_of: BTreeSet::new(),
        })
    }

    /// Whether comparing may save anything: something was received before, or the group has a state here.
    pub fn has_something(&self) -> bool {
        let db = &self.place.db;
        !self.files.is_empty() || db.0.applied.lock().contains_key(&self.place.group)
    }

    /// Bytes of what is complete.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    pub(super) fn writer<'o>(&self, options: &'o TableOptions) -> TableWriter<'o> {
        TableWriter::new(options, &self.place.dir, self.next_file)
    }

    pub(super) fn take_over(&mut self, writer: TableWriter<'_>) {
        self.next_file = writer.next;
        self.files.extend(writer.done);
    }

    /// Receives pieces of `wanted`, each with its CRC-32, in order, from `next`, until `None`. Its error ends the
    /// receiving; what was received until then stays. Blocks; use a thread that may.
    pub fn receive(
        &mut self,
        wanted: &[Stretch],
        mut next: impl FnMut() -> Result<Option<(u32, Bytes)>, String>,
    ) -> Result<Received, StageError> {
        let options = TableOptions::new();
        let mut writer = self.writer(&options);
        let mut gaps = Gaps::default();
        let mut records = 0;
        let result = loop {
            let (crc, data) = match next() {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break Ok(()),
                Err(text) => break Err(StageError::Ended(text)),
            };
            if crc != crc32fast::hash(&data) {
                tracing::warn!(group = %self.place.group, "a piece of a snapshot was damaged on the way; it is sent again");
                gaps.damaged();
                continue;
            }
            let put = Checked::new(self.place.group, &self.shards, data).and_then(|piece| {
                if gaps.last.as_ref().is_some_and(|last| *last >= piece.from) {
                    return Err(StageError::Refused("its pieces are out of order".into()));
                }
                writer.put(&piece)?;
                Ok(piece)
            });
            match put {
                Ok(piece) => {
                    records += piece.records.len() as u64;
                    gaps.received(&piece);
                    self.starts.insert(piece.from);
                }
                Err(error) => break Err(error),
            }
        };
        let closed = writer.close();
        self.take_over(writer);
        match result.and(closed) {
            Ok(()) => Ok(Received {
                records,
                again: common(&united(gaps.end()), wanted),
            }),
            Err(error) => {
                // A full disk must not be kept full by what is of no use now.
                if matches!(error, StageError::Io(_)) {
                    self.files.clear();
                    remove_dir(&self.place.dir);
                }
                Err(error)
            }
        }
    }

    /// Reads every file and holds it against its CRC. Blocks; use a thread that may.
    pub fn finish(mut self) -> Result<Finish, StageError> {
        let dir = self.place.dir.clone();
        let mut again = Vec::new();
        let (starts, group) = (&self.starts, self.place.group);
        self.files.retain(|file| {
            if is_whole(&dir, file) {
                return true;
            }
            tracing::warn!(%group, name = file.name, "a file of a snapshot is damaged in incoming/; it is received again");
            again.extend(file.pieces.iter().map(|(place, _)| Stretch {
                from: place.clone(),
                to: starts.range(place.after()..).next().cloned(),
            }));
            file.remove(&dir);
            false
        });
        if !again.is_empty() {
            return Ok(Finish::Again(self, united(again)));
        }
        identity::sync_dir(&dir).map_err(io_error)?;
        Ok(Finish::Complete(StagedGroup {
            records: self.files.iter().map(|f| f.records).sum(),
            bytes: self.bytes(),
            place: self.place,
            shards: self.shards,
            files: self.files,
            kept: self.kept,
            kept_of: self.kept_of,
        }))
    }
}

/// What is missing of what was sent.
#[derive(Default)]
struct Gaps {
    /// The last record received.
    last: Option<Place>,
    open: Option<Place>,
    gaps: Vec<Stretch>,
}

impl Gaps {
    fn damaged(&mut self) {
        let from = || self.last.as_ref().map_or_else(Place::start, Place::after);
        self.open = Some(self.open.take().unwrap_or_else(from));
    }

    fn received(&mut self, piece: &Checked) {
        if let Some(from) = self.open.take() {
            self.gaps.push(Stretch {
                from,
                to: Some(piece.from.clone()),
            });
        }
        self.last = Some(piece.last());
    }

    fn end(mut self) -> Vec<Stretch> {
        self.gaps.extend(self.open.map(|from| Stretch { from, to: None }));
        self.gaps
    }
}

impl StateDb {
    pub(super) fn incoming(&self) -> PathBuf {
        let state = self.0.db.path();
        state.parent().unwrap_or(state).join(INCOMING_DIR)
    }

    /// Receives a group from nothing, and in one go: `next` gives its pieces in order, and `None` at the end; its error
    /// ends the staging. Blocks; use a thread that may.
    pub fn stage_group(
        &self,
        group: GroupId,
        shards: ExportedShards,
        mut next: impl FnMut() -> Result<Option<Bytes>, String>,
    ) -> Result<StagedGroup, StageError> {
        let mut staging = Staging::open(self, group, shards)?;
        for file in staging.files.drain(..) {
            file.remove(&staging.place.dir);
        }
        let with_crc = |data: Bytes| (crc32fast::hash(&data), data);
        staging.receive(&[Stretch::everything()], || Ok(next()?.map(with_crc)))?;
        match staging.finish()? {
            Finish::Complete(staged) => Ok(staged),
            Finish::Again(..) => Err(StageError::Io("what was written is not what is read".into())),
        }
    }

    /// Removes what was received for transfers that have not gone on for so long.
    pub fn sweep_incoming(&self, idle_for: Duration) {
        let Ok(entries) = fs::read_dir(self.incoming()) else {
            return;
        };
        // Held throughout: nobody begins to receive into what is being removed.
        let receiving = self.0.receiving.lock();
        let active: BTreeSet<String> = receiving.iter().map(GroupId::to_string).collect();
        for dir in entries.flatten() {
            let name = dir.file_name().to_string_lossy().into_owned();
            let path = dir.path();
            if active.contains(&name) || path.join(INSTALL_FILE).exists() {
                continue;
            }
            let touched = newest(&path);
            let idle = touched.and_then(|at| SystemTime::now().duration_since(at).ok());
            if idle.is_some_and(|idle| idle >= idle_for) {
                tracing::info!(dir = %path.display(), "removing a snapshot that was not received to its end");
                remove_dir(&path);
            }
        }
    }
}

/// When anything in a directory was written last.
fn newest(dir: &Path) -> Option<SystemTime> {
    let of = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| of(&file.path())).chain(of(dir)).max()
}

#[cfg(test)]
mod tests;
