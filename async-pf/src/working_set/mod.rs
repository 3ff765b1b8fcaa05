// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The working set: which pages a restored guest touches first, remembered from one restore to the
//! next.
//!
//! A guest that is restored again and again touches much the same pages in much the same order. So
//! that order is recorded once, kept beside the snapshot, and read ahead of the faults the next
//! time:
//!
//! ```text
//!   1st restore   faults ──▶ Recorder ──finish──▶ WorkingSet ──save──▶ SNAPSHOT/working-set
//!                                                                          │ load
//!   2nd restore   ReplayPlan ◀── batches, sorted and merged ── WorkingSet ◀┘
//!                   │ reads: prefetched              │ held out: 1 page of 32 is not
//!                   ▼                                ▼
//!                 memory           faults ──▶ Recorder ──finish──▶ Usage ──▶ keep, or record again
//! ```
//!
//! * [`Recorder`] takes pages from any number of threads: two atomic operations, no lock, no
//!   allocation.
//! * [`WorkingSet`] is the record, plain data: runs of pages in order of first touch, each with its
//!   time.
//! * [`WorkingSet::encode`] and [`WorkingSet::decode`] are its compact form, [`WorkingSet::save`]
//!   and [`WorkingSet::load`] its file.
//! * [`ReplayPlan`] makes few and sequential reads of it.
//! * [`Usage`] says at the next restore how much of it was really used, and whether it is too old.
//! * [`HeatMap`] shows it, as text or as a picture.
//!
//! # Example
//! ```
//! use async_pf::working_set::{HeatMap, PlanLimits, Recorder, ReplayPlan, WorkingSet};
//! use memslots::Gfn;
//!
//! let snapshot = [7; 16]; // the snapshot's own name
//! let recorder = Recorder::new(Gfn(0), 1 << 18, 1 << 16, snapshot)?;
//! for gfn in [0x100, 0x101, 0x9000, 0x102, 0x101] {
//!     recorder.touch(Gfn(gfn)); // a fault
//! }
//! let bytes = recorder.finish().encode();
//!
//! let recorded = WorkingSet::decode(&bytes)?;
//! assert_eq!(recorded.touched(), 4);
//! let plan = ReplayPlan::new(&recorded, PlanLimits::default());
//! let reads: Vec<_> = plan.reads().iter().map(|read| (read.first.0, read.pages)).collect();
//! assert_eq!(reads, [(0x100, 3), (0x9000, 1)]);
//! println!("{}", HeatMap::new(&recorded, 64, 16).to_text());
//! # Ok::<(), async_pf::working_set::RecordError>(())
//! ```

mod file;
mod format;
mod heat_map;
mod plan;
mod record;
mod recorder;
mod usage;

pub use file::FileError;
pub use format::{MAGIC, MOST_BYTES, MOST_PAGES, RecordError};
pub use heat_map::HeatMap;
pub use plan::{HoldOut, PlanLimits, Read, ReplayPlan};
pub use record::{Run, WorkingSet};
pub use recorder::Recorder;
pub use usage::{Refresh, RefreshPolicy, Usage};
