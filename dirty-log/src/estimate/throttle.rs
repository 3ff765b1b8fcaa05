// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Slowing a guest so that a pre-copy ends: in steps of everybody's time, or by each vCPU's own ring.

use std::time::Duration;

/// One round of a pre-copy, as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages sent in it.
    pub sent: u64,
    /// Pages dirtied while they were.
    pub dirtied: u64,
}

/// A part of a vCPU's time that it must sleep, in percent: 0 to 99.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Throttle(u8);

impl Throttle {
    /// None.
    pub const NONE: Self = Self(0);

    /// `percent`, at most 99.
    pub const fn percent(percent: u8) -> Self {
        Self(if percent > 99 { 99 } else { percent })
    }

    /// The percentage.
    pub const fn as_percent(self) -> u8 {
        self.0
    }

    /// How long a vCPU sleeps that has run for `run`, so that it sleeps this part of its time.
    ///
    /// ```
    /// # use dirty_log::estimate::Throttle;
    /// # use std::time::Duration;
    /// let ten = Duration::from_millis(10);
    /// assert_eq!(Throttle::percent(50).sleep_after(ten), ten);
    /// assert_eq!(Throttle::percent(99).sleep_after(ten), ten * 99);
    /// ```
    pub fn sleep_after(self, run: Duration) -> Duration {
        run.saturating_mul(u32::from(self.0)) / u32::from(100 - self.0)
    }

    /// How long a guest that is throttled so takes for what it did in `time` when it was throttled as `before`: a guest
    /// that runs. ([`CurvePoint::throttled`](super::CurvePoint::throttled) is for what it wrote.)
    pub fn stretch(self, time: Duration, before: Self) -> Duration {
        time.saturating_mul(u32::from(100 - before.0)) / u32::from(100 - self.0)
    }
}

/// The steps of [`AutoConverge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// A round is bad if more than this percentage of what it sent was dirtied again.
    pub threshold: u8,
    /// Bad rounds in a row before a step.
    pub patience: u8,
    /// The first step, in percent.
    pub first: u8,
    /// Each further one.
    pub more: u8,
    /// Where it ends.
    pub most: u8,
}

/// What QEMU's auto-converge does as it comes: half, two rounds, 20 %, 10 % more, 99 %.
impl Default for Steps {
    fn default() -> Self {
        Self {
            threshold: 50,
            patience: 2,
            first: 20,
            more: 10,
            most: 99,
        }
    }
}

/// Slows all vCPUs, step by step, while rounds do not shrink. A step is not taken back before the
/// migration ends, or the guest would run up what was gained.
///
/// ```
/// use dirty_log::estimate::{AutoConverge, Round, Steps};
/// let mut policy = AutoConverge::new(Steps::default());
/// let bad = Round { sent: 1000, dirtied: 900 };
/// let percents = [(); 5].map(|()| policy.after(bad).as_percent());
/// assert_eq!(percents, [0, 20, 20, 30, 30]);
/// ```
#[derive(Clone, Debug)]
pub struct AutoConverge {
    steps: Steps,
    bad: u8,
    now: Throttle,
}

impl AutoConverge {
    /// A policy that has not begun.
    pub const fn new(steps: Steps) -> Self {
        Self {
            steps,
            bad: 0,
            now: Throttle::NONE,
        }
    }

    /// What to do after a round. The first round of a migration sends everything, and tells little: it is
    /// the caller's to leave out.
    pub fn after(&mut self, round: Round) -> Throttle {
        let Steps {
            threshold,
            patience,
            ..
        } = self.steps;
        let limit = u128::from(round.sent) * u128::from(threshold);
        if u128::from(round.dirtied) * 100 <= limit {
            self.bad = 0;
            return self.now;
        }
        self.bad = self.bad.saturating_add(1);
        if self.bad >= patience.max(1) {
            self.step();
        }
        self.now
    }

    /// A step now, whatever the rounds were: for who has a forecast, and hears [`SlowDown`](super::Advice::SlowDown).
    ///
    /// ```
    /// # use dirty_log::estimate::{AutoConverge, Steps};
    /// let mut policy = AutoConverge::new(Steps::default());
    /// let percents = [(); 10].map(|()| policy.step().as_percent());
    /// assert_eq!(percents, [20, 30, 40, 50, 60, 70, 80, 90, 99, 99]);
    /// ```
    pub fn step(&mut self) -> Throttle {
        let Steps {
            first, more, most, ..
        } = self.steps;
        self.bad = 0;
        let next = match self.now {
            Throttle::NONE => first,
            Throttle(now) => now.saturating_add(more),
        };
        self.now = self.now.max(Throttle::percent(next.min(most)));
        self.now
    }

    /// What is in force.
    pub const fn now(&self) -> Throttle {
        self.now
    }

    /// Whether no step is left.
    pub fn is_at_its_end(&self) -> bool {
        self.now >= Throttle::percent(self.steps.most)
    }
}

/// A dirty rate that no vCPU exceeds: the ring's own back-pressure. A vCPU whose ring is full has left
/// the guest anyway; it stays out for as long as it was too fast. Readers and vCPUs that compute are not
/// slowed, which is why it is to be preferred to [`AutoConverge`] where there is a ring.
///
/// ```
/// use dirty_log::estimate::DirtyLimit;
/// use std::time::Duration;
/// let limit = DirtyLimit::pages_per_second(4000);
/// // 1,000 entries since the last time, in 50 ms: that is 200 ms too early.
/// let sleep = limit.sleep_after(1000, Duration::from_millis(50));
/// assert_eq!(sleep, Duration::from_millis(200));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyLimit {
    pages_per_second: u64,
}

impl DirtyLimit {
    /// The longest sleep at a time: a vCPU answers a stop no later.
    pub const LONGEST: Duration = Duration::from_secs(1);

    /// A limit; one of 0 sleeps the longest each time.
    pub const fn pages_per_second(pages_per_second: u64) -> Self {
        Self { pages_per_second }
    }

    /// The limit that lets a pre-copy end: of a link of `link` pages a second, a `part` (0 to 1) shared by
    /// `vcpus` that dirty.
    pub fn for_link(link: f64, part: f64, vcpus: u32) -> Self {
        let pages = link * part.clamp(0.0, 1.0) / f64::from(vcpus.max(1));
        // A float to integer cast saturates, and makes 0 of what is no number.
        Self::pages_per_second(pages as u64)
    }

    /// How long a vCPU stays out whose ring told `entries` in `elapsed`, its own sleep included.
    pub fn sleep_after(self, entries: u32, elapsed: Duration) -> Duration {
        if entries == 0 {
            return Duration::ZERO;
        }
        let nanos = u128::from(entries) * 1_000_000_000;
        let due = nanos
            .checked_div(u128::from(self.pages_per_second))
            .and_then(|nanos| u64::try_from(nanos).ok())
            .map_or(Duration::MAX, Duration::from_nanos);
        due.saturating_sub(elapsed).min(Self::LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_end_at_the_most_and_a_good_round_begins_the_count_anew() {
        let mut policy = AutoConverge::new(Steps::default());
        let (bad, good) = (
            Round {
                sent: 10,
                dirtied: 6,
            },
            Round {
                sent: 10,
                dirtied: 5,
            },
        );
        policy.after(bad);
        policy.after(good);
        assert_eq!(policy.after(bad), Throttle::NONE);
        for _ in 0..100 {
            policy.after(bad);
        }
        assert!(policy.is_at_its_end());
        assert_eq!(policy.after(good).as_percent(), 99, "not taken back");
    }

    #[test]
    fn steps_that_make_no_sense_do_not_panic() {
        let steps = Steps {
            threshold: 255,
            patience: 0,
            first: 200,
            more: 200,
            most: 255,
        };
        let mut policy = AutoConverge::new(steps);
        let round = Round {
            sent: 1,
            dirtied: u64::MAX,
        };
        assert_eq!(policy.after(round).as_percent(), 99);
        assert_eq!(policy.after(round).as_percent(), 99);
        assert!(Throttle::percent(99).sleep_after(Duration::MAX) > Duration::from_secs(1));
    }

    #[test]
    fn a_vcpu_below_the_limit_does_not_sleep() {
        let limit = DirtyLimit::pages_per_second(1000);
        assert_eq!(
            limit.sleep_after(100, Duration::from_millis(100)),
            Duration::ZERO
        );
        assert_eq!(limit.sleep_after(0, Duration::ZERO), Duration::ZERO);
        let never = DirtyLimit::for_link(f64::NAN, 2.0, 0);
        assert_eq!(never.sleep_after(1, Duration::ZERO), DirtyLimit::LONGEST);
    }
}
