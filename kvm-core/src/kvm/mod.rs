// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The edge to the kernel: all ioctls, and all `unsafe`, of this crate.

mod bus_error;
#[cfg(target_arch = "x86_64")]
mod debug;
mod device;
#[cfg(target_arch = "x86_64")]
mod machine_check;
mod mapping;
#[cfg(target_arch = "x86_64")]
mod msr;
mod pre_fault;
mod signal;
#[cfg(target_arch = "x86_64")]
mod state;
mod stats;
mod system;
mod vcpu;
mod vm;

pub use bus_error::{BusErrors, BusErrorsError, Otherwise, Watched};
pub use device::{
    CreateDevice, Device, DeviceAttributes, DeviceFd, RefusedFile, VfioDevice, VfioFile,
};
pub use signal::{KickSignal, KickSignalError};
#[cfg(target_arch = "x86_64")]
pub use state::ListedHost;
pub use stats::StatsFd;
pub use system::{Kvm, OpenError};
pub use vcpu::Vcpu;
pub use vm::{Error, Vm, VmSetup};
