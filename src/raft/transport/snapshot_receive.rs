//! Receiving the state of a group: the bulk goes into files beside the databases while the replica goes on; then the
//! replica is told, and takes them over in a quick switch (trap E).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use openraft::{Snapshot, SnapshotMeta};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::dispatch::{RaftHandle, Replicas as _};
use super::handshake::{Called, Refusal, refused};
use super::link::describe;
use super::server::{PeerServer, ServerInner};
use crate::model::{GroupId, ReplicaId};
use crate::raft::codec::{log_id_from_pb, stored_membership_from_pb, vote_from_pb, vote_to_pb};
use crate::raft::snapshot::GroupSnapshot;
use crate::storage::StagedGroup;
use crate::wire::internal as pb;
use pb::snapshot_frame::Kind;

/// Answers that wait for the connection: a transfer has a handful.
const ANSWERS_WAITING: usize = 4;
/// Chunks that wait to be written.
const CHUNKS_WAITING: usize = 4;

type Answers = mpsc::Sender<Result<pb::SnapshotFrame, Status>>;

impl PeerServer {
    /// Receives a snapshot in a task of its own; gives the answers to the sender.
    pub(super) fn receive_snapshot(
        &self,
        inbound: Streaming<pb::SnapshotFrame>,
        permit: OwnedSemaphorePermit,
    ) -> impl Stream<Item = Result<pb::SnapshotFrame, Status>> + Send + 'static {
        let (answers, frames) = mpsc::channel(ANSWERS_WAITING);
        let inner = self.0.clone();
        self.0.peers.tasks.spawn("receive-snapshot", async move {
            let _permit = permit;
            let token = inner.peers.tasks.token();
            token.run_until_cancelled(inner.receive(inbound, answers)).await;
        });
        ReceiverStream::new(frames)
    }
}

/// A group's place among those that are being received; leaves it however that ends.
struct Receiving<'a> {
    server: &'a ServerInner,
    group: GroupId,
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        self.server.receiving.lock().remove(&self.group);
    }
}

impl ServerInner {
    async fn receive(self: &Arc<Self>, mut inbound: Streaming<pb::SnapshotFrame>, answers: Answers) {
        let last = match self.transfer(&mut inbound, &answers).await {
            Ok(done) => Kind::Done(done),
            Err(text) => {
                tracing::warn!(error = text, "a snapshot was not received");
                Kind::Error(text)
            }
        };
        // The sender may be gone.
        let _ = answer(&answers, last).await;
    }

    async fn transfer(
        self: &Arc<Self>,
        inbound: &mut Streaming<pb::SnapshotFrame>,
        answers: &Answers,
    ) -> Result<pb::SnapshotDone, String> {
        let config = &self.peers.config;
        let stall = config.snapshot_stall_timeout;
        tokio::time::timeout(config.handshake_timeout, self.greet(inbound, answers))
            .await
            .map_err(|_| "the handshake took too long".to_string())??;
        let Some(Kind::Offer(offer)) = next(stall, inbound).await? else {
            return Err("expected an offer".into());
        };
        let (group, to) = (GroupId::new(offer.group_id), ReplicaId::new(offer.to_replica));
        let raft = self.groups.find(group, to)?;
        let _slot = self
            .transfers
            .try_acquire()
            .map_err(|_| "as many snapshots as allowed are being received; try again later".to_string())?;
        if !self.receiving.lock().insert(group) {
            return Err(format!("a snapshot of {group} is being received already"));
        }
        let _receiving = Receiving { server: self, group };
        let vote = offer.vote.as_ref().map(vote_from_pb).ok_or("an offer without a vote")?;
        let meta = SnapshotMeta {
            last_log_id: Some(
                offer
                    .last
                    .as_ref()
                    .map(log_id_from_pb)
                    .ok_or("an offer without a place")?,
            ),
            last_membership: stored_membership_from_pb(offer.membership.unwrap_or_default())
                .map_err(|e| e.to_string())?,
        };
        answer(answers, Kind::Ready(pb::SnapshotReady {})).await?;
        let staged = self.stage(group, stall, inbound).await?;
        tracing::info!(%group, replica = %to, records = staged.records, bytes = staged.bytes, "received a snapshot");
        let snapshot = Snapshot {
            meta,
            snapshot: GroupSnapshot::received(staged),
        };
        install(&raft, vote, snapshot).await
    }

    /// Writes the chunks to files, until the end.
    async fn stage(
        &self,
        group: GroupId,
        stall: Duration,
        inbound: &mut Streaming<pb::SnapshotFrame>,
    ) -> Result<StagedGroup, String> {
        let (chunks, mut waiting) = mpsc::channel::<Result<Option<Bytes>, String>>(CHUNKS_WAITING);
        let state = self.groups.state().clone();
        let writing = tokio::task::spawn_blocking(move || {
            state.stage_group(group, || {
                waiting
                    .blocking_recv()
                    .unwrap_or_else(|| Err("the transfer ended early".into()))
            })
        });
        let mut number = 0;
        let records = loop {
            match next(stall, inbound).await? {
                Some(Kind::Chunk(chunk)) => {
                    if chunk.number != number || chunk.crc != crc32fast::hash(&chunk.data) {
                        return Err(format!("chunk {number} is not what was sent"));
                    }
                    number += 1;
                    // An error of the writer is told by its handle.
                    if chunks.send(Ok(Some(chunk.data))).await.is_err() {
                        break None;
                    }
                }
                Some(Kind::End(end)) if end.chunks == number => break Some(end.records),
                Some(Kind::End(_)) => return Err("chunks are missing".into()),
                Some(_) => return Err("expected a chunk".into()),
                None => return Err("the connection ended".into()),
            }
        };
        if records.is_some() {
            let _ = chunks.send(Ok(None)).await;
        }
        drop(chunks);
        let staged = writing.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        if Some(staged.records) != records {
            return Err("records are missing".into());
        }
        Ok(staged)
    }

    async fn greet(&self, inbound: &mut Streaming<pb::SnapshotFrame>, answers: &Answers) -> Result<(), String> {
        let mut node = None;
        let result = async {
            let config = &self.peers.config;
            let gone = |_| Refusal::Malformed("the connection ended");
            let (called, welcome) = Called::hello(config, step(inbound).await)?;
            node = Some(called.node());
            answer(answers, Kind::Handshake(welcome)).await.map_err(gone)?;
            let (peer, accepted) = called.proof(config, &self.peers.book, step(inbound).await)?;
            answer(answers, Kind::Handshake(accepted)).await.map_err(gone)?;
            Ok::<_, Refusal>(peer)
        };
        match result.await {
            Ok(_) => Ok(()),
            Err(refusal) => {
                self.refuse(node, &refusal);
                // It may be gone already.
                let _ = answer(answers, Kind::Handshake(refused(&refusal))).await;
                Err(refusal.to_string())
            }
        }
    }
}

async fn install(
    raft: &RaftHandle,
    vote: crate::raft::types::Vote,
    snapshot: Snapshot<crate::raft::types::LeaderId, u64, openraft::impls::EmptyNode, GroupSnapshot>,
) -> Result<pb::SnapshotDone, String> {
    let installed = raft
        .install_full_snapshot(vote, snapshot)
        .await
        .map_err(|e| e.to_string())?;
    Ok(pb::SnapshotDone {
        vote: Some(vote_to_pb(&installed.vote)),
    })
}

async fn step(inbound: &mut Streaming<pb::SnapshotFrame>) -> Option<pb::Handshake> {
    match inbound.message().await {
        Ok(Some(pb::SnapshotFrame {
            kind: Some(Kind::Handshake(step)),
        })) => Some(step),
        Ok(_) | Err(_) => None,
    }
}

async fn answer(answers: &Answers, kind: Kind) -> Result<(), String> {
    let frame = pb::SnapshotFrame { kind: Some(kind) };
    answers
        .send(Ok(frame))
        .await
        .map_err(|_| "the connection ended".to_string())
}

async fn next(stall: Duration, inbound: &mut Streaming<pb::SnapshotFrame>) -> Result<Option<Kind>, String> {
    match tokio::time::timeout(stall, inbound.next()).await {
        Ok(Some(Ok(frame))) => Ok(frame.kind),
        Ok(Some(Err(status))) => Err(describe(&status)),
        Ok(None) => Ok(None),
        Err(_) => Err(format!("nothing came for {stall:?}")),
    }
}
