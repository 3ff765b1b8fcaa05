// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The working-set curve: how many different pages a guest dirties in how long.
//!
//! Harvests at one interval give one point of the curve. The others come from their unions: two
//! neighbours make the point of twice the interval, four the one of four times, and so on. A level has
//! a bitmap of its own, so a curve of eight levels over 64 GiB takes 16 MiB.

use std::time::Duration;

use super::Throttle;
use crate::source::fits;
use crate::{DirtyBitmap, Error};

/// How many levels there are: the longest window is 128 harvests.
const LEVELS: usize = 8;

/// One point of a [`Curve`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// The window.
    pub window: Duration,
    /// Different pages that were dirtied in such a window: the mean of those seen.
    pub pages: f64,
    /// The least of those seen of late.
    pub low: f64,
    /// The greatest of them.
    pub high: f64,
}

impl CurvePoint {
    /// The same writes by a guest that is throttled as `now`, where it was as `before`: as many pages, in a window that is
    /// longer or shorter. So what was seen before a step of a throttle tells of the time behind it. A guest that waits more
    /// than it runs is slowed by less than that.
    ///
    /// ```
    /// # use dirty_log::estimate::{CurvePoint, Throttle};
    /// # use std::time::Duration;
    /// # let seen = CurvePoint { window: Duration::from_secs(1), pages: 9.0, low: 8.0, high: 10.0 };
    /// let slowed = seen.throttled(Throttle::NONE, Throttle::percent(75));
    /// assert_eq!((slowed.window, slowed.pages), (Duration::from_secs(4), seen.pages));
    /// ```
    pub fn throttled(self, before: Throttle, now: Throttle) -> Self {
        CurvePoint {
            window: now.stretch(self.window, before),
            ..self
        }
    }
}

/// Different pages dirtied, by window. Grows with the window, ever more slowly, and ends at the memory's
/// size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    points: Vec<CurvePoint>,
    total: f64,
}

impl Curve {
    /// A curve from points, in any order, of a memory of `total` pages; numbers that are none are left
    /// out.
    pub fn new(points: impl IntoIterator<Item = CurvePoint>, total: u64) -> Self {
        let total = total as f64;
        let mut points: Vec<_> = points
            .into_iter()
            .filter(|point| {
                !point.window.is_zero()
                    && [point.pages, point.low, point.high]
                        .iter()
                        .all(|pages| pages.is_finite() && *pages >= 0.0)
            })
            .collect();
        points.sort_by_key(|point| point.window);
        Self { points, total }
    }

    /// The points, by growing window.
    pub fn points(&self) -> &[CurvePoint] {
        &self.points
    }

    /// Different pages dirtied in `window`: the least, the middle and the greatest to expect.
    ///
    /// Between points a straight line, and before the first as well: a guest that writes the same pages
    /// again is then flattered, so the greatest there is the first point whole. Beyond the last point,
    /// where nothing was seen, the least is that nothing new comes, and the greatest that it goes on as
    /// between the last two points.
    pub fn pages_in(&self, window: Duration) -> [f64; 3] {
        let seconds = window.as_secs_f64();
        let of = |point: &CurvePoint| [point.low, point.pages, point.high];
        let at = self.points.partition_point(|point| point.window < window);
        let before = at.checked_sub(1).and_then(|at| self.points.get(at));
        let pages = match (before, self.points.get(at)) {
            (None, None) => [0.0; 3],
            (None, Some(next)) => {
                let part = seconds / next.window.as_secs_f64();
                [
                    next.low * part,
                    next.pages * part,
                    next.high.min(next.high * part.sqrt()),
                ]
            }
            (Some(last), Some(next)) => {
                let (from, to) = (last.window.as_secs_f64(), next.window.as_secs_f64());
                let part = (seconds - from) / (to - from).max(f64::MIN_POSITIVE);
                let (a, b) = (of(last), of(next));
                [0, 1, 2].map(|i| {
                    let (a, b) = (component(a, i), component(b, i));
                    a + (b - a).max(0.0) * part
                })
            }
            (Some(last), None) => {
                let earlier = at.checked_sub(2).and_then(|at| self.points.get(at));
                let (from, earlier) =
                    earlier.map_or((0.0, 0.0), |p| (p.window.as_secs_f64(), p.pages));
                let end = last.window.as_secs_f64();
                let slope = ((last.pages - earlier) / (end - from)).max(0.0);
                let more = slope * (seconds - end);
                [last.low, last.pages + more / 2.0, last.high + more]
            }
        };
        pages.map(|pages| pages.min(self.total))
    }
}

fn component(of: [f64; 3], at: usize) -> f64 {
    of.get(at).copied().unwrap_or(0.0)
}

/// Builds the curve from harvests, whatever slot (or whole VM) they are of.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    levels: Vec<Level>,
    pages: u64,
}

#[derive(Clone, Debug)]
struct Level {
    union: DirtyBitmap,
    /// Harvests in it, of `1 << level`.
    harvests: u32,
    time: Duration,
    /// What full windows had, smoothed.
    seen: Option<CurvePoint>,
}

impl WorkingSet {
    /// Of a memory of `pages` pages. Allocates all that it needs.
    ///
    /// # Errors
    /// [`Error::Memory`] where the host has no memory for it.
    pub fn new(pages: u64) -> Result<Self, Error> {
        let level = |_| {
            Ok(Level {
                union: DirtyBitmap::new(pages)?,
                harvests: 0,
                time: Duration::ZERO,
                seen: None,
            })
        };
        let levels = (0..LEVELS).map(level).collect::<Result<_, Error>>()?;
        Ok(Self { levels, pages })
    }

    /// `dirty` is what was written in `time`, since the harvest before. One pass over the bitmap for
    /// each level.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where it covers another number of pages.
    pub fn record(&mut self, time: Duration, dirty: &DirtyBitmap) -> Result<(), Error> {
        fits(self.pages, dirty.pages())?;
        for (at, level) in self.levels.iter_mut().enumerate() {
            level.union.merge(dirty)?;
            level.time = level.time.saturating_add(time);
            level.harvests += 1;
            if level.harvests < 1 << at {
                continue;
            }
            let pages = level.union.count() as f64;
            let window = level.time;
            level.seen = Some(level.seen.map_or(
                CurvePoint {
                    window,
                    pages,
                    low: pages,
                    high: pages,
                },
                |seen| smooth(seen, window, pages),
            ));
            level.union.clear_all();
            (level.harvests, level.time) = (0, Duration::ZERO);
        }
        Ok(())
    }

    /// What is known so far: nothing before the first harvest.
    pub fn curve(&self) -> Curve {
        Curve::new(
            self.levels.iter().filter_map(|level| level.seen),
            self.pages,
        )
    }
}

/// A quarter of the new; the ends come in as slowly, and go out at once.
fn smooth(seen: CurvePoint, window: Duration, pages: f64) -> CurvePoint {
    let mix = |old: f64, new: f64| old + (new - old) / 4.0;
    CurvePoint {
        window: (seen.window * 3 + window) / 4,
        pages: mix(seen.pages, pages),
        low: mix(seen.low, pages).min(pages),
        high: mix(seen.high, pages).max(pages),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageRun;

    const TICK: Duration = Duration::from_millis(100);

    fn dirty(pages: u64, first: u64, count: u64) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::new(pages).unwrap();
        bitmap
            .set(PageRun {
                first,
                pages: count,
            })
            .unwrap();
        bitmap
    }

    #[test]
    fn a_guest_that_writes_the_same_pages_has_a_flat_curve() {
        let mut set = WorkingSet::new(10_000).unwrap();
        for _ in 0..128 {
            set.record(TICK, &dirty(10_000, 5, 100)).unwrap();
        }
        let curve = set.curve();
        assert_eq!(curve.points().len(), LEVELS);
        assert!(curve.points().iter().all(|point| point.pages == 100.0));
        assert_eq!(curve.pages_in(Duration::from_secs(3600))[1], 100.0);
    }

    #[test]
    fn a_guest_that_walks_through_memory_has_a_straight_one_that_ends_at_its_size() {
        let mut set = WorkingSet::new(10_000).unwrap();
        for tick in 0..64 {
            set.record(TICK, &dirty(10_000, tick * 100, 100)).unwrap();
        }
        let curve = set.curve();
        let [low, middle, high] = curve.pages_in(TICK * 8);
        assert_eq!([low, middle, high], [800.0; 3]);
        let [low, _, high] = curve.pages_in(Duration::from_secs(100));
        assert_eq!(high, 10_000.0);
        assert!(low >= 3200.0);
        assert_eq!(curve.pages_in(Duration::ZERO), [0.0; 3]);
    }

    #[test]
    fn numbers_that_are_none_are_left_out_and_a_curve_of_nothing_is_zero() {
        let bad = |pages: f64| CurvePoint {
            window: TICK,
            pages,
            low: 0.0,
            high: 1.0,
        };
        let curve = Curve::new([bad(f64::NAN), bad(-1.0), bad(f64::INFINITY)], 10);
        assert!(curve.points().is_empty());
        assert_eq!(curve.pages_in(Duration::MAX), [0.0; 3]);
        assert!(
            WorkingSet::new(5)
                .unwrap()
                .record(TICK, &DirtyBitmap::new(6).unwrap())
                .is_err()
        );
        assert!(matches!(
            WorkingSet::new(1 << 62),
            Err(Error::Memory { .. })
        ));
    }
}
