// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine that is paused as a whole, and goes on.
//!
//! ```text
//!              pause: 1 vCPUs out   2 KVM's ring   3 devices at rest
//!   Running ──────────────────────────────────────────────────────────► Paused
//!       ▲ ◄──── refused: what was done of it is undone ────┘              │
//!       └───────────────── resume: 3 devices, 1 vCPUs ◄───────────────────┘
//! ```
//!
//! The order has reasons. vCPUs come first: behind them no driver tells a device anything, and a device's reset that a
//! vCPU waits for has been answered. Then what KVM keeps of coalesced writes, which are the vCPUs'. Devices last, and first
//! on the way back, so that what a vCPU tells them finds them awake.
//!
//! # What holds while it is paused
//!
//! - No vCPU runs guest code. Each has completed the access that it was at, and told kvm-clock (`KVM_KVMCLOCK_CTRL`), so
//!   that a Linux guest's watchdogs take the pause for none of its own. Its state can be had.
//! - No device's handler runs, none of its I/O is under way, and nothing of the monitor writes to guest memory. (gdb cannot
//!   either: it writes only in a stop of its own, which comes when the machine is resumed.)
//! - Input waits: what is typed stays in the monitor's stdin, frames in the tap, connections in their sockets' queues.
//! - What the driver has notified of is kept, as is what the devices owe the guest.
//! - The power button may be pressed; the guest hears of it when it goes on. Numbers, and SIGUSR1's registers, can be had.
//! - The guest's clocks go on. It finds that time has passed.
//!
//! # The end
//!
//! An end is taken at once, paused or not, also while somebody pauses. SIGTERM, which otherwise gives the guest time to
//! power off, ends a paused guest at once: it could not. A guest that is paused in that time gets no more of it.
//!
//! # What can refuse a pause
//!
//! A vCPU whose access has no end (a device's reset that waits for the host's I/O, a console whose reader has stopped), a
//! device whose I/O has none, the debugger ([`gdb`](crate::gdb)). What is waited for is waited for up to
//! [`PATIENCE`]; then the guest runs on as if nobody had asked, and the error says who it was.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use kvm_core::{Pause, VcpuView};
use kvm_ioctls::VcpuFd;

use super::Running;
use crate::exits::show_registers;

/// How long a pause waits for vCPUs' accesses and devices' I/O to end.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Whether a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Its vCPUs run.
    Running,
    /// It is paused.
    Paused,
}

/// A pause or a resume was refused; the machine is what it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Its end has been told.
    #[error("the guest has ended")]
    Ended,
    /// gdb has stopped it.
    #[error(
        "the guest is stopped in the debugger; let it go on there (continue, detach), then pause it"
    )]
    Debugger,
    /// A vCPU is at an access that has no end.
    #[error(
        "a vCPU has waited for a device, or for the console's reader, for {0:?}; the guest runs on"
    )]
    Vcpu(Duration),
    /// A device has I/O of its host's under way that does not end.
    #[error("{device}: its I/O has not ended in {patience:?}; the guest runs on")]
    Device {
        /// Its name in the machine.
        device: String,
        /// How long it was waited for.
        patience: Duration,
    },
    /// It is being handed over to another process, which alone may let it go on.
    #[error("the guest is being handed over to another host, and stands still until that is done")]
    HandOver,
    /// Asked for by one of its own vCPUs' threads.
    #[error("a vCPU's thread cannot pause its own machine")]
    OnVcpuThread,
}

/// What holds a machine.
#[derive(Default)]
pub(super) struct Control {
    hold: Mutex<Hold>,
    /// Whether it is held, for those that wait for nobody. Written under the lock.
    paused: AtomicBool,
}

#[derive(Default)]
enum Hold {
    #[default]
    Running,
    Paused(Pause),
    /// Paused, for a migration: nobody else resumes it.
    HandedOver(Pause),
    /// The machine has been stopped.
    Ended,
}

impl Control {
    /// Of a machine that is held from its start on.
    pub(super) fn held(pause: Pause) -> Self {
        Control {
            hold: Mutex::new(Hold::Paused(pause)),
            paused: AtomicBool::new(true),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Hold> {
        // What is in it is whole after each statement.
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Hold>> {
        match self.hold.try_lock() {
            Ok(hold) => Some(hold),
            Err(TryLockError::Poisoned(hold)) => Some(hold.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// No more pauses and resumes: the vCPUs have been stopped. Waits for one that is under way.
    pub(super) fn close(&self) {
        let held = std::mem::replace(&mut *self.lock(), Hold::Ended);
        self.paused.store(false, Ordering::Relaxed);
        drop(held);
    }
}

impl Running {
    /// Brings every vCPU out of the guest and every device to rest, and returns when nothing of the guest goes on
    /// ([`control`](self) says what that means). A machine that is paused already stays so: `Ok`.
    ///
    /// Blocks up to [`PATIENCE`] for accesses and I/O that are under way, and for another thread's pause or resume.
    ///
    /// ```no_run
    /// # fn look(running: &reference_vmm::vm::Running) -> Result<(), Box<dyn std::error::Error>> {
    /// running.pause()?;
    /// let registers = running.while_paused(|pause| {
    ///     pause.with_each(|vcpu: &kvm_core::VcpuView<'_, kvm_ioctls::VcpuFd>| vcpu.registers())
    /// });
    /// running.resume()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ControlError`]; the guest runs on.
    pub fn pause(&self) -> Result<(), ControlError> {
        self.pause_within(PATIENCE)
    }

    /// [`pause`](Self::pause), with another patience.
    ///
    /// # Errors
    /// [`ControlError`]; the guest runs on.
    pub fn pause_within(&self, patience: Duration) -> Result<(), ControlError> {
        let mut hold = self.control.lock();
        match &*hold {
            Hold::Paused(_) => return Ok(()),
            Hold::HandedOver(_) => return Err(ControlError::HandOver),
            Hold::Ended => return Err(ControlError::Ended),
            Hold::Running => {}
        }
        let paused = self.hold_all(patience).map(|pause| {
            *hold = Hold::Paused(pause);
            // Relaxed: a hint to those that do not take the lock.
            self.control.paused.store(true, Ordering::Relaxed);
        });
        drop(hold);
        if paused.is_err() {
            // Input that came meanwhile was told to wait.
            self.wake_input();
        }
        paused
    }

    /// Lets devices and vCPUs go on. A machine that runs stays so: `Ok`. Blocks for another thread's pause or resume.
    ///
    /// # Errors
    /// [`ControlError::Ended`].
    pub fn resume(&self) -> Result<(), ControlError> {
        let mut hold = self.control.lock();
        match std::mem::take(&mut *hold) {
            Hold::Running => {}
            Hold::Paused(pause) => {
                self.parts.virtio.iter().for_each(|device| device.resume());
                self.control.paused.store(false, Ordering::Relaxed);
                drop(pause);
            }
            held @ Hold::HandedOver(_) => {
                *hold = held;
                return Err(ControlError::HandOver);
            }
            Hold::Ended => {
                *hold = Hold::Ended;
                return Err(ControlError::Ended);
            }
        }
        // Before input is woken: it looks without waiting.
        drop(hold);
        self.wake_input();
        Ok(())
    }

    /// Whether it is paused. Does not block: while another thread pauses or resumes it, it is what it was.
    pub fn state(&self) -> RunState {
        match self.control.paused.load(Ordering::Relaxed) {
            true => RunState::Paused,
            false => RunState::Running,
        }
    }

    /// Calls `f` with the pause that holds, which stays for as long; none where the machine is not paused. Blocks for
    /// another thread's pause or resume, and has those wait.
    pub fn while_paused<T>(&self, f: impl FnOnce(&Pause) -> T) -> Option<T> {
        match &*self.control.lock() {
            Hold::Paused(pause) | Hold::HandedOver(pause) => Some(f(pause)),
            Hold::Running | Hold::Ended => None,
        }
    }

    /// [`pause`](Self::pause), for a machine that is to go on in another process: nobody else pauses or resumes it until
    /// [`end_hand_over`](Self::end_hand_over).
    ///
    /// # Errors
    /// [`ControlError`]; the guest is what it was.
    pub(crate) fn hold_for_hand_over(&self) -> Result<(), ControlError> {
        self.pause()?;
        let mut hold = self.control.lock();
        match std::mem::take(&mut *hold) {
            Hold::Paused(pause) => {
                *hold = Hold::HandedOver(pause);
                Ok(())
            }
            // By somebody who came between.
            other => {
                *hold = other;
                Err(ControlError::HandOver)
            }
        }
    }

    /// It goes on here after all.
    ///
    /// # Errors
    /// [`ControlError::Ended`].
    pub(crate) fn end_hand_over(&self) -> Result<(), ControlError> {
        let mut hold = self.control.lock();
        *hold = match std::mem::take(&mut *hold) {
            Hold::HandedOver(pause) => Hold::Paused(pause),
            other => other,
        };
        drop(hold);
        self.resume()
    }

    fn hold_all(&self, patience: Duration) -> Result<Pause, ControlError> {
        // Relaxed: a stop that comes later ends the waits below, and its close comes behind this.
        let stopping = || self.stopping.load(Ordering::Relaxed);
        let in_debugger = || self.debugger.as_ref().is_some_and(|of| of.is_holding());
        if stopping() {
            return Err(ControlError::Ended);
        }
        if in_debugger() {
            return Err(ControlError::Debugger);
        }
        let begun = Instant::now();
        let pause = match self.set.pause_within(patience) {
            Ok(Some(pause)) => pause,
            // It stopped the guest while this began.
            Ok(None) if in_debugger() => return Err(ControlError::Debugger),
            Ok(None) => return Err(ControlError::Vcpu(patience)),
            Err(_) => return Err(ControlError::OnVcpuThread),
        };
        self.parts.console.settle(&self.parts.bus);
        for device in &self.parts.virtio {
            let rested = device.pause(patience.saturating_sub(begun.elapsed()));
            if !rested || stopping() {
                let device = device.name().to_owned();
                self.parts.virtio.iter().for_each(|device| device.resume());
                return Err(match stopping() {
                    true => ControlError::Ended,
                    false => ControlError::Device { device, patience },
                });
            }
        }
        match stopping() {
            // The vCPUs have left, and the devices rest: as they are to.
            true => Err(ControlError::Ended),
            false => Ok(pause),
        }
    }

    /// Whether the guest takes console input: not while it is paused, or somebody pauses or resumes it. Then the way to it
    /// stays as it is as long as what is returned lives, and it is not paused before.
    pub(super) fn input_gate(&self) -> Option<impl Sized> {
        let hold = self.control.try_lock()?;
        matches!(&*hold, Hold::Running).then_some(hold)
    }

    /// Has console input that was told to wait come again.
    fn wake_input(&self) {
        // EAGAIN: it is readable as it is.
        let _ = self.drained_event().write(1);
    }

    /// Shows the registers of a machine that is paused, in which no vCPU serves requests; false where it is not.
    pub(super) fn show_paused_registers(&self) -> bool {
        let Some(hold) = self.control.try_lock() else {
            return false;
        };
        let Hold::Paused(pause) = &*hold else {
            return false;
        };
        let shown = pause.with_each(|vcpu: &VcpuView<'_, VcpuFd>| show_registers(vcpu));
        if let Err(error) = shown {
            log::warn!("cannot show the registers: {error}");
        }
        true
    }
}
