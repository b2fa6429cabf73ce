//! Every reason word in the code is in docs/reference/errors.md, and every word there is in the code.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Words like "BAD_BATCH" in string literals.
fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split('"').skip(1).step_by(2).filter_map(|literal| {
        let is_word = literal.len() >= 5
            && literal.starts_with(|c: char| c.is_ascii_uppercase())
            && literal.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        is_word.then(|| literal.to_owned())
    })
}

#[test]
fn the_table_of_errors_and_the_code_agree() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src/api", "src/broker", "src/control", "src/machine"] {
        rust_files(&root.join(dir), &mut files);
    }
    let mut in_code = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        // Test modules make up words of their own.
        let text = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
        // Line by line: a quote in a comment must not turn the rest of a file inside out.
        for line in text
            .lines()
            .filter(|l| !l.trim_start().starts_with("//") && !l.contains("env!("))
        {
            in_code.extend(words(line));
        }
    }
    let doc = std::fs::read_to_string(root.join("docs/reference/errors.md")).unwrap();
    let in_doc: BTreeSet<String> = doc
        .lines()
        .filter_map(|l| l.strip_prefix("| `"))
        .filter_map(|l| l.split('`').next())
        .filter(|w| w.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .map(str::to_owned)
        .collect();
    assert!(in_code.len() > 30, "the scan of the code finds too little: {in_code:?}");
    let undocumented: Vec<_> = in_code.difference(&in_doc).collect();
    let unknown: Vec<_> = in_doc.difference(&in_code).collect();
    assert!(
        undocumented.is_empty() && unknown.is_empty(),
        "not in docs/reference/errors.md: {undocumented:?}; only there: {unknown:?}"
    );
}
