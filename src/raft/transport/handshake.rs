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
        "node {node} knows nothing of its start as incarnation {known}, which was seen: this is an older copy of its \
         disk, which was started again; stop it, and start the newest one, or let it join with an empty disk as a new \
         node and remove the old one"
    )]
    OtherPast { node: NodeId, known: u64 },
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
            Refusal::OlderIncarnation { .. } | Refusal::OtherPast { .. } => pb::PeerRefusal::OlderIncarnation,
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
        starts: identity.starts.clone(),
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
        for start in &hello.starts {
            part(&start.to_be_bytes());
        }
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
    if theirs.starts.len() > crate::storage::STARTS_MAX {
        return Err(Refusal::Malformed("it tells of too many starts"));
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
        start: theirs.starts.last().copied().unwrap_or(0),
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
        book.admit(peer, &theirs.starts)?;
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
        book.admit(self.peer, &self.theirs.starts)?;
        let accepted = pb::PeerAccepted {
            protocol: self.protocol,
        };
        Ok((self.peer, step(pb::handshake::Step::Accepted(accepted))))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::super::book::{NoMemory, PeerMemory};
    use super::*;

    fn config(node: u64) -> PeerConfig {
        let identity = PeerIdentity {
            cluster_id: "one".into(),
            node: NodeId::new(node),
            store_id: u128::from(node) << 64,
            incarnation: 10,
            starts: Vec::new(),
        };
        PeerConfig::new(identity, "secret")
    }

    fn book() -> PeerBook {
        PeerBook::new(Arc::new(NoMemory))
    }

    /// What each side says: (caller, called).
    fn shake(
        caller: (&PeerConfig, &PeerBook),
        called: (&PeerConfig, &PeerBook),
        to: u64,
    ) -> (Result<KnownPeer, Refusal>, Result<KnownPeer, Refusal>) {
        let (first, hello) = Caller::begin(caller.0, NodeId::new(to));
        let (second, welcome) = match Called::hello(called.0, Some(hello)) {
            Ok(both) => both,
            Err(refusal) => {
                let told = first.welcome(caller.0, caller.1, Some(refused(&refusal)));
                return (told.map(|(peer, _)| peer), Err(refusal));
            }
        };
        let (peer, proof) = match first.welcome(caller.0, caller.1, Some(welcome)) {
            Ok(both) => both,
            Err(refusal) => {
                let told = second.proof(called.0, called.1, Some(refused(&refusal)));
                return (Err(refusal), told.map(|(peer, _)| peer));
            }
        };
        match second.proof(called.0, called.1, Some(proof)) {
            Ok((other, accepted)) => (Caller::accepted(Some(accepted)).map(|()| peer), Ok(other)),
            Err(refusal) => (Caller::accepted(Some(refused(&refusal))).map(|()| peer), Err(refusal)),
        }
    }

    #[test]
    fn two_nodes_of_a_cluster_know_each_other() {
        let (one, two) = (config(1), config(2));
        let (caller, called) = shake((&one, &book()), (&two, &book()), 2);
        assert_eq!(caller.unwrap().node, NodeId::new(2));
        assert_eq!(called.unwrap().store_id, 1 << 64);
    }

    #[test]
    fn who_must_not_speak_is_refused_by_both_with_the_reason() {
        let one = config(1);
        let mut cluster = config(2);
        cluster.identity.cluster_id = "two".into();
        let mut token = config(2);
        token.token = b"guess".to_vec();
        let other_node = config(3);
        for (two, reason) in [
            (cluster, pb::PeerRefusal::OtherCluster),
            (token, pb::PeerRefusal::Token),
            (other_node, pb::PeerRefusal::OtherNode),
        ] {
            let books = (book(), book());
            let (caller, called) = shake((&one, &books.0), (&two, &books.1), 2);
            let (caller, called) = (caller.unwrap_err(), called.unwrap_err());
            assert_eq!(caller.to_pb().reason(), reason, "{caller}");
            assert_eq!(called.to_pb().reason(), reason, "{called}");
            assert!(
                books.0.all().is_empty() && books.1.all().is_empty(),
                "remembered unproven"
            );
        }
    }

    #[test]
    fn an_older_start_and_another_disk_are_refused_and_the_newest_is_remembered() {
        let (one, mut two) = (config(1), config(2));
        let seen = book();
        shake((&one, &seen), (&two, &book()), 2).0.unwrap();
        two.identity.incarnation = 12;
        shake((&two, &book()), (&one, &seen), 1).1.unwrap();
        two.identity.incarnation = 11;
        let refusal = shake((&one, &seen), (&two, &book()), 2).0.unwrap_err();
        assert!(
            matches!(
                refusal,
                Refusal::OlderIncarnation {
                    known: 12,
                    given: 11,
                    ..
                }
            ),
            "{refusal}"
        );
        let refusal = shake((&two, &book()), (&one, &seen), 1).1.unwrap_err();
        assert!(matches!(refusal, Refusal::OlderIncarnation { .. }), "{refusal}");
        two.identity.incarnation = 13;
        two.identity.store_id = 7;
        let refusal = shake((&one, &seen), (&two, &book()), 2).0.unwrap_err();
        assert!(matches!(refusal, Refusal::OtherStore { .. }), "{refusal}");
        two.identity.store_id = 2 << 64;
        shake((&one, &seen), (&two, &book()), 2).0.unwrap();
        assert_eq!(seen.all().iter().map(|p| p.incarnation).collect::<Vec<_>>(), [13]);
    }

    /// A copy of the disk from before the last start, started once, comes with the same incarnation; started again and
    /// again, with any. What it cannot know is the number of the start that it never made.
    #[test]
    fn an_older_copy_is_refused_however_often_it_is_started() {
        let (one, mut two) = (config(1), config(2));
        let seen = book();
        two.identity.starts = vec![71, 72];
        shake((&one, &seen), (&two, &book()), 2).0.unwrap();
        let mut copy = two.clone();
        (two.identity.incarnation, two.identity.starts) = (11, vec![71, 72, 73]);
        shake((&two, &book()), (&one, &seen), 1).1.unwrap();
        shake((&one, &seen), (&two, &book()), 2).0.unwrap();
        for start in 0..5 {
            copy.identity.incarnation += 1;
            copy.identity.starts.push(80 + start);
            let refusal = shake((&one, &seen), (&copy, &book()), 2).0.unwrap_err();
            assert!(matches!(refusal, Refusal::OtherPast { known: 11, .. }), "{refusal}");
            let refusal = shake((&copy, &book()), (&one, &seen), 1).1.unwrap_err();
            assert_eq!(refusal.to_pb().reason(), pb::PeerRefusal::OlderIncarnation, "{refusal}");
        }
        // The right one goes on, also after starts that were not seen here.
        (two.identity.incarnation, two.identity.starts) = (14, vec![72, 73, 74, 75, 76]);
        shake((&one, &seen), (&two, &book()), 2).0.unwrap();
        // What it forgot in the meantime cannot be asked for.
        (two.identity.incarnation, two.identity.starts) = (20, vec![78, 79]);
        shake((&one, &seen), (&two, &book()), 2).0.unwrap();
    }

    #[test]
    fn a_peer_without_a_common_protocol_is_refused() {
        let (one, two) = (config(1), config(2));
        let (_, hello) = Caller::begin(&one, NodeId::new(2));
        let Some(pb::handshake::Step::Hello(mut hello)) = hello.step else {
            panic!("not a hello");
        };
        (hello.protocol_min, hello.protocol_max) = (PROTOCOL_MAX + 1, PROTOCOL_MAX + 4);
        let refusal = Called::hello(&two, Some(step(pb::handshake::Step::Hello(hello))))
            .err()
            .unwrap();
        assert!(matches!(refusal, Refusal::Protocol { .. }), "{refusal}");
    }

    /// Nobody gets in by sending back what was sent, or with what another handshake showed.
    #[test]
    fn proofs_cannot_be_turned_round_or_used_again() {
        let (one, two) = (config(1), config(2));
        let (first, hello) = Caller::begin(&one, NodeId::new(2));
        let (second, welcome) = Called::hello(&two, Some(hello)).unwrap();
        let (_, proof) = first.welcome(&one, &book(), Some(welcome.clone())).unwrap();
        let Some(pb::handshake::Step::Welcome(inner)) = welcome.step else {
            panic!("not a welcome");
        };
        let turned = step(pb::handshake::Step::Proof(pb::PeerProof { proof: inner.proof }));
        assert!(second.proof(&two, &book(), Some(turned)).is_err());
        let (_, hello) = Caller::begin(&one, NodeId::new(2));
        let (third, _) = Called::hello(&two, Some(hello)).unwrap();
        assert!(third.proof(&two, &book(), Some(proof.clone())).is_err());
        assert!(second.proof(&two, &book(), Some(proof)).is_ok());
        assert!(second.proof(&two, &book(), None).is_err());
    }

    #[test]
    fn an_empty_token_is_only_taken_when_that_is_said() {
        let mut config = config(1);
        config.token.clear();
        assert!(config.check().is_err());
        config.allow_empty_token = true;
        assert!(config.check().is_ok());
    }

    #[derive(Default)]
    struct Kept(Mutex<Vec<KnownPeer>>);

    impl PeerMemory for Kept {
        fn load(&self) -> Vec<KnownPeer> {
            self.0.lock().clone()
        }

        fn remember(&self, peer: KnownPeer) {
            self.0.lock().push(peer);
        }
    }

    #[test]
    fn what_is_remembered_outlives_the_process() {
        let (one, mut two) = (config(1), config(2));
        let kept = Arc::new(Kept::default());
        let first = PeerBook::new(kept.clone());
        shake((&one, &first), (&two, &book()), 2).0.unwrap();
        shake((&one, &first), (&two, &book()), 2).0.unwrap();
        assert_eq!(kept.0.lock().len(), 1, "told only of what is new");
        two.identity.incarnation = 9;
        let second = PeerBook::new(kept);
        assert!(shake((&one, &second), (&two, &book()), 2).0.is_err());
    }

    #[test]
    fn a_refusal_is_news_once() {
        let book = book();
        assert!(book.is_news(NodeId::new(1), "calls", "text"));
        assert!(!book.is_news(NodeId::new(1), "calls", "text"));
        assert!(book.is_news(NodeId::new(1), "calls", "another"));
        assert!(book.is_news(NodeId::new(1), "called", "another"));
        book.no_refusal(NodeId::new(1), "calls");
        assert!(book.is_news(NodeId::new(1), "calls", "another"));
    }
}
