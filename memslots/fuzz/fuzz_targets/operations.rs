// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as operations on the safe API, against a naive model: `tests/operations/mod.rs`, which CI runs too.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/operations/mod.rs"]
mod operations;

fuzz_target!(|input: &[u8]| operations::run(input));
