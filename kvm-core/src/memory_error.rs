// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that the host cannot give: told apart from an access to a device.
//!
//! [`MemoryError`] says in which ways that comes to be known, and what the consumer has to do for it.

use std::fmt;

use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

const EHWPOISON: i32 = 133;

/// An address of this process, where guest memory is mapped (an hva).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress(pub usize);

impl fmt::LowerHex for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A part of guest memory that the host cannot give a vCPU.
///
/// A page of guest memory can be lost to the guest: its DRAM has an uncorrectable error, its file was
/// truncated behind the mapping, or what was to bring it in (a pager, a `guest_memfd` conversion) has
/// failed. KVM has no one way to say so, and this is where the ways meet:
///
/// | what the run loop sees | who says so |
/// | --- | --- |
/// | an MMIO exit at an address inside a memory slot | some hosts' KVM, for a poisoned or an unserved page |
/// | `KVM_EXIT_MEMORY_FAULT` beside `EFAULT` or `EHWPOISON` | KVM since 6.8, of private memory and of a `guest_memfd` |
/// | `EFAULT` or `EHWPOISON` alone | KVM, of a page of this process's that cannot be had |
/// | `SIGBUS` while the thread is in `KVM_RUN` | hardware KVM, for a page with a hardware error |
/// | `SIGBUS` while a handler touches guest memory | the kernel, for either and for a truncated file |
///
/// None of them is an access that a bus could answer, and an answer of all ones would be data that the
/// guest's memory never held. So none comes to [`ExitHandler::exit`](crate::ExitHandler::exit): each is
/// a `MemoryError` for [`ExitHandler::memory_error`](crate::ExitHandler::memory_error), whose
/// [`Remedy`] is the consumer's choice. Without one the vCPU halts with
/// [`HaltReason::MemoryError`](crate::HaltReason::MemoryError).
///
/// A real `KVM_EXIT_MEMORY_FAULT` has not been seen here: 6.12's `kvm_amd` says `EFAULT` alone for a slot that may not be
/// touched (`PROT_NONE`) or whose file was truncated, and gives private memory to VMs of types that need other hardware or
/// another kernel configuration; a KVM that interprets the guest answers with an MMIO exit, of a `guest_memfd` too. So that row
/// is tried with the fake alone, and `tests/kvm_memory_errors.rs` holds a KVM that gives one to its address, size and flags.
///
/// Two rows need the consumer's help, and are found only with it: which guest addresses are memory
/// ([`ExitHandler::is_memory`](crate::ExitHandler::is_memory)), and the process's `SIGBUS`
/// ([`BusErrors::install`](crate::BusErrors::install)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryError {
    /// Where, as the guest knows it; `None` where KVM did not say, or where
    /// [`ExitHandler::guest_address`](crate::ExitHandler::guest_address) knew of none.
    pub address: Option<GuestAddress>,
    /// What is the matter with it, as far as the host said.
    pub kind: MemoryErrorKind,
    /// How it came to be known.
    pub source: MemoryErrorSource,
}

/// What is the matter with a part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryErrorKind {
    /// The host's page is poisoned: a hardware error, or a userfaultfd's `UFFDIO_POISON`.
    Poisoned,
    /// There is nothing behind the mapping: its file ends before it.
    Missing,
    /// The host did not bring it, and did not say why.
    Unserved,
}

/// How a [`MemoryError`] came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryErrorSource {
    /// An MMIO exit inside a memory slot. What the guest's instruction does is lost: a read gets zeros.
    Mmio {
        /// Whether the guest wrote.
        write: bool,
        /// Bytes.
        len: u8,
    },
    /// `KVM_EXIT_MEMORY_FAULT`. The guest's instruction has not run.
    Fault {
        /// `KVM_MEMORY_EXIT_FLAG_…`. With a `guest_memfd` a fault is how KVM asks for a conversion
        /// between private and shared.
        flags: u64,
        /// Bytes.
        size: u64,
        /// What `KVM_RUN` said beside it.
        errno: Option<Errno>,
    },
    /// `KVM_RUN` failed and said no more. The guest's instruction has not run.
    Run(Errno),
    /// `SIGBUS` on the vCPU's thread.
    Signal(BusError),
}

/// A `SIGBUS`, as its handler found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusError {
    /// `si_addr`.
    pub address: HostAddress,
    /// `si_code`.
    pub code: BusErrorCode,
    /// Bytes that are lost, from an address aligned to as many (`si_addr_lsb`); a page where the
    /// kernel does not say.
    pub bytes: usize,
    /// Where the thread was.
    pub during: During,
}

/// `si_code` of a `SIGBUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BusErrorCode {
    /// `BUS_MCEERR_AR`: a hardware memory error that the thread has run into.
    ActionRequired,
    /// `BUS_MCEERR_AO`: a hardware memory error that nobody has run into yet. The kernel tells early
    /// only who asked for it: a thread by `prctl(PR_MCE_KILL)`, or the host's administrator for all
    /// processes by the sysctl `vm.memory_failure_early_kill`, which goes to the main thread. On a thread
    /// that is no vCPU's it goes where `SIGBUS` went before.
    ActionOptional,
    /// `BUS_ADRERR`: no memory behind the mapping.
    NoSuchAddress,
    /// Another.
    Other(i32),
}

/// Where a vCPU's thread was when `SIGBUS` came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum During {
    /// In `KVM_RUN`. The guest's instruction has not run: it is tried again at the next entry.
    KvmRun,
    /// In the handler's own code, or what a pause asked of the vCPU's thread, that touched guest memory. It
    /// went on with zeros: the lost page was replaced, and what it did with them is the consumer's.
    Handler,
}

impl MemoryError {
    /// An MMIO exit inside a memory slot.
    pub(crate) fn mmio(address: GuestAddress, write: bool, len: usize) -> Self {
        Self {
            address: Some(address),
            kind: MemoryErrorKind::Unserved,
            source: MemoryErrorSource::Mmio {
                write,
                // 8 at most.
                len: len as u8,
            },
        }
    }

    /// `KVM_EXIT_MEMORY_FAULT`.
    pub(crate) fn fault(
        address: GuestAddress,
        flags: u64,
        size: u64,
        errno: Option<Errno>,
    ) -> Self {
        Self {
            address: Some(address),
            kind: errno.map_or(MemoryErrorKind::Unserved, kind_of),
            source: MemoryErrorSource::Fault { flags, size, errno },
        }
    }

    /// `EFAULT` or `EHWPOISON`.
    pub(crate) fn run(errno: Errno) -> Self {
        Self {
            address: None,
            kind: kind_of(errno),
            source: MemoryErrorSource::Run(errno),
        }
    }

    /// `SIGBUS`, at what the consumer says is this guest address.
    pub(crate) fn signal(error: BusError, address: Option<GuestAddress>) -> Self {
        Self {
            address,
            kind: match error.code {
                BusErrorCode::ActionRequired | BusErrorCode::ActionOptional => {
                    MemoryErrorKind::Poisoned
                }
                BusErrorCode::NoSuchAddress => MemoryErrorKind::Missing,
                BusErrorCode::Other(_) => MemoryErrorKind::Unserved,
            },
            source: MemoryErrorSource::Signal(error),
        }
    }

    /// Whether the guest's state is what it was before the access, so that it can be told and go on: of
    /// an MMIO exit the access is over, and of a handler's own access nobody knows.
    #[must_use]
    pub const fn is_restartable(&self) -> bool {
        matches!(
            self.source,
            MemoryErrorSource::Fault { .. }
                | MemoryErrorSource::Run(_)
                | MemoryErrorSource::Signal(BusError {
                    during: During::KvmRun,
                    ..
                })
        ) || self.is_optional()
    }

    /// Whether the guest wanted it as private memory, of a `guest_memfd`, or as shared, of this process;
    /// `None` where KVM did not say. A guest that can have both asks so for a conversion
    /// (`KVM_SET_MEMORY_ATTRIBUTES`), after which it may run on: the memory is not lost then.
    #[must_use]
    pub fn wants_private(&self) -> Option<bool> {
        match self.source {
            MemoryErrorSource::Fault { flags, .. } => Some(is_private(flags)),
            _ => None,
        }
    }

    /// Whether nobody has run into it yet (`BUS_MCEERR_AO`).
    #[must_use]
    pub const fn is_optional(&self) -> bool {
        matches!(
            self.source,
            MemoryErrorSource::Signal(BusError {
                code: BusErrorCode::ActionOptional,
                ..
            })
        )
    }
}

/// `KVM_MEMORY_EXIT_FLAG_PRIVATE` of a fault's flags.
fn is_private(flags: u64) -> bool {
    flags & u64::from(kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0
}

fn kind_of(errno: Errno) -> MemoryErrorKind {
    match errno.errno() {
        EHWPOISON => MemoryErrorKind::Poisoned,
        _ => MemoryErrorKind::Unserved,
    }
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("memory error: the host cannot give the guest its memory")?;
        if let Some(GuestAddress(address)) = self.address {
            write!(f, " at {address:#x}")?;
        }
        f.write_str(match self.kind {
            MemoryErrorKind::Poisoned => ", the page is poisoned",
            MemoryErrorKind::Missing => ", there is nothing behind its mapping (a truncated file?)",
            MemoryErrorKind::Unserved => "",
        })?;
        match self.source {
            MemoryErrorSource::Mmio { write, len } => {
                let what = if write { "a write" } else { "a read" };
                write!(f, " ({what} of {len} bytes came out as MMIO)")
            }
            MemoryErrorSource::Fault { flags, size, errno } => {
                let what = match is_private(flags) {
                    true => "private",
                    false => "shared",
                };
                write!(f, " ({size} bytes, asked for as {what}, flags {flags:#x}")?;
                errno.map_or(Ok(()), |errno| write!(f, ", KVM_RUN: {errno}"))?;
                f.write_str(")")
            }
            MemoryErrorSource::Run(errno) => write!(f, " (KVM_RUN: {errno})"),
            MemoryErrorSource::Signal(error) => {
                let during = match error.during {
                    During::KvmRun => "in KVM_RUN",
                    During::Handler => "in the monitor",
                };
                write!(
                    f,
                    " (SIGBUS {during} at host address {:#x}, {} bytes)",
                    error.address, error.bytes
                )
            }
        }
    }
}

/// What becomes of a vCPU after a [`MemoryError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Remedy<S> {
    /// Run on: the memory is there now, or the guest was told (a machine check). A remedy that mends
    /// nothing makes the guest run into it again.
    RunOn,
    /// Halt this vCPU with [`HaltReason::MemoryError`](crate::HaltReason::MemoryError).
    Halt,
    /// Halt this vCPU with a value of the consumer's.
    Stop(S),
}
