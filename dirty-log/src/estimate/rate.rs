// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty rates: how many pages a second, and how far the samples are apart.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// A rate in pages a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// All pages of the window by all of its time.
    pub mean: f64,
    /// The least of the window's samples.
    pub low: f64,
    /// The greatest of them.
    pub high: f64,
}

/// The dirty rate of one thing, over its last samples.
///
/// What a harvest counts are *different* pages, so the rate depends on how far harvests are apart: from
/// one second on it says how much there is to send, and little about how fast the guest writes. Ring
/// entries ([`DirtyRings::told`](crate::DirtyRings::told)) count a page once between two reaps as well.
/// Compare rates of like intervals; [`WorkingSet`](super::WorkingSet) has the whole picture.
///
/// ```
/// use dirty_log::estimate::DirtyRate;
/// use std::time::Duration;
/// let mut rate = DirtyRate::new(8);
/// rate.record(Duration::from_secs(1), 1000);
/// rate.record(Duration::from_secs(1), 3000);
/// let rate = rate.rate().unwrap();
/// assert_eq!((rate.low, rate.mean, rate.high), (1000.0, 2000.0, 3000.0));
/// ```
#[derive(Clone, Debug)]
pub struct DirtyRate {
    samples: VecDeque<(Duration, u64)>,
    window: usize,
}

impl DirtyRate {
    /// A rate over the last `window` samples (at least one). The only allocation.
    pub fn new(window: usize) -> Self {
        let window = window.max(1);
        Self {
            samples: VecDeque::with_capacity(window),
            window,
        }
    }

    /// `pages` were dirtied in `time`. One of no time is added to the next that has some.
    pub fn record(&mut self, time: Duration, pages: u64) {
        if let Some((last, more)) = self.samples.back_mut()
            && last.is_zero()
        {
            (*last, *more) = (time, more.saturating_add(pages));
            return;
        }
        if self.samples.len() == self.window {
            self.samples.pop_front();
        }
        self.samples.push_back((time, pages));
    }

    /// The rate; `None` before there was a sample that took time.
    pub fn rate(&self) -> Option<Rate> {
        let mut rate = Rate {
            mean: 0.0,
            low: f64::INFINITY,
            high: 0.0,
        };
        let (mut seconds, mut pages) = (0.0, 0.0);
        for (time, count) in self.samples.iter().filter(|(time, _)| !time.is_zero()) {
            let (time, count) = (time.as_secs_f64(), *count as f64);
            (seconds, pages) = (seconds + time, pages + count);
            rate.low = rate.low.min(count / time);
            rate.high = rate.high.max(count / time);
        }
        (seconds > 0.0).then(|| Rate {
            mean: pages / seconds,
            ..rate
        })
    }
}

/// Rates of several things by key: a [`SlotId`](memslots::SlotId)'s number, a vCPU's.
#[derive(Clone, Debug)]
pub struct Rates<K> {
    window: usize,
    rates: BTreeMap<K, (DirtyRate, u64)>,
}

impl<K: Ord> Rates<K> {
    /// Rates over `window` samples each.
    pub const fn new(window: usize) -> Self {
        Self {
            window,
            rates: BTreeMap::new(),
        }
    }

    /// `pages` of `key` were dirtied in `time`.
    pub fn record(&mut self, key: K, time: Duration, pages: u64) {
        self.entry(key).0.record(time, pages);
    }

    /// The same from a counter that only grows: `total` so far, of which the first is where it begins.
    pub fn record_total(&mut self, key: K, time: Duration, total: u64) {
        let fresh = !self.rates.contains_key(&key);
        let (rate, last) = self.entry(key);
        if !fresh {
            rate.record(time, total.saturating_sub(*last));
        }
        *last = total;
    }

    fn entry(&mut self, key: K) -> &mut (DirtyRate, u64) {
        self.rates
            .entry(key)
            .or_insert_with(|| (DirtyRate::new(self.window), 0))
    }

    /// Forgets one: a slot that is gone.
    pub fn remove(&mut self, key: &K) {
        self.rates.remove(key);
    }

    /// The rate of one.
    pub fn rate(&self, key: &K) -> Option<Rate> {
        self.rates.get(key)?.0.rate()
    }

    /// All, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, Rate)> {
        self.rates
            .iter()
            .filter_map(|(key, (rate, _))| Some((key, rate.rate()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn old_samples_leave_the_window() {
        let mut rate = DirtyRate::new(2);
        for pages in [1_000_000, 10, 30] {
            rate.record(SECOND, pages);
        }
        let rate = rate.rate().unwrap();
        assert_eq!((rate.low, rate.mean, rate.high), (10.0, 20.0, 30.0));
    }

    #[test]
    fn a_sample_of_no_time_is_added_to_the_next_and_divides_nothing_by_zero() {
        let mut rate = DirtyRate::new(4);
        rate.record(Duration::ZERO, 5);
        assert_eq!(rate.rate(), None);
        rate.record(Duration::ZERO, 5);
        rate.record(SECOND, 10);
        assert_eq!(rate.rate().unwrap().mean, 20.0);
    }

    #[test]
    fn a_counter_is_a_rate_from_its_second_reading_on() {
        let mut rates = Rates::new(4);
        rates.record_total(3, SECOND, 1_000_000);
        assert_eq!(rates.rate(&3), None);
        rates.record_total(3, SECOND, 1_000_500);
        rates.record_total(3, SECOND, 7); // began anew: no wrap
        assert_eq!(rates.rate(&3).unwrap().mean, 250.0);
        rates.record(1, SECOND, 1);
        let keys: Vec<_> = rates.iter().map(|(key, _)| *key).collect();
        assert_eq!(keys, [1, 3]);
        rates.remove(&3);
        assert_eq!(rates.rate(&3), None);
    }
}
