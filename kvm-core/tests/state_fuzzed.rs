// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any bytes as a saved state, in the form that `fuzz/` hands to libFuzzer. `LONG_TESTS=1` does more.
#![cfg(all(feature = "with-serde", not(loom)))]

mod states;

use proptest::prelude::*;

#[test]
fn any_bytes_are_a_state_or_are_refused() {
    let cases = if std::env::var_os("LONG_TESTS").is_some() {
        50_000
    } else {
        1_000
    };
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    let input = proptest::collection::vec(any::<u8>(), 0..60);
    proptest!(config, |(input in input)| states::text::run(&input));
}
