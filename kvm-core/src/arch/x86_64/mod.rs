// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! x86-64: CPUID, boot MSRs, boot registers with their tables, local interrupt pins, register dump, guest
//! debugging, translation.

mod boot;
mod cpuid;
mod debug;
mod dump;
mod lapic;
mod msr;
mod tables;
mod translate;

pub use boot::{BootState, initial_fpu};
pub use cpuid::{CpuidError, CpuidPlan};
pub use debug::{
    Access, BreakpointError, DebugCause, GuestDebug, HARDWARE_SLOTS, HardwareBreakpoint,
    HardwareBreakpoints, Injection, SetGuestDebug, dr6_for_guest,
};
pub use dump::RegisterDump;
pub use lapic::{LocalPin, local_pin, set_virtual_wire};
pub use msr::{RefusedMsr, SetMsrs, boot_msrs, set_msrs};
pub use tables::{LongModeTables, TablesError, gdt};
pub use translate::{Translate, pages, translated};
