//! Names that directories were given since they were last synced: creations, renames, removals. A power failure takes
//! back the last few of them in each directory, newest first, which is what a journalling file system may do.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::rng::Rng;

#[derive(Debug)]
pub enum What {
    /// A file or a link was made.
    Made,
    MadeDir,
    /// The file came from `from`; what the name held before is kept at `replaced`.
    Renamed {
        from: PathBuf,
        replaced: Option<PathBuf>,
    },
    /// What the name held is kept at `kept`.
    Removed {
        kept: Option<PathBuf>,
    },
    RemovedDir,
}

#[derive(Debug)]
struct Op {
    id: u64,
    name: OsString,
    what: What,
}

/// What to do to take a name back.
#[derive(Debug, PartialEq, Eq)]
pub enum Undo {
    Rename(PathBuf, PathBuf),
    Unlink(PathBuf),
    MakeDir(PathBuf),
    /// A directory that never was: move it out of the way.
    SetAside(PathBuf),
}

#[derive(Default)]
pub struct Names {
    dirs: BTreeMap<PathBuf, Vec<Op>>,
    next_id: u64,
}

impl Names {
    pub fn record(&mut self, path: &Path, what: What) {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return;
        };
        self.next_id += 1;
        if matches!(what, What::RemovedDir) {
            self.dirs.remove(path);
        }
        self.dirs.entry(dir.to_path_buf()).or_default().push(Op {
            id: self.next_id,
            name: name.into(),
            what,
        });
    }

    /// A directory has a new name: what is pending below it moves along.
    pub fn moved_dir(&mut self, from: &Path, to: &Path) {
        let below: Vec<PathBuf> = self.dirs.keys().filter(|d| d.starts_with(from)).cloned().collect();
        for dir in below {
            if let (Some(ops), Ok(rest)) = (self.dirs.remove(&dir), dir.strip_prefix(from)) {
                self.dirs.insert(
                    if rest.as_os_str().is_empty() {
                        to.to_path_buf()
                    } else {
                        to.join(rest)
                    },
                    ops,
                );
            }
        }
    }

    pub fn begin_sync(&self) -> u64 {
        self.next_id
    }

    /// The directory (or all, if none is named) is durable up to the ticket. Returns kept files that can go.
    pub fn end_sync(&mut self, dir: Option<&Path>, ticket: u64) -> Vec<PathBuf> {
        let mut gone = Vec::new();
        for (d, ops) in &mut self.dirs {
            if dir.is_none_or(|only| only == d) {
                ops.retain_mut(|op| {
                    if op.id > ticket {
                        return true;
                    }
                    match &mut op.what {
                        What::Renamed { replaced: kept, .. } | What::Removed { kept } => gone.extend(kept.take()),
                        What::Made | What::MadeDir | What::RemovedDir => {}
                    }
                    false
                });
            }
        }
        self.dirs.retain(|_, ops| !ops.is_empty());
        gone
    }

    pub fn pending(&self) -> usize {
        self.dirs.values().map(Vec::len).sum()
    }

    /// Which names are lost. Also tells, per directory, how many of how many.
    pub fn power_failure(&self, rng: &mut Rng) -> (Vec<Undo>, Vec<(PathBuf, usize, usize)>) {
        let mut undo = Vec::new();
        let mut told = Vec::new();
        // The deepest first: their paths hold as long as nothing above them was taken back.
        let mut dirs: Vec<_> = self.dirs.iter().collect();
        dirs.sort_by_key(|(d, _)| (std::cmp::Reverse(d.components().count()), d.as_path().to_path_buf()));
        for (dir, ops) in dirs {
            let lost = match rng.below(10) {
                0..3 => ops.len(),
                3..6 => 0,
                _ => rng.below(ops.len() as u64 + 1) as usize,
            };
            told.push((dir.clone(), lost, ops.len()));
            for op in ops.iter().rev().take(lost) {
                let path = dir.join(&op.name);
                match &op.what {
                    What::Made => undo.push(Undo::Unlink(path)),
                    What::MadeDir => undo.push(Undo::SetAside(path)),
                    What::Renamed { from, replaced } => {
                        undo.push(Undo::Rename(path.clone(), from.clone()));
                        undo.extend(replaced.clone().map(|kept| Undo::Rename(kept, path)));
                    }
                    What::Removed { kept } => undo.extend(kept.clone().map(|kept| Undo::Rename(kept, path))),
                    What::RemovedDir => undo.push(Undo::MakeDir(path)),
                }
            }
        }
        (undo, told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synced_directory_keeps_its_names_and_another_may_lose_its_last_ones() {
        let mut n = Names::default();
        n.record(Path::new("/d/a"), What::Made);
        n.record(Path::new("/e/x"), What::Made);
        let ticket = n.begin_sync();
        n.record(Path::new("/d/b"), What::Made);
        n.end_sync(Some(Path::new("/d")), ticket);
        n.record(
            Path::new("/d/CURRENT"),
            What::Renamed {
                from: "/d/tmp".into(),
                replaced: Some("/side/1".into()),
            },
        );
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let (undo, told) = n.power_failure(&mut Rng::new(seed));
            assert!(!undo.contains(&Undo::Unlink("/d/a".into())));
            let d = told.iter().find(|t| t.0 == Path::new("/d")).unwrap();
            assert_eq!(d.2, 2);
            if d.1 == 2 {
                let of_d: Vec<_> = undo.iter().filter(|u| **u != Undo::Unlink("/e/x".into())).collect();
                assert_eq!(
                    of_d,
                    [
                        &Undo::Rename("/d/CURRENT".into(), "/d/tmp".into()),
                        &Undo::Rename("/side/1".into(), "/d/CURRENT".into()),
                        &Undo::Unlink("/d/b".into()),
                    ]
                );
            }
            seen.insert(d.1);
        }
        assert_eq!(seen.len(), 3);
    }

    #[test]
    fn what_is_pending_moves_with_its_directory() {
        let mut n = Names::default();
        n.record(Path::new("/d/tmp"), What::MadeDir);
        n.record(Path::new("/d/tmp/f"), What::Made);
        n.moved_dir(Path::new("/d/tmp"), Path::new("/d/final"));
        n.record(
            Path::new("/d/final"),
            What::Renamed {
                from: "/d/tmp".into(),
                replaced: None,
            },
        );
        let all = (0..)
            .map(|s| n.power_failure(&mut Rng::new(s)))
            .find(|(u, _)| u.len() == 3)
            .unwrap();
        assert_eq!(
            all.0,
            [
                Undo::Unlink("/d/final/f".into()),
                Undo::Rename("/d/final".into(), "/d/tmp".into()),
                Undo::SetAside("/d/tmp".into())
            ]
        );
    }
}
