// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU that is kept out of the guest for a time, and what a throttle charges it for what it ran.
//!
//! ```text
//!   throttle ── charge, lift ────► ┌────────┐
//!                                  │ Ledger │ ── take ──► the run loop rests until both are over, on the vCPU's thread
//!   VcpuSet ── hold, release ────► └────────┘
//! ```
//!
//! The two owe nothing to each other: what the throttle charged is lifted with it, what a consumer holds is the consumer's
//! to release, and who sleeps for both sleeps for the longer of the two.
//!
//! The ledger is behind a lock of its own, which a vCPU's thread takes only when it was asked to
//! ([`Request::HOLD`](crate::request::Request)); a request is never lost (`kick.rs`), and neither is what it is about.

use std::time::{Duration, Instant};

/// What a vCPU runs for before it is held, about, and at most: QEMU's time slice of `cpu-throttle`.
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// A slice and its sleep are no longer than this. With QEMU's slice one of 99 % would be a second: what the guest writes
/// in a burst then looks as if it were as fast as ever to a round of a migration that is shorter.
const PERIOD: Duration = Duration::from_millis(200);
/// What it is charged for at once, at most. Who looks late, on a host that is busy, does not have the guest stand
/// still for the longer.
pub(crate) const MOST: Duration = Duration::from_millis(40);

/// A hold that is as good as one without an end; an `Instant` has one.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// What a vCPU owes, and what it has run for.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// The CPU time of its thread up to which it has been charged.
    charged: Option<Duration>,
    /// To the throttle.
    throttle: Sentence,
    /// To who holds it.
    hold: Sentence,
}

/// What [`Ledger::look`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// It owes something: it is to be held.
    Hold,
    /// It may run on for so long.
    Again(Duration),
}

/// What a vCPU is to do about one of the two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sentence {
    /// First, it is held no more.
    released: bool,
    /// Then, it is held for so much longer.
    owed: Duration,
}

impl Sentence {
    fn add(&mut self, time: Duration) {
        self.owed = self.owed.saturating_add(time);
    }

    fn forgive(&mut self) {
        *self = Self {
            released: true,
            owed: Duration::ZERO,
        };
    }

    /// Until when it is held that was held until `held`. What was over before is over, seen or not: it makes nothing
    /// shorter that comes behind it.
    fn until(self, held: Option<Instant>, now: Instant) -> Option<Instant> {
        let held = held.filter(|until| !self.released && *until > now);
        match self.owed.is_zero() {
            true => held,
            false => Some(held.unwrap_or(now) + self.owed.min(LONGEST)),
        }
    }
}

/// What a vCPU is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sentences {
    throttle: Sentence,
    hold: Sentence,
}

/// Until when a vCPU stays out of the guest.
#[derive(Debug, Default)]
pub(crate) struct Held {
    throttle: Option<Instant>,
    hold: Option<Instant>,
}

impl Held {
    /// Does as it is told.
    pub(crate) fn serve(&mut self, sentences: Sentences, now: Instant) {
        self.throttle = sentences.throttle.until(self.throttle, now);
        self.hold = sentences.hold.until(self.hold, now);
    }

    /// Until both are over; none where it is not held.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.throttle.max(self.hold)
    }

    /// Both are over.
    pub(crate) fn over(&mut self) {
        *self = Self::default();
    }
}

impl Ledger {
    /// Its thread has used `cpu` time in all; it is to sleep `percent` of its time, 1 to 99.
    ///
    /// CPU time is that of the guest and of what the monitor does for it on this thread: who sleeps in HLT uses none,
    /// and owes nothing.
    pub(crate) fn look(&mut self, cpu: Duration, percent: u8) -> Look {
        let charged = *self.charged.get_or_insert(cpu);
        if cpu < charged {
            // Another thread runs it now.
            self.charged = Some(cpu);
        }
        let ran = cpu.saturating_sub(charged);
        let runs = u32::from(100_u8.saturating_sub(percent).max(1));
        let slice = SLICE.min(PERIOD.saturating_mul(runs) / 100);
        if ran < slice {
            return Look::Again(slice.saturating_sub(ran));
        }
        self.charged = Some(cpu);
        let sleep = ran.min(MOST).saturating_mul(percent.into()) / runs;
        self.throttle.add(sleep);
        Look::Hold
    }

    /// It is held for so much longer.
    pub(crate) fn hold(&mut self, time: Duration) {
        self.hold.add(time);
    }

    /// It is held no more.
    pub(crate) fn release(&mut self) {
        self.hold.forgive();
    }

    /// It owes the throttle nothing, and nothing of what it has run.
    pub(crate) fn lift(&mut self) {
        self.charged = None;
        self.throttle.forgive();
    }

    /// What there is to do, once.
    pub(crate) fn take(&mut self) -> Sentences {
        Sentences {
            throttle: std::mem::take(&mut self.throttle),
            hold: std::mem::take(&mut self.hold),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

        /// However often it is looked at: a vCPU that never rests by itself sleeps its part, and one slice less or more.
        #[test]
        fn a_vcpu_that_spins_sleeps_its_part(
            percent in 1_u8..=99,
            looks in proptest::collection::vec(1_u64..30_000, 100..400),
        ) {
            let mut ledger = Ledger::default();
            let (mut cpu, mut slept) = (Duration::from_secs(7), Duration::ZERO);
            let begun = cpu;
            ledger.look(cpu, percent);
            for late in looks {
                cpu += Duration::from_micros(late);
                ledger.look(cpu, percent);
                slept += ledger.take().throttle.owed;
            }
            let ran = cpu - begun;
            let part = |ran: Duration| ran * u32::from(percent) / u32::from(100 - percent);
            prop_assert!(slept <= part(ran) + Duration::from_millis(1));
            prop_assert!(slept + Duration::from_millis(1) >= part(ran.saturating_sub(MOST)), "{:?} of {:?}", slept, ran);
        }

        #[test]
        fn nobody_is_told_to_look_again_behind_the_slice(percent in 1_u8..=99, steps in proptest::collection::vec(0_u64..20_000, 1..50)) {
            let (mut ledger, mut cpu) = (Ledger::default(), Duration::ZERO);
            for step in steps {
                cpu += Duration::from_micros(step);
                if let Look::Again(after) = ledger.look(cpu, percent) {
                    prop_assert!(after > Duration::ZERO && after <= SLICE);
                }
            }
        }

        #[test]
        fn no_numbers_overflow(times: Vec<Duration>, percent: u8) {
            let mut ledger = Ledger::default();
            for time in times {
                ledger.look(time, percent);
                ledger.hold(time);
            }
            ledger.take();
        }
    }

    #[test]
    fn a_vcpu_that_is_halted_owes_nothing() {
        let mut ledger = Ledger::default();
        for _ in 0..1000 {
            assert_eq!(ledger.look(Duration::from_secs(3), 95), Look::Again(SLICE));
        }
        assert_eq!(ledger.take(), Sentences::default());
    }

    #[test]
    fn who_sleeps_most_of_the_time_has_shorter_slices() {
        let mut ledger = Ledger::default();
        ledger.look(Duration::ZERO, 99);
        let slice = Duration::from_millis(2);
        assert_eq!(ledger.look(slice, 99), Look::Hold);
        assert_eq!(ledger.take().throttle.owed, slice * 99);
    }

    #[test]
    fn one_that_is_looked_at_late_is_charged_for_no_more_than_the_most() {
        let mut ledger = Ledger::default();
        ledger.look(Duration::ZERO, 50);
        assert_eq!(ledger.look(Duration::from_secs(60), 50), Look::Hold);
        assert_eq!(ledger.take().throttle.owed, MOST);
    }

    #[test]
    fn a_thread_of_less_time_is_another_one_and_owes_nothing_of_the_first() {
        let mut ledger = Ledger::default();
        ledger.look(Duration::from_secs(60), 50);
        assert_eq!(
            ledger.look(Duration::from_millis(1), 50),
            Look::Again(SLICE)
        );
        assert_eq!(ledger.look(Duration::from_millis(11), 50), Look::Hold);
        assert_eq!(ledger.take().throttle.owed, SLICE);
    }

    const FORGIVEN: Sentence = Sentence {
        released: true,
        owed: Duration::ZERO,
    };

    #[test]
    fn what_is_lifted_forgives_what_was_run_and_leaves_what_is_held_and_the_other_way_round() {
        let mut ledger = Ledger::default();
        let hold = Sentence {
            released: false,
            owed: Duration::from_secs(9),
        };
        let charge = |ledger: &mut Ledger| {
            ledger.look(Duration::ZERO, 50);
            ledger.look(SLICE, 50);
            ledger.hold(hold.owed);
        };
        charge(&mut ledger);
        ledger.lift();
        let lifted = Sentences {
            throttle: FORGIVEN,
            hold,
        };
        assert_eq!(ledger.take(), lifted);
        assert_eq!(ledger.take(), Sentences::default());
        assert_eq!(ledger.look(SLICE * 9, 50), Look::Again(SLICE));
        ledger.lift();
        ledger.take();
        charge(&mut ledger);
        ledger.release();
        let released = ledger.take();
        assert_eq!((released.throttle.owed, released.hold), (SLICE, FORGIVEN));
        // What comes behind it holds.
        ledger.release();
        ledger.hold(SLICE);
        let both = Sentence {
            owed: SLICE,
            ..FORGIVEN
        };
        assert_eq!(ledger.take().hold, both);
    }

    #[test]
    fn holds_add_up_and_one_that_is_over_makes_the_next_no_shorter() {
        let now = Instant::now();
        let owed = |owed| Sentence {
            released: false,
            owed,
        };
        let late = now + SLICE;
        // It has ended, and nobody has looked since.
        let over = Some(now);
        assert_eq!(owed(SLICE).until(over, late), Some(late + SLICE));
        assert_eq!(owed(Duration::ZERO).until(over, late), None);
        assert_eq!(owed(SLICE).until(Some(late), now), Some(late + SLICE));
        assert_eq!(owed(Duration::ZERO).until(Some(late), now), Some(late));
        assert_eq!(FORGIVEN.until(Some(late), now), None);
        let both = Sentence {
            owed: SLICE,
            ..FORGIVEN
        };
        assert_eq!(both.until(Some(late + SLICE), now), Some(late));
        assert_eq!(owed(Duration::MAX).until(None, now), Some(now + LONGEST));
    }

    #[test]
    fn who_sleeps_for_both_sleeps_for_the_longer_of_the_two() {
        let now = Instant::now();
        let mut ledger = Ledger::default();
        let mut held = Held::default();
        assert_eq!(held.until(), None);
        ledger.look(Duration::ZERO, 50);
        ledger.look(SLICE, 50);
        ledger.hold(SLICE * 3);
        held.serve(ledger.take(), now);
        assert_eq!(held.until(), Some(now + SLICE * 3));
        ledger.release();
        held.serve(ledger.take(), now);
        assert_eq!(held.until(), Some(now + SLICE));
        ledger.lift();
        held.serve(ledger.take(), now);
        assert_eq!(held.until(), None);
    }
}
