// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a processor must look like to a guest, as data: CPUID, MSRs, registers, tables. Pure; the
//! bytes and structures made here are written by the caller. One module per architecture.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
