// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Linux guest's boot, monitors compared: in the lab with a clock that counts instructions, so that the figures
//! are the same in every run. Guest time at init is the guest's own uptime; start to end is the lab's clock.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::assets::{Assets, Flavour, Series};
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::guest_image;
use crate::lab;
use crate::ui::{Step, say};

/// The command line's word for the part inside the lab: not for people.
pub(crate) const RUN_COMMAND: &str = "bench-boot-run";

const RESULT_MARK: &str = "xtask-boot: ";

const CMDLINE: &str = "console=ttyS0 quiet";

/// One boot: milliseconds of guest time at init, and of the lab's time from start to end.
type Figures = (f64, f64);

pub(super) fn run(rounds: usize) -> Result<i32> {
    let assets = Assets::open(false)?;
    let kernel = assets.kernel(Series::V6_1, Flavour::Cloud)?;
    let vmlinux = kernel.vmlinux();
    let initrd = guest_image::initrd(&assets, &[kernel], guest_image::Contents::Plain)?;
    let vmm = cargo::reference_vmm()?;
    let qemu = assets.qemu()?.command();

    let ours: Vec<OsString> = [
        vmm.as_os_str(),
        "run".as_ref(),
        "--kernel".as_ref(),
        vmlinux.as_os_str(),
        "--initrd".as_ref(),
        initrd.as_os_str(),
        "--cmdline".as_ref(),
        CMDLINE.as_ref(),
        "--memory".as_ref(),
        "256M".as_ref(),
    ]
    .map(OsString::from)
    .into();
    let contenders = [
        ("reference-vmm", ours),
        ("QEMU microvm", microvm(&qemu, &vmlinux, &initrd, CMDLINE)),
    ];

    let mut argv = cargo::inside_lab(RUN_COMMAND);
    for (_, words) in &contenders {
        argv.push(words.len().to_string().into());
        argv.extend(words.iter().cloned());
    }
    let step = Step::begin(format!(
        "{rounds} boots of each in the lab, counting instructions"
    ));
    let mut results = vec![Vec::<Figures>::new(); contenders.len()];
    for number in 1..=rounds {
        for (of, figures) in results.iter_mut().zip(round(&argv, contenders.len())?) {
            of.push(figures);
        }
        for ((name, _), of) in contenders.iter().zip(&results) {
            let (init, whole) = of.last().copied().unwrap_or_default();
            say(format!(
                "round {number}, {name}: init at {init:.0} ms, end at {whole:.1} ms"
            ));
        }
    }
    step.end();
    println!("\nmilliseconds, median of {rounds} (spread from least to most)\n");
    println!(
        "{:<16} {:>24} {:>24}",
        "", "guest time at init", "start to end"
    );
    let mut middles = Vec::new();
    for ((name, _), figures) in contenders.iter().zip(results.iter()) {
        let init = summary(figures.iter().map(|f| f.0));
        let whole = summary(figures.iter().map(|f| f.1));
        println!("{name:<16} {:>24} {:>24}", init.1, whole.1);
        middles.push((init.0, whole.0));
    }
    if let [ours, theirs] = middles[..] {
        println!(
            "\nreference-vmm takes {:.3}× to init and {:.3}× in all",
            ours.0 / theirs.0,
            ours.1 / theirs.1
        );
    }
    Ok(0)
}

/// A lab that takes longer hangs: with the counting clock a machine that runs QEMU within QEMU was seen to, most often
/// at the fourth boot.
const ROUND_LIMIT: Duration = Duration::from_secs(120);
const ATTEMPTS: usize = 3;

/// One lab machine, in which each contender boots once unmeasured and once measured.
fn round(argv: &[OsString], contenders: usize) -> Result<Vec<Figures>> {
    let options = lab::Options {
        icount: true,
        time_limit: ROUND_LIMIT,
        ..lab::Options::default()
    };
    let output = in_lab(&options, argv)?;
    let figures: Vec<_> = output.lines().filter_map(parse_result).collect();
    match figures.len() == contenders {
        true => Ok(figures),
        false => Err(Failure::new("the boots in the lab told too little")),
    }
}

/// What a command in a lab of its own says on stdout. A lab that hangs is begun anew.
pub(super) fn in_lab(options: &lab::Options, argv: &[OsString]) -> Result<String> {
    for attempt in 1..=ATTEMPTS {
        let output = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&output);
        let sink = move |stream: lab::Stream, bytes: &[u8]| match stream {
            lab::Stream::Stdout => noted
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(bytes),
            lab::Stream::Stderr => {
                let _ = io::stderr().write_all(bytes); // a closed stderr has no reader to miss it
            }
        };
        match lab::run_with(options, argv, Box::new(sink)) {
            Ok(0) => {
                let output = output.lock().unwrap_or_else(PoisonError::into_inner);
                return Ok(String::from_utf8_lossy(&output).into_owned());
            }
            Ok(status) => {
                return Err(Failure::new(format!(
                    "the guests in the lab ended with status {status}"
                )));
            }
            Err(failure) if failure.status() == lab::STATUS_TIME_LIMIT => {
                say(format!("attempt {attempt}: {failure}"));
            }
            Err(failure) => return Err(failure),
        }
    }
    Err(Failure::new(format!("the lab hung {ATTEMPTS} times")))
}

fn summary(values: impl Iterator<Item = f64>) -> (f64, String) {
    let mut values: Vec<f64> = values.collect();
    let (_, middle, _) = super::ranks(&mut values);
    let spread = values
        .last()
        .zip(values.first())
        .map_or(f64::NAN, |(most, least)| most - least);
    (
        middle,
        format!(
            "{middle:.0} ({spread:.0}, {:.2} %)",
            spread / middle * 100.0
        ),
    )
}

/// QEMU's own microVM without what the guest does not miss (PIT, PIC). Its RTC stays: without one Debian's kernel
/// waits 1.2 s for it.
pub(super) fn microvm(
    qemu: &Command,
    vmlinux: &Path,
    initrd: &Path,
    cmdline: &str,
) -> Vec<OsString> {
    // Its libraries, and only then the program: the lab's command has no environment of ours.
    let mut argv: Vec<OsString> = vec!["/usr/bin/env".into()];
    for (name, value) in qemu.get_envs() {
        let mut pair = name.to_owned();
        pair.push("=");
        pair.push(value.unwrap_or_default());
        argv.push(pair);
    }
    argv.push(qemu.get_program().to_owned());
    argv.extend(qemu.get_args().map(OsString::from));
    for word in [
        "-M",
        "microvm,acpi=on,rtc=on,pit=off,pic=off,isa-serial=on",
        "-nodefaults",
        "-no-user-config",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-m",
        "256M",
        "-no-reboot",
        "-display",
        "none",
        "-monitor",
        "none",
        "-serial",
        "stdio",
        "-append",
        cmdline,
        "-kernel",
    ] {
        argv.push(word.into());
    }
    argv.push(vmlinux.into());
    argv.push("-initrd".into());
    argv.push(initrd.into());
    argv
}

/// Inside the lab: for each contender the count of its words and the words.
pub(crate) fn run_command(args: Vec<OsString>) -> Result<i32> {
    let number = |word: Option<OsString>| word.and_then(|w| w.to_str()?.parse::<usize>().ok());
    let mut args = args.into_iter();
    let mut contenders = Vec::new();
    while let Some(count) = number(args.next()) {
        contenders.push(args.by_ref().take(count).collect::<Vec<_>>());
    }
    // Once each unmeasured: the files come over 9p the first time.
    for contender in &contenders {
        boot(contender)?;
    }
    for contender in &contenders {
        let (init, whole) = boot(contender)?;
        println!("{RESULT_MARK}{init} {whole}");
    }
    Ok(0)
}

fn boot(argv: &[OsString]) -> Result<Figures> {
    let (program, args) = argv
        .split_first()
        .ok_or_else(|| Failure::usage("a contender has no words"))?;
    let begun = Instant::now();
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context(|| format!("{} does not start", program.display()))?;
    let whole = begun.elapsed().as_secs_f64() * 1e3;
    let console = String::from_utf8_lossy(&output.stdout);
    let init = console.lines().find_map(|line| {
        line.split_once("guest: init ")?
            .1
            .trim()
            .parse::<f64>()
            .ok()
    });
    match init {
        Some(seconds) if output.status.success() => Ok((seconds * 1e3, whole)),
        _ => Err(Failure::new(format!(
            "{} did not boot ({}):\n{console}\n{}",
            program.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ))),
    }
}

fn parse_result(line: &str) -> Option<Figures> {
    let (init, whole) = line.strip_prefix(RESULT_MARK)?.split_once(' ')?;
    Some((init.parse().ok()?, whole.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_back() {
        assert_eq!(
            parse_result("xtask-boot: 1350 1770.25"),
            Some((1350.0, 1770.25))
        );
        assert_eq!(parse_result("xtask-boot: 1"), None);
        assert_eq!(parse_result("other"), None);
    }
}
