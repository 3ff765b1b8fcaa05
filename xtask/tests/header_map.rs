// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every identifier of `kvm_host.h` has its place in the documentation of exactly one crate, the one that
//! `kvm_host_identifiers.tsv` names: an item of ours, or the kernel's side and why, or planned.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Identifier → crate.
fn wanted() -> BTreeMap<String, String> {
    let list = include_str!("../kvm_host_identifiers.tsv");
    let mut wanted = BTreeMap::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let (krate, identifier) = line.split_once('\t').expect("crate<TAB>identifier");
        let before = wanted.insert(identifier.to_owned(), krate.to_owned());
        assert_eq!(before, None, "{identifier} is listed twice");
    }
    wanted
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The rows (identifier, what became of it) of a crate's header map.
fn rows(documentation: &str) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    let mut inside = false;
    for line in documentation.lines() {
        if line.starts_with("# ") {
            inside = line.trim() == "# Header map";
        }
        let Some(cells) = line.trim().strip_prefix('|').filter(|_| inside) else {
            continue;
        };
        let cells = cells.trim_end().strip_suffix('|').unwrap_or(cells);
        let Some((first, second)) = cells.split_once('|') else {
            continue;
        };
        if let Some(identifier) = first
            .trim()
            .strip_prefix('`')
            .and_then(|c| c.strip_suffix('`'))
        {
            rows.push((identifier.to_owned(), second.trim().to_owned()));
        }
    }
    rows
}

/// The text of a crate's own documentation: `//!` lines of lib.rs, and files that it includes as such.
fn documentation(krate: &str) -> String {
    let dir = workspace().join(krate).join("src");
    let source = fs::read_to_string(dir.join("lib.rs")).unwrap();
    let mut text = String::new();
    for line in source.lines() {
        if let Some(doc) = line.trim_start().strip_prefix("//!") {
            text += doc.strip_prefix(' ').unwrap_or(doc);
            text.push('\n');
        } else if let Some(file) = line
            .strip_prefix("#![doc = include_str!(\"")
            .and_then(|rest| rest.split('"').next())
        {
            text += &fs::read_to_string(dir.join(file)).unwrap();
        }
    }
    text
}

/// What is wrong with one crate's map, a line each.
fn faults(
    krate: &str,
    rows: &[(String, String)],
    wanted: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen = BTreeSet::new();
    for (identifier, here) in rows {
        match wanted.get(identifier) {
            None => faults.push(format!("{krate}: `{identifier}` is not on the list")),
            Some(owner) if owner != krate => {
                faults.push(format!("{krate}: `{identifier}` belongs to {owner}"))
            }
            Some(_) => {}
        }
        if !seen.insert(identifier) {
            faults.push(format!("{krate}: `{identifier}` stands there twice"));
        }
        let says_why = |mark: &str| {
            here.strip_prefix(mark)
                .is_some_and(|why| why.trim().len() > 3)
        };
        if !(here.contains('[') || says_why("kernel:") || says_why("planned:")) {
            faults.push(format!(
                "{krate}: `{identifier}` leads to \"{here}\": a link to an item, `kernel: why` or `planned: what` is wanted"
            ));
        }
    }
    for (identifier, owner) in wanted {
        if owner == krate && !seen.contains(identifier) {
            faults.push(format!("{krate}: `{identifier}` has no row"));
        }
    }
    faults
}

#[test]
fn every_identifier_of_the_header_has_its_place() {
    let wanted = wanted();
    assert_eq!(wanted.len(), 288);
    let crates: BTreeSet<_> = wanted.values().cloned().collect();
    let faults: Vec<_> = crates
        .iter()
        .flat_map(|krate| faults(krate, &rows(&documentation(krate)), &wanted))
        .collect();
    assert!(
        faults.is_empty(),
        "{} faults in the header maps:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[test]
fn a_fault_in_a_map_is_found() {
    let list = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(id, krate)| ((*id).to_owned(), (*krate).to_owned()))
            .collect()
    };
    let wanted = list(&[("a", "x"), ("b", "x"), ("c", "y")]);
    let of = |text: &str| faults("x", &rows(text), &wanted);
    let head = "# Header map\n\n## A part\n\n| kvm_host.h | here |\n| --- | --- |\n";
    assert_eq!(
        of(&format!(
            "{head}| `a` | [`A`] |\n| `b` | kernel: it does | \n"
        )),
        Vec::<String>::new()
    );
    assert_eq!(
        of(&format!("{head}| `a` | [`A`] |\n")),
        ["x: `b` has no row"]
    );
    assert_eq!(
        of(&format!(
            "{head}| `a` | [`A`] |\n| `a` | [`A`] |\n| `b` | planned: issue 3 |\n"
        ))
        .len(),
        1
    );
    assert_eq!(
        of(&format!("{head}| `a` |  |\n| `b` | kernel: |\n")).len(),
        2
    );
    assert_eq!(
        of(&format!(
            "{head}| `a` | [`A`] |\n| `b` | [`A`] |\n| `c` | [`A`] |\n"
        )),
        ["x: `c` belongs to y"]
    );
    // A table of another section is none of ours.
    assert_eq!(
        of(&format!("{head}| `a` | [`A`] |\n# Next\n| `b` | [`A`] |\n")),
        ["x: `b` has no row"]
    );
}
