// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what comes on a migration's data connection: `tests/migration_bytes/mod.rs`, which CI runs too.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/migration_bytes/mod.rs"]
#[allow(dead_code)]
mod migration_bytes;

fuzz_target!(|input: &[u8]| migration_bytes::fuzz(input));
