// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processor models: what of a host is left, what is refused, how it is told and written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

#[path = "common/leaves.rs"]
mod leaves;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_core::arch::x86_64::cpuid::{
    Baseline, BitPattern, Edit, FEATURE_WORDS, FeatureKind, HypervisorLeaves, Register, Template,
    TemplateError, Timing, Word, differences, feature,
};
use leaves::{amd, find, intel};
use proptest::prelude::*;

fn has(leaves: &[kvm_cpuid_entry2], name: &str) -> bool {
    let found = feature(name).unwrap();
    found.word.of(leaves) & found.mask() != 0
}

fn missing(template: &Template, host: &[kvm_cpuid_entry2]) -> Vec<String> {
    match template.apply(host) {
        Err(TemplateError::Missing { missing, .. }) => missing,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_host_as_it_is_has_no_difference() {
    for host in [intel(), amd()] {
        assert_eq!(Template::host().apply(&host).unwrap(), host);
        assert_eq!(differences(&host, &host), []);
    }
}

#[test]
fn a_baseline_has_its_own_instructions_and_no_others() {
    let host = amd();
    for level in [Baseline::V1, Baseline::V2, Baseline::V3] {
        let model = Template::baseline(level).apply(&host).unwrap();
        for word in FEATURE_WORDS {
            for found in word.features() {
                let (there, before) = (has(&model, found.name), has(&host, found.name));
                match found.kind {
                    FeatureKind::Instructions => {
                        let wanted = level.features().any(|name| name == found.name);
                        assert_eq!(there, wanted, "{level}: {}", found.name);
                    }
                    _ => assert_eq!(there, before, "{level}: {}", found.name),
                }
            }
        }
    }
    // A baseline upon a baseline below it lacks what is between them.
    let v2 = Template::baseline(Baseline::V2).apply(&host).unwrap();
    let lacks = missing(&Template::baseline(Baseline::V3), &v2);
    for name in ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"] {
        assert!(lacks.iter().any(|lack| lack == name), "{name}: {lacks:?}");
    }
}

#[test]
fn what_a_host_lacks_is_named_whole() {
    let v2 = Template::baseline(Baseline::V2);
    let lacks = missing(&v2, &intel());
    assert_eq!(lacks, ["pni", "ssse3", "sse4_1", "sse4_2", "popcnt"]);
    let error = v2.apply(&intel()).unwrap_err().to_string();
    assert!(
        error.contains("x86-64-v2") && error.contains("pni, ssse3, sse4_1"),
        "{error}"
    );
    let v4 = missing(&Template::baseline(Baseline::V4), &amd());
    let avx512 = ["avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"];
    assert_eq!(v4, avx512);
    // A bit without a name is named by its place.
    let word = Word::new(7, 0, Register::Ebx);
    let bits = BitPattern::new(1 << 22, 0).unwrap();
    let odd = Template::host().edit(Edit { word, bits });
    assert_eq!(missing(&odd, &amd()), ["0x7.0 ebx[22]"]);
    // Which levels there are is told at once.
    let levels = Template::levels(&intel());
    assert_eq!(levels[0], (Baseline::V1, vec![]));
    assert_eq!(levels[1], (Baseline::V2, lacks));
}

#[test]
fn names_add_to_a_baseline_and_take_from_it() {
    let host = amd();
    let template = Template::baseline(Baseline::V2)
        .with("aes")
        .and_then(|t| t.without("rdtscp"))
        .unwrap()
        .named("fleet");
    let model = template.apply(&host).unwrap();
    assert!(has(&model, "aes") && !has(&model, "rdtscp") && !has(&model, "avx"));
    assert_eq!(template.says("aes"), Some(true));
    assert_eq!(template.says("rdtscp"), Some(false));
    assert_eq!(template.says("avx"), None);
    // The last word counts.
    let again = template.with("rdtscp").unwrap();
    assert_eq!(again.says("rdtscp"), Some(true));
    assert!(has(&again.apply(&host).unwrap(), "rdtscp"));
    assert!(matches!(
        again.with("avx3"),
        Err(TemplateError::UnknownFeature(name)) if name == "avx3"
    ));
    for (alias, name) in [
        ("sse3", "pni"),
        ("constant_tsc", "invtsc"),
        ("nonstop_tsc", "invtsc"),
    ] {
        let error = Template::host().with(alias).unwrap_err().to_string();
        assert!(error.contains(&format!("is {name:?} meant?")), "{error}");
    }
}

#[test]
fn numbers_are_taken_as_they_are_said() {
    let host = intel();
    let family = Word::new(1, 0, Register::Eax);
    let brand = Word::new(0x8000_0002, 0, Register::Eax);
    let new = Word::new(0x16, 0, Register::Ebx);
    let mut template = Template::host();
    for (word, value) in [(family, 0x306f0), (brand, 0x656e_6f4e), (new, 9)] {
        let bits = BitPattern::value(value);
        template = template.edit(Edit { word, bits });
    }
    let model = template.apply(&host).unwrap();
    assert_eq!(
        [family, brand, new].map(|word| word.of(&model)),
        [0x306f0, 0x656e_6f4e, 9]
    );
    let told: Vec<_> = differences(&host, &model)
        .iter()
        .map(ToString::to_string)
        .collect();
    let expected = [
        "0x1.0 eax: 0xc06f2 -> 0x306f0",
        "0x16.0 ebx: 0x0 -> 0x9",
        "0x80000002.0 eax: 0x0 -> 0x656e6f4e",
    ];
    assert_eq!(told, expected);
}

#[test]
fn the_extended_state_goes_with_its_instructions() {
    let host = amd();
    let xcr0 = |leaves: &[kvm_cpuid_entry2]| find(leaves, 0xd, 0).eax;
    assert_eq!(xcr0(&host), 0x207);
    let v3 = Template::baseline(Baseline::V3).apply(&host).unwrap();
    assert_eq!(xcr0(&v3), 0x207);
    // Without AVX its 256 bytes and its bit are gone; protection keys stay at their place.
    let v2 = Template::baseline(Baseline::V2).apply(&host).unwrap();
    assert_eq!((xcr0(&v2), find(&v2, 0xd, 0).ecx), (0x203, 0xa88));
    assert!(
        v2.iter()
            .all(|leaf| (leaf.function, leaf.index) != (0xd, 2))
    );
    let template = Template::baseline(Baseline::V2).without("pku").unwrap();
    let bare = template.apply(&host).unwrap();
    assert_eq!((xcr0(&bare), find(&bare, 0xd, 0).ecx), (3, 576));
    let none = Template::host()
        .without("xsave")
        .unwrap()
        .apply(&host)
        .unwrap();
    assert!(none.iter().all(|leaf| leaf.function != 0xd));
}

#[test]
fn a_difference_is_told_by_names() {
    let host = amd();
    let template = Template::host().without("avx2").unwrap();
    let model = template.apply(&host).unwrap();
    let told: Vec<_> = differences(&host, &model)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(told, ["0x7.0 ebx: -avx2"]);
    let back: Vec<_> = differences(&model, &host)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(back, ["0x7.0 ebx: +avx2"]);
}

#[test]
fn kvms_own_leaves_are_masked_moved_and_tell_the_time() {
    let host = intel();
    let masked = Template::host().without("kvm_steal_time").unwrap();
    let mut model = masked.apply(&host).unwrap();
    assert!(has(&host, "kvm_steal_time") && !has(&model, "kvm_steal_time"));
    assert!(has(&model, "kvm_clocksource"));

    let features = find(&model, 0x4000_0001, 0);
    let timing = Timing::new(2_100_000.try_into().unwrap());
    let moved = HypervisorLeaves::at(0x4000_0100)
        .unwrap()
        .with_timing(timing);
    moved.apply(&mut model);
    assert_eq!(find(&model, 0x4000_0100, 0).eax, 0x4000_0110);
    assert_eq!(find(&model, 0x4000_0100, 0).ebx, 0x4b4d_564b);
    assert_eq!(find(&model, 0x4000_0101, 0).eax, features.eax);
    let told = find(&model, 0x4000_0110, 0);
    assert_eq!([told.eax, told.ebx, told.ecx], [2_100_000, 1_000_000, 0]);
    assert!(
        model
            .iter()
            .all(|leaf| !(0x4000_0000..0x4000_0100).contains(&leaf.function))
    );
    // Again it changes nothing, and back it is as it was.
    let once = model.clone();
    moved.apply(&mut model);
    assert_eq!(model, once);
    HypervisorLeaves::default().apply(&mut model);
    assert_eq!(find(&model, 0x4000_0000, 0).eax, 0x4000_0010);

    // A TSC that is not invariant has no one frequency.
    let mut other = Template::host()
        .without("invtsc")
        .unwrap()
        .apply(&host)
        .unwrap();
    let before = other.clone();
    HypervisorLeaves::default()
        .with_timing(timing)
        .apply(&mut other);
    assert_eq!(other, before);
    for base in [0, 0x3fff_ff00, 0x4000_0001, 0x4001_0000, u32::MAX] {
        let error = HypervisorLeaves::at(base).unwrap_err().to_string();
        assert!(error.contains(&format!("{base:#x}")), "{error}");
    }
}

#[test]
fn a_name_that_is_set_and_cleared_a_thousand_times_is_told_once() {
    let names = vec!["avx"; 1000];
    let text = serde_json::json!({"set": names, "clear": names});
    let error = serde_json::from_value::<Template>(text).unwrap_err();
    assert_eq!(error.to_string().matches("avx").count(), 1, "{error}");
    let error = serde_json::from_str::<Template>("7")
        .unwrap_err()
        .to_string();
    assert!(error.contains("a processor model is an object"), "{error}");
}

#[test]
fn a_template_in_json_is_the_template_in_code() {
    let text = r#"{
        "name": "fleet", "base": "x86-64-v2", "set": ["aes"], "clear": ["rdtscp"],
        "registers": [
            {"leaf": "0x7", "subleaf": 0, "register": "edx",
             "bits": "0bxxxxxxxx_xxxxxxxx_xxxxxxxx_xxx0xxxx"},
            {"leaf": 1, "register": "eax", "value": "0x306f0"}
        ]
    }"#;
    let read: Template = serde_json::from_str(text).unwrap();
    let edit = |leaf, register, bits| {
        let word = Word::new(leaf, 0, register);
        Edit { word, bits }
    };
    let made = Template::baseline(Baseline::V2)
        .with("aes")
        .and_then(|t| t.without("rdtscp"))
        .unwrap()
        .edit(edit(7, Register::Edx, BitPattern::new(0, 1 << 4).unwrap()))
        .edit(edit(1, Register::Eax, BitPattern::value(0x306f0)))
        .named("fleet");
    assert_eq!(read, made);
    let written = serde_json::to_string(&read).unwrap();
    assert_eq!(serde_json::from_str::<Template>(&written).unwrap(), made);
    assert_eq!(
        serde_json::from_str::<Template>("{}").unwrap(),
        Template::host()
    );
}

#[test]
fn what_is_no_template_is_refused_with_the_value() {
    let long = format!(
        r#"{{"registers": [{{"leaf": 1, "register": "eax", "bits": "0b{}"}}]}}"#,
        "x".repeat(33)
    );
    for (text, needle) in [
        (r#"{"base": "x86-64-v9"}"#, "x86-64-v9"),
        (r#"{"set": ["avx3"]}"#, "avx3"),
        (
            r#"{"set": ["avx"], "clear": ["avx"]}"#,
            "avx set and cleared",
        ),
        (r#"{"colour": "red"}"#, "colour"),
        (r#"{"set": "avx"}"#, "avx"),
        (
            r#"{"registers": [{"leaf": 1, "register": "esp", "value": 0}]}"#,
            "esp",
        ),
        (
            r#"{"registers": [{"leaf": 1, "register": "eax"}]}"#,
            "0x1.0 eax",
        ),
        (
            r#"{"registers": [{"leaf": 1, "register": "eax", "value": 1, "bits": "0b0"}]}"#,
            "0b0",
        ),
        (
            r#"{"registers": [{"leaf": "7", "register": "eax", "value": 1}]}"#,
            "\"7\"",
        ),
        (
            r#"{"registers": [{"leaf": "0x+7", "register": "eax", "value": 1}]}"#,
            "0x+7",
        ),
        (
            r#"{"registers": [{"leaf": 4294967296, "register": "eax", "value": 1}]}"#,
            "4294967296",
        ),
        (
            r#"{"registers": [{"leaf": 1, "register": "eax", "bits": "xx"}]}"#,
            "xx",
        ),
        (
            r#"{"registers": [{"leaf": 1, "register": "eax", "bits": "0b12"}]}"#,
            "'2'",
        ),
        (&long, "33 bits"),
    ] {
        let error = serde_json::from_str::<Template>(text)
            .unwrap_err()
            .to_string();
        assert!(error.contains(needle), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn a_pattern_as_text_is_the_pattern(set: u32, clear: u32, word: u32) {
        let pattern = BitPattern::new(set & !clear, clear).unwrap();
        prop_assert_eq!(pattern.to_string().parse(), Ok(pattern));
        for bit in 0..32 {
            let mask = 1 << bit;
            let expected = match (pattern.set() & mask, pattern.clear() & mask) {
                (0, 0) => word & mask,
                (0, _) => 0,
                _ => mask,
            };
            prop_assert_eq!(pattern.apply(word) & mask, expected);
        }
        prop_assert_eq!(BitPattern::new(set, clear).is_none(), set & clear != 0);
    }

    /// The rule whole: a model never has a feature that its host has not.
    #[test]
    fn a_model_has_no_feature_that_its_host_has_not(
        level in prop_oneof![Just(None), (0_usize..4).prop_map(Some)],
        edits in prop::collection::vec(
            (0..FEATURE_WORDS.len(), any::<u32>(), any::<u32>(), any::<u32>()), 0..6),
        on_amd: bool,
    ) {
        let host = if on_amd { amd() } else { intel() };
        let mut template = match level {
            None => Template::host(),
            Some(level) => Template::baseline(Baseline::ALL[level]),
        };
        for (word, set, clear, thin) in edits {
            let word = FEATURE_WORDS[word].word;
            // Mostly bits that the host has.
            let set = set & (word.of(&host) | thin & set.rotate_left(7) & thin.rotate_left(3));
            let bits = BitPattern::new(set & !clear, clear).unwrap();
            template = template.edit(Edit { word, bits });
        }
        let more = |model: &[kvm_cpuid_entry2]| FEATURE_WORDS.iter().any(|known| {
            let machine = known.mask(FeatureKind::Machine);
            known.word.of(model) & !known.word.of(&host) & !machine != 0
        });
        match template.apply(&host) {
            Ok(model) => prop_assert!(!more(&model)),
            Err(TemplateError::Missing { missing, .. }) => prop_assert!(!missing.is_empty()),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
