// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's own statistics of a VM and of a vCPU: exits, page faults, halts, large pages and the rest
//! (`KVM_GET_STATS_FD`, api.rst 4.133; Linux 5.14).
//!
//! KVM hands out a file for each VM and each vCPU. It says itself what is in it, so a program knows the
//! names, kinds and units of statistics that were not there when it was built. The description never
//! changes while the file is open: it is read and checked once, and a sample is one read of the numbers.
//!
//! ```text
//!   Vm::stats, Vcpu::stats
//!          │  read once                                      each sample: one pread
//!          ▼                                                           ▼
//!   ┌──────────┬───────────────┬─────────────────────────────┬────────────────────┐
//!   │ header   │ id: kvm-812/  │ descriptors: name, kind,    │ data: u64s         │
//!   │ 24 bytes │ vcpu-0        │ unit, exponent, offset …    │                    │
//!   └──────────┴───────────────┴─────────────────────────────┴────────────────────┘
//!          └──────── StatsSchema of Statistic ───────┘           Sample of Value
//! ```
//!
//! # Example
//!
//! What a vCPU did between two moments, here of a fake; with `/dev/kvm` the reader comes from
//! [`Vcpu::stats`](crate::Vcpu::stats) or [`Vm::stats`](crate::Vm::stats), before the vCPU is enrolled.
//!
//! ```
//! use kvm_core::fake::{FakeStat, FakeStats};
//! use kvm_core::stats::StatsReader;
//!
//! let vcpu = FakeStats::new("kvm-1/vcpu-0", [FakeStat::counter("exits", 5)]);
//! let mut reader = StatsReader::open(&vcpu)?;
//! let mut before = reader.latest().clone();
//!
//! vcpu.set("exits", &[12]);
//! let now = reader.sample()?;
//! for change in now.since(&before)?.iter() {
//!     println!("{}: {}", change.statistic().name(), change.number().unwrap_or(0));
//!     # assert_eq!(change.number(), Some(7));
//! }
//! before.clone_from(now); // For the next round; allocates nothing.
//! # Ok::<(), kvm_core::stats::StatsError>(())
//! ```
//!
//! # Concurrency
//!
//! A reader is `Send`: it is sampled from any thread, with the vCPU in the guest or not, and the vCPU
//! takes no notice. A sample makes one system call, takes no lock and allocates nothing; it neither
//! blocks nor needs a pause. KVM counts on while it copies: two numbers of one sample need not be of the
//! same moment, so a sum of parts may differ from its total by what happened meanwhile.
//!
//! Opening is another matter: KVM takes the vCPU's mutex for it, which `KVM_RUN` holds. The types have
//! this in order, as a [`Vcpu`](crate::Vcpu) that runs is its [`Runner`](crate::Runner)'s.
//!
//! # What KVM is trusted with
//!
//! With nothing but its numbers. Offsets, sizes and names are checked; what does not fit is a
//! [`StatsError`], never a panic, and no length that the file claims makes an allocation of more than
//! [`StatsSchema::LIMIT`] bytes and what a parsed form of these takes. A kind, unit or base that this
//! crate does not know is kept as its number.

#[cfg(any(test, feature = "test-utilities"))]
pub(crate) mod fake;
mod reader;
mod sample;
mod schema;

use std::fmt;

use vmm_sys_util::errno::Error as Errno;

#[cfg(all(feature = "kvm", not(loom)))]
pub use crate::kvm::StatsFd;
pub use reader::StatsReader;
pub use sample::{Bucket, Change, Changes, Sample, Value};
pub use schema::{Base, Kind, Scale, Scaled, Statistic, StatsSchema, Unit};

/// What has statistics: `KVM_GET_STATS_FD`. Implemented for [`Vm`](crate::Vm) and
/// [`Vcpu`](crate::Vcpu).
pub trait GetStats {
    /// The file that KVM hands out.
    type File: ReadStats;

    /// `KVM_GET_STATS_FD`.
    ///
    /// # Errors
    /// The errno of the ioctl; no file is left open.
    fn get_stats_fd(&self) -> Result<Self::File, Errno>;
}

/// The file of statistics: `pread`.
pub trait ReadStats {
    /// Reads from `offset` (in bytes) into `buf`; how many bytes there were is returned, fewer at the
    /// file's end.
    ///
    /// # Errors
    /// The errno of the call.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, Errno>;
}

/// A part of the file of statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StatsPart {
    /// `struct kvm_stats_header`.
    Header,
    /// The name of what the statistics are of.
    Id,
    /// The `struct kvm_stats_desc`s.
    Descriptors,
    /// The numbers.
    Data,
}

impl fmt::Display for StatsPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Id => "id",
            Self::Descriptors => "descriptors",
            Self::Data => "data",
        })
    }
}

/// Why there are no statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StatsError {
    /// The host has no `KVM_GET_STATS_FD`; [`Capabilities::binary_stats`](crate::Capabilities::binary_stats)
    /// says so beforehand.
    #[error("this host's KVM has no binary statistics (KVM_CAP_BINARY_STATS_FD, Linux 5.14)")]
    Unsupported,
    /// `KVM_GET_STATS_FD`.
    #[error("KVM opens no file of statistics: {errno}")]
    Open {
        /// What KVM said; `EMFILE` where the process has no file descriptor left.
        errno: Errno,
    },
    /// A read failed.
    #[error("the {part} of KVM's statistics cannot be read: {errno}")]
    Read {
        /// What was read.
        part: StatsPart,
        /// What the system said.
        errno: Errno,
    },
    /// The file ends before it should by its own description.
    #[error("the {part} of KVM's statistics should have {wanted} bytes and has {got}")]
    Truncated {
        /// What was read.
        part: StatsPart,
        /// Its bytes by the file's own description.
        wanted: usize,
        /// The bytes that were there.
        got: usize,
    },
    /// The file claims more bytes than it can have in earnest.
    #[error(
        "the {part} of KVM's statistics claim {bytes} bytes, more than {}",
        StatsSchema::LIMIT
    )]
    TooLarge {
        /// Of what.
        part: StatsPart,
        /// The bytes claimed.
        bytes: u64,
    },
    /// Two samples have different statistics (of a VM and a vCPU, for example).
    #[error("the two samples are not of the same statistics")]
    OtherStatistics,
}
