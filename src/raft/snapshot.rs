//! Snapshots of a group. On the node that makes one it is a view of `state/` that is held until the transfer has read
//! it; on the node that receives one it is a set of files that `state/` takes over.

use std::io;
use std::sync::mpsc::SyncSender;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};

use super::codec::Marker;
use crate::base::blocking::settled;
use crate::machine::ShardMachine;
use crate::model::{GroupId, ShardId};
use crate::storage::{Exported, ExportedShards, GroupView, Piece, StagedGroup, StateDb, StorageError, Stretch};

/// Chunks that wait between the one who reads them from disk and the one who sends or writes them.
const CHUNKS_WAITING: usize = 4;
/// Pieces that are told and not yet passed on.
const PIECES_WAITING: usize = 64;

/// A snapshot of a group.
#[derive(Debug)]
pub struct GroupSnapshot {
    /// How many shards the group held where it was made.
    pub shards: usize,
    /// About how many bytes.
    pub bytes: u64,
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
            bytes: 0,
            content: Content::Local,
        }
    }

    pub(super) fn received(staged: StagedGroup) -> Self {
        Self {
            shards: staged.shards(),
            bytes: staged.bytes,
            content: Content::Received(staged),
        }
    }
}

/// What is asked of the thread that holds a view.
enum Order {
    /// The pieces, and `None` behind the last.
    Pieces(mpsc::Sender<Option<Piece>>),
    Export(Vec<Stretch>, mpsc::Sender<Exporting>),
}

/// A part of an export.
#[derive(Debug)]
pub(super) enum Exporting {
    Chunk(Bytes),
    /// All of it was given.
    End(Exported),
}

/// A consistent view of a group's state. A thread holds it; dropped, it is let go.
pub(super) struct Pin {
    group: GroupId,
    /// As of the view.
    pub marker: Marker,
    pub shards: ExportedShards,
    /// A shard that is sealed in it.
    pub sealed: Option<ShardId>,
    orders: SyncSender<Order>,
    work: JoinHandle<Result<(), StorageError>>,
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
        let (taken_tx, taken_rx) = oneshot::channel();
        let (orders, orders_rx) = std::sync::mpsc::sync_channel::<Order>(1);
        let db = state.clone();
        let work = tokio::task::spawn_blocking(move || {
            db.view_group(group, |view| {
                let sealed = view.find_shard(|record| ShardMachine::heir_in(record).is_some())?;
                // Who asked may have gone: then nothing will be ordered.
                let _ = taken_tx.send(
                    view.applied()
                        .map(|(_, raw)| (raw.clone(), view.shards().clone(), sealed)),
                );
                while let Ok(order) = orders_rx.recv() {
                    obey(view, order)?;
                }
                Ok(())
            })
        });
        match settled(taken_rx).await {
            Ok(Some((raw, shards, sealed))) => Ok(Some(Self {
                group,
                marker: Marker::decode(&raw)?,
                shards,
                sealed,
                orders,
                work,
            })),
            Ok(None) => Ok(None),
            Err(_) => Err(failure(settled(work).await)),
        }
    }

    /// Why the view must not be given to another replica. Who gets a shard that is sealed might have adopted it already, and
    /// gone on: what the adoption needs is on every node anyway (0048).
    pub fn held_by(&self) -> Option<String> {
        let shard = self.sealed?;
        Some(format!(
            "{shard} is on its way to another group; it is sent without it in a moment"
        ))
    }

    /// Tells the pieces that everything consists of, and `None` behind the last. A queue that ends without it: the view
    /// has [failed](Self::failure).
    pub fn pieces(&self) -> mpsc::Receiver<Option<Piece>> {
        let (tx, rx) = mpsc::channel(PIECES_WAITING);
        // The thread waits for it, or has failed, which the queue tells.
        let _ = self.orders.try_send(Order::Pieces(tx));
        rx
    }

    /// Reads these stretches, which are united. A queue that ends without an end: the view has
    /// [failed](Self::failure).
    pub fn export(&self, stretches: Vec<Stretch>) -> mpsc::Receiver<Exporting> {
        let (tx, rx) = mpsc::channel(CHUNKS_WAITING);
        let _ = self.orders.try_send(Order::Export(stretches, tx));
        rx
    }

    /// Why the view has failed.
    pub async fn failure(self) -> io::Error {
        drop(self.orders);
        failure(settled(self.work).await)
    }

    /// Copies the view into another store. For when both are in one process.
    pub async fn copy_to(self, to: &StateDb) -> io::Result<StagedGroup> {
        let (to, group, shards) = (to.clone(), self.group, self.shards.clone());
        let mut chunks = self.export(vec![Stretch::everything()]);
        let writing = tokio::task::spawn_blocking(move || {
            to.stage_group(group, shards, || match chunks.blocking_recv() {
                Some(Exporting::Chunk(data)) => Ok(Some(data)),
                Some(Exporting::End(_)) => Ok(None),
                None => Err("the copy of the state is not complete".into()),
            })
        });
        settled(writing)
            .await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)
    }
}

fn failure(result: Result<Result<(), StorageError>, JoinError>) -> io::Error {
    match result {
        Ok(Err(e)) => io::Error::other(e),
        Ok(Ok(())) => io::Error::other("the view of the state was let go"),
        Err(e) => io::Error::other(e),
    }
}

fn obey(view: &GroupView<'_>, order: Order) -> Result<(), StorageError> {
    // Where nobody takes the rest, the order is done.
    match order {
        Order::Pieces(to) => {
            if view.pieces(|piece| to.blocking_send(Some(piece)).is_ok())? {
                let _ = to.blocking_send(None);
            }
        }
        Order::Export(stretches, to) => {
            if let Some(done) = view.export(&stretches, |data| to.blocking_send(Exporting::Chunk(data)).is_ok())? {
                let _ = to.blocking_send(Exporting::End(done));
            }
        }
    }
    Ok(())
}
