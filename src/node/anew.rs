//! A node whose data is damaged begins anew as another one, made from the others of its cluster (decision 0047).

use std::future::pending;
use std::time::Duration;

use super::cluster;
use super::engine::{Context, StartError};
use super::start::{HAND_OVER_MAX, WATCH_EVERY, facts};
use crate::base::AlarmKind;
use crate::control::Control;
use crate::storage::{Identity, Renewal, Store, held_and_free, note_damage, noted_damage};

/// How long a start waits for the members to agree, where an earlier run of the node has found damage. A start finds none:
/// the node can do without, and goes on asking while it runs.
const ASK_AT_START: Duration = Duration::from_secs(5);
/// How long one attempt takes while the node runs, and the pause behind it: the first, doubling up to the last.
const ASK: Duration = Duration::from_secs(10);
const ASK_AGAIN_MIN: Duration = Duration::from_secs(2);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(30);
/// How often a damaged node looks whether it leads anything that others could lead: the first time, doubling up to the last, as
/// the others may be damaged, too.
const STAND_BACK_MIN: Duration = Duration::from_secs(1);
const STAND_BACK_MAX: Duration = Duration::from_secs(30);

/// Before a start: goes on with what an earlier run has begun. Returns damage that it has noted, if the members do not agree
/// now that the node begins anew.
pub(super) async fn go_on(context: &Context) -> Result<Option<String>, StartError> {
    if complete(context).await? {
        return Ok(None);
    }
    let dir = context.config.node.data_dir.clone();
    let noted = tokio::task::spawn_blocking(move || noted_damage(&dir)).await;
    let Some(why) = noted.map_err(|e| StartError::Failed(e.to_string()))? else {
        return Ok(None);
    };
    let asked = async {
        has_space(context).await?;
        agree(context, &why).await.map_err(|e| e.to_string())
    };
    let reason = match tokio::time::timeout(ASK_AT_START, asked).await {
        Ok(Ok(())) => {
            complete(context).await?;
            return Ok(None);
        }
        Ok(Err(reason)) => reason,
        Err(_) => format!("they did not agree within {ASK_AT_START:?}"),
    };
    tracing::warn!(
        reason,
        "the node starts on its damaged data, and goes on asking the others"
    );
    Ok(Some(why))
}

/// Does what the members have agreed upon, if it is not done yet; true: so it was.
pub(super) async fn complete(context: &Context) -> Result<bool, StartError> {
    let dir = &context.config.node.data_dir;
    let renewal = Renewal::load(dir).map_err(|e| StartError::Failed(e.to_string()))?;
    match renewal.filter(|renewal| renewal.is_to_be_set_aside(dir)) {
        Some(renewal) => set_aside(context, renewal).await.map(|()| true),
        None => Ok(false),
    }
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
            if let Some(note) = store.first_damage() {
                break note.what;
            }
            tokio::time::sleep(WATCH_EVERY).await;
        },
    };
    context.alarms.raise(AlarmKind::Damaged, why.clone());
    let stand_back = async {
        let mut pause = STAND_BACK_MIN;
        loop {
            control.hand_over(HAND_OVER_MAX).await;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(STAND_BACK_MAX);
        }
    };
    let ask = async {
        let mut pause = ASK_AGAIN_MIN;
        loop {
            let asked = tokio::time::timeout(ASK, noted_and_agreed(context, &why)).await;
            let reason = match asked {
                Ok(Ok(())) => return,
                Ok(Err(reason)) => reason,
                Err(_) => format!("the others did not agree within {ASK:?}"),
            };
            tracing::error!(reason, "the node goes on with damaged data: it cannot begin anew now");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_AGAIN_MAX);
        }
    };
    tokio::select! {
        () = stand_back => {}
        () = ask => {}
    }
}

async fn noted_and_agreed(context: &Context, why: &str) -> Result<(), String> {
    note(context, why.to_owned()).await?;
    has_space(context).await?;
    agree(context, why).await.map_err(|e| e.to_string())
}

/// What is set aside stays, and is received again beside it.
async fn has_space(context: &Context) -> Result<(), String> {
    let config = &context.config;
    let dir = config.node.data_dir.clone();
    let sizes = tokio::task::spawn_blocking(move || held_and_free(&dir)).await;
    let sizes = sizes.map_err(|e| e.to_string())?;
    let (held, free) = sizes.map_err(|e| format!("its size is not known: {e}"))?;
    let needed = held.saturating_add(config.storage.min_free.0);
    match free < needed {
        true => Err(format!(
            "what it has is set aside, not deleted, and is received again beside it: {needed} bytes must be free, {free} are"
        )),
        false => Ok(()),
    }
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
