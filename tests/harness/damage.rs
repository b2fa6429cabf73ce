//! Bits that turn and files that lose their end, in the data directory of a node that does not run.

use std::path::{Path, PathBuf};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// A part of a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Log,
    State,
    /// What lies beside them: who the node is, the witness, the cluster, the clock.
    Beside,
}

/// Files of a part that have content; those that RocksDB writes for people only are left out.
fn files_of(data: &Path, part: Part) -> Vec<PathBuf> {
    let is_for_people = |file: &Path| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("LOG") || name == "LOCK"
    };
    let below = |name: &str| match data.join(name) {
        dir if dir.is_dir() => super::files(&dir),
        _ => Vec::new(),
    };
    let all = match part {
        Part::Log => below("log"),
        Part::State => below("state"),
        Part::Beside => {
            let entries = std::fs::read_dir(data).into_iter().flatten().flatten();
            entries.map(|e| e.path()).filter(|path| path.is_file()).collect()
        }
    };
    all.into_iter()
        .filter(|file| !is_for_people(file) && file.metadata().is_ok_and(|m| m.len() > 0))
        .collect()
}

fn one_of(mut files: Vec<PathBuf>, rng: &mut StdRng) -> Option<(PathBuf, Vec<u8>)> {
    files.sort();
    let file = files.choose(rng)?.clone();
    let bytes = std::fs::read(&file).unwrap();
    Some((file, bytes))
}

/// Turns one bit; tells which. Nothing where the part has no files.
pub fn flip_bit(data: &Path, part: Part, rng: &mut StdRng) -> Option<String> {
    flip_in(files_of(data, part), rng)
}

/// Turns one bit of what messages hold, which no start looks at.
pub fn flip_blob_bit(data: &Path, rng: &mut StdRng) -> Option<String> {
    let mut files = files_of(data, Part::State);
    files.retain(|file| file.extension().is_some_and(|end| end == "blob"));
    flip_in(files, rng)
}

fn flip_in(files: Vec<PathBuf>, rng: &mut StdRng) -> Option<String> {
    let (file, mut bytes) = one_of(files, rng)?;
    let (at, bit) = (rng.random_range(0..bytes.len()), rng.random_range(0..8));
    bytes[at] ^= 1 << bit;
    std::fs::write(&file, &bytes).unwrap();
    Some(format!(
        "bit {bit} of byte {at} of {}, in {}",
        bytes.len(),
        file.display()
    ))
}

/// Cuts off the end of a file, from a byte to all of it.
pub fn truncate(data: &Path, part: Part, rng: &mut StdRng) -> Option<String> {
    let (file, bytes) = one_of(files_of(data, part), rng)?;
    let keep = if rng.random_bool(0.5) {
        rng.random_range(0..bytes.len())
    } else {
        bytes.len().saturating_sub(rng.random_range(1..100))
    };
    std::fs::write(&file, &bytes[..keep]).unwrap();
    Some(format!("{keep} of {} bytes left of {}", bytes.len(), file.display()))
}
