//! Options of traces.

use std::str::FromStr;

use http::{Uri, uri::Scheme};

use super::{
    reader::options,
    values::{Bounds, Optional},
};
use crate::otlp::{OtlpOptions, OtlpProtocol};

options! {
    /// Traces.
    TelemetrySection in "telemetry" {
        /// Collector that gets the traces by OTLP: `http://host:4318`, or for gRPC
        /// `http://host:4317`. Empty: nothing is traced.
        otlp_endpoint: Optional<OtlpEndpoint> = "";
        /// Transport to the collector: `http` or `grpc`.
        otlp_protocol: OtlpProtocol = "http", one_of &[
            ("http", OtlpProtocol::Http), ("grpc", OtlpProtocol::Grpc),
        ];
        /// Share of messages and API calls that are traced, 0 to 1. Those whose sender traces them
        /// (a `traceparent` with the flag `sampled`) are traced beside it, up to 10 a second by
        /// clients and 100 by API calls.
        sample_ratio: f64 = "0.001", within Bounds::new(0.0..=1.0, "0 to 1");
    }
}

impl TelemetrySection {
    /// The collector; `None` if nothing is traced.
    pub(super) fn otlp(self) -> Option<OtlpOptions> {
        let OtlpEndpoint(endpoint) = self.otlp_endpoint.0?;
        let (protocol, sample_ratio) = (self.otlp_protocol, self.sample_ratio);
        Some(OtlpOptions { endpoint, protocol, sample_ratio })
    }
}

/// URL of a collector, without a trailing slash.
pub(super) struct OtlpEndpoint(String);

impl FromStr for OtlpEndpoint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| "a collector is a URL such as http://host:4318")?;
        if uri.scheme() == Some(&Scheme::HTTPS) {
            return Err("https is not supported: run a collector beside the gateway and let it \
                        forward the traces");
        }
        let is_usable = uri.scheme() == Some(&Scheme::HTTP)
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && uri.query().is_none();
        if is_usable {
            Ok(Self(text.trim_end_matches('/').to_owned()))
        } else {
            Err("a collector is a URL such as http://host:4318, without user and query")
        }
    }
}
