// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! House rules that a machine can hold: which room may know which, one version of each rust-vmm crate, what every
//! crate has to have, and whose licence every file names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The crates that are published, and which of each other they may know.
const ARROWS: &[(&str, &[&str])] = &[
    ("srcu", &[]),
    ("memslots", &["srcu"]),
    ("io-bus", &["srcu"]),
    ("irq-routing", &[]),
    ("kvm-core", &[]),
    ("dirty-log", &["memslots"]),
    ("async-pf", &["memslots"]),
    (
        "reference-vmm",
        &[
            "async-pf",
            "dirty-log",
            "io-bus",
            "irq-routing",
            "kvm-core",
            "memslots",
            "srcu",
        ],
    ),
];

/// The rust-vmm crates, and those that would split the tree in two with a second version.
const SINGLE: &[&str] = &[
    "acpi_tables",
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "log",
    "seccompiler",
    "virtio-queue",
    "vm-device",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The names in the dependency tables of a manifest that bind a user of the crate, on any target.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            inside = table == "dependencies" || table.ends_with(".dependencies");
            if let Some((_, name)) = table
                .split_once("dependencies.")
                .filter(|(before, _)| !before.ends_with('-'))
            {
                found.push(name.to_owned());
            }
        } else if inside
            && let Some(name) = line
                .split(['=', '.', ' '])
                .next()
                .filter(|n| !n.is_empty() && !n.starts_with('#'))
        {
            found.push(name.to_owned());
        }
    }
    found
}

#[test]
fn no_crate_knows_another_that_the_design_keeps_from_it() {
    for (krate, allowed) in ARROWS {
        let manifest = fs::read_to_string(workspace().join(krate).join("Cargo.toml")).unwrap();
        for name in dependencies(&manifest) {
            let internal = ARROWS.iter().any(|(other, _)| *other == name)
                || name == "guests"
                || name == "xtask";
            assert!(
                !internal || allowed.contains(&name.as_str()),
                "{krate} must not depend on {name}"
            );
        }
    }
}

#[test]
fn dependencies_are_read_from_every_table_but_the_tests_own() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true\n# c\nb = { version = \"1\" }\n\n\
                    [dev-dependencies]\nguests.workspace = true\n[target.'cfg(loom)'.dependencies]\nloom = \"1\"\n\
                    [dependencies.d]\nversion = \"1\"\n[dev-dependencies.e]\nversion = \"1\"\n";
    assert_eq!(dependencies(manifest), ["a", "b", "loom", "d"]);
}

#[test]
fn one_version_of_each_rust_vmm_crate_is_in_the_tree() {
    let lock = fs::read_to_string(workspace().join("Cargo.lock")).unwrap();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        if let Some(value) = line.strip_prefix("name = ") {
            name = value.trim_matches('"');
        } else if let Some(value) = line.strip_prefix("version = ") {
            versions
                .entry(name)
                .or_default()
                .push(value.trim_matches('"'));
        }
    }
    for krate in SINGLE {
        let found = versions.get(krate).map_or(&[][..], Vec::as_slice);
        assert!(found.len() <= 1, "{krate} is in Cargo.lock as {found:?}");
    }
    assert!(
        versions.contains_key("kvm-ioctls"),
        "Cargo.lock was not understood"
    );
}

#[test]
fn every_published_crate_has_what_a_crate_needs_to_stand_alone() {
    let mut faults = Vec::new();
    for (krate, _) in ARROWS {
        let dir = workspace().join(krate);
        for file in [
            "README.md",
            "CHANGELOG.md",
            "LICENSE-APACHE",
            "LICENSE-BSD-3-Clause",
        ] {
            if !fs::metadata(dir.join(file)).is_ok_and(|m| m.is_file() && m.len() > 0) {
                faults.push(format!("{krate} has no {file}"));
            }
        }
        for folder in ["benches", "tests", "examples"] {
            let sources = fs::read_dir(dir.join(folder))
                .into_iter()
                .flatten()
                .flatten();
            if !sources
                .into_iter()
                .any(|file| file.path().extension().is_some_and(|e| e == "rs"))
            {
                faults.push(format!("{krate} has nothing in {folder}"));
            }
        }
        let manifest = fs::read_to_string(dir.join("Cargo.toml")).unwrap();
        for field in [
            "description",
            "keywords",
            "categories",
            "license",
            "rust-version",
            "[package.metadata.docs.rs]",
        ] {
            if !manifest.lines().any(|line| line.starts_with(field)) {
                faults.push(format!("{krate}'s Cargo.toml has no {field}"));
            }
        }
        let changelog = fs::read_to_string(dir.join("CHANGELOG.md")).unwrap_or_default();
        if !changelog.contains("## Upcoming Release") {
            faults.push(format!(
                "{krate}'s CHANGELOG.md has no '## Upcoming Release'"
            ));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_source_file_names_the_licence_at_its_top() {
    let mut pending = vec![workspace()];
    let mut faults = Vec::new();
    let mut seen = 0;
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && name != ".git" {
                    pending.push(path);
                }
            } else if [".rs", ".sh", ".S", ".s", ".ld"]
                .iter()
                .any(|end| name.ends_with(end))
            {
                seen += 1;
                let text = fs::read_to_string(&path).unwrap();
                if !text.lines().take(3).any(|line| {
                    line.contains("SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause")
                }) {
                    faults.push(path.display().to_string());
                }
            }
        }
    }
    assert!(seen > 20, "only {seen} source files were found");
    assert!(
        faults.is_empty(),
        "without an SPDX line:\n{}",
        faults.join("\n")
    );
}
