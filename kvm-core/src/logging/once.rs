// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One line for each thing that a guest asks for in vain, in memory that no guest can make grow.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::limit::{Admission, RateLimit};
use crate::identity::Identity;

/// Keys that one place remembers.
const KEYS: usize = 64;

/// Says of a key whether it is new: the first line about it is logged, and no other.
///
/// A place remembers [`OncePerKey::CAPACITY`] keys, of all VMs of the process together. A guest that
/// comes with more (one that tries every port) gets one line in [`OncePerKey::INTERVAL`] from then on,
/// which says how many were suppressed. `const`, so that it can be a static; lock-free; about 600 bytes.
#[derive(Debug)]
pub struct OncePerKey {
    /// Digests of VM and key, filled from the front; 0 is an empty one.
    ///
    /// Relaxed: a slot is written once, and guards no other memory. Of two threads that come with the
    /// same new key one wins the compare-and-swap, and the other then finds its own key there.
    seen: [AtomicU64; KEYS],
    beyond: RateLimit,
    /// Lines about a key that was seen before.
    repeats: AtomicU64,
}

/// What an [`OncePerKey`] says to a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Occurrence {
    /// The first: log it.
    Logged {
        /// Lines about other keys that were suppressed for want of room, and not told of yet.
        suppressed: u64,
    },
    /// It was logged before.
    Repeated,
    /// Its key is one too many.
    Suppressed,
}

impl OncePerKey {
    /// Keys that it remembers.
    pub const CAPACITY: usize = KEYS;
    /// Once these are used up: one line in this time.
    pub const INTERVAL: Duration = Duration::from_secs(60);

    /// One that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            seen: [const { AtomicU64::new(0) }; KEYS],
            beyond: RateLimit::new(Self::INTERVAL, 1),
            repeats: AtomicU64::new(0),
        }
    }

    /// The guest of `who` came with `key`, at `now` on any monotonic clock. The vCPU of `who` does not
    /// count, its VM does. Never blocks; allocates nothing.
    pub fn occurred(&self, who: &Identity, key: u64, now: Duration) -> Occurrence {
        let digest = digest(who, key);
        for slot in &self.seen {
            let mut found = slot.load(Ordering::Relaxed);
            if found == 0 {
                match slot.compare_exchange(0, digest, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => return Occurrence::Logged { suppressed: 0 },
                    Err(other) => found = other,
                }
            }
            if found == digest {
                self.repeats.fetch_add(1, Ordering::Relaxed);
                return Occurrence::Repeated;
            }
        }
        match self.beyond.admit(now) {
            Admission::Passed { suppressed } => Occurrence::Logged { suppressed },
            Admission::Suppressed => Occurrence::Suppressed,
        }
    }

    /// How often a key came again.
    #[must_use]
    pub fn repeats(&self) -> u64 {
        self.repeats.load(Ordering::Relaxed)
    }
}

impl Default for OncePerKey {
    fn default() -> Self {
        Self::new()
    }
}

/// VM and key in one number that is not 0. Two may share one, by chance: then one line is missing.
fn digest(who: &Identity, key: u64) -> u64 {
    super::key((who.vm_name(), key)).max(1)
}
