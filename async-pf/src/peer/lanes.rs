// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`PeerLanes`]: a connection for what somebody waits for, and one or more for the rest.

use std::sync::atomic::{AtomicUsize, Ordering};

use memslots::Gfn;

use super::{PeerSource, PeerStats};
use crate::{Fetched, Lane, PageSource, SourceError};

/// Pages of a peer over two connections or more. On one, an answer that somebody waits for comes behind the rest of one that
/// nobody does and whose bytes are on their way; here nothing of what nobody waits for is before it.
///
/// Of several that carry what nobody waits for, each fetch takes the one with the fewest under way, and of those with as many
/// the next in turn: one that stands still keeps what it has, and the others carry the rest.
#[derive(Debug)]
pub struct PeerLanes {
    fault: PeerSource,
    /// At least one.
    prefetch: Vec<Bulk>,
    /// Who is asked first which has fewest. Relaxed: as of those.
    turn: AtomicUsize,
}

/// A connection for what nobody waits for.
#[derive(Debug)]
struct Bulk {
    peer: PeerSource,
    /// Fetches under way. Relaxed: which connection a fetch takes is a matter of speed alone.
    under_way: AtomicUsize,
}

impl From<PeerSource> for Bulk {
    fn from(peer: PeerSource) -> Self {
        Self {
            peer,
            under_way: AtomicUsize::new(0),
        }
    }
}

/// A fetch that is under way.
struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PeerLanes {
    /// Of two connections with the same memory, which is the caller's to see to
    /// ([`PeerConfig::image`](super::PeerConfig::image)).
    pub fn new(fault: PeerSource, prefetch: PeerSource) -> Self {
        Self {
            fault,
            prefetch: vec![prefetch.into()],
            turn: AtomicUsize::new(0),
        }
    }

    /// With one more connection, of the same memory, for what nobody waits for. Who fetches one thing after another, as a
    /// `pager::Pager` does what nobody waits for, has them take turns: all are at work at once only for as many
    /// fetches at once.
    #[must_use]
    pub fn and(mut self, prefetch: PeerSource) -> Self {
        self.prefetch.push(prefetch.into());
        self
    }

    /// The connection that a fetch takes for which nobody waits.
    fn next(&self) -> Option<&Bulk> {
        let count = self.prefetch.len();
        let turn = match count {
            1 => 0,
            _ => self.turn.fetch_add(1, Ordering::Relaxed),
        };
        let in_turn = self.prefetch.iter().cycle().skip(turn % count.max(1));
        in_turn
            .take(count)
            .min_by_key(|bulk| bulk.under_way.load(Ordering::Relaxed))
    }

    fn peers(&self, lane: Lane) -> impl Iterator<Item = &PeerSource> {
        let (fault, prefetch) = match lane {
            Lane::Fault => (Some(&self.fault), None),
            Lane::Prefetch => (None, Some(self.prefetch.iter().map(|bulk| &bulk.peer))),
        };
        fault.into_iter().chain(prefetch.into_iter().flatten())
    }

    /// What a lane has done, over all of its connections.
    pub fn stats(&self, lane: Lane) -> PeerStats {
        let all = self.peers(lane).map(PeerSource::stats);
        all.fold(PeerStats::default(), |sum, one| PeerStats {
            connections: sum.connections + one.connections,
            asks: sum.asks + one.asks,
            again: sum.again + one.again,
            answers: sum.answers + one.answers,
            bytes: sum.bytes + one.bytes,
            beats: sum.beats + one.beats,
        })
    }

    /// Ends all: whoever waits has [`PeerError::Ended`](super::PeerError::Ended) at once, and so has whoever asks later.
    pub fn close(&self) {
        let lanes = [Lane::Fault, Lane::Prefetch].into_iter();
        lanes
            .flat_map(|lane| self.peers(lane))
            .for_each(PeerSource::close);
    }
}

impl PageSource for PeerLanes {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let bulk = match lane {
            // Takes nobody's turn.
            Lane::Fault => None,
            Lane::Prefetch => self.next(),
        };
        let Some(bulk) = bulk else {
            return self.fault.fetch_for(lane, first, into);
        };
        bulk.under_way.fetch_add(1, Ordering::Relaxed);
        let _under_way = UnderWay(&bulk.under_way);
        bulk.peer.fetch_for(lane, first, into)
    }

    fn overtakes(&self) -> bool {
        true
    }
}
