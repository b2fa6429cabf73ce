//! What goes wrong, by chance.

use super::invariants::Verdict;
use super::net::{MS, NodeNo};
use super::world::{Due, World};

impl World {
    /// One fault, and when the next one comes.
    pub fn fault(&mut self) -> Verdict {
        if self.quiet {
            return Ok(());
        }
        let next = self.now + self.rng.range(20, 900) * MS;
        self.at(next, Due::Fault);
        let nodes = self.scene.nodes as u64;
        let one = self.rng.range(1, nodes + 1) as NodeNo;
        let other = self.rng.range(1, nodes + 1) as NodeNo;
        match self.rng.range(0, 22) {
            0..=2 => self.end_and_start(one, false),
            3..=5 => self.end_and_start(one, true),
            6 => {
                self.note(format_args!("power fails everywhere"));
                for no in 1..=self.scene.nodes {
                    self.end_and_start(no, true)?;
                }
                Ok(())
            }
            7..=8 => {
                let to = self.now + self.rng.range(100, 2_500) * MS;
                if let Some(run) = self.node(one).run.as_mut() {
                    run.paused_until = to;
                    self.note(format_args!("n{one} is paused"));
                    self.at(to, Due::Resume(one));
                }
                Ok(())
            }
            9..=10 => {
                let to = self.now + self.rng.range(200, 4_000) * MS;
                if let Some(run) = self.node(one).run.as_mut() {
                    run.slow_until = to;
                    self.note(format_args!("n{one} has a slow disk"));
                }
                Ok(())
            }
            11..=12 => {
                self.note(format_args!("nothing passes from n{one} to n{other}"));
                self.net.cut(one, other);
                Ok(())
            }
            13..=15 => {
                let mut side = Vec::new();
                // The leader with all who do not vote, against the other voters; or anyone with anyone.
                let apart = if self.rng.one_in(2) { self.other_voters() } else { None };
                for no in 1..=self.scene.nodes {
                    let with = match &apart {
                        Some(voters) => !voters.contains(&no),
                        None => self.rng.one_in(2),
                    };
                    if with {
                        side.push(no);
                    }
                }
                self.note(format_args!("cut off together: {side:?}"));
                for a in 1..=self.scene.nodes {
                    for b in 1..=self.scene.nodes {
                        if side.contains(&a) != side.contains(&b) {
                            self.net.cut(a, b);
                        }
                    }
                }
                Ok(())
            }
            16..=18 => {
                self.note(format_args!("the network is whole"));
                self.net.heal();
                Ok(())
            }
            19 => {
                let loss = self.rng.range(0, 3) * 15;
                self.note(format_args!("one segment in {loss} is lost"));
                self.net.lose_one_in(loss);
                Ok(())
            }
            _ => {
                self.note(format_args!("connections of n{one} and n{other} break"));
                self.net.reset(one, other);
                Ok(())
            }
        }
    }

    /// The nodes of a group's voters but its leader.
    fn other_voters(&mut self) -> Option<Vec<NodeNo>> {
        let group = self.rng.pick(&self.scene.groups).0;
        let leader = self.leader(group)?;
        // As the catalog has it, not as the leader may believe.
        let nodes = self
            .voters_of(group)
            .into_iter()
            .filter_map(|voter| self.places.get(&voter).copied());
        Some(nodes.filter(|no| *no != leader).collect())
    }

    fn end_and_start(&mut self, no: NodeNo, power: bool) -> Verdict {
        let back = self.now + self.rng.range(1, 2_500) * MS;
        if self.node(no).run.is_some() {
            self.crash(no, power)?;
            self.at(back, Due::Start(no));
        }
        Ok(())
    }

    /// Nothing goes wrong any more, and what did is put right.
    pub fn calm(&mut self) -> Verdict {
        self.quiet = true;
        self.note(format_args!("calm"));
        self.net.heal();
        self.net.lose_one_in(0);
        for no in 1..=self.scene.nodes {
            if let Some(run) = self.node(no).run.as_mut() {
                run.paused_until = 0;
                run.slow_until = 0;
            }
            self.start(no)?;
            self.slice(no)?;
        }
        Ok(())
    }
}
