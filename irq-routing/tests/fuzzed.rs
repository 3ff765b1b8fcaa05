// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random steps beside the models, in the form that `fuzz/` hands to libFuzzer. `LONG_TESTS=1` does
//! more.

mod lockstep;
mod models;

use proptest::prelude::*;

#[test]
fn whatever_is_asked_the_crate_and_the_models_agree() {
    let cases = if std::env::var_os("LONG_TESTS").is_some() {
        50_000
    } else {
        1_000
    };
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    let input = proptest::collection::vec(any::<u8>(), 0..600);
    proptest!(config, |(input in input)| lockstep::run(&input));
}
