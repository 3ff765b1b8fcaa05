// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU that is kept out of the guest for a time, and what a throttle charges it for what it ran.
//!
//! ```text
//!   throttle ── charge ──► ┌────────┐
//!   VcpuSet::hold ───────► │ Ledger │ ── take ──► the run loop rests until then, on the vCPU's thread
//!   VcpuSet::release ────► └────────┘
//! ```
//!
//! The ledger is behind a lock of its own, which a vCPU's thread takes only when it was asked to
//! ([`Request::HOLD`](crate::request::Request)); a request is never lost (`kick.rs`), and neither is what it is about.

use std::time::Duration;

/// What a vCPU runs for before it is held, about, and at most: QEMU's time slice of `cpu-throttle`.
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// A slice and its sleep are no longer than this. With QEMU's slice one of 99 % would be a second: what the guest writes
/// in a burst then looks as if it were as fast as ever to a round of a migration that is shorter.
const PERIOD: Duration = Duration::from_millis(200);
/// What it is charged for at once, at most. Who looks late, on a host that is busy, does not have the guest stand
/// still for the longer.
pub(crate) const MOST: Duration = Duration::from_millis(40);

/// What a vCPU owes, and what it has run for.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// The CPU time of its thread up to which it has been charged.
    charged: Option<Duration>,
    owed: Duration,
    released: bool,
}

/// What [`Ledger::look`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// It owes something: it is to be held.
    Hold,
    /// It may run on for so long.
    Again(Duration),
}

/// What a vCPU is to do about its hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sentence {
    /// First, it is held no more.
    pub(crate) released: bool,
    /// Then, it is held for so much longer.
    pub(crate) owed: Duration,
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
        self.hold(sleep);
        Look::Hold
    }

    /// It owes so much more.
    pub(crate) fn hold(&mut self, time: Duration) {
        self.owed = self.owed.saturating_add(time);
    }

    /// It owes nothing, and nothing of what it has run.
    pub(crate) fn release(&mut self) {
        *self = Self {
            released: true,
            ..Self::default()
        };
    }

    /// What there is to do, once.
    pub(crate) fn take(&mut self) -> Sentence {
        Sentence {
            released: std::mem::take(&mut self.released),
            owed: std::mem::take(&mut self.owed),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOTHING: Sentence = Sentence {
        released: false,
        owed: Duration::ZERO,
    };

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
                slept += ledger.take().owed;
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
        assert_eq!(ledger.take(), NOTHING);
    }

    #[test]
    fn who_sleeps_most_of_the_time_has_shorter_slices() {
        let mut ledger = Ledger::default();
        ledger.look(Duration::ZERO, 99);
        let slice = Duration::from_millis(2);
        assert_eq!(ledger.look(slice, 99), Look::Hold);
        assert_eq!(ledger.take().owed, slice * 99);
    }

    #[test]
    fn one_that_is_looked_at_late_is_charged_for_no_more_than_the_most() {
        let mut ledger = Ledger::default();
        ledger.look(Duration::ZERO, 50);
        assert_eq!(ledger.look(Duration::from_secs(60), 50), Look::Hold);
        assert_eq!(ledger.take().owed, MOST);
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
        assert_eq!(ledger.take().owed, SLICE);
    }

    #[test]
    fn a_release_forgives_what_is_owed_and_what_was_run() {
        let mut ledger = Ledger::default();
        ledger.look(Duration::ZERO, 50);
        ledger.look(SLICE, 50);
        ledger.hold(Duration::from_secs(9));
        ledger.release();
        let released = Sentence {
            released: true,
            ..NOTHING
        };
        assert_eq!(ledger.take(), released);
        assert_eq!(ledger.take(), NOTHING);
        assert_eq!(ledger.look(SLICE * 9, 50), Look::Again(SLICE));
        // What comes behind it holds.
        ledger.release();
        ledger.hold(SLICE);
        let both = Sentence {
            released: true,
            owed: SLICE,
        };
        assert_eq!(ledger.take(), both);
    }
}
