//! The ports file: where a node listens, for scripts that let it choose.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The addresses in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ports {
    pub client: SocketAddr,
    pub monitor: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<SocketAddr>,
    pub pid: u32,
}

/// A ports file that exists while the node serves.
#[derive(Debug)]
pub struct PortsFile {
    path: PathBuf,
}

impl PortsFile {
    /// Removes what an earlier node left, so that nobody takes its ports for ours.
    pub fn clear(path: &Path) -> Result<(), String> {
        match std::fs::remove_file(path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(format!("cannot remove the old ports file {}: {error}", path.display())),
        }
    }

    /// Writes it at once, whole: who sees it can read it.
    pub fn write(path: &Path, ports: Ports) -> Result<Self, String> {
        let told = |error: std::io::Error| format!("cannot write the ports file {}: {error}", path.display());
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", ports.pid));
        let new = path.with_file_name(name);
        let mut text = serde_json::to_vec(&ports).map_err(|error| told(error.into()))?;
        text.push(b'\n');
        let written = std::fs::File::create(&new)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| std::fs::rename(&new, path));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&new);
            return Err(told(error));
        }
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for PortsFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "cannot remove the ports file");
        }
    }
}
