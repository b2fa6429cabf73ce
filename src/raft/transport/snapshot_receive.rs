//! Receiving the state of a group: the bulk goes into files beside the databases while the replica goes on; then the
//! replica is told, and takes them over in a quick switch (trap E). What was received before, or is in the replica's own
//! state, does not travel again.

use std::sync::Arc;
use std::time::{Duration, Instant};

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
use super::snapshot_progress::{Running, SnapshotPhase, SnapshotWay};
use super::snapshot_send::{ALIVE_EVERY, ROUNDS_MAX};
use crate::base::blocking::{run_blocking, settled};
use crate::base::metric_names as names;
use crate::model::{GroupId, ReplicaId, Sequence, ShardId};
use crate::raft::codec::{log_id_from_pb, stored_membership_from_pb, vote_from_pb, vote_to_pb};
use crate::raft::snapshot::GroupSnapshot;
use crate::storage::{Compared, Digest, Finish, Floors, Piece, Place, StageError, StagedGroup, Staging, Stretch};
use crate::wire::internal as pb;
use pb::snapshot_frame::Kind;

/// Answers that wait for the connection: a transfer has a handful.
const ANSWERS_WAITING: usize = 4;
/// Chunks that wait to be written.
const CHUNKS_WAITING: usize = 4;
/// Pieces that wait to be compared.
const PIECES_WAITING: usize = 256;
/// Stretches that are wanted in one frame.
const STRETCHES_IN_FRAME: usize = 1_024;

type Frames = Streaming<pb::SnapshotFrame>;
type Answers = mpsc::Sender<Result<pb::SnapshotFrame, Status>>;

impl PeerServer {
    /// Receives a snapshot in a task of its own; gives the answers to the sender.
    pub(super) fn receive_snapshot(
        &self,
        inbound: Frames,
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
    async fn receive(self: &Arc<Self>, mut inbound: Frames, answers: Answers) {
        let last = match self.transfer(&mut inbound, &answers).await {
            Ok(done) => Kind::Done(done),
            Err(text) => {
                metrics::counter!(names::RAFT_SNAPSHOT_FAILURES_TOTAL).increment(1);
                tracing::warn!(error = text, "a snapshot was not received");
                Kind::Error(text)
            }
        };
        // The sender may be gone.
        let _ = answer(&answers, last).await;
    }

    async fn transfer(self: &Arc<Self>, inbound: &mut Frames, answers: &Answers) -> Result<pb::SnapshotDone, String> {
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
        let shards = offer.shards.iter().map(|shard| {
            let floors = Floors {
                batches: Sequence::new(shard.batch_floor),
                ids: Sequence::new(shard.id_floor),
            };
            (ShardId::new(shard.shard_id), floors)
        });
        let (shards, state) = (shards.collect(), self.groups.state().clone());
        let listed = self
            .peers
            .transfers
            .begin(SnapshotWay::Received, group, to, offer.bytes);
        let opening = blocking(move || Staging::open(&state, group, shards));
        let staging = alive(answers, opening).await?;
        let staged = self.stage(staging, stall, inbound, answers, &listed.running).await?;
        listed.running.phase(SnapshotPhase::Installing);
        tracing::info!(%group, replica = %to, records = staged.records, bytes = staged.bytes, "received a snapshot");
        let snapshot = Snapshot {
            meta,
            snapshot: GroupSnapshot::received(staged),
        };
        alive(answers, install(&raft, vote, snapshot)).await
    }

    /// Receives what is not here, in as many rounds as it takes until all of it is whole.
    async fn stage(
        &self,
        mut staging: Staging,
        stall: Duration,
        inbound: &mut Frames,
        answers: &Answers,
        running: &Running,
    ) -> Result<StagedGroup, String> {
        let compare = staging.has_something();
        answer(answers, Kind::Ready(pb::SnapshotReady { compare })).await?;
        let mut wanted = vec![Stretch::everything()];
        if compare {
            let (back, compared) = compare_pieces(staging, stall, inbound, answers).await?;
            staging = back;
            running.expect(compared.wanted_bytes, compared.reused_bytes);
            metrics::counter!(names::RAFT_SNAPSHOT_REUSED_BYTES_TOTAL).increment(compared.reused_bytes);
            want(answers, &compared.wanted, compared.wanted_bytes, compared.reused_bytes).await?;
            wanted = compared.wanted;
        }
        let mut number = 0;
        for _ in 0..ROUNDS_MAX {
            running.phase(SnapshotPhase::Transferring);
            let (back, mut again) = self
                .round(staging, wanted, stall, inbound, answers, running, &mut number)
                .await?;
            staging = back;
            running.phase(SnapshotPhase::Installing);
            if again.is_empty() {
                let checking = blocking(move || staging.finish());
                match alive(answers, checking).await? {
                    Finish::Complete(staged) => return Ok(staged),
                    Finish::Again(back, damaged) => {
                        staging = back;
                        again = damaged;
                    }
                }
            }
            want(answers, &again, 0, 0).await?;
            wanted = again;
        }
        Err(format!("what comes is damaged, {ROUNDS_MAX} times in a row"))
    }

    /// Writes chunks to files, until the end of a round; tells what must come again.
    #[allow(clippy::too_many_arguments)] // One transfer's parts, each of its own kind.
    async fn round(
        &self,
        mut staging: Staging,
        wanted: Vec<Stretch>,
        stall: Duration,
        inbound: &mut Frames,
        answers: &Answers,
        running: &Running,
        number: &mut u64,
    ) -> Result<(Staging, Vec<Stretch>), String> {
        let (chunks, mut waiting) = mpsc::channel::<Option<(u32, Bytes)>>(CHUNKS_WAITING);
        let writing = tokio::task::spawn_blocking(move || {
            let received = staging.receive(&wanted, || {
                waiting
                    .blocking_recv()
                    .ok_or_else(|| "the transfer ended early".to_string())
            });
            (staging, received)
        });
        let first = *number;
        let records = loop {
            match next(stall, inbound).await? {
                Some(Kind::Chunk(chunk)) => {
                    if chunk.number != *number {
                        return Err("chunks are missing".into());
                    }
                    *number += 1;
                    let bytes = chunk.data.len() as u64;
                    let turn = self.peers.transfers.received.turn(bytes, Instant::now());
                    tokio::time::sleep_until(turn.into()).await;
                    running.add(bytes);
                    // An error of the writer is told by its handle.
                    if settled(chunks.send(Some((chunk.crc, chunk.data)))).await.is_err() {
                        break None;
                    }
                }
                Some(Kind::Alive(_)) => {}
                Some(Kind::End(end)) if end.chunks == *number - first => break Some(end.records),
                Some(Kind::End(_)) => return Err("chunks are missing".into()),
                Some(_) => return Err("expected a chunk".into()),
                None => return Err("the connection ended".into()),
            }
        };
        if records.is_some() {
            let _ = settled(chunks.send(None)).await;
        }
        drop(chunks);
        let writing = async { settled(writing).await.map_err(|e| e.to_string()) };
        let (staging, received) = alive(answers, writing).await?;
        let received = received.map_err(|e| e.to_string())?;
        if received.again.is_empty() && Some(received.records) != records {
            return Err("records are missing".into());
        }
        Ok((staging, received.again))
    }

    async fn greet(&self, inbound: &mut Frames, answers: &Answers) -> Result<(), String> {
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

/// Holds the sender's pieces against what is here.
async fn compare_pieces(
    mut staging: Staging,
    stall: Duration,
    inbound: &mut Frames,
    answers: &Answers,
) -> Result<(Staging, Compared), String> {
    let (pieces, mut waiting) = mpsc::channel::<Option<Piece>>(PIECES_WAITING);
    let comparing = tokio::task::spawn_blocking(move || {
        let compared = staging.compare(|| {
            waiting
                .blocking_recv()
                .ok_or_else(|| "the transfer ended early".to_string())
        });
        (staging, compared)
    });
    let passing = async {
        loop {
            let told = match next(stall, inbound).await? {
                Some(Kind::Pieces(told)) => told,
                Some(Kind::Alive(_)) => continue,
                Some(_) => return Err("expected pieces".to_string()),
                None => return Err("the connection ended".into()),
            };
            for piece in &told.pieces {
                let (from, digest) = (Place::decode(&piece.from), Digest::from_bytes(&piece.digest));
                let (Some(from), Some(digest)) = (from, digest) else {
                    return Err("a piece of no kind this version knows".into());
                };
                let piece = Piece {
                    from,
                    bytes: piece.bytes,
                    digest,
                };
                // An error of the reader is told by its handle.
                if settled(pieces.send(Some(piece))).await.is_err() {
                    return Ok(());
                }
            }
            if told.last {
                let _ = settled(pieces.send(None)).await;
                return Ok(());
            }
        }
    };
    alive(answers, passing).await?;
    let comparing = async { settled(comparing).await.map_err(|e| e.to_string()) };
    let (staging, compared) = alive(answers, comparing).await?;
    Ok((staging, compared.map_err(|e| e.to_string())?))
}

/// Tells the sender what to send.
async fn want(answers: &Answers, stretches: &[Stretch], wanted_bytes: u64, reused_bytes: u64) -> Result<(), String> {
    let mut parts = stretches.chunks(STRETCHES_IN_FRAME).peekable();
    loop {
        let part = parts.next().unwrap_or_default();
        let last = parts.peek().is_none();
        let stretches = part.iter().map(|stretch| pb::SnapshotStretch {
            from: stretch.from.encode(),
            to: stretch.to.as_ref().map(Place::encode),
        });
        let wanted = pb::SnapshotWanted {
            stretches: stretches.collect(),
            last,
            wanted_bytes,
            reused_bytes,
        };
        answer(answers, Kind::Wanted(wanted)).await?;
        if last {
            return Ok(());
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StageError> + Send + 'static,
) -> Result<T, String> {
    let done = run_blocking(work).await;
    done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// Does the work, and tells the sender meanwhile that it is done.
async fn alive<T>(answers: &Answers, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(ALIVE_EVERY, &mut work).await {
            Ok(done) => return done,
            // Full: the sender has not read the last ones yet.
            Err(_) => drop(answers.try_send(Ok(pb::SnapshotFrame {
                kind: Some(Kind::Alive(pb::SnapshotAlive {})),
            }))),
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

async fn step(inbound: &mut Frames) -> Option<pb::Handshake> {
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

async fn next(stall: Duration, inbound: &mut Frames) -> Result<Option<Kind>, String> {
    match tokio::time::timeout(stall, inbound.next()).await {
        Ok(Some(Ok(frame))) => Ok(frame.kind),
        Ok(Some(Err(status))) => Err(describe(&status)),
        Ok(None) => Ok(None),
        Err(_) => Err(format!("nothing came for {stall:?}")),
    }
}
