// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The body of `fuzz/fuzz_targets/bus.rs` on bytes that are made here, so that it is run, and kept
//! running, where there is no libFuzzer.

#![allow(clippy::unwrap_used)]

mod lockstep;

/// xorshift: the same bytes at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn any_bytes_are_steps_that_the_bus_and_its_model_agree_on() {
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1");
    let rounds = if long { 100_000 } else { 1_000 };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..rounds {
        let len = random.next() as usize % 600;
        let bytes: Vec<u8> = (0..len).map(|_| (random.next() >> 32) as u8).collect();
        lockstep::run_bytes(&bytes);
    }
    lockstep::run_bytes(&[]);
}
