//! Rate limits per address of requests that need no key and are no handshakes: pages, probes,
//! unknown paths, and server API calls without a valid key.
//!
//! Handshakes have their own rates (`permits`); rejected handshakes count here as well. Above its
//! rate a request waits for a moment and gets 429, and its connection is closed: the cost of a
//! flood then depends on its connections, which are limited.

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

/// Delay of the response to a request above the rate.
const PAUSE: Duration = Duration::from_millis(250);

/// Kind of requests with a rate of its own, so that a flood of one kind does not block another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RequestPool {
    /// Pages, unknown paths and rejected handshakes.
    Pages,
    /// `/health` and `/ready`.
    Probes,
    /// Server API calls without a valid key.
    Api,
}

/// Kind of a request for the purpose of its rate.
enum RequestKind {
    Plain(RequestPool),
    /// Tries to open a WebSocket or an event stream.
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

/// Passes a request to the router, or rejects it above its rate.
pub(super) async fn limit_requests(
    State(node): State<Arc<Node>>,
    request: Request,
    next: Next,
) -> Response {
    let access = node.access.load_full();
    let limits = &access.limits;
    let address = address_of(&node, &request);
    let take = |pool, rate| node.state.requests.take((address, pool), rate, Instant::now());
    match RequestKind::of(&request) {
        RequestKind::Plain(pool) => match take(pool, limits.requests_per_ip) {
            Ok(()) => next.run(request).await,
            Err(wait) => reject_above_rate(&node, address, wait).await,
        },
        RequestKind::Handshake => {
            let response = next.run(request).await;
            let is_rejected =
                !matches!(response.status(), StatusCode::SWITCHING_PROTOCOLS | StatusCode::OK);
            match is_rejected.then(|| take(RequestPool::Pages, limits.requests_per_ip)) {
                Some(Err(_)) => {
                    tokio::time::sleep(PAUSE).await;
                    closing(response)
                }
                _ => response,
            }
        }
        RequestKind::Api => match access.api.authenticate(request.headers()) {
            Ok(_) => next.run(request).await,
            Err(rejection) => match take(RequestPool::Api, limits.api_key_failures_per_ip) {
                Ok(()) => {
                    count_api_rejection(&node, address, rejection);
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
        .map_or([0, 0, 0, 0].into(), |info| info.peer.ip());
    address_key(client_address(peer, request.headers(), &node.options.trusted_proxies))
}

async fn reject_above_rate(node: &Node, address: IpAddr, wait: Duration) -> Response {
    node.metrics.http_rate_limited.inc();
    if let Some(suppressed) = node.state.requests_log.should_log() {
        tracing::warn!(%address, suppressed,
            "an address is above limits.http_requests_per_second_per_ip and gets 429");
    }
    reject(wait).await
}

fn count_api_rejection(node: &Node, address: IpAddr, rejection: ApiRejection) {
    node.metrics.api_rejections.of(rejection).inc();
    if let Some(suppressed) = node.state.api_log.should_log() {
        tracing::warn!(%address, ?rejection, suppressed,
            "a server API call was rejected because of its key");
    }
}

/// Returns 429 after a delay, and closes the connection.
async fn reject(wait: Duration) -> Response {
    tokio::time::sleep(PAUSE).await;
    let text = "too many requests from this address";
    closing(error_response_with_retry(StatusCode::TOO_MANY_REQUESTS, "rate_limited", text, wait))
}

fn closing(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}
