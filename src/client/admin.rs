//! Calls that wait for one answer: administration, single publishes and reads.

use std::sync::Arc;

use tonic::Request;
use tonic::transport::Channel;

use super::Client;
use super::config::GRPC_MESSAGE_BYTES_MAX;
use super::connection::Repeat;
use super::error::ClientError;
use super::message::{Expect, Message, StoredMessage};
use super::publisher::PubAck;
use super::reader::{Fetched, Start};
use crate::wire::v1;
use crate::wire::v1::publish_service_client::PublishServiceClient;
use crate::wire::v1::read_service_client::ReadServiceClient;
use crate::wire::v1::server_service_client::ServerServiceClient;
use crate::wire::v1::stream_service_client::StreamServiceClient;

/// What a purge removes.
///
/// ```
/// use mainstem::client::Purge;
///
/// let purge = Purge { keep: Some(10), filter: "orders.eu.>".into(), ..Purge::default() };
/// assert!(purge.shards.is_empty(), "all shards");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Purge {
    /// Shards; empty: all.
    pub shards: Vec<u32>,
    /// Remove everything below this sequence. Not together with `keep`.
    pub before_sequence: Option<u64>,
    /// Keep the last N messages of each shard (of those that match the filter).
    pub keep: Option<u64>,
    /// Only messages whose subject matches. Empty: all.
    pub filter: String,
}

/// A fresh id, by which the server knows a repeated request.
pub(super) fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

impl Client {
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.connection.config.call_timeout);
        request
    }

    pub(super) fn namespace(&self) -> String {
        self.connection.config.namespace.clone()
    }

    /// Creates a stream. Also tells whether the identical stream was there before; a different one of that name is an
    /// error that tells the difference.
    pub async fn create_stream(&self, mut spec: v1::StreamSpec) -> Result<(v1::Stream, bool), ClientError> {
        if spec.namespace.is_empty() {
            spec.namespace = self.namespace();
        }
        let request = v1::CreateStreamRequest {
            spec: Some(spec),
            request_id: request_id(),
        };
        let answer = self
            .connection
            .call(Repeat::Safe, async |c| {
                streams(c).create_stream(self.request(request.clone())).await
            })
            .await?;
        Ok((required(answer.stream)?, answer.existed))
    }

    /// A stream with the state of its shards.
    pub async fn get_stream(&self, name: &str) -> Result<v1::Stream, ClientError> {
        let request = v1::GetStreamRequest {
            namespace: self.namespace(),
            name: name.to_owned(),
        };
        let answer = self
            .connection
            .call(Repeat::Safe, async |c| {
                streams(c).get_stream(self.request(request.clone())).await
            })
            .await?;
        required(answer.stream)
    }

    /// All streams whose name begins with `prefix`, page by page.
    pub async fn list_streams(&self, prefix: &str) -> Result<Vec<v1::Stream>, ClientError> {
        self.list_streams_with(prefix, false).await
    }

    /// The same; with `include_removed` also the removed ones that can still be brought back.
    pub async fn list_streams_with(&self, prefix: &str, include_removed: bool) -> Result<Vec<v1::Stream>, ClientError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListStreamsRequest {
                namespace: self.namespace(),
                page_size: 1_000,
                page_token,
                name_prefix: prefix.to_owned(),
                include_removed,
            };
            let mut answer = self
                .connection
                .call(Repeat::Safe, async |c| {
                    streams(c).list_streams(self.request(request.clone())).await
                })
                .await?;
            all.append(&mut answer.streams);
            if answer.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = answer.next_page_token;
        }
    }

    /// Changes the fields of a stream that `paths` names (`limits.max_age_us`, …), with their values in `spec`. With
    /// `expected_revision`, only if the stream has that revision.
    pub async fn update_stream(
        &self,
        mut spec: v1::StreamSpec,
        paths: Vec<String>,
        expected_revision: Option<u64>,
    ) -> Result<v1::Stream, ClientError> {
        if spec.namespace.is_empty() {
            spec.namespace = self.namespace();
        }
        let request = v1::UpdateStreamRequest {
            spec: Some(spec),
            update_mask: Some(prost_types::FieldMask { paths }),
            expected_revision,
            request_id: request_id(),
        };
        let answer = self
            .connection
            .call(Repeat::Safe, async |c| {
                streams(c).update_stream(self.request(request.clone())).await
            })
            .await?;
        required(answer.stream)
    }

    /// Stops a stream. Its data stays for `grace_us` microseconds (absent: an hour; 0: not at all), in which
    /// [`Client::undelete_stream`] brings it back.
    pub async fn delete_stream(&self, name: &str, grace_us: Option<u64>) -> Result<v1::Stream, ClientError> {
        let request = v1::DeleteStreamRequest {
            namespace: self.namespace(),
            name: name.to_owned(),
            grace_us,
            expected_revision: None,
            request_id: request_id(),
        };
        let answer = self
            .connection
            .call(Repeat::Safe, async |c| {
                streams(c).delete_stream(self.request(request.clone())).await
            })
            .await?;
        required(answer.stream)
    }

    /// Brings back a stream that was removed: the one with this id, or the one removed last.
    pub async fn undelete_stream(&self, name: &str, stream_id: Option<String>) -> Result<v1::Stream, ClientError> {
        let request = v1::UndeleteStreamRequest {
            namespace: self.namespace(),
            name: name.to_owned(),
            stream_id,
            request_id: request_id(),
        };
        let answer = self
            .connection
            .call(Repeat::Safe, async |c| {
                streams(c).undelete_stream(self.request(request.clone())).await
            })
            .await?;
        required(answer.stream)
    }

    /// Removes messages; tells how many.
    pub async fn purge_stream(&self, name: &str, purge: Purge) -> Result<u64, ClientError> {
        use v1::purge_stream_request::Upto;
        let upto = match (purge.before_sequence, purge.keep) {
            (Some(_), Some(_)) => {
                return Err(ClientError::invalid(
                    "INVALID_ARGUMENT",
                    "a purge removes what is below a sequence or keeps the last messages, not both",
                ));
            }
            (Some(before), None) => Some(Upto::BeforeSequence(before)),
            (None, Some(keep)) => Some(Upto::Keep(keep)),
            (None, None) => None,
        };
        // What lies below a sequence is the same at each attempt; everything, or all but the last, is not.
        let repeat = match upto {
            Some(Upto::BeforeSequence(_)) => Repeat::Safe,
            Some(Upto::Keep(_)) | None => Repeat::Unsafe,
        };
        let request = v1::PurgeStreamRequest {
            namespace: self.namespace(),
            name: name.to_owned(),
            shards: purge.shards,
            upto,
            filter: purge.filter,
            request_id: request_id(),
        };
        let answer = self
            .connection
            .call(repeat, async |c| {
                streams(c).purge_stream(self.request(request.clone())).await
            })
            .await?;
        Ok(answer.purged_messages)
    }

    /// What the server says of itself.
    pub async fn server_info(&self) -> Result<v1::GetServerInfoResponse, ClientError> {
        let info = self
            .connection
            .call(Repeat::Safe, async |c| {
                ServerServiceClient::new(c)
                    .get_server_info(self.request(v1::GetServerInfoRequest {}))
                    .await
            })
            .await?;
        self.connection.take_nodes(&info.nodes);
        Ok(info)
    }

    /// Publishes a few messages (1–1,000) and waits for their acks, one per message. `stream` may be empty: then the
    /// subject of the first message tells which. Messages of one shard are stored together or not at all.
    ///
    /// If the outcome of an attempt is not known, the call is repeated only if every message has an id.
    pub async fn publish(
        &self,
        stream: &str,
        messages: Vec<Message>,
        expect: Option<Expect>,
    ) -> Result<Vec<PubAck>, ClientError> {
        let repeat = if expect.is_none() && messages.iter().all(|m| m.message_id.is_some()) {
            Repeat::Safe
        } else {
            Repeat::Unsafe
        };
        let request = v1::PublishRequest {
            namespace: self.namespace(),
            stream: stream.to_owned(),
            messages: messages.into_iter().map(Into::into).collect(),
            expect: expect.map(Into::into),
        };
        let answer = self
            .connection
            .call_about(Some(stream), repeat, async |c| {
                PublishServiceClient::new(c)
                    .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                    .publish(self.request(request.clone()))
                    .await
            })
            .await?;
        if let Some(leader) = &answer.leader {
            self.connection.follow(stream, leader);
        }
        let durability = answer.durability();
        let stream_id: Arc<str> = answer.stream_id.as_str().into();
        Ok(answer
            .acks
            .into_iter()
            .map(|ack| PubAck {
                stream_id: Arc::clone(&stream_id),
                epoch: answer.epoch,
                shard: ack.shard,
                sequence: Some(ack.sequence).filter(|&s| s > 0),
                duplicate: ack.duplicate,
                tail: ack.tail,
                term: ack.term,
                append_time_us: ack.append_time_us,
                durability,
            })
            .collect())
    }

    /// The message that `by` names, and how recent the replica is that has told it, if this client reads
    /// [locally](Client::with_consistency).
    pub async fn get(
        &self,
        stream: &str,
        by: v1::get_request::By,
    ) -> Result<(StoredMessage, Option<v1::Freshness>), ClientError> {
        let request = v1::GetRequest {
            namespace: self.namespace(),
            stream: stream.to_owned(),
            by: Some(by),
            consistency: self.consistency.into(),
        };
        // A local read is for whatever node is near.
        let about = (self.consistency != v1::Consistency::Local).then_some(stream);
        let answer = self
            .connection
            .call_about(about, Repeat::Safe, async |c| {
                ReadServiceClient::new(c)
                    .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                    .get(self.request(request.clone()))
                    .await
            })
            .await?;
        if let Some(leader) = &answer.leader {
            self.connection.follow(stream, leader);
        }
        Ok((required(answer.message)?.into(), answer.freshness))
    }

    /// The message with this sequence.
    pub async fn get_by_sequence(&self, stream: &str, shard: u32, sequence: u64) -> Result<StoredMessage, ClientError> {
        let by = v1::get_request::By::Sequence(v1::GetBySequence { shard, sequence });
        Ok(self.get(stream, by).await?.0)
    }

    /// The last message with this subject (without wildcards).
    pub async fn get_last_by_subject(&self, stream: &str, subject: &str) -> Result<StoredMessage, ClientError> {
        let subject = subject.to_owned();
        let by = v1::get_request::By::LastBySubject(v1::GetLastBySubject { subject });
        Ok(self.get(stream, by).await?.0)
    }

    /// The first message appended at or after this time, in microseconds since the Unix epoch.
    pub async fn get_first_at_time(
        &self,
        stream: &str,
        shard: u32,
        time_us: u64,
    ) -> Result<StoredMessage, ClientError> {
        let by = v1::get_request::By::FirstAtTime(v1::GetFirstAtTime { shard, time_us });
        Ok(self.get(stream, by).await?.0)
    }

    /// A page of messages. To go on, start at the cursor of the page before.
    pub async fn fetch(
        &self,
        stream: &str,
        start: Start,
        filters: Vec<String>,
        max_messages: u32,
    ) -> Result<Fetched, ClientError> {
        let request = v1::FetchRequest {
            namespace: self.namespace(),
            stream: stream.to_owned(),
            shards: Vec::new(),
            start: Some(start.into()),
            filters,
            max_messages,
            max_bytes: 0,
            wait_us: 0,
            consistency: self.consistency.into(),
        };
        let answer = self
            .connection
            .call(Repeat::Safe, async |c| {
                ReadServiceClient::new(c)
                    .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                    .fetch(self.request(request.clone()))
                    .await
            })
            .await?;
        Ok(Fetched {
            messages: answer.messages.into_iter().map(Into::into).collect(),
            cursor: answer.cursor,
            caught_up: answer.caught_up,
            freshness: answer.freshness,
        })
    }
}

fn streams(channel: Channel) -> StreamServiceClient<Channel> {
    StreamServiceClient::new(channel).max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
}

pub(super) fn required<T>(part: Option<T>) -> Result<T, ClientError> {
    part.ok_or_else(|| ClientError::bad_answer("the server's answer lacks its main part"))
}
