//! The API by its generated code alone.

use std::collections::BTreeMap;
use std::time::Duration;

use mainstem::wire::v1;
use mainstem::wire::v1::cluster_service_client::ClusterServiceClient;
use mainstem::wire::v1::publish_service_client::PublishServiceClient;
use mainstem::wire::v1::read_service_client::ReadServiceClient;
use mainstem::wire::v1::server_service_client::ServerServiceClient;
use mainstem::wire::v1::stream_service_client::StreamServiceClient;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use super::batch::{self, Record};

const MESSAGE_MAX: usize = 16 << 20;

/// An error as a client sees it.
#[derive(Clone, Debug)]
pub struct Failure {
    pub code: Code,
    /// Of `google.rpc.ErrorInfo`; empty where there is none, as when the connection broke.
    pub reason: String,
    /// "did_not_happen", "may_have_happened", "cannot_work"; empty where the server did not say.
    pub retry: String,
    pub metadata: BTreeMap<String, String>,
    pub message: String,
}

impl From<Status> for Failure {
    fn from(s: Status) -> Self {
        let info = s.get_details_error_info();
        let metadata: BTreeMap<String, String> = info
            .as_ref()
            .map(|i| i.metadata.clone().into_iter().collect())
            .unwrap_or_default();
        Self {
            code: s.code(),
            reason: info.map(|i| i.reason).unwrap_or_default(),
            retry: metadata.get("retry").cloned().unwrap_or_default(),
            metadata,
            message: s.message().to_string(),
        }
    }
}

impl From<v1::BatchError> for Failure {
    fn from(e: v1::BatchError) -> Self {
        let retry = match e.retry() {
            v1::RetryClass::Unspecified => "",
            v1::RetryClass::DidNotHappen => "did_not_happen",
            v1::RetryClass::MayHaveHappened => "may_have_happened",
            v1::RetryClass::CannotWork => "cannot_work",
        };
        Self {
            code: Code::from_i32(e.code),
            reason: e.reason,
            retry: retry.into(),
            metadata: BTreeMap::new(),
            message: e.message,
        }
    }
}

/// A message as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    pub shard: u32,
    pub sequence: u64,
    pub append_time_us: u64,
    pub record: Record,
}

#[derive(Clone)]
pub struct Api {
    channel: Channel,
}

impl Api {
    pub async fn connect(addr: &str) -> Result<Self, tonic::transport::Error> {
        let channel = Endpoint::from_shared(format!("http://{addr}"))?
            .connect_timeout(Duration::from_secs(5))
            .connect()
            .await?;
        Ok(Self { channel })
    }

    pub fn streams(&self) -> StreamServiceClient<Channel> {
        StreamServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }

    pub fn publisher(&self) -> PublishServiceClient<Channel> {
        PublishServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }

    pub fn reader(&self) -> ReadServiceClient<Channel> {
        ReadServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }

    pub fn server(&self) -> ServerServiceClient<Channel> {
        ServerServiceClient::new(self.channel.clone())
    }

    pub fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    /// How every group and shard stands.
    pub async fn report(&self) -> Result<v1::GetReportResponse, Failure> {
        let request = v1::GetReportRequest::default();
        Ok(self.cluster().get_report(request).await?.into_inner())
    }

    /// What the planner would do now.
    pub async fn plan(&self) -> Result<v1::PlanResponse, Failure> {
        Ok(self.cluster().plan(v1::PlanRequest {}).await?.into_inner())
    }

    pub async fn create(&self, spec: v1::StreamSpec) -> Result<v1::Stream, Failure> {
        let request = v1::CreateStreamRequest {
            spec: Some(spec),
            request_id: String::new(),
        };
        let answer = self.streams().create_stream(request).await?.into_inner();
        Ok(answer.stream.expect("the stream"))
    }

    /// A stream with so many shards and the subjects `NAME` and `NAME.>`.
    pub async fn create_simple(&self, name: &str, shards: u32) -> v1::Stream {
        self.create(v1::StreamSpec {
            name: name.into(),
            shards,
            ..Default::default()
        })
        .await
        .expect("created")
    }

    pub async fn stream(&self, name: &str) -> Result<v1::Stream, Failure> {
        let request = v1::GetStreamRequest {
            namespace: String::new(),
            name: name.into(),
        };
        Ok(self
            .streams()
            .get_stream(request)
            .await?
            .into_inner()
            .stream
            .expect("the stream"))
    }

    pub async fn info(&self) -> Result<v1::GetServerInfoResponse, Failure> {
        Ok(self
            .server()
            .get_server_info(v1::GetServerInfoRequest {})
            .await?
            .into_inner())
    }

    /// One unary publish.
    pub async fn publish(&self, stream: &str, messages: Vec<v1::Message>) -> Result<v1::PublishResponse, Failure> {
        let request = v1::PublishRequest {
            namespace: String::new(),
            stream: stream.into(),
            messages,
            expect: None,
        };
        Ok(self.publisher().publish(request).await?.into_inner())
    }

    pub async fn get(&self, stream: &str, shard: u32, sequence: u64) -> Result<v1::StoredMessage, Failure> {
        let request = v1::GetRequest {
            namespace: String::new(),
            stream: stream.into(),
            by: Some(v1::get_request::By::Sequence(v1::GetBySequence { shard, sequence })),
            ..v1::GetRequest::default()
        };
        Ok(self
            .reader()
            .get(request)
            .await?
            .into_inner()
            .message
            .expect("the message"))
    }

    /// Opens a publish session.
    pub async fn session(&self, open: v1::PublishOpen) -> Result<Session, Failure> {
        let (to, from) = mpsc::channel(64);
        let mut session = Session {
            to,
            from: None,
            opened: v1::PublishOpened::default(),
        };
        session.send_frame(v1::publish_session_request::Frame::Open(open)).await;
        let requests = tokio_stream::wrappers::ReceiverStream::new(from);
        let mut answers = self.publisher().publish_session(requests).await?.into_inner();
        match answers.message().await?.and_then(|f| f.frame) {
            Some(v1::publish_session_response::Frame::Opened(opened)) => session.opened = opened,
            other => panic!("the first frame must be `opened`: {other:?}"),
        }
        session.from = Some(answers);
        Ok(session)
    }

    /// A session of a new producer on a stream.
    pub async fn session_on(&self, stream: &str) -> Result<Session, Failure> {
        self.session(v1::PublishOpen {
            stream: stream.into(),
            ..Default::default()
        })
        .await
    }

    /// Everything that is stored in a stream, per shard in order.
    pub async fn read_all(&self, stream: &str) -> Result<Vec<Read>, Failure> {
        let open = v1::ReadOpen {
            stream: stream.into(),
            stop_at_tail: true,
            ..Default::default()
        };
        let mut reader = self.read(open).await?;
        let mut all = Vec::new();
        while let Some(event) = reader.next().await? {
            if let Event::Messages(messages) = event {
                all.extend(messages);
            }
        }
        Ok(all)
    }

    /// A read session with plenty of credit; `start` defaults to the beginning.
    pub async fn read(&self, mut open: v1::ReadOpen) -> Result<Reader, Failure> {
        let (to, from) = mpsc::channel(64);
        if open.start.is_none() {
            open.start = Some(v1::StartPosition {
                at: Some(v1::start_position::At::Beginning(v1::Beginning {})),
            });
        }
        open.credit = Some(v1::ReadCredit {
            messages: 100_000,
            bytes: 32 << 20,
        });
        let frame = v1::ReadSessionRequest {
            frame: Some(v1::read_session_request::Frame::Open(open)),
        };
        to.send(frame).await.expect("the receiver is here");
        let requests = tokio_stream::wrappers::ReceiverStream::new(from);
        let from = self.reader().read_session(requests).await?.into_inner();
        Ok(Reader { to, from })
    }
}

/// A publish session.
pub struct Session {
    pub opened: v1::PublishOpened,
    to: mpsc::Sender<v1::PublishSessionRequest>,
    from: Option<Streaming<v1::PublishSessionResponse>>,
}

impl Session {
    async fn send_frame(&self, frame: v1::publish_session_request::Frame) -> bool {
        self.to
            .send(v1::PublishSessionRequest { frame: Some(frame) })
            .await
            .is_ok()
    }

    /// Sends a batch; false when the session is over.
    pub async fn send(&self, batch: v1::PublishBatch) -> bool {
        self.send_frame(v1::publish_session_request::Frame::Batch(batch)).await
    }

    pub fn map_epoch(&self) -> u64 {
        self.opened.map.as_ref().map_or(0, |m| m.epoch)
    }

    /// The next frame; `None` at the end of the session.
    pub async fn next(&mut self) -> Result<Option<v1::publish_session_response::Frame>, Failure> {
        let from = self.from.as_mut().expect("open");
        Ok(from.message().await?.map(|f| f.frame.expect("a known frame")))
    }

    /// Sends a batch to shard 0 and waits for its answer.
    pub async fn ask(&mut self, sequence: u64, batch: impl Into<bytes::Bytes>) -> Result<v1::BatchAck, Failure> {
        let map_epoch = self.map_epoch();
        let batch = v1::PublishBatch {
            shard: 0,
            map_epoch,
            producer_sequence: sequence,
            batch: batch.into(),
            expect: None,
        };
        self.send(batch).await;
        loop {
            use v1::publish_session_response::Frame as F;
            match self.next().await? {
                Some(F::Ack(ack)) => return Ok(ack),
                Some(F::Error(e)) => return Err(e.into()),
                Some(F::Window(_) | F::Map(_) | F::GoAway(_) | F::Opened(_) | F::Leaders(_) | F::Nodes(_)) => {}
                None => panic!("the session ended without an answer"),
            }
        }
    }
}

#[derive(Debug)]
pub enum Event {
    Opened(v1::ReadOpened),
    Messages(Vec<Read>),
    CaughtUp(v1::CaughtUp),
    Truncated(v1::Truncated),
    GoAway(v1::ReadGoAway),
    Heartbeat(v1::Heartbeat),
}

/// A read session that gives back the credit it uses.
pub struct Reader {
    to: mpsc::Sender<v1::ReadSessionRequest>,
    from: Streaming<v1::ReadSessionResponse>,
}

impl Reader {
    pub async fn next(&mut self) -> Result<Option<Event>, Failure> {
        use v1::read_session_response::Frame as F;
        let frame = loop {
            let Some(answer) = self.from.message().await? else {
                return Ok(None);
            };
            let frame = answer.frame.expect("a known frame");
            if !matches!(frame, F::Nodes(_)) {
                break frame;
            }
        };
        Ok(Some(match frame {
            F::Nodes(_) => unreachable!("passed over above"),
            F::Opened(opened) => Event::Opened(opened),
            F::Batch(batch) => {
                let credit = v1::ReadCredit {
                    messages: batch.messages.into(),
                    bytes: batch.batch.len() as u64,
                };
                let frame = v1::ReadSessionRequest {
                    frame: Some(v1::read_session_request::Frame::Credit(credit)),
                };
                // At the end of a session nobody listens any more.
                let _ = self.to.send(frame).await;
                Event::Messages(messages(&batch))
            }
            F::CaughtUp(c) => Event::CaughtUp(c),
            F::Heartbeat(h) => Event::Heartbeat(h),
            F::Truncated(t) => Event::Truncated(t),
            F::GoAway(g) => Event::GoAway(g),
        }))
    }
}

/// The messages of a frame, with their sequences as read.proto tells them.
fn messages(b: &v1::ReadBatch) -> Vec<Read> {
    let records = batch::decode(&b.batch).unwrap_or_else(|e| panic!("a batch was served that is broken: {e}"));
    let mut out = Vec::new();
    let mut next = b.base_sequence;
    for (position, record) in records.into_iter().enumerate() {
        let sequence = if b.sequence_offsets.is_empty() {
            if b.absent.contains(&(position as u32)) {
                continue;
            }
            next += 1;
            next - 1
        } else {
            b.base_sequence + u64::from(b.sequence_offsets[position])
        };
        if b.skip_below.is_none_or(|floor| sequence >= floor) {
            out.push(Read {
                shard: b.shard,
                sequence,
                append_time_us: b.append_time_us,
                record,
            });
        }
    }
    assert_eq!(
        out.len(),
        b.messages as usize,
        "`messages` tells how many the frame delivers: {b:?}"
    );
    out
}
