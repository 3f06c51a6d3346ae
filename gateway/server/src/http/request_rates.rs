//! How many requests an address may make that need no key and are no handshakes: pages, probes of `/health`,
//! what is not there, and calls of the server API without a good key. Handshakes have rates of their own
//! (`places`); those that are refused count here as well.
//!
//! Above the rate a request waits for a moment, is answered 429, and its connection is closed: what a
//! flood gets done then depends on how many connections it has, and those are limited.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::Response,
};
use tokio::time::Instant;

use super::{ConnectInfo, Node, address::client_address, error::error_response_with_retry};
use skein_core::{limits::address_key, telemetry::metrics::ApiRejection};

/// How long the answer to a request above the rate waits.
const PAUSE: Duration = Duration::from_millis(250);

/// What is counted apart, so that a flood of one kind does not keep out another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RequestPool {
    /// Pages, what is not there, and refused handshakes.
    Pages,
    /// `/health` and `/ready`.
    Probes,
    /// Calls of the server API without a good key.
    Api,
}

/// What a request is, as far as its rate goes.
enum RequestKind {
    Plain(RequestPool),
    /// It opens a WebSocket or an event stream, or tries to.
    Handshake,
    Api,
}

impl RequestKind {
    fn of(request: &Request) -> Self {
        let path = request.uri().path();
        let is_get = request.method() == Method::GET;
        match path {
            "/health" | "/ready" => Self::Plain(RequestPool::Probes),
            "/sse" | "/ws" if is_get => Self::Handshake,
            _ if is_get && path.starts_with("/ws/") => Self::Handshake,
            _ if path.starts_with("/api/v1/") => Self::Api,
            _ => Self::Plain(RequestPool::Pages),
        }
    }
}

/// Lets a request through, or answers it in place of the router.
pub(super) async fn limit_requests(
    State(node): State<Arc<Node>>,
    request: Request,
    next: Next,
) -> Response {
    let limits = &node.options.limits;
    let address = address_of(&node, &request);
    let take = |pool, rate| node.state.requests.take((address, pool), rate, Instant::now());
    match RequestKind::of(&request) {
        RequestKind::Plain(pool) => match take(pool, limits.requests_per_ip) {
            Ok(()) => next.run(request).await,
            Err(wait) => reject_above_rate(&node, address, wait).await,
        },
        RequestKind::Handshake => {
            let response = next.run(request).await;
            let is_refused =
                !matches!(response.status(), StatusCode::SWITCHING_PROTOCOLS | StatusCode::OK);
            match is_refused.then(|| take(RequestPool::Pages, limits.requests_per_ip)) {
                Some(Err(_)) => {
                    tokio::time::sleep(PAUSE).await;
                    closing(response)
                }
                _ => response,
            }
        }
        RequestKind::Api => match node.options.api.authenticate(request.headers()) {
            Ok(_) => next.run(request).await,
            Err(refusal) => match take(RequestPool::Api, limits.api_key_failures_per_ip) {
                Ok(()) => {
                    count_api_rejection(&node, address, refusal);
                    next.run(request).await
                }
                Err(wait) => {
                    count_api_rejection(&node, address, ApiRejection::RateLimited);
                    reject(wait).await
                }
            },
        },
    }
}

fn address_of(node: &Node, request: &Request) -> IpAddr {
    let peer = request
        .extensions()
        .get::<ConnectInfo>()
        .map_or([0, 0, 0, 0].into(), |ends| ends.peer.ip());
    address_key(client_address(peer, request.headers(), &node.options.trusted_proxies))
}

async fn reject_above_rate(node: &Node, address: IpAddr, wait: Duration) -> Response {
    node.metrics.http_rate_limited.inc();
    if let Some(suppressed) = node.state.requests_log.should_log() {
        tracing::warn!(%address, suppressed, "an address makes too many HTTP requests and is answered 429; \
            `suppressed` more were not logged since the last line");
    }
    reject(wait).await
}

fn count_api_rejection(node: &Node, address: IpAddr, refusal: ApiRejection) {
    node.metrics.api_rejections.of(refusal).inc();
    if let Some(suppressed) = node.state.api_log.should_log() {
        tracing::warn!(%address, ?refusal, suppressed, "a call of the server API was refused for its key; \
            `suppressed` more were not logged since the last line");
    }
}

/// 429 after a moment, and the end of the connection.
async fn reject(wait: Duration) -> Response {
    tokio::time::sleep(PAUSE).await;
    let text = "too many requests from this address";
    closing(error_response_with_retry(StatusCode::TOO_MANY_REQUESTS, "rate_limited", text, wait))
}

fn closing(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}
