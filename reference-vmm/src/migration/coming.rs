// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest that is on its way here: from whom, since when, and how much of its memory has come.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use super::guest::{ArrivingMemory, Refusal};
use crate::text::printable;
use crate::units;

/// What is known of a guest that comes, for whoever asks meanwhile.
#[derive(Debug, Default)]
pub struct Coming {
    offered: OnceLock<Offered>,
    /// Bytes of contents that came, a page as often as it did, and those that were said to be zeros.
    contents: AtomicU64,
    zeros: AtomicU64,
    arrived: OnceLock<Duration>,
}

#[derive(Debug)]
struct Offered {
    from: String,
    memory: u64,
    since: Instant,
}

/// Where a guest is that comes, or has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Came {
    /// From whom, as this host sees it.
    pub from: String,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes of its contents that have come so far, a page as often as it came.
    pub received_bytes: u64,
    /// Bytes that were said to be zeros, as often as that was said.
    pub zero_bytes: u64,
    /// Microseconds since it was offered, or from there until it had come.
    pub elapsed_us: u64,
}

impl Coming {
    /// A machine of so much memory was offered and can be here. Only the first counts.
    pub(super) fn is_offered(&self, from: String, memory: u64) {
        let since = Instant::now();
        let _ = self.offered.set(Offered {
            from,
            memory,
            since,
        });
    }

    /// It runs here, or is paused as it was.
    pub(super) fn has_arrived(&self) {
        if let Some(offered) = self.offered.get() {
            let _ = self.arrived.set(offered.since.elapsed());
        }
    }

    /// How far it is; none before one was offered. Does not block.
    pub fn came(&self) -> Option<Came> {
        let offered = self.offered.get()?;
        let arrived = self.arrived.get().copied();
        let elapsed = arrived.unwrap_or_else(|| offered.since.elapsed());
        // Relaxed: counts for people, of which none says anything of the memory itself.
        Some(Came {
            from: offered.from.clone(),
            memory_bytes: offered.memory,
            received_bytes: self.contents.load(Ordering::Relaxed),
            zero_bytes: self.zeros.load(Ordering::Relaxed),
            elapsed_us: u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX),
        })
    }
}

impl Came {
    /// Of one that is on its way to `address`, in words.
    pub fn coming(&self, address: &str) -> String {
        format!(
            "a guest is on its way here, to {address}, from {}, for {} by now: {} of contents and {} of zeros have come, \
             its memory is {}; how long it will take its source knows (migrate-status there)",
            printable(&self.from),
            units::time(self.elapsed()),
            units::bytes(self.received_bytes),
            units::bytes(self.zero_bytes),
            units::bytes(self.memory_bytes),
        )
    }

    /// Of one that is here.
    pub fn arrived(&self) -> String {
        format!(
            "from {} in {}",
            printable(&self.from),
            units::time(self.elapsed())
        )
    }

    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.elapsed_us)
    }
}

/// Told that a guest was offered.
pub(super) type Tell = Box<dyn FnOnce(&Coming) + Send>;

/// Memory that arrives, and what of it is counted.
pub struct Counted<'a, M> {
    pub(super) memory: M,
    pub(super) coming: &'a Coming,
}

// Relaxed: counts for people, as above.
impl<M: ArrivingMemory> ArrivingMemory for Counted<'_, M> {
    fn page(&self, address: u64, bytes: &[u8]) -> Result<(), Refusal> {
        let len = bytes.len() as u64;
        self.coming.contents.fetch_add(len, Ordering::Relaxed);
        self.memory.page(address, bytes)
    }

    fn lend(
        &self,
        runs: &[Range<u64>],
        fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> Result<bool, Refusal> {
        let lent = self.memory.lend(runs, fill)?;
        if lent {
            let len: u64 = runs.iter().map(|run| run.end - run.start).sum();
            self.coming.contents.fetch_add(len, Ordering::Relaxed);
        }
        Ok(lent)
    }

    fn zero(&self, address: u64, len: u64) -> Result<(), Refusal> {
        self.coming.zeros.fetch_add(len, Ordering::Relaxed);
        self.memory.zero(address, len)
    }

    fn pre_fault(&self, enough: &dyn Fn() -> bool) {
        self.memory.pre_fault(enough);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Takes all.
    struct Sink;

    impl ArrivingMemory for Sink {
        fn page(&self, _: u64, _: &[u8]) -> Result<(), Refusal> {
            Ok(())
        }
        fn zero(&self, _: u64, _: u64) -> Result<(), Refusal> {
            Ok(())
        }
        fn lend(
            &self,
            runs: &[Range<u64>],
            fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
        ) -> Result<bool, Refusal> {
            fill(&[]);
            // Of the second half nothing is lent.
            Ok(runs.iter().all(|run| run.start < 0x10000))
        }
    }

    #[test]
    fn what_comes_is_counted_and_told_from_the_offer_until_it_is_here() {
        let coming = Coming::default();
        assert_eq!(coming.came(), None);
        coming.has_arrived();
        coming.is_offered("tcp:192.0.2.1:9".into(), 1 << 30);
        let memory = Counted {
            memory: Sink,
            coming: &coming,
        };
        memory.page(0, &[1; 4096]).unwrap();
        memory.zero(0x1000, 8192).unwrap();
        let mut fill = |_: &[VolatileSlice<'_>]| {};
        assert!(memory.lend(&[0..4096, 0x3000..0x5000], &mut fill).unwrap());
        let behind = 0x20000..0x21000;
        assert!(
            !memory
                .lend(std::slice::from_ref(&behind), &mut fill)
                .unwrap()
        );
        let came = coming.came().unwrap();
        assert_eq!((came.received_bytes, came.zero_bytes), (16384, 8192));
        let words = Came {
            elapsed_us: 2_500_000,
            ..came
        };
        assert_eq!(
            words.coming("unix:/s"),
            "a guest is on its way here, to unix:/s, from tcp:192.0.2.1:9, for 2.50 s by now: 16.0 KiB of contents and \
             8.00 KiB of zeros have come, its memory is 1.00 GiB; how long it will take its source knows (migrate-status \
             there)"
        );
        coming.has_arrived();
        assert_eq!(coming.came(), coming.came(), "its time stands still");
    }
}
