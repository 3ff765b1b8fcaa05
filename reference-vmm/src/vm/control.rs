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
//! # Who holds it
//!
//! What has to look at a machine that stands still (a snapshot, a migration before its first page) holds it for as long
//! (`Running::hold`), and who pauses it has it paused until it is resumed. Both at once: it goes on when the last
//! of them is done, and who was told that it is paused finds it so.
//!
//! # The end
//!
//! An end is taken at once, paused or not, also while somebody pauses. SIGTERM, which otherwise gives the guest time to
//! power off, ends a paused guest at once: it could not. A guest that is paused in that time gets no more of it.
//!
//! # What can refuse a pause
//!
//! A vCPU whose access has no end (a device's reset that waits for the host's I/O, a console whose reader has stopped, a write
//! that waits for the disk of a snapshot in the [background](crate::snapshot::background)), a device whose I/O has none, the debugger ([`gdb`](crate::gdb)). What is waited for is waited for up to
//! [`PATIENCE`]; then the guest runs on as if nobody had asked, and the error says who it was.

use std::ops::{Deref, DerefMut};
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
    /// A vCPU is at an access that has no end, or writes to a page that a snapshot in the background has no room to keep.
    #[error(
        "a vCPU has waited for a device, for the console's reader, for memory that has not come, or for the disk of a snapshot \
         in the background, for {0:?}; the guest runs on"
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
    /// It was to be handed over, and something else holds it.
    #[error("a snapshot of the guest is being taken: hand it over when that is done")]
    Held,
    /// Asked for by one of its own vCPUs' threads.
    #[error("a vCPU's thread cannot pause its own machine")]
    OnVcpuThread,
}

/// What holds a machine.
#[derive(Default)]
pub(super) struct Control {
    hold: Mutex<Hold>,
    /// Whether it is held, for those that wait for nobody. Written under the lock ([`Holding`]).
    paused: AtomicBool,
    /// Whether it is held until somebody says otherwise: a user has paused it, or it is being handed over.
    stays: AtomicBool,
}

#[derive(Default)]
enum Hold {
    #[default]
    Running,
    Paused(Pause, For),
    /// Paused, for a migration: nobody else resumes it. Where that has not been for a migration alone it stays paused behind
    /// it.
    HandedOver(Pause, For),
    /// The machine has been stopped.
    Ended,
}

/// Who wants it paused: somebody, or none is left and it goes on.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct For {
    /// A user, until he resumes it.
    user: bool,
    /// [`Held`]s.
    held: usize,
}

impl For {
    const USER: For = For {
        user: true,
        held: 0,
    };
    const HELD: For = For {
        user: false,
        held: 1,
    };

    fn is_nobody(self) -> bool {
        self == For::default()
    }
}

impl Control {
    /// Of a machine that is held from its start on.
    pub(super) fn held(pause: Pause) -> Self {
        Control {
            hold: Mutex::new(Hold::Paused(pause, For::USER)),
            paused: AtomicBool::new(true),
            stays: AtomicBool::new(true),
        }
    }

    /// Of a machine that another process hands over, from its start on.
    pub(super) fn handed_over(pause: Pause) -> Self {
        Control {
            hold: Mutex::new(Hold::HandedOver(pause, For::HELD)),
            paused: AtomicBool::new(true),
            stays: AtomicBool::new(true),
        }
    }

    fn lock(&self) -> Holding<'_> {
        Holding {
            // What is in it is whole after each statement.
            hold: self.hold.lock().unwrap_or_else(PoisonError::into_inner),
            of: self,
        }
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
        drop(held);
    }
}

/// What holds the machine, locked. Dropped, those that do not take the lock are told, before it is let go of.
struct Holding<'a> {
    hold: MutexGuard<'a, Hold>,
    of: &'a Control,
}

impl Deref for Holding<'_> {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.hold
    }
}

impl DerefMut for Holding<'_> {
    fn deref_mut(&mut self) -> &mut Hold {
        &mut self.hold
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        let (paused, stays) = match &*self.hold {
            Hold::Running | Hold::Ended => (false, false),
            Hold::Paused(_, by) => (true, by.user),
            Hold::HandedOver(..) => (true, true),
        };
        // Relaxed: hints, each of which says all that there is to it.
        self.of.paused.store(paused, Ordering::Relaxed);
        self.of.stays.store(stays, Ordering::Relaxed);
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
        self.pause_for(patience, |by| by.user = true)
    }

    /// Holds the machine at rest for as long as the [`Held`] lives, whoever pauses and resumes it meanwhile.
    ///
    /// # Errors
    /// [`ControlError`]; the guest is what it was.
    pub(crate) fn hold(&self) -> Result<Held<'_>, ControlError> {
        self.pause_for(PATIENCE, |by| by.held += 1)?;
        Ok(Held(self))
    }

    fn pause_for(&self, patience: Duration, by: impl FnOnce(&mut For)) -> Result<(), ControlError> {
        let mut hold = self.control.lock();
        match &mut *hold {
            Hold::Paused(_, whom) => {
                by(whom);
                return Ok(());
            }
            Hold::HandedOver(..) => return Err(ControlError::HandOver),
            Hold::Ended => return Err(ControlError::Ended),
            Hold::Running => {}
        }
        let paused = self.hold_all(patience).map(|pause| {
            let mut whom = For::default();
            by(&mut whom);
            *hold = Hold::Paused(pause, whom);
            self.tell_memory(RunState::Paused);
        });
        drop(hold);
        if paused.is_err() {
            // Input that came meanwhile was told to wait.
            self.wake_input();
        }
        paused
    }

    /// Lets devices and vCPUs go on, as soon as no snapshot is at work with them. A machine that runs stays so: `Ok`. Blocks
    /// for another thread's pause or resume.
    ///
    /// # Errors
    /// [`ControlError::Ended`], [`ControlError::HandOver`].
    pub fn resume(&self) -> Result<(), ControlError> {
        self.resume_for(|by| by.user = false)
    }

    /// Memory that comes later is recorded by the time in which the guest runs.
    fn tell_memory(&self, is: RunState) {
        if let Some(lazy) = self.lazy() {
            lazy.machine_is(is);
        }
    }

    fn resume_for(&self, by: impl FnOnce(&mut For)) -> Result<(), ControlError> {
        let mut hold = self.control.lock();
        match std::mem::take(&mut *hold) {
            Hold::Running => {}
            Hold::Paused(pause, mut whom) => {
                by(&mut whom);
                if !whom.is_nobody() {
                    *hold = Hold::Paused(pause, whom);
                    return Ok(());
                }
                self.parts.virtio.iter().for_each(|device| device.resume());
                drop(pause);
                self.tell_memory(RunState::Running);
            }
            held @ Hold::HandedOver(..) => {
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

    /// Whether it stays paused until somebody resumes it, or ends its hand-over: what a snapshot holds goes on by itself. Does
    /// not block.
    pub(crate) fn stays_paused(&self) -> bool {
        self.control.stays.load(Ordering::Relaxed)
    }

    /// Calls `f` with the pause that holds, which stays for as long; none where the machine is not paused, or is being
    /// handed over to another process. Blocks for another thread's pause or resume, and has those wait.
    pub fn while_paused<T>(&self, f: impl FnOnce(&Pause) -> T) -> Option<T> {
        self.with_hold(|hold| match hold {
            Hold::Paused(pause, _) => Some(f(pause)),
            Hold::HandedOver(..) | Hold::Running | Hold::Ended => None,
        })
    }

    /// Whether it is being handed over, or has been.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.while_handed_over(|_, _| ()).is_some()
    }

    /// [`while_paused`](Self::while_paused), of a machine that is being handed over; and whether it is to arrive paused.
    pub(crate) fn while_handed_over<T>(&self, f: impl FnOnce(&Pause, bool) -> T) -> Option<T> {
        self.with_hold(|hold| match hold {
            Hold::HandedOver(pause, whom) => Some(f(pause, whom.user)),
            Hold::Paused(..) | Hold::Running | Hold::Ended => None,
        })
    }

    fn with_hold<T>(&self, f: impl FnOnce(&Hold) -> Option<T>) -> Option<T> {
        let hold = self.control.lock();
        let done = f(&hold);
        let runs = matches!(&*hold, Hold::Running);
        // Before input is woken: it looks without waiting.
        drop(hold);
        if runs {
            // Input that met this was told to wait, and no resume follows.
            self.wake_input();
        }
        done
    }

    /// Brings the machine to rest, to go on in another process: nobody else pauses or resumes it until
    /// [`end_hand_over`](Self::end_hand_over). One that somebody has paused is paused behind that as well.
    ///
    /// # Errors
    /// [`ControlError`]; the guest is what it was.
    pub(crate) fn hold_for_hand_over(&self) -> Result<(), ControlError> {
        let held = self.hold()?;
        let mut hold = self.control.lock();
        let refused = match std::mem::take(&mut *hold) {
            Hold::Paused(pause, whom @ For { held: 1, .. }) => {
                *hold = Hold::HandedOver(pause, whom);
                // It is the hand-over's now.
                std::mem::forget(held);
                return Ok(());
            }
            Hold::Paused(pause, whom) => {
                *hold = Hold::Paused(pause, whom);
                ControlError::Held
            }
            // Its end.
            other => {
                *hold = other;
                ControlError::Ended
            }
        };
        // Before what it holds is let go of, which locks.
        drop(hold);
        Err(refused)
    }

    /// The other process has handed the machine over: the host's side of its devices learns where they are now, and the
    /// guest goes on, or is `paused` as it was there. Nothing is left to fail but that the machine has been stopped.
    ///
    /// # Errors
    /// [`ControlError::Ended`].
    pub(crate) fn take_over(&self, paused: bool) -> Result<(), ControlError> {
        if let Hold::HandedOver(_, whom) = &mut *self.control.lock() {
            whom.user = paused;
        }
        self.parts
            .virtio
            .iter()
            .for_each(|device| device.announce());
        self.end_hand_over()
    }

    /// It goes on here after all, or stays paused as it was.
    ///
    /// # Errors
    /// [`ControlError::Ended`].
    pub(crate) fn end_hand_over(&self) -> Result<(), ControlError> {
        let mut hold = self.control.lock();
        match std::mem::take(&mut *hold) {
            Hold::HandedOver(pause, whom) => *hold = Hold::Paused(pause, whom),
            Hold::Ended => {
                *hold = Hold::Ended;
                return Err(ControlError::Ended);
            }
            // Nobody hands it over.
            other => {
                *hold = other;
                return Ok(());
            }
        }
        drop(hold);
        self.let_go()
    }

    fn let_go(&self) -> Result<(), ControlError> {
        self.resume_for(|by| by.held = by.held.saturating_sub(1))
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
        let Hold::Paused(pause, _) = &*hold else {
            return false;
        };
        let shown = pause.with_each(|vcpu: &VcpuView<'_, VcpuFd>| show_registers(vcpu));
        if let Err(error) = shown {
            log::warn!("cannot show the registers: {error}");
        }
        true
    }
}

/// A machine that is held at rest. Dropped, it goes on, unless it is paused, or something else holds it.
pub(crate) struct Held<'a>(&'a Running);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Its end may have been told meanwhile, which is no concern of who held it.
        let _ = self.0.let_go();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvm_core::{Identity, VcpuSet};

    use super::*;

    #[test]
    fn who_takes_no_lock_knows_whether_it_is_held_and_whether_that_ends_by_itself() {
        let pause = || VcpuSet::new(Identity::vm("a")).pause().unwrap();
        let control = Control::default();
        let hints = || {
            let hint = |of: &AtomicBool| of.load(Ordering::Relaxed);
            (hint(&control.paused), hint(&control.stays))
        };
        let hold = |hold| *control.lock() = hold;
        assert_eq!(hints(), (false, false));
        hold(Hold::Paused(pause(), For::HELD));
        assert_eq!(hints(), (true, false), "a snapshot has it");
        hold(Hold::Paused(pause(), For::USER));
        assert_eq!(hints(), (true, true));
        let both = For {
            user: true,
            held: 1,
        };
        hold(Hold::Paused(pause(), both));
        assert_eq!(hints(), (true, true));
        hold(Hold::HandedOver(pause(), For::HELD));
        assert_eq!(hints(), (true, true));
        control.close();
        assert_eq!(hints(), (false, false));
        let held = Control::held(pause());
        assert!(held.stays.load(Ordering::Relaxed));
    }
}
