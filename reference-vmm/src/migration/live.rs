// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest on the source: a machine that runs.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_pf::{Fetched, PageSource, SourceError};
use dirty_log::estimate::Throttle;
use kvm_core::arch::x86_64::state::StateHost;
use kvm_core::{Pause, ThrottleError};
use memslots::{Gfn, Holes, Snapshot};
use serde_json::Value;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::codec::PAGE;
use super::guest::{Dirty, Refusal, SourceGuest};
use super::pages::{Lent, unnoted};
use crate::end::{Chain, EndSignal};
use crate::file_pages;
use crate::lazy::LazyMemory;
use crate::memory::SlotTable;
use crate::snapshot::config_form;
use crate::snapshot::format::SnapshotId;
use crate::snapshot::pages::Piece;
use crate::vm::tracking::{Harvested, TrackUser};
use crate::vm::{ControlError, Running};

/// Pages have no checksums here: so few of them are spoken of.
const PIECE: u32 = 1 << 30;

/// The devices as they were given away, none that have not been, or are back.
#[derive(Debug, Default)]
pub(super) struct Given(Mutex<Option<Vec<Value>>>);

impl Given {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<Value>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody answers for it that the guest is nowhere else: what they are now is not asked. Whether they were away.
    pub(super) fn vouch(&self) -> bool {
        let mut given = self.lock();
        given.as_mut().map(Vec::clear).is_some()
    }
}

/// A machine that runs, to be moved.
pub struct LiveGuest<'a> {
    running: &'a Running,
    end: &'a EndSignal,
    /// None where the kernel has no such table: then all of memory is read.
    holes: Option<Holes>,
    /// What of the state never changes: the configuration, and what KVM can save of the vCPUs.
    fixed: OnceLock<(Value, StateHost)>,
    given: Arc<Given>,
    /// What slows it; dropped with this, whatever comes of the migration.
    throttle: Mutex<Option<kvm_core::Throttle>>,
}

impl<'a> LiveGuest<'a> {
    /// The machine `running`, whose end is told to `end`.
    pub fn new(running: &'a Running, end: &'a EndSignal) -> Self {
        LiveGuest::after(running, end, Arc::default())
    }

    /// The same, after a migration that has given this away.
    pub(super) fn after(running: &'a Running, end: &'a EndSignal, given: Arc<Given>) -> Self {
        LiveGuest {
            running,
            end,
            // What has not come yet is no hole, though this process has nothing there.
            holes: match running.lazy().is_some_and(LazyMemory::is_missing) {
                false => Holes::open().ok(),
                true => None,
            },
            fixed: OnceLock::new(),
            given,
            throttle: Mutex::default(),
        }
    }

    /// The virtio devices of a machine that stands still. What they say of a disk tells whether it was written since.
    fn devices(&self) -> Vec<Value> {
        let devices = self.running.virtio().iter();
        let states = devices.map(|device| device.state().and_then(Result::ok).unwrap_or_default());
        states.collect()
    }

    fn fixed(&self) -> Result<&(Value, StateHost), Refusal> {
        if let Some(known) = self.fixed.get() {
            return Ok(known);
        }
        let config = config_form::to_json(self.running.config());
        let config = config.map_err(|error| Refusal::of(&error))?;
        let host = self.running.state_host();
        let host = host.map_err(|error| Refusal::of(&error))?;
        Ok(self.fixed.get_or_init(|| (config, host)))
    }

    /// The state of the machine, which is held by the rehearsal or for the hand-over, as bytes; the last is
    /// [`Message::State`](super::message::Message::State)'s.
    fn capture(&self, last: bool) -> Result<Vec<u8>, Refusal> {
        let running = self.running;
        let (config, host) = self.fixed()?.clone();
        let capture = |pause: &Pause| running.capture(pause, config, host);
        let mut bytes = Vec::new();
        let state = match last {
            false => running.while_paused(capture),
            true => running.while_handed_over(|pause, paused| {
                bytes.push(paused.into());
                capture(pause)
            }),
        };
        let state = state.ok_or_else(|| Refusal::of(&ControlError::Ended))?;
        let mut state = state.map_err(|error| Refusal::of(&error))?;
        state.memory.piece = PIECE;
        let expected = usize::try_from(state.memory.expected()).unwrap_or(usize::MAX);
        state.memory.pieces = vec![Piece::default(); expected];
        // The number is a snapshot's, of which there is none.
        let encoded = state.encode(SnapshotId([0; 16]));
        bytes.extend(encoded.map_err(|error| Refusal::of(&error))?);
        Ok(bytes)
    }
}

/// What a harvest found.
pub struct Found<'a>(Harvested<'a>);

impl Dirty for Found<'_> {
    fn pages(&self) -> u64 {
        self.0.count()
    }

    fn runs(&self, each: &mut dyn FnMut(Range<u64>) -> bool) {
        for slot in self.0.slots() {
            let start = slot.extent.guest_range().start;
            for run in slot.pages.runs() {
                let at = start + run.first * PAGE as u64;
                if !each(at..at + run.pages * PAGE as u64) {
                    return;
                }
            }
        }
    }

    fn commit(self) {
        self.0.commit();
    }
}

/// Of these pages, those of `table` into which nothing has been put.
fn holes_in(table: &SlotTable, holes: &Holes, pages: Range<u64>) -> Vec<Range<u64>> {
    let Some(region) = table.find(GuestAddress(pages.start)) else {
        return Vec::new();
    };
    let slot = region.extent().guest_range();
    let end = pages.end.min(slot.end);
    let within = pages.start - slot.start..end.saturating_sub(slot.start);
    // Not known, they are read.
    let mut found = holes.of(region.mapping(), within).unwrap_or_default();
    for hole in &mut found {
        *hole = hole.start + slot.start..hole.end + slot.start;
    }
    found
}

/// The memory of a guest that stands still, or does not run any more.
struct Still {
    memory: Snapshot<SlotTable>,
    holes: Option<Holes>,
}

impl PageSource for Still {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let nowhere = || SourceError::NoSuchPage { gfn: first };
        let at = first.0.checked_mul(PAGE as u64).ok_or_else(nowhere)?;
        let end = at.checked_add(into.len() as u64).ok_or_else(nowhere)?;
        if let Some(holes) = &self.holes {
            // Read, they would be made present.
            let found = holes_in(&self.memory, holes, at..end);
            if found.first() == Some(&(at..end)) {
                return Ok(Fetched::Zero);
            }
        }
        let read = file_pages::read(&self.memory, at, into);
        read.map_err(|error| SourceError::Other {
            gfn: first,
            transient: false,
            source: Box::new(error),
        })?;
        Ok(Fetched::Bytes)
    }
}

impl SourceGuest for LiveGuest<'_> {
    type Dirty<'a>
        = Found<'a>
    where
        Self: 'a;

    fn memory(&self) -> u64 {
        let table = self.running.memory();
        let ranges = table.regions().map(|region| region.extent().guest_range());
        ranges.map(|range| range.end - range.start).sum()
    }

    fn over(&self) -> Option<String> {
        match self.end.get() {
            Some(end) => Some(end.to_string()),
            None if self.running.is_stopping() => Some("it was stopped".into()),
            None => None,
        }
    }

    fn is_paused(&self) -> bool {
        self.running.stays_paused()
    }

    fn rehearse(&self) -> Result<Vec<u8>, Refusal> {
        let checked = self.running.check_for_snapshot();
        checked.map_err(|error| Refusal::of(&error))?;
        let tracks = self.running.can_track();
        tracks.map_err(|error| Refusal::of(&error))?;
        // Before it stands still.
        self.fixed()?;
        let held = self.running.hold();
        let _held = held.map_err(|error| Refusal::of(&error))?;
        self.capture(false)
    }

    fn start_tracking(&self) -> Result<(), Refusal> {
        let started = self.running.start_tracking(TrackUser::Migration);
        started.map_err(|error| Refusal::of(&error))
    }

    fn stop_tracking(&self) {
        self.running.stop_tracking(TrackUser::Migration);
    }

    fn harvest(&self) -> Result<Found<'_>, Refusal> {
        let harvested = self.running.harvest(TrackUser::Migration);
        harvested.map(Found).map_err(|error| Refusal::of(&error))
    }

    fn holes(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let Some(holes) = &self.holes else {
            return Vec::new();
        };
        holes_in(&self.running.memory(), holes, pages)
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Refusal> {
        let read = file_pages::read(&self.running.memory(), address, bytes);
        read.map_err(|error| Refusal(format!("at {address:#x}: {}", Chain(&error))))
    }

    fn lend(
        &self,
        pages: &[Range<u64>],
        with: &mut dyn FnMut(&[Lent<'_>]),
    ) -> Result<bool, Refusal> {
        let table = self.running.memory();
        let mut lent = Vec::with_capacity(pages.len());
        for Range { start, end } in pages.iter().cloned() {
            let len = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
            // Who looks for zeros in a page that is gone ends by a signal.
            let found = file_pages::find(&table, start..end);
            found.map_err(|error| Refusal(format!("at {start:#x}: {}", Chain(&error))))?;
            let mut at = start;
            for slice in GuestMemoryBackend::get_slices(&*table, GuestAddress(start), len) {
                let slice = slice.map_err(|error| Refusal(format!("at {at:#x}: {error}")))?;
                lent.push((at, unnoted(&slice)));
                at += slice.len() as u64;
            }
        }
        with(&lent);
        Ok(true)
    }

    fn serve(&self) -> Result<Arc<dyn PageSource>, Refusal> {
        Ok(Arc::new(Still {
            memory: self.running.memory(),
            // Of memory that another process brings nothing is known.
            holes: self.holes.as_ref().and_then(|_| Holes::open().ok()),
        }))
    }

    fn throttle(&self, throttle: Throttle) -> Result<(), Refusal> {
        let mut slot = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if throttle == Throttle::NONE {
            *slot = None;
            return Ok(());
        }
        let refused = |error: ThrottleError| Refusal::of(&error);
        let in_force = match &mut *slot {
            Some(in_force) => in_force,
            slot @ None => slot.insert(self.running.throttle().map_err(refused)?),
        };
        in_force.set(throttle.as_percent()).map_err(refused)
    }

    fn hold(&self) -> Result<(), Refusal> {
        // What the disks have yet to write is written while the guest runs: of the stop it is no part then. What comes in
        // between is, and who cannot write is told the same there.
        for device in self.running.virtio() {
            if let Err(error) = device.make_durable() {
                log::debug!("{}: {error}", device.name());
            }
        }
        let held = self.running.hold_for_hand_over();
        held.map_err(|error| Refusal::of(&error))
    }

    fn state(&self) -> Result<Vec<u8>, Refusal> {
        self.capture(true)
    }

    fn release(&self) -> Result<(), Refusal> {
        *self.given.lock() = Some(self.devices());
        let released = self.running.release_host();
        released.map_err(|error| Refusal::of(&error))
    }

    fn take_back(&self) -> Result<(), Refusal> {
        let taken = self.running.take_host_back();
        taken.map_err(|error| Refusal::of(&error))?;
        let mut given = self.given.lock();
        // Two faults at once, and it would go on with a disk that it does not know.
        let moved_on = |given: &Vec<Value>| !given.is_empty() && *given != self.devices();
        if given.as_ref().is_some_and(moved_on) {
            // Who has it now needs it.
            let _ = self.running.release_host();
            return Err(Refusal(
                "a disk was written since it was let go of: the guest seems to have run elsewhere; if it does not any more, \
                 say so (ctl migrate-settle here), and resume it"
                    .into(),
            ));
        }
        *given = None;
        drop(given);
        match self.running.end_hand_over() {
            // It ends where it is.
            Ok(()) | Err(ControlError::Ended) => Ok(()),
            Err(error) => Err(Refusal::of(&error)),
        }
    }
}
