// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs cargo on this workspace and learns from its messages which programs it made.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::ui::Step;

/// A program that cargo made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) package: String,
    pub(crate) package_dir: PathBuf,
    /// The target's name: `kvm_exits` for `tests/kvm_exits.rs`.
    pub(crate) target: String,
    /// The target's kind: `lib`, `bin`, `test`, `example`…
    pub(crate) kind: String,
    /// Whether it is a test harness.
    pub(crate) test: bool,
    pub(crate) file: PathBuf,
}

/// cargo, at the workspace's root, free of what the cargo that runs us has set.
pub(crate) fn command() -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(host::workspace()).stdin(Stdio::null());
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST_")
            || name.starts_with("CARGO_BIN_")
        {
            command.env_remove(name);
        }
    }
    command
}

/// Builds, with cargo's own progress on stderr; the programs that were asked for.
pub(crate) fn build(what: &str, args: &[&str]) -> Result<Vec<Program>> {
    let step = Step::begin(what);
    let output = command()
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context(|| "cargo does not start".into())?;
    if !output.status.success() {
        return Err(Failure::new(format!(
            "cargo {} failed ({})",
            args.join(" "),
            output.status
        )));
    }
    step.end();
    Ok(programs(&output.stdout))
}

/// The programs that cargo's messages name.
pub(crate) fn programs(messages: &[u8]) -> Vec<Program> {
    String::from_utf8_lossy(messages)
        .lines()
        .filter_map(program)
        .collect()
}

fn program(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let file = PathBuf::from(message["executable"].as_str()?);
    let manifest = Path::new(message["manifest_path"].as_str()?);
    let package_dir = manifest.parent()?.to_path_buf();
    Some(Program {
        // A package's folder bears its name in this workspace.
        package: package_dir.file_name()?.to_str()?.to_owned(),
        package_dir,
        target: message["target"]["name"].as_str()?.to_owned(),
        kind: message["target"]["kind"][0].as_str()?.to_owned(),
        test: message["profile"]["test"].as_bool()?,
        file,
    })
}

/// What the VMM is built for, named so that its flags are not also those of procedural macros, which
/// cannot be linked statically.
const TARGET: &str = "x86_64-unknown-linux-gnu";

const BUILD_USAGE: &str = "\
Builds reference-vmm as it is shipped and copies it to target/reference-vmm: optimised, linked statically. A start of
1.6 ms is 0.5 ms longer when the dynamic loader has to find libc first (cargo xtask bench startup).

Usage: cargo xtask build";

/// `cargo xtask build`.
pub(crate) fn build_command(args: &[OsString]) -> Result<i32> {
    if let Some(arg) = args.first() {
        if arg == "--help" || arg == "-h" {
            crate::ui::show(BUILD_USAGE);
            return Ok(0);
        }
        return Err(Failure::usage(format!("build takes no {}", arg.display())));
    }
    let copy = host::workspace().join("target/reference-vmm");
    let made = reference_vmm()?;
    // Beside it first: the old one may be running, and a copy in place would fail.
    let new = copy.with_extension("new");
    std::fs::copy(&made, &new)
        .and_then(|_| std::fs::rename(&new, &copy))
        .context(|| format!("cannot copy {} to {}", made.display(), copy.display()))?;
    println!("{}", copy.display());
    Ok(0)
}

/// The VMM as it is shipped: static, and position-independent all the same.
pub(crate) fn reference_vmm() -> Result<PathBuf> {
    static_program("reference-vmm", "reference-vmm")
}

/// A program of a package, optimised and static.
pub(crate) fn static_program(package: &str, program: &str) -> Result<PathBuf> {
    let flags = format!(r#"target.{TARGET}.rustflags=["-Ctarget-feature=+crt-static"]"#);
    let made = build(
        &format!("building {program}"),
        &[
            "build",
            "--release",
            "-p",
            package,
            "--bin",
            program,
            "--target",
            TARGET,
            "--config",
            &flags,
        ],
    )?;
    made.into_iter()
        .find(|p| p.target == program && p.kind == "bin")
        .map(|p| p.file)
        .ok_or_else(|| Failure::new(format!("cargo built no {program}")))
}

/// This program, as a command inside the lab sees it: a copy that a rebuild on the host does not change.
pub(crate) fn inside_lab(command: &str) -> Vec<OsString> {
    vec!["/run/lab-agent".into(), command.into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_found_in_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/w/io-bus/Cargo.toml","target":{"kind":["test"],"name":"kvm_x"},"profile":{"test":true},"executable":"/w/target/debug/deps/kvm_x-1"}"#;
        let found = program(line);
        assert!(found.is_some_and(|p| p.package == "io-bus"
            && p.target == "kvm_x"
            && p.test
            && p.kind == "test"));
        for other in [
            "",
            "x",
            r#"{"reason":"build-finished"}"#,
            r#"{"reason":"compiler-artifact","executable":null}"#,
        ] {
            assert_eq!(program(other), None);
        }
    }
}
