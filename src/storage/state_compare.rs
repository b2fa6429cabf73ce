//! Which of a sender's pieces a replica has already: among the files that it received before, or in its own state.

use std::collections::HashSet;

use bytes::Bytes;

use super::staged_file::{Checked, TableOptions, digests};
use super::state_export::{ExportedShards, Met};
use super::state_pieces::{Digest, Family, Piece, Stretch, put_record, united};
use super::state_stage::{StageError, Staging};
use crate::model::ShardId;

/// What of a sender's pieces is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compared {
    /// What must travel. United.
    pub wanted: Vec<Stretch>,
    pub wanted_bytes: u64,
    /// What need not.
    pub reused_bytes: u64,
}

impl Staging {
    /// Learns a sender's pieces, in order, from `next`, until `None`; finds which of them are here. Reads the group's
    /// whole state. Blocks; use a thread that may.
    pub fn compare(&mut self, next: impl FnMut() -> Result<Option<Piece>, String>) -> Result<Compared, StageError> {
        let options = TableOptions::new();
        let mut writer = self.writer(&options);
        let staged: HashSet<Digest> = digests(&self.files);
        let (group, shards) = (self.place.group, self.shards.clone());
        let mut along = Along::new(next, |piece, data| {
            if piece.from.family == Family::Index && !staged.contains(&piece.digest) {
                writer.put(&Checked::new(group, &shards, data)?)?;
            }
            Ok(())
        })?;
        let db = &self.place.db;
        let mut here = ExportedShards::new();
        let walked = db.view_group(group, |view| {
            // What another group's replica here still owns may go at any moment.
            let owned = |shard: &ShardId| view.shards().contains_key(shard);
            here = self.shards.clone();
            here.retain(|shard, _| owned(shard));
            view.walk(&here, &Stretch::everything(), |met| {
                if let Met::Damaged(_, _, error) = &met {
                    db.0.shared.note_error(error);
                }
                along.meet(met)
            })
        });
        if let Err(error) = &walked {
            tracing::warn!(%group, %error, "not all of the state could be compared with a snapshot; the rest is replaced");
            along.spoilt = true;
        }
        let found = along.end()?;
        writer.close()?;
        self.take_over(writer);
        self.kept_of = here.into_keys().collect();
        Ok(self.decide(found))
    }

    fn decide(&mut self, found: Vec<(Piece, bool)>) -> Compared {
        let all: HashSet<Digest> = found.iter().map(|(piece, _)| piece.digest).collect();
        let dir = &self.place.dir;
        self.files.retain(|file| {
            let current = file.pieces.iter().all(|(_, digest)| all.contains(digest));
            if !current {
                file.remove(dir);
            }
            current
        });
        let staged = digests(&self.files);
        let mut compared = Compared {
            wanted: Vec::new(),
            wanted_bytes: 0,
            reused_bytes: 0,
        };
        let mut kept = Vec::new();
        for (at, (piece, same)) in found.iter().enumerate() {
            let stretch = Stretch {
                from: piece.from.clone(),
                to: found.get(at + 1).map(|(next, _)| next.from.clone()),
            };
            if *same && piece.from.family == Family::Batches {
                kept.push(stretch);
            } else if !staged.contains(&piece.digest) {
                compared.wanted.push(stretch);
                compared.wanted_bytes += piece.bytes;
                continue;
            }
            compared.reused_bytes += piece.bytes;
        }
        compared.wanted = united(compared.wanted);
        self.kept = united(kept);
        self.starts = found.into_iter().map(|(piece, _)| piece.from).collect();
        compared
    }
}

/// Goes through the records here along with the pieces there.
struct Along<N, T> {
    next: N,
    take: T,
    current: Option<Piece>,
    following: Option<Piece>,
    /// The records here from the current piece's first one on, as they would travel.
    data: Vec<u8>,
    /// They cannot be the piece.
    spoilt: bool,
    found: Vec<(Piece, bool)>,
    failed: Option<StageError>,
}

impl<N, T> Along<N, T>
where
    N: FnMut() -> Result<Option<Piece>, String>,
    T: FnMut(&Piece, Bytes) -> Result<(), StageError>,
{
    fn new(next: N, take: T) -> Result<Self, StageError> {
        let mut along = Self {
            next,
            take,
            current: None,
            following: None,
            data: Vec::new(),
            spoilt: false,
            found: Vec::new(),
            failed: None,
        };
        along.following = along.pull()?;
        along.advance()?;
        Ok(along)
    }

    fn pull(&mut self) -> Result<Option<Piece>, StageError> {
        let piece = (self.next)().map_err(StageError::Ended)?;
        match (&self.following, &piece) {
            (Some(before), Some(piece)) if before.from >= piece.from => {
                Err(StageError::Refused("its pieces are out of order".into()))
            }
            _ => Ok(piece),
        }
    }

    /// Ends the current piece and turns to the next.
    fn advance(&mut self) -> Result<(), StageError> {
        if let Some(piece) = self.current.take() {
            let same = !self.spoilt && self.data.len() as u64 == piece.bytes && Digest::of(&self.data) == piece.digest;
            if same {
                (self.take)(&piece, Bytes::copy_from_slice(&self.data))?;
            }
            self.found.push((piece, same));
        }
        self.data.clear();
        self.spoilt = false;
        if self.following.is_some() {
            let pulled = self.pull()?;
            self.current = std::mem::replace(&mut self.following, pulled);
        }
        Ok(())
    }

    /// False: it makes no sense to go on.
    fn meet(&mut self, met: Met<'_>) -> bool {
        let (family, key) = match &met {
            Met::Record(family, key, _) | Met::Damaged(family, key, _) => (*family, *key),
        };
        while (self.following.as_ref()).is_some_and(|f| (f.from.family, &f.from.key[..]) <= (family, key)) {
            if let Err(error) = self.advance() {
                self.failed = Some(error);
                return false;
            }
        }
        match met {
            Met::Record(_, _, value) if !self.spoilt => {
                put_record(&mut self.data, family, key, value);
                // What is longer need not be kept in memory.
                self.spoilt = (self.current.as_ref()).is_none_or(|piece| self.data.len() as u64 > piece.bytes);
            }
            Met::Record(..) => {}
            Met::Damaged(..) => self.spoilt = true,
        }
        true
    }

    /// No more records here: what is left of the pieces is not here.
    fn end(mut self) -> Result<Vec<(Piece, bool)>, StageError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        while self.current.is_some() {
            self.advance()?;
        }
        Ok(self.found)
    }
}
