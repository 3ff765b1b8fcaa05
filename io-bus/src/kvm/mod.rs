// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The edge to the kernel: two ioctls and one mapping, each behind its trait, and a port's exit.

mod coalesced;
mod ioeventfd;
#[cfg(target_arch = "x86_64")]
mod pio;

pub use coalesced::MappedRing;
#[cfg(target_arch = "x86_64")]
pub use pio::PioExit;
