// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Will a live migration end? What harvests say about the future: numbers in, numbers out.
//!
//! * [`DirtyRate`]: pages a second, of a slot, of a vCPU, of a VM; with its spread.
//! * [`WorkingSet`]: how many *different* pages are dirtied in how long. A guest that writes the same
//!   thousand pages over and over has a rate as high as it likes and a working set of a thousand.
//! * [`forecast`]: rounds, time and downtime of a pre-copy, as a range.
//! * [`AutoConverge`] and [`DirtyLimit`]: how much to slow the guest where it does not end.
//! * [`advise`]: go on, slow the guest, stop and copy the rest, or switch to post-copy.
//!
//! Nothing here asks a clock, sleeps or has a thread; each takes what was measured, and the same
//! numbers give the same answer. None panics or answers NaN, whatever it is given.
//!
//! ```
//! use dirty_log::estimate::{Advice, Link, Outcome, Policy, Spent, WorkingSet, advise, forecast};
//! use dirty_log::{DirtyBitmap, PageRun};
//! use std::time::Duration;
//!
//! // A harvest each 100 ms finds the same 2,000 pages.
//! let mut set = WorkingSet::new(1 << 18)?;
//! let mut dirty = DirtyBitmap::new(1 << 18)?;
//! dirty.set(PageRun { first: 7, pages: 2_000 })?;
//! for _ in 0..64 {
//!     set.record(Duration::from_millis(100), &dirty)?;
//! }
//! // 1 GiB left, a link of 100,000 pages a second give or take a tenth, 100 ms of downtime allowed.
//! let link = Link::about(100_000.0, 0.1);
//! let ahead = forecast(1 << 18, &set.curve(), link, Duration::from_millis(100));
//! assert_eq!(ahead.outcome, Outcome::Converges);
//! assert!(ahead.downtime.high < Duration::from_millis(25));
//! assert_eq!(advise(&ahead, Spent::default(), &Policy::default()), Advice::GoOn);
//! # Ok::<(), dirty_log::Error>(())
//! ```

#![forbid(unsafe_code)]

mod advice;
mod forecast;
mod rate;
mod throttle;
mod working_set;

pub use advice::{Advice, Policy, PostCopyCost, Spent, advise, post_copy_cost};
pub use forecast::{Forecast, Link, Outcome, Span, forecast};
pub use rate::{DirtyRate, Rate, Rates};
pub use throttle::{AutoConverge, DirtyLimit, Round, Steps, Throttle};
pub use working_set::{Curve, CurvePoint, WorkingSet};
