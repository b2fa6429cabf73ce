//! One simulation from its seed to its end.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use super::host;
use super::invariants::{Verdict, Violation, broken};
use super::load::all_idle;
use super::net::MS;
use super::world::{Due, Planted, Scene, World};

/// How a simulation ended.
pub struct Ended {
    pub trace: String,
    /// What was broken.
    pub broken: Option<String>,
    /// Messages.
    pub acked: u64,
    /// Simulated seconds.
    pub seconds: u64,
    /// Segments of the network.
    pub delivered: u64,
    /// Shards that went from one group to another.
    pub adoptions: u64,
    /// Replicas that were brought up to date by a snapshot.
    pub snapshots: u64,
}

/// Names what the child process is to simulate, and where it puts the outcome.
const SCENE: &str = "MAINSTEM_SIMULATION_SCENE";
const OUTCOME: &str = "MAINSTEM_SIMULATION_OUTCOME";

/// In memory, where there is such a place: a simulation needs no disk, and would wear one.
fn place() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    base.join(format!("mainstem-test-simulation-{:010}-{n:06}", std::process::id()))
}

/// How long the end may take, in simulated time.
const SETTLE: u64 = 120_000 * MS;

/// Runs a simulation in a process of its own, in which nothing was ever random or counted before.
pub fn simulate(seed: u64, scene: &'static str) -> Ended {
    let again = format!("again: SEED={seed} cargo test --release --workspace --test simulation");
    let dir = place();
    std::fs::create_dir_all(&dir).expect("a folder can be made");
    let outcome = dir.join("outcome");
    let child = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", "the_child_process", "--nocapture"])
        .env(SCENE, format!("{scene} {seed}"))
        .env(OUTCOME, &outcome)
        .stdout(Stdio::null())
        .status()
        .expect("this program can be run");
    let text = std::fs::read_to_string(&outcome);
    // What is left is no concern of the simulation.
    let _ = std::fs::remove_dir_all(&dir);
    let text = text.unwrap_or_else(|_| panic!("the simulation {scene} of seed {seed} ended with {child}; {again}"));
    parse(&text).unwrap_or_else(|| panic!("the simulation {scene} of seed {seed} has an odd outcome; {again}"))
}

/// First line: figures; second: what was broken, if anything; then the trace.
fn parse(text: &str) -> Option<Ended> {
    let (figures, rest) = text.split_once('\n')?;
    let (broken, trace) = rest.split_once('\n')?;
    let mut figures = figures.split(' ').map(|n| n.parse::<u64>().ok());
    Some(Ended {
        acked: figures.next()??,
        seconds: figures.next()??,
        delivered: figures.next()??,
        adoptions: figures.next()??,
        snapshots: figures.next()??,
        broken: (!broken.is_empty()).then(|| broken.to_owned()),
        trace: trace.to_owned(),
    })
}

/// What the child process does; nothing in any other.
pub fn child(scene: impl Fn(&str) -> Scene) {
    let (Ok(what), Some(outcome)) = (std::env::var(SCENE), std::env::var_os(OUTCOME)) else {
        return;
    };
    let (name, seed) = what.split_once(' ').expect("a scene and a seed");
    let (scene, seed) = (scene(name), seed.parse().expect("a seed is a number"));
    let outcome = PathBuf::from(outcome);
    let dir = outcome.parent().expect("it is in a folder").to_owned();
    // A new thread: this one may have used randomness already.
    let thread = std::thread::Builder::new().name("simulation".into()).spawn(move || {
        host::enter(seed);
        run(seed, scene, &dir)
    });
    let ended = thread
        .expect("a thread can be started")
        .join()
        .expect("it does not panic");
    let figures = format!(
        "{} {} {} {} {}",
        ended.acked, ended.seconds, ended.delivered, ended.adoptions, ended.snapshots
    );
    let broken = ended.broken.unwrap_or_default().replace('\n', " ");
    std::fs::write(outcome, format!("{figures}\n{broken}\n{}", ended.trace)).expect("the outcome can be written");
}

fn run(seed: u64, scene: Scene, dir: &Path) -> Ended {
    let mut world = World::new(seed, scene, dir);
    world.trace.loud = std::env::var_os("LOUD").is_some();
    world.trace.deep = std::env::var_os("DEEP").is_some();
    if world.trace.deep {
        world.net.tell();
    }
    let verdict = story(&mut world);
    if let Err(violation) = &verdict {
        world.note(format_args!("BROKEN {violation}"));
    }
    let ((delivered, bytes), slices) = (world.net.delivered(), world.slices);
    world.note(format_args!("{delivered} segments, {bytes} bytes, {slices} slices"));
    let ended = Ended {
        trace: world.trace.text().to_owned(),
        broken: verdict.err().map(|violation| violation.to_string()),
        acked: world.invariants.acked_stays.count() as u64,
        seconds: world.now / (1_000 * MS),
        delivered,
        adoptions: world.catalog.adoptions,
        snapshots: world.snapshots,
    };
    for node in &mut world.nodes {
        if let Some(run) = node.run.take() {
            drop(run.end());
        }
    }
    ended
}

fn story(world: &mut World) -> Verdict {
    if world.scene.planted == Some(Planted::SkippedSync) {
        host::skip_one_sync_in(3);
    }
    for no in 1..=world.scene.nodes {
        world.start(no)?;
    }
    for (group, _) in world.scene.groups.clone() {
        world.at(0, Due::Make(group));
    }
    for at in 0..world.clients.len() {
        world.at(50 * MS, Due::Client(at));
    }
    world.run_until(1_000 * MS)?;
    if world.scene.planted == Some(Planted::LearnersCount) {
        world.plant_voters()?;
    }
    world.run_until(2_000 * MS)?;
    world.at(world.now, Due::Fault);
    if world.scene.changes {
        world.at(world.now, Due::Change);
    }
    if world.scene.moves {
        world.at(world.now, Due::Move);
    }
    let end = world.now + u64::try_from(world.scene.chaos.as_nanos()).unwrap_or(u64::MAX);
    while world.now < end {
        world.run_until(world.now + 1_000 * MS)?;
        world.compare_logs()?;
    }
    settle(world)?;
    world.note(format_args!("power fails everywhere, for the last time"));
    for no in 1..=world.scene.nodes {
        world.crash(no, true)?;
    }
    world.run_until(world.now + 100 * MS)?;
    settle(world)
}

/// Puts everything right, waits until nothing is under way, and looks at what there is.
fn settle(world: &mut World) -> Verdict {
    world.calm()?;
    let begun = world.now;
    while !(all_idle(&world.clients) && world.is_settled()) {
        if world.now - begun > SETTLE {
            return Err(unsettled(world));
        }
        world.run_until(world.now + 200 * MS)?;
    }
    let took = (world.now - begun) / MS;
    world.note(format_args!("settled after {took} ms"));
    world.compare_logs()?;
    world.compare_states()
}

fn unsettled(world: &World) -> Violation {
    let mut what = Vec::new();
    for (group, _) in &world.scene.groups {
        for node in &world.nodes {
            what.push(match node.group(*group) {
                Some(found) => format!("node {}: {:?} {:?}", node.no, found.status(), found.members()),
                None => format!("node {}: nothing of {group}", node.no),
            });
        }
    }
    let waiting = world.clients.iter().filter(|c| !c.is_idle()).count();
    broken(
        "it settles",
        format!(
            "{waiting} clients wait; {:?}; {}",
            world.catalog.moving,
            what.join("; ")
        ),
    )
}
