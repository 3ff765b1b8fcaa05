// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The edge to the kernel: two ioctls and one mapping, each behind its trait.

mod coalesced;
mod ioeventfd;

pub use coalesced::MappedRing;
