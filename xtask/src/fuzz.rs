// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask fuzz`: the crates' libFuzzer targets, with the toolchain that is there.
//!
//! A target is a `CRATE/fuzz/fuzz_targets/NAME.rs` in a workspace of its own (cargo-fuzz's layout, and cargo-fuzz runs
//! them too). What it does with its bytes is a function that the crate's own tests share, so that every run of the
//! tests asks a few thousand inputs; here coverage leads the way, for as long as one likes.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::ui::say;

const USAGE: &str = "\
Runs the crates' fuzz targets with libFuzzer, one after the other. Needs a C++ compiler (apt-get install g++).
What was found interesting is kept in target/fuzz-corpus and used again; an input that fails is kept there too.

Usage: cargo xtask fuzz [--seconds N] [TARGET…]

  --seconds N   how long each target runs (60)
  --list        the targets' names alone

Exit status: 0 nothing was found, 1 a target failed, 125 a target could not be built or run.";

/// How coverage is counted: what cargo-fuzz asks of the compiler, without a sanitizer, which would want a nightly one.
const COVERAGE: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// The triple is named, so that build scripts and procedural macros are built without [`COVERAGE`].
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

struct Target {
    name: String,
    /// `CRATE/fuzz`.
    dir: PathBuf,
}

/// `cargo xtask fuzz`.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    use lexopt::prelude::*;
    let (mut seconds, mut list, mut names) = (60_u32, false, Vec::new());
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("list") => list = true,
            Short('h') | Long("help") => {
                crate::ui::show(USAGE);
                return Ok(0);
            }
            Value(name) => names.push(name.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    let targets = targets()?;
    if list {
        for target in &targets {
            println!("{}", target.name);
        }
        return Ok(0);
    }
    if let Some(unknown) = names.iter().find(|n| targets.iter().all(|t| t.name != **n)) {
        let known: Vec<_> = targets.iter().map(|t| t.name.as_str()).collect();
        return Err(Failure::usage(format!(
            "there is no fuzz target {unknown}: {}",
            known.join(", ")
        )));
    }
    let mut failed = Vec::new();
    for target in &targets {
        if (names.is_empty() || names.contains(&target.name)) && !run(target, seconds)? {
            failed.push(target.name.as_str());
        }
    }
    if failed.is_empty() {
        return Ok(0);
    }
    say(format!("failed: {}", failed.join(", ")));
    Ok(1)
}

/// Every `CRATE/fuzz/fuzz_targets/*.rs`, by name.
fn targets() -> Result<Vec<Target>> {
    let workspace = host::workspace();
    let mut found = Vec::new();
    let crates = fs::read_dir(&workspace)
        .context(|| format!("{} cannot be read", workspace.display()))?
        .flatten();
    for entry in crates {
        let dir = entry.path().join("fuzz");
        for file in fs::read_dir(dir.join("fuzz_targets"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Some(name) = file.file_name().to_string_lossy().strip_suffix(".rs") {
                found.push(Target {
                    name: name.to_owned(),
                    dir: dir.clone(),
                });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Builds a target and runs it; whether nothing was found.
fn run(target: &Target, seconds: u32) -> Result<bool> {
    let Target { name, dir } = target;
    say(format!("{name} for {seconds} s"));
    let built = host::workspace().join("target/fuzz");
    let status = cargo::command()
        .current_dir(dir)
        .args(["build", "--release", "--target", TRIPLE, "--bin", name])
        .arg("--target-dir")
        .arg(&built)
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"))
        .status()
        .context(|| "cargo does not start".into())?;
    if !status.success() {
        return Err(Failure::new(format!(
            "the fuzz target {name} does not build (libFuzzer wants a C++ compiler: apt-get install g++)"
        )));
    }
    let corpus = host::workspace().join("target/fuzz-corpus").join(name);
    fs::create_dir_all(&corpus).context(|| format!("{} cannot be made", corpus.display()))?;
    let status = Command::new(built.join(TRIPLE).join("release").join(name))
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/failed-", corpus.display()))
        .arg("-print_final_stats=1")
        .current_dir(dir)
        .status()
        .context(|| format!("{name} does not start"))?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fuzz_target_is_a_program_of_its_crates_fuzz_workspace() {
        for target in targets().unwrap() {
            let manifest = fs::read_to_string(target.dir.join("Cargo.toml")).unwrap();
            let entry = format!("name = \"{}\"", target.name);
            assert!(manifest.contains(&entry), "{}: no {entry}", target.name);
            assert!(manifest.contains("[workspace]"), "{}", target.name);
        }
    }
}
