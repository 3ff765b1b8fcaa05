// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any bytes as steps on a bus and its model, which must agree: `cargo +nightly fuzz run bus` in
//! `io-bus/`. The body is `tests/lockstep/`, which `tests/fuzz_bus.rs` runs without libFuzzer.

#![no_main]

#[allow(dead_code, reason = "its other driver makes steps with proptest")]
#[path = "../../tests/lockstep/mod.rs"]
mod lockstep;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lockstep::run_bytes(bytes));
