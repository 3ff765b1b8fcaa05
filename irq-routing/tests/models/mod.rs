// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The simplest models of what the crate has, which know nothing of it but its data.

#![allow(dead_code, reason = "each test uses those that it needs")]

pub mod ioapic;
pub mod table;
