//! Parses `cluster.redis_url`: the servers, their topology, and the login.
//!
//! ```text
//! redis[s]://[user:password@]host[:port][/db]
//! redis[s]+sentinel://[user:password@]host[:port],…/primary[/db][?option=value&…]
//! redis[s]+cluster://[user:password@]host[:port],…
//! unix:///path/to/socket[?db=…&user=…&pass=…]
//! ```
//!
//! Pure: opens no connection. Each error says what is wrong and what to write.

use std::{fmt, str::FromStr};

use percent_encoding::percent_decode_str;

/// The default port of Redis.
const REDIS_PORT: u16 = 6379;
/// The default port of Sentinels.
const SENTINEL_PORT: u16 = 26_379;

/// How to reach the servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisUrl {
    /// One server on a Unix socket.
    Socket(SocketUrl),
    /// One server at one address.
    Single(ServerAddresses),
    /// A primary that Sentinels name.
    Sentinel {
        /// The Sentinels' addresses; login and database are the primary's.
        servers: ServerAddresses,
        /// The Sentinels' name of the primary.
        primary: String,
        /// The login for the Sentinels.
        login: Login,
    },
    /// Several primaries, each with a share of the slots.
    Cluster(ServerAddresses),
}

/// Addresses and their common parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAddresses {
    /// At least one address.
    pub addresses: Vec<Address>,
    /// Whether connections use TLS.
    pub tls: bool,
    /// The login.
    pub login: Login,
    /// The number of the database.
    pub db: i64,
}

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// A name or an IP address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// The URL of a Unix socket, which may have a password.
#[derive(Clone, PartialEq, Eq)]
pub struct SocketUrl(pub String);

/// User and password, if required.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Login {
    /// An ACL user; the default user if absent.
    pub user: Option<String>,
    /// The password.
    pub password: Option<String>,
}

/// An error in the URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Unknown scheme.
    #[error(
        "unknown scheme: begin with redis://, redis+sentinel:// or redis+cluster:// (rediss:// and so on \
         for TLS), or unix:///"
    )]
    Scheme,
    /// No address.
    #[error("no host: write one behind :// or @, as in redis://127.0.0.1:6379")]
    Host,
    /// Several addresses where one is expected.
    #[error(
        "several hosts: write redis+sentinel:// if they are Sentinels, redis+cluster:// if they are a \
         Redis Cluster"
    )]
    Hosts,
    /// An invalid port, which is not repeated, since it may be part of the password.
    #[error(
        "a port is not a number from 1 to 65535; in a user name or password write / as %2F, ? as \
         %3F, # as %23, @ as %40, % as %25"
    )]
    Port,
    /// No name of the primary.
    #[error(
        "no name of the primary: write the Sentinels' name of it behind the hosts, as in \
         redis+sentinel://s1,s2,s3/mymaster"
    )]
    Primary,
    /// The database, which is repeated unless it may be part of the password, is not a number.
    #[error("`{0}` is not the number of a database")]
    Db(String),
    /// A database other than 0 in a Redis Cluster.
    #[error("a Redis Cluster has no databases: write nothing behind the hosts")]
    ClusterDb,
    /// An unknown part behind `?` or `#`.
    #[error("unknown option `{option}`: {known}")]
    Option {
        /// The option, without its value, which may be a password.
        option: String,
        /// The known options.
        known: &'static str,
    },
    /// An invalid `%` escape.
    #[error("two hexadecimal digits must follow a %: write % itself as %25")]
    Escape,
}

impl RedisUrl {
    /// Whether connections use TLS.
    pub fn has_tls(&self) -> bool {
        match self {
            Self::Socket(_) => false,
            Self::Single(servers) | Self::Sentinel { servers, .. } | Self::Cluster(servers) => {
                servers.tls
            }
        }
    }
}

impl FromStr for RedisUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
        let (family, kind) = scheme.split_once('+').unwrap_or((scheme, ""));
        let tls = match family {
            "redis" | "valkey" => false,
            "rediss" | "valkeys" => true,
            "unix" if kind.is_empty() => return Ok(Self::Socket(SocketUrl(text.to_owned()))),
            _ => return Err(UrlError::Scheme),
        };
        match kind {
            "unix" if !tls => Ok(Self::Socket(SocketUrl(text.to_owned()))),
            "" => single(rest, tls),
            "sentinel" => sentinel(rest, tls),
            "cluster" => cluster(rest, tls),
            _ => Err(UrlError::Scheme),
        }
    }
}

fn single(rest: &str, tls: bool) -> Result<RedisUrl, UrlError> {
    let parts = UrlParts::of(rest, REDIS_PORT)?;
    parts.has_no_options("such a URL has no options")?;
    if parts.addresses.len() > 1 {
        return Err(UrlError::Hosts);
    }
    let db = parts.path.first().map_or(Ok(0), |db| database(db))?;
    let UrlParts { addresses, login, .. } = parts;
    Ok(RedisUrl::Single(ServerAddresses { addresses, tls, login, db }))
}

fn cluster(rest: &str, tls: bool) -> Result<RedisUrl, UrlError> {
    let parts = UrlParts::of(rest, REDIS_PORT)?;
    parts.has_no_options("such a URL has no options")?;
    if parts.path.iter().any(|db| db != "0") {
        return Err(UrlError::ClusterDb);
    }
    let UrlParts { addresses, login, .. } = parts;
    Ok(RedisUrl::Cluster(ServerAddresses { addresses, tls, login, db: 0 }))
}

fn sentinel(rest: &str, mut tls: bool) -> Result<RedisUrl, UrlError> {
    let parts = UrlParts::of(rest, SENTINEL_PORT)?;
    let mut path = parts.path.into_iter();
    let primary = path.next().ok_or(UrlError::Primary)?;
    let mut db = path.next().map_or(Ok(0), |db| database(&db))?;
    let mut sentinels = Login::default();
    for (name, value) in parts.options {
        match (name.as_str(), value) {
            ("db", value) => db = database(&value)?,
            ("tls", value) if value == "true" => tls = true,
            ("tls", value) if value == "false" && !tls => {}
            ("sentinel_user", value) => sentinels.user = Some(value),
            ("sentinel_password", value) => sentinels.password = Some(value),
            (name, _) => {
                return Err(UrlError::Option {
                    option: name.to_owned(),
                    known: "the options are db, tls=true, sentinel_user and sentinel_password",
                });
            }
        }
    }
    let servers = ServerAddresses { addresses: parts.addresses, tls, login: parts.login, db };
    Ok(RedisUrl::Sentinel { servers, primary, login: sentinels })
}

/// The parts behind `://`.
struct UrlParts {
    login: Login,
    addresses: Vec<Address>,
    /// The parts between slashes.
    path: Vec<String>,
    options: Vec<(String, String)>,
}

impl UrlParts {
    fn of(rest: &str, port: u16) -> Result<Self, UrlError> {
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        // An option has no @ in its name: it is behind a password with a ? in it.
        if query
            .split('&')
            .any(|option| option.split('=').next().is_some_and(|name| name.contains('@')))
        {
            return Err(UrlError::Port);
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // The last one: an @ in a password is common, in a host impossible.
        let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        if !fragment.is_empty() {
            let known = "such a URL has no fragment; write a # in a password as %23";
            return Err(UrlError::Option { option: "#".to_owned(), known });
        }
        let hosts = hosts.split(',').map(str::trim).filter(|host| !host.is_empty());
        let addresses = hosts.map(|host| address(host, port)).collect::<Result<Vec<_>, _>>()?;
        if addresses.is_empty() {
            return Err(UrlError::Host);
        }
        let filled = |text: &&str| !text.is_empty();
        let path = path.split('/').filter(filled).map(unescaped).collect::<Result<_, _>>()?;
        let options = query.split('&').filter(filled).map(|option| {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            Ok((unescaped(name)?, unescaped(value)?))
        });
        let options = options.collect::<Result<_, UrlError>>()?;
        Ok(Self { login: login_of(login)?, addresses, path, options })
    }

    fn has_no_options(&self, known: &'static str) -> Result<(), UrlError> {
        match self.options.first() {
            None => Ok(()),
            Some((name, _)) => Err(UrlError::Option { option: name.clone(), known }),
        }
    }
}

/// `user:password`, `:password` or `user`.
fn login_of(text: &str) -> Result<Login, UrlError> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let filled = |text: &str| (!text.is_empty()).then(|| unescaped(text)).transpose();
    Ok(Login { user: filled(user)?, password: filled(password)? })
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn address(text: &str, default: u16) -> Result<Address, UrlError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(text) => text.split_once(']').ok_or(UrlError::Port)?,
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or(UrlError::Port)?,
        None if port.is_empty() => default,
        None => return Err(UrlError::Port),
    };
    if host.is_empty() {
        return Err(UrlError::Host);
    }
    Ok(Address { host: host.to_owned(), port })
}

fn database(text: &str) -> Result<i64, UrlError> {
    let db = text.parse().ok().filter(|db| *db >= 0);
    // An @ is behind a password with a / in it.
    let shown = || if text.contains('@') { "…" } else { text };
    db.ok_or_else(|| UrlError::Db(shown().to_owned()))
}

/// Resolves the % escapes of a text.
fn unescaped(text: &str) -> Result<String, UrlError> {
    let is_escape = |behind: &str| {
        behind.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    if !text.split('%').skip(1).all(is_escape) {
        return Err(UrlError::Escape);
    }
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| UrlError::Escape)?;
    Ok(decoded.into_owned())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Without passwords.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, servers) = match self {
            Self::Socket(SocketUrl(url)) => {
                let (path, options) = url.split_once('?').unwrap_or((url, ""));
                f.write_str(path)?;
                let is_public = |option: &&str| !option.is_empty() && !option.starts_with("pass");
                for (at, option) in options.split('&').filter(is_public).enumerate() {
                    write!(f, "{}{option}", if at == 0 { '?' } else { '&' })?;
                }
                return Ok(());
            }
            Self::Single(servers) => ("", servers),
            Self::Sentinel { servers, .. } => ("+sentinel", servers),
            Self::Cluster(servers) => ("+cluster", servers),
        };
        write!(f, "redis{}{kind}://", if servers.tls { "s" } else { "" })?;
        let Login { user, password } = &servers.login;
        if user.is_some() || password.is_some() {
            let password = if password.is_some() { ":…" } else { "" };
            write!(f, "{}{password}@", user.as_deref().unwrap_or_default())?;
        }
        for (at, address) in servers.addresses.iter().enumerate() {
            write!(f, "{}{address}", if at == 0 { "" } else { "," })?;
        }
        if let Self::Sentinel { primary, .. } = self {
            write!(f, "/{primary}")?;
        }
        match kind {
            "+cluster" => Ok(()),
            _ => write!(f, "/{}", servers.db),
        }
    }
}

/// Keeps passwords out of logs.
impl fmt::Debug for SocketUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", RedisUrl::Socket(self.clone()))
    }
}

/// Keeps passwords out of logs.
impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let password = self.password.as_ref().map(|_| "…");
        f.debug_struct("Login").field("user", &self.user).field("password", &password).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(hosts: &[(&str, u16)]) -> ServerAddresses {
        let address = |(host, port): &(&str, u16)| Address { host: (*host).into(), port: *port };
        let addresses = hosts.iter().map(address).collect();
        ServerAddresses { addresses, tls: false, login: Login::default(), db: 0 }
    }

    fn login(user: &str, password: &str) -> Login {
        let filled = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Login { user: filled(user), password: filled(password) }
    }

    #[track_caller]
    fn check(url: &str, expected: Result<RedisUrl, UrlError>) {
        assert_eq!(url.parse(), expected, "{url}");
    }

    #[test]
    fn a_single_server() {
        check("redis://redis", Ok(RedisUrl::Single(servers(&[("redis", 6379)]))));
        check("valkey://[::1]:7/", Ok(RedisUrl::Single(servers(&[("::1", 7)]))));
        let me = login("me", "a@b/c%");
        let all = ServerAddresses { tls: true, login: me, db: 3, ..servers(&[("h", 1)]) };
        check("rediss://me:a@b%2Fc%25@h:1/3", Ok(RedisUrl::Single(all)));
        let password = ServerAddresses { login: login("", "secret"), ..servers(&[("h", 6379)]) };
        check("redis://:secret@h", Ok(RedisUrl::Single(password)));
        for url in ["unix:///run/redis.sock?db=1", "redis+unix:///run/redis.sock"] {
            check(url, Ok(RedisUrl::Socket(SocketUrl(url.into()))));
        }
    }

    #[test]
    fn a_primary_that_sentinels_name() {
        let sentinel = |servers: ServerAddresses, login: Login| {
            Ok(RedisUrl::Sentinel { servers, primary: "main".into(), login })
        };
        let three = servers(&[("a", 26_379), ("b", 1), ("::1", 26_379)]);
        check("redis+sentinel://a,b:1,[::1]/main", sentinel(three.clone(), Login::default()));
        let all = ServerAddresses { tls: true, login: login("u", "p"), db: 2, ..three };
        let url = "redis+sentinel://u:p@a,b:1,[::1]/main?tls=true&db=2&sentinel_user=s\
                   &sentinel_password=%26";
        check(url, sentinel(all.clone(), login("s", "&")));
        check("rediss+sentinel://u:p@a,b:1,[::1]/main/2", sentinel(all, Login::default()));
    }

    #[test]
    fn a_redis_cluster() {
        check("redis+cluster://a,b:1", Ok(RedisUrl::Cluster(servers(&[("a", 6379), ("b", 1)]))));
        let all = ServerAddresses { tls: true, login: login("", "p"), ..servers(&[("a", 6379)]) };
        check("rediss+cluster://:p@a/0", Ok(RedisUrl::Cluster(all)));
    }

    #[test]
    fn each_mistake_has_an_error_without_passwords() {
        let cases = [
            ("localhost:6379", UrlError::Scheme),
            ("http://h", UrlError::Scheme),
            ("redis+unknown://h", UrlError::Scheme),
            ("rediss+unix:///s", UrlError::Scheme),
            ("redis://", UrlError::Host),
            ("redis://:secret@", UrlError::Host),
            ("redis://:1", UrlError::Host),
            ("redis://h:0", UrlError::Port),
            ("redis://h:65536", UrlError::Port),
            ("redis://[::1]7", UrlError::Port),
            ("redis://me:secret/x@h", UrlError::Port),
            ("redis://:secret%2@h", UrlError::Escape),
            ("redis://:secret%+f@h", UrlError::Escape),
            ("redis://:secret%ff@h", UrlError::Escape),
            ("redis://a,b", UrlError::Hosts),
            ("redis://h/main", UrlError::Db("main".into())),
            ("redis://h/-1", UrlError::Db("-1".into())),
            ("redis+sentinel://a,b", UrlError::Primary),
            ("redis+sentinel://a/main/x", UrlError::Db("x".into())),
            ("redis+cluster://a/1", UrlError::ClusterDb),
        ];
        for (url, expected) in cases {
            check(url, Err(expected));
        }
        let urls = [
            "redis://h?x=secret",
            "rediss://h#secret",
            "redis+cluster://h?tls=secret",
            "redis+sentinel://h/m?sentinel_pass=secret",
            "rediss+sentinel://h/m?tls=false",
        ];
        for url in urls {
            let error = url.parse::<RedisUrl>().unwrap_err();
            assert!(matches!(error, UrlError::Option { .. }), "{url}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        for url in ["redis://me:1234/secret@h", "redis://me:12/3?secret@h", "redis://me:1?secret@h"]
        {
            let error = url.parse::<RedisUrl>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("secret"), "{url}: {error}");
        }
    }

    #[test]
    fn a_shown_url_has_no_passwords() {
        for (url, shown) in [
            ("redis://me:secret@h", "redis://me:…@h:6379/0"),
            ("rediss://:secret@[::1]:1/3", "rediss://:…@[::1]:1/3"),
            ("redis://h", "redis://h:6379/0"),
            (
                "redis+sentinel://u:secret@a,b/main/2?sentinel_password=secret",
                "redis+sentinel://u:…@a:26379,b:26379/main/2",
            ),
            ("redis+cluster://u@a,b", "redis+cluster://u@a:6379,b:6379"),
            ("unix:///s?db=1&pass=secret&user=me", "unix:///s?db=1&user=me"),
        ] {
            let parsed: RedisUrl = url.parse().unwrap();
            assert_eq!(parsed.to_string(), shown);
            assert!(!format!("{parsed:?}").contains("secret"), "{parsed:?}");
        }
    }
}
