// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine whose vCPUs run, and how it ends.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use io_bus::{Interrupter, IoBus};
use kvm_core::stats::StatsFd;
use kvm_core::{Throttle, ThrottleError, VcpuSet};
use vmm_sys_util::eventfd::EventFd;

use super::Parts;
use super::control::{self, Control};
use crate::console::{CHUNK, MOST_AT_ONCE};
use crate::devices::virtio::console::config::terminal_size;
use crate::exits::{SEND_OWED, SHOW_REGISTERS};
use crate::gdb;
use crate::kvm_stats::{KvmReaders, KvmStats};
use crate::lazy;
use crate::main_loop::GuestSide;
use crate::stats::{ExitCounters, Stats};

/// How long the end of a machine waits for a device's I/O that is under way.
const DEVICE_PATIENCE: Duration = control::PATIENCE;
/// And where one is known not to come to an end, for it needs memory that did not come.
const PARKED_PATIENCE: Duration = Duration::from_millis(500);

/// A machine whose vCPUs run.
pub struct Running {
    /// Before the vCPUs' set and the memory, which it uses.
    pub(super) debugger: Option<gdb::Debugger>,
    /// Before the vCPUs' set and the devices.
    pub(super) control: Control,
    pub(super) set: VcpuSet,
    pub(super) threads: Vec<JoinHandle<()>>,
    pub(super) stopping: Arc<AtomicBool>,
    /// Each vCPU's way out of a wait for a deferred answer.
    pub(super) waits: Vec<Interrupter>,
    pub(super) counters: Vec<Arc<ExitCounters>>,
    pub(super) kvm_stats: Option<Mutex<KvmReaders<StatsFd>>>,
    /// A device did not come to rest.
    pub(super) left_behind: AtomicBool,
    pub(super) parts: Parts,
}

impl Running {
    /// Brings every vCPU out of the guest for good and waits until it is. An access under way is
    /// finished by its device first, but for one that the device has deferred. What the guest has
    /// written to its console is on it then.
    pub fn stop(&self) {
        // Relaxed: the locks of what follows make it visible.
        self.stopping.store(true, Ordering::Relaxed);
        for wait in &self.waits {
            wait.interrupt();
        }
        if let Some(debugger) = &self.debugger {
            // In this order: those that wait for the debugger run no more of the guest.
            self.set.begin_stop();
            debugger.close();
        }
        if let Some(lazy) = self.lazy() {
            // A vCPU may wait for a page as long as its deadline.
            lazy.leave();
        }
        if let Err(error) = self.set.stop() {
            log::error!("cannot stop the vCPUs: {error}");
        }
        if let Some(lazy) = self.lazy() {
            lazy.end_recording();
        }
        // Behind this nobody has devices go on.
        self.control.close();
        self.parts.console.stop(&self.parts.bus);
        self.rest_devices();
    }

    /// Has the virtio devices finish what is under way; false if one does not come to an end.
    fn rest_devices(&self) -> bool {
        let mut rested = true;
        // Waited for once: this is asked again on the way to the end.
        let patience = match self.left_behind.load(Ordering::Relaxed) {
            true => Duration::ZERO,
            false if lazy::bus::is_any_parked() => PARKED_PATIENCE,
            false => DEVICE_PATIENCE,
        };
        let begun = Instant::now();
        for device in &self.parts.virtio {
            // Who is parked is known by then: all of them have that time together.
            let left = match patience {
                PARKED_PATIENCE => patience.saturating_sub(begun.elapsed()),
                _ => patience,
            };
            if !device.pause(left) {
                if patience.is_zero() {
                    return false;
                }
                match patience {
                    // Why has been told.
                    PARKED_PATIENCE => log::debug!("{} waits for memory", device.name()),
                    _ => log::error!(
                        "{}: I/O of its host's has not ended in {patience:?}, and is left behind",
                        device.name()
                    ),
                }
                rested = false;
                self.left_behind.store(true, Ordering::Relaxed);
            }
        }
        rested
    }

    /// What the guest has done so far, in numbers. Devices are among them if
    /// [`Machine::count_accesses`](super::Machine::count_accesses) was called, and KVM's own numbers if [`Machine::read_kvm_statistics`](super::Machine::read_kvm_statistics)
    /// was. Does not make a vCPU wait.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::collect(
            self.counters.iter().map(|counters| &**counters),
            &self.parts.bus,
            &self.parts.names,
            &self.parts.memslots.snapshot(),
        );
        stats.kvm = self.kvm_statistics();
        stats.lazy = self.lazy_stats();
        stats
    }

    fn kvm_statistics(&self) -> Option<KvmStats> {
        let readers = self.kvm_stats.as_ref()?.lock();
        // One left by a panic has whole samples all the same.
        let sample = readers.unwrap_or_else(PoisonError::into_inner).sample();
        sample
            .inspect_err(|error| log::warn!("the statistics are without KVM's own: {error}"))
            .ok()
    }

    /// Slows all vCPUs down, from 0 % on, until what is returned is dropped. One at a time: a migration that converges by
    /// it has it.
    ///
    /// # Errors
    /// [`ThrottleError`].
    pub fn throttle(&self) -> Result<Throttle, ThrottleError> {
        self.set.throttle()
    }

    /// Stops the vCPUs and closes the VM, for a process that exits next: the rest is left to the
    /// process's end.
    ///
    /// Neither way there by itself is fast. Dropping a `Running` deletes the slots one by one, and
    /// KVM waits for a grace period with each. Leaving the open VM to the process's exit makes two
    /// kernel threads wait for the same grace period at once (the one frees the VM, the other the
    /// address space), and the second of them waits for the slow kind: 13 ms in half of the runs of a
    /// guest that lives for one.
    pub fn leave_to_exit(mut self) {
        self.stop();
        self.join();
        let rested = self.rest_devices();
        // None of them is dropped.
        self.parts.virtio.iter().for_each(|device| device.leave());
        if !rested {
            // What is under way uses the VM still: the process's end takes both.
            std::mem::forget(self);
            return;
        }
        // The mapping of the ring of coalesced writes holds the VM as well. The bus has it.
        self.parts.console.forget();
        self.parts.bus = IoBus::new();
        // And so have the vCPUs' dirty rings.
        self.parts.tracker.forget_rings();
        // And so have KVM's files of statistics.
        self.kvm_stats = None;
        let vm = self.parts.vm.fd().as_raw_fd();
        std::mem::forget(self);
        // SAFETY: what owns the descriptor has been forgotten, and the threads that shared it have
        // ended: nobody uses or closes it any more. Guest memory stays mapped.
        unsafe { libc::close(vm) };
    }

    fn join(&mut self) {
        // First: it tells the debugger of the end.
        self.debugger = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU's thread panicked");
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

impl Running {
    /// Readable when who has the input has room for more.
    pub(super) fn drained_event(&self) -> &EventFd {
        match &self.parts.stdio {
            Some(stdio) => stdio.input.drained(),
            None => self.parts.com1.drained(),
        }
    }

    /// Has an interrupt sent that could not be sent without waiting, by a vCPU's thread. Does not wait.
    fn have_owed_sent(&self, owed: bool) {
        if let (true, Some(request)) = (owed, SEND_OWED) {
            self.set.request_all(request);
        }
    }
}

impl GuestSide for Running {
    fn input(&self, bytes: &[u8]) -> usize {
        // A guest that is paused, or about to be, is told nothing: the drained event says when to come again.
        let Some(_running) = self.input_gate() else {
            return 0;
        };
        if let Some(stdio) = &self.parts.stdio {
            return stdio.input.offer(bytes);
        }
        let taken = self.parts.com1.enqueue(bytes);
        self.have_owed_sent(self.parts.com1.owes_interrupt());
        taken
    }

    fn input_chunk(&self) -> usize {
        match self.parts.stdio {
            Some(_) => MOST_AT_ONCE,
            None => CHUNK,
        }
    }

    fn resized(&self) {
        if let Some(stdio) = &self.parts.stdio
            && let Some(size) = terminal_size(&io::stdout())
        {
            stdio.resizer.resize(size);
        }
    }

    fn drained(&self) -> RawFd {
        self.drained_event().as_raw_fd()
    }

    fn clear_drained(&self) {
        // EAGAIN: not readable, as wanted.
        let _ = self.drained_event().read();
    }

    fn press_power_button(&self) -> bool {
        let pressed = self.parts.power.press().unwrap_or_else(|error| {
            log::error!("cannot press the power button: {error}");
            false
        });
        self.have_owed_sent(self.parts.power.owes_interrupt());
        pressed
    }

    fn is_paused(&self) -> bool {
        self.stays_paused()
    }

    fn show_registers(&self) {
        if self.show_paused_registers() {
            return;
        }
        if let Some(request) = SHOW_REGISTERS {
            self.set.request_all(request);
        }
    }
}
