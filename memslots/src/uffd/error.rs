// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why there is no userfaultfd, or none for a range.

use super::{Features, Modes};
use crate::{Errno, Hva, Mechanism, MemoryKind, Unsupported};
use std::ops::Range;
use thiserror::Error;

/// Why no userfaultfd could be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The kernel has none (`CONFIG_USERFAULTFD`).
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    NotThere,
    /// This process may have one for user-mode faults at most, which never hears of KVM's.
    #[error(
        "no userfaultfd that hears of KVM's page faults: run with CAP_SYS_PTRACE, or let this user open \
         /dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1 (the system call: {errno}; the device: {device})"
    )]
    Denied {
        /// What the system call said.
        errno: Errno,
        /// What the device said.
        #[source]
        device: Errno,
    },
    /// A descriptor that was made for user-mode faults alone (`UFFD_USER_MODE_ONLY`): a guest's touch of a missing page
    /// would fail, and not wait.
    #[error(
        "this userfaultfd hears of user-mode faults only, and never of KVM's: open it without UFFD_USER_MODE_ONLY"
    )]
    UserModeOnly,
    /// The kernel lacks something that is required.
    #[error("this kernel's userfaultfd lacks {missing}; it has {available}")]
    Missing {
        /// What.
        missing: Features,
        /// What it has.
        available: Features,
    },
    /// A descriptor that was handed over is something else.
    #[error("the descriptor that was handed over is no userfaultfd but {name}")]
    NoUserfaultfd {
        /// What it is, as `/proc/self/fd` has it.
        name: String,
    },
    /// Any other refusal.
    #[error("{call}: {errno}")]
    Call {
        /// Which call.
        call: &'static str,
        /// What it said.
        #[source]
        errno: Errno,
    },
}

/// Why a range could not be registered. Nothing has changed then.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterError {
    /// No mode was asked for.
    #[error(
        "a registration without a mode: it is for missing pages, minor faults or write-protection"
    )]
    NoMode,
    /// The range is not within the mapping, or empty, or not of whole pages.
    #[error(
        "{start:#x}..{end:#x} is no range of whole pages ({page_size:#x} bytes) of a mapping of {size:#x} bytes at {host}"
    )]
    Range {
        /// Its start, in bytes from the mapping's.
        start: u64,
        /// Its end.
        end: u64,
        /// The mapping's page size.
        page_size: u64,
        /// The mapping's size.
        size: u64,
        /// Its address. Pages are whole in the host: a [part](crate::Backing::part) of a mapping may begin within one.
        host: Hva,
    },
    /// The memory does not have what was asked for.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The memory would have it, and the kernel lacks this feature.
    #[error("{mechanism} on {kind} needs the userfaultfd feature {feature}")]
    Feature {
        /// What was asked for.
        mechanism: Mechanism,
        /// Of what.
        kind: MemoryKind,
        /// What it takes.
        feature: Features,
    },
    /// Asynchronous write-protection was asked for of a synchronous descriptor, or the other way round: a descriptor is
    /// one or the other ([`Features::WP_ASYNC`]).
    #[error("{wanted} of a userfaultfd whose write-protection is the other kind (WP_ASYNC)")]
    Synchrony {
        /// What was asked for.
        wanted: Mechanism,
    },
    /// The userfaultfd is another process's, or is not: it hears of one process's memory only.
    #[error("{}", if *.foreign {
        "the userfaultfd is another process's: memory of this one cannot be registered with it"
    } else {
        "the userfaultfd is this process's own: it hears of no other's memory"
    })]
    Whose {
        /// Whether it is another's.
        foreign: bool,
    },
    /// A range of another process's memory that cannot be.
    #[error("{:#x}..{:#x} of another process is no range of whole pages of {page_size:#x} bytes", range.start, range.end)]
    ForeignRange {
        /// The addresses, there.
        range: Range<usize>,
        /// The size of its pages, in bytes.
        page_size: u64,
    },
    /// A part of it is registered with this userfaultfd already.
    #[error("{:#x}..{:#x} overlaps {:#x}..{:#x}, which is registered", range.start, range.end, with.start, with.end)]
    Overlap {
        /// The addresses asked for.
        range: Range<usize>,
        /// What is there.
        with: Range<usize>,
    },
    /// Another userfaultfd has some of it: borrow that one.
    #[error(
        "{:#x}..{:#x} has another userfaultfd, and memory can have one only: borrow that one's roles",
        range.start, range.end
    )]
    Busy {
        /// The addresses asked for.
        range: Range<usize>,
    },
    /// Any other refusal.
    #[error("UFFDIO_REGISTER of {:#x}..{:#x}: {errno}", range.start, range.end)]
    Refused {
        /// The addresses asked for.
        range: Range<usize>,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
}

/// A role that could not be lent.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LendError {
    /// Someone has it.
    #[error("who {role} {:#x}..{:#x} is somebody else already", range.start, range.end)]
    Lent {
        /// What the role does.
        role: &'static str,
        /// The registration's addresses.
        range: Range<usize>,
    },
    /// The registration has not the mode that it takes.
    #[error(
        "who {role} {:#x}..{:#x} needs one of {wanted:?}, and it is registered for {modes:?}",
        range.start, range.end
    )]
    NoMode {
        /// What the role does.
        role: &'static str,
        /// The registration's addresses.
        range: Range<usize>,
        /// The modes of which it takes one.
        wanted: Modes,
        /// Those that there are.
        modes: Modes,
    },
}
