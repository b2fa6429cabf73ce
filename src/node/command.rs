//! `mainstem server` and `mainstem dev`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::config::{Config, DevArgs, Effective, ServerArgs, table};
use super::ports::Ports;
use super::run::{Exit, run};
use super::{dev_cluster, logging, start};
use crate::base::Tasks;

/// `mainstem server`: runs a node until it is told to stop.
pub fn server(args: &ServerArgs) -> ExitCode {
    command(args, &[], |_, _| {}).into()
}

/// `mainstem dev`: a node to try things on, and what to type next.
pub fn dev(args: &DevArgs) -> ExitCode {
    if args.nodes > 1 {
        return several(args).into();
    }
    let mut dir = None;
    if args.ephemeral {
        match TemporaryDir::make() {
            Ok(made) => dir = Some(made),
            Err(error) => {
                eprintln!("mainstem: cannot make a temporary directory: {error}");
                return Exit::Failed.into();
            }
        }
    }
    let data_dir = dir
        .as_ref()
        .map_or(Path::new("./mainstem-data"), TemporaryDir::path)
        .to_string_lossy()
        .into_owned();
    let preset = |section, field, text: &str| table::find(section, field).map(|s| (s, text.to_owned(), "dev"));
    let presets: Vec<_> = [
        preset("node", "data_dir", &data_dir),
        preset("log", "level", "warn"),
        preset("node", "drain_timeout", "3s"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let ephemeral = args.ephemeral;
    command(&args.server, &presets, move |config, ports| {
        println!("{}", welcome(config, ports, ephemeral))
    })
    .into()
}

/// `mainstem dev --nodes N`.
fn several(args: &DevArgs) -> Exit {
    if args.server.print_config {
        eprintln!("mainstem: --print-config shows the configuration of one node: leave --nodes out");
        return Exit::Usage;
    }
    let given = args
        .server
        .settings
        .iter()
        .find(|(setting, _)| setting.flag == "data-dir");
    let mut temporary = None;
    let dir = match given {
        Some((_, dir)) => {
            if let Err(error) = std::fs::create_dir_all(dir) {
                eprintln!("mainstem: cannot make {dir}: {error}");
                return Exit::Failed;
            }
            PathBuf::from(dir)
        }
        None => match TemporaryDir::make() {
            Ok(made) => temporary.insert(made).path().to_owned(),
            Err(error) => {
                eprintln!("mainstem: cannot make a temporary directory: {error}");
                return Exit::Failed;
            }
        },
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mainstem: cannot start: {error}");
            return Exit::Failed;
        }
    };
    runtime.block_on(dev_cluster::run(args, &dir, temporary.is_none()))
}

/// What `mainstem dev` prints when it is ready.
fn welcome(config: &Config, ports: &Ports, ephemeral: bool) -> String {
    let server = match ports.client.to_string().as_str() {
        "127.0.0.1:7411" => String::new(),
        other => format!(" --server {other}"),
    };
    let kept = if ephemeral { " (removed when this ends)" } else { "" };
    format!(
        "Mainstem {version} is ready.\n\n\
         \x20 clients   {client}\n\
         \x20 monitor   http://{monitor}/v1/status\n\
         \x20 metrics   http://{metrics}/metrics\n\
         \x20 data      {data}{kept}\n\n\
         Type next, in another terminal:\n\n\
         \x20 mainstem stream create hello{server}\n\
         \x20 mainstem pub hello 'first message'{server}\n\
         \x20 mainstem sub hello --from beginning --follow{server}\n\n\
         Ctrl-C stops it; what was acknowledged is on disk.",
        version = env!("CARGO_PKG_VERSION"),
        client = ports.client,
        monitor = ports.monitor,
        metrics = ports.prometheus.unwrap_or(ports.monitor),
        data = config.node.data_dir.display(),
    )
}

fn command(
    args: &ServerArgs,
    presets: &[(&'static table::Setting, String, &'static str)],
    ready: impl FnOnce(&Config, &Ports),
) -> Exit {
    let env = |name: &str| std::env::var(name).ok();
    let mut effective = match Effective::load(args, &env, presets) {
        Ok(effective) => effective,
        Err(error) => return usage(&error),
    };
    effective.note_misspelt(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()));
    if args.print_config {
        print!("{}", effective.print());
        return match effective.check() {
            Ok(()) => Exit::Done,
            Err(error) => usage(&error),
        };
    }
    if let Err(error) = effective.check() {
        return usage(&error);
    }
    let config = effective.config;
    logging::install(&config.log);
    for warning in &effective.warnings {
        tracing::warn!("{warning}");
    }
    raise_file_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("mainstem")
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mainstem: cannot start threads: {error}");
            return Exit::Failed;
        }
    };
    let exit = runtime.block_on(async {
        let stop = CancellationToken::new();
        let signals = Tasks::new("signals");
        if let Err(error) = watch_signals(&signals, &stop) {
            eprintln!("mainstem: cannot watch for signals: {error}");
            return Exit::Failed;
        }
        let told = config.clone();
        run(config, start::start, stop, move |ports| ready(&told, ports)).await
    });
    // Connections that were cut, and threads that hang in a broken disk, do not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    exit
}

fn usage(error: &dyn std::fmt::Display) -> Exit {
    for line in error.to_string().lines() {
        eprintln!("mainstem: {line}");
    }
    eprintln!("mainstem: see `mainstem server --help`, or `mainstem server --print-config`");
    Exit::Usage
}

/// The first signal drains, the second ends the process at once.
fn watch_signals(tasks: &Tasks, stop: &CancellationToken) -> std::io::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = stop.clone();
    tasks.spawn("signals", async move {
        for times in 1.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if times > 1 {
                eprintln!("mainstem: told twice to stop: ending at once");
                std::process::exit(Exit::Failed as i32);
            }
            stop.cancel();
        }
    });
    Ok(())
}

/// A store and many connections need more files than the 1,024 that a shell often allows by default.
// There is no safe wrapper in `std`.
#[allow(unsafe_code)]
fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 || limit.rlim_cur >= limit.rlim_max {
        return;
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit; the soft limit is raised to the hard one, which is always allowed.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        tracing::debug!("cannot raise the limit of open files");
    }
}

/// A directory that is removed at the end.
struct TemporaryDir {
    path: PathBuf,
}

impl TemporaryDir {
    fn make() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("mainstem-dev-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&path)?;
        Ok(Self { path })
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("mainstem: cannot remove {}: {error}", self.path.display());
        }
    }
}
