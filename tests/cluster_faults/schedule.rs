//! A schedule: what happens to a cluster, and when, made from a seed alone.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use super::harness::damage::Part;
use super::harness::net::Flow;

#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::enum_variant_names)] // A step-down is one of the steps.
pub enum Step {
    Kill(usize),
    /// Their power fails at the same time.
    PowerFail(Vec<usize>),
    Start(usize),
    Pause(usize),
    Resume(usize),
    Isolate(usize, Flow),
    Partition(Vec<Vec<usize>>, Flow),
    /// What the first sends does not reach the second.
    Cut(usize, usize),
    /// What the first sends to the second is late, and some of it has to be sent again.
    Worsen(usize, usize, Duration, f64),
    Reconnect,
    SlowDisk(usize, Duration),
    ClockJump(usize, i64),
    /// A shard of this stream (by its place) changes its leader by order.
    StepDown(usize),
    /// It is killed, and a bit of its files turns.
    Flip(usize, Part),
    /// It is killed, and a file of it loses its end.
    Truncate(usize, Part),
    /// It is killed, and its data directory is empty.
    Wipe(usize),
}

/// Steps, and how long after each the next one comes.
pub struct Schedule {
    pub nodes: usize,
    /// A minority whose disks are damaged.
    pub victims: Vec<usize>,
    pub steps: Vec<(Step, Duration)>,
}

/// What has been done to the nodes so far.
struct World {
    down: Vec<bool>,
    paused: Vec<bool>,
    cut: bool,
    slow: Vec<bool>,
    off: Vec<bool>,
    victims: Vec<usize>,
}

impl World {
    fn pick(rng: &mut StdRng, which: &[bool], value: bool) -> Option<usize> {
        let all: Vec<usize> = (0..which.len()).filter(|i| which[*i] == value).collect();
        all.choose(rng).copied()
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Kill(i) | Step::Flip(i, _) | Step::Truncate(i, _) | Step::Wipe(i) => self.stops(*i),
            Step::PowerFail(which) => which.iter().for_each(|i| self.stops(*i)),
            Step::Start(i) => self.down[*i] = false,
            Step::Pause(i) => self.paused[*i] = true,
            Step::Resume(i) => self.paused[*i] = false,
            Step::Isolate(..) | Step::Partition(..) | Step::Cut(..) | Step::Worsen(..) => self.cut = true,
            Step::Reconnect => self.cut = false,
            Step::SlowDisk(i, by) => self.slow[*i] = !by.is_zero(),
            Step::ClockJump(i, by) => self.off[*i] = *by != 0,
            Step::StepDown(_) => {}
        }
    }

    fn stops(&mut self, i: usize) {
        self.down[i] = true;
        self.paused[i] = false;
        self.slow[i] = false;
        self.off[i] = false;
    }

    fn runs(&self, i: usize) -> bool {
        !self.down[i] && !self.paused[i]
    }
}

impl Schedule {
    pub fn random(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = if rng.random_bool(0.2) { 5 } else { 3 };
        let mut victims: Vec<usize> = (0..nodes).collect();
        victims.shuffle(&mut rng);
        // Streams have three replicas, however many nodes there are: two damaged disks may be two of the three.
        victims.truncate(usize::from(rng.random_bool(0.4)));
        let mut world = World {
            down: vec![false; nodes],
            paused: vec![false; nodes],
            cut: false,
            slow: vec![false; nodes],
            off: vec![false; nodes],
            victims: victims.clone(),
        };
        let mut steps = Vec::new();
        for _ in 0..rng.random_range(6..14) {
            let step = next(&mut rng, &world);
            world.take(&step);
            // Long enough for an election now and then, and often not.
            let pause = match rng.random_range(0..4) {
                0 => rng.random_range(0..150),
                1 | 2 => rng.random_range(150..1_200),
                _ => rng.random_range(1_200..3_000),
            };
            steps.push((step, Duration::from_millis(pause)));
        }
        Self { nodes, victims, steps }
    }
}

fn flow(rng: &mut StdRng) -> Flow {
    if rng.random_bool(0.5) { Flow::Held } else { Flow::Broken }
}

fn two(rng: &mut StdRng, nodes: usize) -> (usize, usize) {
    let from = rng.random_range(0..nodes);
    (from, (from + rng.random_range(1..nodes)) % nodes)
}

fn next(rng: &mut StdRng, world: &World) -> Step {
    let nodes = world.down.len();
    let running: Vec<usize> = (0..nodes).filter(|i| world.runs(*i)).collect();
    loop {
        // What is broken is mended about as often as something breaks.
        let step = match rng.random_range(0..100) {
            0..16 => World::pick(rng, &world.down, true).map(Step::Start),
            16..24 => World::pick(rng, &world.paused, true).map(Step::Resume),
            24..34 => world.cut.then_some(Step::Reconnect),
            34..42 => running.choose(rng).map(|i| Step::Kill(*i)),
            42..52 => {
                let mut up: Vec<usize> = (0..nodes).filter(|i| !world.down[*i]).collect();
                up.shuffle(rng);
                let n = match rng.random_range(0..4) {
                    0 | 1 => 1,
                    2 => nodes / 2 + 1,
                    _ => nodes,
                };
                up.truncate(n);
                (!up.is_empty()).then_some(Step::PowerFail(up))
            }
            52..61 => running.choose(rng).map(|i| Step::Pause(*i)),
            61..69 => Some(Step::Isolate(rng.random_range(0..nodes), flow(rng))),
            69..75 => {
                let mut all: Vec<usize> = (0..nodes).collect();
                all.shuffle(rng);
                let cuts = rng.random_range(1..nodes.min(3));
                let mut groups = vec![all];
                for _ in 0..cuts {
                    let last = groups.last_mut().expect("one at least");
                    if last.len() > 1 {
                        let rest = last.split_off(rng.random_range(1..last.len()));
                        groups.push(rest);
                    }
                }
                Some(Step::Partition(groups, flow(rng)))
            }
            75..82 => {
                let (from, to) = two(rng, nodes);
                Some(Step::Cut(from, to))
            }
            82..86 => {
                let (from, to) = two(rng, nodes);
                let delay = Duration::from_millis(rng.random_range(1..120));
                Some(Step::Worsen(from, to, delay, rng.random_range(0.0..0.2)))
            }
            86..90 => running.choose(rng).map(|i| {
                let by = if world.slow[*i] { 0 } else { rng.random_range(2..120) };
                Step::SlowDisk(*i, Duration::from_millis(by))
            }),
            90..94 => running.choose(rng).map(|i| {
                let by = match rng.random_range(0..4) {
                    _ if world.off[*i] => 0,
                    0 => 365 * 24 * 3_600_000_000,
                    1 => -365 * 24 * 3_600_000_000,
                    2 => rng.random_range(-20_000_000..20_000_000),
                    _ => rng.random_range(-500_000_000..500_000_000),
                };
                Step::ClockJump(*i, by)
            }),
            _ => Some(Step::StepDown(rng.random_range(0..64))),
        };
        // Some of the steps of a schedule with victims are theirs.
        let step = match world.victims.choose(rng) {
            Some(i) if rng.random_bool(0.2) => {
                let part = *[Part::Log, Part::Log, Part::State, Part::State, Part::Beside]
                    .choose(rng)
                    .expect("not empty");
                Some(match rng.random_range(0..5) {
                    0 | 1 => Step::Flip(*i, part),
                    2 | 3 => Step::Truncate(*i, part),
                    _ => Step::Wipe(*i),
                })
            }
            Some(_) | None => step,
        };
        if let Some(step) = step {
            return step;
        }
    }
}
