//! Those who publish and read. They are outside of the nodes and outlive them: each has one thing under way, tells what
//! happened from what did not and what may have, and keeps to what the answers say.

use bytes::Bytes;
use mainstem::base::RetryClass;
use mainstem::machine::{FEATURE_LEVEL, GroupOutcome, ItemOutcome};
use mainstem::model::batch::{BatchBuilder, Codec, RecordFields};
use mainstem::model::{GroupId, ReplicaId, Sequence, ShardId};
use mainstem::raft::Applied;
use mainstem::wire::internal as pb;
use prost::Message as _;

use super::ask::{Ask, Told};
use super::invariants::acked_stays::Ack;
use super::invariants::log_matching::Leader;
use super::invariants::{Invariants, Violation, broken};
use super::net::{MS, NodeNo};
use super::rng::Rng;

pub fn command(op: pb::group_command::Op) -> Bytes {
    let command = pb::GroupCommand {
        feature_level: FEATURE_LEVEL,
        op: Some(op),
    };
    command.encode_to_vec().into()
}

pub fn create_shard(shard: ShardId) -> Bytes {
    command(pb::group_command::Op::CreateShard(pb::CreateShard {
        shard_id: shard.get(),
        config: Some(pb::ShardConfig {
            stream_id: format!("{:032x}", shard.get()),
            subject_in_one_shard: true,
            producers_max: 100,
            producer_idle_us: 3_600_000_000,
            ..pb::ShardConfig::default()
        }),
    }))
}

fn text(token: u64) -> String {
    format!("<message {token}>")
}

/// The message that stored bytes hold.
pub fn token_of(stored: &[u8]) -> Option<u64> {
    let text = b"<message ";
    let at = stored.windows(text.len()).position(|w| w == text)? + text.len();
    let len = stored[at..].iter().position(|b| *b == b'>')?;
    std::str::from_utf8(&stored[at..at + len]).ok()?.parse().ok()
}

fn batch(token: u64, rng: &mut Rng) -> Bytes {
    let mut payload = text(token).into_bytes();
    payload.resize(payload.len() + rng.range(0, 400) as usize, b'.');
    let mut builder = BatchBuilder::new();
    builder
        .push(&RecordFields {
            subject: ["a.b", "a.c", "d"][(token % 3) as usize],
            key: None,
            message_id: None,
            event_time: None,
            headers: &[],
            payload: &payload,
        })
        .expect("it is within every limit");
    builder.build(Codec::None).expect("it has a record")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Numbers what it sends, and sends again until it is answered.
    Producer(u64),
    /// Sends again only what did not happen.
    Plain,
    Reader,
}

/// What is sent and not done with.
#[derive(Debug, Clone)]
struct Current {
    token: u64,
    batch: Bytes,
}

#[derive(Debug, Clone)]
pub struct Client {
    pub kind: Kind,
    pub shard: ShardId,
    /// Where it believes the shard to be.
    pub group: GroupId,
    pub target: NodeNo,
    current: Option<Current>,
    /// Of a producer: the number of `current`.
    sequence: u64,
    /// Of a reader: what it must see.
    must_see: Sequence,
    pub waiting: Option<u64>,
}

/// What a client does next.
pub enum Next {
    Wait(u64),
    /// As that, after a look at who has the shard by now.
    LookUp(u64),
}

impl Client {
    pub fn new(kind: Kind, shard: ShardId, group: GroupId) -> Self {
        Self {
            kind,
            shard,
            group,
            target: 1,
            current: None,
            sequence: 0,
            must_see: Sequence::FIRST,
            waiting: None,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.current.is_none() && self.waiting.is_none()
    }

    /// What it asks for now; nothing, if it is not to begin anything.
    pub fn ask(
        &mut self,
        tokens: &mut u64,
        rng: &mut Rng,
        invariants: &Invariants,
        now_us: u64,
        begin: bool,
    ) -> Option<Ask> {
        if self.kind == Kind::Reader {
            self.must_see = invariants.acked_stays.tail(self.shard);
            return begin.then_some(Ask::Read(self.shard));
        }
        if self.current.is_none() {
            if !begin {
                return None;
            }
            *tokens += 1;
            self.sequence += 1;
            self.current = Some(Current {
                token: *tokens,
                batch: batch(*tokens, rng),
            });
        }
        let current = self.current.as_ref()?;
        let producer = match self.kind {
            Kind::Producer(producer_id) => Some(pb::ProducerStamp {
                producer_id,
                epoch: 1,
                sequence: self.sequence,
            }),
            Kind::Plain | Kind::Reader => None,
        };
        Some(Ask::Propose(command(pb::group_command::Op::Publish(pb::Publish {
            shard_id: self.shard.get(),
            time_us: now_us,
            items: vec![pb::PublishItem {
                batch: current.batch.clone(),
                producer,
                expect: None,
            }],
        }))))
    }

    /// Takes an answer.
    pub fn told(
        &mut self,
        told: &Told,
        places: impl Fn(ReplicaId) -> Option<NodeNo>,
        nodes: usize,
        rng: &mut Rng,
        invariants: &mut Invariants,
    ) -> Result<Next, Violation> {
        self.waiting = None;
        let pause = rng.range(1, 40) * MS;
        match told {
            Told::Tail(seen) => {
                invariants.acked_stays.read(self.shard, self.must_see, *seen)?;
                return Ok(Next::Wait(pause * 3));
            }
            Told::Early => {
                self.acked(None, None, invariants);
                return Ok(Next::Wait(pause));
            }
            Told::Applied(index, term, applied) => {
                return Ok(match self.applied((*index, *term), applied, invariants)? {
                    true => Next::Wait(pause),
                    false => Next::LookUp(pause),
                });
            }
            Told::Done => {}
            Told::Failed(class, leader, why) => {
                match (class, self.kind) {
                    (RetryClass::CannotWork, _) => {
                        return Err(broken("nothing is refused", format!("{:?}: {why}", self.current)));
                    }
                    (RetryClass::MayHaveHappened, Kind::Plain) => self.current = None,
                    (RetryClass::DidNotHappen, Kind::Plain) if rng.one_in(3) => {
                        if let Some(current) = self.current.take() {
                            invariants.acked_stays.did_not_happen(current.token);
                        }
                    }
                    _ => {}
                }
                self.target = match leader.and_then(&places) {
                    Some(node) if !rng.one_in(4) => node,
                    _ => rng.range(1, nodes as u64 + 1) as NodeNo,
                };
                if rng.one_in(3) {
                    return Ok(Next::LookUp(pause));
                }
                return Ok(Next::Wait(pause));
            }
            Told::Lost => {
                if self.kind == Kind::Plain {
                    self.current = None;
                }
                self.target = rng.range(1, nodes as u64 + 1) as NodeNo;
            }
        }
        Ok(Next::Wait(pause))
    }

    fn acked(&mut self, sequence: Option<Sequence>, entry: Option<(u64, Leader)>, invariants: &mut Invariants) {
        if let Some(current) = self.current.take() {
            let ack = Ack {
                group: self.group,
                shard: self.shard,
                sequence,
                entry,
            };
            invariants.acked_stays.acked(current.token, ack);
        }
    }

    /// False: the shard is not there, or not yet.
    fn applied(
        &mut self,
        entry: (u64, Leader),
        applied: &Applied,
        invariants: &mut Invariants,
    ) -> Result<bool, Violation> {
        match applied {
            Applied::Command(GroupOutcome::Published(items)) => match &items[..] {
                [ItemOutcome::Stored(stored)] => {
                    invariants.seal_before_adopt.acked(self.shard, self.group, entry.0)?;
                    self.acked(Some(stored.first), Some(entry), invariants);
                    Ok(true)
                }
                other => Err(broken("nothing is refused", format!("{:?}: {other:?}", self.current))),
            },
            // It was sealed; it never was there; it was there before a restart.
            Applied::Command(GroupOutcome::Moved { .. } | GroupOutcome::NoShard) => Ok(false),
            other => Err(broken("an answer fits its question", format!("{other:?}"))),
        }
    }
}

/// Whether every client is done.
pub fn all_idle(clients: &[Client]) -> bool {
    clients.iter().all(Client::is_idle)
}
