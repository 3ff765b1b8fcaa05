// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as a saved state: `tests/states/text.rs`, which `tests/state_fuzzed.rs` runs without libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/states/mod.rs"]
mod states;

fuzz_target!(|input: &[u8]| states::text::run(input));
