//! The Rust client: [`Client`], [`Publisher`], [`Reader`], and the administration of streams.
//!
//! ```no_run
//! use mainstem::client::{Client, ClientError, Message, Start};
//! use mainstem::client::proto::StreamSpec;
//!
//! # async fn example() -> Result<(), ClientError> {
//! let client = Client::connect("127.0.0.1:7411").await?;
//! client.create_stream(StreamSpec { name: "orders".into(), ..StreamSpec::default() }).await?;
//!
//! let publisher = client.publisher("orders").open().await?;
//! publisher.publish(&Message::new("orders.eu", "hello")).await?.await?;
//!
//! let mut reader = client.reader("orders").from(Start::Beginning).stop_at_tail().open().await?;
//! while let Some(message) = reader.next().await? {
//!     println!("{} {}", message.sequence, message.subject);
//! }
//! # Ok(())
//! # }
//! ```

mod admin;
mod cluster;
mod config;
mod connection;
mod error;
mod message;
mod publisher;
mod reader;
#[cfg(test)]
mod testing;

use std::sync::Arc;

use self::connection::Connection;

pub use admin::Purge;
pub use cluster::{ClusterEvents, Target};
pub use config::{ClientConfig, DEFAULT_ADDRESS, TlsConfig};
pub use error::{ClientError, RetryClass, reason};
pub use message::{Expect, Message, StoredMessage};
pub use publisher::{BatchReceipt, BatchReport, PendingAck, PubAck, Publisher, PublisherBuilder};
pub use reader::{Fetched, MessageBatch, Messages, ReadEvent, Reader, ReaderBuilder, Start};

pub use crate::model::Codec;
pub use crate::model::batch::{RecordFields, RecordView};
/// The messages of the protocol that admin calls take and give.
pub use crate::wire::v1 as proto;

/// A connection to a cluster, for any number of addresses. Cheap to clone; clones share connections.
///
/// Connections are made when they are first needed, and made again when they broke. Calls that certainly did not
/// happen, or can be repeated safely, are tried again, at the other addresses too; and at those of the cluster's other
/// nodes, which the client learns from the first that answers ([`ClientConfig::learn_nodes`]). Publishes go to the
/// leader's node once an answer has told which that is.
///
/// ```no_run
/// use mainstem::client::{Client, ClientError};
///
/// # async fn example() -> Result<(), ClientError> {
/// let client = Client::connect("127.0.0.1:7411").await?;
/// for stream in client.list_streams("").await? {
///     println!("{}", stream.spec.unwrap_or_default().name);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Client {
    connection: Arc<Connection>,
    consistency: proto::Consistency,
}

impl Client {
    /// Connects to a server, or to several (`a:7411,b:7411`), without TLS; fails if none answers.
    pub async fn connect(addresses: &str) -> Result<Self, ClientError> {
        let addresses = addresses.split(',').map(str::trim).filter(|a| !a.is_empty());
        let client = Self::new(ClientConfig::new(addresses))?;
        client.server_info().await?;
        Ok(client)
    }

    /// Checks the configuration; connects at the first call. Needs a tokio runtime from then on.
    pub fn new(config: ClientConfig) -> Result<Self, ClientError> {
        Ok(Client {
            connection: Connection::new(config)?,
            consistency: proto::Consistency::Linearizable,
        })
    }

    /// The same client, with reads of this consistency. [`Local`](proto::Consistency::Local) ones show what a replica has
    /// applied: they work without a leader, and tell how far behind they may be.
    pub fn with_consistency(mut self, consistency: proto::Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// Settings of a publisher to this stream; `open` makes it.
    pub fn publisher(&self, stream: impl Into<String>) -> PublisherBuilder {
        PublisherBuilder::new(Arc::clone(&self.connection), stream.into())
    }

    /// Settings of a reader of this stream; `open` makes it.
    pub fn reader(&self, stream: impl Into<String>) -> ReaderBuilder {
        ReaderBuilder::new(Arc::clone(&self.connection), stream.into(), self.consistency)
    }
}
