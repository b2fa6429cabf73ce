//! The reference pages are what the code says, and the metrics are what the code counts.
//! `UPDATE_DOCS=1 cargo test --release --test docs_sync` writes the pages anew.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use mainstem::base::metric_names;
use mainstem::node::config::table;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[track_caller]
fn in_sync(page: &str, expected: &str) {
    let path = root().join(page);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, expected).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    if found == expected {
        return;
    }
    let line = found
        .lines()
        .zip(expected.lines())
        .position(|(found, expected)| found != expected);
    let line = line.unwrap_or_else(|| found.lines().count().min(expected.lines().count()));
    panic!(
        "{page} is not what the code says, from line {} on:\n  page: {:?}\n  code: {:?}\n\
         UPDATE_DOCS=1 cargo test --release --test docs_sync writes it anew",
        line + 1,
        found.lines().nth(line),
        expected.lines().nth(line),
    );
}

#[test]
fn the_reference_of_the_configuration() {
    in_sync("docs/reference/config.md", &table::reference());
}

#[test]
fn the_reference_of_the_metrics() {
    in_sync("docs/reference/metrics.md", &metric_names::reference());
}

fn sources(dir: &Path, into: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            into.push((path, text));
        }
    }
}

#[test]
fn every_metric_is_in_the_table_and_is_counted_somewhere() {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let mut wrong = Vec::new();
    for (path, text) in &files {
        for kind in ["counter!(", "gauge!(", "histogram!("] {
            for (at, _) in text.match_indices(kind) {
                let argument = text[at + kind.len()..].trim_start();
                if argument.starts_with('"') {
                    let line = text[..at].matches('\n').count() + 1;
                    wrong.push(format!("{}:{line}: a metric is named by its constant", path.display()));
                }
            }
        }
    }
    for metric in metric_names::ALL {
        let is_used = files
            .iter()
            .any(|(path, text)| !path.ends_with("base/metric_names.rs") && text.contains(metric.constant));
        if !is_used {
            wrong.push(format!("{} is in the table, but nobody counts it", metric.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
