// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest on the source: a machine that runs.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use super::codec::PAGE;
use super::guest::{Dirty, Refusal, SourceGuest};
use crate::end::EndSignal;
use crate::snapshot::config_form;
use crate::snapshot::format::SnapshotId;
use crate::snapshot::pages::Piece;
use crate::vm::tracking::{Harvested, TrackUser};
use crate::vm::{ControlError, RunState, Running};

/// Pages have no checksums here: so few of them are spoken of.
const PIECE: u32 = 1 << 30;

/// A machine that runs, to be moved.
pub struct LiveGuest<'a> {
    running: &'a Running,
    end: &'a EndSignal,
    /// The devices as they were given away.
    given: Mutex<Option<Vec<Value>>>,
}

impl<'a> LiveGuest<'a> {
    /// The machine `running`, whose end is told to `end`.
    pub fn new(running: &'a Running, end: &'a EndSignal) -> Self {
        LiveGuest {
            running,
            end,
            given: Mutex::default(),
        }
    }

    /// The virtio devices of a machine that stands still. What they say of a disk tells whether it was written since.
    fn devices(&self) -> Vec<Value> {
        let devices = self.running.virtio().iter();
        let states = devices.map(|device| device.state().and_then(Result::ok).unwrap_or_default());
        states.collect()
    }

    /// The state of the machine, which is paused, as bytes.
    fn capture(&self) -> Result<Vec<u8>, Refusal> {
        let running = self.running;
        let config = config_form::to_json(running.config());
        let config = config.map_err(|error| Refusal::of(&error))?;
        let host = running.state_host().map_err(|error| Refusal::of(&error))?;
        let state = running.while_paused(|pause| running.capture(pause, config, host));
        let state = state.ok_or_else(|| Refusal("the guest was let go on by somebody".into()))?;
        let mut state = state.map_err(|error| Refusal::of(&error))?;
        state.memory.piece = PIECE;
        let expected = usize::try_from(state.memory.expected()).unwrap_or(usize::MAX);
        state.memory.pieces = vec![Piece::default(); expected];
        // The number is a snapshot's, of which there is none.
        let bytes = state.encode(SnapshotId([0; 16]));
        bytes.map_err(|error| Refusal::of(&error))
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

    fn rehearse(&self) -> Result<Vec<u8>, Refusal> {
        let checked = self.running.check_for_snapshot();
        checked.map_err(|error| Refusal::of(&error))?;
        if self.running.state() == RunState::Paused {
            return Err(Refusal(
                "the guest is paused, and would run at its destination: resume it first".into(),
            ));
        }
        let control = |error: ControlError| Refusal::of(&error);
        self.running.pause().map_err(control)?;
        let state = self.capture();
        self.running.resume().map_err(control)?;
        state
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

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Refusal> {
        let read = self
            .running
            .memory()
            .read_slice(bytes, GuestAddress(address));
        read.map_err(|error| Refusal(format!("at {address:#x}: {error}")))
    }

    fn hold(&self) -> Result<(), Refusal> {
        let held = self.running.hold_for_hand_over();
        held.map_err(|error| Refusal::of(&error))
    }

    fn state(&self) -> Result<Vec<u8>, Refusal> {
        self.capture()
    }

    fn release(&self) -> Result<(), Refusal> {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.devices());
        let released = self.running.release_host();
        released.map_err(|error| Refusal::of(&error))
    }

    fn take_back(&self) -> Result<(), Refusal> {
        let taken = self.running.take_host_back();
        taken.map_err(|error| Refusal::of(&error))?;
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        // Two faults at once, and it would go on with a disk that it does not know.
        if given.as_ref().is_some_and(|given| *given != self.devices()) {
            return Err(Refusal(
                "a disk was written since it was let go of: the guest seems to have run elsewhere"
                    .into(),
            ));
        }
        drop(given);
        match self.running.end_hand_over() {
            // It ends where it is.
            Ok(()) | Err(ControlError::Ended) => Ok(()),
            Err(error) => Err(Refusal::of(&error)),
        }
    }
}
