// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What of the machine depends on the processor's architecture: where things stand in its address
//! space, how a kernel image is started, and what the firmware tables tell. x86-64 alone for now.
//!
//! All of it is data in and out. [`boot::plan`] and [`acpi::tables`] look at files and numbers and
//! answer with what is to be written where; nothing here touches KVM, and a configuration that
//! cannot work is refused before a VM exists.

pub mod acpi;
pub mod boot;
pub mod layout;
pub mod reset_vector;
