// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest debugging as data: breakpoints and watchpoints in the four debug registers, single step, and
//! whose a debug exception was.
//!
//! A debugger outside the guest and the guest itself want the same registers. KVM gives them to the
//! debugger: while any hardware breakpoint is in a [`GuestDebug`], the guest's own DR0 to DR3 and DR7
//! keep their values and do nothing; and while anything is, `#DB` (and, with
//! [`software`](GuestDebug::software), `#BP`) comes to user space, whoever caused it. What was the
//! guest's own is given back to it ([`GuestDebug::cause`], [`Injection`]).
//!
//! Encodings: Intel SDM vol. 3B, 19.2 "Debug registers" (AMD's APM vol. 2, 13.1.1 has the same);
//! flags: Documentation/virt/kvm/api.rst, `KVM_SET_GUEST_DEBUG`.

use std::fmt;

use kvm_bindings as kvm;
use kvm_bindings::kvm_guest_debug;
use vmm_sys_util::errno::Error as Errno;

/// How many debug registers have an address.
pub const HARDWARE_SLOTS: usize = 4;

/// What is always set in DR7 (bit 10), and "exact data breakpoints", which old processors want.
const DR7_BASE: u64 = 1 << 10 | 1 << 9;
/// DR6: a breakpoint's condition was met; bit `n` for slot `n`.
const DR6_SLOTS: u64 = 0xf;
/// DR6: an access to the debug registers with DR7's general-detect bit on.
const DR6_BD: u64 = 1 << 13;
/// DR6: single step.
const DR6_BS: u64 = 1 << 14;
/// DR6: a task switch to a task with its trap bit on.
const DR6_BT: u64 = 1 << 15;

/// The vector of `#BP`.
const BP: u32 = 3;

/// `KVM_SET_GUEST_DEBUG`.
pub trait SetGuestDebug {
    /// Sets the vCPU's debugging as a whole: what is not in `debug` is off.
    ///
    /// # Errors
    /// The errno of the ioctl; `EBUSY` where an exception was to be injected and another is pending.
    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Errno>;
}

/// Which accesses meet a hardware breakpoint's condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The instruction at the address is about to be executed: the exception comes before it.
    Execute,
    /// A write: the exception comes behind the instruction.
    Write,
    /// A read or a write (x86 has no condition of reads alone): as [`Access::Write`].
    ReadWrite,
}

/// Why there is no such hardware breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BreakpointError {
    /// All four slots are taken.
    #[error(
        "the processor has {HARDWARE_SLOTS} debug registers, and all are taken; remove a breakpoint or a watchpoint"
    )]
    Full,
    /// A length that is not 1, 2, 4 or 8.
    #[error("a watchpoint of {len} bytes at {address:#x}: a debug register watches 1, 2, 4 or 8")]
    Length {
        /// Linear address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// An address that is not a multiple of the length.
    #[error("a watchpoint of {len} bytes at {address:#x}: the address must be a multiple of {len}")]
    Misaligned {
        /// Linear address.
        address: u64,
        /// Bytes.
        len: u64,
    },
}

/// One condition of a debug register. Only conditions that a processor can have exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HardwareBreakpoint {
    address: u64,
    /// Bytes, 1 << this.
    log_len: u8,
    access: Access,
}

impl HardwareBreakpoint {
    /// A breakpoint at the instruction that begins at this linear address.
    #[must_use]
    pub const fn execute(address: u64) -> Self {
        Self {
            address,
            log_len: 0,
            access: Access::Execute,
        }
    }

    /// A watchpoint of `len` bytes at a linear address. With [`Access::Execute`] `len` is 1.
    ///
    /// # Errors
    /// [`BreakpointError::Length`], [`BreakpointError::Misaligned`].
    pub const fn new(address: u64, len: u64, access: Access) -> Result<Self, BreakpointError> {
        let log_len = match (len, access) {
            (1, _) => 0,
            (2, Access::Write | Access::ReadWrite) => 1,
            (4, Access::Write | Access::ReadWrite) => 2,
            (8, Access::Write | Access::ReadWrite) => 3,
            _ => return Err(BreakpointError::Length { address, len }),
        };
        if !address.is_multiple_of(len) {
            return Err(BreakpointError::Misaligned { address, len });
        }
        Ok(Self {
            address,
            log_len,
            access,
        })
    }

    /// The fewest watchpoints that together watch exactly the `len` bytes from `address` on, in
    /// ascending order: each as long as alignment and the rest allow. At most
    /// [`HARDWARE_SLOTS`] + 1 of them, for more fit into no processor. Nothing for a length of 0, or
    /// where the bytes would go past the end of the address space.
    pub fn cover(address: u64, len: u64, access: Access) -> impl Iterator<Item = Self> {
        let (mut at, mut left) = match address.checked_add(len.saturating_sub(1)) {
            Some(_) => (address, len),
            None => (address, 0),
        };
        std::iter::from_fn(move || {
            let log_len = (0..=3)
                .rev()
                .find(|log_len| at % (1 << log_len) == 0 && left >= 1 << log_len)?;
            let piece = Self {
                address: at,
                log_len,
                access,
            };
            // The last piece may end where the address space does.
            at = at.wrapping_add(piece.len());
            left -= piece.len();
            Some(piece)
        })
        .take(HARDWARE_SLOTS + 1)
    }

    /// Linear address of the first byte.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        1 << self.log_len
    }

    /// Never: a condition of no bytes does not exist.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Which accesses.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// R/W and LEN of a slot, as the four bits of DR7 that they are.
    const fn condition(&self) -> u64 {
        let access = match self.access {
            Access::Execute => 0b00,
            Access::Write => 0b01,
            Access::ReadWrite => 0b11,
        };
        let len = match self.log_len {
            0 => 0b00,
            1 => 0b01,
            2 => 0b11,
            // Eight bytes: only in processors that have 64-bit mode.
            _ => 0b10,
        };
        len << 2 | access
    }
}

/// The four debug registers with an address, each with its condition or free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardwareBreakpoints([Option<HardwareBreakpoint>; HARDWARE_SLOTS]);

impl HardwareBreakpoints {
    /// Takes the lowest free slot, whose number is returned.
    ///
    /// # Errors
    /// [`BreakpointError::Full`].
    pub fn insert(&mut self, breakpoint: HardwareBreakpoint) -> Result<usize, BreakpointError> {
        let free = self.0.iter_mut().enumerate().find(|(_, s)| s.is_none());
        let (number, slot) = free.ok_or(BreakpointError::Full)?;
        *slot = Some(breakpoint);
        Ok(number)
    }

    /// Frees the first slot with this condition; false if there is none.
    pub fn remove(&mut self, breakpoint: HardwareBreakpoint) -> bool {
        let found = self.0.iter_mut().find(|slot| **slot == Some(breakpoint));
        found.is_some_and(|slot| slot.take().is_some())
    }

    /// What is in slot `number`.
    #[must_use]
    pub fn get(&self, number: usize) -> Option<HardwareBreakpoint> {
        self.0.get(number).copied().flatten()
    }

    /// The slots that are taken, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = (usize, HardwareBreakpoint)> + '_ {
        let taken = |(number, slot): (usize, &Option<_>)| slot.map(|slot| (number, slot));
        self.0.iter().enumerate().filter_map(taken)
    }

    /// Whether no slot is taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// DR0 to DR3.
    #[must_use]
    pub fn addresses(&self) -> [u64; HARDWARE_SLOTS] {
        self.0.map(|slot| slot.map_or(0, |slot| slot.address))
    }

    /// DR7: each slot that is taken is enabled (globally: a task switch does not end it).
    #[must_use]
    pub fn dr7(&self) -> u64 {
        self.iter().fold(DR7_BASE, |dr7, (number, breakpoint)| {
            let enabled = 0b10 << (2 * number);
            dr7 | enabled | breakpoint.condition() << (16 + 4 * number)
        })
    }

    /// The first slot whose condition DR6 says was met. A processor may say so of a slot that is not
    /// enabled, too (SDM 19.2.3); that is none of ours.
    #[must_use]
    pub fn hit(&self, dr6: u64) -> Option<(usize, HardwareBreakpoint)> {
        self.iter().find(|(number, _)| dr6 & 1 << number != 0)
    }
}

/// An exception for the guest, given back to it because it was its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// `#DB`, with DR6 as the exit told it ([`Exit::Debug`](crate::Exit::Debug)).
    Debug {
        /// DR6 of the exit.
        dr6: u64,
    },
    /// `#BP`, of the guest's own `int3`.
    Breakpoint,
}

/// Why a vCPU came out with [`Exit::Debug`](crate::Exit::Debug).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugCause {
    /// A hardware breakpoint or watchpoint of the debugger's.
    Hardware(HardwareBreakpoint),
    /// The single step that was asked for.
    Step,
    /// An `int3`, while software breakpoints are on. Whether the debugger put it there only the
    /// debugger knows; the guest's own is to be given back as [`Injection::Breakpoint`].
    Software,
    /// The guest's own doing: to be given back.
    Guest(Injection),
}

/// The debugging of a vCPU: `KVM_SET_GUEST_DEBUG` as data. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Breakpoints and watchpoints in debug registers. While there is one, the guest's own do nothing.
    pub hardware: HardwareBreakpoints,
    /// `int3` comes out instead of being the guest's `#BP`: for breakpoints that the debugger writes
    /// into guest code. On hosts whose KVM interprets guests, and in real mode on most, it does not
    /// come out; hardware breakpoints do.
    pub software: bool,
    /// Come out behind one instruction. An interrupt that is pending is taken first, so the step ends in
    /// its handler, unless `block_interrupts` is on.
    pub single_step: bool,
    /// No interrupt is injected: a step stays in the code that is stepped through. Only where
    /// [`Capabilities::guest_debug_block_interrupts`](crate::Capabilities::guest_debug_block_interrupts)
    /// says so; elsewhere `EINVAL`.
    pub block_interrupts: bool,
}

impl GuestDebug {
    /// Whether it is the same as none.
    #[must_use]
    pub fn is_off(&self) -> bool {
        !self.software && !self.single_step && !self.block_interrupts && self.hardware.is_empty()
    }

    /// The ioctl's argument.
    #[must_use]
    pub fn to_kvm(&self) -> kvm_guest_debug {
        self.with_control(0)
    }

    /// The ioctl's argument that also injects `injection`, once. DR6 is not part of it: see
    /// [`dr6_for_guest`].
    #[must_use]
    pub fn injecting(&self, injection: Injection) -> kvm_guest_debug {
        self.with_control(match injection {
            Injection::Debug { .. } => kvm::KVM_GUESTDBG_INJECT_DB,
            Injection::Breakpoint => kvm::KVM_GUESTDBG_INJECT_BP,
        })
    }

    fn with_control(&self, more: u32) -> kvm_guest_debug {
        let hardware = !self.hardware.is_empty();
        let control = [
            (self.single_step, kvm::KVM_GUESTDBG_SINGLESTEP),
            (self.software, kvm::KVM_GUESTDBG_USE_SW_BP),
            (hardware, kvm::KVM_GUESTDBG_USE_HW_BP),
            (self.block_interrupts, kvm::KVM_GUESTDBG_BLOCKIRQ),
        ]
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(more, |control, (_, flag)| control | flag);
        let mut debug = kvm_guest_debug::default();
        if !self.is_off() {
            debug.control = control | kvm::KVM_GUESTDBG_ENABLE;
        } else {
            // Without KVM_GUESTDBG_ENABLE KVM turns everything off, and still injects.
            debug.control = control;
        }
        if hardware {
            let [dr0, dr1, dr2, dr3] = self.hardware.addresses();
            debug.arch.debugreg = [dr0, dr1, dr2, dr3, 0, 0, 0, self.hardware.dr7()];
        }
        debug
    }

    /// Whose the exception of an [`Exit::Debug`](crate::Exit::Debug) was, on a vCPU that ran with this.
    /// Where a watchpoint was met by an instruction that was stepped, it is the watchpoint's.
    #[must_use]
    pub fn cause(&self, exception: u32, dr6: u64) -> DebugCause {
        match exception {
            BP if self.software => DebugCause::Software,
            BP => DebugCause::Guest(Injection::Breakpoint),
            // #DB: the exit knows no third.
            _ => match self.hardware.hit(dr6) {
                Some((_, breakpoint)) => DebugCause::Hardware(breakpoint),
                None if self.single_step && dr6 & DR6_BS != 0 => DebugCause::Step,
                None => DebugCause::Guest(Injection::Debug { dr6 }),
            },
        }
    }
}

/// DR6 as the guest is to find it, when an exception that exited with `exit` in DR6 is given back to a
/// guest whose own DR6 is `guest`: what happened is added, and the breakpoints' bits are replaced, as a
/// processor does.
#[must_use]
pub const fn dr6_for_guest(guest: u64, exit: u64) -> u64 {
    (guest & !DR6_SLOTS) | exit & (DR6_SLOTS | DR6_BD | DR6_BS | DR6_BT)
}

impl fmt::Display for HardwareBreakpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.access {
            Access::Execute => return write!(f, "a breakpoint at {:#x}", self.address),
            Access::Write => "writes to",
            Access::ReadWrite => "accesses to",
        };
        write!(f, "{what} {} bytes at {:#x}", self.len(), self.address)
    }
}
