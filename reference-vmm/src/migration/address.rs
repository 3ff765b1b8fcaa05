// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a migration goes: `unix:PATH` or `tcp:HOST:PORT`.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use crate::unix_socket::MAX_PATH;

/// A place to listen at or to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// `unix:PATH`: a Unix socket.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`. An IPv6 address is in brackets in the text, and without them here.
    Tcp {
        /// A name, or an IP address.
        host: String,
        /// Not 0, but where one listens: then the system chooses it.
        port: u16,
    },
}

/// A text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no address: {why}")]
pub struct AddressError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse(text).map_err(|why| AddressError {
            text: text.to_owned(),
            why,
        })
    }
}

fn parse(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path.len() {
            0 => Err("there is no path".into()),
            len if len > MAX_PATH => Err(format!(
                "its path has {len} bytes, and a socket's has {MAX_PATH} at most"
            )),
            _ if path.contains('\0') => Err("its path has a zero byte".into()),
            _ => Ok(Address::Unix(path.into())),
        };
    }
    let Some(place) = text.strip_prefix("tcp:") else {
        return Err("it is unix:PATH or tcp:HOST:PORT".into());
    };
    let Some((host, port)) = place.rsplit_once(':') else {
        return Err("there is no port: tcp:HOST:PORT".into());
    };
    let port = match port.parse() {
        Ok(number) if port.bytes().all(|byte| byte.is_ascii_digit()) => number,
        _ => return Err(format!("\"{port}\" is no port from 0 to 65535")),
    };
    let host = match host.strip_prefix('[') {
        Some(rest) => match rest.strip_suffix(']') {
            Some(inner) if inner.parse::<std::net::Ipv6Addr>().is_ok() => inner,
            _ => return Err(format!("\"{host}\" is no IPv6 address in brackets")),
        },
        None if host.contains(':') => {
            return Err("an IPv6 address is in brackets: tcp:[::1]:PORT".into());
        }
        None => host,
    };
    let of_a_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if host.is_empty() {
        return Err("there is no host".into());
    }
    let is_ip = host.parse::<IpAddr>().is_ok();
    if !is_ip && (host.len() > 253 || !host.bytes().all(of_a_name)) {
        return Err(format!("\"{host}\" is no host's name"));
    }
    Ok(Address::Tcp {
        host: host.to_owned(),
        port,
    })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// The addresses of a host's name, or the one that it is. The resolver has no limit of its own that we know, so it is
/// asked on a thread that is left behind when the time is over.
///
/// # Errors
/// `NotFound`: the name has no address; `TimedOut`; the resolver's.
pub(super) fn resolve(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![(ip, port).into()]);
    }
    let (answer, answered) = mpsc::channel();
    let asked = host.to_owned();
    let ask = move || {
        let found = (asked.as_str(), port).to_socket_addrs();
        // Nobody waits any more.
        let _ = answer.send(found.map(Iterator::collect::<Vec<_>>));
    };
    thread::Builder::new().name("resolver".into()).spawn(ask)?;
    let left = deadline.saturating_duration_since(Instant::now());
    let Ok(found) = answered.recv_timeout(left) else {
        let why = format!("the name {host} is not resolved in time");
        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
    };
    match found? {
        none if none.is_empty() => {
            let why = format!("the name {host} has no address");
            Err(io::Error::new(io::ErrorKind::NotFound, why))
        }
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn tcp(host: &str, port: u16) -> Address {
        let host = host.to_owned();
        Address::Tcp { host, port }
    }

    #[test]
    fn an_address_is_read_and_written_in_the_same_form() {
        for (text, address) in [
            ("unix:/run/x.sock", Address::Unix("/run/x.sock".into())),
            ("unix:a:b", Address::Unix("a:b".into())),
            ("tcp:10.0.0.1:4444", tcp("10.0.0.1", 4444)),
            ("tcp:[::1]:1", tcp("::1", 1)),
            ("tcp:host-2.lan:65535", tcp("host-2.lan", 65535)),
            ("tcp:localhost:0", tcp("localhost", 0)),
        ] {
            assert_eq!(text.parse(), Ok(address.clone()));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_text_and_why() {
        let long = format!("unix:{}", "x".repeat(MAX_PATH + 1));
        for (text, why) in [
            ("", "it is unix:PATH or tcp:HOST:PORT"),
            ("udp:a:1", "it is unix:PATH or tcp:HOST:PORT"),
            ("unix:", "there is no path"),
            (
                &long,
                "its path has 108 bytes, and a socket's has 107 at most",
            ),
            ("tcp:host", "there is no port: tcp:HOST:PORT"),
            ("tcp:host:", "\"\" is no port from 0 to 65535"),
            ("tcp:host:+1", "\"+1\" is no port from 0 to 65535"),
            ("tcp:host:65536", "\"65536\" is no port from 0 to 65535"),
            ("tcp::1", "there is no host"),
            (
                "tcp:::1:1",
                "an IPv6 address is in brackets: tcp:[::1]:PORT",
            ),
            ("tcp:[x]:1", "\"[x]\" is no IPv6 address in brackets"),
            ("tcp:[::1:1", "\"[::1\" is no IPv6 address in brackets"),
            ("tcp:a b:1", "\"a b\" is no host's name"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!((error.text.as_str(), error.why.as_str()), (text, why));
        }
    }

    #[test]
    fn an_ip_address_is_resolved_without_a_resolver() {
        let past = Instant::now();
        let found = resolve("::1", 7, past).unwrap();
        assert_eq!(found, ["[::1]:7".parse().unwrap()]);
        let soon = Instant::now() + Duration::from_secs(60);
        let found = resolve("localhost", 7, soon).unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback()));
    }
}
