// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a vCPU came out of the guest: `kvm_run`, decoded whole.
//!
//! The decoder is a pure function over bytes. It trusts nothing in them, neither a size nor an
//! offset, so a kernel that lies (or a fuzzer) gets an error and not a panic. It decodes string I/O
//! with its count: `rep insb` of four bytes and `in eax` differ here.
//!
//! Layout: `struct kvm_run` of `linux/kvm.h`; meaning: Documentation/virt/kvm/api.rst, section 5.

use kvm_bindings as kvm;
use vm_memory::GuestAddress;

/// Where the part of `kvm_run` begins that a decoder may hold as a slice: behind `immediate_exit`,
/// which other threads write at any time.
pub const EXIT_AREA_START: usize = 8;

/// The least length of an exit area: the header's end, the exit's union and the synchronised
/// registers' masks.
pub const EXIT_AREA_MIN: usize = UNION + UNION_LEN - EXIT_AREA_START;

const UNION: usize = 32;
const UNION_LEN: usize = 256;
const EXIT_REASON: usize = 8;
const FLAGS: usize = 14;

#[cfg(target_arch = "x86_64")]
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(kvm::kvm_run, immediate_exit) == 1);
    assert!(offset_of!(kvm::kvm_run, exit_reason) == EXIT_REASON);
    assert!(offset_of!(kvm::kvm_run, flags) == FLAGS);
    assert!(offset_of!(kvm::kvm_run, __bindgen_anon_1) == UNION);
    assert!(offset_of!(kvm::kvm_run, kvm_valid_regs) == UNION + UNION_LEN);
};

/// An exit to user space, borrowed from the vCPU's `kvm_run`.
///
/// What an exit asks for is answered in place: a read's `data` is filled before the handler returns.
/// It arrives holding what KVM left there, so a handler that has no answer fills it with ones.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit<'a> {
    /// `KVM_EXIT_IO`, in: `data` holds `data.len() / size` items of `size` bytes (1, 2 or 4); more
    /// than one for a string instruction.
    PioIn {
        /// The port.
        port: u16,
        /// Bytes of one item.
        size: u8,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// `KVM_EXIT_IO`, out: as [`Exit::PioIn`], with the data given.
    PioOut {
        /// The port.
        port: u16,
        /// Bytes of one item.
        size: u8,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// `KVM_EXIT_MMIO`, read of 1 to 8 bytes.
    MmioRead {
        /// Guest physical address of the first byte.
        addr: GuestAddress,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// `KVM_EXIT_MMIO`, write of 1 to 8 bytes.
    MmioWrite {
        /// Guest physical address of the first byte.
        addr: GuestAddress,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// `KVM_EXIT_HLT`: the guest halted and no local APIC in the kernel waits for it.
    Hlt,
    /// `KVM_EXIT_SHUTDOWN`: on x86 a triple fault.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`: the hardware refused the guest's state.
    FailEntry {
        /// `hardware_entry_failure_reason`, vendor-specific.
        reason: u64,
        /// The physical CPU it happened on.
        cpu: u32,
    },
    /// `KVM_EXIT_INTERNAL_ERROR`: KVM could not go on (an instruction that it cannot emulate, most
    /// often).
    InternalError(InternalError),
    /// `KVM_EXIT_SYSTEM_EVENT`: shutdown, reset, crash… asked for through the platform's firmware
    /// interface.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_…`.
        kind: u32,
        /// What came with it.
        data: Words,
    },
    /// `KVM_EXIT_IOAPIC_EOI`: split irqchip, end of a level-triggered interrupt.
    IoapicEoi {
        /// The vector that was acknowledged.
        vector: u8,
    },
    /// `KVM_EXIT_IRQ_WINDOW_OPEN`: the guest can take an interrupt now.
    IrqWindowOpen,
    /// `KVM_EXIT_DEBUG`: a breakpoint or single step.
    Debug {
        /// The exception: 1 (#DB) or 3 (#BP).
        exception: u32,
        /// Linear address of the instruction.
        pc: u64,
        /// DR6 as the exception left it.
        dr6: u64,
        /// DR7.
        dr7: u64,
    },
    /// `KVM_EXIT_HYPERCALL` (only those that `KVM_CAP_EXIT_HYPERCALL` was enabled for).
    Hypercall {
        /// Its number, `KVM_HC_…`.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
        /// Bit 0: the guest was in long mode.
        flags: u64,
        /// The result that the guest will see.
        ret: Reply<'a>,
    },
    /// `KVM_EXIT_X86_RDMSR`.
    X86Rdmsr {
        /// The MSR.
        index: u32,
        /// `KVM_MSR_EXIT_REASON_…`.
        reason: u32,
        /// The value, or a general protection fault.
        reply: MsrReply<'a>,
    },
    /// `KVM_EXIT_X86_WRMSR`.
    X86Wrmsr {
        /// The MSR.
        index: u32,
        /// `KVM_MSR_EXIT_REASON_…`.
        reason: u32,
        /// The value that the guest wrote.
        value: u64,
        /// Accepted (as it is), or a general protection fault.
        reply: MsrReply<'a>,
    },
    /// `KVM_EXIT_MEMORY_FAULT`, which accompanies `EFAULT` or `EHWPOISON` of `KVM_RUN`. The run loop
    /// makes a [`MemoryError`](crate::MemoryError) of it.
    MemoryFault {
        /// `KVM_MEMORY_EXIT_FLAG_…`.
        flags: u64,
        /// Guest physical address.
        addr: GuestAddress,
        /// Bytes.
        size: u64,
    },
    /// `KVM_EXIT_DIRTY_RING_FULL`: reap the vCPU's dirty ring before it goes on.
    DirtyRingFull,
    /// `KVM_EXIT_TPR_ACCESS`: `KVM_TPR_ACCESS_REPORTING` is on.
    TprAccess {
        /// Where the access happened.
        rip: u64,
        /// Whether it was a write.
        is_write: bool,
    },
    /// `KVM_EXIT_SET_TPR`: the guest lowered CR8, and the interrupt controller is in user space.
    SetTpr,
    /// `KVM_EXIT_NMI`.
    Nmi,
    /// `KVM_EXIT_INTR`: a signal is pending (`KVM_RUN` says `EINTR` beside it).
    Intr,
    /// `KVM_EXIT_EXCEPTION`.
    Exception {
        /// The exception's vector.
        vector: u32,
        /// Its error code.
        error_code: u32,
    },
    /// `KVM_EXIT_X86_BUS_LOCK`: a bus lock was seen, with the exit enabled.
    X86BusLock,
    /// `KVM_EXIT_NOTIFY`: the guest held the CPU without an interrupt window for too long.
    Notify {
        /// `KVM_NOTIFY_…`; bit 0: the vCPU's context is corrupt.
        flags: u32,
    },
    /// `KVM_EXIT_AP_RESET_HOLD` (SEV-ES).
    ApResetHold,
    /// `KVM_EXIT_UNKNOWN`: KVM has no better name for it.
    Unknown {
        /// The hardware's own exit reason.
        hardware_reason: u64,
    },
    /// Any other reason: Hyper-V, Xen, another architecture (S390, PowerPC, Arm, RISC-V, LoongArch),
    /// or newer than this crate. The exit's union is handed over as it is.
    Other {
        /// `KVM_EXIT_…`.
        reason: u32,
        /// The 256 bytes of `kvm_run`'s union; what is to be answered is answered in it.
        payload: &'a mut [u8],
    },
}

/// Why a `kvm_run` made no sense. The numbers are those found in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The mapping is too short to hold an exit.
    #[error(
        "kvm_run is {len} bytes behind its first {EXIT_AREA_START}, at least {EXIT_AREA_MIN} are needed"
    )]
    TooShort {
        /// Bytes there are.
        len: usize,
    },
    /// A port access of no possible size, count or direction, or with its data outside `kvm_run`.
    #[error(
        "port I/O at {port:#x}: direction {direction}, size {size}, count {count}, data at {data_offset:#x} \
         do not fit a kvm_run of {len:#x} bytes"
    )]
    Pio {
        /// The port.
        port: u16,
        /// 0 in, 1 out.
        direction: u8,
        /// Bytes of an item.
        size: u8,
        /// Items.
        count: u32,
        /// Offset of the data in `kvm_run`.
        data_offset: u64,
        /// Length of the mapping from `kvm_run`'s start.
        len: usize,
    },
    /// An MMIO access that is not of 1 to 8 bytes.
    #[error("MMIO at {addr:#x} of {len} bytes")]
    Mmio {
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// More data words than there is room for.
    #[error("exit {reason} with {ndata} data words, 16 at most fit")]
    Words {
        /// `KVM_EXIT_…`.
        reason: u32,
        /// Words claimed.
        ndata: u32,
    },
}

/// Up to 16 words that came with an exit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Words {
    len: usize,
    words: [u64; 16],
}

impl Words {
    /// The words that are valid.
    #[must_use]
    pub fn as_slice(&self) -> &[u64] {
        self.words.get(..self.len).unwrap_or(&[])
    }
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.as_slice().iter().map(|w| format!("{w:#x}")))
            .finish()
    }
}

/// `KVM_EXIT_INTERNAL_ERROR`, with its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_…`.
    pub suberror: u32,
    /// What came with it.
    pub data: Words,
}

impl InternalError {
    /// The bytes of the instruction that could not be emulated, where KVM tells them
    /// (`KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES`).
    #[must_use]
    pub fn instruction(&self) -> Option<([u8; 15], usize)> {
        let flag = u64::from(kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        let &[flags, first, second, ..] = self.data.as_slice() else {
            return None;
        };
        if self.suberror != kvm::KVM_INTERNAL_ERROR_EMULATION || flags & flag == 0 {
            return None;
        }
        // u8 insn_size, u8 insn_bytes[15], behind the flags.
        let mut sixteen = [0; 16];
        sixteen[..8].copy_from_slice(&first.to_le_bytes());
        sixteen[8..].copy_from_slice(&second.to_le_bytes());
        let [size, bytes @ ..] = sixteen;
        Some((bytes, usize::from(size).min(15)))
    }
}

impl std::fmt::Display for InternalError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.suberror {
            kvm::KVM_INTERNAL_ERROR_EMULATION => "an instruction that KVM cannot emulate",
            kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
            kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while delivering an event",
            kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an unexpected hardware exit",
            _ => "of an unknown kind",
        };
        write!(f, "KVM internal error {}: {what}", self.suberror)?;
        match self.instruction() {
            Some((bytes, len)) => {
                write!(f, ", bytes at its address:")?;
                bytes
                    .iter()
                    .take(len)
                    .try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            None => self
                .data
                .as_slice()
                .iter()
                .try_for_each(|word| write!(f, " {word:#x}")),
        }
    }
}

/// A 64-bit answer to an exit.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply<'a>(&'a mut [u8]);

impl Reply<'_> {
    /// Answers with `value`.
    pub fn set(&mut self, value: u64) {
        put(self.0, 0, &value.to_ne_bytes());
    }

    /// What the answer is so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        u64_at(self.0, 0)
    }
}

/// The answer to a user-space MSR access (`KVM_CAP_X86_USER_SPACE_MSR`). An access that is not answered
/// succeeds: a read returns 0, and what was written is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct MsrReply<'a>(&'a mut [u8]);

impl MsrReply<'_> {
    /// The access succeeds; a read returns `value` (a write ignores it).
    pub fn accept(&mut self, value: u64) {
        put(self.0, 0, &[0]);
        put(self.0, 16, &value.to_ne_bytes());
    }

    /// The guest gets a general protection fault.
    pub fn refuse(&mut self) {
        put(self.0, 0, &[1]);
    }
}

impl Exit<'_> {
    /// Whether KVM still has half of an access to do when user space has answered: it does it at the
    /// next `KVM_RUN`, and until then the registers are those before the access.
    #[must_use]
    pub const fn is_access(&self) -> bool {
        !matches!(
            self,
            Self::Hlt
                | Self::Shutdown
                | Self::FailEntry { .. }
                | Self::InternalError(_)
                | Self::SystemEvent { .. }
                | Self::IoapicEoi { .. }
                | Self::IrqWindowOpen
                | Self::Debug { .. }
                | Self::MemoryFault { .. }
                | Self::DirtyRingFull
                | Self::SetTpr
                | Self::Nmi
                | Self::Intr
                | Self::Exception { .. }
                | Self::X86BusLock
                | Self::Notify { .. }
                | Self::Unknown { .. }
        )
    }

    /// Decodes an exit. `area` is `kvm_run` from its byte [`EXIT_AREA_START`] on, as long as user
    /// space has it to itself: on x86 to the end of the second page, which holds port I/O data.
    ///
    /// # Errors
    /// [`DecodeError`] where what the bytes say is impossible.
    pub fn decode(area: &mut [u8]) -> Result<Exit<'_>, DecodeError> {
        let len = area.len();
        if len < EXIT_AREA_MIN {
            return Err(DecodeError::TooShort { len });
        }
        let reason = u32_at(area, EXIT_REASON - EXIT_AREA_START);
        if reason == kvm::KVM_EXIT_IO {
            return decode_pio(area);
        }
        let start = UNION - EXIT_AREA_START;
        // In range: the area is at least EXIT_AREA_MIN.
        let u = area.get_mut(start..start + UNION_LEN).unwrap_or_default();
        Ok(match reason {
            kvm::KVM_EXIT_UNKNOWN => Exit::Unknown {
                hardware_reason: u64_at(u, 0),
            },
            kvm::KVM_EXIT_EXCEPTION => Exit::Exception {
                vector: u32_at(u, 0),
                error_code: u32_at(u, 4),
            },
            kvm::KVM_EXIT_HYPERCALL => {
                let mut args = [0; 6];
                for (i, arg) in args.iter_mut().enumerate() {
                    *arg = u64_at(u, 8 + 8 * i);
                }
                let (nr, flags) = (u64_at(u, 0), u64_at(u, 64));
                Exit::Hypercall {
                    nr,
                    args,
                    flags,
                    ret: Reply(sub(u, 56, 8)),
                }
            }
            kvm::KVM_EXIT_DEBUG => Exit::Debug {
                exception: u32_at(u, 0),
                pc: u64_at(u, 8),
                dr6: u64_at(u, 16),
                dr7: u64_at(u, 24),
            },
            kvm::KVM_EXIT_HLT => Exit::Hlt,
            kvm::KVM_EXIT_MMIO => {
                let (addr, len, is_write) = (u64_at(u, 0), u32_at(u, 16), u8_at(u, 20) != 0);
                if !(1..=8).contains(&len) {
                    return Err(DecodeError::Mmio { addr, len });
                }
                let addr = GuestAddress(addr);
                let data = sub(u, 8, len as usize);
                if is_write {
                    Exit::MmioWrite { addr, data }
                } else {
                    Exit::MmioRead { addr, data }
                }
            }
            kvm::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::IrqWindowOpen,
            kvm::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kvm::KVM_EXIT_FAIL_ENTRY => Exit::FailEntry {
                reason: u64_at(u, 0),
                cpu: u32_at(u, 8),
            },
            kvm::KVM_EXIT_INTR => Exit::Intr,
            kvm::KVM_EXIT_SET_TPR => Exit::SetTpr,
            kvm::KVM_EXIT_TPR_ACCESS => Exit::TprAccess {
                rip: u64_at(u, 0),
                is_write: u32_at(u, 8) != 0,
            },
            kvm::KVM_EXIT_NMI => Exit::Nmi,
            kvm::KVM_EXIT_INTERNAL_ERROR => Exit::InternalError(InternalError {
                suberror: u32_at(u, 0),
                data: words(reason, u)?,
            }),
            kvm::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent {
                kind: u32_at(u, 0),
                data: words(reason, u)?,
            },
            kvm::KVM_EXIT_IOAPIC_EOI => Exit::IoapicEoi {
                vector: u8_at(u, 0),
            },
            kvm::KVM_EXIT_X86_RDMSR => Exit::X86Rdmsr {
                reason: u32_at(u, 8),
                index: u32_at(u, 12),
                reply: MsrReply(sub(u, 0, 24)),
            },
            kvm::KVM_EXIT_X86_WRMSR => Exit::X86Wrmsr {
                reason: u32_at(u, 8),
                index: u32_at(u, 12),
                value: u64_at(u, 16),
                reply: MsrReply(sub(u, 0, 24)),
            },
            kvm::KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
            kvm::KVM_EXIT_AP_RESET_HOLD => Exit::ApResetHold,
            kvm::KVM_EXIT_X86_BUS_LOCK => Exit::X86BusLock,
            kvm::KVM_EXIT_NOTIFY => Exit::Notify {
                flags: u32_at(u, 0),
            },
            kvm::KVM_EXIT_MEMORY_FAULT => Exit::MemoryFault {
                flags: u64_at(u, 0),
                addr: GuestAddress(u64_at(u, 8)),
                size: u64_at(u, 16),
            },
            reason => Exit::Other { reason, payload: u },
        })
    }
}

fn decode_pio(area: &mut [u8]) -> Result<Exit<'_>, DecodeError> {
    let u = UNION - EXIT_AREA_START;
    let len = area.len() + EXIT_AREA_START;
    let (direction, size, port) = (u8_at(area, u), u8_at(area, u + 1), u16_at(area, u + 2));
    let (count, data_offset) = (u32_at(area, u + 4), u64_at(area, u + 8));
    let error = DecodeError::Pio {
        port,
        direction,
        size,
        count,
        data_offset,
        len,
    };

    // The data lies behind the union (in its own page, on x86), so it never aliases what describes it.
    let first = usize::try_from(data_offset)
        .ok()
        .filter(|offset| *offset >= UNION + UNION_LEN)
        .map(|offset| offset - EXIT_AREA_START)
        .ok_or(error)?;
    let bytes = usize::try_from(count)
        .ok()
        .filter(|count| *count > 0 && matches!(size, 1 | 2 | 4))
        .and_then(|count| count.checked_mul(usize::from(size)))
        .ok_or(error)?;
    let data = first
        .checked_add(bytes)
        .and_then(|end| area.get_mut(first..end))
        .ok_or(error)?;
    match u32::from(direction) {
        kvm::KVM_EXIT_IO_IN => Ok(Exit::PioIn { port, size, data }),
        kvm::KVM_EXIT_IO_OUT => Ok(Exit::PioOut { port, size, data }),
        _ => Err(error),
    }
}

/// `suberror` or `type`, then `ndata`, then the words: the same in both exits that have them.
fn words(reason: u32, u: &[u8]) -> Result<Words, DecodeError> {
    let ndata = u32_at(u, 4);
    let len = usize::try_from(ndata)
        .ok()
        .filter(|len| *len <= 16)
        .ok_or(DecodeError::Words { reason, ndata })?;
    let mut words = [0; 16];
    for (i, word) in words.iter_mut().enumerate().take(len) {
        *word = u64_at(u, 8 + 8 * i);
    }
    Ok(Words { len, words })
}

/// Sets the exit reason to `KVM_EXIT_UNKNOWN`, so that what an older exit left is not taken for a new one.
pub(crate) fn forget(area: &mut [u8]) {
    put(
        area,
        EXIT_REASON - EXIT_AREA_START,
        &kvm::KVM_EXIT_UNKNOWN.to_ne_bytes(),
    );
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    // Callers stay inside the 256 bytes; outside, zeros and no panic.
    let found = at.checked_add(N).and_then(|end| bytes.get(at..end));
    found
        .and_then(|slice| slice.try_into().ok())
        .unwrap_or([0; N])
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    let [byte] = array_at(bytes, at);
    byte
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(array_at(bytes, at))
}

fn sub(bytes: &mut [u8], at: usize, len: usize) -> &mut [u8] {
    bytes.get_mut(at..at + len).unwrap_or_default()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = at
        .checked_add(value.len())
        .and_then(|end| bytes.get_mut(at..end))
    {
        slot.copy_from_slice(value);
    }
}
