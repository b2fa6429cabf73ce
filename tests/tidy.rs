//! Rules of the house that the compiler does not hold. Reads the sources; runs as a test and in `make check`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The layers from the bottom up, as in `src/lib.rs`. A module imports only from modules that stand above it here; those
/// of one line do not know each other.
const LAYERS: &[&[&str]] = &[
    &["base"],
    &["model"],
    &["wire"],
    &["machine"],
    &["storage"],
    &["raft"],
    &["control"],
    &["broker"],
    &["api", "monitor"],
    &["node"],
];

/// Modules beside the layers, and all that each may use.
const SIDE: &[(&str, &[&str])] = &[("client", &["base", "model", "wire"]), ("cli", &["client"])];

/// Edges that break the rule, each with its reason. Better empty.
const EDGES_ALLOWED: &[(&str, &str, &str)] = &[];

const LINES_MAX: usize = 600;

/// Files that may be longer, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[
    (
        "tests/bad_days.rs",
        "one bad day after the other, each a story of its own",
    ),
    ("tests/bad_input.rs", "one table of refusals"),
    ("tests/machine_shard.rs", "one model and the histories held against it"),
];

/// Tasks and threads that are started outside of `base/tasks`, each with its reason: who owns them and ends them.
const SPAWNS: &[(&str, &str)] = &[
    (
        "src/client/publisher/mod.rs",
        "one task per publisher; its handle is joined by `close` and aborted on drop",
    ),
    ("src/client/testing.rs", "the peer of the client's own tests"),
    (
        "src/cli/bench/publish.rs",
        "one collector of latencies per publisher; it ends with its bounded channel and is joined",
    ),
];

struct Source {
    path: String,
    /// The module right below `src`.
    module: String,
    /// How many modules deep it is; `src/storage/mod.rs` is 1, `src/storage/log.rs` is 2.
    depth: usize,
    /// Lines with their numbers, without comments.
    code: Vec<(usize, String)>,
    lines: usize,
    /// The line from which on there are only unit tests.
    tests_from: usize,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(below: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![root().join(below)];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> Source {
    let text = std::fs::read_to_string(path).unwrap();
    let path = path.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
    let parts: Vec<&str> = path
        .trim_end_matches(".rs")
        .split('/')
        .skip(1)
        .filter(|p| *p != "mod")
        .collect();
    let all: Vec<&str> = text.lines().collect();
    let is_test_file = path.ends_with("/tests.rs") || path.ends_with("/testing.rs") || path.contains("/tests/");
    let tests_from = match all.iter().position(|l| l.trim() == "#[cfg(test)]") {
        _ if is_test_file => 0,
        // Only a module at the end of the file counts; a test-only function in the middle does not.
        Some(i)
            if all
                .get(i + 1)
                .is_some_and(|l| l.starts_with("mod ") && l.ends_with('{')) =>
        {
            i + 1
        }
        _ => usize::MAX,
    };
    let code = all
        .iter()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("").to_string()))
        .filter(|(_, line)| !line.trim().is_empty())
        .collect();
    Source {
        module: parts.first().unwrap_or(&"").to_string(),
        depth: parts.len(),
        path,
        code,
        lines: all.len(),
        tests_from,
    }
}

fn sources() -> Vec<Source> {
    rust_files("src").iter().map(|p| read(p)).collect()
}

fn modules() -> BTreeSet<&'static str> {
    LAYERS
        .iter()
        .flat_map(|l| l.iter().copied())
        .chain(SIDE.iter().map(|s| s.0))
        .collect()
}

/// Whether `from` may use `to`.
fn may_use(from: &str, to: &str) -> bool {
    if from == to || from == "main" || from == "lib" {
        return true;
    }
    if let Some((_, allowed)) = SIDE.iter().find(|s| s.0 == from) {
        return allowed.contains(&to);
    }
    let rank = |m: &str| LAYERS.iter().position(|l| l.contains(&m));
    matches!((rank(from), rank(to)), (Some(from), Some(to)) if to < from)
}

/// The names that follow each `marker` in a line; several, if it opens a brace.
fn names_after<'a>(line: &'a str, marker: &str) -> Vec<&'a str> {
    let ident = |s: &'a str| s.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
    line.match_indices(marker)
        .filter(|(at, _)| !line[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$'))
        .flat_map(|(at, _)| {
            let rest = &line[at + marker.len()..];
            match rest.strip_prefix('{') {
                Some(list) => list.split(',').map(|item| ident(item.trim())).collect(),
                None => vec![ident(rest)],
            }
        })
        .collect()
}

fn report(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn layers_only_look_down() {
    let modules = modules();
    let mut found = Vec::new();
    for s in sources() {
        for (number, line) in &s.code {
            let mut names: Vec<(&str, &str)> = names_after(line, "crate::").into_iter().map(|n| ("crate", n)).collect();
            // `super` as often as the file is deep is the crate itself; unit tests are one deeper.
            let ups = "super::".repeat(s.depth + usize::from(*number > s.tests_from));
            names.extend(names_after(line, &ups).into_iter().map(|n| ("super", n)));
            for (_, to) in names.into_iter().filter(|(_, n)| modules.contains(n)) {
                let allowed = EDGES_ALLOWED.iter().any(|(from, t, _)| *from == s.path && *t == to);
                if !may_use(&s.module, to) && !allowed {
                    found.push(format!("{}:{number}: {} must not use {to}", s.path, s.module));
                }
            }
        }
    }
    report("edges that point up or sideways", found);
}

#[test]
fn every_module_has_its_layer_and_is_told_of_in_lib_rs() {
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let declared: BTreeSet<&str> = lib
        .lines()
        .filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(declared, modules());
    let untold: Vec<_> = declared.iter().filter(|m| !lib.contains(&format!("[`{m}`]"))).collect();
    assert!(untold.is_empty(), "not in the table of src/lib.rs: {untold:?}");
}

#[test]
fn each_engine_has_one_user() {
    let mut found = Vec::new();
    for s in sources() {
        for (engine, home) in [
            ("rocksdb", "storage"),
            ("openraft", "raft"),
            ("openraft_rt_tokio", "raft"),
        ] {
            for (number, line) in s.code.iter().filter(|_| s.module != home) {
                let named = line.contains(&format!("{engine}::")) || line.contains(&format!("use {engine}"));
                if named && !line.contains('"') {
                    found.push(format!("{}:{number}: {engine} is only named in src/{home}", s.path));
                }
            }
        }
    }
    report("engines named outside of their home", found);
}

#[test]
fn files_stay_short() {
    let mut found = Vec::new();
    let mut paths: Vec<PathBuf> = ["src", "tests", "bench"].iter().flat_map(|d| rust_files(d)).collect();
    paths.push(root().join("build.rs"));
    for s in paths.iter().map(|p| read(p)) {
        let allowed = LONG_FILES.iter().any(|(path, _)| *path == s.path);
        if s.lines > LINES_MAX && !allowed {
            found.push(format!("{}: {} lines", s.path, s.lines));
        }
        if s.lines <= LINES_MAX && allowed {
            found.push(format!("{}: needs no exception any more", s.path));
        }
    }
    report(
        &format!("files of more than {LINES_MAX} lines (split by operation)"),
        found,
    );
}

#[test]
fn every_queue_is_bounded() {
    let mut found = Vec::new();
    for s in sources() {
        for (number, line) in s.code.iter().filter(|(n, _)| *n < s.tests_from) {
            let unbounded = [
                "unbounded_channel",
                "UnboundedSender",
                "UnboundedReceiver",
                "unbounded(",
                "unbounded::",
            ];
            let std_channel =
                line.contains("mpsc::channel()") || line.contains("mpsc::channel::<") && line.contains(">()");
            if unbounded.iter().any(|u| line.contains(u)) || std_channel {
                found.push(format!("{}:{number}: {}", s.path, line.trim()));
            }
        }
    }
    report("queues without a bound", found);
}

#[test]
fn every_task_has_an_owner() {
    let mut found = Vec::new();
    let mut used = BTreeSet::new();
    for s in sources()
        .iter()
        .filter(|s| s.path != "src/base/tasks.rs" && !s.path.starts_with("src/base/tasks/"))
    {
        for (number, line) in s.code.iter().filter(|(n, _)| *n < s.tests_from) {
            let spawns = [
                "tokio::spawn(",
                "task::spawn(",
                "thread::spawn(",
                "Handle::current().spawn(",
            ];
            if spawns.iter().any(|w| line.contains(w)) {
                match SPAWNS.iter().find(|(path, _)| *path == s.path) {
                    Some((path, _)) => drop(used.insert(*path)),
                    None => found.push(format!("{}:{number}: {}", s.path, line.trim())),
                }
            }
        }
    }
    report("tasks started outside of base/tasks", found);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut found = Vec::new();
    for path in ["src", "tests", "bench"].iter().flat_map(|d| rust_files(d)) {
        let s = read(&path);
        for (number, line) in s.code.iter().filter(|_| s.path != "tests/tidy.rs") {
            if ["todo!(", "unimplemented!(", "dbg!("].iter().any(|w| line.contains(w)) {
                found.push(format!("{}:{number}: {}", s.path, line.trim()));
            }
            if line.contains("#[ignore]") {
                found.push(format!("{}:{number}: an ignored test says why", s.path));
            }
        }
    }
    report("unfinished", found);
}

#[test]
fn the_rules_bite() {
    assert!(may_use("broker", "control") && may_use("raft", "storage") && may_use("main", "cli"));
    assert!(!may_use("storage", "raft") && !may_use("api", "monitor") && !may_use("client", "machine"));
    assert!(!may_use("cli", "wire") && !may_use("raft", "client"));
    assert_eq!(names_after("use crate::{api, wire::v1};", "crate::"), ["api", "wire"]);
    assert_eq!(
        names_after("let x = crate::raft::y(crate::base::z);", "crate::"),
        ["raft", "base"]
    );
    assert_eq!(names_after("$crate::raft mycrate::raft", "crate::"), [""; 0]);
}
