// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The destination's side: pages that are asked for when the guest runs, over two connections or more.
//!
//! What somebody waits for has a connection of its own: nothing of what nobody waits for is on it. All are the source's to
//! make, and to make again; here they are waited for, and what was asked for and not answered is asked for again
//! ([`async_pf::peer`]).

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
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

/// Waits so long for the next connection of this number.
pub type Next = dyn Fn(u32, Duration) -> Option<Duplex> + Send + Sync;

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
            let next = Arc::clone(next);
            let connect = move |patience: Duration| -> io::Result<Box<dyn Wire>> {
                next(number, patience).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the source has not connected for pages",
                    )
                })
            };
            let config = PeerConfig {
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
