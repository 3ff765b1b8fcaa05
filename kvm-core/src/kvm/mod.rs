// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The edge to the kernel: all ioctls, and all `unsafe`, of this crate.

#[cfg(target_arch = "x86_64")]
mod debug;
mod mapping;
mod signal;
mod stats;
mod system;
mod vcpu;
mod vm;

pub use signal::{KickSignal, KickSignalError};
pub use stats::StatsFd;
pub use system::{Kvm, OpenError};
pub use vcpu::Vcpu;
pub use vm::{Error, Vm, VmSetup};
