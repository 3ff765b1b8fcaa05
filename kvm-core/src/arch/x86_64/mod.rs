// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! x86-64: CPUID, boot MSRs, MSR filters, boot registers with their tables, local interrupt pins,
//! register dump, guest debugging, translation, machine checks, and whole state.

mod boot;
pub mod cpuid;
mod debug;
mod dump;
mod lapic;
mod machine_check;
mod msr;
pub mod msr_features;
pub mod msr_filter;
pub mod state;
mod tables;
mod translate;

pub use boot::{BootState, initial_fpu};
pub use cpuid::{CpuidError, CpuidPlan, Topology};
pub use debug::{
    Access, BreakpointError, DebugCause, GuestDebug, HARDWARE_SLOTS, HardwareBreakpoint,
    HardwareBreakpoints, Injection, SetGuestDebug, dr6_for_guest,
};
pub use dump::RegisterDump;
pub use lapic::{LocalPin, local_pin, set_virtual_wire};
pub use machine_check::{
    InjectMachineCheck, MachineCheck, McaVendor, MceControls, McgCap, RaiseError, Unheeded,
};
pub use msr::{RefusedMsr, SetMsrs, boot_msrs, set_msrs};
pub use tables::{LongModeTables, TablesError, gdt};
pub use translate::{Translate, pages, translated};
