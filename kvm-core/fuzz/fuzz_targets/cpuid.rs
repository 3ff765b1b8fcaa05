// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as a processor model's JSON, or as leaves: `tests/any_cpuid/mod.rs`, which
//! `tests/cpuid_any_input.rs` runs without libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/any_cpuid/mod.rs"]
mod any_cpuid;
#[path = "../../tests/common/leaves.rs"]
mod leaves;

fuzz_target!(|input: &[u8]| any_cpuid::run(input));
