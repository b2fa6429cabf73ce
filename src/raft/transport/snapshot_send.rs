//! Sending the state of a group to a replica that the log cannot catch up any more: on a connection of its own, so that
//! it holds up nothing, at a bounded rate, and with its progress on record. What the replica has already is found out
//! first and does not travel; what is damaged on the way is asked for again.

use std::time::{Duration, Instant};

use openraft::Snapshot;
use openraft::impls::EmptyNode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::handshake::{Caller, refused};
use super::link::{FRAME_BYTES_LIMIT, Peers, describe};
use super::network::PeerConnection;
use super::snapshot_progress::{Pacer, Running, SnapshotPhase, SnapshotWay};
use crate::base::blocking::settled;
use crate::base::metric_names as names;
use crate::model::ReplicaId;
use crate::raft::codec::{log_id_to_pb, stored_membership_to_pb, vote_from_pb, vote_to_pb};
use crate::raft::snapshot::{Content, Exporting, GroupSnapshot, Pin};
use crate::raft::types::{LeaderId, LogId, Vote};
use crate::storage::{Place, Stretch};
use crate::wire::internal as pb;
use pb::peer_client::PeerClient;
use pb::snapshot_frame::Kind;

/// Frames that wait for the connection.
const FRAMES_WAITING: usize = 2;
/// Pieces that are told in one frame.
const PIECES_IN_FRAME: usize = 64;
/// Who says nothing for so long says that it is alive.
pub(super) const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// Reading a byte to tell what it is costs the disk and the processor so much less than sending it.
const READ_SHARE: u64 = 4;
/// Rounds that repair what was damaged on the way, and then no more: a network or a disk that damages everything.
pub(super) const ROUNDS_MAX: usize = 8;

type Frames = tonic::Streaming<pb::SnapshotFrame>;

fn frame(kind: Kind) -> pb::SnapshotFrame {
    pb::SnapshotFrame { kind: Some(kind) }
}

/// The way to the receiver.
struct Sender {
    frames: mpsc::Sender<pb::SnapshotFrame>,
    /// It has failed when it takes nothing for so long.
    stall: Duration,
}

impl Sender {
    async fn push(&self, kind: Kind) -> Result<(), String> {
        match tokio::time::timeout(self.stall, self.frames.send(frame(kind))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err("the connection ended".into()),
            Err(_) => Err(format!("nothing was taken for {:?}", self.stall)),
        }
    }

    /// Waits until so many bytes may travel, and says now and then that it is alive.
    async fn pace(&self, pacer: &Pacer, bytes: u64) -> Result<(), String> {
        let turn = pacer.turn(bytes, Instant::now());
        loop {
            let wait = turn.saturating_duration_since(Instant::now());
            if wait <= ALIVE_EVERY {
                tokio::time::sleep(wait).await;
                return Ok(());
            }
            tokio::time::sleep(ALIVE_EVERY).await;
            self.push(Kind::Alive(pb::SnapshotAlive {})).await?;
        }
    }
}

impl PeerConnection {
    /// Sends a snapshot and waits until it is installed; gives the receiver's vote. May be cancelled.
    pub(super) async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot<LeaderId, u64, EmptyNode, GroupSnapshot>,
    ) -> Result<Vote, String> {
        let bytes = snapshot.snapshot.bytes;
        let Content::Pinned(pin) = snapshot.snapshot.content else {
            return Err("the snapshot has no view of the state".into());
        };
        if let Some(why) = pin.held_by() {
            return Err(why);
        }
        let last = snapshot.meta.last_log_id.ok_or("the snapshot is empty")?;
        if pin.marker.applied != Some(last) {
            return Err(format!("the state is not at {last} yet"));
        }
        let _held = self.hold.pin(last.index);
        let shards = pin.shards.iter().map(|(shard, floors)| pb::SnapshotShard {
            shard_id: shard.get(),
            batch_floor: floors.batches.get(),
            id_floor: floors.ids.get(),
        });
        let offer = pb::SnapshotOffer {
            group_id: self.group.get(),
            to_replica: self.to.get(),
            vote: Some(vote_to_pb(&vote)),
            last: Some(log_id_to_pb(&last)),
            membership: Some(stored_membership_to_pb(&snapshot.meta.last_membership)),
            shards: shards.collect(),
            bytes,
        };
        let peers = self.peers()?;
        let listed = peers.0.transfers.begin(SnapshotWay::Sent, self.group, self.to, bytes);
        let done = self.deliver(peers, &pin, last, offer, &listed.running).await;
        let done = match done {
            Ok(done) => done,
            Err(Failed::Peer(text)) => return Err(text),
            Err(Failed::View) => return Err(pin.failure().await.to_string()),
        };
        metrics::counter!(names::RAFT_SNAPSHOT_INSTALLS_TOTAL).increment(1);
        done.vote
            .as_ref()
            .map(vote_from_pb)
            .ok_or("an answer without a vote".into())
    }

    async fn deliver(
        &self,
        peers: &Peers,
        pin: &Pin,
        last: LogId,
        offer: pb::SnapshotOffer,
        running: &Running,
    ) -> Result<pb::SnapshotDone, Failed> {
        let begun = Instant::now();
        let stall = peers.0.config.snapshot_stall_timeout;
        let (sender, mut inbound) = within(stall, "connecting", open(peers, self.to)).await?;
        sender.push(Kind::Offer(offer)).await?;
        let Kind::Ready(ready) = answer(stall, &mut inbound).await? else {
            return Err("an answer that does not belong here".to_string().into());
        };
        tracing::info!(group = %self.group, to = %self.to, last = %last, compare = ready.compare, "sending a snapshot");
        let mut wanted = vec![Stretch::everything()];
        if ready.compare {
            let telling = self.tell(peers, pin, &sender);
            tokio::select! {
                early = unasked(&mut inbound) => return Err(early.into()),
                told = telling => told?,
            }
            wanted = self.wanted(stall, &mut inbound, running).await?;
        }
        let mut number = 0;
        for _ in 0..ROUNDS_MAX {
            running.phase(SnapshotPhase::Transferring);
            let streaming = self.stream(peers, pin, wanted, &sender, running, &mut number);
            tokio::select! {
                early = unasked(&mut inbound) => return Err(early.into()),
                sent = streaming => sent?,
            }
            running.phase(SnapshotPhase::Installing);
            match answer(stall, &mut inbound).await? {
                Kind::Done(done) => {
                    tracing::info!(
                        group = %self.group, to = %self.to, bytes = running.bytes(),
                        seconds = begun.elapsed().as_secs_f64(), "a snapshot was installed"
                    );
                    return Ok(done);
                }
                Kind::Wanted(first) => {
                    tracing::warn!(group = %self.group, to = %self.to, "parts of a snapshot came damaged; sending them again");
                    wanted = stretches(stall, &mut inbound, first).await?.0;
                }
                other @ (Kind::Handshake(_)
                | Kind::Offer(_)
                | Kind::Ready(_)
                | Kind::Chunk(_)
                | Kind::End(_)
                | Kind::Error(_)
                | Kind::Pieces(_)
                | Kind::Alive(_)) => return Err(unexpected(Some(other)).into()),
            }
        }
        Err(format!("what is sent comes damaged, {ROUNDS_MAX} times in a row").into())
    }

    /// Tells what everything consists of.
    async fn tell(&self, peers: &Peers, pin: &Pin, sender: &Sender) -> Result<(), Failed> {
        let mut pieces = pin.pieces();
        let mut told = pb::SnapshotPieces::default();
        let mut sent_at = Instant::now();
        loop {
            let piece = tokio::time::timeout(ALIVE_EVERY, settled(pieces.recv())).await;
            match piece {
                Err(_) => {}
                Ok(None) => return Err(Failed::View),
                Ok(Some(None)) => break,
                Ok(Some(Some(piece))) => {
                    sender.pace(&peers.0.transfers.sent, piece.bytes / READ_SHARE).await?;
                    told.pieces.push(pb::SnapshotPiece {
                        from: piece.from.encode(),
                        bytes: piece.bytes,
                        digest: piece.digest.to_bytes(),
                    });
                }
            }
            if told.pieces.len() >= PIECES_IN_FRAME || sent_at.elapsed() >= ALIVE_EVERY {
                sender.push(Kind::Pieces(std::mem::take(&mut told))).await?;
                sent_at = Instant::now();
            }
        }
        told.last = true;
        Ok(sender.push(Kind::Pieces(told)).await?)
    }

    async fn wanted(&self, stall: Duration, inbound: &mut Frames, running: &Running) -> Result<Vec<Stretch>, Failed> {
        let Kind::Wanted(first) = answer(stall, inbound).await? else {
            return Err("an answer that does not belong here".to_string().into());
        };
        let (wanted, wanted_bytes, reused_bytes) = stretches(stall, inbound, first).await?;
        running.expect(wanted_bytes, reused_bytes);
        tracing::info!(group = %self.group, to = %self.to, wanted_bytes, reused_bytes, "the replica has a part of it");
        Ok(wanted)
    }

    /// Sends the chunks and the end.
    async fn stream(
        &self,
        peers: &Peers,
        pin: &Pin,
        wanted: Vec<Stretch>,
        sender: &Sender,
        running: &Running,
        number: &mut u64,
    ) -> Result<(), Failed> {
        let mut parts = pin.export(wanted);
        let first = *number;
        loop {
            match tokio::time::timeout(ALIVE_EVERY, settled(parts.recv())).await {
                Err(_) => sender.push(Kind::Alive(pb::SnapshotAlive {})).await?,
                Ok(None) => return Err(Failed::View),
                Ok(Some(Exporting::Chunk(data))) => {
                    let bytes = data.len() as u64;
                    sender.pace(&peers.0.transfers.sent, bytes).await?;
                    let crc = crc32fast::hash(&data);
                    let chunk = pb::SnapshotChunk {
                        number: *number,
                        crc,
                        data,
                    };
                    sender.push(Kind::Chunk(chunk)).await?;
                    *number += 1;
                    running.add(bytes);
                }
                Ok(Some(Exporting::End(exported))) => {
                    let end = pb::SnapshotEnd {
                        chunks: *number - first,
                        records: exported.records,
                    };
                    return Ok(sender.push(Kind::End(end)).await?);
                }
            }
        }
    }
}

/// Why it was not delivered.
enum Failed {
    Peer(String),
    /// The view tells why.
    View,
}

impl From<String> for Failed {
    fn from(text: String) -> Self {
        Failed::Peer(text)
    }
}

/// All that is wanted, and how many bytes are and are not.
async fn stretches(
    stall: Duration,
    inbound: &mut Frames,
    first: pb::SnapshotWanted,
) -> Result<(Vec<Stretch>, u64, u64), String> {
    let mut all = Vec::new();
    let mut part = first;
    loop {
        for stretch in &part.stretches {
            let to = stretch.to.as_ref().map(Place::decode);
            match (Place::decode(&stretch.from), to) {
                (Some(from), None) => all.push(Stretch { from, to: None }),
                (Some(from), Some(Some(to))) => all.push(Stretch { from, to: Some(to) }),
                _ => return Err("it wants what is no part of a snapshot".into()),
            }
        }
        if part.last {
            return Ok((crate::storage::united(all), part.wanted_bytes, part.reused_bytes));
        }
        let Kind::Wanted(next) = answer(stall, inbound).await? else {
            return Err("an answer that does not belong here".into());
        };
        part = next;
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
    let mut sender = Sender {
        frames: sender,
        stall: inner.config.handshake_timeout,
    };
    let (caller, hello) = Caller::begin(&inner.config, node);
    sender.push(Kind::Handshake(hello)).await?;
    let answer = client.snapshot(ReceiverStream::new(frames)).await;
    let mut inbound = answer.map_err(|s| describe(&s))?.into_inner();
    let welcome = handshake(next(&mut inbound).await?)?;
    let proof = match caller.welcome(&inner.config, &inner.book, Some(welcome)) {
        Ok((_, proof)) => proof,
        Err(refusal) => {
            // It may be gone already.
            let _ = sender.push(Kind::Handshake(refused(&refusal))).await;
            return Err(refusal.to_string());
        }
    };
    sender.push(Kind::Handshake(proof)).await?;
    Caller::accepted(Some(handshake(next(&mut inbound).await?)?)).map_err(|r| r.to_string())?;
    sender.stall = inner.config.snapshot_stall_timeout;
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

/// The receiver's next word that says something.
async fn answer(stall: Duration, inbound: &mut Frames) -> Result<Kind, String> {
    loop {
        match within(stall, "the answer", next(inbound)).await? {
            Some(Kind::Alive(_)) => {}
            Some(Kind::Error(text)) => return Err(unexpected(Some(Kind::Error(text)))),
            Some(kind) => return Ok(kind),
            None => return Err(unexpected(None)),
        }
    }
}

/// Why the receiver speaks although it was not asked: it can only be that it takes no more.
async fn unasked(inbound: &mut Frames) -> String {
    loop {
        match next(inbound).await {
            Ok(Some(Kind::Alive(_))) => {}
            Ok(other) => return unexpected(other),
            Err(text) => return text,
        }
    }
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
