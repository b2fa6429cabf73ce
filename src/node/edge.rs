//! What every gRPC request passes first: it is given its principal and a span, and is counted.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use prost::Message;
use tonic::body::Body;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;

use super::tls;
use crate::base::Principal;
use crate::base::budget::Held;
use crate::base::metric_names as names;
use crate::wire::code_name;

/// The layer; one for a listener.
#[derive(Clone)]
pub struct Edge {
    methods: Arc<Methods>,
}

impl Edge {
    /// Counts by the methods of these descriptors (an encoded `FileDescriptorSet`), and everything else as "other".
    pub fn new(descriptors: &[u8]) -> Self {
        Self {
            methods: Arc::new(Methods::new(descriptors)),
        }
    }
}

impl<S> Layer<S> for Edge {
    type Service = EdgeService<S>;

    fn layer(&self, inner: S) -> EdgeService<S> {
        EdgeService {
            inner,
            methods: Arc::clone(&self.methods),
        }
    }
}

/// What is counted of each method.
struct Methods {
    known: HashMap<String, Arc<Method>>,
    other: Arc<Method>,
}

struct Method {
    /// "PublishService/Publish".
    label: String,
    open: metrics::Gauge,
    duration: metrics::Histogram,
}

impl Method {
    fn new(label: String) -> Arc<Self> {
        let open = metrics::gauge!(names::API_OPEN_REQUESTS, "method" => label.clone());
        let duration = metrics::histogram!(names::API_REQUEST_DURATION_SECONDS, "method" => label.clone());
        Arc::new(Self { label, open, duration })
    }
}

impl Methods {
    fn new(descriptors: &[u8]) -> Self {
        let set = prost_types::FileDescriptorSet::decode(descriptors).unwrap_or_default();
        let mut known = HashMap::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    known.insert(path, Method::new(format!("{}/{}", service.name(), method.name())));
                }
            }
        }
        Self {
            known,
            other: Method::new("other".into()),
        }
    }

    fn of(&self, path: &str) -> Arc<Method> {
        Arc::clone(self.known.get(path).unwrap_or(&self.other))
    }
}

/// One request, from its arrival until its answer ends or is given up.
struct Observed {
    method: Arc<Method>,
    began: Instant,
    ended: bool,
}

impl Observed {
    fn begin(method: Arc<Method>) -> Self {
        method.open.increment(1.0);
        Self {
            method,
            began: Instant::now(),
            ended: false,
        }
    }

    fn answered(&self) {
        self.method.duration.record(self.began.elapsed().as_secs_f64());
    }

    fn end(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            let labels = [
                ("method", self.method.label.clone()),
                ("code", code_name(code).to_owned()),
            ];
            metrics::counter!(names::API_REQUESTS_TOTAL, &labels).increment(1);
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        // Nobody waited for the end: the client went away.
        self.end(Code::Cancelled);
        self.method.open.decrement(1.0);
    }
}

fn code_of(headers: &HeaderMap) -> Option<Code> {
    headers
        .get("grpc-status")
        .map(|value| Code::from_bytes(value.as_bytes()))
}

/// See [`Edge`].
#[derive(Clone)]
pub struct EdgeService<S> {
    inner: S,
    methods: Arc<Methods>,
}

impl<S> Service<Request<Body>> for EdgeService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Counted>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let method = self.methods.of(request.uri().path());
        let mut observed = Observed::begin(Arc::clone(&method));
        let Some(principal) = principal_of(&request) else {
            // The certificate is valid but names nobody, so nothing could ever be granted to it.
            observed.end(Code::Unauthenticated);
            let status = Status::unauthenticated("the client certificate has neither a common name nor another name");
            let response = status.into_http::<Body>().map(|body| Counted {
                body,
                observed,
                _held: None,
            });
            return Box::pin(std::future::ready(Ok(response)));
        };
        let span = span_of(&method.label, &principal, &request);
        request.extensions_mut().insert(principal);
        // The clone that is ready must be the one that is called.
        let spare = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, spare);
        let answering = async move {
            let mut response = inner.call(request).await?;
            observed.answered();
            if let Some(code) = code_of(response.headers()) {
                observed.end(code);
            }
            let held = response.extensions_mut().remove::<Held>();
            Ok(response.map(|body| Counted {
                body,
                observed,
                _held: held,
            }))
        };
        Box::pin(answering.instrument(span))
    }
}

fn principal_of(request: &Request<Body>) -> Option<Principal> {
    let certificates = request
        .extensions()
        .get::<TlsConnectInfo<TcpConnectInfo>>()
        .and_then(TlsConnectInfo::peer_certs);
    match certificates.as_deref().map(Vec::as_slice) {
        None | Some([]) => Some(Principal::Anonymous),
        Some([own, ..]) => tls::principal(own),
    }
}

fn span_of(method: &str, principal: &Principal, request: &Request<Body>) -> tracing::Span {
    let span = tracing::debug_span!("request", method, %principal, trace_id = tracing::field::Empty);
    let traceparent = request.headers().get("traceparent").filter(|_| !span.is_disabled());
    if let Some(id) = traceparent.and_then(|value| trace_id(value.to_str().ok()?)) {
        span.record("trace_id", id);
    }
    span
}

/// The trace id of a W3C `traceparent`.
fn trace_id(header: &str) -> Option<&str> {
    let mut parts = header.split('-');
    let (version, id) = (parts.next()?, parts.next()?);
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    (version.len() == 2 && hex(version) && id.len() == 32 && hex(id) && id.bytes().any(|byte| byte != b'0'))
        .then_some(id)
}

/// A response's body, watched for its end.
pub struct Counted {
    body: Body,
    observed: Observed,
    /// Memory of the answer: the transport drops the body when it has sent all of it.
    _held: Option<Held>,
}

impl HttpBody for Counted {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(code) = frame.trailers_ref().and_then(code_of) {
                    self.observed.end(code);
                }
            }
            Poll::Ready(Some(Err(status))) => self.observed.end(status.code()),
            Poll::Ready(None) => self.observed.end(Code::Ok),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::trace_id;

    #[test]
    fn only_well_formed_trace_ids_are_taken() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace_id(&format!("00-{id}-00f067aa0ba902b7-01")), Some(id));
        for bad in [
            "",
            "00",
            "00-short-x-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "zz-\n-\n",
        ] {
            assert_eq!(trace_id(bad), None, "{bad}");
        }
    }
}
