// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what a client of the control socket sends: `tests/api_bytes/mod.rs`, which CI runs too.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/api_bytes/mod.rs"]
#[allow(dead_code)]
mod api_bytes;

fuzz_target!(|input: &[u8]| api_bytes::run(input));
