// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Usage`]: how much of a record was right at the next restore, and when to record anew.
//!
//! A page that was read ahead does not fault, so whether it was wanted cannot be seen. Therefore a few are
//! [held out](super::HoldOut): of the pages held out, those that fault were wanted, and the share of them stands for all.

use super::{HoldOut, ReplayPlan, WorkingSet};
use crate::intervals::Intervals;

/// What a restore with a record showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Pages of the record.
    pub recorded: u64,
    /// Of these, held out: the sample.
    pub held_out: u64,
    /// Of the sample, touched.
    pub held_out_used: u64,
    /// Recorded, to be read ahead, and touched before that.
    pub late: u64,
    /// Touched, and neither recorded nor read ahead.
    pub missed: u64,
    /// Read ahead without being recorded: what lies in gaps.
    pub between: u64,
}

impl Usage {
    /// Compares the record that a restore used, by its plan, with what faulted in it.
    ///
    /// `faulted` must come from as long after the restore as the record did, or a page that was not touched yet counts as
    /// not used.
    pub fn compare(record: &WorkingSet, plan: &ReplayPlan, faulted: &WorkingSet) -> Self {
        let hold_out = plan.hold_out();
        let (recorded, ahead) = (set_of_runs(record), set_of_reads(plan));
        let mut usage = Self {
            recorded: record.touched(),
            held_out: count_held_out(record, hold_out),
            between: plan
                .reads()
                .iter()
                .map(|read| read.pages - read.wanted)
                .sum(),
            ..Self::default()
        };
        for gfn in faulted.order() {
            match recorded.contains(gfn.0) {
                true if hold_out.has(gfn) => usage.held_out_used += 1,
                true => usage.late += 1,
                false if ahead.contains(gfn.0) => {}
                false => usage.missed += 1,
            }
        }
        usage
    }

    /// The share of the sample that was used, 0 to 1; `None` without a sample.
    pub fn used_share(&self) -> Option<f64> {
        (self.held_out > 0).then(|| self.held_out_used as f64 / self.held_out as f64)
    }

    /// The share of the pages that the guest wanted that the record had not, 0 to 1; `None` without a sample, or if the
    /// guest wanted none.
    pub fn missed_share(&self) -> Option<f64> {
        let used = self.used_share()? * self.recorded as f64;
        let wanted = used + self.missed as f64;
        (wanted > 0.0).then(|| self.missed as f64 / wanted)
    }
}

/// When a record is too old.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RefreshPolicy {
    /// The least share of it that must be used: reading the rest is work for nothing.
    pub least_used: f64,
    /// The greatest share of the wanted pages that it may miss.
    pub most_missed: f64,
    /// A smaller sample says nothing about what is used; missed pages are counted without it.
    pub least_sample: u64,
}

impl Default for RefreshPolicy {
    /// Half of it used, a quarter missed, a sample of 16 pages.
    fn default() -> Self {
        Self {
            least_used: 0.5,
            most_missed: 0.25,
            least_sample: 16,
        }
    }
}

/// What to do with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refresh {
    /// It is right.
    Keep,
    /// Most of it is used, and much is missed: [`WorkingSet::with_missed`] is enough.
    Extend,
    /// Much of it is not used any more: the next restore should read nothing ahead, and record.
    Record,
}

impl RefreshPolicy {
    /// What to do with the record after such a restore.
    pub fn judge(&self, usage: &Usage) -> Refresh {
        // A sample that is too small is taken for a good one: recording again costs a slow restore.
        let sampled = usage.held_out >= self.least_sample;
        let used = usage.used_share().filter(|_| sampled).unwrap_or(1.0);
        let wanted = used * usage.recorded as f64 + usage.missed as f64;
        let missed = usage.missed as f64;
        match () {
            _ if used < self.least_used => Refresh::Record,
            _ if missed > self.most_missed * wanted => Refresh::Extend,
            _ => Refresh::Keep,
        }
    }
}

fn set_of_runs(record: &WorkingSet) -> Intervals {
    let mut set = Intervals::default();
    for run in record.runs() {
        set.insert(run.first.0..run.end());
    }
    set
}

fn set_of_reads(plan: &ReplayPlan) -> Intervals {
    let mut set = Intervals::default();
    for read in plan.reads() {
        set.insert(read.range());
    }
    set
}

fn count_held_out(record: &WorkingSet, hold_out: HoldOut) -> u64 {
    record.order().filter(|gfn| hold_out.has(*gfn)).count() as u64
}
