// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest on the destination: a machine that is made of what comes.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use kvm_core::arch::x86_64::state::ClockRestore;
use memslots::Snapshot;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{ArrivingMemory, Blank, DestinationGuest, Prepared, Refusal};
use crate::config::Config;
use crate::devices::virtio::any::Devices;
use crate::end::EndSignal;
use crate::memory::SlotTable;
use crate::snapshot::Overrides;
use crate::snapshot::machine::MachineState;
use crate::snapshot::pages::is_zero;
use crate::vm::{Allocated, BlankVm, Machine, Running};

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

/// A machine whose memory is there.
pub struct Arriving<C, F> {
    arrival: Arrival<C, F>,
    allocated: Allocated,
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
        let allocated = blank.allocate(&self.end, |_| false);
        Ok(Arriving {
            allocated: allocated.map_err(|error| refused(&error))?,
            arrival: self,
            offered: state.config,
            config,
        })
    }
}

/// Memory that is filled.
pub struct Filled(Snapshot<SlotTable>);

impl ArrivingMemory for Filled {
    fn page(&self, address: u64, bytes: &[u8]) -> Result<(), Refusal> {
        let written = self.0.write_slice(bytes, GuestAddress(address));
        written.map_err(|error| Refusal(format!("at {address:#x}: {error}")))
    }

    fn zero(&self, address: u64, len: u64) -> Result<(), Refusal> {
        const PIECE: usize = 4096;
        // What is zero already is left alone: most of it was never touched, and is not to be made present by this.
        let mut piece = [0; PIECE];
        for at in (0..len).step_by(PIECE) {
            let address = GuestAddress(address + at);
            let bytes = piece.get_mut(..(len - at).min(PIECE as u64) as usize);
            let bytes = bytes.unwrap_or_default();
            let read = self.0.read_slice(bytes, address);
            let done = read.and_then(|()| match is_zero(bytes) {
                true => Ok(()),
                false => {
                    bytes.fill(0);
                    self.0.write_slice(bytes, address)
                }
            });
            done.map_err(|error| Refusal(format!("at {:#x}: {error}", address.0)))?;
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
        Filled(self.allocated.memory())
    }

    fn prepare(self, state: &[u8]) -> Result<Whole<F>, Refusal> {
        let parsed = MachineState::parse(state);
        let (_, state, _) = parsed.map_err(|error| refused(&error))?;
        if state.config != self.offered {
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
            .allocated
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
