//! The echo endpoint: one connection sends a message and waits for its echo.

use std::{net::SocketAddr, time::Duration};

use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::{
    client::{BlockingClient, ClientError},
    clients::{BenchTimes, histogram},
    rows::CONTENT_BYTES,
};
use crate::timestamp::SendTimestamp;

/// Result of a measurement.
pub(crate) struct EchoResult<T> {
    /// Values of `snapshot` at the beginning and at the end of the measurement.
    pub(crate) snapshots: (T, T),
    pub(crate) round_trips_ns: Histogram<u64>,
}

/// Measures round trips. `snapshot` is read before and after the measurement.
pub(crate) fn echo<T, E: From<ClientError>>(
    address: SocketAddr,
    times: BenchTimes,
    snapshot: impl Fn() -> Result<T, E>,
) -> Result<EchoResult<T>, E> {
    let mut client = BlockingClient::connect(address, "/ws/echo")?;
    let began = Instant::now();
    while began.elapsed() < times.warm_up {
        round_trip(&mut client)?;
    }
    let mut round_trips_ns = histogram();
    let before = snapshot()?;
    let began = Instant::now();
    while began.elapsed() < times.measured {
        let took = round_trip(&mut client)?;
        round_trips_ns.saturating_record(took.as_nanos() as u64);
    }
    Ok(EchoResult { snapshots: (before, snapshot()?), round_trips_ns })
}

fn round_trip(client: &mut BlockingClient) -> Result<Duration, ClientError> {
    let began = Instant::now();
    client.send_text(&SendTimestamp { sender: 0, due_ns: 0 }.content(CONTENT_BYTES))?;
    client.wait_until("the echo", |message| SendTimestamp::find(message).is_some())?;
    Ok(began.elapsed())
}
