// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest has written since the last snapshot, while one is taken: whatever becomes of that, no page that was
//! written is forgotten.

#![forbid(unsafe_code)]

use super::pages::PAGE;
use super::ranges::{MOST_RUNS, Ranges};
use super::save::{SnapshotError, SnapshotRequest};
use crate::vm::Running;
use crate::vm::tracking::{Harvested, TrackUser};

/// The tracking of writes across a snapshot. Dropped, it is as before, and no page that was written is forgotten.
pub(super) struct Tracking<'a> {
    running: &'a Running,
    /// What was written since the last one; none where that was not tracked.
    before: Vec<Harvested<'a>>,
    /// Begun for this one.
    begun: bool,
    on: bool,
    done: bool,
}

impl<'a> Tracking<'a> {
    /// What was written until now, before memory is read. In the pause, or before it: then
    /// [`again`](Self::again) is for the pause.
    pub(super) fn of(
        running: &'a Running,
        request: &SnapshotRequest,
    ) -> Result<Self, SnapshotError> {
        let tracked = running.is_tracked(TrackUser::Snapshot);
        let before = tracked.then(|| running.harvest(TrackUser::Snapshot));
        let before = before.transpose()?.into_iter().collect();
        let was = tracked || running.chain().is_tracking_always();
        let on = request.track.unwrap_or(was);
        let begun = on && !tracked;
        if begun {
            running.start_tracking(TrackUser::Snapshot)?;
        }
        Ok(Tracking {
            running,
            before,
            begun,
            on,
            done: false,
        })
    }

    /// In the pause: what was written since.
    pub(super) fn again(&mut self) -> Result<(), SnapshotError> {
        if self.begun {
            // Of before the moment, all of which is in the snapshot.
            self.running.harvest(TrackUser::Snapshot)?.commit();
        } else if !self.before.is_empty() {
            self.before.push(self.running.harvest(TrackUser::Snapshot)?);
        }
        Ok(())
    }

    /// What was written since the last snapshot.
    pub(super) fn written(&self) -> Ranges {
        let slots = self.before.iter().flat_map(Harvested::slots);
        let runs = slots.flat_map(|slot| {
            let start = slot.extent.guest_range().start;
            let runs = slot.pages.runs();
            runs.map(move |run| start + run.first * PAGE..start + run.end() * PAGE)
        });
        Ranges::of(runs).thinned(MOST_RUNS)
    }

    /// Whether it is on behind the snapshot.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// The snapshot is whole.
    pub(super) fn commit(mut self) {
        self.done = true;
        self.before.drain(..).for_each(Harvested::commit);
        if !self.on {
            self.running.stop_tracking(TrackUser::Snapshot);
        }
    }
}

impl Drop for Tracking<'_> {
    fn drop(&mut self) {
        // A harvest that is dropped gives back what it has.
        if !self.done && self.begun {
            self.running.stop_tracking(TrackUser::Snapshot);
        }
    }
}
