//! `mainstem context`: named addresses, one TOML file each.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::failure::{Exit, Failure};
use super::output::{self, Format, FormatArg};

/// What a context file holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Context {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) description: Option<String>,
    /// `host:port` of any of the cluster's nodes.
    pub(super) servers: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tls: Option<Tls>,
}

/// Paths of PEM files.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tls {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ca: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cert: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) server_name: Option<String>,
}

/// Contexts are TOML files in $XDG_CONFIG_HOME/mainstem/contexts (or ~/.config/mainstem/contexts).
#[derive(Debug, Args)]
pub struct ContextArgs {
    #[command(subcommand)]
    command: ContextCommand,
}

#[derive(Debug, Subcommand)]
enum ContextCommand {
    /// Make a context, or replace one
    Add {
        /// Its name: letters, digits, `-`, `_` and `.`
        name: String,
        /// Servers, separated by commas
        #[arg(long, short = 's', value_name = "HOST:PORT", value_delimiter = ',', required = true)]
        server: Vec<String>,
        /// What it is
        #[arg(long)]
        description: Option<String>,
        /// Namespace of the streams
        #[arg(long)]
        namespace: Option<String>,
        /// Speak TLS, and trust the authorities in this PEM file
        #[arg(long, value_name = "FILE")]
        tls_ca: Option<PathBuf>,
        /// This client's certificate chain, PEM
        #[arg(long, value_name = "FILE", requires = "tls_key")]
        tls_cert: Option<PathBuf>,
        /// The private key of --tls-cert, PEM
        #[arg(long, value_name = "FILE", requires = "tls_cert")]
        tls_key: Option<PathBuf>,
        /// The name in the server's certificate, if it is not the host in the address
        #[arg(long, value_name = "NAME")]
        tls_server_name: Option<String>,
        /// Also use it from now on
        #[arg(long = "use")]
        select: bool,
    },
    /// List the contexts
    Ls(FormatArg),
    /// Use a context from now on
    Use {
        /// Its name; `-` for none
        name: String,
    },
    /// Remove a context
    Rm {
        /// Its name
        name: String,
    },
}

fn home() -> Result<PathBuf, Failure> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_CONFIG_HOME")
        .or_else(|| set("HOME").map(|h| h.join(".config")))
        .map(|base| base.join("mainstem"))
        .ok_or_else(|| {
            Failure::new(
                Exit::Failed,
                "there is no place for contexts: neither XDG_CONFIG_HOME nor HOME is set",
            )
        })
}

fn path_of(home: &Path, name: &str) -> Result<PathBuf, Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with(['.', '-']) || !name.chars().all(good) {
        return Err(Failure::usage(format!(
            "`{name}` cannot name a context: 1-64 letters, digits, `-`, `_` and `.`, and not `-` or `.` first"
        )));
    }
    Ok(home.join("contexts").join(format!("{name}.toml")))
}

/// The context in use, if any.
pub(super) fn current() -> Result<Option<String>, Failure> {
    // Without a home there are no contexts, and that is fine.
    match home() {
        Ok(home) => current_in(&home),
        Err(_) => Ok(None),
    }
}

fn current_in(home: &Path) -> Result<Option<String>, Failure> {
    match std::fs::read_to_string(home.join("current-context")) {
        Ok(name) => Ok(Some(name.trim().to_owned()).filter(|n| !n.is_empty())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::from(e).context("cannot read which context is in use")),
    }
}

/// Reads a context.
pub(super) fn load(name: &str) -> Result<Context, Failure> {
    load_in(&home()?, name)
}

fn load_in(home: &Path, name: &str) -> Result<Context, Failure> {
    let path = path_of(home, name)?;
    let text = std::fs::read_to_string(&path).map_err(|e| {
        if e.kind() != io::ErrorKind::NotFound {
            return Failure::from(e).context(path.display());
        }
        Failure::new(Exit::NotFound, format!("there is no context `{name}`"))
            .hint("`mainstem context ls` lists them, `mainstem context add NAME --server HOST:PORT` makes one")
    })?;
    toml::from_str(&text).map_err(|e| {
        Failure::usage(format!(
            "{} is not a good context: {}",
            path.display(),
            e.to_string().trim()
        ))
    })
}

fn names_in(home: &Path) -> Result<Vec<String>, Failure> {
    let entries = match std::fs::read_dir(home.join("contexts")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|n| n.strip_suffix(".toml")).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Writes a file so that a reader sees the old or the new one, whole.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let folder = path.parent().expect("a file in a folder");
    let put = || {
        std::fs::create_dir_all(folder)?;
        let new = path.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(&new, path)
    };
    put().map_err(|e| Failure::from(e).context(format!("cannot write {}", path.display())))
}

impl ContextArgs {
    pub(super) fn run(self) -> Result<(), Failure> {
        self.run_in(&home()?)
    }

    fn run_in(self, home: &Path) -> Result<(), Failure> {
        match self.command {
            ContextCommand::Add {
                name,
                server,
                description,
                namespace,
                tls_ca,
                tls_cert,
                tls_key,
                tls_server_name,
                select,
            } => {
                let absolute = |p: Option<PathBuf>| p.map(std::path::absolute).transpose();
                let tls = Tls {
                    ca: absolute(tls_ca)?,
                    cert: absolute(tls_cert)?,
                    key: absolute(tls_key)?,
                    server_name: tls_server_name,
                };
                let tls = Some(tls).filter(|t| *t != Tls::default());
                let context = Context {
                    description,
                    servers: server,
                    namespace,
                    tls,
                };
                // Refuse what could never connect.
                crate::client::ClientConfig::new(context.servers.clone()).check()?;
                let path = path_of(home, &name)?;
                write(&path, &toml::to_string(&context).expect("plain values"))?;
                output::status(format!("context {name} is in {}", path.display()));
                if select || names_in(home)?.len() == 1 {
                    write(&home.join("current-context"), &name)?;
                    output::status(format!("{name} is used from now on"));
                }
                Ok(())
            }
            ContextCommand::Ls(format) => list(home, format.format),
            ContextCommand::Use { name } if name == "-" => write(&home.join("current-context"), ""),
            ContextCommand::Use { name } => {
                load_in(home, &name)?;
                write(&home.join("current-context"), &name)?;
                output::status(format!("{name} is used from now on"));
                Ok(())
            }
            ContextCommand::Rm { name } => {
                load_in(home, &name).or_else(|e| {
                    if e.exit == Exit::NotFound {
                        Err(e)
                    } else {
                        Ok(Context::default())
                    }
                })?;
                std::fs::remove_file(path_of(home, &name)?)?;
                if current_in(home)?.as_deref() == Some(name.as_str()) {
                    write(&home.join("current-context"), "")?;
                }
                output::status(format!("context {name} is gone"));
                Ok(())
            }
        }
    }
}

fn list(home: &Path, format: Format) -> Result<(), Failure> {
    let current = current_in(home)?;
    let mut table = output::table(&["", "name", "servers", "namespace", "tls", "description"]);
    let mut all = Vec::new();
    for name in names_in(home)? {
        let context = load_in(home, &name)?;
        let used = current.as_ref() == Some(&name);
        all.push(json!({ "name": name, "current": used, "context": context }));
        table.add_row([
            if used { "*" } else { "" }.to_owned(),
            name,
            context.servers.join(", "),
            context.namespace.unwrap_or_default(),
            if context.tls.is_some() { "yes" } else { "no" }.to_owned(),
            context.description.unwrap_or_default(),
        ]);
    }
    match format {
        Format::Json => output::json(&json!(all)),
        Format::Table if all.is_empty() => {
            output::status("no contexts; `mainstem context add NAME --server HOST:PORT` makes one");
            Ok(())
        }
        Format::Table => output::line(table),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Wrap {
        #[command(flatten)]
        args: ContextArgs,
    }

    fn run(home: &Path, line: &str) -> Result<(), Failure> {
        Wrap::try_parse_from(std::iter::once("context").chain(line.split(' ')))
            .unwrap()
            .args
            .run_in(home)
    }

    #[test]
    fn contexts_come_and_go() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        run(home, "add one -s a:1,b:2 --namespace n").unwrap();
        assert_eq!(
            current_in(home).unwrap().as_deref(),
            Some("one"),
            "the first one is used"
        );
        run(home, "add two -s c:3 --tls-ca /ca.pem").unwrap();
        assert_eq!(current_in(home).unwrap().as_deref(), Some("one"));
        run(home, "use two").unwrap();
        assert_eq!(load_in(home, "one").unwrap().servers, ["a:1", "b:2"]);
        assert_eq!(
            load_in(home, "two").unwrap().tls.unwrap().ca.unwrap(),
            Path::new("/ca.pem")
        );
        run(home, "rm two").unwrap();
        assert_eq!(current_in(home).unwrap(), None);
        assert_eq!(run(home, "use two").unwrap_err().exit, Exit::NotFound);
        assert_eq!(run(home, "rm two").unwrap_err().exit, Exit::NotFound);
        for bad in ["add ../x -s a:1", "add .x -s a:1", "add x -s nowhere"] {
            assert_eq!(run(home, bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
        assert_eq!(names_in(home).unwrap(), ["one"]);
    }

    #[test]
    fn unknown_keys_in_a_context_are_refused() {
        let home = tempfile::tempdir().unwrap();
        write(&path_of(home.path(), "x").unwrap(), "servers = [\"a:1\"]\nserver = 1\n").unwrap();
        let e = load_in(home.path(), "x").unwrap_err();
        assert!(e.message.contains("unknown field `server`"), "{}", e.message);
    }
}
