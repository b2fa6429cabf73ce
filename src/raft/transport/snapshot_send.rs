//! Sending the state of a group to a replica that the log cannot catch up any more: on a connection of its own, so that
//! it holds up nothing, at a bounded rate, and with its progress on record.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use openraft::Snapshot;
use openraft::impls::EmptyNode;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::handshake::{Caller, refused};
use super::link::{FRAME_BYTES_LIMIT, Peers, describe};
use super::network::PeerConnection;
use crate::model::{GroupId, ReplicaId};
use crate::raft::codec::{log_id_to_pb, stored_membership_to_pb, vote_from_pb, vote_to_pb};
use crate::raft::snapshot::{Content, GroupSnapshot, Pin};
use crate::raft::types::{LeaderId, Vote};
use crate::wire::internal as pb;
use pb::peer_client::PeerClient;
use pb::snapshot_frame::Kind;

/// An install may take this many times as long as anything else.
const INSTALL_STALLS: u32 = 4;
/// Frames that wait for the connection.
const FRAMES_WAITING: usize = 2;

/// A transfer that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferProgress {
    pub group: GroupId,
    pub to: ReplicaId,
    /// Sent so far.
    pub bytes: u64,
    pub running_for: Duration,
}

struct Running {
    group: GroupId,
    to: ReplicaId,
    bytes: AtomicU64,
    begun: Instant,
}

/// The transfers that run, and the rate they share.
pub(super) struct Transfers {
    running: Mutex<BTreeMap<u64, Arc<Running>>>,
    next: AtomicU64,
    bytes_per_second: u64,
    /// When the bytes asked for so far have had their time.
    free_at: Mutex<Option<Instant>>,
}

impl Transfers {
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            running: Mutex::default(),
            next: AtomicU64::new(0),
            bytes_per_second,
            free_at: Mutex::new(None),
        }
    }

    pub fn all(&self) -> Vec<TransferProgress> {
        let running = self.running.lock();
        running
            .values()
            .map(|r| TransferProgress {
                group: r.group,
                to: r.to,
                bytes: r.bytes.load(Ordering::Relaxed),
                running_for: r.begun.elapsed(),
            })
            .collect()
    }

    /// Waits until so many bytes may be sent.
    async fn pace(&self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let turn = {
            let now = Instant::now();
            let mut free_at = self.free_at.lock();
            let turn = free_at.map_or(now, |at| at.max(now));
            *free_at = Some(turn + takes);
            turn
        };
        tokio::time::sleep_until(turn.into()).await;
    }

    fn begin(&self, group: GroupId, to: ReplicaId) -> Listed<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let running = Arc::new(Running {
            group,
            to,
            bytes: AtomicU64::new(0),
            begun: Instant::now(),
        });
        self.running.lock().insert(id, running.clone());
        Listed {
            transfers: self,
            id,
            running,
        }
    }
}

/// A transfer's place in the list; leaves it however it ends.
struct Listed<'a> {
    transfers: &'a Transfers,
    id: u64,
    running: Arc<Running>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.transfers.running.lock().remove(&self.id);
    }
}

type Frames = tonic::Streaming<pb::SnapshotFrame>;
type Sender = mpsc::Sender<pb::SnapshotFrame>;

fn frame(kind: Kind) -> pb::SnapshotFrame {
    pb::SnapshotFrame { kind: Some(kind) }
}

impl PeerConnection {
    /// Sends a snapshot and waits until it is installed; gives the receiver's vote. May be cancelled.
    pub(super) async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot<LeaderId, u64, EmptyNode, GroupSnapshot>,
    ) -> Result<Vote, String> {
        let Content::Pinned(pin) = snapshot.snapshot.content else {
            return Err("the snapshot has no view of the state".into());
        };
        let last = snapshot.meta.last_log_id.ok_or("the snapshot is empty")?;
        if pin.marker.applied != Some(last) {
            return Err(format!("the state is not at {last} yet"));
        }
        let _held = self.hold.pin(last.index);
        let peers = self.peers()?;
        let listed = peers.0.transfers.begin(self.group, self.to);
        let begun = Instant::now();
        let offer = pb::SnapshotOffer {
            group_id: self.group.get(),
            to_replica: self.to.get(),
            vote: Some(vote_to_pb(&vote)),
            last: Some(log_id_to_pb(&last)),
            membership: Some(stored_membership_to_pb(&snapshot.meta.last_membership)),
        };
        let stall = peers.0.config.snapshot_stall_timeout;
        let (sender, mut inbound) = within(stall, "connecting", open(peers, self.to)).await?;
        tracing::info!(group = %self.group, to = %self.to, last = %last, "sending a snapshot");
        push(stall, &sender, Kind::Offer(offer)).await?;
        match within(stall, "the offer", next(&mut inbound)).await? {
            Some(Kind::Ready(_)) => {}
            other => return Err(unexpected(other)),
        }
        let streaming = self.stream(peers, pin, &sender, &listed.running);
        let answer = tokio::select! {
            // It can only be that it takes no more.
            early = next(&mut inbound) => early?,
            sent = streaming => {
                sent?;
                within(stall * INSTALL_STALLS, "the install", next(&mut inbound)).await?
            }
        };
        let bytes = listed.running.bytes.load(Ordering::Relaxed);
        match answer {
            Some(Kind::Done(done)) => {
                tracing::info!(
                    group = %self.group, to = %self.to, bytes, seconds = begun.elapsed().as_secs_f64(),
                    "a snapshot was installed"
                );
                done.vote
                    .as_ref()
                    .map(vote_from_pb)
                    .ok_or("an answer without a vote".into())
            }
            other => Err(unexpected(other)),
        }
    }

    /// Sends the chunks and the end.
    async fn stream(&self, peers: &Peers, pin: Pin, sender: &Sender, running: &Running) -> Result<(), String> {
        let stall = peers.0.config.snapshot_stall_timeout;
        let (mut chunks, work) = pin.export();
        let mut number = 0;
        while let Some(data) = chunks.recv().await {
            let bytes = data.len() as u64;
            peers.0.transfers.pace(bytes).await;
            let crc = crc32fast::hash(&data);
            let chunk = pb::SnapshotChunk { number, crc, data };
            push(stall, sender, Kind::Chunk(chunk)).await?;
            number += 1;
            running.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        let exported = work.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        let exported = exported.ok_or("the export ended early")?;
        let end = pb::SnapshotEnd {
            chunks: number,
            records: exported.records,
        };
        push(stall, sender, Kind::End(end)).await
    }
}

/// Connects to the replica's node and shakes hands.
async fn open(peers: &Peers, to: ReplicaId) -> Result<(Sender, Frames), String> {
    let inner = &peers.0;
    let node = inner
        .map
        .node_of(to)
        .ok_or_else(|| format!("it is not known which node hosts {to}"))?;
    let address = inner
        .map
        .address(node)
        .ok_or_else(|| format!("the address of node {node} is not known"))?;
    let mut client = PeerClient::new(inner.channel(&address).await?)
        .max_decoding_message_size(FRAME_BYTES_LIMIT)
        .max_encoding_message_size(FRAME_BYTES_LIMIT);
    let (sender, frames) = mpsc::channel(FRAMES_WAITING);
    let stall = inner.config.handshake_timeout;
    let (caller, hello) = Caller::begin(&inner.config, node);
    push(stall, &sender, Kind::Handshake(hello)).await?;
    let answer = client.snapshot(ReceiverStream::new(frames)).await;
    let mut inbound = answer.map_err(|s| describe(&s))?.into_inner();
    let welcome = handshake(next(&mut inbound).await?)?;
    let proof = match caller.welcome(&inner.config, &inner.book, Some(welcome)) {
        Ok((_, proof)) => proof,
        Err(refusal) => {
            // It may be gone already.
            let _ = push(stall, &sender, Kind::Handshake(refused(&refusal))).await;
            return Err(refusal.to_string());
        }
    };
    push(stall, &sender, Kind::Handshake(proof)).await?;
    Caller::accepted(Some(handshake(next(&mut inbound).await?)?)).map_err(|r| r.to_string())?;
    Ok((sender, inbound))
}

fn handshake(kind: Option<Kind>) -> Result<pb::Handshake, String> {
    match kind {
        Some(Kind::Handshake(step)) => Ok(step),
        other => Err(unexpected(other)),
    }
}

async fn next(inbound: &mut Frames) -> Result<Option<Kind>, String> {
    let frame = inbound.message().await.map_err(|s| describe(&s))?;
    Ok(frame.and_then(|f| f.kind))
}

fn unexpected(kind: Option<Kind>) -> String {
    match kind {
        Some(Kind::Error(text)) => format!("the receiver: {text}"),
        Some(_) => "an answer that does not belong here".into(),
        None => "the connection ended".into(),
    }
}

async fn within<T>(time: Duration, what: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match tokio::time::timeout(time, work).await {
        Ok(result) => result,
        Err(_) => Err(format!("{what} took longer than {time:?}")),
    }
}

async fn push(stall: Duration, sender: &Sender, kind: Kind) -> Result<(), String> {
    match tokio::time::timeout(stall, sender.send(frame(kind))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err("the connection ended".into()),
        Err(_) => Err(format!("nothing was taken for {stall:?}")),
    }
}
