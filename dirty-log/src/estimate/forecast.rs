// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a pre-copy ends, when, and with what downtime.
//!
//! A round sends what is dirty; while it does, the guest dirties as many pages as the working-set curve
//! has for that long; these are the next round. It ends when what is left goes through the link within
//! the downtime. Three guests are played so: the best that was seen (least dirty pages, fastest link),
//! the middle, and the worst. What they agree on is certain as far as the past tells; where they do not,
//! the answer is a range and says so.

use std::time::Duration;

use super::Curve;

/// What the link carries, in pages a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// The least to expect.
    pub low: f64,
    /// The middle.
    pub mean: f64,
    /// The most to expect.
    pub high: f64,
}

impl Link {
    /// `mean` pages a second, give or take a `part` of it (0.1: a tenth). A rate that is none is one of
    /// zero, over which nothing ends.
    pub fn about(mean: f64, part: f64) -> Self {
        let mean = sane(mean);
        let part = sane(part).min(1.0);
        Self {
            low: mean * (1.0 - part),
            mean,
            high: mean * (1.0 + part),
        }
    }

    /// Of a measured [`Rate`](super::Rate), for instance pages sent.
    pub fn measured(rate: super::Rate) -> Self {
        Self {
            low: rate.low,
            mean: rate.mean,
            high: rate.high,
        }
    }
}

fn sane(number: f64) -> f64 {
    if number.is_finite() && number > 0.0 {
        number
    } else {
        0.0
    }
}

/// From the least to the greatest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span<T> {
    /// The least.
    pub low: T,
    /// The middle.
    pub mean: T,
    /// The greatest.
    pub high: T,
}

/// What the three guests agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// All three end within the downtime.
    Converges,
    /// The middle one does, or the best one: it depends.
    Uncertain,
    /// None does, and going on changes nothing.
    Diverges,
}

/// A forecast of a pre-copy from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// Whether it ends.
    pub outcome: Outcome,
    /// Rounds until it ends, or until going on gains nothing.
    pub rounds: Span<u32>,
    /// Time until then, without the downtime.
    pub time: Span<Duration>,
    /// Pages to send until then, the last stop's included.
    pub pages: Span<u64>,
    /// The downtime, if it stops then. Of one that does not converge, the least that it can have.
    pub downtime: Span<Duration>,
}

struct Played {
    ends: bool,
    rounds: u32,
    time: f64,
    pages: f64,
    left: f64,
    link: f64,
}

/// No forecast is for longer than this; also what stands for "never".
const HORIZON: Duration = Duration::from_secs(7 * 24 * 3600);
const MOST_ROUNDS: u32 = 1000;

fn duration(seconds: f64) -> Duration {
    if seconds.is_finite() && seconds < HORIZON.as_secs_f64() {
        Duration::from_secs_f64(seconds.max(0.0))
    } else {
        HORIZON
    }
}

/// Plays the rest of a pre-copy: `remaining` pages to send now, a guest that dirties as `curve` says, and
/// at most `downtime` for the last stop.
pub fn forecast(remaining: u64, curve: &Curve, link: Link, downtime: Duration) -> Forecast {
    let which = [
        (sane(link.high), 0),
        (sane(link.mean), 1),
        (sane(link.low), 2),
    ];
    let [best, middle, worst] =
        which.map(|(link, guest)| play(remaining as f64, curve, guest, link, downtime));
    let outcome = match (best.ends, middle.ends, worst.ends) {
        (true, true, true) => Outcome::Converges,
        (false, false, false) => Outcome::Diverges,
        _ => Outcome::Uncertain,
    };
    let time = |played: &Played| duration(played.time);
    let pages = |played: &Played| played.pages as u64;
    let stop = |played: &Played| duration(played.left / played.link);
    Forecast {
        outcome,
        rounds: span(&best, &middle, &worst, |played| played.rounds),
        time: span(&best, &middle, &worst, time),
        pages: span(&best, &middle, &worst, pages),
        downtime: span(&best, &middle, &worst, stop),
    }
}

/// In order, also where a guest that gives up early has done less than one that goes on.
fn span<T: Ord + Copy>(
    best: &Played,
    middle: &Played,
    worst: &Played,
    of: impl Fn(&Played) -> T,
) -> Span<T> {
    let mut all = [of(best), of(middle), of(worst)];
    all.sort();
    let [low, mean, high] = all;
    Span { low, mean, high }
}

fn play(mut left: f64, curve: &Curve, guest: usize, link: f64, downtime: Duration) -> Played {
    let mut played = Played {
        ends: false,
        rounds: 0,
        time: 0.0,
        pages: 0.0,
        left,
        link,
    };
    loop {
        played.left = left;
        played.ends = link > 0.0 && left / link <= downtime.as_secs_f64() || left == 0.0;
        if played.ends
            || link <= 0.0
            || played.rounds >= MOST_ROUNDS
            || played.time > HORIZON.as_secs_f64()
        {
            break;
        }
        let seconds = left / link;
        let dirtied = curve
            .pages_in(duration(seconds))
            .get(guest)
            .copied()
            .unwrap_or(0.0);
        // A round that leaves nearly as much as it sent gains nothing, and neither does the next.
        if dirtied > left * 0.98 {
            break;
        }
        played.rounds += 1;
        played.time += seconds;
        played.pages += left;
        left = dirtied;
    }
    played.pages += left;
    if left == 0.0 && link <= 0.0 {
        played.link = 1.0;
    }
    played
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::CurvePoint;

    const DOWNTIME: Duration = Duration::from_millis(100);

    fn flat(pages: f64) -> Curve {
        let point = |ms| CurvePoint {
            window: Duration::from_millis(ms),
            pages,
            low: pages * 0.9,
            high: pages * 1.1,
        };
        Curve::new([point(100), point(1000), point(10_000)], 1 << 20)
    }

    #[test]
    fn a_small_working_set_converges_in_two_rounds() {
        let ahead = forecast(1 << 20, &flat(1000.0), Link::about(50_000.0, 0.1), DOWNTIME);
        assert_eq!(ahead.outcome, Outcome::Converges);
        assert_eq!((ahead.rounds.low, ahead.rounds.high), (1, 1));
        assert!(ahead.downtime.high <= DOWNTIME);
        assert!(ahead.time.low < ahead.time.high);
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_link_diverges_and_says_what_the_stop_would_cost() {
        let straight = (1..=6).map(|k| CurvePoint {
            window: Duration::from_secs(1 << k),
            pages: 200_000.0 * f64::from(1 << k),
            low: 190_000.0 * f64::from(1 << k),
            high: 210_000.0 * f64::from(1 << k),
        });
        let curve = Curve::new(straight, 1 << 28);
        let ahead = forecast(1 << 20, &curve, Link::about(100_000.0, 0.1), DOWNTIME);
        assert_eq!(ahead.outcome, Outcome::Diverges);
        assert_eq!(ahead.rounds.high, 0);
        assert!(ahead.downtime.mean > Duration::from_secs(9));
    }

    #[test]
    fn where_best_and_worst_differ_it_is_uncertain() {
        // 5,000 pages of working set go through within the downtime at 55,000 a second, not at 45,000.
        let ahead = forecast(1 << 18, &flat(5000.0), Link::about(50_000.0, 0.1), DOWNTIME);
        assert_eq!(ahead.outcome, Outcome::Uncertain);
        assert!(ahead.downtime.low <= DOWNTIME && ahead.downtime.high > DOWNTIME);
    }

    #[test]
    fn no_link_is_never_and_nothing_left_is_now() {
        for link in [0.0, f64::NAN, -5.0, f64::INFINITY] {
            let ahead = forecast(10, &flat(1.0), Link::about(link, f64::NAN), DOWNTIME);
            assert_eq!(ahead.outcome, Outcome::Diverges, "{link}");
            assert_eq!(ahead.downtime.high, HORIZON);
            let ahead = forecast(0, &Curve::default(), Link::about(link, 0.0), DOWNTIME);
            assert_eq!(
                (ahead.outcome, ahead.downtime.high),
                (Outcome::Converges, Duration::ZERO)
            );
        }
    }
}
