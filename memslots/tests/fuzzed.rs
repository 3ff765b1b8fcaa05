// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random operations against a naive model, in the form that `fuzz/` hands to libFuzzer. `LONG_TESTS=1` does more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod operations;

use proptest::prelude::*;

#[test]
fn whatever_is_asked_the_crate_and_a_list_of_bytes_agree() {
    let cases = if std::env::var_os("LONG_TESTS").is_some() {
        20_000
    } else {
        300
    };
    let input = proptest::collection::vec(any::<u8>(), 0..700);
    proptest!(ProptestConfig::with_cases(cases), |(input in input)| operations::run(&input));
}
