//! Proofs that a side holds the token: an HMAC over everything said so far, with the role in front.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::wire::internal as pb;

/// Random bytes of either side.
pub const NONCE_BYTES: usize = 32;

/// Who proves, and what.
#[derive(Debug, Clone, Copy)]
pub enum Role {
    Challenge,
    Request,
    Answer,
}

impl Role {
    fn word(self) -> &'static [u8] {
        match self {
            Role::Challenge => b"mainstem join 1 challenge",
            Role::Request => b"mainstem join 1 request",
            Role::Answer => b"mainstem join 1 answer",
        }
    }
}

/// What was said so far.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    pub hello: &'a pb::JoinHello,
    pub challenge: &'a pb::JoinChallenge,
    /// Of the request, once it is made.
    pub node: &'a [u8],
    /// Of the answer, once it is given.
    pub accepted: &'a [u8],
}

pub fn nonce() -> bytes::Bytes {
    rand::random::<[u8; NONCE_BYTES]>().to_vec().into()
}

fn mac(token: &[u8], role: Role, said: Said<'_>) -> Option<Hmac<Sha256>> {
    // A key of any length is taken.
    let mut mac = Hmac::<Sha256>::new_from_slice(token).ok()?;
    let mut part = |bytes: &[u8]| {
        mac.update(&(bytes.len() as u64).to_be_bytes());
        mac.update(bytes);
    };
    part(role.word());
    part(said.hello.cluster_name.as_bytes());
    part(&said.hello.nonce);
    part(&said.hello.store_id);
    part(&said.hello.protocol.to_be_bytes());
    part(said.challenge.cluster_id.as_bytes());
    part(&said.challenge.nonce);
    part(said.node);
    part(said.accepted);
    Some(mac)
}

pub fn prove(token: &[u8], role: Role, said: Said<'_>) -> bytes::Bytes {
    let proof = mac(token, role, said).map_or_else(Vec::new, |mac| mac.finalize().into_bytes().to_vec());
    proof.into()
}

pub fn holds(token: &[u8], role: Role, said: Said<'_>, proof: &[u8]) -> bool {
    mac(token, role, said).is_some_and(|mac| mac.verify_slice(proof).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_of_one_token_one_role_and_what_was_said() {
        let hello = pb::JoinHello {
            cluster_name: "one".into(),
            nonce: nonce(),
            ..pb::JoinHello::default()
        };
        let challenge = pb::JoinChallenge {
            cluster_id: "id".into(),
            nonce: nonce(),
            ..pb::JoinChallenge::default()
        };
        let said = Said {
            hello: &hello,
            challenge: &challenge,
            node: b"node",
            accepted: b"",
        };
        let proof = prove(b"secret", Role::Request, said);
        assert!(holds(b"secret", Role::Request, said, &proof));
        assert!(!holds(b"Secret", Role::Request, said, &proof));
        assert!(!holds(b"secret", Role::Answer, said, &proof));
        assert!(!holds(b"secret", Role::Request, Said { node: b"nod", ..said }, &proof));
        let other = pb::JoinChallenge {
            nonce: nonce(),
            ..challenge.clone()
        };
        let other = Said {
            challenge: &other,
            ..said
        };
        assert!(!holds(b"secret", Role::Request, other, &proof));
    }
}
