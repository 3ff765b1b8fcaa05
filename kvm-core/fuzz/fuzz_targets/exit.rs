// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what KVM left in `kvm_run`, decoded and run through the loop: `tests/decode/mod.rs`, which
//! `tests/fuzzed.rs` runs without libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/decode/mod.rs"]
mod decode;

fuzz_target!(|input: &[u8]| decode::run(input));
