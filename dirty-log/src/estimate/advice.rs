// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What to do next with a migration, and what post-copy would cost.

use std::time::Duration;

use super::{Curve, Forecast, Link, Outcome, Throttle};

/// What the one who migrates allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The last stop takes no longer.
    pub downtime: Duration,
    /// The whole pre-copy takes no longer.
    pub patience: Duration,
    /// Rounds of pre-copy before anything else is considered: the first sends all, the second is the first
    /// that tells.
    pub least_rounds: u32,
    /// Whether the guest may be slowed, and how far.
    pub throttle: Throttle,
    /// Whether post-copy is possible at all: the other side can fetch pages, and the guest's owner accepts
    /// that the link's end is the guest's end.
    pub post_copy: bool,
}

/// 100 ms of downtime within five minutes, the guest slowed as far as needed, no post-copy.
impl Default for Policy {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(100),
            patience: Duration::from_secs(300),
            least_rounds: 2,
            throttle: Throttle::percent(99),
            post_copy: false,
        }
    }
}

/// What the migration has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Rounds that are done.
    pub rounds: u32,
    /// Time.
    pub time: Duration,
    /// What the guest is slowed by now.
    pub throttle: Throttle,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Advice {
    /// Another round: it will end.
    GoOn,
    /// What is left fits into the downtime now: stop the guest, send it, hand over.
    StopAndCopy,
    /// It does not end by itself, or not in time: slow the guest by a step.
    SlowDown,
    /// It does not end, or not in time, and the guest is slow enough: let it run over there, and fetch.
    SwitchToPostCopy,
    /// Nothing that is allowed makes it end: give up, or allow more downtime
    /// ([`Forecast::downtime`] says how much).
    GiveUp,
}

/// The next step, by the forecast from here.
pub fn advise(ahead: &Forecast, spent: Spent, policy: &Policy) -> Advice {
    if ahead.rounds.high == 0 && ahead.downtime.high <= policy.downtime {
        return Advice::StopAndCopy;
    }
    let late = |time: Duration| spent.time.saturating_add(time) > policy.patience;
    let over = late(Duration::ZERO);
    let ends = match ahead.outcome {
        Outcome::Converges => !late(ahead.time.high),
        // The middle one in time is worth another round, until the time is over; one that does not end at all has no
        // downtime that is allowed.
        Outcome::Uncertain => ahead.downtime.mean <= policy.downtime && !late(ahead.time.mean),
        Outcome::Diverges => false,
    };
    if !over && (ends || spent.rounds < policy.least_rounds) {
        return Advice::GoOn;
    }
    if !over && spent.throttle < policy.throttle {
        Advice::SlowDown
    } else if policy.post_copy {
        Advice::SwitchToPostCopy
    } else if !over && ahead.outcome != Outcome::Diverges {
        Advice::GoOn
    } else {
        Advice::GiveUp
    }
}

/// What a switch to post-copy now would cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PostCopyCost {
    /// Until the last page is there; the guest lives on both hosts' health for so long.
    pub time: Duration,
    /// Pages that the guest will want before they come by themselves, at least and at most: each a fault
    /// that waits for the link.
    pub faults: [f64; 2],
    /// What a vCPU loses to them, if one at a time waits: the greatest.
    pub stalled: Duration,
}

/// The cost of switching with `remaining` pages to send: the guest, over there, writes as the curve says
/// (and reads at least that), and a fault takes `round_trip`.
///
/// The curve knows writes alone. A guest that reads more than it writes faults more often than this: the
/// true number lies above the least, and is `remaining` at most.
pub fn post_copy_cost(
    remaining: u64,
    total: u64,
    curve: &Curve,
    link: Link,
    round_trip: Duration,
) -> PostCopyCost {
    let remaining = remaining as f64;
    let seconds = remaining / link.low.max(f64::MIN_POSITIVE);
    let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    // Half of the pages have come by themselves half-way: on the average a touched page is still missing
    // with one half of the probability.
    let missing = remaining / (total as f64).max(1.0);
    let [low, _, high] = curve.pages_in(time);
    let faults = [
        (low * missing / 2.0).min(remaining),
        // At worst the guest goes for what is missing: its hot pages are those that are dirty.
        high.min(remaining),
    ];
    let [_, most] = faults;
    PostCopyCost {
        time,
        faults,
        stalled: Duration::try_from_secs_f64(most * round_trip.as_secs_f64())
            .unwrap_or(Duration::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{CurvePoint, Span};

    fn ahead(outcome: Outcome, rounds: u32, seconds: u64, downtime_ms: u64) -> Forecast {
        let span = |value| Span {
            low: value,
            mean: value,
            high: value,
        };
        Forecast {
            outcome,
            rounds: Span {
                low: rounds,
                mean: rounds,
                high: rounds,
            },
            time: span(Duration::from_secs(seconds)),
            pages: Span {
                low: 1,
                mean: 1,
                high: 1,
            },
            downtime: span(Duration::from_millis(downtime_ms)),
        }
    }

    const POLICY: Policy = Policy {
        downtime: Duration::from_millis(100),
        patience: Duration::from_secs(300),
        least_rounds: 2,
        throttle: Throttle::percent(50),
        post_copy: true,
    };

    fn spent(rounds: u32, seconds: u64, throttle: u8) -> Spent {
        Spent {
            rounds,
            time: Duration::from_secs(seconds),
            throttle: Throttle::percent(throttle),
        }
    }

    #[test]
    fn what_fits_into_the_downtime_is_sent_now() {
        let now = ahead(Outcome::Converges, 0, 0, 80);
        assert_eq!(advise(&now, spent(1, 5, 0), &POLICY), Advice::StopAndCopy);
    }

    #[test]
    fn what_does_not_end_is_slowed_then_switched_then_given_up() {
        let never = ahead(Outcome::Diverges, 0, 0, 9000);
        assert_eq!(
            advise(&never, spent(1, 5, 0), &POLICY),
            Advice::GoOn,
            "too early to tell"
        );
        assert_eq!(advise(&never, spent(2, 5, 0), &POLICY), Advice::SlowDown);
        assert_eq!(
            advise(&never, spent(9, 50, 50), &POLICY),
            Advice::SwitchToPostCopy
        );
        let no_post_copy = Policy {
            post_copy: false,
            ..POLICY
        };
        assert_eq!(
            advise(&never, spent(9, 50, 50), &no_post_copy),
            Advice::GiveUp
        );
        assert_eq!(
            advise(&never, spent(1, 301, 0), &no_post_copy),
            Advice::GiveUp
        );
    }

    #[test]
    fn what_ends_too_late_does_not_end() {
        let late = ahead(Outcome::Converges, 5, 400, 50);
        assert_eq!(advise(&late, spent(3, 10, 0), &POLICY), Advice::SlowDown);
        let in_time = ahead(Outcome::Uncertain, 5, 100, 50);
        assert_eq!(advise(&in_time, spent(3, 10, 0), &POLICY), Advice::GoOn);
    }

    #[test]
    fn where_only_the_best_ends_the_guest_is_slowed_and_else_given_the_time_that_there_is() {
        let best_alone = ahead(Outcome::Uncertain, 5, 100, 500);
        assert_eq!(
            advise(&best_alone, spent(3, 10, 0), &POLICY),
            Advice::SlowDown
        );
        let nothing_else = Policy {
            throttle: Throttle::NONE,
            post_copy: false,
            ..POLICY
        };
        assert_eq!(
            advise(&best_alone, spent(3, 10, 0), &nothing_else),
            Advice::GoOn
        );
        assert_eq!(
            advise(&best_alone, spent(3, 301, 0), &nothing_else),
            Advice::GiveUp
        );
    }

    #[test]
    fn post_copy_costs_between_a_few_faults_and_one_for_each_page() {
        let point = CurvePoint {
            window: Duration::from_secs(1),
            pages: 5000.0,
            low: 4000.0,
            high: 6000.0,
        };
        let curve = Curve::new([point], 1 << 20);
        let cost = post_copy_cost(
            100_000,
            1 << 20,
            &curve,
            Link::about(100_000.0, 0.0),
            Duration::from_micros(100),
        );
        assert_eq!(cost.time, Duration::from_secs(1));
        assert!(cost.faults[0] < cost.faults[1] && cost.faults[1] <= 6000.0);
        assert_eq!(cost.stalled, Duration::from_millis(600));
        let never = post_copy_cost(1, 0, &curve, Link::about(0.0, 0.0), Duration::MAX);
        assert!(never.faults.iter().all(|faults| faults.is_finite()));
    }
}
