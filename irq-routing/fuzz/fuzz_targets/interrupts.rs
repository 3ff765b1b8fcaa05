// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as steps on the safe interface, beside naive models: `tests/lockstep/mod.rs`, which
//! `tests/fuzzed.rs` runs without libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/lockstep/mod.rs"]
mod lockstep;
#[path = "../../tests/models/mod.rs"]
mod models;

fuzz_target!(|input: &[u8]| lockstep::run(input));
