// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine that goes on from a snapshot.
//!
//! ```text
//!   Snapshot::open ──► VM ────► devices opened ──► memory ────► irqchip, vCPUs, bus ──► states
//!   (all is read       (KVM is   (disks as they     (mapped,      (as for a boot)        clock, vCPUs,
//!    and checked)       asked)    were? locks)       or read)                            controllers, lines
//! ```
//!
//! What KVM takes of a state is checked before memory is read, or asked for elsewhere; where it is mapped, or comes from files
//! here, as late as the states are set, so that nothing waits for the answer.
//!
//! Or memory is made, and comes when it is touched ([`lazy`](crate::lazy)): from there on every access of this process and
//! of KVM may wait for it.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::blank::Blank;
use super::{BuildError, Machine};
use crate::end::EndSignal;
use crate::lazy::LazyMemory;
use crate::no_wait::readable;
use crate::snapshot::{RestoreError, RestoreRequest, Snapshot};

impl Machine {
    /// Makes the machine of a snapshot, to go on where it was, with the serial console's output on `console` and its end
    /// told to `end`.
    ///
    /// The guest has another generation id than it had, and hears of that where it listens
    /// ([`layout::GENERATION_ID`](crate::arch::layout::GENERATION_ID)): it was not the same machine twice.
    ///
    /// Blocks for the reading of the snapshot ([`Snapshot::open`]), and for memory that is not mapped; of memory that
    /// comes later ([`RestoreRequest::lazy`]) only for what KVM touches.
    ///
    /// # Errors
    /// [`BuildError`], of which [`BuildError::Restore`] is the snapshot's; nothing is left behind.
    pub fn restore(
        request: &RestoreRequest,
        console: impl AsFd,
        end: &Arc<EndSignal>,
    ) -> Result<Self, BuildError> {
        let snapshot = Snapshot::open(request)?;
        let state = &snapshot.state;
        let blank = Blank::new(snapshot.config())?.lazy(request.lazy.is_some());
        let devices = snapshot.devices(&console)?;
        devices.check()?;
        let mut mapped = false;
        let mut allocated = blank.allocate(end, |slots| {
            mapped = request.map && request.lazy.is_none() && snapshot.map(slots);
            mapped
        })?;
        let is_quick = match &request.lazy {
            Some(lazy) => !lazy.is_of_another(),
            None => mapped,
        };
        if !is_quick {
            allocated.check(&state.vcpus)?;
        }
        let lazy = match &request.lazy {
            None => {
                snapshot.load(&allocated.memory(), mapped)?;
                None
            }
            // From here on whoever touches guest memory waits for it.
            Some(lazy) => {
                let (chain, memory) = (snapshot.chain(), allocated.memory());
                let begun = LazyMemory::begin(lazy, chain, &memory, &state.vcpus, end);
                Some(begun.map_err(RestoreError::from)?)
            }
        };
        if request.track {
            allocated.track().map_err(RestoreError::from)?;
        }
        let framed = allocated.frame(&state.vcpus)?;
        let finish = || {
            if lazy.is_some() {
                framed.await_generation(end)?;
            }
            framed.finish(state, devices, (snapshot.clock, false), console, end)
        };
        let finished = match lazy.as_ref().filter(|_| !is_quick) {
            Some(lazy) => waiting_no_longer_than(end, lazy, finish),
            None => finish(),
        };
        let mut machine = finished.map_err(|error| {
            // A page that did not come is the reason of whatever KVM says, and may be told behind that.
            let _ = lazy.as_ref().and_then(|lazy| lazy.loss().why(false));
            match end.is_told() {
                true => BuildError::Ended,
                false => error,
            }
        })?;
        machine.parts.lazy = lazy;
        machine.parts.mapped = mapped.then(|| snapshot.mapped_file()).flatten();
        if request.track {
            machine.parts.chain.track_always();
            // Nobody has it yet.
            if let Some(mut tip) = machine.parts.chain.lock() {
                *tip = Some(snapshot.tip());
            }
        }
        snapshot.keep_disks();
        Ok(machine)
    }
}

/// What `make` makes. It may wait in the kernel for memory that another process brings: once an end is told nobody brings it
/// any more, and the wait ends with an error.
fn waiting_no_longer_than<T>(
    end: &EndSignal,
    lazy: &LazyMemory,
    make: impl FnOnce() -> Result<T, BuildError>,
) -> Result<T, BuildError> {
    let made = EventFd::new(EFD_CLOEXEC);
    let process = |what| move |source| BuildError::Process { what, source };
    let made = made.map_err(process("make an eventfd"))?;
    std::thread::scope(|scope| {
        let watch = || {
            if let Ok([false, true]) = readable([made.as_raw_fd(), end.as_raw_fd()], -1) {
                lazy.leave();
            }
        };
        let watches = std::thread::Builder::new().name("lazy-end".into());
        let watches = watches.spawn_scoped(scope, watch);
        watches.map_err(process("start a thread"))?;
        let result = make();
        // Of a counter that stands at zero a write of one does not fail.
        let _ = made.write(1);
        result
    })
}
