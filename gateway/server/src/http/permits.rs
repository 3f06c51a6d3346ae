//! Admission of a handshake: origin, state of the node, rates and connection limits.
//!
//! nginx answers a 503 by trying the next node, and counts it against this one. A 503 is therefore
//! only for conditions of this node: drain, overload, bus down.

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
    telemetry::{metrics::HandshakeRefusal, top::InputCounts},
};

/// Shares of the limits that a connection holds while it is open.
pub(super) struct ConnectionPermits {
    /// Rights of the web page that opened the connection.
    pub(super) allowed: OriginAccess,
    /// Client address in the form that limits count (IPv6: the /64).
    pub(super) address: std::net::IpAddr,
    _all: Permit<()>,
    _address: Permit<std::net::IpAddr>,
    _tcp: Option<TcpPermit>,
}

impl ConnectionPermits {
    /// Checks the origin, the node and all limits, and takes the permits of a connection.
    ///
    /// # Errors
    ///
    /// The cause for the metrics and the error response.
    pub(super) fn take(
        node: &Node,
        parts: &Parts,
    ) -> Result<Self, (HandshakeRefusal, Box<Response>)> {
        let access = node.access.load();
        let allowed = access.allowed_origins.allow(&parts.headers).map_err(|denied| {
            if let Some(suppressed) = node.state.denied_origins_log.should_log() {
                let origin::DeniedOrigin { origin, host } = denied;
                tracing::warn!(
                    ?origin,
                    ?host,
                    suppressed,
                    "denied a handshake from another origin: add the origin to \
                     server.allowed_origins, or, if it is the gateway's own, make the proxy pass \
                     the Host header on"
                );
            }
            let text = "the origin of this page is not in server.allowed_origins";
            let response = error_response(StatusCode::FORBIDDEN, "forbidden", text);
            (HandshakeRefusal::Origin, Box::new(response))
        })?;
        let unavailable = |cause, text| {
            let (status, wait) = (StatusCode::SERVICE_UNAVAILABLE, retry_after());
            (cause, Box::new(error_response_with_retry(status, "unavailable", text, wait)))
        };
        if let Some(check) = node.failed_checks().first() {
            let (cause, text) = match *check {
                "drain" => (HandshakeRefusal::Draining, "this node is stopping"),
                "bus" => (HandshakeRefusal::Bus, "this node has no connection to the bus"),
                _ => (HandshakeRefusal::NotReady, "this node is not ready: see /ready"),
            };
            return Err(unavailable(cause, text));
        }

        let limits = &access.limits;
        let peer = parts
            .extensions
            .get::<ConnectInfo>()
            .map_or([0, 0, 0, 0].into(), |info| info.peer.ip());
        let address = client_address(peer, &parts.headers, &node.options.trusted_proxies);
        let address = address_key(address);
        let now = Instant::now();
        let limited = |cause, text, wait| {
            let refused = InputCounts { refusals: 1, ..InputCounts::default() };
            node.metrics.senders.record(None, Some(address), refused, now);
            let status = StatusCode::TOO_MANY_REQUESTS;
            (cause, Box::new(error_response_with_retry(status, "rate_limited", text, wait)))
        };
        node.state.handshakes.take(address, limits.handshakes_per_ip, now).map_err(|wait| {
            let text = "too many handshakes from this address";
            limited(HandshakeRefusal::HandshakeRate, text, wait)
        })?;
        let by_address =
            node.state.by_address.acquire(address, limits.connections_per_ip).ok_or_else(|| {
                let wait = std::time::Duration::from_secs(5);
                let text = "too many connections from this address";
                limited(HandshakeRefusal::ConnectionsPerIp, text, wait)
            })?;
        node.state.accepts.take((), limits.accepts, now).map_err(|_| {
            unavailable(HandshakeRefusal::AcceptRate, "too many handshakes at once")
        })?;
        let all = node
            .state
            .all
            .acquire((), limits.connections_max)
            .ok_or_else(|| unavailable(HandshakeRefusal::Full, "this node is full"))?;
        let tcp = parts.extensions.get::<TcpPermit>().cloned();
        Ok(Self { allowed, address, _all: all, _address: by_address, _tcp: tcp })
    }
}
