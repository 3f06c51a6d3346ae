//! Options of the listeners, of this node and of its log.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use ipnet::IpNet;
use rand::{RngExt as _, distr::Alphanumeric};
use skein_core::telemetry::LogFormat;
use skein_protocol::ids::NodeId;
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::{
    reader::{OptionReader, options},
    values::{CommaList, Optional},
};
use crate::{http::origin::AllowedOrigins, transport::echo::EchoMode};

options! {
    /// The listener for clients.
    ServerSection in "server" {
        /// Address and port that clients connect to.
        listen: SocketAddr = "127.0.0.1:8080";
        /// Origins of web pages that may connect, besides the gateway's own: `https://app.example`;
        /// `https://*.app.example` for all hosts below a name; `null` for pages without an origin;
        /// `*` for any. Cookies of pages that only `null` or `*` allows are ignored.
        allowed_origins: CommaList<String> = "";
        /// Networks of proxies whose `X-Forwarded-For` is trusted, such as `10.0.0.0/8`.
        trusted_proxies: CommaList<ProxyNet> = "";
        /// Reply of `/ws/echo`: `prefix`, `verbatim` (for conformance suites) or `off`.
        echo: EchoMode = "prefix", one_of &[
            ("prefix", EchoMode::Prefix), ("verbatim", EchoMode::Verbatim), ("off", EchoMode::Off),
        ];
    }
}

options! {
    /// The listener for operators.
    AdminSection in "admin" {
        /// Address and port for metrics and health checks. Must not be reachable from the internet.
        listen: SocketAddr = "127.0.0.1:9100";
    }
}

options! {
    /// Exported metrics.
    MetricsSection in "metrics" {
        /// Whether `/metrics` also exports renamed metrics under their former names, labels and
        /// label values, for one release.
        legacy_names: bool = "false";
    }
}

options! {
    /// This node.
    NodeSection in "node" {
        /// Name of this node, unique in the cluster. Empty: the host name and 4 random characters.
        id: Optional<NodeId> = "";
    }
}

options! {
    /// Log lines.
    LogSection in "log" {
        /// Format of log lines: `text` or `json`.
        format: LogFormat = "text", one_of &[("text", LogFormat::Text), ("json", LogFormat::Json)];
        /// Level of log lines: `error`, `warn`, `info`, `debug`, `trace` or `off`, or directives
        /// such as `info,skein_redis=debug`.
        level: LogFilter = "info";
    }
}

impl ServerSection {
    /// The pages that may connect.
    pub(super) fn origins(&self, reader: &mut OptionReader) -> AllowedOrigins {
        let entries = self.allowed_origins.0.iter().map(String::as_str);
        AllowedOrigins::parse(entries).unwrap_or_else(|error| {
            reader.error("server.allowed_origins", error.to_string());
            AllowedOrigins::default()
        })
    }

    /// The networks of trusted proxies.
    pub(super) fn proxies(self) -> Vec<IpNet> {
        self.trusted_proxies.0.into_iter().map(|ProxyNet(net)| net).collect()
    }
}

impl AdminSection {
    /// Checks that both listeners can be bound.
    pub(super) fn check(&self, server: &ServerSection, reader: &mut OptionReader) {
        let (own, other) = (self.listen, server.listen);
        let share_an_address =
            own.ip() == other.ip() || own.ip().is_unspecified() || other.ip().is_unspecified();
        if other.port() != 0 && other.port() == own.port() && share_an_address {
            let text =
                format!("`{own}` conflicts with server.listen (`{other}`): use another port");
            reader.error("admin.listen", text);
        }
    }
}

impl NodeSection {
    /// The name of this node.
    pub(super) fn name(self) -> NodeId {
        self.id.0.unwrap_or_else(default_node_id)
    }
}

/// Returns the host name and four random characters.
fn default_node_id() -> NodeId {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '-' })
        .take(59)
        .collect();
    let host = if host.is_empty() { "node".to_owned() } else { host };
    let random: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(4)
        .map(|letter| char::from(letter).to_ascii_lowercase())
        .collect();
    format!("{host}-{random}").parse().expect("it consists of allowed characters")
}

/// Level or directives of the log. Exactly one directive must be a level for all other modules: a
/// mistyped level would parse as the name of a module, and silence everything else.
pub(super) struct LogFilter(pub(super) String);

impl FromStr for LogFilter {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const USAGE: &str = "a level is error, warn, info, debug, trace or off; directives are one \
             level for everything and further levels for modules, as `info,skein_redis=debug`";
        let is_level = |text: &str| text.parse::<LevelFilter>().is_ok();
        let (mut levels, mut is_usable) = (0, true);
        for directive in text.split(',').map(str::trim) {
            match directive.split_once('=') {
                Some((module, level)) => is_usable &= !module.is_empty() && is_level(level),
                None if is_level(directive) => levels += 1,
                None => is_usable = false,
            }
        }
        let is_usable = is_usable && levels == 1 && text.parse::<Targets>().is_ok();
        if is_usable { Ok(Self(text.to_owned())) } else { Err(USAGE) }
    }
}

/// Network of trusted proxies.
pub(super) struct ProxyNet(IpNet);

impl FromStr for ProxyNet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A single address is a network of one host.
        let net = match text.parse::<IpAddr>() {
            Ok(address) => Ok(IpNet::from(address)),
            Err(_) => text.parse::<IpNet>(),
        };
        let net = net.map_err(|error| format!("{error}; write a network as 10.0.0.0/8"))?;
        if net.prefix_len() == 0 {
            return Err("trusts every address, so that any client can forge its own: list only \
                        the networks of the proxies"
                .to_owned());
        }
        Ok(Self(net))
    }
}
