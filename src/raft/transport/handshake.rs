//! Both sides prove that they hold the cluster's token, by an HMAC over what both have said, and check who the other
//! one is. The token is never sent; nothing of a session is accepted before.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::book::{KnownPeer, PeerBook};
use super::config::{PeerConfig, PeerIdentity};
use crate::model::NodeId;
use crate::wire::internal as pb;

/// The oldest protocol version spoken.
const PROTOCOL_MIN: u32 = 1;
/// The newest.
const PROTOCOL_MAX: u32 = 1;
const NONCE_BYTES: usize = 32;

const CALLER: &[u8] = b"mainstem peer 1 caller";
const CALLED: &[u8] = b"mainstem peer 1 called";

/// Why two nodes do not speak with each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "node {node} belongs to cluster {given:?}, this one to {own:?}: nodes of one cluster only speak with each \
         other; check the address, or the data directory of the node that was moved"
    )]
    OtherCluster { node: NodeId, given: String, own: String },
    #[error(
        "node {given} answered where node {wanted} was meant: the address is out of date; correct it, or wait until \
         the cluster's metadata has it"
    )]
    OtherNode { wanted: NodeId, given: NodeId },
    #[error("node {node} holds another token: all nodes of a cluster have the same; give it the cluster's token")]
    Token { node: NodeId },
    #[error(
        "node {node} comes with store {given:032x}, but is known with store {known:032x}: its disk was emptied or \
         replaced, and what it had acknowledged is gone; let it join as a new node and remove the old one"
    )]
    OtherStore { node: NodeId, known: u128, given: u128 },
    #[error(
        "node {node} comes with incarnation {given}, but {known} was seen: this is an older copy of its disk, or a \
         process that was replaced; stop it, and start the newest one"
    )]
    OlderIncarnation { node: NodeId, known: u64, given: u64 },
    #[error(
        "node {node} speaks peer protocol {their_min} to {their_max}, this one {PROTOCOL_MIN} to {PROTOCOL_MAX}: they \
         have none in common; upgrade the older one first"
    )]
    Protocol {
        node: NodeId,
        their_min: u32,
        their_max: u32,
    },
    #[error("what was sent is not a handshake of this protocol: {0}")]
    Malformed(&'static str),
    #[error("as many sessions as allowed are open")]
    Busy,
    /// The other side said so; the text is its own.
    #[error("refused by the other node: {text}")]
    ByPeer { reason: pb::PeerRefusal, text: String },
}

impl Refusal {
    /// For the wire.
    pub(super) fn to_pb(&self) -> pb::PeerRefused {
        let reason = match self {
            Refusal::OtherCluster { .. } => pb::PeerRefusal::OtherCluster,
            Refusal::OtherNode { .. } => pb::PeerRefusal::OtherNode,
            Refusal::Token { .. } => pb::PeerRefusal::Token,
            Refusal::OtherStore { .. } => pb::PeerRefusal::OtherStore,
            Refusal::OlderIncarnation { .. } => pb::PeerRefusal::OlderIncarnation,
            Refusal::Protocol { .. } => pb::PeerRefusal::Protocol,
            Refusal::Malformed(_) => pb::PeerRefusal::Malformed,
            Refusal::Busy => pb::PeerRefusal::Busy,
            Refusal::ByPeer { reason, .. } => *reason,
        };
        pb::PeerRefused {
            reason: reason.into(),
            text: self.to_string(),
        }
    }

    pub(super) fn from_pb(refused: &pb::PeerRefused) -> Self {
        Refusal::ByPeer {
            reason: refused.reason(),
            text: refused.text.chars().take(500).collect(),
        }
    }
}

fn hello(identity: &PeerIdentity, to: NodeId) -> pb::PeerHello {
    pb::PeerHello {
        cluster_id: identity.cluster_id.clone(),
        node_id: identity.node.get(),
        store_id: identity.store_id.to_be_bytes().to_vec().into(),
        incarnation: identity.incarnation,
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        nonce: rand::random::<[u8; NONCE_BYTES]>().to_vec().into(),
        to_node_id: to.get(),
    }
}

/// The bytes that a proof is over: the role, and what either side said. Fields that a later version adds are not in it.
fn transcript(role: &[u8], caller: &pb::PeerHello, called: &pb::PeerHello) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    let mut part = |bytes: &[u8]| {
        out.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        out.extend_from_slice(bytes);
    };
    part(role);
    for hello in [caller, called] {
        part(hello.cluster_id.as_bytes());
        part(&hello.node_id.to_be_bytes());
        part(&hello.store_id);
        part(&hello.incarnation.to_be_bytes());
        part(&hello.protocol_min.to_be_bytes());
        part(&hello.protocol_max.to_be_bytes());
        part(&hello.nonce);
        part(&hello.to_node_id.to_be_bytes());
    }
    out
}

fn mac(token: &[u8], role: &[u8], caller: &pb::PeerHello, called: &pb::PeerHello) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token).ok()?;
    mac.update(&transcript(role, caller, called));
    Some(mac)
}

fn prove(token: &[u8], role: &[u8], caller: &pb::PeerHello, called: &pb::PeerHello) -> Vec<u8> {
    // An HMAC takes a key of any length.
    mac(token, role, caller, called).map_or_else(Vec::new, |m| m.finalize().into_bytes().to_vec())
}

fn holds(token: &[u8], role: &[u8], caller: &pb::PeerHello, called: &pb::PeerHello, proof: &[u8]) -> bool {
    mac(token, role, caller, called).is_some_and(|m| m.verify_slice(proof).is_ok())
}

/// What can be checked without a proof.
fn check_hello(config: &PeerConfig, theirs: &pb::PeerHello) -> Result<(KnownPeer, u32), Refusal> {
    let node = NodeId::new(theirs.node_id);
    if theirs.nonce.len() != NONCE_BYTES {
        return Err(Refusal::Malformed("the nonce has the wrong length"));
    }
    let store_id = <[u8; 16]>::try_from(theirs.store_id.as_ref())
        .map(u128::from_be_bytes)
        .map_err(|_| Refusal::Malformed("the store id has the wrong length"))?;
    if theirs.cluster_id != config.identity.cluster_id {
        return Err(Refusal::OtherCluster {
            node,
            given: theirs.cluster_id.chars().take(100).collect(),
            own: config.identity.cluster_id.clone(),
        });
    }
    let protocol = theirs.protocol_max.min(PROTOCOL_MAX);
    if protocol < theirs.protocol_min.max(PROTOCOL_MIN) {
        return Err(Refusal::Protocol {
            node,
            their_min: theirs.protocol_min,
            their_max: theirs.protocol_max,
        });
    }
    let peer = KnownPeer {
        node,
        store_id,
        incarnation: theirs.incarnation,
    };
    Ok((peer, protocol))
}

fn step(step: pb::handshake::Step) -> pb::Handshake {
    pb::Handshake { step: Some(step) }
}

/// A refusal, to be sent.
pub(super) fn refused(refusal: &Refusal) -> pb::Handshake {
    step(pb::handshake::Step::Refused(refusal.to_pb()))
}

/// The calling side.
pub(super) struct Caller {
    to: NodeId,
    own: pb::PeerHello,
}

impl Caller {
    /// The first frame to send.
    pub fn begin(config: &PeerConfig, to: NodeId) -> (Self, pb::Handshake) {
        let own = hello(&config.identity, to);
        let first = step(pb::handshake::Step::Hello(own.clone()));
        (Self { to, own }, first)
    }

    /// Takes the welcome; gives the peer and the proof to send.
    pub fn welcome(
        &self,
        config: &PeerConfig,
        book: &PeerBook,
        answer: Option<pb::Handshake>,
    ) -> Result<(KnownPeer, pb::Handshake), Refusal> {
        let welcome = match answer.and_then(|h| h.step) {
            Some(pb::handshake::Step::Welcome(welcome)) => welcome,
            Some(pb::handshake::Step::Refused(refused)) => return Err(Refusal::from_pb(&refused)),
            Some(_) | None => return Err(Refusal::Malformed("expected a welcome")),
        };
        let theirs = welcome.hello.unwrap_or_default();
        let (peer, _) = check_hello(config, &theirs)?;
        if peer.node != self.to {
            return Err(Refusal::OtherNode {
                wanted: self.to,
                given: peer.node,
            });
        }
        if !holds(&config.token, CALLED, &self.own, &theirs, &welcome.proof) {
            return Err(Refusal::Token { node: peer.node });
        }
        book.admit(peer)?;
        let proof = prove(&config.token, CALLER, &self.own, &theirs);
        let proof = pb::PeerProof { proof: proof.into() };
        Ok((peer, step(pb::handshake::Step::Proof(proof))))
    }

    /// Takes the last answer.
    pub fn accepted(answer: Option<pb::Handshake>) -> Result<(), Refusal> {
        match answer.and_then(|h| h.step) {
            Some(pb::handshake::Step::Accepted(_)) => Ok(()),
            Some(pb::handshake::Step::Refused(refused)) => Err(Refusal::from_pb(&refused)),
            Some(_) | None => Err(Refusal::Malformed("expected to be accepted")),
        }
    }
}

/// The called side.
pub(super) struct Called {
    own: pb::PeerHello,
    theirs: pb::PeerHello,
    peer: KnownPeer,
    protocol: u32,
}

impl Called {
    /// The node that calls, as it says.
    pub fn node(&self) -> NodeId {
        self.peer.node
    }

    /// Takes the hello; gives the welcome to send.
    pub fn hello(config: &PeerConfig, first: Option<pb::Handshake>) -> Result<(Self, pb::Handshake), Refusal> {
        let Some(pb::handshake::Step::Hello(theirs)) = first.and_then(|h| h.step) else {
            return Err(Refusal::Malformed("expected a hello"));
        };
        let (peer, protocol) = check_hello(config, &theirs)?;
        let wanted = NodeId::new(theirs.to_node_id);
        if wanted != config.identity.node {
            return Err(Refusal::OtherNode {
                wanted,
                given: config.identity.node,
            });
        }
        let own = hello(&config.identity, peer.node);
        let proof = prove(&config.token, CALLED, &theirs, &own);
        let welcome = pb::PeerWelcome {
            hello: Some(own.clone()),
            proof: proof.into(),
        };
        let called = Self {
            own,
            theirs,
            peer,
            protocol,
        };
        Ok((called, step(pb::handshake::Step::Welcome(welcome))))
    }

    /// Takes the proof; gives the peer and the last answer to send.
    pub fn proof(
        &self,
        config: &PeerConfig,
        book: &PeerBook,
        answer: Option<pb::Handshake>,
    ) -> Result<(KnownPeer, pb::Handshake), Refusal> {
        let proof = match answer.and_then(|h| h.step) {
            Some(pb::handshake::Step::Proof(proof)) => proof.proof,
            Some(pb::handshake::Step::Refused(refused)) => return Err(Refusal::from_pb(&refused)),
            Some(_) | None => return Err(Refusal::Malformed("expected a proof")),
        };
        if !holds(&config.token, CALLER, &self.theirs, &self.own, &proof) {
            return Err(Refusal::Token { node: self.peer.node });
        }
        book.admit(self.peer)?;
        let accepted = pb::PeerAccepted {
            protocol: self.protocol,
        };
        Ok((self.peer, step(pb::handshake::Step::Accepted(accepted))))
    }
}
