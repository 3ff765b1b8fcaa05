// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A whole Debian from the monitor's start to its login prompt, monitors compared. Each boot has a lab machine of its
//! own, so that each begins with the same disk and with empty caches.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Ended, boot};
use crate::assets::Assets;
use crate::cargo;
use crate::distro::{self, Distro, LAB_DISK, LABEL};
use crate::failure::{Context, Failure, Result};
use crate::lab;
use crate::ui::{Step, say};

/// The command line's word for the part inside the lab: not for people.
pub(crate) const RUN_COMMAND: &str = "bench-login-run";

const RESULT_MARK: &str = "xtask-login: ";

/// What the console says where a user may log in.
const PROMPT: &[u8] = b"guest login: ";

const TAP: &str = "bench0";
const MEMORY: &str = "512M";

/// A machine's start, and systemd's in an emulated machine within it.
const LIMIT: Duration = Duration::from_secs(600);

pub(super) fn run(rounds: usize) -> Result<i32> {
    let assets = Assets::open(false)?;
    let image = distro::image(&assets)?;
    let vmm = cargo::reference_vmm()?;
    let tool = cargo::static_program("xtask", "guest_io")?;
    let qemu = assets.qemu()?.command();
    let cmdline = format!("root=LABEL={LABEL} console=ttyS0 quiet systemd.log_color=0");
    let contenders = [
        ("reference-vmm", ours(&vmm, &image, &cmdline)),
        ("QEMU microvm", theirs(&qemu, &image, &cmdline)),
    ];
    let step = Step::begin(format!("{rounds} logins of each, a lab machine each"));
    let mut results = vec![Vec::<f64>::new(); contenders.len()];
    for number in 1..=rounds {
        for ((name, words), of) in contenders.iter().zip(&mut results) {
            let mut argv = cargo::inside_lab(RUN_COMMAND);
            argv.push(tool.clone().into());
            argv.extend(words.iter().cloned());
            let seconds = login(&argv, &image.disk)?;
            say(format!("round {number}, {name}: {seconds:.1} s"));
            of.push(seconds);
        }
    }
    step.end();
    println!("\nseconds from start to login, median of {rounds} (spread from least to most)\n");
    let mut middles = Vec::new();
    for ((name, _), of) in contenders.iter().zip(&mut results) {
        let (_, middle, _) = super::ranks(of);
        let spread = of.last().zip(of.first()).map_or(f64::NAN, |(a, b)| a - b);
        println!(
            "{name:<16} {middle:>8.1} ({:.1} %)",
            spread / middle * 100.0
        );
        middles.push(middle);
    }
    if let [ours, theirs] = middles[..] {
        println!("\nreference-vmm takes {:.3}×", ours / theirs);
    }
    Ok(0)
}

fn ours(vmm: &Path, image: &Distro, cmdline: &str) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![vmm.into(), "run".into(), "--rng".into()];
    for (flag, value) in [
        ("--kernel", image.kernel.as_os_str().to_owned()),
        ("--initrd", image.initrd.as_os_str().to_owned()),
        ("--cmdline", cmdline.into()),
        ("--memory", MEMORY.into()),
        ("--disk", format!("path={LAB_DISK}").into()),
        ("--net", format!("tap={TAP}").into()),
    ] {
        words.push(flag.into());
        words.push(value);
    }
    words
}

/// QEMU at its best: io_uring, and a thread of its own for the disk.
fn theirs(qemu: &Command, image: &Distro, cmdline: &str) -> Vec<OsString> {
    let mut words = boot::microvm(qemu, &image.kernel, &image.initrd, cmdline);
    for word in [
        "-m",
        MEMORY,
        "-global",
        "virtio-mmio.force-legacy=false",
        "-object",
        "iothread,id=disk",
        "-drive",
        &format!("file={LAB_DISK},if=none,id=disk,format=raw,cache=writeback,aio=io_uring"),
        "-device",
        "virtio-blk-device,drive=disk,iothread=disk",
        "-netdev",
        &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"),
        "-device",
        "virtio-net-device,netdev=net",
        "-device",
        "virtio-rng-device",
    ] {
        words.push(word.into());
    }
    words
}

fn login(argv: &[OsString], disk: &Path) -> Result<f64> {
    let options = lab::Options {
        time_limit: LIMIT,
        memory_mib: 1536,
        disk: Some(disk.to_owned()),
        ..lab::Options::default()
    };
    let output = boot::in_lab(&options, argv)?;
    let seconds = output.lines().find_map(parse_result);
    seconds.ok_or_else(|| Failure::new("the boot in the lab told nothing"))
}

fn parse_result(line: &str) -> Option<f64> {
    line.strip_prefix(RESULT_MARK)?.trim().parse().ok()
}

/// Inside the lab: the program that makes the tap, and the contender's words.
pub(crate) fn run_command(args: Vec<OsString>) -> Result<i32> {
    let mut args = args.into_iter();
    let tool = args.next().ok_or_else(|| Failure::usage("no program"))?;
    super::make_tap(&tool, TAP)?;
    let program = args
        .next()
        .ok_or_else(|| Failure::usage("a contender has no words"))?;
    let begun = Instant::now();
    let child = Command::new(&program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = Ended(child.context(|| format!("{} does not start", program.display()))?);
    let mut said = Vec::new();
    if let Some(mut out) = child.0.stdout.take() {
        let mut some = [0; 4096];
        while !said.windows(PROMPT.len()).any(|window| window == PROMPT) {
            match out.read(&mut some) {
                Ok(read @ 1..) => said.extend_from_slice(some.get(..read).unwrap_or_default()),
                _ => {
                    return Err(Failure::new(format!(
                        "{} ended before a login:\n{}",
                        program.display(),
                        String::from_utf8_lossy(&said)
                    )));
                }
            }
        }
    }
    println!("{RESULT_MARK}{}", begun.elapsed().as_secs_f64());
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_back() {
        assert_eq!(parse_result("xtask-login: 21.5"), Some(21.5));
        assert_eq!(parse_result("guest login: "), None);
    }
}
