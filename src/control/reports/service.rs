//! Calls of peers: reports of this node, and leaders here that are told to hand over.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use prost::Message;

use super::Reporter;
use crate::base::RetryClass;
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::raft::transport::{CallFailure, PeerMethod, PeerService};
use crate::raft::{ChangeError, Groups};
use crate::wire::internal as pb;

/// A hand-over may not take longer than this, whatever is asked.
pub(in crate::control) const HAND_OVER_MAX: Duration = Duration::from_secs(30);

/// The methods that are served here.
pub(in crate::control) const METHODS: [PeerMethod; 2] = [PeerMethod::NodeReport, PeerMethod::GroupAdmin];

pub(in crate::control) struct ReportService(pub Arc<Reporter>);

fn failure(retry: RetryClass, message: impl ToString) -> CallFailure {
    CallFailure {
        message: message.to_string(),
        retry,
    }
}

fn malformed(error: &prost::DecodeError) -> CallFailure {
    failure(RetryClass::CannotWork, format!("the call is malformed: {error}"))
}

impl PeerService for ReportService {
    fn call(
        &self,
        _from: NodeId,
        method: PeerMethod,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, CallFailure>> {
        let reporter = self.0.clone();
        async move {
            if method == PeerMethod::NodeReport {
                let call = pb::NodeReportCall::decode(payload).map_err(|e| malformed(&e))?;
                return Ok(reporter.report(&call).encode_to_vec().into());
            }
            if method != PeerMethod::GroupAdmin {
                return Err(failure(RetryClass::CannotWork, "it is not served here"));
            }
            let call = pb::GroupAdminCall::decode(payload).map_err(|e| malformed(&e))?;
            let id = GroupId::new(call.group_id);
            let Some(pb::group_admin_call::Op::TransferLeader(transfer)) = call.op else {
                return Err(failure(
                    RetryClass::CannotWork,
                    "this node's version does not know what is asked of the group",
                ));
            };
            hand_over(&reporter.groups, id, &transfer)
                .await
                .map(|answer| answer.encode_to_vec().into())
                .map_err(|e| failure(e.retry_class(), e))
        }
        .boxed()
    }
}

/// Lets the leader of a group, which must be here, hand over.
pub(in crate::control) async fn hand_over(
    groups: &Groups,
    id: GroupId,
    transfer: &pb::TransferLeader,
) -> Result<pb::GroupAdminAnswer, ChangeError> {
    let group = groups.get(id).ok_or(ChangeError::NotLeader {
        group: id,
        leader: None,
    })?;
    let status = group.status();
    if !status.is_leader {
        return Err(ChangeError::NotLeader {
            group: id,
            leader: status.leader,
        });
    }
    let patience = Duration::from_micros(transfer.patience_us).min(HAND_OVER_MAX);
    match transfer.to_replica {
        Some(replica) => group.transfer_leader(ReplicaId::new(replica), patience).await?,
        None => group.step_down(patience).await?,
    }
    group.note_order();
    let now = group.status();
    Ok(pb::GroupAdminAnswer {
        leader_replica: now.leader.map(|r| r.get()),
        term: now.term.get(),
    })
}
