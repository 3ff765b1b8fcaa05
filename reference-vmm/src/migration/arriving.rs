// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest on the destination: a machine that is made of what comes.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_core::arch::x86_64::state::ClockRestore;
use memslots::Snapshot;
use vm_memory::{Bytes, GuestAddress};

use super::codec::PAGE;
use super::guest::{ArrivingMemory, Blank, DestinationGuest, Prepared, Refusal};
use crate::config::Config;
use crate::devices::virtio::any::Devices;
use crate::end::EndSignal;
use crate::memory::SlotTable;
use crate::snapshot::Overrides;
use crate::snapshot::machine::MachineState;
use crate::vm::{BlankVm, Framed, Machine, Running};

/// What a machine that comes is to be here.
pub struct Arrival<C, F> {
    /// What it has of its own here.
    pub overrides: Overrides,
    /// What the guest sees of the time that it stood still.
    pub clock: ClockRestore,
    /// Where its serial console's output goes.
    pub console: C,
    /// Told of its end.
    pub end: Arc<EndSignal>,
    /// Called when the machine is whole.
    pub prepared: Option<Box<dyn FnOnce() + Send>>,
    /// Has the machine go on.
    pub go: F,
}

/// A machine that is there but for its state.
pub struct Arriving<C, F> {
    arrival: Arrival<C, F>,
    framed: Framed,
    /// What was offered.
    offered: serde_json::Value,
    config: Config,
}

/// A machine that is whole.
pub struct Whole<F> {
    machine: Machine,
    go: F,
}

fn refused(error: &dyn std::error::Error) -> Refusal {
    Refusal::of(error)
}

impl<C, F> DestinationGuest for Arrival<C, F>
where
    C: AsFd,
    F: FnOnce(Machine) -> Result<Running, Refusal>,
{
    type Blank = Arriving<C, F>;

    fn offered(self, state: &[u8]) -> Result<Arriving<C, F>, Refusal> {
        let parsed = MachineState::parse(state);
        let (_, state, config) = parsed.map_err(|error| refused(&error))?;
        let config = self.overrides.apply(config);
        let config = config.map_err(|error| refused(&error))?;
        let fits = state.check_layout(&config);
        fits.map_err(|what| {
            Refusal(format!(
                "its memory is not that of a machine as its configuration describes: {what}"
            ))
        })?;
        let blank = BlankVm::new(&config).map_err(|error| refused(&error))?;
        let checked = blank.check(&state.vcpus);
        checked.map_err(|error| refused(&error))?;
        let framed = blank
            .allocate(&self.end, |_| false)
            .and_then(|allocated| allocated.frame(&state.vcpus));
        Ok(Arriving {
            framed: framed.map_err(|error| refused(&error))?,
            arrival: self,
            offered: state.config,
            config,
        })
    }
}

/// Memory that is filled. It is zero as it was made, and what was written of it is noted: so zeros cost nothing where
/// nothing was, and make no page present.
pub struct Filled {
    memory: Snapshot<SlotTable>,
    /// Of each slot, in order: where it is, and a bit for each page that was written.
    written: Vec<(Range<u64>, Vec<AtomicU64>)>,
}

/// Where it is noted that a page was written.
struct Note<'a> {
    word: &'a AtomicU64,
    bit: u32,
    /// Pages from this one on that the word has.
    pages: u64,
}

impl Filled {
    fn new(memory: Snapshot<SlotTable>) -> Self {
        let of = |region: &Arc<memslots::Region<_>>| {
            let range = region.extent().guest_range();
            let words = (range.end - range.start).div_ceil(PAGE as u64 * 64);
            (range, (0..words).map(|_| AtomicU64::new(0)).collect())
        };
        let written = memory.regions().map(of).collect();
        Filled { memory, written }
    }

    fn note(&self, address: u64) -> Result<Note<'_>, Refusal> {
        let behind = self
            .written
            .partition_point(|(range, _)| range.start <= address);
        let slot = self.written.get(behind.wrapping_sub(1));
        let (range, words) = slot
            .filter(|(range, _)| range.contains(&address))
            .ok_or_else(|| Refusal(format!("there is no guest memory at {address:#x}")))?;
        let page = (address - range.start) / PAGE as u64;
        let word = words.get((page / 64) as usize);
        let left = (range.end - address) / PAGE as u64;
        Ok(Note {
            word: word.ok_or_else(|| Refusal(format!("no page is at {address:#x}")))?,
            bit: (page % 64) as u32,
            pages: left.min(64 - page % 64),
        })
    }
}

// Relaxed: a page comes by one connection in all rounds, so its bit is one thread's. Others write the word's other bits, and
// no update of one is lost.
impl ArrivingMemory for Filled {
    fn page(&self, address: u64, bytes: &[u8]) -> Result<(), Refusal> {
        // Noted first: what fails half-way is not zero either.
        for at in (address..).step_by(PAGE).take(bytes.len() / PAGE) {
            let note = self.note(at)?;
            note.word.fetch_or(1 << note.bit, Ordering::Relaxed);
        }
        let written = self.memory.write_slice(bytes, GuestAddress(address));
        written.map_err(|error| Refusal(format!("at {address:#x}: {error}")))
    }

    fn zero(&self, address: u64, len: u64) -> Result<(), Refusal> {
        let mut at = 0;
        while at < len {
            let address = address.saturating_add(at);
            let note = self.note(address)?;
            let written = note.word.load(Ordering::Relaxed) >> note.bit;
            let clean = u64::from(written.trailing_zeros()).min(note.pages);
            at += clean * PAGE as u64;
            if clean == 0 {
                let done = self.memory.write_slice(&[0; PAGE], GuestAddress(address));
                done.map_err(|error| Refusal(format!("at {address:#x}: {error}")))?;
                at += PAGE as u64;
            }
        }
        Ok(())
    }
}

impl<C, F> Blank for Arriving<C, F>
where
    C: AsFd,
    F: FnOnce(Machine) -> Result<Running, Refusal>,
{
    type Memory<'a>
        = Filled
    where
        Self: 'a;
    type Prepared = Whole<F>;

    fn memory(&self) -> Filled {
        Filled::new(self.framed.memory())
    }

    fn prepare(self, state: &[u8]) -> Result<Whole<F>, Refusal> {
        let parsed = MachineState::parse(state);
        let (_, state, _) = parsed.map_err(|error| refused(&error))?;
        let vcpus = state.vcpus.iter().map(|vcpu| vcpu.id);
        if state.config != self.offered || !vcpus.eq(self.framed.vcpu_ids()) {
            return Err(Refusal("it is another machine than was offered".into()));
        }
        let Arrival {
            overrides,
            clock,
            console,
            end,
            prepared,
            go,
        } = self.arrival;
        let copies: BTreeSet<usize> = overrides.disks.iter().map(|(number, _)| *number).collect();
        let devices = Devices::open_from(&self.config, &state.devices.virtio, &copies, &console);
        let devices = devices.map_err(|error| refused(&error))?;
        devices.check().map_err(|error| refused(&error))?;
        let machine = self
            .framed
            .finish(&state, devices, (clock, true), &console, &end);
        let machine = machine.map_err(|error| refused(&error))?;
        if let Some(tell) = prepared {
            tell();
        }
        Ok(Whole { machine, go })
    }
}

impl<F> Prepared for Whole<F>
where
    F: FnOnce(Machine) -> Result<Running, Refusal>,
{
    type Running = Running;

    fn start(self) -> Result<Running, Refusal> {
        (self.go)(self.machine)
    }
}
