// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot whose memory is written when the guest goes on already.
//!
//! ```text
//!   the guest runs   memory registered, protected in steps      a write: goes on, and is noted
//!   paused           what was written since protected again ─► devices, vCPUs, disks read
//!   the guest runs   memory written, in order                  a write: the page is copied aside first, and goes on
//! ```
//!
//! The kernel's part is [`PointInTime`]'s: a write to a protected page waits, whoever makes it, until its contents are safe.
//! The pause grows with what the guest writes while memory is being protected (20 ms for 1 GiB), and not with memory: an
//! incremental snapshot has protected only what was written since the last one.
//!
//! # What it costs the guest
//! The first write to each page behind the pause, until that page is on its way, waits for a copy: tens of microseconds.
//! KVM maps memory anew in pages of 4 KiB. While the guest writes faster than the disk takes it, copies are kept, up to
//! [`ROOM`]; then its writes wait for the disk. When half of that is taken up, pages that are copied are written first, where
//! the file's form lets pieces come in any order (`--compress` does not).
//!
//! # When it goes wrong
//! A full disk, an end of the guest's, a kernel that refuses: all protection is gone at once, the guest goes on, nothing is
//! left of what was written, and an older snapshot of the name is whole. The guest may be paused and resumed meanwhile. No
//! other snapshot of it is taken, and the control socket does not have it moved to another host
//! ([`api::Machine`](crate::api::Machine) refuses that; a program that has [`Running`] itself has to see to it).
//!
//! While its writes wait for the disk a vCPU may be at one, and a pause that it keeps waiting is refused.
//!
//! # Where it cannot be
//! What the kernel has no write-protect faults for ([`memslots::MemoryKind::support`]): a snapshot's file that a restored
//! guest has mapped, above all. Huge pages of 1 GiB: a write would wait for the copy of one.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use memslots::uffd::PointInTime;
use memslots::uffd::point_in_time::Frozen;
use memslots::{Mapping, Mechanism, MemoryKind};

use super::files::{Draft, SnapshotFiles};
use super::memory_out::MemoryOut;
use super::packed::Compression;
use super::pages::{PageMap, Region};
use super::ranges::Ranges;
use super::save::{Asked, Captured, SnapshotError, Taken, create_memory};
use super::written::Tracking;
use crate::vm::Running;

/// The most bytes of pages that are kept because the guest has written to them before they were on the disk, where no
/// others are asked for ([`room`](super::SnapshotRequest::room)).
pub const ROOM: u64 = 256 << 20;

/// So much is written, and then free again, at a time; a large page is not more.
const STEP: u64 = 2 << 20;

/// What a snapshot in the background cost the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackgroundCost {
    /// Pages that were protected in the pause.
    pub protected: u64,
    /// How much of the pause that was.
    pub protecting: Duration,
    /// Pages that were copied because the guest wrote to them before they were read.
    pub copied: u64,
}

/// The guest's memory: each region's mapping, and where the guest has it.
struct Areas(Vec<(Range<u64>, Arc<Mapping>)>);

impl Areas {
    fn of(running: &Running) -> Self {
        let table = running.memory();
        let regions = table.regions().map(|region| {
            let range = region.extent().guest_range();
            (range, Arc::clone(region.mapping()))
        });
        Areas(regions.collect())
    }

    /// Refuses memory whose writes the kernel does not tell.
    fn check(&self) -> Result<(), SnapshotError> {
        let kinds = self.0.iter().map(|(_, mapping)| mapping.kind());
        let checked = kinds.map(|kind| kind.check(Mechanism::WriteProtect));
        let checked = checked.collect::<Result<(), _>>();
        checked.map_err(|refused| match refused.kind {
            MemoryKind::GuestMemfd => SnapshotError::Unprotected(refused),
            _ => SnapshotError::Mapped(refused),
        })
    }

    fn map(&self) -> PageMap {
        let ranges = self.0.iter().map(|(range, _)| range);
        PageMap::of(ranges.map(|range| (range.start, range.end - range.start)))
    }

    /// A run of guest memory, by areas: which, and bytes from its start.
    fn split(&self, run: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
        let areas = self.0.iter().enumerate();
        areas.filter_map(move |(at, (range, _))| {
            let (start, end) = (run.start.max(range.start), run.end.min(range.end));
            (start < end).then(|| (at, start - range.start..end - range.start))
        })
    }

    /// The same of many, widened to whole pages of each area, each page once.
    fn whole(&self, ranges: &Ranges) -> Vec<(usize, Range<u64>)> {
        let split = ranges.iter().flat_map(|run| self.split(run));
        let page = |at| {
            let area: Option<&(_, Arc<Mapping>)> = self.0.get(at);
            area.map_or(1, |(_, mapping)| mapping.page_size())
        };
        widened(split, page)
    }

    /// The steps in which all of it is written: an area's bytes, and the pieces of the file in them.
    fn steps(&self, map: &PageMap) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for (number, place) in map.places() {
            let Some((area, run)) = self.split(place.guest..place.guest + place.len).next() else {
                continue;
            };
            match steps.last_mut() {
                Some(last) if last.area == area && run.start / STEP == last.range.start / STEP => {
                    last.range.end = run.end;
                    last.pieces.push((number, place));
                }
                _ => steps.push(Step {
                    area,
                    range: run,
                    pieces: vec![(number, place)],
                }),
            }
        }
        steps
    }
}

/// Runs in order, by areas, widened to whole pages of the size that an area has, each page once.
fn widened(
    runs: impl Iterator<Item = (usize, Range<u64>)>,
    page: impl Fn(usize) -> u64,
) -> Vec<(usize, Range<u64>)> {
    let mut whole: Vec<(usize, Range<u64>)> = Vec::new();
    for (area, run) in runs {
        let page = page(area);
        let (start, end) = (run.start / page * page, run.end.next_multiple_of(page));
        match whole.last_mut() {
            Some((last, before)) if *last == area && start < before.end => {
                before.end = before.end.max(end);
            }
            _ => whole.push((area, start..end)),
        }
    }
    whole
}

/// Has `lay` called for each run, a step at a time, and `go_on` asked before each.
fn in_steps<E>(
    runs: Vec<(usize, Range<u64>)>,
    go_on: impl Fn() -> Result<(), E>,
    lay: impl Fn(usize, Range<u64>) -> Result<(), E>,
) -> Result<(), E> {
    for (area, run) in runs {
        for start in run.clone().step_by(STEP as usize) {
            go_on()?;
            lay(area, start..run.end.min(start + STEP))?;
        }
    }
    Ok(())
}

/// What is written at a time.
struct Step {
    area: usize,
    range: Range<u64>,
    pieces: Vec<(usize, Region)>,
}

impl Running {
    /// Memory is written while the guest runs.
    pub(super) fn take_in_background<'a, F: SnapshotFiles>(
        &'a self,
        asked: Asked<'_>,
        files: &'a F,
    ) -> Result<Taken<'a, F>, SnapshotError> {
        let Asked {
            request,
            is_link,
            config,
            host,
            id,
        } = asked;
        let areas = Areas::of(self);
        areas.check()?;
        let mappings = areas.0.iter().map(|(_, mapping)| Arc::clone(mapping));
        // Before what is kept, and so removed behind it where this fails: the guest does not wait for that.
        let draft = Draft::begin(files, &request.dir)?;
        let kept = PointInTime::begin(mappings, request.room)?;
        let memory = create_memory(&draft, request, &areas.map(), id)?;
        let mut tracking = Tracking::of(self, request)?;
        // So that the pause has less to wait for.
        self.write_disks_back();
        let all = areas.map().all();
        let first = is_link.then(|| tracking.written());
        let runs = areas.whole(first.as_ref().unwrap_or(&all));
        let lay = |area, run| Ok(kept.lay(area, run)?);
        in_steps(runs, || self.go_on(), lay)?;

        let (in_pause, paused) = self.standing_still(|pause| {
            tracking.again()?;
            let own = is_link.then(|| tracking.written());
            let wanted = own.as_ref().map(|own| areas.whole(own));
            let frozen = kept.freeze(&wanted.unwrap_or_default())?;
            let state = self.capture(pause, config, host)?;
            let first = self.first_pages(&state.vcpus);
            let disks = self.copy_disks(&draft, request.disks, &state.devices.virtio)?;
            Ok((frozen, own, state, disks, first))
        })?;
        let (Frozen { pages, took }, own, mut state, disks, first) = in_pause;

        let steps = areas.steps(&state.memory);
        let out = MemoryOut::new(&draft, &memory, &mut state.memory).only(own.as_ref());
        let mut out = out.compressed(request.compression)?;
        let in_order = request.compression != Compression::None;
        let walked = self.walk(&areas, &kept, steps, in_order, own.as_ref(), &mut out);
        let (written, packed) = (out.written(), out.sections());
        let background = Some(BackgroundCost {
            protected: pages,
            protecting: took,
            copied: kept.copied(),
        });
        // Before the disk is waited for, and before what was written is removed: the guest has waited enough.
        drop(kept);
        walked?;
        Ok(Taken {
            draft,
            captured: Captured {
                state,
                tracking,
                own,
                memory,
                written,
                packed,
                disks,
                first,
            },
            paused,
            background,
        })
    }

    /// Writes all steps, each once.
    fn walk<F: SnapshotFiles>(
        &self,
        areas: &Areas,
        kept: &PointInTime,
        steps: Vec<Step>,
        in_order: bool,
        own: Option<&Ranges>,
        out: &mut MemoryOut<'_, F>,
    ) -> Result<(), SnapshotError> {
        let read = |run: Range<u64>, into: &mut [u8]| {
            let mut rest = into;
            for (area, part) in areas.split(run) {
                let (now, later) = rest.split_at_mut((part.end - part.start) as usize);
                kept.read(area, part.start, now)?;
                rest = later;
            }
            Ok::<_, SnapshotError>(())
        };
        // In order of area and address.
        let places = steps
            .iter()
            .map(|step| (step.area, step.range.start / STEP));
        let places: Vec<_> = places.collect();
        let mut left: Vec<_> = steps.into_iter().map(Some).collect();
        let mut next = 0;
        while next < left.len() {
            self.go_on()?;
            let urgent = kept.urgent().filter(|_| !in_order);
            let urgent =
                urgent.and_then(|(area, at)| places.binary_search(&(area, at / STEP)).ok());
            let step = match urgent.and_then(|at| left.get_mut(at)) {
                Some(urgent @ Some(_)) => urgent.take(),
                _ => {
                    let step = left.get_mut(next).and_then(Option::take);
                    next += 1;
                    step
                }
            };
            let Some(Step {
                area,
                range,
                pieces,
            }) = step
            else {
                continue;
            };
            let mut something = own.is_none();
            for (number, piece) in pieces {
                let run = piece.guest..piece.guest + piece.len;
                something |= own.is_some_and(|own| own.within(run).next().is_some());
                out.write_from(number, piece, read)?;
            }
            // Of one in which nothing is to be had nothing is protected.
            if something {
                kept.done(area, range)?;
            }
        }
        Ok(())
    }

    /// Has what the guest wrote to its disks on its way to them, where that is easy.
    fn write_disks_back(&self) {
        let disks = self.config().disks.iter().filter(|disk| !disk.readonly);
        for disk in disks {
            // The pause asks again, and tells of what was refused.
            drop(std::fs::File::open(&disk.path).and_then(|image| image.sync_data()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn an_end_ends_the_protecting_before_the_next_step() {
        let runs = vec![(0, 0..2 * STEP + 0x1000), (1, 0x1000..0x2000)];
        let laid = RefCell::new(Vec::new());
        let lay = |area, run| {
            laid.borrow_mut().push((area, run));
            Ok(())
        };
        assert_eq!(in_steps(runs.clone(), || Ok::<_, ()>(()), lay), Ok(()));
        let all = laid.take();
        let last = 2 * STEP..2 * STEP + 0x1000;
        let due = [
            (0, 0..STEP),
            (0, STEP..2 * STEP),
            (0, last),
            (1, 0x1000..0x2000),
        ];
        assert_eq!(all, due);
        for steps in 0..due.len() {
            let go_on = || match laid.borrow().len() < steps {
                true => Ok(()),
                false => Err("it has ended"),
            };
            let lay = |area, run| {
                laid.borrow_mut().push((area, run));
                Ok(())
            };
            assert_eq!(in_steps(runs.clone(), go_on, lay), Err("it has ended"));
            assert_eq!(laid.take(), due[..steps]);
        }
    }

    #[test]
    fn runs_in_one_large_page_are_protected_once() {
        let runs = [
            (0, 0x1000..0x2000),
            (0, 0x5000..0x6000),
            (0, 0x1f_f000..0x20_1000),
            (0, 0x60_0000..0x60_1000),
            (1, 0x1000..0x2000),
            (1, 0x3000..0x4000),
        ];
        let page = |area| [0x20_0000, 0x1000].get(area).copied().unwrap();
        let whole = widened(runs.into_iter(), page);
        let expected = [
            (0, 0..0x40_0000),
            (0, 0x60_0000..0x80_0000),
            (1, 0x1000..0x2000),
            (1, 0x3000..0x4000),
        ];
        assert_eq!(whole, expected);
    }
}
