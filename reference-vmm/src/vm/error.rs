// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a VM could not be built or started.

use std::io;

use irq_routing::IrqchipError;
use kvm_core::arch::x86_64::cpuid::TemplateError;
use kvm_core::arch::x86_64::{CpuidError, TablesError};

use crate::api;
use crate::arch::acpi;
use crate::arch::boot::BootError;
use crate::config;
use crate::devices::virtio::list::DeviceError;
use crate::gdb;
use crate::migration::incoming::IncomingError;
use crate::snapshot::RestoreError;

/// A VM could not be built or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel, an initrd or the command line cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM does not log the guest's writes as `--dirty-log` asks.
    #[error("--dirty-log: {0}")]
    DirtyLog(#[source] dirty_log::Error),
    /// Memory does not fit into the machine's address space.
    #[error(transparent)]
    Layout(#[from] memslots::LayoutError),
    /// The machine cannot be described to the guest.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// The page tables to start with cannot be made.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// A vCPU cannot be told what it is.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The debug-exit ports lie over another device.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The KVM device cannot be used.
    #[error(transparent)]
    Open(#[from] kvm_core::OpenError),
    /// KVM refused to make the VM or a vCPU.
    #[error(transparent)]
    Kvm(#[from] kvm_core::Error),
    /// KVM does not say what it knows of machine checks.
    #[error("KVM_X86_GET_MCE_CAP_SUPPORTED failed: {0}")]
    MachineChecks(kvm_core::Errno),
    /// This host has not the memory that was asked for: no such huge pages, or not enough of them, or
    /// no such NUMA node. Found before anything was made.
    #[error("this host has no such memory for the guest")]
    HostMemory(#[source] memslots::MapError),
    /// Guest memory could not be made.
    #[error("cannot make the guest's memory")]
    Memory(#[from] memslots::Error),
    /// Not all of guest memory could be made present.
    #[error("cannot make the guest's memory present")]
    Prefault(#[source] memslots::MapError),
    /// A snapshot cannot be gone on from.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// No guest has come from another process.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// The end was told while the machine was built.
    #[error("the machine was ended before it was built")]
    Ended,
    /// The guest's memory would end above what the host's processor can address. Found before anything
    /// was made.
    #[error(
        "{given} bytes of memory would end at {end:#x}, and a guest of this host has {bits} address bits: \
         they end at {:#x}", 1u128 << bits
    )]
    AddressBits {
        /// The memory asked for.
        given: u64,
        /// Its end, with the hole below 4 GiB.
        end: u64,
        /// Width of guest physical addresses on this host.
        bits: u32,
    },
    /// More vCPUs than the host's KVM takes. Found before anything was made.
    #[error("{asked} vCPUs: this host's KVM takes at most {most}")]
    Cpus {
        /// Configured.
        asked: u32,
        /// `KVM_CAP_MAX_VCPUS`.
        most: u32,
    },
    /// An APIC id beyond those that the host's KVM takes. Found before anything was made.
    #[error("APIC id {highest}: this host's KVM takes numbers up to {most}")]
    ApicId {
        /// The topology's highest.
        highest: u32,
        /// `KVM_CAP_MAX_VCPU_ID`, less one.
        most: u32,
    },
    /// The host cannot be the processor that was asked for. Found before anything was made.
    #[error(transparent)]
    CpuModel(#[from] TemplateError),
    /// The interrupt controllers could not be made.
    #[error(transparent)]
    Irqchip(#[from] IrqchipError),
    /// The host's KVM has no local APICs without the rest.
    #[error("{0}; --irqchip kernel does without")]
    NoSplitIrqchip(IrqchipError),
    /// An interrupt could not be had.
    #[error("no interrupt for {device}")]
    Interrupt {
        /// The device.
        device: &'static str,
        /// Why.
        source: irq_routing::Error,
    },
    /// A device could not be put on the bus.
    #[error("cannot register {device}")]
    Bus {
        /// The device.
        device: &'static str,
        /// Why.
        source: io_bus::Error,
    },
    /// A virtio device cannot be had. Found before anything was made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The control socket cannot be listened at.
    #[error(transparent)]
    Api(#[from] api::ListenError),
    /// A debugger cannot be listened for.
    #[error(transparent)]
    Gdb(#[from] gdb::ListenError),
    /// A vCPU is in the set already; two vCPUs with one number.
    #[error(transparent)]
    Control(#[from] kvm_core::ControlError),
    /// A system call of the monitor's own process failed.
    #[error("cannot {what}: {source}")]
    Process {
        /// What it was for.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl BuildError {
    /// The process's exit status: 2 what the user asked for cannot be, 1 the host refused.
    pub fn exit_status(&self) -> u8 {
        use memslots::MapError;
        match self {
            // Of the kernel's or initrd's file nothing is known yet: this process may open no more.
            BuildError::Boot(BootError::Open { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
            {
                1
            }
            // Any other error of the host's memory is an errno: the host refused.
            BuildError::HostMemory(
                MapError::NoHugePageSize { .. }
                | MapError::NoHugePages { .. }
                | MapError::NoSuchNode { .. },
            ) => 2,
            BuildError::Gdb(gdb::ListenError::Refused {
                address: gdb::Address::Unix(_),
                source,
            }) if config::is_about_the_path(source) => 2,
            BuildError::Restore(error) => error.exit_status(),
            BuildError::Incoming(error) => error.exit_status(),
            BuildError::Api(error) if error.is_users_fault() => 2,
            BuildError::Device(error) if !error.is_users_fault() => 1,
            BuildError::Device(_)
            | BuildError::AddressBits { .. }
            | BuildError::Cpus { .. }
            | BuildError::ApicId { .. }
            | BuildError::CpuModel(_)
            | BuildError::Boot(_)
            | BuildError::Layout(_)
            | BuildError::Gdb(gdb::ListenError::Occupied { .. })
            | BuildError::Config(_)
            | BuildError::Acpi(_) => 2,
            _ => 1,
        }
    }
}
