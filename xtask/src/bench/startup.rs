// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a monitor's start costs: the same tiny guest (one byte on the serial port, then a reset; 1 vCPU, 128 MiB)
//! under reference-vmm and under the bare calls, runs interleaved so that a noisy host disturbs all alike.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use super::{host_kvm, ranks};
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::ui::{Step, say};

struct Contender {
    name: &'static str,
    argv: Vec<OsString>,
    /// Whether it writes the guest's byte; the control does not.
    speaks: bool,
    /// The contender that it is held against.
    floor: Option<usize>,
    first: Vec<f64>,
    whole: Vec<f64>,
    peak_kib: Option<u64>,
}

pub(super) fn run(runs: usize) -> Result<i32> {
    let reason = host_kvm()?;
    let vmm = cargo::reference_vmm()?;
    let floor = floor()?;
    let dir = host::workspace().join("target/xtask");
    fs::create_dir_all(&dir).context(|| format!("{} cannot be made", dir.display()))?;
    let guest = dir.join("byte-and-reset.elf");
    fs::write(
        &guest,
        guests::image::elf64(guests::boot::byte_and_reset64()),
    )
    .context(|| format!("{} cannot be written", guest.display()))?;

    let contender = |name, argv: Vec<OsString>, speaks, floor| Contender {
        name,
        argv,
        speaks,
        floor,
        first: Vec::new(),
        whole: Vec::new(),
        peak_kib: None,
    };
    let bare = |irqchip: &str| vec![floor.clone().into_os_string(), irqchip.into()];
    let ours = |irqchip: &str| -> Vec<OsString> {
        let mut argv = vec![
            vmm.clone().into_os_string(),
            "run".into(),
            "--kernel".into(),
            guest.clone().into(),
        ];
        argv.extend(["--memory", "128M", "--irqchip", irqchip].map(OsString::from));
        argv
    };
    let mut contenders = vec![
        contender("/bin/true", vec!["/bin/true".into()], false, None),
        contender("floor, no irqchip", bare("none"), true, None),
        contender("floor, split irqchip", bare("split"), true, None),
        contender("floor, in-kernel irqchip", bare("kernel"), true, None),
        contender("reference-vmm --irqchip none", ours("none"), true, Some(1)),
        contender(
            "reference-vmm --irqchip split",
            ours("split"),
            true,
            Some(2),
        ),
        contender(
            "reference-vmm --irqchip kernel",
            ours("kernel"),
            true,
            Some(3),
        ),
    ];
    // Once each, unmeasured, so that the page cache is warm and a failure is told with its words.
    for contender in &contenders {
        rehearse(contender)?;
    }
    let step = Step::begin(format!("{runs} runs of each, interleaved"));
    for _ in 0..runs {
        for contender in &mut contenders {
            let (first, whole) = measure(&contender.argv, contender.speaks)?;
            contender.first.extend(first);
            contender.whole.push(whole);
        }
    }
    step.end();
    for contender in &mut contenders {
        contender.peak_kib = peak(&contender.argv)?;
    }
    report(&mut contenders, &vmm, &reason)
}

/// The bare calls, built as the VMM is.
fn floor() -> Result<PathBuf> {
    let made = cargo::build(
        "building the floor",
        &["build", "--release", "-p", "xtask", "--bin", "floor"],
    )?;
    let found = made
        .into_iter()
        .find(|p| p.target == "floor")
        .map(|p| p.file);
    found.ok_or_else(|| Failure::new("cargo built no floor"))
}

fn command(argv: &[OsString]) -> Command {
    let (program, args) = argv
        .split_first()
        .map_or((OsString::new(), &[][..]), |(p, a)| (p.clone(), a));
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

fn rehearse(contender: &Contender) -> Result<()> {
    let output = command(&contender.argv)
        .output()
        .context(|| format!("{} does not start", contender.name))?;
    if !output.status.success() || output.stdout.is_empty() == contender.speaks {
        return Err(Failure::new(format!(
            "{} does not do its part ({}, {} bytes on stdout):\n{}",
            contender.name,
            output.status,
            output.stdout.len(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        )));
    }
    Ok(())
}

/// Milliseconds from just before the exec to the first byte, and to the end.
fn measure(argv: &[OsString], speaks: bool) -> Result<(Option<f64>, f64)> {
    let mut command = command(argv);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let begun = Instant::now();
    let mut child = command
        .spawn()
        .context(|| format!("{argv:?} does not start"))?;
    let mut first = None;
    if let Some(stdout) = child.stdout.as_mut().filter(|_| speaks) {
        let mut byte = [0];
        stdout
            .read_exact(&mut byte)
            .context(|| format!("{argv:?} said nothing"))?;
        first = Some(begun.elapsed().as_secs_f64() * 1e3);
    }
    let status = child
        .wait()
        .context(|| format!("{argv:?} cannot be waited for"))?;
    let whole = begun.elapsed().as_secs_f64() * 1e3;
    if !status.success() {
        return Err(Failure::new(format!("{argv:?} ended with {status}")));
    }
    Ok((first, whole))
}

/// The most memory that the process had resident, in KiB: read from /proc when it is about to end, where a debugger
/// may stop it. (What wait4 tells counts the parent's memory before the exec as well.)
fn peak(argv: &[OsString]) -> Result<Option<u64>> {
    let mut command = command(argv);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: ptrace is async-signal-safe, and nothing else is done between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let child = command
        .spawn()
        .context(|| format!("{argv:?} does not start"))?;
    let id = i32::try_from(child.id()).unwrap_or(0);
    let mut peak = None;
    let mut armed = false;
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes the status, which lives as long as the call; the child is ours.
        if unsafe { libc::waitpid(id, &raw mut status, 0) } != id || !libc::WIFSTOPPED(status) {
            return Ok(peak);
        }
        let mut signal = libc::WSTOPSIG(status);
        if !armed {
            // The stop at exec.
            armed = true;
            signal = 0;
            // SAFETY: takes no pointer to memory of ours; the child is stopped.
            unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, id, 0, libc::PTRACE_O_TRACEEXIT) };
        } else if status >> 16 == libc::PTRACE_EVENT_EXIT {
            signal = 0;
            let text = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            peak = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
        }
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_CONT, id, 0, signal) };
    }
}

/// Two ranks of some measurements, each as a multiple of the floor's own.
fn of_floor((low, middle): (f64, f64), floor: (f64, f64)) -> String {
    format!("{:.2}×, {:.2}×", low / floor.0, middle / floor.1)
}

fn report(contenders: &mut [Contender], vmm: &Path, kvm: &str) -> Result<i32> {
    let ms = |values: &mut Vec<f64>| {
        let (low, middle, high) = ranks(values);
        ((low, middle), format!("{middle:>7.2} ({low:.2}–{high:.2})"))
    };
    println!("{kvm}");
    println!("milliseconds from exec: median (10th–90th percentile)\n");
    println!(
        "{:<32} {:>22} {:>22} {:>10}",
        "", "first byte", "end", "peak KiB"
    );
    let mut whole_ranks = Vec::new();
    let mut first_ranks = Vec::new();
    for contender in contenders.iter_mut() {
        let (first, first_text) = ms(&mut contender.first);
        let (whole, whole_text) = ms(&mut contender.whole);
        first_ranks.push(first);
        whole_ranks.push(whole);
        let first_text = if contender.speaks {
            first_text
        } else {
            "—".into()
        };
        let peak = contender.peak_kib.map_or("?".into(), |kib| kib.to_string());
        println!(
            "{:<32} {first_text:>22} {whole_text:>22} {peak:>10}",
            contender.name
        );
    }
    println!("\ntimes its floor: 10th percentile, median\n");
    println!("{:<32} {:>22} {:>22}", "", "first byte", "end");
    for (index, contender) in contenders.iter().enumerate() {
        if let Some(floor) = contender.floor {
            println!(
                "{:<32} {:>22} {:>22}",
                contender.name,
                of_floor(first_ranks[index], first_ranks[floor]),
                of_floor(whole_ranks[index], whole_ranks[floor])
            );
        }
    }
    let size = fs::metadata(vmm)
        .context(|| format!("{} cannot be read", vmm.display()))?
        .len();
    say(format!("{} has {} KiB", vmm.display(), size / 1024));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_is_held_against_the_floors_own() {
        assert_eq!(of_floor((3.0, 5.0), (2.0, 10.0)), "1.50×, 0.50×");
    }
}
