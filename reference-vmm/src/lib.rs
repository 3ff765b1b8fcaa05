// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A microVM monitor composed of kvm-core, memslots, io-bus, irq-routing, dirty-log and async-pf

pub mod arch;
