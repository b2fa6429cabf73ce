//! The figures of Mainstem, next to those of others doing the same work on the same box in the same run.
//!
//! `make bench`, or `make bench FIGURE=name`. See README.md beside this crate.

mod contest;
mod figures;
mod lab;
mod limit;
mod mainstem;
mod nats;
mod node;
mod payload;
mod process;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::lab::{Lab, Settings};

/// RocksDB of the storage limit and the clients' buffers use the allocator that the server uses.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measures Mainstem, nats-server with JetStream and the storage limit, alternating, and compares them.
#[derive(Parser)]
#[command(name = "mainstem-bench")]
struct Args {
    /// Figure to measure; several: repeat it or separate by commas. All, if none is named.
    #[arg(long, value_delimiter = ',')]
    figure: Vec<String>,
    /// Rounds; in each, every contestant has a turn. The median counts.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds measured of each turn, after a quarter of that to warm up.
    #[arg(long)]
    seconds: Option<f64>,
    /// One short round of small amounts: shows that everything runs, its numbers mean nothing.
    #[arg(long)]
    quick: bool,
    /// Only these contestants: mainstem, nats-default, nats-always, storage-limit. For a look at one of them.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Tells the figures and their bars.
    #[arg(long)]
    list: bool,
    /// nats-server's binary. Default: the one in PATH. Some figures need 2.10 or newer.
    #[arg(long, env = "MAINSTEM_BENCH_NATS")]
    nats_server: Option<PathBuf>,
    /// The server's binary. Default: the one beside this program.
    #[arg(long, env = "MAINSTEM_BENCH_SERVER")]
    mainstem: Option<PathBuf>,
    /// The preload library for slow syncs. Default: the one beside this program.
    #[arg(long, env = "MAINSTEM_BENCH_FAULTS")]
    faults: Option<PathBuf>,
    /// Where the data goes while it runs: the disk to measure. Default: the build's own directory.
    #[arg(long, env = "MAINSTEM_BENCH_DATA")]
    data: Option<PathBuf>,
    /// The report. Default: bench-report.json in cargo's target folder.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Prints the median time of fdatasync in that directory, in microseconds.
    #[arg(long, hide = true)]
    sync_latency_of: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        // A missed bar is a result, told in the table and the report; it is not a failure of the run.
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// False: some figure could not be measured.
fn run(args: Args) -> Result<bool> {
    if args.list {
        for figure in figures::ALL {
            println!("{:<20} {}", figure.name, figure.about);
        }
        return Ok(true);
    }
    if let Some(dir) = args.sync_latency_of {
        println!("{}", lab::sync_latency(&dir)?.as_secs_f64() * 1e6);
        return Ok(true);
    }
    let chosen = figures::choose(&args.figure)?;
    let report = match args.report {
        Some(path) => path,
        None => lab::binaries_dir()?
            .parent()
            .context("cargo's target folder")?
            .join("bench-report.json"),
    };
    let lab = Lab::new(Settings {
        rounds: args.rounds,
        seconds: args.seconds,
        quick: args.quick,
        only: args.only,
        nats: args.nats_server,
        mainstem: args.mainstem,
        faults: args.faults,
        scratch: args.data,
    })?;
    for (name, value) in lab.conditions() {
        eprintln!("{name}: {value}");
    }
    // Children die with the thread that started them (see Process), and figures start them from the future that is
    // blocked on here: on this thread, which lives to the end.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // More than processors: publishers that never wait must not hold up the tasks that send for them.
        .worker_threads(4)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        tokio::select! {
            done = measure(&lab, &chosen, &report) => done,
            // Dropping the figure kills its servers and removes its data.
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        }
    })
}

async fn measure(lab: &Lab, chosen: &[&figures::Figure], report: &std::path::Path) -> Result<bool> {
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for figure in chosen {
        eprintln!("\n{}: {}", figure.name, figure.about);
        match tokio::time::timeout(figure.time_max, (figure.measure)(lab, figure.name)).await {
            Ok(Ok(fresh)) => {
                rows.extend(fresh);
                report::write(report, &rows)?;
            }
            Ok(Err(error)) => failed.push(format!("{}: {error:#}", figure.name)),
            Err(_) => failed.push(format!("{}: not done within {:?}", figure.name, figure.time_max)),
        }
        if let Some(error) = failed.last().filter(|e| e.starts_with(&format!("{}:", figure.name))) {
            eprintln!("error: {error}");
        }
    }
    println!("\n{}", report::table(&rows));
    for error in &failed {
        println!("failed: {error}");
    }
    println!("report: {}", report.display());
    Ok(failed.is_empty())
}
