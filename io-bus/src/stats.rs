// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each range was asked, counted for whoever wants to know.
//!
//! Counting is off until [`IoBus::count`](crate::IoBus::count) turns it on. While it is off there
//! are no counters and no access writes one: the published tables say so themselves, in one field
//! that every access has at hand, and the whole price is the branch on it. While it is on, vCPUs
//! that use one device share its counters' cache line.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::Answer;
use crate::range::{BusKind, IoRange};
use crate::trace::Direction;

/// One range's counters. They go with the device when it moves.
#[derive(Debug, Default)]
pub(crate) struct RangeCounters {
    reads: AtomicU64,
    writes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    declined: AtomicU64,
    deferred: AtomicU64,
}

/// One bus's counters.
#[derive(Debug, Default)]
pub(crate) struct BusCounters {
    unclaimed: AtomicU64,
    last_unclaimed: AtomicU64,
}

/// Relaxed: a counter orders nothing, and a snapshot of several is no instant's.
fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl RangeCounters {
    pub(crate) fn count(&self, direction: Direction, len: usize, answer: &Answer) {
        match answer {
            Answer::Declined => return add(&self.declined, 1),
            Answer::Deferred(_) => add(&self.deferred, 1),
            Answer::Accepted => {}
        }
        let (accesses, bytes) = match direction {
            Direction::Read => (&self.reads, &self.read_bytes),
            Direction::Write => (&self.writes, &self.written_bytes),
        };
        add(accesses, 1);
        add(bytes, len as u64);
    }

    pub(crate) fn stats(&self, bus: BusKind, range: IoRange) -> RangeStats {
        RangeStats {
            bus,
            range,
            reads: get(&self.reads),
            writes: get(&self.writes),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            declined: get(&self.declined),
            deferred: get(&self.deferred),
        }
    }
}

impl BusCounters {
    pub(crate) fn count_unclaimed(&self, address: u64) {
        self.last_unclaimed.store(address, Ordering::Relaxed);
        // Release: pairs with the Acquire of `stats`. Who sees the count sees an address.
        self.unclaimed.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn stats(&self, bus: BusKind) -> UnclaimedStats {
        // Acquire: pairs with the Release of `count_unclaimed`.
        let accesses = self.unclaimed.load(Ordering::Acquire);
        UnclaimedStats {
            bus,
            accesses,
            last_address: (accesses > 0).then(|| get(&self.last_unclaimed)),
        }
    }
}

/// What one range was asked since counting began, or since it was registered. Of an access that is
/// cut into pieces, each piece counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeStats {
    /// The bus.
    pub bus: BusKind,
    /// Where the device is now.
    pub range: IoRange,
    /// Reads that the device took.
    pub reads: u64,
    /// Writes that it took.
    pub writes: u64,
    /// Bytes of those reads.
    pub read_bytes: u64,
    /// Bytes of those writes.
    pub written_bytes: u64,
    /// Accesses that it declined.
    pub declined: u64,
    /// How many of those that it took it answered later, or [declined](crate::Completion::decline)
    /// later: that is unclaimed as an outcome and for the trace hook, but no [`UnclaimedStats`].
    pub deferred: u64,
}

/// What nobody answered on one bus since counting began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnclaimedStats {
    /// The bus. A write that the fast MMIO bus does not take goes on to MMIO, and counts there.
    pub bus: BusKind,
    /// How many accesses.
    pub accesses: u64,
    /// Where the last of them was. (Of two at the same time, either.)
    pub last_address: Option<u64>,
}

/// A snapshot of the counters, from [`IoBus::stats`](crate::IoBus::stats).
///
/// vCPUs go on meanwhile: each number is right for some moment during the call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusStats {
    /// Every range, bus by bus, in the order in which they are searched.
    pub ranges: Vec<RangeStats>,
    /// Each bus, in the order of [`BusKind::ALL`].
    pub unclaimed: [UnclaimedStats; BusKind::COUNT],
}
