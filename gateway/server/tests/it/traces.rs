//! Traces in a real OTLP receiver: the services that `opentelemetry-proto` generates, which decode
//! what the gateways send over HTTP and gRPC.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Bytes, extract::State, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value},
    trace::v1::{Span, status::StatusCode},
};
use parking_lot::Mutex;
use prost::Message as _;
use serde_json::{Value, json};
use skein_client::connection::ClientConnection;
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tonic::{Request, Response, Status, transport::Server};

use crate::{
    api::{self, KEY},
    harness::{
        Gateway, Nginx, Node, Redis, free_port, get, http_raw, next_message, room, say, until,
        within,
    },
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// A span as the receiver has decoded it, with the node that sent it.
#[derive(Clone, Debug)]
struct ReceivedSpan {
    node: String,
    trace: String,
    id: String,
    parent: String,
    name: String,
    links: Vec<(String, String)>,
    attributes: BTreeMap<String, Value>,
    nanos: u64,
    failed: bool,
}

type Spans = Arc<Mutex<Vec<ReceivedSpan>>>;

/// An OTLP receiver over HTTP or gRPC.
struct Receiver {
    url: String,
    spans: Spans,
    task: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, Value> {
    let value = |attribute: &KeyValue| match attribute.value.clone()?.value? {
        any_value::Value::StringValue(text) => Some(json!(text)),
        any_value::Value::IntValue(number) => Some(json!(number)),
        any_value::Value::BoolValue(is_true) => Some(json!(is_true)),
        _ => None,
    };
    let pair = |attribute: &KeyValue| Some((attribute.key.clone(), value(attribute)?));
    attributes.iter().filter_map(pair).collect()
}

fn receive(request: ExportTraceServiceRequest, spans: &Spans) {
    for resource_spans in request.resource_spans {
        let resource = attributes(&resource_spans.resource.unwrap().attributes);
        assert_eq!(resource["service.name"], "skein-gateway");
        assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
        let node = resource["service.instance.id"].as_str().unwrap().to_owned();
        for span in resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.lock().push(ReceivedSpan::of(node.clone(), span));
        }
    }
}

impl ReceivedSpan {
    fn of(node: String, span: Span) -> Self {
        let link = |(trace, span): (&[u8], &[u8])| (hex(trace), hex(span));
        Self {
            node,
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            name: span.name,
            links: span.links.iter().map(|to| link((&to.trace_id, &to.span_id))).collect(),
            attributes: attributes(&span.attributes),
            nanos: span.end_time_unix_nano - span.start_time_unix_nano,
            failed: span.status.is_some_and(|status| status.code() == StatusCode::Error),
        }
    }
}

struct GrpcReceiver(Spans);

#[tonic::async_trait]
impl TraceService for GrpcReceiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        receive(request.into_inner(), &self.0);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    async fn http() -> Self {
        async fn export(State(spans): State<Spans>, body: Bytes) -> Vec<u8> {
            receive(ExportTraceServiceRequest::decode(body).unwrap(), &spans);
            ExportTraceServiceResponse::default().encode_to_vec()
        }
        let spans = Spans::default();
        let router = Router::new().route("/v1/traces", post(export)).with_state(spans.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, spans, task }
    }

    async fn grpc() -> Self {
        let (spans, port) = (Spans::default(), free_port());
        let service = TraceServiceServer::new(GrpcReceiver(spans.clone()));
        let serve = Server::builder().add_service(service).serve(([127, 0, 0, 1], port).into());
        let task = tokio::spawn(async move { serve.await.unwrap() });
        let url = format!("http://127.0.0.1:{port}");
        until("the receiver listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self { url, spans, task }
    }

    /// The spans received, once there are `count` that `select` takes.
    async fn wait_for(
        &self,
        count: usize,
        select: impl Fn(&ReceivedSpan) -> bool,
    ) -> Vec<ReceivedSpan> {
        let selected = || -> Vec<_> {
            self.spans.lock().iter().filter(|span| select(span)).cloned().collect()
        };
        until(&format!("{count} spans"), async || selected().len() >= count).await;
        selected()
    }
}

/// Spans as lines, by time of arrival.
fn list(spans: &[ReceivedSpan]) -> String {
    let line = |span: &ReceivedSpan| {
        let ReceivedSpan { node, trace, id, parent, name, links, attributes, nanos, .. } = span;
        let links: Vec<_> = links.iter().map(|(_, span)| span).collect();
        format!(
            "{trace} {id} parent={parent:16} {node} {name:38} {:>6} µs links={links:?} {}\n",
            nanos / 1000,
            json!(attributes)
        )
    };
    spans.iter().map(line).collect()
}

fn options<'a>(receiver: &'a str, ratio: &'a str, node: &'a str) -> Vec<(&'a str, &'a str)> {
    let own = [
        ("telemetry.otlp_endpoint", receiver),
        ("telemetry.sample_ratio", ratio),
        ("node.id", node),
    ];
    [&api::OPTIONS[..], &own].concat()
}

/// Publishes by the API, with a `traceparent` and a request id.
async fn publish(address: SocketAddr, traceparent: &str, text: &str) -> crate::harness::Http {
    let body = json!({ "content": text }).to_string();
    let request = format!(
        "POST /api/v1/rooms/r/messages HTTP/1.1\r\nHost: {address}\r\n\
         Authorization: Bearer {KEY}\r\ntraceparent: {traceparent}\r\nX-Request-ID: req-7\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    http_raw(address, &request).await
}

/// The value of a counter with this name and these labels.
async fn counter(admin: SocketAddr, name: &str) -> u64 {
    let metrics = get(admin, "/metrics").await.body;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

async fn members(nodes: &[&Gateway]) -> Vec<ClientConnection> {
    let mut members = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let mut member = node.connect(&format!("user{index}")).await;
        member.join(&room("r")).await.unwrap();
        members.push(member);
    }
    members
}

/// Checks the spans of one message that `n0` published and that has members on both nodes.
fn check_trace(spans: &[ReceivedSpan], publish_parent: &str) {
    let listed = list(spans);
    let one = |name: &str, node: &str| {
        let mut found = spans.iter().filter(|span| span.name == name && span.node == node);
        let span = found.next().unwrap_or_else(|| panic!("no {name} of {node}:\n{listed}"));
        assert!(found.next().is_none(), "{listed}");
        span.clone()
    };
    let (publish, append) = (one("publish", "n0"), one("append", "n0"));
    assert_eq!(publish.parent, publish_parent, "{listed}");
    assert_eq!(append.parent, publish.id, "{listed}");
    assert_eq!(append.attributes["db.system.name"], "redis");
    assert!(append.nanos <= publish.nanos, "{listed}");
    for node in ["n0", "n1"] {
        let deliver = one("deliver", node);
        // Linked, and no child: a fan-out has as many causes as it has nodes.
        assert_eq!((deliver.trace, deliver.parent), (publish.trace.clone(), String::new()));
        assert_eq!(deliver.links, [(publish.trace.clone(), publish.id.clone())], "{listed}");
        assert_eq!(deliver.attributes["skein.queued"], 1, "{listed}");
        assert_eq!(deliver.attributes["skein.seq"], publish.attributes["skein.seq"]);
    }
    assert!(spans.iter().all(|span| !span.failed), "{listed}");
    // No content is in a trace.
    assert!(!listed.contains("secret"), "{listed}");
    println!("{listed}");
}

#[tokio::test]
async fn a_message_is_one_trace_across_two_nodes() {
    let redis = Redis::start().await;
    for (receiver, protocol) in [(Receiver::http().await, "http"), (Receiver::grpc().await, "grpc")]
    {
        let mut nodes = Vec::new();
        for node in ["n0", "n1"] {
            let options = options(&receiver.url, "1", node);
            let protocol = [("telemetry.otlp_protocol", protocol)];
            nodes.push(Gateway::start_on(&redis, &[&options[..], &protocol].concat()).await);
        }
        let mut members = members(&[&nodes[0], &nodes[1]]).await;
        say(&mut members[0], &room("r"), "secret").await;
        for member in &mut members {
            next_message(member).await;
        }
        let spans = receiver.wait_for(4, |_| true).await;
        println!("{protocol}: a message of a client");
        check_trace(&spans, "");
        for node in nodes {
            node.stop().await;
        }
        assert_eq!(receiver.spans.lock().len(), 4);
    }
}

#[tokio::test]
async fn a_trace_continues_from_an_api_call_and_from_a_frame() {
    let (redis, receiver) = (Redis::start().await, Receiver::http().await);
    // Nothing is traced but what a caller traces.
    let n0 = Gateway::start_on(&redis, &options(&receiver.url, "0", "n0")).await;
    let n1 = Gateway::start_on(&redis, &options(&receiver.url, "0", "n1")).await;
    let mut members = members(&[&n0, &n1]).await;

    let sent = publish(n0.address, UNSAMPLED, "secret").await;
    assert_eq!((sent.status, sent.header("x-request-id")), (201, Some("req-7")));
    assert_eq!(publish(n0.address, SAMPLED, "secret").await.status, 201);
    for _ in 0..2 {
        next_message(&mut members[1]).await;
    }
    let spans = receiver.wait_for(5, |span| span.trace == TRACE).await;
    let call = spans.iter().find(|span| span.name.starts_with("POST")).unwrap();
    assert_eq!(call.name, "POST /api/v1/rooms/{room}/messages");
    assert_eq!((call.parent.as_str(), call.node.as_str()), (CALLER, "n0"));
    assert_eq!(call.attributes["http.response.status_code"], 201);
    assert_eq!(call.attributes["skein.request_id"], "req-7");
    assert_eq!(call.attributes["skein.api_key"], "test");
    println!("a message of an API call");
    check_trace(&spans, &call.id);

    receiver.spans.lock().clear();
    let frame = |traceparent: &Value| {
        let frame = json!({"type": "message", "room": "r", "content": "secret", "ref": "t",
            "traceparent": traceparent});
        frame.to_string()
    };
    for traceparent in [json!(UNSAMPLED), json!("nonsense"), json!(7), json!(SAMPLED)] {
        members[0].send_text(&frame(&traceparent)).await.unwrap();
    }
    for _ in 0..4 {
        let message = next_message(&mut members[1]).await;
        let frame = serde_json::to_string(&message).unwrap();
        assert!(!frame.contains("traceparent"), "{frame}");
    }
    let spans = receiver.wait_for(4, |_| true).await;
    println!("a message of a client that traces it");
    check_trace(&spans, CALLER);
    // Messages that were not sampled are not there.
    n0.stop().await;
    n1.stop().await;
    assert_eq!(receiver.spans.lock().len(), 4);
}

#[tokio::test]
async fn the_share_of_traced_messages_is_the_ratio() {
    const MESSAGES: usize = 2_000;
    let receiver = Receiver::http().await;
    let rates = [("limits.messages_per_second", "0")];
    let options = [&options(&receiver.url, "0.1", "n0")[..], &rates].concat();
    let gateway = Gateway::start(&options).await;
    let mut members = members(&[&gateway]).await;
    for _ in 0..MESSAGES {
        say(&mut members[0], &room("r"), "x").await;
    }
    let admin = gateway.admin;
    let exported = r#"gateway_trace_spans_total{result="exported"}"#;
    until("spans are exported", async || counter(admin, exported).await > 0).await;
    gateway.stop().await;
    let spans = receiver.spans.lock();
    let published = spans.iter().filter(|span| span.name == "publish").count();
    let delivered = spans.iter().filter(|span| span.name == "deliver").count();
    assert!((120..280).contains(&published), "{published} of {MESSAGES}");
    assert_eq!(published, delivered);
}

/// Sends messages while nothing takes their traces. All are acknowledged.
async fn messages_go_on(endpoint: &str, protocol: &str) {
    const MESSAGES: usize = 3_000;
    let rates = [("limits.messages_per_second", "0"), ("telemetry.otlp_protocol", protocol)];
    let options = [&options(endpoint, "1", "n0")[..], &rates].concat();
    let gateway = Gateway::start(&options).await;
    let mut members = members(&[&gateway]).await;
    for _ in 0..MESSAGES {
        say(&mut members[0], &room("r"), "x").await;
    }
    let admin = gateway.admin;
    let failed = r#"gateway_trace_spans_total{result="failed"}"#;
    until("an export fails", async || counter(admin, failed).await > 0).await;
    let dropped = counter(admin, r#"gateway_trace_spans_total{result="dropped"}"#).await;
    assert!(dropped > 1_000, "{dropped}");
    assert_eq!(counter(admin, r#"gateway_trace_spans_total{result="exported"}"#).await, 0);
    drop(members);
    let since = Instant::now();
    gateway.stop().await;
    println!("{protocol}: {dropped} spans dropped; stopped within {:?}", since.elapsed());
    // The flush has a second; the rest is the patience of a busy machine.
    assert!(since.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn messages_go_on_while_the_collector_is_dead() {
    for protocol in ["http", "grpc"] {
        messages_go_on(&format!("http://127.0.0.1:{}", free_port()), protocol).await;
    }
}

#[tokio::test]
async fn messages_go_on_while_the_collector_never_answers() {
    // The kernel accepts the connections.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    for protocol in ["http", "grpc"] {
        messages_go_on(&endpoint, protocol).await;
    }
}

#[tokio::test]
async fn nginx_keeps_the_id_of_a_request() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &api::OPTIONS).await;
    let nginx = Nginx::start(&[node.address]).await;
    let call = |id: &str| {
        let address = nginx.address;
        let request = format!(
            "GET /api/v1/online HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {KEY}\r\n{id}\
             Connection: close\r\n\r\n"
        );
        async move { http_raw(address, &request).await }
    };
    let kept = within(call("X-Request-ID: from-the-edge\r\n")).await;
    assert_eq!((kept.status, kept.header("x-request-id")), (200, Some("from-the-edge")));
    // nginx gives an id to requests without one.
    let given = within(call("")).await;
    assert_eq!(given.header("x-request-id").map(str::len), Some(32), "{}", given.head);
}
