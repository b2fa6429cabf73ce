//! Disks that are emptied, or are older than what their node has said: such a node is not let in as its old self, and
//! the others lose nothing by it.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::harness::damage::{Part, flip_bit, flip_blob_bit};
use super::harness::{Cluster, Crowd, History, Options, copy_dir, seed, until};
use super::random::{name_of, streams};
use super::replace::{get_well, replace};
use super::verify;

/// A cluster of three that clients publish to.
struct Busy {
    seed: u64,
    rng: StdRng,
    cluster: Cluster,
    names: Vec<String>,
    history: Arc<History>,
    crowd: Crowd,
}

impl Busy {
    async fn start(seed: u64) -> Self {
        let cluster = Cluster::networked(3, Options::plain()).await;
        let streams = streams(&cluster, false).await;
        let names = streams.iter().map(name_of).collect();
        let history = Arc::new(History::default());
        let crowd = Crowd::start(&history, &cluster.addresses(), &streams, seed);
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            cluster,
            names,
            history,
            crowd,
        }
    }

    /// So many more batches are acknowledged.
    async fn goes_on(&self, batches: u64) {
        self.history.wait_acked(self.history.acked_batches() + batches).await;
    }

    /// Flips bits in files that only readers look at, of a node that has ended.
    fn damage_what_is_read(&mut self, victim: usize) {
        let data = self.cluster[victim].data().to_path_buf();
        for _ in 0..8 {
            println!("{:?}", flip_blob_bit(&data, &mut self.rng));
        }
    }

    async fn read_all_at(&self, node: usize) {
        for name in &self.names {
            verify::read_all(&self.cluster, node, name).await;
        }
    }

    /// Ends the clients, and holds what they have seen against what each node has.
    async fn verified(self) -> Cluster {
        let counts = self.crowd.stop().await;
        let tally = verify::at_every_node(&self.cluster, &self.history, &self.names).await;
        let tally = tally.unwrap_or_else(|wrong| panic!("SEED={}: {wrong:#?}\n{counts}", self.seed));
        println!("{tally:?}\n{counts}");
        self.cluster
    }
}

/// Starts node `i` on its unusable disk: it must end, saying these words, or never serve as a member; then it is
/// replaced, and all that was acknowledged is there.
async fn refused(seed: u64, prepare: impl AsyncFnOnce(&mut Busy), words: &[&str]) {
    const VICTIM: usize = 1;
    let mut busy = Busy::start(seed).await;
    busy.goes_on(100).await;
    prepare(&mut busy).await;
    // Being started again does not make it any newer.
    for _ in 0..3 {
        let node = &mut busy.cluster[VICTIM];
        node.launch();
        until("it says why it is not let in", async || node.has_logged(words)).await;
        println!("{}", node.last_words());
        if node.ended().await.is_none() {
            node.kill9().await;
        }
    }
    // The others go on without it.
    busy.goes_on(200).await;
    replace(&mut busy.cluster, VICTIM).await;
    get_well(&mut busy.cluster, &[]).await;
    busy.verified().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_disk_is_not_let_in_as_the_old_node() {
    let seed = seed("an_emptied_disk_is_not_let_in_as_the_old_node");
    let prepare = async |busy: &mut Busy| {
        busy.cluster.kill(1).await;
        busy.cluster.wipe(1);
        busy.goes_on(100).await;
    };
    refused(seed, prepare, &["is called \"node-2\" already"]).await;
}

/// A copy from so many starts ago.
async fn an_older_disk(starts: usize) {
    let seed = seed("an_older_disk");
    let prepare = async |busy: &mut Busy| {
        busy.cluster.kill(1).await;
        let (data, older) = (
            busy.cluster[1].data().to_path_buf(),
            busy.cluster[1].place().join("older"),
        );
        copy_dir(&data, &older);
        for _ in 0..starts {
            busy.cluster[1].restart().await;
            busy.cluster.wait().healthy().await;
            busy.goes_on(200).await;
            busy.cluster.kill(1).await;
        }
        std::fs::remove_dir_all(&data).unwrap();
        std::fs::rename(&older, &data).unwrap();
    };
    refused(seed, prepare, &["an older copy of its disk"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_from_before_the_last_start_is_not_let_in() {
    an_older_disk(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_from_two_starts_ago_is_not_let_in() {
    an_older_disk(2).await;
}

/// A node whose log or state is damaged does not go on with it: its replicas are made anew from the others, without help.
async fn made_anew(part: Part) {
    const VICTIM: usize = 1;
    let seed = seed("made_anew");
    let mut busy = Busy::start(seed).await;
    busy.goes_on(300).await;
    busy.cluster.kill(VICTIM).await;
    busy.goes_on(100).await;
    let words = "the damaged data was set aside";
    // Not every bit is one that a start looks at.
    for attempt in 0.. {
        assert!(attempt < 20, "SEED={seed}: no damage was found by a start");
        let data = busy.cluster[VICTIM].data().to_path_buf();
        for _ in 0..8 {
            println!("{:?}", flip_bit(&data, part, &mut busy.rng));
        }
        busy.cluster[VICTIM].restart().await;
        if busy.cluster[VICTIM].has_logged(&[words]) {
            break;
        }
        busy.cluster.kill(VICTIM).await;
    }
    busy.cluster.wait().healthy().await;
    busy.goes_on(100).await;
    let mut cluster = busy.verified().await;
    let info = cluster[0].api().await.stream("own").await.unwrap();
    assert_eq!(info.spec.unwrap().replicas, 3);
    // It is another node to the cluster, and stays it.
    cluster.kill(VICTIM).await;
    cluster[VICTIM].restart().await;
    cluster.wait().healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_damaged_log_is_made_anew() {
    made_anew(Part::Log).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_damaged_state_is_made_anew() {
    made_anew(Part::State).await;
}

/// What no start looks at, readers find: they get it from another node, and the node is made anew while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_readers_find_damage_is_made_anew() {
    const VICTIM: usize = 1;
    let seed = seed("a_node_whose_readers_find_damage_is_made_anew");
    let mut busy = Busy::start(seed).await;
    busy.goes_on(300).await;
    let found = ["damaged data found"];
    for attempt in 0.. {
        assert!(attempt < 20, "SEED={seed}: no damage was found by a reader");
        // Told to stop: everything is in files then.
        busy.cluster[VICTIM].term();
        busy.cluster[VICTIM].wait_exit().await;
        busy.damage_what_is_read(VICTIM);
        busy.cluster[VICTIM].restart().await;
        busy.read_all_at(VICTIM).await;
        if busy.cluster[VICTIM].has_logged(&found) {
            break;
        }
    }
    let node = &busy.cluster[VICTIM];
    until("it starts again, without help", async || {
        node.has_logged(&["the damaged data was set aside"])
    })
    .await;
    busy.cluster.wait().healthy().await;
    busy.goes_on(100).await;
    let mut cluster = busy.verified().await;
    for node in &mut cluster.nodes {
        node.term();
        node.wait_exit().await;
    }
    let compared = verify::on_disk(&mut cluster).unwrap_or_else(|wrong| panic!("SEED={seed}: {wrong:#?}"));
    println!("{compared} pairs of batches on disk");
}

/// A damaged node that is needed for a quorum goes on, through a start of its own as well, and is made anew when the others
/// can do without.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_node_goes_on_while_it_is_needed() {
    const VICTIM: usize = 1;
    const AWAY: usize = 2;
    let seed = seed("a_damaged_node_goes_on_while_it_is_needed");
    let mut busy = Busy::start(seed).await;
    for attempt in 0.. {
        assert!(attempt < 20, "SEED={seed}: no damage was found by a reader");
        busy.goes_on(300).await;
        for i in [VICTIM, AWAY] {
            busy.cluster[i].term();
            busy.cluster[i].wait_exit().await;
        }
        busy.damage_what_is_read(VICTIM);
        busy.cluster[VICTIM].restart().await;
        busy.read_all_at(VICTIM).await;
        if busy.cluster[VICTIM].has_logged(&["damaged data found"]) {
            break;
        }
        busy.cluster[AWAY].restart().await;
    }
    let refused = ["cannot be given up while"];
    until("the others do not agree", async || {
        busy.cluster[VICTIM].has_logged(&refused)
    })
    .await;
    busy.goes_on(200).await;
    busy.cluster.kill(VICTIM).await;
    busy.cluster[VICTIM].restart().await;
    assert!(busy.cluster[VICTIM].has_logged(&["the node starts on its damaged data"]));
    busy.goes_on(200).await;
    let aside = ["the damaged data was set aside"];
    assert!(!busy.cluster[VICTIM].has_logged(&aside));
    busy.cluster[AWAY].restart().await;
    until("it is made anew", async || busy.cluster[VICTIM].has_logged(&aside)).await;
    busy.cluster.wait().healthy().await;
    busy.goes_on(100).await;
    busy.verified().await;
}

/// What only the damaged disk has is not given up by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_copy_is_not_given_up() {
    let seed = seed("the_only_copy_is_not_given_up");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::networked(3, Options::plain()).await;
    streams(&cluster, true).await;
    let victim = cluster.wait().leader("single").await;
    cluster.kill(victim).await;
    let data = cluster[victim].data().to_path_buf();
    let copy = cluster[victim].place().join("copy");
    copy_dir(&data, &copy);
    let words = "cannot be given up while";
    for attempt in 0.. {
        assert!(attempt < 20, "SEED={seed}: no damage was found by a start");
        for _ in 0..8 {
            println!("{:?}", flip_bit(&data, Part::Log, &mut rng));
        }
        cluster[victim].launch();
        let node = &mut cluster[victim];
        let mut refused = false;
        until("it serves, or is not let in", async || {
            refused = node.has_logged(&[words]);
            refused || node.has_logged(&["ready client="])
        })
        .await;
        node.kill9().await;
        if refused {
            break;
        }
    }
    // Nothing was touched: what is mended can be used.
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&copy, &data).unwrap();
    cluster[victim].restart().await;
    cluster.wait().healthy().await;
    assert_eq!(cluster.wait().leader("single").await, victim);
}
