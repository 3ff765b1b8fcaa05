// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what a virtio driver does: `tests/virtio_script/mod.rs`, which CI runs too. Devices are listed there.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/virtio_script/mod.rs"]
mod virtio_script;

fuzz_target!(|input: &[u8]| virtio_script::run(input));
