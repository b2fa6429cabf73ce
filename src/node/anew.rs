//! A node whose data is damaged begins anew as another one, made from the others of its cluster (decision 0047).

use std::future::pending;
use std::time::Duration;

use super::cluster;
use super::engine::{Context, StartError};
use super::start::{HAND_OVER_MAX, WATCH_EVERY, facts};
use crate::base::AlarmKind;
use crate::control::Control;
use crate::storage::{Identity, Renewal, Store, note_damage, noted_damage};

/// How long a start waits for the members to agree, where an earlier run of the node has found damage. A start finds none:
/// the node can do without, and goes on asking while it runs.
const ASK_AT_START: Duration = Duration::from_secs(5);
/// Between two attempts to begin anew.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How often a damaged node looks whether it leads anything that others could lead.
const STAND_BACK_EVERY: Duration = Duration::from_secs(1);

/// Before a start: goes on with what an earlier run has begun. Returns damage that it has noted, if the members do not agree
/// now that the node begins anew.
pub(super) async fn go_on(context: &Context) -> Result<Option<String>, StartError> {
    if let Some(renewal) = under_way(context)? {
        set_aside(context, renewal).await?;
        return Ok(None);
    }
    let Some(why) = noted_damage(&context.config.node.data_dir) else {
        return Ok(None);
    };
    let reason = match tokio::time::timeout(ASK_AT_START, agree(context, &why)).await {
        Ok(Ok(())) => {
            if let Some(renewal) = under_way(context)? {
                set_aside(context, renewal).await?;
            }
            return Ok(None);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("they did not agree within {ASK_AT_START:?}"),
    };
    tracing::warn!(
        reason,
        "the node starts on its damaged data, and goes on asking the others"
    );
    Ok(Some(why))
}

/// Agreed upon, and not done yet.
fn under_way(context: &Context) -> Result<Option<Renewal>, StartError> {
    let dir = &context.config.node.data_dir;
    let renewal = Renewal::load(dir).map_err(|e| StartError::Failed(e.to_string()))?;
    Ok(renewal.filter(|renewal| renewal.is_to_be_set_aside(dir)))
}

/// Completes when damage was found while the node runs, or by an earlier run, and the members have agreed that the node
/// begins anew: it is then to end and start again. Until they do it goes on, as what is damaged is served by nobody, and its
/// votes may be needed; but it leads nothing that another one can lead. Never completes where nobody else has the data.
pub(super) async fn given_up(context: &Context, store: &Store, control: &Control, known: Option<String>) {
    if context.peer_listener.is_none() {
        return pending().await;
    }
    let why = match known {
        Some(why) => why,
        None => loop {
            if let Some(note) = store.damage().into_iter().next() {
                break note.what;
            }
            tokio::time::sleep(WATCH_EVERY).await;
        },
    };
    context.alarms.raise(AlarmKind::Damaged, why.clone());
    let stand_back = async {
        loop {
            control.hand_over(HAND_OVER_MAX).await;
            tokio::time::sleep(STAND_BACK_EVERY).await;
        }
    };
    let ask = async {
        while let Err(reason) = noted_and_agreed(context, store, &why).await {
            tracing::error!(reason, "the node goes on with damaged data: it cannot begin anew now");
            tokio::time::sleep(ASK_AGAIN).await;
        }
    };
    tokio::select! {
        () = stand_back => {}
        () = ask => {}
    }
}

async fn noted_and_agreed(context: &Context, store: &Store, why: &str) -> Result<(), String> {
    let (space, reserve) = (store.space(), store.options().min_free_bytes);
    let needed = space.held.saturating_add(reserve);
    if space.free < needed {
        return Err(format!(
            "what it has is set aside, not deleted, and is received again beside it: {needed} bytes must be free, {} are",
            space.free
        ));
    }
    note(context, why.to_owned()).await?;
    agree(context, why).await.map_err(|e| e.to_string())
}

/// Notes damage in the data directory, for the next start.
pub(super) async fn note(context: &Context, what: String) -> Result<(), String> {
    let dir = context.config.node.data_dir.clone();
    let noted = tokio::task::spawn_blocking(move || note_damage(&dir, &what)).await;
    let noted = noted.map_err(|e| e.to_string())?;
    noted.map_err(|e| format!("the damage cannot be noted in the data directory: {e}"))
}

/// A node of a cluster whose data is damaged does not go on with what is left of it: it is made anew from the others. Asks
/// the cluster to give up what the node was, which it does if no group loses its quorum by that; until then nothing is
/// changed here.
pub(super) async fn agree(context: &Context, why: &str) -> Result<(), StartError> {
    let (config, dir) = (&context.config, context.config.node.data_dir.clone());
    let known = Renewal::of(&dir, context.clock.now_us() / 1_000_000).filter(|_| context.peer_listener.is_some());
    let Some(renewal) = known else {
        return Err(StartError::Damaged(why.to_owned()));
    };
    tracing::error!(
        "the data of this node is damaged: {why}. The others of its cluster are asked to make its replicas anew; until they \
         agree nothing is changed here"
    );
    context.alarms.raise(AlarmKind::Damaged, why.to_owned());
    let identity = Identity {
        store_id: renewal.store_id,
        cluster_id: None,
        node_id: renewal.former_node,
        incarnation: 0,
        starts: Vec::new(),
    };
    let node = facts(context, &identity).join_node();
    cluster::give_up(config, &renewal, node, &context.stop)
        .await
        .map_err(|e| StartError::Damaged(format!("{why}; its replicas cannot be made anew from the others: {e}")))?;
    let noted = tokio::task::spawn_blocking(move || renewal.begin(&dir)).await;
    let noted = noted.map_err(|e| StartError::Failed(e.to_string()))?;
    noted.map_err(|e| StartError::Failed(format!("that this node begins anew cannot be noted: {e}")))
}

async fn set_aside(context: &Context, renewal: Renewal) -> Result<(), StartError> {
    let dir = context.config.node.data_dir.clone();
    let aside = tokio::task::spawn_blocking(move || renewal.set_aside(&dir)).await;
    let aside = aside.map_err(|e| StartError::Failed(e.to_string()))?;
    let aside =
        aside.map_err(|e| StartError::Failed(format!("the damaged data cannot be set aside: {e}; start it again")))?;
    tracing::warn!(
        aside = %aside.display(),
        "the damaged data was set aside; remove it when the cluster is healthy again and you have no use for it"
    );
    context.alarms.clear(AlarmKind::Damaged);
    Ok(())
}

/// Starts this program again in its place: parts of the start that found damage may still hold the store. Returns only if
/// that cannot be done, and why.
pub(super) fn again() -> String {
    use std::os::unix::process::CommandExt as _;
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(e) => return format!("start the node again; its own program is not found: {e}"),
    };
    tracing::warn!("the node starts again, to begin anew");
    let error = std::process::Command::new(program)
        .args(std::env::args_os().skip(1))
        .exec();
    format!("start the node again; it cannot do that by itself: {error}")
}
