// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any bytes as processor models and leaves, in the form that `fuzz/` hands to libFuzzer. `LONG_TESTS=1`
//! does more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

mod any_cpuid;
#[path = "common/leaves.rs"]
mod leaves;

use proptest::prelude::*;

fn config() -> ProptestConfig {
    let long = std::env::var_os("LONG_TESTS").is_some();
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(if long { 50_000 } else { 1_000 })
    }
}

#[test]
fn whatever_the_leaves_are_what_is_made_of_them_keeps_its_promises() {
    let input = (0x80_u8.., prop::collection::vec(any::<u8>(), 0..900));
    proptest!(config(), |((kind, bytes) in input)| {
        any_cpuid::run(&[&[kind], &bytes[..]].concat());
    });
}

/// JSON that is nearly a template: pieces of one, put together in any order.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"name\"",
        "\"base\"",
        "\"set\"",
        "\"clear\"",
        "\"registers\"",
        "\"leaf\"",
        "\"subleaf\"",
        "\"register\"",
        "\"bits\"",
        "\"value\"",
        "\"host\"",
        "\"x86-64-v2\"",
        "\"avx2\"",
        "\"aes\"",
        "\"eax\"",
        "\"0x7\"",
        "7",
        "-1",
        "4294967296",
        "null",
        "\"0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1\"",
        "\"0b\"",
        "\u{fffd}",
        "{\"leaf\": 1, \"register\": \"ecx\", \"value\": \"0xffffffff\"}",
        "{\"leaf\": \"0x8000001e\", \"subleaf\": 3, \"register\": \"edx\", \"value\": 0}",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

#[test]
fn whatever_is_written_it_is_a_template_or_an_error() {
    let field = prop_oneof![
        Just("\"set\":[\"aes\"]"),
        Just("\"clear\":[\"avx2\",\"sse4_2\"]"),
        Just("\"base\":\"x86-64-v3\""),
        Just("\"base\":\"host\""),
        Just("\"name\":\"x\""),
        Just("\"registers\":[{\"leaf\":7,\"register\":\"ebx\",\"value\":4294967295}]"),
        Just(
            "\"registers\":[{\"leaf\":22,\"subleaf\":\"0x1\",\"register\":\"eax\",\"value\":\"0x1\"}]"
        ),
    ];
    let whole = prop::collection::vec(field, 0..5).prop_map(|f| format!("{{{}}}", f.join(",")));
    let text = prop_oneof![pieces(), whole];
    proptest!(config(), |(text in text)| {
        any_cpuid::run(&[&[0], text.as_bytes()].concat());
    });
}
