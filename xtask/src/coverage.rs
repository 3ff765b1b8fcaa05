// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask coverage`: how much of the crates the pure tier covers (and the kvm tier, where it runs), against
//! `coverage_config.json` as a ratchet. The file has rust-vmm's form. cargo-tarpaulin's LLVM engine does the
//! counting: it needs no llvm-tools.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host::{self, KvmKind};
use crate::tiers;
use crate::ui::{Step, say};

const USAGE: &str = "\
Measures the coverage of the pure tests (and of the kvm tests, where this host has a /dev/kvm) with cargo-tarpaulin,
which is installed where it is missing, and compares it with coverage_config.json.

Usage: cargo xtask coverage

A test that fails there is told, and is no failure of the measurement: `cargo xtask test` is what says whether tests pass.

Exit status: 0 the coverage is as the file says or better, 1 it is less, 125 it could not be measured.";

/// What two runs of the same code may differ by: threads take turns as they like.
const JITTER: f64 = 0.3;

/// `coverage_config.json`.
#[derive(Debug, PartialEq)]
struct Config {
    score: f64,
    exclude: Vec<String>,
    features: String,
}

impl Config {
    fn parse(text: &str) -> Option<Config> {
        let value: Value = serde_json::from_str(text).ok()?;
        Some(Config {
            score: value["coverage_score"].as_f64()?,
            exclude: value["exclude_path"]
                .as_str()?
                .split(',')
                .map(str::to_owned)
                .filter(|p| !p.is_empty())
                .collect(),
            features: value["crate_features"].as_str()?.to_owned(),
        })
    }
}

/// `cargo xtask coverage`.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    use lexopt::prelude::*;
    let mut parser = lexopt::Parser::from_args(args);
    if let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => {
                crate::ui::show(USAGE);
                return Ok(0);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let workspace = host::workspace();
    let file = workspace.join("coverage_config.json");
    let text =
        fs::read_to_string(&file).context(|| format!("{} cannot be read", file.display()))?;
    let config = Config::parse(&text)
        .ok_or_else(|| Failure::new(format!("{} is not in rust-vmm's form", file.display())))?;
    install()?;
    let report = measure(&workspace, &config)?;

    let mut crates: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (path, covered, coverable) in report.iter().filter(|(_, _, coverable)| *coverable > 0) {
        let sums = crates
            .entry(path.split('/').next().unwrap_or_default())
            .or_default();
        sums.0 += covered;
        sums.1 += coverable;
    }
    println!(
        "\n{:<16} {:>9} {:>9} {:>8}",
        "crate", "covered", "lines", ""
    );
    for (name, (covered, coverable)) in &crates {
        println!(
            "{name:<16} {covered:>9} {coverable:>9} {:>6.1} %",
            percent(*covered, *coverable)
        );
    }
    let (covered, coverable) = crates
        .values()
        .fold((0, 0), |sum, c| (sum.0 + c.0, sum.1 + c.1));
    let score = percent(covered, coverable);
    println!("{:<16} {covered:>9} {coverable:>9} {score:>6.1} %", "all");
    let (status, verdict) = verdict(score, config.score);
    println!("{verdict}");
    Ok(status)
}

fn percent(covered: u64, coverable: u64) -> f64 {
    if coverable == 0 {
        return 0.0;
    }
    // Lines of code are far from the 2^52 where this would lose precision.
    #[allow(clippy::cast_precision_loss)]
    let share = covered as f64 / coverable as f64;
    share * 100.0
}

fn verdict(score: f64, wanted: f64) -> (i32, String) {
    if score + JITTER < wanted {
        (
            1,
            format!(
                "coverage is {score:.1} % and coverage_config.json wants {wanted:.1} %: a test is missing"
            ),
        )
    } else if score > wanted + 2.0 * JITTER {
        (
            0,
            format!(
                "coverage is {score:.1} %, more than the {wanted:.1} % of coverage_config.json: raise coverage_score"
            ),
        )
    } else {
        (
            0,
            format!("coverage is {score:.1} %, as coverage_config.json wants ({wanted:.1} %)"),
        )
    }
}

fn install() -> Result<()> {
    if cargo::command()
        .args(["tarpaulin", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return Ok(());
    }
    let step = Step::begin("installing cargo-tarpaulin");
    let status = cargo::command()
        .args([
            "install",
            "cargo-tarpaulin",
            "--no-default-features",
            "--locked",
        ])
        .status()
        .context(|| "cargo does not start".into())?;
    if !status.success() {
        return Err(Failure::new(
            "cargo-tarpaulin cannot be installed: `cargo install cargo-tarpaulin` says why",
        ));
    }
    step.end();
    Ok(())
}

/// Tests that count or refuse each system call of the binary: an instrumented one makes more.
const TRACED: [&str; 2] = ["kvm_errno", "kvm_ioctl_order"];

/// How often tarpaulin is run where it ends without a report.
const RUNS: usize = 2;

/// Each file's path within the workspace, its covered and its coverable lines.
fn measure(workspace: &Path, config: &Config) -> Result<Vec<(String, u64, u64)>> {
    let with_kvm = host::kvm().0 != KvmKind::None;
    if !with_kvm {
        say("no /dev/kvm here: the kvm tier's share is missing from the coverage");
    }
    // A folder of its own: other flags would build everything again.
    let out = workspace.join("target/tarpaulin");
    fs::create_dir_all(&out).context(|| format!("{} cannot be made", out.display()))?;
    let mut command = cargo::command();
    command.args([
        "tarpaulin",
        "--engine",
        "llvm",
        "--skip-clean",
        "--workspace",
        "--exclude",
        "xtask",
        "--exclude",
        "guests",
    ]);
    // Whether tests pass is for `cargo xtask test` to say: one that does not has covered something all the same.
    command.arg("--no-fail-fast");
    command
        .args(["--timeout", "600", "--out", "json", "--output-dir"])
        .arg(&out)
        .arg("--target-dir")
        .arg(&out);
    command.args(["--lib", "--bins"]);
    for test in tiers::test_files(workspace)? {
        if !(test.starts_with("loom_")
            || test.starts_with("lab_")
            || (test.starts_with("kvm_") && !with_kvm)
            || TRACED.contains(&test.as_str()))
        {
            command.args(["--test", &test]);
        }
    }
    if !config.features.is_empty() {
        command.args(["--features", &config.features]);
    }
    for path in &config.exclude {
        command.args(["--exclude-files", &format!("*{path}*")]);
    }
    let file = out.join("tarpaulin-report.json");
    let step = Step::begin("measuring the coverage");
    let mut runs = 0;
    loop {
        // What is there is of another run.
        let _ = fs::remove_file(&file);
        let _ = fs::remove_dir_all(out.join("tarpaulin/profraws"));
        runs += 1;
        let status = command.status().context(|| "cargo does not start".into())?;
        match (status.success(), file.exists()) {
            (true, _) => break,
            (false, true) => {
                say("a test failed in the instrumented build, and what it covered counts");
                break;
            }
            // A program that a test kills while it writes its profile leaves half of one, at which tarpaulin panics.
            (false, false) if runs < RUNS => {
                say(format!(
                    "cargo tarpaulin failed ({status}), and is run again"
                ));
            }
            (false, false) => {
                return Err(Failure::new(format!("cargo tarpaulin failed ({status})")));
            }
        }
    }
    step.end();
    let text =
        fs::read_to_string(&file).context(|| format!("{} cannot be read", file.display()))?;
    let report =
        serde_json::from_str(&text).context(|| format!("{} is no JSON", file.display()))?;
    Ok(files(&report, workspace, &config.exclude))
}

fn files(report: &Value, workspace: &Path, exclude: &[String]) -> Vec<(String, u64, u64)> {
    let mut found = Vec::new();
    for file in report["files"].as_array().into_iter().flatten() {
        let path: std::path::PathBuf = file["path"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let Ok(path) = path.strip_prefix(workspace) else {
            continue;
        };
        let path = path.display().to_string();
        if exclude.iter().any(|part| path.contains(part.as_str())) {
            continue;
        }
        if let (Some(covered), Some(coverable)) =
            (file["covered"].as_u64(), file["coverable"].as_u64())
        {
            found.push((path, covered, coverable));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratchet_holds_in_one_direction() {
        assert_eq!(verdict(79.0, 80.0).0, 1);
        assert_eq!(verdict(79.9, 80.0).0, 0);
        assert_eq!(verdict(85.0, 80.0).0, 0);
        assert!(verdict(85.0, 80.0).1.contains("raise"));
        assert!(!verdict(80.2, 80.0).1.contains("raise"));
    }

    #[test]
    fn the_repositorys_own_file_is_in_the_form() {
        let config = Config::parse(include_str!("../../coverage_config.json"));
        assert!(config.is_some_and(|c| c.score >= 0.0 && c.exclude.contains(&"xtask/".to_owned())));
        assert_eq!(Config::parse("{}"), None);
    }

    #[test]
    fn a_report_is_read_within_the_workspace_and_without_what_is_excluded() {
        let report = serde_json::json!({ "files": [
            { "path": ["/", "w", "io-bus", "src", "lib.rs"], "covered": 3, "coverable": 4 },
            { "path": ["/", "w", "xtask", "src", "main.rs"], "covered": 0, "coverable": 9 },
            { "path": ["/", "elsewhere", "lib.rs"], "covered": 0, "coverable": 9 },
        ]});
        assert_eq!(
            files(&report, Path::new("/w"), &["xtask/".into()]),
            [("io-bus/src/lib.rs".to_owned(), 3, 4)]
        );
    }
}
