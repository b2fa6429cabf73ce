//! Which servers to talk to: flags, environment, contexts, default; in this order.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::context::{self, Context};
use super::failure::Failure;
use super::units;
use crate::client::{Client, ClientConfig, DEFAULT_ADDRESS, TlsConfig};

/// What may also stand before the command.
#[derive(Debug, Clone, Default, Args)]
pub struct Globals {
    /// Servers of the command that follows, separated by commas
    #[arg(
        id = "global_server",
        long = "server",
        short = 's',
        value_name = "HOST:PORT",
        value_delimiter = ','
    )]
    server: Vec<String>,

    /// The context of the command that follows
    #[arg(id = "global_context", long = "context", value_name = "NAME")]
    context: Option<String>,
}

impl Globals {
    /// The flag that was given, if any, for commands that have no use for it.
    pub fn given(&self) -> Option<&'static str> {
        if self.server.is_empty() {
            self.context.as_ref().map(|_| "--context")
        } else {
            Some("--server")
        }
    }
}

/// How to reach a cluster.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connect {
    /// Servers, separated by commas; any of the cluster's nodes [env: MAINSTEM_SERVER] [default: 127.0.0.1:7411]
    #[arg(long, short = 's', value_name = "HOST:PORT", value_delimiter = ',', global = true)]
    server: Vec<String>,

    /// The context to use, see `mainstem context` [env: MAINSTEM_CONTEXT]
    #[arg(long, value_name = "NAME", global = true)]
    context: Option<String>,

    /// Namespace of the streams [env: MAINSTEM_NAMESPACE] [default: default]
    #[arg(long, value_name = "NAME", global = true)]
    namespace: Option<String>,

    /// Speak TLS, and trust the authorities in this PEM file
    #[arg(long, value_name = "FILE", global = true)]
    tls_ca: Option<PathBuf>,

    /// This client's certificate chain, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key", global = true)]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", global = true)]
    tls_key: Option<PathBuf>,

    /// The name in the server's certificate, if it is not the host in the address
    #[arg(long, value_name = "NAME", global = true)]
    tls_server_name: Option<String>,

    /// Use only the servers named, not the cluster's other nodes
    #[arg(long, global = true)]
    no_learn: bool,

    /// How long to wait for an answer
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = units::duration, global = true)]
    timeout: Duration,

    /// How long to look for a server that answers
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = units::duration, global = true)]
    connect_for: Duration,
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|e| Failure::usage(format!("cannot read {}: {e}", path.display())))
}

impl Connect {
    pub(super) fn client(&self, globals: &Globals) -> Result<Client, Failure> {
        let mut connect = self.clone();
        if connect.server.is_empty() {
            connect.server.clone_from(&globals.server);
        }
        connect.context = connect.context.or_else(|| globals.context.clone());
        Ok(Client::new(connect.config(env)?)?)
    }

    fn config(&self, env: impl Fn(&str) -> Option<String>) -> Result<ClientConfig, Failure> {
        let chosen = match self.context.clone().or_else(|| env("MAINSTEM_CONTEXT")) {
            Some(name) => Some(name),
            None => context::current()?,
        };
        let context = match chosen {
            Some(name) => context::load(&name)?,
            None => Context::default(),
        };
        // A context that was asked for outweighs an address that happens to be in the environment.
        let from_env = env("MAINSTEM_SERVER").filter(|_| self.context.is_none());
        let addresses = if !self.server.is_empty() {
            self.server.clone()
        } else if let Some(list) = from_env {
            list.split(',').map(str::to_owned).collect()
        } else if !context.servers.is_empty() {
            context.servers
        } else {
            vec![DEFAULT_ADDRESS.to_owned()]
        };
        let mut config = ClientConfig::new(addresses.iter().map(|a| a.trim()).filter(|a| !a.is_empty()));
        config.namespace = self
            .namespace
            .clone()
            .or_else(|| env("MAINSTEM_NAMESPACE"))
            .or(context.namespace)
            .unwrap_or_default();
        config.call_timeout = self.timeout;
        config.connect_timeout = config.connect_timeout.min(self.timeout);
        config.retry_for = self.connect_for;
        config.learn_nodes = !self.no_learn;
        let given = context.tls.unwrap_or_default();
        let ca = self.tls_ca.clone().or(given.ca);
        let cert = self.tls_cert.clone().or(given.cert);
        let key = self.tls_key.clone().or(given.key);
        let server_name = self.tls_server_name.clone().or(given.server_name);
        if ca.is_some() || cert.is_some() || server_name.is_some() {
            config.tls = Some(TlsConfig {
                ca_pem: ca.as_deref().map(read).transpose()?,
                identity_pem: match (cert, key) {
                    (Some(cert), Some(key)) => Some((read(&cert)?, read(&key)?)),
                    (Some(_), None) | (None, Some(_)) => {
                        return Err(Failure::usage(
                            "a client certificate needs its key, and a key its certificate",
                        ));
                    }
                    (None, None) => None,
                },
                server_name,
            });
        }
        Ok(config)
    }
}
