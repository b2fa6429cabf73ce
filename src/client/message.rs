//! Messages as the application gives them.

use bytes::Bytes;

use crate::model::TimeUs;
use crate::model::batch::RecordFields;
use crate::wire::v1;

/// A message to publish.
///
/// ```
/// use mainstem::client::Message;
///
/// let message = Message::new("orders.eu.17", "two boxes")
///     .with_key("customer-4")
///     .with_message_id("order-17-created")
///     .with_header("content-type", "text/plain");
/// assert_eq!(message.subject, "orders.eu.17");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// 1–255 bytes, tokens separated by `.`, no wildcards.
    pub subject: String,
    /// The message itself.
    pub payload: Bytes,
    /// Partition key, 1–1,024 bytes; required on a stream partitioned by key.
    pub key: Option<Bytes>,
    /// For de-duplication, 1–255 bytes: a second message with this id is not stored within the stream's window.
    pub message_id: Option<String>,
    /// The application's own time, in microseconds since the Unix epoch.
    pub event_time_us: Option<u64>,
    /// At most 64; names may repeat.
    pub headers: Vec<(String, Bytes)>,
}

impl Message {
    /// A message with a subject and a payload.
    pub fn new(subject: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Message {
            subject: subject.into(),
            payload: payload.into(),
            ..Message::default()
        }
    }

    /// The same with a partition key.
    pub fn with_key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// The same with an id for de-duplication.
    pub fn with_message_id(mut self, id: impl Into<String>) -> Self {
        self.message_id = Some(id.into());
        self
    }

    /// The same with one more header.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same with the application's own time, in microseconds since the Unix epoch.
    pub fn with_event_time_us(mut self, time: u64) -> Self {
        self.event_time_us = Some(time);
        self
    }

    /// Calls `f` with the message as the batch format sees it. Allocates only for headers.
    pub(crate) fn with_fields<T>(&self, f: impl FnOnce(&RecordFields<'_>) -> T) -> T {
        let headers: Vec<(&str, &[u8])> = self.headers.iter().map(|(n, v)| (n.as_str(), &v[..])).collect();
        f(&RecordFields {
            subject: &self.subject,
            key: self.key.as_deref(),
            message_id: self.message_id.as_deref(),
            event_time: self.event_time_us.map(TimeUs::new),
            headers: &headers,
            payload: &self.payload,
        })
    }
}

impl From<Message> for v1::Message {
    fn from(m: Message) -> Self {
        v1::Message {
            subject: m.subject,
            payload: m.payload,
            headers: m
                .headers
                .into_iter()
                .map(|(name, value)| v1::Header { name, value })
                .collect(),
            key: m.key,
            message_id: m.message_id,
            event_time_us: m.event_time_us,
        }
    }
}

impl From<v1::Message> for Message {
    fn from(m: v1::Message) -> Self {
        Message {
            subject: m.subject,
            payload: m.payload,
            key: m.key,
            message_id: m.message_id,
            event_time_us: m.event_time_us,
            headers: m.headers.into_iter().map(|h| (h.name, h.value)).collect(),
        }
    }
}

/// A message as it lies in a shard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredMessage {
    /// Index of the shard in the stream.
    pub shard: u32,
    /// Its place in the shard, from 1.
    pub sequence: u64,
    /// When it was appended, in microseconds since the Unix epoch.
    pub append_time_us: u64,
    /// Its subject.
    pub subject: String,
    /// The message itself.
    pub payload: Bytes,
    /// Its partition key.
    pub key: Option<Bytes>,
    /// Its id for de-duplication.
    pub message_id: Option<String>,
    /// The application's own time, in microseconds since the Unix epoch.
    pub event_time_us: Option<u64>,
    /// In their order; names may repeat.
    pub headers: Vec<(String, Bytes)>,
}

impl From<v1::StoredMessage> for StoredMessage {
    fn from(stored: v1::StoredMessage) -> Self {
        let m = Message::from(stored.message.unwrap_or_default());
        StoredMessage {
            shard: stored.shard,
            sequence: stored.sequence,
            append_time_us: stored.append_time_us,
            subject: m.subject,
            payload: m.payload,
            key: m.key,
            message_id: m.message_id,
            event_time_us: m.event_time_us,
            headers: m.headers,
        }
    }
}

/// A condition that must hold when messages are stored; otherwise none of them is, and the error tells the actual
/// value ([`ClientError::actual`](super::ClientError::actual)).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expect {
    /// The shard's last sequence; 0: it never had a message.
    pub last_sequence: Option<u64>,
    /// A subject and the sequence of its last message; 0: none is retained.
    pub subject_last_sequence: Option<(String, u64)>,
}

impl Expect {
    /// Expects this to be the shard's last sequence.
    pub fn last_sequence(sequence: u64) -> Self {
        Expect {
            last_sequence: Some(sequence),
            ..Expect::default()
        }
    }

    /// Expects this to be the sequence of the subject's last message.
    pub fn subject_last_sequence(subject: impl Into<String>, sequence: u64) -> Self {
        Expect {
            subject_last_sequence: Some((subject.into(), sequence)),
            ..Expect::default()
        }
    }
}

impl From<Expect> for v1::Expectation {
    fn from(e: Expect) -> Self {
        v1::Expectation {
            last_sequence: e.last_sequence,
            subject: e
                .subject_last_sequence
                .map(|(subject, last_sequence)| v1::SubjectExpectation { subject, last_sequence }),
        }
    }
}
