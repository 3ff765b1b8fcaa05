// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random bytes as exits, in the form that `fuzz/` hands to libFuzzer. `LONG_TESTS=1` does more.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod decode;

use proptest::prelude::*;

/// Bytes of which the first, the exit's reason, is most often one that there is, and which have numbers
/// where an exit has them: small ones are the plausible ones.
fn input() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => Just(0_u8), 3 => 0..17_u8, 1 => any::<u8>()];
    (
        0..45_u8,
        any::<u8>(),
        proptest::collection::vec(byte, 0..400),
    )
        .prop_map(|(reason, errno, rest)| {
            let mut input = vec![reason, errno];
            input.extend(rest);
            input
        })
}

#[test]
fn whatever_is_in_kvm_run_the_decoder_and_the_loop_keep_their_promises() {
    let cases = if std::env::var_os("LONG_TESTS").is_some() {
        200_000
    } else {
        2_000
    };
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    proptest!(config, |(input in input())| decode::run(&input));
}

#[test]
fn every_port_access_that_fits_is_decoded() {
    // direction, size, port, count, offset: what KVM writes, for all sizes.
    for size in [1_u8, 2, 4] {
        for count in [1_u32, 3, 4096 / u32::from(size)] {
            for direction in 0..2 {
                let mut input = vec![kvm_bindings::KVM_EXIT_IO as u8, 0, direction, size, 0xf8, 3];
                input.extend(count.to_ne_bytes());
                input.extend(4096_u64.to_ne_bytes());
                input.resize(600, 0x5a);
                decode::run(&input);
            }
        }
    }
}

#[test]
fn port_data_that_would_lie_over_what_describes_it_is_never_handed_out() {
    // An answer written there would change the exit itself, or registers.
    for offset in (0..300_u64)
        .chain(8180..8200)
        .chain([u64::MAX - 3, u64::MAX])
    {
        let mut input = vec![kvm_bindings::KVM_EXIT_IO as u8, 0, 0, 4, 0xf8, 3];
        input.extend(1_u32.to_ne_bytes());
        input.extend(offset.to_ne_bytes());
        input.resize(300, 0);
        decode::run(&input);
    }
}
