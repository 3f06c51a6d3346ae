//! Log lines about clients: connected, disconnected, refused.
//!
//! One client causes few of them, a deploy thousands in a second. Above a rate lines are left out;
//! the next line has their number (`suppressed`), and the metrics count all.

use std::net::IpAddr;

use axum::http::StatusCode;
use skein_core::{
    connection::handle::ConnectionHandle,
    telemetry::{
        log_limiter::LogLimiter,
        metrics::{HandshakeRefusal, Label as _},
    },
};
use tokio::time::Instant;

use super::handshake::AdmissionError;
use crate::transport::ConnectionEnd;

/// Lines per second about clients that connect, and as many about those that disconnect.
const LINES_PER_SECOND_MAX: u32 = 20;

/// The rates of the lines of a node.
pub(super) struct ConnectionLog {
    opened: LogLimiter,
    closed: LogLimiter,
    /// One per cause.
    refused: [LogLimiter; HandshakeRefusal::ALL.len()],
    unauthenticated: LogLimiter,
    not_admitted: LogLimiter,
}

impl Default for ConnectionLog {
    fn default() -> Self {
        let per_second = || LogLimiter::per_second(LINES_PER_SECOND_MAX);
        Self {
            opened: per_second(),
            closed: per_second(),
            refused: [const { LogLimiter::new() }; HandshakeRefusal::ALL.len()],
            unauthenticated: LogLimiter::new(),
            not_admitted: LogLimiter::new(),
        }
    }
}

/// A client as it has connected.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenedConnection<'a> {
    /// `websocket` or `sse`.
    pub(super) transport: &'static str,
    /// Whether the client has resumed its session.
    pub(super) resumed: bool,
    /// `X-Request-ID` of its handshake.
    pub(super) request_id: Option<&'a str>,
}

impl ConnectionLog {
    /// Logs that a client has connected. A diagnostic connection has no user and no line.
    pub(super) fn opened(&self, handle: &ConnectionHandle, opened: OpenedConnection<'_>) {
        let Some(owner) = handle.owner() else { return };
        let OpenedConnection { transport, resumed, request_id } = opened;
        if let Some(suppressed) = self.opened.should_log() {
            tracing::info!(
                connection = %handle.connection,
                user = %owner.user,
                address = %owner.about.address,
                transport,
                resumed,
                request_id,
                suppressed,
                "client connected"
            );
        }
    }

    /// Logs that a client that connected at `since` has disconnected.
    pub(super) fn closed(
        &self,
        handle: &ConnectionHandle,
        since: Instant,
        received: u32,
        end: &ConnectionEnd,
    ) {
        let Some(owner) = handle.owner() else { return };
        if let Some(suppressed) = self.closed.should_log() {
            tracing::info!(
                connection = %handle.connection,
                user = %owner.user,
                address = %owner.about.address,
                code = end.code,
                // A client chooses its own: quoted, so that it cannot forge a line.
                reason = ?end.reason,
                side = end.side.text(),
                seconds = since.elapsed().as_secs(),
                frames_in = received,
                frames_out = handle.outbox.sent(),
                suppressed,
                "client disconnected"
            );
        }
    }

    /// Logs a handshake that was answered by an HTTP error.
    pub(super) fn refused(&self, cause: HandshakeRefusal, address: IpAddr, status: StatusCode) {
        if let Some(suppressed) = self.refused[cause as usize].should_log() {
            let (cause, status) = (cause.text(), status.as_u16());
            tracing::info!(cause, %address, status, suppressed, "handshake refused");
        }
    }

    /// Logs a client that was refused because of its identity or its number of connections.
    pub(super) fn not_admitted(&self, error: &AdmissionError, address: IpAddr) {
        let limiter = match error {
            AdmissionError::Unauthenticated(_) => &self.unauthenticated,
            AdmissionError::TooManyConnections | AdmissionError::Unavailable => &self.not_admitted,
        };
        if let Some(suppressed) = limiter.should_log() {
            let (code, reason) = error.close();
            tracing::info!(%address, code = code.number(), reason, suppressed, "client not admitted");
        }
    }
}
