// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of a snapshot that a page server has ([`snapshot::serve`](crate::snapshot::serve)), and the snapshot's directory
//! here has not.
//!
//! What the guest waits for has a connection of its own. A connection that breaks is made again, and what was asked for and
//! not answered is asked for again. A server that is away for as long as the page deadline is given up: its pages do not
//! come. What the snapshot's state says to be zero nobody is asked for.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_pf::peer::{PeerConfig, PeerError, PeerLanes, PeerSource, Reconnect, Wire};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::{Gfn, PAGE_SIZE};

use super::{LazyError, ServerAway};
use crate::end::{Chain as Words, EndSignal};
use crate::migration::address::Address;
use crate::migration::tls::{Tls, TlsFiles};
use crate::migration::transport::{ConnectError, connect};
use crate::snapshot::chain::Chain;
use crate::snapshot::serve::BEAT;
use crate::units;

/// How long a server that says nothing is waited for, at most; less where the page deadline is short.
const SILENCE: Duration = Duration::from_secs(5);
/// How long making a connection may take, at most.
const CONNECT: Duration = Duration::from_secs(2);

/// How long is waited between tries with a server that is there and breaks off, at first and at most. One that has worked for
/// so long is as one that never did.
const AGAIN: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);
const FORGIVEN: Duration = Duration::from_secs(10);

/// Where a page server listens, and by what the two know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageServerAt {
    /// Where.
    pub address: Address,
    /// Needed beyond this host.
    pub tls: Option<TlsFiles>,
}

/// The pages of a page server.
#[derive(Debug)]
pub(super) struct RemoteSource {
    lanes: PeerLanes,
    address: Address,
    /// The snapshot's state.
    chain: Arc<Chain>,
    /// How long it may be away.
    limit: Duration,
    /// Of each lane.
    away: Mutex<[Option<Away>; 2]>,
    /// How those are asked again who answer, and not as they should.
    pace: Pace,
    /// Of what is missing when the guest has ended nobody is told.
    end: Arc<EndSignal>,
    /// Why nobody is asked any more.
    given_up: OnceLock<Arc<GivenUp>>,
}

/// A server that cannot be reached.
#[derive(Debug)]
struct Away {
    since: Instant,
    why: String,
}

/// Makes room between one try and the next with a server that is there, and breaks off again and again.
#[derive(Debug, Default)]
struct Pace {
    state: Mutex<Paced>,
    closed: Condvar,
}

#[derive(Debug, Default)]
struct Paced {
    /// The last try that failed, and what was waited for behind it.
    last: Option<(Instant, Duration)>,
    closed: bool,
}

impl Pace {
    fn lock(&self) -> MutexGuard<'_, Paced> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A try has failed: waits before the next, the longer the more of them failed in a row, and `longest` at most. The first
    /// is made again at once.
    fn wait(&self, longest: Duration) {
        let mut state = self.lock();
        let now = Instant::now();
        let wait = match state.last {
            Some((at, wait)) if now.saturating_duration_since(at) < FORGIVEN => {
                (wait * 2).clamp(AGAIN, longest.max(AGAIN))
            }
            _ => Duration::ZERO,
        };
        // Who comes meanwhile finds that as the last.
        state.last = Some((now + wait, wait));
        let waited = (self.closed).wait_timeout_while(state, wait, |state| !state.closed);
        drop(waited);
    }

    fn close(&self) {
        self.lock().closed = true;
        self.closed.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.lock().closed
    }
}

/// Another one has taken the server's place.
#[derive(Debug, thiserror::Error)]
#[error(
    "the page server at {0} was replaced by one of another snapshot, of which nothing is taken: {1}"
)]
struct Replaced(Address, #[source] Arc<PeerError>);

/// A server was away for too long.
#[derive(Debug, thiserror::Error)]
#[error("the page server at {address} has been away for {}: {why}", units::time(*.after))]
struct GivenUp {
    address: Address,
    after: Duration,
    why: String,
}

impl RemoteSource {
    /// Connects to the server, which has to have the memory of `chain`'s snapshot, and is given up when it is away for
    /// `limit`. Blocks for seconds at most.
    ///
    /// # Errors
    /// [`LazyError::PageServer`], [`LazyError::Silent`], [`LazyError::OtherSnapshot`], [`LazyError::Tls`].
    pub(super) fn connect(
        at: &PageServerAt,
        chain: &Arc<Chain>,
        limit: Duration,
        end: &Arc<EndSignal>,
    ) -> Result<Self, LazyError> {
        let tls = at.tls.as_ref().map(Tls::load).transpose()?;
        let newest = chain.newest();
        let image = newest.map_or(0, |link| link.id().image());
        let lane = || {
            let (address, tls) = (at.address.clone(), tls.clone());
            let dial = move |patience: Duration| -> io::Result<Box<dyn Wire>> {
                let connected = connect(&address, tls.as_ref(), Instant::now() + patience);
                let connection = connected.map_err(|error| {
                    let kind = match &error {
                        ConnectError::Exposed(_) => io::ErrorKind::PermissionDenied,
                        ConnectError::Refused(_) => io::ErrorKind::ConnectionRefused,
                        ConnectError::Missing(_) => io::ErrorKind::NotFound,
                        ConnectError::Failed { source, .. } => source.kind(),
                    };
                    io::Error::new(kind, error)
                })?;
                Ok(Box::new(connection.duplex()))
            };
            PeerSource::connect(dial, config(limit, image))
        };
        let both = lane().and_then(|fault| Ok(PeerLanes::new(fault, lane()?)));
        let lanes = both.map_err(|source| match (source, newest) {
            (PeerError::Image { theirs, .. }, Some(link)) => LazyError::OtherSnapshot {
                address: at.address.clone(),
                theirs,
                dir: link.dir().to_owned(),
                id: link.id(),
            },
            (PeerError::Silent(_), _) => LazyError::Silent {
                address: at.address.clone(),
                limit: silence(limit),
            },
            (source, _) => LazyError::PageServer {
                address: at.address.clone(),
                source,
            },
        })?;
        Ok(RemoteSource {
            lanes,
            address: at.address.clone(),
            chain: Arc::clone(chain),
            limit,
            away: Mutex::default(),
            pace: Pace::default(),
            end: Arc::clone(end),
            given_up: OnceLock::new(),
        })
    }

    /// Nothing more is asked for.
    pub(super) fn close(&self) {
        // First: who has no answer for it is not to say that the server is away.
        self.pace.close();
        self.lanes.close();
    }

    /// Whether it matters to nobody that the server does not answer.
    fn is_over(&self) -> bool {
        self.pace.is_closed() || self.end.is_told()
    }

    fn away(&self) -> MutexGuard<'_, [Option<Away>; 2]> {
        // What is in it is whole after each statement.
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is that is waited for, if the server is away.
    pub(super) fn waits_for(&self) -> Option<String> {
        let away = self.away();
        let why = &away.iter().flatten().next()?.why;
        Some(format!(
            "the page server at {} is away: {why}",
            self.address
        ))
    }

    /// For how long the server has been away by now, and after how long it is given up; none where it is there.
    pub(super) fn is_away(&self) -> Option<ServerAway> {
        let away = self.away();
        let since = away.iter().flatten().map(|of| of.since.elapsed()).max()?;
        Some(ServerAway {
            address: self.address.to_string(),
            away_s: since.as_secs(),
            given_up_after_s: self.limit.as_secs(),
        })
    }

    /// Whether the server is away and not given up: somebody is asking it, and what else is asked would wait behind that.
    pub(super) fn is_away_for_now(&self) -> bool {
        self.given_up.get().is_none() && self.away().iter().any(Option::is_some)
    }

    /// Notes that the server does not answer, for this reason: whether it is waited for still, or it is given up.
    fn does_not_answer(
        &self,
        lane: Lane,
        first: Gfn,
        source: &PeerError,
    ) -> Result<(), SourceError> {
        let why = Words(source).to_string();
        let mut lanes = self.away();
        let is_new = lanes.iter().all(Option::is_none);
        let away = of_lane(&mut lanes, lane);
        let since = away.as_ref().map_or_else(
            || {
                // One that says nothing has been away since its last word, and one that does not answer since it was asked, or
                // its last answer; longer than either may be only if this process was stopped meanwhile, which is no
                // fault of the server's.
                let silence = silence(self.limit);
                let silent = match source {
                    PeerError::Silent(silent) => (*silent).min(silence),
                    PeerError::NoAnswer { after, quiet, .. } if *after <= self.limit + silence => {
                        *quiet
                    }
                    _ => Duration::ZERO,
                };
                let now = Instant::now();
                now.checked_sub(silent).unwrap_or(now)
            },
            |away| away.since,
        );
        let after = since.elapsed();
        if self.pace.is_closed() {
            return Err(ended(first));
        }
        if is_new && after < self.limit && !self.is_over() {
            log::warn!(
                "the page server at {} does not answer: {why}; it is tried again for {}",
                self.address,
                units::time(self.limit)
            );
        }
        *away = Some(Away {
            since,
            why: why.clone(),
        });
        match after < self.limit {
            true => {
                drop(lanes);
                // Where nobody is, trying has its own pace.
                if !matches!(source, PeerError::Connect(_)) {
                    self.pace.wait(LONGEST.min(self.limit / 8));
                }
                Ok(())
            }
            false => {
                let given_up = GivenUp {
                    address: self.address.clone(),
                    after,
                    why,
                };
                let given_up = self.given_up.get_or_init(|| Arc::new(given_up));
                // Whoever waits still waits for nothing.
                self.lanes.close();
                Err(lost(first, given_up))
            }
        }
    }

    /// Notes that the server answers on a lane; whether it was away, and is not any more.
    fn answers(&self, lane: Lane) -> bool {
        let mut lanes = self.away();
        of_lane(&mut lanes, lane).take().is_some() && lanes.iter().all(Option::is_none)
    }

    /// From this address up to `end`: whether the state says that it is zero, and where that ends.
    fn known(&self, at: u64, end: u64) -> (bool, u64) {
        match self.chain.newest().filter(|link| link.parent().is_none()) {
            Some(link) => link.stored_from(at, end),
            // What an incremental one has not may be anything.
            None => (false, end),
        }
    }
}

fn of_lane<T>([fault, prefetch]: &mut [T; 2], lane: Lane) -> &mut T {
    match lane {
        Lane::Fault => fault,
        _ => prefetch,
    }
}

fn ended(gfn: Gfn) -> SourceError {
    SourceError::Peer {
        gfn,
        source: Arc::new(PeerError::Ended),
    }
}

fn lost(gfn: Gfn, given_up: &Arc<GivenUp>) -> SourceError {
    SourceError::Other {
        gfn,
        transient: false,
        source: Box::new(Arc::clone(given_up)),
    }
}

/// How long a server may say nothing that is given up after `limit`.
fn silence(limit: Duration) -> Duration {
    SILENCE.min(limit / 2).max(BEAT * 2)
}

fn config(limit: Duration, image: u64) -> PeerConfig {
    PeerConfig {
        beat: BEAT,
        silence: silence(limit),
        answer: limit,
        // Asked again it is here, where it is counted how long that has been so.
        tries: 1,
        // A round is some seconds; how many there are is `limit`'s to say.
        reconnect: Reconnect {
            tries: 2,
            backoff: Duration::from_millis(50),
            longest_backoff: Duration::from_millis(250),
            patience: CONNECT.min(limit),
        },
        image: Some(image),
        ..PeerConfig::default()
    }
}

impl PageSource for RemoteSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let at = first.0.saturating_mul(PAGE_SIZE);
        let end = at.saturating_add(into.len() as u64);
        if self.known(at, end) == (true, end) {
            return Ok(Fetched::Zero);
        }
        loop {
            if let Some(given_up) = self.given_up.get() {
                return Err(lost(first, given_up));
            }
            match self.lanes.fetch_for(lane, first, into) {
                // The other lane has been away for longer.
                Err(_) if self.given_up.get().is_some() => {}
                Err(SourceError::Peer { source, .. })
                    if source.is_transient() && !matches!(*source, PeerError::Told { .. }) =>
                {
                    self.does_not_answer(lane, first, &source)?;
                }
                Err(SourceError::Peer { source, .. })
                    if matches!(*source, PeerError::Image { .. }) =>
                {
                    self.answers(lane);
                    return Err(SourceError::Other {
                        gfn: first,
                        transient: false,
                        source: Box::new(Replaced(self.address.clone(), source)),
                    });
                }
                fetched => {
                    // Also where it is an error: nobody is waited for any more.
                    if self.answers(lane) && fetched.is_ok() && !self.is_over() {
                        log::warn!("the page server at {} answers again", self.address);
                    }
                    return fetched;
                }
            }
        }
    }

    fn overtakes(&self) -> bool {
        true
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        let at = first.0.saturating_mul(PAGE_SIZE);
        let end = at.saturating_add(pages.saturating_mul(PAGE_SIZE));
        let (_, until) = match self.known(at, end) {
            // Of what is not zero nothing is known of where it is read from: all of it is asked for at once.
            (false, _) => (false, end),
            zeros => zeros,
        };
        (until.saturating_sub(at) / PAGE_SIZE).clamp(1, pages.max(1))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use async_pf::ZeroSource;
    use async_pf::peer::{PageServer, ServerConfig};

    use super::*;

    #[test]
    fn the_time_without_an_answer_is_time_away_and_one_that_answers_others_meanwhile_is_there() {
        let limit = Duration::from_secs(60);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Arc::new(PageServer::new(
            Arc::new(ZeroSource),
            ServerConfig::default(),
        ));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let server = Arc::clone(&server);
                std::thread::spawn(move || server.serve(&stream));
            }
        });
        let at = PageServerAt {
            address: format!("unix:{}", path.display()).parse().unwrap(),
            tls: None,
        };
        let chain = Arc::new(Chain::open_all(&[]).unwrap().0);
        let end = Arc::new(EndSignal::new().unwrap());
        let connect = || RemoteSource::connect(&at, &chain, limit, &end).unwrap();
        let is_given_up = |after, quiet| {
            let why = PeerError::NoAnswer {
                id: 1,
                gfn: Gfn(0),
                after,
                quiet,
            };
            let noted = connect().does_not_answer(Lane::Prefetch, Gfn(0), &why);
            noted.err().map(|why| Words(&why).to_string())
        };
        let why = is_given_up(limit, limit).unwrap();
        assert!(why.contains("has been away for 1 min"), "{why}");
        // For half of it only; or this process stood still; or something else had its answer.
        for (after, quiet) in [
            (limit / 2, limit / 2),
            (limit * 3, limit * 3),
            (limit, Duration::ZERO),
        ] {
            assert_eq!(is_given_up(after, quiet), None);
        }
    }

    #[test]
    fn a_server_that_is_there_and_breaks_off_is_waited_for_between_tries_and_one_that_is_not_by_who_connects()
     {
        let server = ServerConfig {
            beat: BEAT,
            ..ServerConfig::default()
        };
        let server = Arc::new(PageServer::new(Arc::new(ZeroSource), server));
        let limit = Duration::from_secs(3600);
        let lane = || {
            let server = Arc::clone(&server);
            let dial = move |_: Duration| -> io::Result<Box<dyn Wire>> {
                let (ours, theirs) = UnixStream::pair()?;
                let server = Arc::clone(&server);
                std::thread::spawn(move || server.serve(&theirs));
                Ok(Box::new(ours))
            };
            PeerSource::connect(dial, config(limit, 0)).unwrap()
        };
        let source = RemoteSource {
            lanes: PeerLanes::new(lane(), lane()),
            address: "unix:/s".parse().unwrap(),
            chain: Arc::new(Chain::empty()),
            limit,
            away: Mutex::default(),
            pace: Pace::default(),
            end: Arc::new(EndSignal::new().unwrap()),
            given_up: OnceLock::new(),
        };
        let paced = |error: PeerError| {
            let waits = source.does_not_answer(Lane::Fault, Gfn(0), &error);
            waits.unwrap();
            source.pace.lock().last.is_some()
        };
        let nobody = io::ErrorKind::ConnectionRefused.into();
        assert!(!paced(PeerError::Connect(nobody)));
        assert!(paced(PeerError::Closed));
    }

    #[test]
    fn who_breaks_off_again_and_again_is_asked_less_and_less_often_and_nobody_waits_behind_the_end()
    {
        let pace = Pace::default();
        let longest = AGAIN * 3;
        let mut waits = Vec::new();
        for _ in 0..5 {
            let begun = Instant::now();
            pace.wait(longest);
            let waited = pace.lock().last.unwrap().1;
            assert!(begun.elapsed() >= waited);
            waits.push(waited);
        }
        // A host on which that took ten seconds has forgiven it.
        if !waits[1..].contains(&Duration::ZERO) {
            assert_eq!(waits, [0, 1, 2, 3, 3].map(|times| AGAIN * times));
        }
        let far = Duration::from_secs(3600);
        pace.lock().last = Some((Instant::now(), far));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pace.wait(far));
            pace.close();
            waiting.join().unwrap();
        });
    }
}
