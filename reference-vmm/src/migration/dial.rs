// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The conversation over real connections.

#![forbid(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use super::address::Address;
use super::link::{Accept, Connect, Duplex, TICK, Wire};
use super::tls::Tls;
use super::transport::{
    AcceptError, Caller, ConnectError, Connection, HANDSHAKE, Listener, connect, unix_line,
};

impl Wire for Connection {
    fn line(&self) -> Option<String> {
        Connection::line(self).map(str::to_owned)
    }

    fn from(&self) -> Option<String> {
        Some(Connection::from(self))
    }

    fn duplex(self) -> io::Result<Duplex> {
        Ok(Box::new(Connection::duplex(self)))
    }
}

/// The way to a destination.
#[derive(Clone, Debug)]
pub struct Dial {
    /// Where it listens.
    pub address: Address,
    /// By what the two know each other.
    pub tls: Option<Tls>,
}

impl Connect for Dial {
    type Wire = Connection;

    fn connect(&self, patience: Duration) -> io::Result<Connection> {
        let deadline = Instant::now() + patience;
        let connected = connect(&self.address, self.tls.as_ref(), deadline);
        let mut connection = connected.map_err(|error| {
            let kind = match &error {
                ConnectError::Refused(_) => io::ErrorKind::ConnectionRefused,
                // Somebody may have removed the path of one who is there.
                ConnectError::Missing(_) => io::ErrorKind::NotFound,
                // Whatever it is, it does not say that nobody is there.
                ConnectError::Failed { .. } => io::ErrorKind::TimedOut,
                ConnectError::Exposed(_) => io::ErrorKind::PermissionDenied,
            };
            io::Error::new(kind, error)
        })?;
        connection.set_patience(TICK);
        Ok(connection)
    }

    fn is_still(&self, line: &str) -> bool {
        match &self.address {
            // The path may be another's by now, while who had it lives.
            Address::Unix(path) => unix_line(path).as_deref() == Some(line),
            // A port is its listener's as long as that lives.
            Address::Tcp { .. } => true,
        }
    }

    fn is_refusal_proof(&self) -> bool {
        matches!(self.address, Address::Unix(_))
    }

    fn hint(&self) -> Option<&str> {
        // With TLS there was a handshake before.
        let may_want = self.tls.is_none() && matches!(self.address, Address::Tcp { .. });
        may_want.then_some("does the destination want TLS (--tls-cert, --tls-key, --tls-ca)?")
    }
}

/// Where a destination listens.
#[derive(Debug)]
pub struct Ear(pub Listener);

impl Accept for Ear {
    type Wire = Connection;
    type Caller = Caller;

    fn accept(&self) -> io::Result<Option<Caller>> {
        match self.0.caller(Instant::now() + TICK) {
            Ok(caller) => Ok(Some(caller)),
            Err(AcceptError::Nobody(_)) => Ok(None),
            Err(error @ AcceptError::Peer { .. }) => {
                log::warn!("{error}; others may connect still");
                Ok(None)
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn answer(caller: Caller, stop: &dyn Fn() -> bool) -> Option<Connection> {
        match caller.answer(Instant::now() + HANDSHAKE, stop) {
            Ok(mut connection) => {
                connection.set_patience(TICK);
                Some(connection)
            }
            Err(_) if stop() => None,
            Err(error) => {
                log::warn!("{error}; others may connect still");
                None
            }
        }
    }
}
