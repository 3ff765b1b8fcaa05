// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An edge that a device asks for in one place and that is sent in another.
//!
//! To interrupt the guest may take long, and the guest has a hand in it: where it rewrites the vector of a
//! level-triggered pin again and again, each interrupt of the pin is a commit of KVM's routing table, which
//! waits for a grace period with the IOAPIC's lock held. Two things follow:
//!
//! - No device's own lock is held meanwhile. The register model asks ([`Edge::want`]) under the lock, and
//!   whoever was in the model sends behind it ([`Edge::send`]).
//! - The main thread, which alone serves signals and the console's input, never waits for it
//!   ([`Edge::try_send`]). An edge that it could not send at once stays wanted, and a vCPU's thread sends it:
//!   the guest waits for what the guest has done.
//!
//! ```text
//!   vCPU thread:  lock ► model ► want ► unlock ► send ─────────────► may wait
//!   main thread:  lock ► model ► want ► unlock ► try_send ─► sent, or owed:
//!                                                   asks the vCPUs ► send
//! ```
//!
//! Edges that are asked for before one is sent are one, as they are for the controller, which has a bit for
//! a pin and no count.

use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;

/// A [`Trigger`] that has a form for a thread that must not wait.
pub trait TryTrigger: Trigger {
    /// Interrupts the guest, or says false where that could not be done at once. Never waits.
    ///
    /// # Errors
    /// As [`Trigger::trigger`].
    fn try_trigger(&self) -> Result<bool, Self::E>;
}

/// What owes the guest an interrupt that the main thread could not send.
pub trait Owing: Send + Sync {
    /// Sends it, if it is owed still. May wait: for a vCPU's thread. Its failure is told where the
    /// interrupt itself tells it.
    fn send_owed(&self);
}

/// An edge of `source`, wanted or not.
#[derive(Debug)]
pub struct Edge<T> {
    source: T,
    wanted: AtomicBool,
}

impl<T> Edge<T> {
    /// One that nobody wants yet.
    pub fn new(source: T) -> Self {
        Edge {
            source,
            wanted: AtomicBool::new(false),
        }
    }

    /// Asks for an edge, to be sent by whoever comes to it next.
    pub fn want(&self) {
        // Release, with the Acquire of `take`: who sends it has seen what the guest is to be told of.
        self.wanted.store(true, Ordering::Release);
    }

    /// Whether one is wanted that has not been sent.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// On a device's every access: a locked instruction only where there is something to take.
    fn take(&self) -> bool {
        self.is_wanted() && self.wanted.swap(false, Ordering::AcqRel)
    }
}

impl<T: Trigger> Edge<T> {
    /// Sends what is wanted. May wait.
    ///
    /// # Errors
    /// The trigger's; the edge is lost, and not wanted any more.
    pub fn send(&self) -> Result<(), T::E> {
        match self.take() {
            true => self.source.trigger(),
            false => Ok(()),
        }
    }
}

impl<T: TryTrigger> Edge<T> {
    /// Sends what is wanted, or leaves it so and says false. Never waits.
    ///
    /// # Errors
    /// As [`Edge::send`].
    pub fn try_send(&self) -> Result<bool, T::E> {
        if !self.take() {
            return Ok(true);
        }
        let sent = self.source.try_trigger()?;
        if !sent {
            self.want();
        }
        Ok(sent)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    /// Counts, and has to wait where it is told to.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Count {
        sent: Arc<AtomicU32>,
        busy: Arc<AtomicBool>,
    }

    impl Count {
        pub(crate) fn sent(&self) -> u32 {
            self.sent.load(Ordering::Relaxed)
        }

        /// Whether it could not be sent at once.
        pub(crate) fn busy(&self, busy: bool) {
            self.busy.store(busy, Ordering::Relaxed);
        }
    }

    impl Trigger for Count {
        type E = io::Error;
        fn trigger(&self) -> io::Result<()> {
            self.sent.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    impl TryTrigger for Count {
        fn try_trigger(&self) -> io::Result<bool> {
            if self.busy.load(Ordering::Relaxed) {
                return Ok(false);
            }
            self.trigger().map(|()| true)
        }
    }

    #[test]
    fn an_edge_is_sent_once_for_all_who_wanted_it() {
        let count = Count::default();
        let edge = Edge::new(count.clone());
        edge.send().unwrap();
        assert!(edge.try_send().unwrap());
        assert_eq!(count.sent(), 0);
        edge.want();
        edge.want();
        assert!(edge.is_wanted());
        edge.send().unwrap();
        edge.send().unwrap();
        assert_eq!((count.sent(), edge.is_wanted()), (1, false));
    }

    #[test]
    fn one_that_would_have_to_wait_stays_wanted_until_someone_may() {
        let count = Count::default();
        let edge = Edge::new(count.clone());
        count.busy(true);
        edge.want();
        assert!(!edge.try_send().unwrap());
        assert!(!edge.try_send().unwrap());
        assert!(edge.is_wanted());
        edge.send().unwrap();
        assert_eq!((count.sent(), edge.is_wanted()), (1, false));
        count.busy(false);
        edge.want();
        assert!(edge.try_send().unwrap());
        assert_eq!(count.sent(), 2);
    }

    #[test]
    fn none_is_lost_between_one_who_cannot_wait_and_one_who_may() {
        let count = Count::default();
        let edge = Edge::new(count.clone());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..10_000 {
                    count.busy(round % 2 == 0);
                    edge.want();
                    while !edge.try_send().unwrap() {
                        std::thread::yield_now();
                        count.busy(false);
                    }
                }
            });
            scope.spawn(|| (0..10_000).for_each(|_| edge.send().unwrap()));
        });
        assert!(!edge.is_wanted());
        assert!((1..=10_000).contains(&count.sent()));
    }
}
