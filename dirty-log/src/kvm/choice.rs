// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a VM logs what its guest writes: chosen for all of its slots, and said back.
//!
//! The dirty ring is an option that is fixed when the VM is made: it comes before the first vCPU, and with
//! it KVM answers `ENXIO` to whoever asks for the bitmap (x86). So a VMM chooses between ring and bitmap in
//! its creation stage (kvm-core's `VmSetup::fd`).
//!
//! Manual protect is the VM's as well, and KVM takes it at any time, and anew with other flags: a look heeds
//! it from the next call on, *initially set* a slot that begins to log from then on. So a VMM may choose
//! whenever tracking starts, before its slots log, and make the source that what comes back names.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use crate::Error;
use crate::ring::{ENTRY_BYTES, RingSize};

/// What the choice needs of a VM: `KVM_CHECK_EXTENSION` and `KVM_ENABLE_CAP` on its descriptor.
pub trait ChooseLog {
    /// The answer for a capability; 0 or negative is no.
    fn capability(&self, capability: u32) -> i32;

    /// Enables one.
    ///
    /// # Errors
    /// The errno; nothing is changed then.
    fn enable(&self, capability: u32, argument: u64) -> io::Result<()>;
}

impl ChooseLog for VmFd {
    fn capability(&self, capability: u32) -> i32 {
        self.check_extension_raw(u64::from(capability))
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        let request = kvm_enable_cap {
            cap: capability,
            args: [argument, 0, 0, 0],
            ..Default::default()
        };
        self.enable_cap(&request)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
    }
}

impl<T: ChooseLog + ?Sized> ChooseLog for &T {
    fn capability(&self, capability: u32) -> i32 {
        (**self).capability(capability)
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        (**self).enable(capability, argument)
    }
}

impl<T: ChooseLog + ?Sized> ChooseLog for Arc<T> {
    fn capability(&self, capability: u32) -> i32 {
        (**self).capability(capability)
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        (**self).enable(capability, argument)
    }
}

/// How a VM is asked to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LogChoice {
    /// The plain bitmap: enables nothing, works everywhere. Nor does it end a manual protect that the VM
    /// was asked for before.
    #[default]
    Bitmap,
    /// The bitmap with manual protect.
    ManualProtect {
        /// A slot begins to log with every page dirty and none protected.
        initially_set: bool,
    },
    /// Manual protect, with `initially_set` if the host has that too; the plain bitmap where it has
    /// neither.
    BestBitmap {
        /// Wanted, where there is one.
        initially_set: bool,
    },
    /// A dirty ring for each vCPU.
    Ring(RingSize),
}

/// How a VM logs, which decides the source that can be made for its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LogInForce {
    /// [`KvmBitmap`](crate::KvmBitmap).
    Bitmap,
    /// [`KvmManualBitmap`](crate::KvmManualBitmap).
    ManualProtect {
        /// As in [`LogChoice::ManualProtect`].
        initially_set: bool,
    },
    /// [`DirtyRings`](crate::DirtyRings); the bitmap's calls answer `ENXIO`.
    Ring(RingSize),
}

impl LogChoice {
    /// Asks the VM for it: a ring before its first vCPU, manual protect whenever no slot logs (KVM takes it
    /// while some do: a [`KvmBitmap`](crate::KvmBitmap) then finds the same pages again each time). One or two
    /// system calls, none of which blocks.
    ///
    /// ```no_run
    /// use dirty_log::{LogChoice, LogInForce, RingSize};
    /// let vm = kvm_ioctls::Kvm::new()?.create_vm()?; // or kvm-core's VmSetup::fd()
    /// let log = LogChoice::Ring(RingSize::new(4096)?).apply(&vm)?;
    /// assert!(matches!(log, LogInForce::Ring(size) if size.entries() == 4096));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NoManualProtect`], [`Error::RingTooLarge`]: this host has it not, and nothing was
    /// changed. [`Error::Enable`]: KVM refused (after the first vCPU, or a second ring), and nothing was
    /// changed.
    pub fn apply<H: ChooseLog>(self, host: &H) -> Result<LogInForce, Error> {
        match self {
            Self::Bitmap => Ok(LogInForce::Bitmap),
            Self::ManualProtect { initially_set } => {
                let (wanted, has) = (manual_flags(initially_set), manual_flags_of(host));
                if wanted & !has != 0 {
                    return Err(Error::NoManualProtect { wanted, has });
                }
                manual(host, initially_set)
            }
            Self::BestBitmap { initially_set } => {
                let has = manual_flags_of(host);
                if has & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
                    return Ok(LogInForce::Bitmap);
                }
                manual(
                    host,
                    initially_set && has & KVM_DIRTY_LOG_INITIALLY_SET != 0,
                )
            }
            Self::Ring(size) => ring(host, size),
        }
    }
}

const fn manual_flags(initially_set: bool) -> u32 {
    let set = if initially_set {
        KVM_DIRTY_LOG_INITIALLY_SET
    } else {
        0
    };
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | set
}

/// The capability's value is the flags that the host has.
fn manual_flags_of<H: ChooseLog>(host: &H) -> u32 {
    u32::try_from(host.capability(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)).unwrap_or(0)
}

fn manual<H: ChooseLog>(host: &H, initially_set: bool) -> Result<LogInForce, Error> {
    host.enable(
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        u64::from(manual_flags(initially_set)),
    )
    .map_err(|source| Error::Enable {
        what: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        source,
    })?;
    Ok(LogInForce::ManualProtect { initially_set })
}

fn ring<H: ChooseLog>(host: &H, size: RingSize) -> Result<LogInForce, Error> {
    // The older one promises its order on x86 (TSO) alone, and there it is the same.
    let flavours = [
        (
            KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
            "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
            true,
        ),
        (
            KVM_CAP_DIRTY_LOG_RING,
            "KVM_CAP_DIRTY_LOG_RING",
            cfg!(target_arch = "x86_64"),
        ),
    ];
    let mut most = 0;
    for (capability, what, usable) in flavours {
        let bytes = u32::try_from(host.capability(capability)).unwrap_or(0);
        if !usable || bytes == 0 {
            continue;
        }
        most = bytes / ENTRY_BYTES;
        if size.entries() > most {
            continue;
        }
        return host
            .enable(capability, u64::from(size.bytes()))
            .map(|()| LogInForce::Ring(size))
            .map_err(|source| Error::Enable { what, source });
    }
    Err(Error::RingTooLarge {
        entries: size.entries(),
        most,
    })
}
