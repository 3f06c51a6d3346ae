//! Address of a client behind proxies.
//!
//! Pure. A client can write anything into `X-Forwarded-For`, so that only the part that trusted
//! proxies appended counts: the header is read from the right, and the first address that is not a
//! trusted proxy is the client.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

use super::headers::elements;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Returns the address of the client behind `peer`.
pub fn client_address(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let is_trusted = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
    let mut client = peer.to_canonical();
    let forwarded: Vec<&[u8]> = elements(headers, FORWARDED_FOR).collect();
    for hop in forwarded.into_iter().rev() {
        if !is_trusted(&client) {
            break;
        }
        let Some(address) = std::str::from_utf8(hop).ok().and_then(parse) else { break };
        client = address.to_canonical();
    }
    client
}

/// Parses an address with or without a port.
fn parse(hop: &str) -> Option<IpAddr> {
    let bare = hop.trim_start_matches('[').trim_end_matches(']');
    bare.parse().ok().or_else(|| hop.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[track_caller]
    fn check(peer: &str, forwarded: &[&str], trusted: &[&str], expected: &str) {
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append(FORWARDED_FOR, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|net| net.parse().unwrap()).collect();
        let client = client_address(peer.parse().unwrap(), &headers, &trusted);
        assert_eq!(client.to_string(), expected);
    }

    #[test]
    fn the_header_of_an_untrusted_peer_is_ignored() {
        check("192.0.2.1", &["198.51.100.7"], &[], "192.0.2.1");
        check("192.0.2.1", &["198.51.100.7"], &["10.0.0.0/8"], "192.0.2.1");
    }

    #[test]
    fn the_first_untrusted_address_from_the_right_is_the_client() {
        let trusted = &["10.0.0.0/8", "127.0.0.1/32"];
        check("127.0.0.1", &["198.51.100.7"], trusted, "198.51.100.7");
        check("127.0.0.1", &["6.6.6.6, 198.51.100.7, 10.1.1.1"], trusted, "198.51.100.7");
        check("127.0.0.1", &["6.6.6.6", "198.51.100.7:1234"], trusted, "198.51.100.7");
        check("::ffff:127.0.0.1", &["[2001:db8::1]"], trusted, "2001:db8::1");
    }

    #[test]
    fn an_invalid_address_ends_the_walk_at_the_last_valid_one() {
        check("127.0.0.1", &["198.51.100.7, unknown"], &["127.0.0.1/32"], "127.0.0.1");
        check("127.0.0.1", &[], &["127.0.0.1/32"], "127.0.0.1");
        // Nonsense that a client writes into the header does not hide its address.
        check("127.0.0.1", &["Zürich, 198.51.100.7"], &["127.0.0.1/32"], "198.51.100.7");
        check("127.0.0.1", &["198.51.100.7, ü"], &["127.0.0.1/32"], "127.0.0.1");
    }
}
