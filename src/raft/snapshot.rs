//! Snapshots of a group. On the node that makes one it is a view of `state/` that is held until the transfer has read
//! it; on the node that receives one it is a set of files that `state/` takes over.

use std::io;
use std::sync::mpsc::SyncSender;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::codec::Marker;
use crate::model::{GroupId, LogIndex};
use crate::storage::{Exported, StagedGroup, StateDb, StorageError};

/// Chunks that wait between the one who reads them from disk and the one who sends or writes them.
const CHUNKS_WAITING: usize = 4;

/// A snapshot of a group.
#[derive(Debug)]
pub struct GroupSnapshot {
    /// How many shards the group held where it was made.
    pub shards: usize,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    /// Stands for the durable state of this node; carries nothing.
    Local,
    /// A view of this node's state.
    Pinned(Pin),
    /// Received from another node.
    Received(StagedGroup),
}

impl GroupSnapshot {
    pub(super) fn local(shards: usize) -> Self {
        Self {
            shards,
            content: Content::Local,
        }
    }

    pub(super) fn received(staged: StagedGroup) -> Self {
        Self {
            shards: 0,
            content: Content::Received(staged),
        }
    }
}

type Sink = Box<dyn FnMut(Bytes) -> bool + Send>;

/// A consistent view of a group's state. A thread holds it; dropped, it is let go.
pub(super) struct Pin {
    group: GroupId,
    /// As of the view.
    pub marker: Marker,
    wanted: SyncSender<Sink>,
    work: JoinHandle<Result<Option<Exported>, StorageError>>,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pin")
            .field("group", &self.group)
            .field("marker", &self.marker)
            .finish_non_exhaustive()
    }
}

impl Pin {
    /// Takes a view; `None` if nothing of the group was ever applied.
    pub async fn new(state: &StateDb, group: GroupId) -> io::Result<Option<Self>> {
        let (pinned_tx, pinned_rx) = oneshot::channel::<Option<(LogIndex, Bytes)>>();
        let (wanted, wanted_rx) = std::sync::mpsc::sync_channel::<Sink>(1);
        let db = state.clone();
        let work = tokio::task::spawn_blocking(move || {
            let pinned = |marker| {
                // Who asked may have gone: then nothing will be wanted.
                let _ = pinned_tx.send(marker);
            };
            db.export_group(group, pinned, || wanted_rx.recv().ok())
        });
        match pinned_rx.await {
            Ok(Some((_, raw))) => Ok(Some(Self {
                group,
                marker: Marker::decode(&raw)?,
                wanted,
                work,
            })),
            Ok(None) => Ok(None),
            Err(_) => match work.await {
                Ok(Err(e)) => Err(io::Error::other(e)),
                Ok(Ok(_)) => Err(io::Error::other("the view of the state was not taken")),
                Err(e) => Err(io::Error::other(e)),
            },
        }
    }

    /// Reads everything. The chunks come from the returned queue; its end is told apart from an error by awaiting the
    /// second part, after the last chunk.
    pub fn export(
        self,
    ) -> (
        mpsc::Receiver<Bytes>,
        JoinHandle<Result<Option<Exported>, StorageError>>,
    ) {
        let (tx, rx) = mpsc::channel(CHUNKS_WAITING);
        let sink: Sink = Box::new(move |chunk| tx.blocking_send(chunk).is_ok());
        // The thread waits for it, or has failed, which its handle tells.
        let _ = self.wanted.send(sink);
        (rx, self.work)
    }

    /// Copies the view into another store, or another group's place in this one. For when both are in one process.
    pub async fn copy_to(self, to: &StateDb) -> io::Result<StagedGroup> {
        let group = self.group;
        let (chunks, work) = self.export();
        let staged = stage(to.clone(), group, chunks, work).await?;
        Ok(staged)
    }
}

async fn stage(
    to: StateDb,
    group: GroupId,
    mut chunks: mpsc::Receiver<Bytes>,
    work: JoinHandle<Result<Option<Exported>, StorageError>>,
) -> io::Result<StagedGroup> {
    let writing = tokio::task::spawn_blocking(move || to.stage_group(group, || Ok(chunks.blocking_recv())));
    let staged = writing.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
    match work.await.map_err(io::Error::other)?.map_err(io::Error::other)? {
        Some(exported) if exported.records == staged.records => Ok(staged),
        Some(_) | None => Err(io::Error::other("the copy of the state is not complete")),
    }
}
