// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The conversation over real connections: the way to a destination, and where one listens.
//!
//! Both can be another one when the guest has gone and its memory follows it (`ctl migrate-recover`): [`Dial::go`] at the
//! source, [`Also::listen`] at the destination. Who is at the other end there proves it
//! ([`MigrationId`](super::message::MigrationId)).

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::address::Address;
use super::callers::HangUp;
use super::link::{Accept, Connect, Duplex, TICK, Wire};
use super::tls::{Tls, TlsError};
use super::transport::{
    AcceptError, BindError, Caller, ConnectError, Connection, HANDSHAKE, Listener, connect,
    connect_at, may_connect, unix_line, wait_for_any,
};
use crate::strangers;

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

/// How long the resolver is asked for a new address.
const RESOLVE: Duration = Duration::from_secs(5);

/// The way to a destination. Its clones go the same way. A name is asked for once: who has been connected to is connected to
/// again, whatever host the name leads to by then.
#[derive(Clone, Debug)]
pub struct Dial {
    /// Where it listened when the guest was sent.
    address: Address,
    /// By what the two know each other.
    tls: Option<Tls>,
    way: Arc<Mutex<Way>>,
    /// Where the first connection went, over TCP: a name may lead to another host later, which says nothing of this one.
    place: Arc<OnceLock<SocketAddr>>,
}

/// Where it is now.
#[derive(Clone, Debug, Default)]
struct Way {
    /// How often it has been another one.
    number: u64,
    other: Option<(Address, Option<Tls>)>,
}

/// There is no such way. Connections go as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WayError {
    /// The address cannot be connected to.
    #[error(transparent)]
    Address(#[from] ConnectError),
    /// The name is none.
    #[error(transparent)]
    Name(#[from] TlsError),
    /// There is a name for a certificate, and no TLS.
    #[error("whom a certificate is for was said, and the migration was begun without TLS")]
    NoTls,
    /// Other hosts are on the way, and there is no TLS.
    #[error(
        "{0} is another host, and this migration was begun without TLS, for good: only an address of this host can be the \
         other way, unix:PATH or tcp:127.0.0.1:PORT"
    )]
    Exposed(Address),
}

impl Dial {
    /// To `address`, which nobody is asked for yet.
    pub fn new(address: Address, tls: Option<Tls>) -> Self {
        Dial {
            address,
            tls,
            way: Arc::default(),
            place: Arc::default(),
        }
    }

    fn way(&self) -> MutexGuard<'_, Way> {
        // What is in it is whole after each statement.
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has connections go to another address from now on, with the same certificates; the destination's is for `name`; without
    /// it, for whom it was said to be when the migration began, and if that was nobody for the host in the address. Blocks for as long as the resolver takes, seconds at most. From then on nobody's refusal,
    /// and no other monitor's answer, is taken for the destination's end, also not at the first address: only it says so.
    ///
    /// # Errors
    /// [`WayError`]; they go as before.
    pub fn go(&self, address: &Address, name: Option<&str>) -> Result<(), WayError> {
        let tls = match (&self.tls, name) {
            (Some(tls), Some(name)) => Some(tls.for_name(name)?),
            (None, Some(_)) => return Err(WayError::NoTls),
            (tls, None) => tls.clone(),
        };
        let may = may_connect(address, tls.as_ref(), Instant::now() + RESOLVE);
        may.map_err(|error| match error {
            // Certificates are of the migration's beginning.
            ConnectError::Exposed(address) => WayError::Exposed(address),
            error => WayError::Address(error),
        })?;
        let mut way = self.way();
        way.number += 1;
        way.other = Some((address.clone(), tls));
        Ok(())
    }
}

impl Connect for Dial {
    type Wire = Connection;

    fn connect(&self, patience: Duration) -> io::Result<Connection> {
        let deadline = Instant::now() + patience;
        let other = self.way().other.clone();
        let connected = match (&other, self.place.get()) {
            (Some((address, tls)), _) => connect(address, tls.as_ref(), deadline),
            (None, Some(place)) => connect_at(&self.address, *place, self.tls.as_ref(), deadline),
            (None, None) => connect(&self.address, self.tls.as_ref(), deadline),
        };
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
        if let (None, Some(place)) = (&other, connection.place()) {
            // Of the first alone.
            self.place.get_or_init(|| place);
        }
        connection.set_patience(TICK);
        Ok(connection)
    }

    fn is_still(&self, line: &str) -> bool {
        match (&self.way().other, &self.address) {
            // Where it was is not where it is said to be.
            (Some(_), _) => false,
            // The path may be another's by now, while who had it lives.
            (None, Address::Unix(path)) => unix_line(path).as_deref() == Some(line),
            // All connections go to the place of the first, and a port is its listener's as long as that lives.
            (None, Address::Tcp { .. }) => self.place.get().is_some(),
        }
    }

    fn way(&self) -> u64 {
        Dial::way(self).number
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

/// Where a destination listens. Dropped, it listens nowhere.
#[derive(Debug)]
pub struct Ear {
    /// From the beginning on.
    first: Arc<Listener>,
    also: Arc<Also>,
    /// Who was asked first the last time. Relaxed: a matter of fairness.
    turn: AtomicBool,
}

/// Has a destination listen at one more address.
#[derive(Debug)]
pub struct Also {
    listeners: Mutex<Listeners>,
}

/// The first, without which nobody accepts any more, and the other.
type Listeners = (Option<Arc<Listener>>, Option<Arc<Listener>>);

/// A destination does not listen there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// One cannot.
    #[error(transparent)]
    Bind(BindError),
    /// Other hosts reach it, and there is no TLS.
    #[error(
        "{0} is within reach of other hosts, and this monitor listens without TLS, for good: only an address of this host can \
         be another one, unix:PATH or tcp:127.0.0.1:PORT"
    )]
    Exposed(Address),
    /// It listens nowhere any more.
    #[error(
        "the guest has come with all of its memory, and no connection of its source's is waited for"
    )]
    Over,
}

impl Ear {
    /// Listens there.
    pub fn new(listener: Listener) -> Self {
        let first = Arc::new(listener);
        Ear {
            also: Arc::new(Also {
                listeners: Mutex::new((Some(Arc::clone(&first)), None)),
            }),
            first,
            turn: AtomicBool::new(false),
        }
    }

    /// What has it listen elsewhere too.
    pub fn also(&self) -> Arc<Also> {
        Arc::clone(&self.also)
    }

    /// The next one at either address, until `deadline`.
    fn caller(&self, deadline: Instant) -> Result<Caller, AcceptError> {
        let other = self.also.lock().1.clone();
        let first = &*self.first;
        let Some(other) = other.as_deref() else {
            return first.caller(deadline);
        };
        // In turn: strangers at one keep nobody out at the other.
        let both = match self.turn.fetch_not(Ordering::Relaxed) {
            true => [first, other],
            false => [other, first],
        };
        let now = Instant::now();
        let at_once = || {
            let [one, another] = both;
            match one.caller(now) {
                Err(AcceptError::Nobody(_)) => another.caller(now),
                accepted => accepted,
            }
        };
        match at_once() {
            Err(AcceptError::Nobody(_)) => {}
            accepted => return accepted,
        }
        wait_for_any(both, deadline)?;
        at_once()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        *self.also.lock() = (None, None);
    }
}

impl Also {
    fn lock(&self) -> MutexGuard<'_, Listeners> {
        // What is in it is whole after each statement.
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens at `address` as well, unless it does already, with the same certificates, and no longer where this has had it listen before; at its first
    /// address it always does. Where, with the port that the system chose. Blocks for as long as the resolver takes, seconds
    /// at most.
    ///
    /// # Errors
    /// [`ListenError`]; it listens as before.
    pub fn listen(&self, address: &Address) -> Result<Address, ListenError> {
        let (first, other) = self.lock().clone();
        let first = first.ok_or(ListenError::Over)?;
        let mut listening = [Some(&first), other.as_ref()].into_iter().flatten();
        // Who has not heard the answer says it again.
        if let Some(listens) = listening.find(|listener| listener.is_at(address)) {
            return Ok(listens.address().clone());
        }
        let another = first.another(address).map_err(|error| match error {
            // Certificates are of the first one's beginning.
            BindError::Exposed(address) => ListenError::Exposed(address),
            error => ListenError::Bind(error),
        });
        let listener = Arc::new(another?);
        let mut listeners = self.lock();
        if listeners.0.is_none() {
            return Err(ListenError::Over);
        }
        let address = listener.address().clone();
        listeners.1 = Some(listener);
        Ok(address)
    }

    /// Removes the files of its Unix sockets, of a process that exits while somebody may connect still.
    pub(crate) fn unlink(&self) {
        let (first, other) = &*self.lock();
        for listener in [first, other].into_iter().flatten() {
            listener.unlink();
        }
    }

    /// Where it listens besides.
    pub fn address(&self) -> Option<Address> {
        let listeners = self.lock();
        let other = listeners.1.as_ref();
        other.map(|listener| listener.address().clone())
    }
}

impl Accept for Ear {
    type Wire = Connection;
    type Caller = Caller;

    fn accept(&self) -> io::Result<Option<Caller>> {
        match self.caller(Instant::now() + TICK) {
            Ok(caller) => Ok(Some(caller)),
            Err(AcceptError::Nobody(_)) => Ok(None),
            Err(error @ AcceptError::Peer { .. }) => {
                strangers::warn(format_args!("{error}; others may connect still"));
                Ok(None)
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn host(caller: &Caller) -> String {
        caller.host()
    }

    fn hang_up(caller: &Caller) -> HangUp {
        caller.hang_up()
    }

    fn answer(caller: Caller, stop: &dyn Fn() -> bool) -> Option<Connection> {
        match caller.answer(Instant::now() + HANDSHAKE, stop) {
            Ok(mut connection) => {
                connection.set_patience(TICK);
                Some(connection)
            }
            Err(_) if stop() => None,
            Err(error) => {
                strangers::warn(format_args!("{error}; others may connect still"));
                None
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod listen_tests {
    use super::*;

    #[test]
    fn to_listen_where_it_listens_is_no_error_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let unix = |name: &str| Address::Unix(folder.path().join(name));
        let ear = Ear::new(Listener::bind(&unix("first"), None).unwrap());
        let also = ear.also();
        assert_eq!(also.listen(&unix("first")).unwrap(), unix("first"));
        assert_eq!(also.address(), None);
        let tcp = "tcp:127.0.0.1:0".parse().unwrap();
        let chosen = also.listen(&tcp).unwrap();
        for said in [&chosen, &chosen, &unix("first")] {
            assert_eq!(also.listen(said).unwrap(), *said);
            assert_eq!(also.address().as_ref(), Some(&chosen));
        }
        // By another name it is the same.
        let Address::Tcp { port, .. } = chosen else {
            unreachable!()
        };
        let named = format!("tcp:localhost:{port}").parse().unwrap();
        assert_eq!(also.listen(&named).unwrap(), chosen);
    }

    #[test]
    fn by_whichever_name_its_own_address_is_one_and_a_path_that_somebody_removed_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let unix = |name: &str| Address::Unix(folder.path().join(name));
        let ear = Ear::new(Listener::bind(&unix("first"), None).unwrap());
        let also = ear.also();
        let dotted = Address::Unix(folder.path().join("./first"));
        assert_eq!(also.listen(&dotted).unwrap(), unix("first"));
        assert_eq!(also.address(), None);
        // Somebody else's, or this process's own for something else.
        let _other = crate::unix_socket::Listener::bind(&folder.path().join("other"), 1).unwrap();
        let why = also.listen(&unix("other")).unwrap_err().to_string();
        assert!(why.contains("or this one for something else"), "{why}");
        std::fs::remove_file(folder.path().join("first")).unwrap();
        assert_eq!(also.listen(&unix("first")).unwrap(), unix("first"));
        assert_eq!(also.address(), Some(unix("first")));
        std::os::unix::net::UnixStream::connect(folder.path().join("first")).unwrap();
        assert!(ear.accept().unwrap().is_some());
    }

    #[test]
    fn what_is_there_and_is_no_socket_is_no_way() {
        let folder = tempfile::tempdir().unwrap();
        let dial = Dial::new(Address::Unix(folder.path().join("s")), None);
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        for (path, needle) in [
            (folder.path(), "a directory"),
            (file.as_path(), "a regular file"),
        ] {
            let error = dial.go(&Address::Unix(path.into()), None).unwrap_err();
            assert!(error.to_string().contains(needle), "{error}");
        }
        assert_eq!(Connect::way(&dial), 0);
        // Who listens later is no other.
        let later = Address::Unix(folder.path().join("later"));
        dial.go(&later, None).unwrap();
        assert_eq!(Connect::way(&dial), 1);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_name_that_leads_to_another_host_by_now_says_nothing_of_the_destination() {
        let bind = || Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), None).unwrap();
        let (first, other) = (bind(), bind());
        let mut dial = Dial::new(first.address().clone(), None);
        let line = dial.connect(TICK).unwrap().line().unwrap().to_owned();
        first.accept(Instant::now()).unwrap();
        assert!(dial.is_still(&line));
        // As if the resolver said so.
        dial.address = other.address().clone();
        dial.connect(TICK).unwrap();
        first.accept(Instant::now()).unwrap();
        // A refusal is of where it was, whoever listens elsewhere.
        drop(first);
        let refused = dial.connect(TICK).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(other.accept(Instant::now()).is_err());
        // Told to go there it does, and a refusal there proves nothing.
        let to = other.address().clone();
        dial.go(&to, None).unwrap();
        dial.connect(TICK).unwrap();
        other.accept(Instant::now()).unwrap();
        assert!(!dial.is_still(&line));
    }
}
