// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the threads of a device's queue pairs and its registers share: which pairs are in use, the link, counters.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tap::Tap;
use crate::devices::virtio::interrupt::DriverLink;

/// A counter that only grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `more`.
    pub fn add(&self, more: u64) {
        // Relaxed: a number for people, that orders nothing.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The number so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// What a device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames that the guest was given.
    pub rx_frames: Counter,
    /// Frames from the tap that the guest's buffers were too small for.
    pub rx_dropped: Counter,
    /// Frames that the tap took.
    pub tx_frames: Counter,
    /// Frames of the guest's that are none, that the kernel refused, or that met no tap.
    pub tx_dropped: Counter,
}

/// A queue pair's tap.
#[derive(Debug)]
pub struct Pair<T> {
    /// The queue of the tap.
    pub tap: T,
    /// It is in use, and the tap's queue is attached. Held by the pair's thread while it works, so that who detaches it
    /// knows that nothing more comes to the guest by it.
    on: Mutex<bool>,
    /// Written when `on` has changed.
    changed: EventFd,
}

impl<T> Pair<T> {
    /// Whether it is in use; that stays so as long as the guard is held.
    pub fn on(&self) -> MutexGuard<'_, bool> {
        self.on.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when it has come into use or out of it.
    pub fn changed(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    /// The change has been seen.
    pub fn take_change(&self) {
        // EAGAIN: there was none.
        let _ = self.changed.read();
    }
}

/// A device as its threads have it.
#[derive(Debug)]
pub struct Shared<T> {
    /// The tap's name, for messages.
    pub name: String,
    /// All queue pairs.
    pub pairs: Vec<Arc<Pair<T>>>,
    /// What was done.
    pub counters: Counters,
    link: AtomicBool,
    gone: AtomicBool,
}

impl<T: Tap> Shared<T> {
    /// With attached taps, and the link up.
    ///
    /// # Errors
    /// No descriptors.
    pub fn new(name: String, taps: Vec<T>) -> io::Result<Self> {
        let pair = |tap| {
            Ok(Arc::new(Pair {
                tap,
                on: Mutex::new(true),
                changed: EventFd::new(EFD_NONBLOCK)?,
            }))
        };
        Ok(Shared {
            name,
            pairs: taps.into_iter().map(pair).collect::<io::Result<_>>()?,
            counters: Counters::default(),
            link: AtomicBool::new(true),
            gone: AtomicBool::new(false),
        })
    }

    /// Has the first `count` pairs in use and no others. When it returns, nothing comes to the guest by the others.
    ///
    /// # Errors
    /// The tap's; all is as it was.
    pub fn set_pairs(&self, count: usize) -> io::Result<()> {
        let mut changed = Vec::new();
        for (at, pair) in self.pairs.iter().enumerate() {
            match pair.set(at < count) {
                Ok(true) => changed.push((pair, at < count)),
                Ok(false) => {}
                Err(error) => {
                    for (pair, on) in changed {
                        if let Err(error) = pair.set(!on) {
                            log::error!("{}: a queue stays as it is: {error}", self.name);
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether the guest is told of a carrier.
    pub fn link(&self) -> bool {
        // Relaxed, here and in `set_link`: the configuration's generation orders it.
        self.link.load(Ordering::Relaxed)
    }

    /// The carrier has come or gone, which is told if `driver` is to hear of it; whether that was a change.
    pub fn set_link(&self, up: bool, driver: Option<&DriverLink>) -> bool {
        let up = up && !self.gone.load(Ordering::Relaxed);
        let changed = self.link.swap(up, Ordering::Relaxed) != up;
        if let Some(driver) = driver.filter(|_| changed) {
            driver.configuration_changed();
        }
        changed
    }

    /// The tap is gone for good. The first time it is said why.
    pub fn lost(&self, error: &io::Error, driver: Option<&DriverLink>) {
        // Relaxed: who is first says it, and that is all.
        if !self.gone.swap(true, Ordering::Relaxed) {
            log::error!(
                "the tap {:?} is gone ({error}): its guest has no carrier any more",
                self.name
            );
        }
        self.set_link(false, driver);
    }
}

impl<T: Tap> Pair<T> {
    /// Whether that was a change.
    fn set(&self, on: bool) -> io::Result<bool> {
        let mut is = self.on();
        if *is == on {
            return Ok(false);
        }
        self.tap.set_attached(on)?;
        *is = on;
        // EAGAIN: it is full, so it wakes as it is.
        let _ = self.changed.write(1);
        Ok(true)
    }
}
