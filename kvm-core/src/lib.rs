// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A KVM virtual machine, its vCPUs and their lifecycle: run loop, kick, pause, requests
#![deny(unsafe_code)]

pub mod arch;
mod capability;
mod control;
mod exit;
#[cfg(any(test, feature = "test-utilities"))]
pub mod fake;
mod identity;
mod kick;
#[cfg(all(feature = "kvm", not(loom)))]
#[allow(unsafe_code)]
mod kvm;
mod mode;
mod request;
mod run;
mod sync;

pub use capability::{Capabilities, CheckExtension};
pub use control::{ControlError, Pause, VcpuSet};
pub use exit::{
    DecodeError, EXIT_AREA_MIN, EXIT_AREA_START, Exit, InternalError, MsrReply, Reply, Words,
};
pub use identity::{Identity, VcpuId};
pub use kick::Doorbell;
#[cfg(all(feature = "kvm", not(loom)))]
pub use kvm::{Error, KickSignal, KickSignalError, Kvm, OpenError, Vcpu, Vm, VmSetup};
pub use mode::{GuestMode, ModeEvent};
pub use request::{Request, Requests};
pub use run::{ExitHandler, Flow, Halt, HaltReason, RunVcpu, Runner, VcpuView};
pub use vmm_sys_util::errno::Error as Errno;
