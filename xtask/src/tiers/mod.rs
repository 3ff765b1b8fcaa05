// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask test`: the tests in tiers, by what a host must offer, and a table of what ran where.
//!
//! The name of a test's file is its tier: `tests/kvm_*.rs` wants a `/dev/kvm`, `tests/lab_*.rs` wants hardware-style
//! KVM and stock kernels, `tests/loom_*.rs` is a model built apart, and the rest wants nothing of the host.

mod run;
mod said;
mod table;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::assets::Assets;
use crate::cargo::{self, Program};
use crate::distro;
use crate::failure::{Context, Failure, Result};
use crate::guest_image;
use crate::host::{self, KvmKind};
use crate::lab;
use crate::ui::{Step, say};
use run::{Outcome, Suite};
pub(crate) use run::{RUN_COMMAND, command as run_command};

const USAGE: &str = "\
Builds and runs the tests, and says what ran where. A tier that this host cannot run is an error, unless it is waived.

Usage: cargo xtask test [OPTIONS]

What failed is told at the end, with what it said, and is in target/xtask/failed.txt as well. On a software KVM and in the
lab, where time is not to be relied on, a test that fails is run again, alone: it is told, and counts as it ends then.

  --pure         the tests that need nothing of the host: unit, property, documentation, models
  --kvm          those that need a /dev/kvm, on this host's
  --lab          those that need hardware-style KVM, and the kvm tier once more, in a lab machine each
                 (none of the three: all of them)
  --waive TIER   leave a tier out and say so; may be repeated
  -p PACKAGE     the tests of this package alone; may be repeated
  --test FILE    the tests of this file alone, such as kvm_run; may be repeated
  --kernel 6.12|6.1   the lab's kernel (6.12)
  --long         the long forms of the tests (LONG_TESTS=1)

Exit status: 0 all passed, 1 a test failed or a tier cannot run here, 125 the tests could not be run.";

/// What a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    Pure,
    Kvm,
    Lab,
}

impl Tier {
    const ALL: [Tier; 3] = [Tier::Pure, Tier::Kvm, Tier::Lab];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Tier::Pure => "pure",
            Tier::Kvm => "kvm",
            Tier::Lab => "lab",
        }
    }

    fn parse(text: &str) -> Result<Tier> {
        let found = Tier::ALL.into_iter().find(|tier| tier.name() == text);
        found.ok_or_else(|| Failure::usage(format!("there is no tier {text}: pure, kvm or lab")))
    }

    /// The tier of a test program; none for a model, which means something in its own build only.
    fn of(program: &Program) -> Option<Tier> {
        match program.kind.as_str() {
            "test" if program.target.starts_with("loom_") => None,
            "test" if program.target.starts_with("kvm_") => Some(Tier::Kvm),
            "test" if program.target.starts_with("lab_") => Some(Tier::Lab),
            _ => Some(Tier::Pure),
        }
    }
}

struct Wanted {
    selected: Vec<Tier>,
    waived: Vec<Tier>,
    packages: Vec<String>,
    /// Test files, or all.
    tests: Vec<String>,
    kernel: crate::assets::Series,
}

impl Wanted {
    fn has(&self, tier: Tier) -> bool {
        self.selected.contains(&tier) && !self.waived.contains(&tier)
    }

    /// The packages, as cargo is told of them.
    fn package_args(&self) -> Vec<&str> {
        if self.packages.is_empty() {
            return vec!["--workspace"];
        }
        self.packages
            .iter()
            .flat_map(|p| ["-p", p.as_str()])
            .collect()
    }

    fn has_test(&self, name: &str) -> bool {
        self.tests.is_empty() || self.tests.iter().any(|test| test == name)
    }
}

/// `cargo xtask test`.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    use lexopt::prelude::*;
    let mut wanted = Wanted {
        selected: Vec::new(),
        waived: Vec::new(),
        packages: Vec::new(),
        tests: Vec::new(),
        kernel: crate::assets::Series::V6_12,
    };
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("pure") => wanted.selected.push(Tier::Pure),
            Long("kvm") => wanted.selected.push(Tier::Kvm),
            Long("lab") => wanted.selected.push(Tier::Lab),
            Long("waive") => wanted.waived.push(Tier::parse(&parser.value()?.string()?)?),
            Short('p') | Long("package") => wanted.packages.push(parser.value()?.string()?),
            Long("test") => {
                let name = parser.value()?.string()?;
                if !test_files(&host::workspace())?.contains(&name) {
                    let what = format!("--test {name}: no package has a tests/{name}.rs");
                    return Err(Failure::usage(what));
                }
                wanted.tests.push(name);
            }
            Long("kernel") => {
                wanted.kernel = crate::assets::Series::parse(&parser.value()?.string()?)?
            }
            // SAFETY: no other thread has been started yet.
            Long("long") => unsafe { env::set_var("LONG_TESTS", "1") },
            Short('h') | Long("help") => {
                crate::ui::show(USAGE);
                return Ok(0);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if wanted.selected.is_empty() {
        wanted.selected = Tier::ALL.to_vec();
    }
    let failed = host::workspace().join(FAILED_FILE);
    // What is there is of another run.
    let _ = fs::remove_file(&failed);
    let (status, text) = match tested(&wanted) {
        Ok(outcomes) => (
            Ok(i32::from(outcomes.iter().any(|o| !o.is_good()))),
            table::failures(&outcomes),
        ),
        Err(failure) => {
            let text = format!("xtask test: {failure}\n");
            (Err(failure), text)
        }
    };
    if !text.is_empty() {
        keep(&failed, &text);
    }
    status
}

/// What failed, and what it said, for who shows it behind all else (`.ci/run`); not there after a run that was good.
const FAILED_FILE: &str = "target/xtask/failed.txt";

fn keep(file: &Path, text: &str) {
    let made = file.parent().map_or(Ok(()), fs::create_dir_all);
    // It has been said already: no more fails by this.
    if let Err(error) = made.and_then(|()| fs::write(file, text)) {
        say(format!("{} cannot be written: {error}", file.display()));
    }
}

/// Runs them, and prints the table.
fn tested(wanted: &Wanted) -> Result<Vec<Outcome>> {
    let begun = Instant::now();
    let (kvm, reason) = host::kvm();
    if wanted.has(Tier::Kvm) && kvm == KvmKind::None {
        return Err(Failure::new(format!(
            "the kvm tier cannot run on this host: {reason}. `--waive kvm` leaves it out (in the lab it runs anyway)"
        ))
        .with_status(1));
    }
    let outcomes = run(wanted, kvm)?;
    table::print(&outcomes, &wanted.waived, begun.elapsed());
    Ok(outcomes)
}

fn run(wanted: &Wanted, kvm: KvmKind) -> Result<Vec<Outcome>> {
    let mut build = vec!["test", "--no-run"];
    build.extend(wanted.package_args());
    for test in &wanted.tests {
        build.extend(["--test", test]);
    }
    let programs: Vec<_> = cargo::build("building the tests", &build)?
        .into_iter()
        .filter(|program| program.test)
        .collect();
    let of_tier = |tier| {
        programs
            .iter()
            .filter(move |p| Tier::of(p) == Some(tier))
            .cloned()
            .collect::<Vec<_>>()
    };
    let (lab, kvm_tests) = (of_tier(Tier::Lab), of_tier(Tier::Kvm));
    let mut outcomes = Vec::new();
    // The monitor is built where a test may want it.
    let monitor =
        if wanted.packages.is_empty() || wanted.packages.iter().any(|p| p == "reference-vmm") {
            vec![(
                "REFERENCE_VMM_BIN".to_owned(),
                cargo::reference_vmm()?.into_os_string(),
            )]
        } else {
            Vec::new()
        };

    if wanted.has(Tier::Pure) {
        let suite = Suite {
            tier: Tier::Pure,
            place: "this host".into(),
            args: Vec::new(),
            env: monitor.clone(),
        };
        outcomes.extend(run_here(&suite, kvm, &of_tier(Tier::Pure)));
        if wanted.tests.is_empty() {
            outcomes.push(run::documentation(&wanted.package_args())?);
        }
        outcomes.extend(models(wanted)?);
    }
    if wanted.has(Tier::Kvm) {
        let place = match kvm {
            KvmKind::Hardware => "this host's hardware KVM",
            _ => "this host's software KVM",
        };
        let suite = Suite {
            tier: Tier::Kvm,
            place: place.into(),
            args: Vec::new(),
            env: monitor.clone(),
        };
        outcomes.extend(run_here(&suite, kvm, &kvm_tests));
    }
    if wanted.has(Tier::Lab) && !(lab.is_empty() && kvm_tests.is_empty()) {
        outcomes.extend(in_lab(wanted, &kvm_tests, &lab, monitor)?);
    }
    Ok(outcomes)
}

/// Programs on this host. Where guest code is interpreted, the host is somebody's virtual machine: the tests' vCPUs, devices, peers
/// and threads share what CPUs there are with all else that runs there, and a wait that is long enough everywhere else, or an order
/// of two threads that is seen nowhere else, comes once in some thousand tests. So what failed is run again, and told.
fn run_here(suite: &Suite, kvm: KvmKind, programs: &[Program]) -> Vec<Outcome> {
    match kvm {
        KvmKind::Hardware => suite.run(programs),
        _ => suite.run_and_again(programs),
    }
}

/// The loom models: built with `--cfg loom` in a target folder of their own, or all else would be built again.
fn models(wanted: &Wanted) -> Result<Vec<Outcome>> {
    let mut args: Vec<String> = [
        "test",
        "--no-run",
        "--release",
        "--target-dir",
        "target/loom",
    ]
    .map(String::from)
    .into();
    let mut found = 0;
    for (package, test) in model_files(&host::workspace())? {
        let wanted_package = wanted.packages.is_empty() || wanted.packages.contains(&package);
        if wanted_package && wanted.has_test(&test) {
            args.extend(["-p".into(), package, "--test".into(), test]);
            found += 1;
        }
    }
    if found == 0 {
        return Ok(Vec::new());
    }
    let step = Step::begin("building the models");
    let flags = format!("{} --cfg loom", env::var("RUSTFLAGS").unwrap_or_default());
    let output = cargo::command()
        .args(&args)
        .arg("--message-format=json-render-diagnostics")
        .env("RUSTFLAGS", flags.trim())
        // A shipped program's link time buys a model nothing.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .stderr(std::process::Stdio::inherit())
        .output()
        .context(|| "cargo does not start".into())?;
    if !output.status.success() {
        return Err(Failure::new("the models do not build"));
    }
    step.end();
    let programs: Vec<_> = cargo::programs(&output.stdout)
        .into_iter()
        .filter(|p| p.target.starts_with("loom_"))
        .collect();
    let preemptions = env::var_os("LOOM_MAX_PREEMPTIONS").unwrap_or_else(|| "3".into());
    let suite = Suite {
        tier: Tier::Pure,
        place: "this host, models".into(),
        args: Vec::new(),
        env: vec![("LOOM_MAX_PREEMPTIONS".into(), preemptions)],
    };
    Ok(suite.run(&programs))
}

/// Every `tests/loom_*.rs`, with its package.
fn model_files(workspace: &Path) -> Result<Vec<(String, String)>> {
    let mut files = all_test_files(workspace)?;
    files.retain(|(_, test)| test.starts_with("loom_"));
    Ok(files)
}

/// The names of all `tests/*.rs`, each once.
pub(crate) fn test_files(workspace: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> = all_test_files(workspace)?
        .into_iter()
        .filter(|(package, _)| package != "xtask")
        .map(|(_, test)| test)
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// Every `tests/*.rs`, with its package.
fn all_test_files(workspace: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(workspace)
        .context(|| format!("{} cannot be read", workspace.display()))?
        .flatten()
    {
        let package = entry.file_name().to_string_lossy().into_owned();
        for test in fs::read_dir(entry.path().join("tests"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Some(name) = test.file_name().to_string_lossy().strip_suffix(".rs") {
                found.push((package.clone(), name.to_owned()));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The test programs that want a Debian for a guest, which takes a minute to make where the cache has none.
const DISTRO_TESTS: [&str; 2] = ["lab_distro", "lab_snapshot_load"];

/// The kvm tier and the lab tier, each in a lab machine of its own.
fn in_lab(
    wanted: &Wanted,
    kvm: &[Program],
    lab: &[Program],
    env: Vec<(String, OsString)>,
) -> Result<Vec<Outcome>> {
    let assets = Assets::open(false)?;
    let kernels = guest_image::test_kernels(&assets)?;
    let place = format!("the lab ({} kvm_amd)", wanted.kernel.name());
    let mut named = env;
    named.push(("LAB_KERNELS".to_owned(), kernels.into_os_string()));
    named.push(("LAB_GDB".to_owned(), assets.gdb()?.into_os_string()));
    named.push(("LAB_BUSYBOX".to_owned(), assets.busybox()?.into_os_string()));
    named.push((
        "LAB_E2FSPROGS".to_owned(),
        assets.e2fsprogs()?.into_os_string(),
    ));
    // For guests, as a program of theirs.
    let guest_io = cargo::static_program("xtask", "guest_io")?;
    named.push(("LAB_GUEST_IO".to_owned(), guest_io.into_os_string()));
    let mut disk = None;
    if lab
        .iter()
        .any(|program| DISTRO_TESTS.contains(&program.target.as_str()))
    {
        let distro = distro::image(&assets)?;
        let (linux, initrd) = assets.installer()?;
        named.extend([
            ("LAB_DISTRO_DISK".to_owned(), distro::LAB_DISK.into()),
            ("LAB_DISTRO_KERNEL".to_owned(), distro.kernel.into()),
            ("LAB_DISTRO_INITRD".to_owned(), distro.initrd.into()),
            ("LAB_INSTALLER_KERNEL".to_owned(), linux.into()),
            ("LAB_INSTALLER_INITRD".to_owned(), initrd.into()),
        ]);
        disk = Some(distro.disk);
    }
    let mut env: Vec<_> = named
        .into_iter()
        .map(|(name, value)| {
            let mut pair = OsString::from(name);
            pair.push("=");
            pair.push(value);
            pair
        })
        .collect();
    if let Some(long) = env::var_os("LONG_TESTS") {
        let mut pair = OsString::from("LONG_TESTS=");
        pair.push(long);
        env.push(pair);
    }
    let options = lab::Options {
        kernel: wanted.kernel,
        memory_mib: 4096,
        time_limit: Duration::from_secs(if env::var_os("LONG_TESTS").is_some() {
            4 * 3600
        } else {
            // Four times what a tier takes on two quiet cores.
            30 * 60
        }),
        env,
        cwd: Some(host::workspace()),
        ..lab::Options::default()
    };
    let with_disk = lab::Options {
        disk,
        ..options.clone()
    };
    // A machine each, of one CPU each, side by side: what a tier leaves behind in its machine is no other tier's.
    if kvm.is_empty() || lab.is_empty() {
        return match kvm.is_empty() {
            true => in_machines(Tier::Lab, lab, &place, "", &with_disk),
            false => in_machines(Tier::Kvm, kvm, &place, "", &options),
        };
    }
    thread::scope(|scope| {
        let lab = scope.spawn(|| in_machines(Tier::Lab, lab, &place, "lab | ", &with_disk));
        let mut all = in_machines(Tier::Kvm, kvm, &place, "kvm | ", &options)?;
        match lab.join() {
            Ok(outcomes) => all.extend(outcomes?),
            Err(_) => return Err(Failure::new("the lab tier's thread panicked")),
        }
        Ok(all)
    })
}

/// How many machines a tier may take in the lab.
const MACHINES: usize = 3;

/// A tier's programs in a lab machine; what failed there is run again in a new one, and told.
///
/// The emulated machine is the reason: with two CPUs, QEMU's SVM walks page tables as if it were still in the other
/// world now and then (the guest's without nested paging, or the host's with it), after which a guest dies of a triple
/// fault, the machine's own kernel panics, or either stands still: one boot in fifteen of a guest with 4 vCPUs. With one
/// CPU, which the tiers take, it was not seen. What fails by itself fails in the next machine too.
fn in_machines(
    tier: Tier,
    programs: &[Program],
    place: &str,
    label: &'static str,
    options: &lab::Options,
) -> Result<Vec<Outcome>> {
    let file = list_file(tier)?;
    let mut done: Vec<Option<Outcome>> = vec![None; programs.len()];
    let mut trouble = None;
    for machine in 0..MACHINES {
        let left: Vec<usize> = (0..programs.len())
            .filter(|index| !done[*index].as_ref().is_some_and(Outcome::is_good))
            .collect();
        if left.is_empty() {
            break;
        }
        let wanted: Vec<(&Program, &[String])> = left
            .iter()
            .map(|index| {
                let tests = done[*index].as_ref().map(Outcome::left).unwrap_or_default();
                (&programs[*index], tests)
            })
            .collect();
        if machine == 0 {
            say(format!("{label}{} test programs in {place} …", left.len()));
        } else {
            say(format!(
                "{label}FAILED in {place}, and run again in a new machine:"
            ));
            for (program, tests) in &wanted {
                let name = run::name_of(program);
                say(format!("{label}  {name} {}", tests.join(" ")));
            }
        }
        let list = run::List::of(tier, &wanted, place).write(&file)?;
        let argv: Vec<OsString> = cargo::inside_lab(RUN_COMMAND)
            .into_iter()
            .chain([list.clone().into_os_string()])
            .collect();
        let (outcomes, status) = run::collect(options, &argv, label);
        let _ = fs::remove_file(&list);
        // They come in the list's order; the machine may have ended before the last.
        for (index, outcome) in left.iter().zip(outcomes) {
            done[*index] = Some(match done[*index].take() {
                None => outcome,
                Some(before) => before.followed_by(outcome),
            });
        }
        trouble = match status {
            Ok(0) => None,
            Ok(status) => Some(format!("the lab's runner ended with {status}")),
            Err(failure) => {
                say(format!("{failure}"));
                Some(failure.to_string())
            }
        };
    }
    let missing = done.iter().any(Option::is_none);
    let mut all: Vec<_> = done.into_iter().flatten().collect();
    if missing {
        let trouble = trouble.unwrap_or_else(|| "not all programs were run".to_owned());
        all.push(Outcome::broken(tier, place, &trouble));
    }
    Ok(all)
}

/// Where the list of programs is put for the lab to read: a name of this process's own.
fn list_file(tier: Tier) -> Result<PathBuf> {
    let dir = host::workspace().join("target/xtask");
    fs::create_dir_all(&dir).context(|| format!("{} cannot be made", dir.display()))?;
    let name = format!("lab-tests-{}-{}.json", tier.name(), std::process::id());
    Ok(dir.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_file_is_its_tier() {
        let program = |kind: &str, target: &str| Program {
            package: "p".into(),
            package_dir: "/p".into(),
            target: target.into(),
            kind: kind.into(),
            test: true,
            file: "/f".into(),
        };
        assert_eq!(Tier::of(&program("test", "kvm_x")), Some(Tier::Kvm));
        assert_eq!(Tier::of(&program("test", "lab_x")), Some(Tier::Lab));
        assert_eq!(Tier::of(&program("test", "loom_x")), None);
        assert_eq!(Tier::of(&program("test", "model")), Some(Tier::Pure));
        // A crate's own unit tests, whatever its name.
        assert_eq!(Tier::of(&program("lib", "kvm_core")), Some(Tier::Pure));
    }
}
