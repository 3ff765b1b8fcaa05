// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest on the destination: a machine that is made of what comes.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use kvm_core::arch::x86_64::state::ClockRestore;

use super::coming::{Coming, Counted, Tell};
use super::filled::Filled;
use super::guest::{Blank, DestinationGuest, Prepared, Refusal};
use super::postcopy::ask::Later;
use crate::config::Config;
use crate::devices::virtio::any::Devices;
use crate::end::EndSignal;
use crate::lazy::LazyRequest;
use crate::snapshot::Overrides;
use crate::snapshot::machine::MachineState;
use crate::vm::{BlankVm, Framed, Machine, Running};

/// What a machine that comes is to be here.
pub struct Arrival<C, F> {
    /// What it has of its own here.
    pub overrides: Overrides,
    /// What the guest sees of the time that it stood still.
    pub clock: ClockRestore,
    /// How memory comes later, of a post-copy.
    pub lazy: LazyRequest,
    /// Where its serial console's output goes.
    pub console: C,
    /// Told of its end.
    pub end: Arc<EndSignal>,
    /// What is known of it, for who asks.
    pub coming: Arc<Coming>,
    /// Who offers it.
    pub source: Option<String>,
    /// Called when it is known that the machine can be here, with the same.
    pub offered: Option<Tell>,
    /// Called when the machine is whole.
    pub prepared: Option<Box<dyn FnOnce() + Send>>,
    /// Makes the machine's threads. It stands still until the source has handed it over.
    pub start: F,
}

/// A machine that is there but for its state.
pub struct Arriving<C, F> {
    arrival: Arrival<C, F>,
    framed: Framed,
    /// What was offered.
    offered: serde_json::Value,
    config: Config,
}

/// A machine that is whole: its threads are there, and wait for the word. One that was paused stays so behind it.
pub struct Whole {
    running: Running,
    paused: bool,
}

fn refused(error: &dyn std::error::Error) -> Refusal {
    Refusal::of(error)
}

impl<C, F> Arrival<C, F> {
    /// The disks that are elsewhere here.
    fn copies(&self) -> BTreeSet<usize> {
        let disks = self.overrides.disks.iter();
        disks.map(|(number, _)| *number).collect()
    }
}

impl<C, F> DestinationGuest for Arrival<C, F>
where
    C: AsFd,
    F: FnOnce(Machine) -> Result<Running, Refusal>,
{
    type Blank = Arriving<C, F>;

    fn is_from(&mut self, source: Option<String>) {
        self.source = source;
    }

    fn offered(mut self, state: &[u8]) -> Result<Arriving<C, F>, Refusal> {
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
        // What can be told of them while they are the source's: before all of memory has been sent.
        let disks = Devices::look_for_disks(&config, &state.devices.virtio, &self.copies());
        disks.map_err(|error| refused(&error))?;
        let mut blank = BlankVm::new(&config).map_err(|error| refused(&error))?;
        let checked = blank.check(&state.vcpus);
        checked.map_err(|error| refused(&error))?;
        let framed = blank
            .allocate(&self.end, |_| false)
            .and_then(|allocated| allocated.frame(&state.vcpus));
        let framed = framed.map_err(|error| refused(&error))?;
        let from = self.source.take();
        let from = from.unwrap_or_else(|| "an unknown source".into());
        self.coming.is_offered(from, config.memory.size);
        if let Some(tell) = self.offered.take() {
            tell(&self.coming);
        }
        Ok(Arriving {
            framed,
            arrival: self,
            offered: state.config,
            config,
        })
    }
}

impl<C, F> Blank for Arriving<C, F>
where
    C: AsFd,
    F: FnOnce(Machine) -> Result<Running, Refusal>,
{
    type Memory<'a>
        = Counted<'a, Filled<'a>>
    where
        Self: 'a;
    type Prepared = Whole;

    fn memory(&self) -> Counted<'_, Filled<'_>> {
        Counted {
            memory: Filled::new(self.framed.memory(), self.framed.pre_faulter()),
            coming: &self.arrival.coming,
        }
    }

    fn can_come_later(&self) -> Result<(), Refusal> {
        self.framed
            .can_come_later()
            .map_err(|error| refused(&error))
    }

    fn prepare(self, state: &[u8]) -> Result<Whole, Refusal> {
        self.make(state, None)
    }

    fn prepare_later(self, state: &[u8], later: Later) -> Result<Whole, Refusal> {
        self.make(state, Some(later))
    }
}

impl<C, F> Arriving<C, F>
where
    C: AsFd,
    F: FnOnce(Machine) -> Result<Running, Refusal>,
{
    fn make(self, state: &[u8], later: Option<Later>) -> Result<Whole, Refusal> {
        let (paused, state) = match state {
            [0, state @ ..] => (false, state),
            [1, state @ ..] => (true, state),
            other => {
                let first = other.first();
                return Err(Refusal(format!(
                    "whether the guest is paused is said by {first:?}, and neither 0 nor 1"
                )));
            }
        };
        let parsed = MachineState::parse(state);
        let (_, state, _) = parsed.map_err(|error| refused(&error))?;
        let vcpus = state.vcpus.iter().map(|vcpu| vcpu.id);
        if state.config != self.offered || !vcpus.eq(self.framed.vcpu_ids()) {
            return Err(Refusal("it is another machine than was offered".into()));
        }
        let copies = self.arrival.copies();
        let Arrival {
            clock,
            lazy,
            console,
            end,
            prepared,
            start,
            ..
        } = self.arrival;
        let devices = Devices::open_from(&self.config, &state.devices.virtio, &copies, &console);
        let devices = devices.map_err(|error| refused(&error))?;
        devices.check().map_err(|error| refused(&error))?;
        // From here on whoever touches guest memory waits for it: KVM, when it has the vCPUs' state, and devices.
        let lazy = later.map(|later| self.framed.come_later(&lazy, later, &end));
        let lazy = lazy.transpose().map_err(|error| refused(&error))?;
        let machine = self
            .framed
            .finish(&state, devices, (clock, true), &console, &end);
        let mut machine = machine.map_err(|error| refused(&error))?;
        machine.set_lazy(lazy);
        // Threads, the terminal, a debugger's socket: a host that is full refuses them, and the source has the guest still.
        machine.await_hand_over();
        let running = start(machine)?;
        if let Some(tell) = prepared {
            tell();
        }
        Ok(Whole { running, paused })
    }
}

impl Prepared for Whole {
    type Running = Running;

    fn start(self) -> Result<Running, Refusal> {
        let taken = self.running.take_over(self.paused);
        taken.map_err(|error| refused(&error))?;
        Ok(self.running)
    }
}
