// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm snapshot serve`: the memory of a snapshot for guests that go on elsewhere, with the snapshot's state alone.
//!
//! ```text
//!   restore --from DIR --page-server ADDRESS ──► Service ──► PageServer ──► SnapshotSource ──► chain of files
//!   (many, two connections each)                 a thread each             (checked as read)
//! ```
//!
//! Nothing is written. Who may connect is as of a migration ([`transport`](crate::migration::transport)): a Unix socket is its
//! user's alone; TCP without TLS has no authentication, and is for this host alone; with TLS both sides have a certificate of
//! the same authority.
//!
//! Who connects has some seconds to say what it is, and who is silent until then keeps nobody out
//! ([`callers`](crate::migration::callers)). Who has said it says by beats that it lives, and may ask for nothing for as long as
//! it will.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::peer::{PageServer, PeerError, Served, ServerConfig};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::{Gfn, PAGE_SIZE};
use serde_json::{Value, json};

use super::chain::Chain;
use super::format::SnapshotId;
use super::link::Link;
use super::pages::PIECE;
use super::restore::RestoreError;
use crate::end::Chain as Words;
use crate::lazy::SnapshotSource;
use crate::migration::address::Address;
use crate::migration::callers::{Callers, Place};
use crate::migration::link::TICK;
use crate::migration::tls::{Tls, TlsError, TlsFiles};
use crate::migration::transport::{AcceptError, BindError, HANDSHAKE, Listener};
use crate::{strangers, units};

/// How often a page server, and who asks it, says something at least.
pub const BEAT: Duration = Duration::from_millis(500);
/// Connections at once, at most, of those who have said what they are: each has three threads. A guest has two.
pub const MOST_CONNECTIONS: usize = 1024;

/// So many pieces that cannot be read are told of: of a disk that fails they may be all.
const MOST_TOLD: usize = 256;

/// What is served, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeRequest {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// Where guests connect to.
    pub listen: Address,
    /// Needed beyond this host.
    pub tls: Option<TlsFiles>,
    /// Each MiB is compared with its checksum before the first of its pages is sent.
    pub verify: bool,
}

/// Nothing is served, or nothing more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The snapshot cannot be read.
    #[error(transparent)]
    Snapshot(#[from] RestoreError),
    /// TLS cannot be had.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// One cannot listen there.
    #[error("--listen: {0}")]
    Bind(#[from] BindError),
}

impl ServeError {
    /// 2 the arguments or the snapshot are wrong, 1 the host refused.
    pub fn exit_status(&self) -> u8 {
        match self {
            ServeError::Snapshot(error) => error.exit_status(),
            ServeError::Tls(_) => 2,
            ServeError::Bind(error) if error.is_users_fault() => 2,
            ServeError::Bind(_) => 1,
        }
    }
}

/// The pages of a snapshot. What cannot be read of it is told of here as well, and not only to the guests: once a piece.
struct Telling {
    source: SnapshotSource,
    /// The pieces that were told of, and why.
    told: Mutex<BTreeSet<(u64, String)>>,
}

impl Telling {
    fn new(source: SnapshotSource) -> Self {
        Telling {
            source,
            told: Mutex::default(),
        }
    }

    fn tell(&self, first: Gfn, bytes: usize, error: &SourceError) {
        // All else is what somebody asked for that is none of the guest's memory.
        let SourceError::Other { source: why, .. } = error else {
            return;
        };
        let at = first.0.saturating_mul(PAGE_SIZE);
        let piece = at / u64::from(PIECE);
        // Of two pieces it may be either: each of their pages is asked for by itself then.
        if at.saturating_add(bytes as u64).saturating_sub(1) / u64::from(PIECE) != piece {
            return;
        }
        let words = Words(&**why).to_string();
        let key = match why.downcast_ref() {
            // It is all of the file.
            Some(RestoreError::Changed { .. }) => (0, words.clone()),
            _ => (piece, words.clone()),
        };
        // What is in it is whole after each statement.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < MOST_TOLD && told.insert(key) {
            let more = match told.len() {
                MOST_TOLD => ". What else cannot be sent is not told of here, but to the guests",
                _ => "",
            };
            let (from, to) = (piece * u64::from(PIECE), (piece + 1) * u64::from(PIECE));
            log::warn!("guests do not get their memory from {from:#x} to {to:#x}: {words}{more}");
        }
    }
}

impl PageSource for Telling {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let fetched = self.source.fetch_for(lane, first, into);
        fetched.inspect_err(|error| self.tell(first, into.len(), error))
    }

    fn overtakes(&self) -> bool {
        self.source.overtakes()
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        self.source.run(first, pages)
    }
}

/// A snapshot that is served: it listens.
pub struct Service {
    listener: Listener,
    server: PageServer,
    source: SnapshotSource,
    id: SnapshotId,
    memory: u64,
}

/// What was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServeReport {
    /// Connections that were accepted; a guest makes two, and more where they break.
    pub connections: u64,
    /// Pages of all of them.
    pub served: Served,
}

impl Service {
    /// Opens the snapshot, checks all of it but the contents of guest memory, and listens.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is left behind.
    pub fn open(request: &ServeRequest) -> Result<Self, ServeError> {
        let (mut chain, _) = Chain::open(&request.dir)?;
        chain.check_as_read(request.verify)?;
        let newest = chain.newest();
        let id = newest.map_or(SnapshotId([0; 16]), Link::id);
        let memory = newest.map_or(0, |link| link.map().all().bytes());
        let tls = request.tls.as_ref().map(Tls::load).transpose()?;
        let listener = Listener::bind(&request.listen, tls.as_ref())?;
        let source = SnapshotSource::new(Arc::new(chain));
        let config = ServerConfig {
            image: id.image(),
            beat: BEAT,
            ..ServerConfig::default()
        };
        Ok(Service {
            listener,
            server: PageServer::new(Arc::new(Telling::new(source.clone())), config),
            source,
            id,
            memory,
        })
    }

    /// Where it listens, with the port that it has.
    pub fn address(&self) -> &Address {
        self.listener.address()
    }

    /// The snapshot's number.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Guest memory, bytes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Serves who connects until `stop` says that it is time, which is asked each [`TICK`], and then ends all connections.
    /// Who does not keep to the protocol is told of by a warning, and so it is when nobody can be accepted for a while: those
    /// that there are are served on. Of who is gone without a word is told where somebody wants to know (info).
    pub fn run(&self, stop: impl Fn() -> bool) -> ServeReport {
        // Relaxed: a bound and a flag, by which nothing else is told.
        let (open, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (mut connections, mut deaf) = (0, false);
        let callers = Callers::default();
        thread::scope(|scope| {
            let begun = thread::Builder::new().name("holes".into());
            // Without it zeros are found as they are read.
            let go_on = || !over.load(Ordering::Relaxed);
            let looked = begun.spawn_scoped(scope, move || self.source.find_holes(go_on));
            if let Err(error) = looked {
                log::warn!("cannot look for holes: {error}");
            }
            while !stop() {
                let caller = match self.listener.caller(Instant::now() + TICK) {
                    Ok(caller) => caller,
                    Err(AcceptError::Nobody(_)) => continue,
                    Err(error @ AcceptError::Peer { .. }) => {
                        strangers::warn(format_args!("{error}; others may connect still"));
                        continue;
                    }
                    Err(error) => {
                        // Guests need those that there are: out of descriptors, for one, is over when some have gone.
                        match std::mem::replace(&mut deaf, true) {
                            false => log::warn!("{error}; it is tried again"),
                            true => {
                                callers.make_room(Duration::ZERO);
                            }
                        }
                        thread::sleep(TICK);
                        continue;
                    }
                };
                deaf = false;
                let who = caller.peer().to_owned();
                if open.load(Ordering::Relaxed) >= MOST_CONNECTIONS {
                    strangers::warn(format_args!(
                        "{who} is sent away: there are {MOST_CONNECTIONS} connections"
                    ));
                    continue;
                }
                // None is there where those who are to go are about to: a matter of moments.
                let Some(place) = callers.enter(caller.host(), caller.hang_up(), TICK) else {
                    continue;
                };
                connections += 1;
                let (open, over) = (&open, &over);
                let serve = move || {
                    let place = RefCell::new(Some(place));
                    let is_lost = || place.borrow().as_ref().is_some_and(Place::is_lost);
                    let stop = || over.load(Ordering::Relaxed) || is_lost();
                    match caller.answer(Instant::now() + HANDSHAKE, &stop) {
                        Ok(connection) => {
                            place.borrow().as_ref().inspect(|place| place.is_known());
                            let who = connection.from();
                            let mut heard = None;
                            let served = self.server.serve_when(&connection.duplex(), || {
                                // One that has lost it is closed, and finds that.
                                drop(place.take());
                                heard = Some(Heard::new(open));
                            });
                            match served {
                                Ok(_) | Err(PeerError::Ended) => {}
                                Err(_) if heard.is_none() && stop() => {}
                                Err(error) if has_gone(&error) => {
                                    log::info!("{who} is gone without a word: {}", Words(&error));
                                }
                                Err(error) => {
                                    strangers::warn(format_args!("{who}: {}", Words(&error)))
                                }
                            }
                        }
                        Err(_) if stop() => {}
                        Err(error) => {
                            strangers::warn(format_args!("{error}; others may connect still"))
                        }
                    }
                };
                let thread = thread::Builder::new().name("serve".into());
                if let Err(error) = thread.spawn_scoped(scope, serve) {
                    log::warn!("a connection is not served: {error}");
                }
            }
            over.store(true, Ordering::Relaxed);
            self.server.stop();
            // Who has not said what it wants would hear of it at its next tick.
            callers.close();
        });
        ServeReport {
            connections,
            served: self.server.served(),
        }
    }
}

/// One of those that are counted, until it is dropped.
struct Heard<'a>(&'a AtomicUsize);

impl<'a> Heard<'a> {
    fn new(open: &'a AtomicUsize) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Heard(open)
    }
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the other side, its process or its host, has ended; it has done nothing wrong.
fn has_gone(error: &PeerError) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error {
        PeerError::Closed => true,
        PeerError::Broken(error) => {
            matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
        }
        _ => false,
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("address", self.address())
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl ServeReport {
    /// As JSON.
    pub fn json(&self) -> Value {
        let Served {
            asks,
            pages,
            zeros,
            bytes,
            ..
        } = self.served;
        json!({
            "connections": self.connections, "asks": asks, "pages": pages, "zero_pages": zeros, "sent_bytes": bytes,
        })
    }
}

impl fmt::Display for ServeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "served {} pages, {} of them zeros, in {} answers over {} connections: {}",
            self.served.pages,
            self.served.zeros,
            self.served.asks,
            self.connections,
            units::bytes(self.served.bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_read_over_two_mibs_nothing_is_told_and_of_one_within_each_mib_once() {
        let telling = Telling::new(SnapshotSource::new(Arc::new(Chain::empty())));
        let error = SourceError::Other {
            gfn: Gfn(0),
            transient: false,
            source: "the disk fails".into(),
        };
        let told = |first, pages: usize| {
            telling.tell(Gfn(first), pages * PAGE_SIZE as usize, &error);
            let told = telling.told.lock().unwrap();
            told.iter().map(|(piece, _)| *piece).collect::<Vec<_>>()
        };
        let all = u64::from(PIECE) / PAGE_SIZE;
        // It may be the first that cannot be read, or the second.
        assert!(told(all - 1, 2).is_empty());
        assert!(told(0, all as usize + 1).is_empty());
        assert_eq!(told(all, 1), [1]);
        assert_eq!(told(0, all as usize), [0, 1]);
        assert_eq!(told(2 * all - 1, 1), [0, 1]);
    }
}
