// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`PeerLanes`]: a connection for what somebody waits for, and another for the rest.

use memslots::Gfn;

use super::{PeerSource, PeerStats};
use crate::{Fetched, Lane, PageSource, SourceError};

/// Pages of a peer over two connections. On one, an answer that somebody waits for comes behind the rest of one that nobody
/// does and whose bytes are on their way; here nothing of what nobody waits for is before it.
#[derive(Debug)]
pub struct PeerLanes {
    fault: PeerSource,
    prefetch: PeerSource,
}

impl PeerLanes {
    /// Of two connections with the same memory, which is the caller's to see to
    /// ([`PeerConfig::image`](super::PeerConfig::image)).
    pub fn new(fault: PeerSource, prefetch: PeerSource) -> Self {
        Self { fault, prefetch }
    }

    fn lane(&self, lane: Lane) -> &PeerSource {
        match lane {
            Lane::Fault => &self.fault,
            Lane::Prefetch => &self.prefetch,
        }
    }

    /// What a lane has done.
    pub fn stats(&self, lane: Lane) -> PeerStats {
        self.lane(lane).stats()
    }

    /// Ends both: whoever waits has [`PeerError::Ended`](super::PeerError::Ended) at once, and so has whoever asks later.
    pub fn close(&self) {
        self.fault.close();
        self.prefetch.close();
    }
}

impl PageSource for PeerLanes {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.lane(lane).fetch_for(lane, first, into)
    }

    fn overtakes(&self) -> bool {
        true
    }
}
