// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `run --gdb`: a guest under gdb, by its remote protocol (with gdbstub).
//!
//! ```text
//!  gdb ◄─socket─► session (thread "gdb") ── target ── vcpus ── link ──► vCPU threads
//!       listener,                           registers,          jobs while they are stopped,
//!       connection                          breakpoints         events when they stop
//! ```
//!
//! The guest waits for a debugger before its first instruction. All vCPUs stop together, and each is a
//! thread to gdb. A debugger may detach or break off at any time, and the guest runs on; another may
//! come. `kill` ends the guest, and the guest's end is told to gdb (`W`, with the monitor's exit
//! status; `X` where it crashed or was stopped).
//!
//! # Addresses
//!
//! Addresses are linear ones: what gdb reads and writes is translated by the page tables of the vCPU
//! that it looks at, with a supervisor's rights. In real mode, and wherever a segment has a base, `$pc`
//! is an offset in its segment: the instruction is at `$pc` plus that base. The registers are always those of
//! a 64-bit processor.
//!
//! # Breakpoints
//!
//! A processor has four debug registers. gdb's breakpoints, of both kinds, and its watchpoints have
//! them, watchpoints and hardware breakpoints first. Software breakpoints for which there are none left
//! become an `int3` in the guest's memory while it runs, where the vCPU is in protected mode, the address is mapped, and the
//! host's KVM reports it, which is tried. What cannot be had is refused when it is asked for.
//! While a debug register is taken, the guest's own do nothing.
//!
//! # Threads and time
//!
//! One thread, `gdb`, which sleeps until the peer, a vCPU or the machine's end has something for it.
//! Stopping is kvm-core's pause, with all that it does: kvm-clock is told, accesses are completed. The
//! guest's other clocks go on while it is stopped.
//!
//! A [pause of the machine](crate::vm::Running::pause) is refused while the guest is stopped here, for the vCPUs wait in
//! the debugger's hands. In a machine that is paused gdb's own stop takes place as well, and what gdb asks of the vCPUs
//! is answered when the machine is resumed, before they run.
//!
//! # Threat model
//!
//! Who can connect owns the guest: that is what a debugger is for. Of the monitor a peer owns nothing:
//! what it sends ends at worst its session.

mod breakpoints;
mod connection;
#[cfg(test)]
mod fake;
mod fpu;
mod link;
mod listener;
mod registers;
mod session;
mod target;
#[cfg(test)]
mod target_tests;
mod trial;
mod vcpus;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

pub(crate) use self::link::{DEBUG, Link, VcpuSide};
pub use self::listener::{Address, ListenError, Listener, NoAddress};
use self::vcpus::Live;
use crate::end::EndSignal;
use crate::memory::Memslots;

/// The debugger's thread of a machine that runs.
pub(crate) struct Debugger {
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
}

impl Debugger {
    /// Starts the thread. The vCPUs of `link`'s set run when a debugger has them do so.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(
        listener: Listener,
        link: &Arc<Link>,
        memory: &Memslots,
        kvm: &Path,
        end: &Arc<EndSignal>,
    ) -> io::Result<Self> {
        let live = Live::new(link.clone(), memory.clone(), kvm.to_owned());
        let (shared, end) = (link.clone(), end.clone());
        let thread = std::thread::Builder::new()
            .name("gdb".into())
            .spawn(move || {
                // Also where it unwinds: no vCPU is left waiting for it.
                let _close = CloseAtEnd(&shared);
                session::serve(&listener, &shared, live, &end);
            })?;
        Ok(Debugger {
            link: link.clone(),
            thread: Some(thread),
        })
    }

    /// Whether the guest is stopped in the debugger.
    pub(crate) fn is_holding(&self) -> bool {
        self.link.is_holding()
    }

    /// Lets the vCPUs go, for the machine ends. Does not block.
    pub(crate) fn close(&self) {
        self.link.close();
    }

    /// Waits until the debugger has been told of the end, as far as it listens.
    pub(crate) fn join(&mut self) {
        self.link.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the debugger's thread panicked");
        }
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        self.join();
    }
}

struct CloseAtEnd<'a>(&'a Link);

impl Drop for CloseAtEnd<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}
