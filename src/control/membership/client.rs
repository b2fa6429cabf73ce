//! The joiner's side of joining.

use std::time::Duration;

use futures_util::stream;
use prost::Message;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::{ClientTlsConfig, Endpoint};

use super::proof::{self, Role, Said};
use super::server::hex;
use super::{PROTOCOL, STEP_MAX};
use crate::base::error_chain;
use crate::model::{NodeId, ReplicaId};
use crate::wire::internal as pb;
use pb::join_frame::Step;
use pb::joining_client::JoiningClient;

const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Between two rounds over all addresses: this at first, …
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// … doubling up to this.
const PAUSE_MAX: Duration = Duration::from_secs(3);

/// What a node tells of itself.
#[derive(Debug, Clone)]
pub struct JoinFacts {
    pub cluster_name: String,
    /// The cluster that it was in: no other will do.
    pub cluster_id: Option<String>,
    pub store_id: u128,
    /// Node id and store id are filled in here.
    pub node: pb::JoinNode,
}

/// What it learns.
#[derive(Debug, Clone)]
pub struct Joined {
    pub cluster_id: String,
    pub node: NodeId,
    pub meta_replica: ReplicaId,
    /// Node, address of its peer listener, its replica of the meta group.
    pub peers: Vec<(NodeId, String, Option<ReplicaId>)>,
}

/// Why a node was not let in. Trying again would not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    #[error("this node cannot join through {address}: {text}")]
    Refused { address: String, text: String },
    #[error("told to stop before a node of the cluster could be reached: {last}")]
    Stopped { last: String },
}

/// How to get in.
#[derive(Debug, Clone)]
pub struct Joining {
    /// `HOST:PORT` of peer listeners.
    pub addresses: Vec<String>,
    pub token: Vec<u8>,
    pub tls: Option<ClientTlsConfig>,
    pub facts: JoinFacts,
}

/// What went wrong with one address.
enum Trouble {
    /// Final.
    Refused(String),
    /// Now; later it may be another.
    Passing(String),
}

fn passing(what: impl Into<String>) -> Trouble {
    Trouble::Passing(what.into())
}

impl Joining {
    /// Asks one address after the other, round and round, until a member lets this node in, or says that it never
    /// will, or `stop` is cancelled.
    pub async fn run(&self, stop: &CancellationToken) -> Result<Joined, JoinError> {
        let mut pause = PAUSE_MIN;
        let mut last = String::new();
        loop {
            for address in &self.addresses {
                let asked = stop.run_until_cancelled(self.ask(address)).await;
                match asked {
                    None => return Err(JoinError::Stopped { last }),
                    Some(Ok(joined)) => return Ok(joined),
                    Some(Err(Trouble::Refused(text))) => {
                        return Err(JoinError::Refused {
                            address: address.clone(),
                            text,
                        });
                    }
                    Some(Err(Trouble::Passing(text))) => {
                        let text = format!("{address}: {text}");
                        if text != last {
                            tracing::warn!("not joined yet, trying again: {text}");
                            last = text;
                        }
                    }
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Err(JoinError::Stopped { last });
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// What a connection ended with, and what that may mean for TLS.
    fn hinted(&self, text: String) -> String {
        let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
        let hint = match self.tls {
            Some(_) if says(&["invalid peer certificate"]) => {
                "tls.peer_ca is not the authority that signed that node's certificate, or the certificate does not name \
                 its address"
            }
            Some(_) if says(&["fatal alert", "AlertReceived"]) => {
                "that node does not take this node's certificate: its tls.peer_ca is another authority than the one that \
                 signed tls.cert"
            }
            Some(_) if says(&["InvalidContentType", "corrupt message"]) => "that node speaks no TLS to its peers",
            None if !says(&["Connection refused"]) => {
                "if the nodes of that cluster speak TLS to each other, give this one --tls-cert, --tls-key and \
                 --tls-peer-ca, too"
            }
            Some(_) | None => return text,
        };
        format!("{text}; {hint}")
    }

    async fn ask(&self, address: &str) -> Result<Joined, Trouble> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|e| Trouble::Refused(format!("it is no address: {e}")))?
            .connect_timeout(CONNECT_MAX);
        if let Some(tls) = &self.tls {
            endpoint = endpoint
                .tls_config(tls.clone())
                .map_err(|e| Trouble::Refused(e.to_string()))?;
        }
        let channel = endpoint
            .connect()
            .await
            .map_err(|e| passing(self.hinted(error_chain(&e))))?;
        let (frames, outbound) = mpsc::channel(4);
        let hello = pb::JoinHello {
            cluster_name: self.facts.cluster_name.clone(),
            nonce: proof::nonce(),
            store_id: self.facts.store_id.to_be_bytes().to_vec().into(),
            protocol: PROTOCOL,
        };
        say(&frames, Step::Hello(hello.clone())).await?;
        let outbound = stream::unfold(outbound, |mut outbound: mpsc::Receiver<pb::JoinFrame>| async move {
            let frame = outbound.recv().await?;
            Some((frame, outbound))
        });
        let mut client = JoiningClient::new(channel);
        let answered = tokio::time::timeout(STEP_MAX, client.join(outbound)).await;
        let answered = answered.map_err(|_| passing("it does not answer"))?;
        let mut inbound = answered
            .map_err(|status| passing(self.hinted(told(&status))))?
            .into_inner();
        let challenge = match next(&mut inbound).await? {
            Step::Challenge(challenge) => challenge,
            Step::Hello(_) | Step::Request(_) | Step::Answer(_) | Step::Refused(_) => {
                return Err(passing("it does not answer as a member does"));
            }
        };
        let said = Said {
            hello: &hello,
            challenge: &challenge,
            node: b"",
            accepted: b"",
        };
        if challenge.nonce.len() != proof::NONCE_BYTES
            || !proof::holds(&self.token, Role::Challenge, said, &challenge.proof)
        {
            let text = "the tokens differ: all nodes of a cluster have the same; give this node the cluster's with \
                        --token-file";
            let theirs = pb::JoinRefused {
                text: "it holds another token".into(),
                retry: false,
            };
            // It may be gone already.
            let _ = say(&frames, Step::Refused(theirs)).await;
            return Err(Trouble::Refused(text.into()));
        }
        if let Some(known) = self
            .facts
            .cluster_id
            .as_ref()
            .filter(|known| **known != challenge.cluster_id)
        {
            return Err(Trouble::Refused(format!(
                "it is a node of cluster {}, this one was in cluster {known}",
                challenge.cluster_id
            )));
        }
        let node = pb::JoinNode {
            node_id: 0,
            store_id: hex(&hello.store_id),
            ..self.facts.node.clone()
        };
        let node = node.encode_to_vec();
        let said = Said { node: &node, ..said };
        let request = pb::JoinRequest {
            proof: proof::prove(&self.token, Role::Request, said),
            node: node.clone().into(),
        };
        say(&frames, Step::Request(request)).await?;
        let answer = match next(&mut inbound).await? {
            Step::Answer(answer) => answer,
            Step::Hello(_) | Step::Challenge(_) | Step::Request(_) | Step::Refused(_) => {
                return Err(passing("it does not answer as a member does"));
            }
        };
        let said = Said {
            accepted: &answer.accepted,
            ..said
        };
        if !proof::holds(&self.token, Role::Answer, said, &answer.proof) {
            return Err(passing("its answer is not proven"));
        }
        let accepted =
            pb::JoinAccepted::decode(answer.accepted.clone()).map_err(|e| passing(format!("its answer: {e}")))?;
        if accepted.cluster_id != challenge.cluster_id || accepted.node_id == 0 || accepted.meta_replica_id == 0 {
            return Err(passing("its answer is not complete"));
        }
        let meta = |id: u64| (id != 0).then(|| ReplicaId::new(id));
        Ok(Joined {
            cluster_id: accepted.cluster_id,
            node: NodeId::new(accepted.node_id),
            meta_replica: ReplicaId::new(accepted.meta_replica_id),
            peers: accepted
                .peers
                .into_iter()
                .map(|peer| (NodeId::new(peer.node_id), peer.peer_address, meta(peer.meta_replica_id)))
                .collect(),
        })
    }
}

/// A status with what is behind it.
fn told(status: &tonic::Status) -> String {
    use std::error::Error as _;
    match status.source() {
        Some(source) => format!("{}: {}", status.message(), error_chain(source)),
        None => status.message().to_owned(),
    }
}

async fn say(frames: &mpsc::Sender<pb::JoinFrame>, step: Step) -> Result<(), Trouble> {
    let sent = frames.send(pb::JoinFrame { step: Some(step) }).await;
    sent.map_err(|_| passing("the connection ended"))
}

async fn next(inbound: &mut tonic::Streaming<pb::JoinFrame>) -> Result<Step, Trouble> {
    let frame = tokio::time::timeout(STEP_MAX, inbound.message()).await;
    let frame = frame.map_err(|_| passing("it does not answer"))?;
    match frame
        .map_err(|status| passing(status.message().to_owned()))?
        .and_then(|frame| frame.step)
    {
        Some(Step::Refused(refused)) if refused.retry => Err(Trouble::Passing(refused.text)),
        Some(Step::Refused(refused)) => Err(Trouble::Refused(refused.text)),
        Some(step) => Ok(step),
        None => Err(passing("the connection ended")),
    }
}
