//! What a client holds of the limits as long as it is connected, and whether there is room for one more.
//!
//! A 503 makes nginx try the next node and counts against this one, so it is kept for what is this node's
//! own: drain, overload, bus down.

use axum::{
    http::{StatusCode, request::Parts},
    response::Response,
};
use tokio::time::Instant;

use super::{
    ConnectInfo, Node,
    address::client_address,
    error::{error_response, error_response_with_retry, retry_after},
    listen::TcpPermit,
    origin::{self, OriginAccess},
};
use skein_core::{
    limits::{Permit, address_key},
    telemetry::metrics::HandshakeResult,
};

/// What a connection holds as long as it lives, so that limits count it.
pub(super) struct ConnectionPermits {
    /// What the page it comes from is allowed.
    pub(super) allowed: OriginAccess,
    /// The address, as limits count it.
    pub(super) address: std::net::IpAddr,
    _all: Permit<()>,
    _address: Permit<std::net::IpAddr>,
    _tcp: Option<TcpPermit>,
}

impl ConnectionPermits {
    /// Takes a place for a client from a page that may, or says in HTTP why there is none.
    pub(super) fn take(
        node: &Node,
        parts: &Parts,
    ) -> Result<Self, (HandshakeResult, Box<Response>)> {
        let allowed = node.options.allowed_origins.allow(&parts.headers).map_err(|refused| {
            if let Some(suppressed) = node.state.origins_refused.should_log() {
                let origin::DeniedOrigin { origin, host } = refused;
                tracing::warn!(
                    ?origin,
                    ?host,
                    suppressed,
                    "a page was refused: its origin is neither this host nor in \
                     server.allowed_origins; does the proxy pass on the Host header?"
                );
            }
            let text = "this page's origin is not in server.allowed_origins";
            let response = error_response(StatusCode::FORBIDDEN, "forbidden", text);
            (HandshakeResult::OriginDenied, Box::new(response))
        })?;
        let unavailable = |text| {
            let (status, wait) = (StatusCode::SERVICE_UNAVAILABLE, retry_after());
            (
                HandshakeResult::Unavailable,
                Box::new(error_response_with_retry(status, "unavailable", text, wait)),
            )
        };
        if let Some(failing) = node.failing().first() {
            return Err(unavailable(match *failing {
                "drain" => "this node is stopping",
                _ => "this node cannot reach the others",
            }));
        }

        let limits = &node.options.limits;
        let peer = parts
            .extensions
            .get::<ConnectInfo>()
            .map_or([0, 0, 0, 0].into(), |ends| ends.peer.ip());
        let address = client_address(peer, &parts.headers, &node.options.trusted_proxies);
        let address = address_key(address);
        let now = Instant::now();
        let limited = |text, wait| {
            let status = StatusCode::TOO_MANY_REQUESTS;
            (
                HandshakeResult::RateLimited,
                Box::new(error_response_with_retry(status, "rate_limited", text, wait)),
            )
        };
        node.state
            .handshakes
            .take(address, limits.handshakes_per_ip, now)
            .map_err(|wait| limited("too many handshakes from this address", wait))?;
        let by_address =
            node.state.by_address.acquire(address, limits.connections_per_ip).ok_or_else(|| {
                let wait = std::time::Duration::from_secs(5);
                limited("too many connections from this address", wait)
            })?;
        node.state
            .accepts
            .take((), limits.accepts, now)
            .map_err(|_| unavailable("too many handshakes at once"))?;
        let all = node
            .state
            .all
            .acquire((), limits.connections_max)
            .ok_or_else(|| unavailable("this node is full"))?;
        let tcp = parts.extensions.get::<TcpPermit>().cloned();
        Ok(Self { allowed, address, _all: all, _address: by_address, _tcp: tcp })
    }
}
