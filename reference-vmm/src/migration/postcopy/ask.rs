// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The destination's side: pages that are asked for when the guest runs, over two connections or more.
//!
//! What somebody waits for has a connection of its own: nothing of what nobody waits for is on it. All are the source's to
//! make, and to make again; here they are waited for, and what was asked for and not answered is asked for again
//! ([`async_pf::peer`]).

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_pf::peer::{PeerConfig, PeerError, PeerLanes, PeerSource, Reconnect, Wire};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::Gfn;

use super::LastWord;
use super::missing::Missing;
use crate::migration::link::Duplex;
use crate::migration::message::MigrationId;
use crate::migration::proof::image;

/// How long one try waits for a connection of the source's.
const TRY: Duration = Duration::from_millis(100);
/// How long a source that lives may take for an answer: by the least bandwidth there may be, some seconds.
const ANSWER: Duration = Duration::from_secs(120);

/// What memory of a machine comes later, and how.
pub struct Later {
    /// Which.
    pub missing: Missing,
    /// Where from.
    pub source: Arc<dyn PageSource>,
    /// Since when the source is waited for, if it is.
    pub waits: Arc<dyn Fn() -> Option<Duration> + Send + Sync>,
    /// Called once, when nothing more will be asked for: all is there, or the machine is over.
    pub enough: Enough,
}

/// Told what to say to the source, and how long that may take to hear it.
pub type Enough = Box<dyn FnOnce(LastWord, Duration) + Send>;

/// Waits so long for the next connection of this number; on the one before something was heard last then, if there was one.
pub type Next = dyn Fn(u32, Option<Instant>, Duration) -> Option<Duplex> + Send + Sync;

/// When something came last on a connection, or it was made.
#[derive(Clone, Debug, Default)]
struct LastHeard(Arc<Mutex<Option<Instant>>>);

impl LastHeard {
    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        // What is in it is whole after each statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) {
        *self.lock() = Some(Instant::now());
    }

    /// When; but longer ago than a connection may be silent only if this process was stopped meanwhile, which is not the
    /// source's silence.
    fn get(&self, silence: Duration) -> Option<Instant> {
        let earliest = Instant::now().checked_sub(silence);
        let heard = *self.lock();
        heard.map(|heard| earliest.map_or(heard, |earliest| heard.max(earliest)))
    }
}

/// A connection of which it is known when something came last.
struct HeardWire(Duplex, LastHeard);

impl Wire for HeardWire {
    fn set_tick(&self, tick: Duration) -> io::Result<()> {
        self.0.set_tick(tick)
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(into);
        if matches!(read, Ok(1..)) {
            self.1.now();
        }
        read
    }

    fn write(&self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn shutdown(&self) {
        self.0.shutdown();
    }
}

/// The next connection of this number, by which `heard` is kept.
fn next_of(
    (next, number): (&Next, u32),
    heard: &LastHeard,
    silence: Duration,
    patience: Duration,
) -> io::Result<Box<dyn Wire>> {
    let wire = next(number, heard.get(silence), patience).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "the source has not connected for pages",
        )
    })?;
    heard.now();
    Ok(Box::new(HeardWire(wire, heard.clone())))
}

/// Asks the source of a migration for pages.
#[derive(Debug)]
pub struct PostCopySource {
    lanes: PeerLanes,
}

impl PostCopySource {
    /// Waits up to `patience` for the source's connections, of which `bulk` and at least one carry what nobody waits for, and
    /// is asked from then on; `go_on` says whether that is still wanted.
    ///
    /// # Errors
    /// [`PeerError`]: they have not come, or are of another migration.
    pub fn connect(
        (id, bulk): (MigrationId, u32),
        next: &Arc<Next>,
        patience: Duration,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Self, PeerError> {
        let until = Instant::now() + patience;
        let mut connection = |number: u32| loop {
            let (next, heard) = (Arc::clone(next), LastHeard::default());
            let silence = PeerConfig::default().silence;
            let connect =
                move |patience: Duration| next_of((&*next, number), &heard, silence, patience);
            let config = PeerConfig {
                silence,
                answer: ANSWER,
                // As often as it takes: how long that may be is the page deadline's to say.
                tries: u32::MAX,
                reconnect: Reconnect {
                    tries: u32::MAX,
                    backoff: Duration::from_millis(1),
                    longest_backoff: Duration::from_millis(50),
                    patience: TRY,
                },
                // By what they are known to be of this migration.
                image: Some(image(id)),
                ..PeerConfig::default()
            };
            match PeerSource::connect(connect, config) {
                Err(why) if why.is_transient() && go_on() && Instant::now() < until => {}
                connected => break connected,
            }
        };
        let mut lanes = PeerLanes::new(connection(0)?, connection(1)?);
        for number in 2..=bulk {
            lanes = lanes.and(connection(number)?);
        }
        Ok(PostCopySource { lanes })
    }

    /// Nothing more is asked for.
    pub fn close(&self) {
        self.lanes.close();
    }
}

impl PageSource for PostCopySource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.lanes.fetch_for(lane, first, into)
    }

    fn overtakes(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn who_waits_for_the_next_connection_is_told_when_something_came_last_on_the_one_before() {
        let (said, hears) = std::sync::mpsc::channel();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wires = Mutex::new(vec![Box::new(ours) as Duplex]);
        let next = move |_, since: Option<Instant>, _| {
            said.send(since).unwrap();
            wires.lock().unwrap().pop()
        };
        let heard = LastHeard::default();
        let silence = Duration::from_secs(3600);
        let next = || next_of((&next, 0), &heard, silence, Duration::ZERO);
        let wire = next().unwrap();
        assert_eq!(hears.recv().unwrap(), None);
        // Which was made now.
        let ago = |time: u64| Instant::now().checked_sub(Duration::from_secs(time));
        let before = ago(1200).unwrap();
        *heard.lock() = Some(before);
        assert!(next().is_err());
        assert_eq!(hears.recv().unwrap(), Some(before));
        (&theirs).write_all(&[1]).unwrap();
        assert_eq!(wire.read(&mut [0; 8]).unwrap(), 1);
        assert!(next().is_err());
        assert!(hears.recv().unwrap().unwrap() > before);
        // This process stood still.
        *heard.lock() = ago(36_000);
        assert!(next().is_err());
        assert!(hears.recv().unwrap() > ago(7200));
    }
}
