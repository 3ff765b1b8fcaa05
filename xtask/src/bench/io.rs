// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Linux guest's disk, network and vsock, monitors compared: the same guest with the same program
//! (`src/bin/guest_io.rs`) in the lab, whose clock counts instructions, so that the host's other load is not in the
//! figures. The disk is a file in memory.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Ended, boot};
use crate::assets::{Assets, Flavour, Series};
use crate::cargo;
use crate::cpio::Archive;
use crate::failure::{Context, Failure, Result};
use crate::guest_image::{self, Contents};
use crate::lab;
use crate::ui::{Step, say};

/// The command line's word for the part inside the lab: not for people.
pub(crate) const RUN_COMMAND: &str = "bench-io-run";

const RESULT_MARK: &str = "xtask-io: ";

const CMDLINE: &str = "console=ttyS0 quiet \
    guest.modules=virtio_blk,virtio_net,vmw_vsock_virtio_transport guest.address=192.168.127.2 guest.run=guest-io";

/// In the lab's memory.
const DISK: &str = "/dev/shm/disk";
const DISK_LEN: u64 = 128 << 20;
const VSOCK: &str = "/run/bench.vsock";
const TAP: &str = "bench0";

/// A round in the lab: the machine's start and a boot of each contender.
const ROUND_LIMIT: Duration = Duration::from_secs(900);

/// What a contender is, and its words. `vsock` of the host's side follows from it.
struct Contender {
    name: &'static str,
    words: Vec<OsString>,
    /// Its vsock is a unix socket, or the lab kernel's own.
    unix: bool,
}

/// The program that does what is measured inside a guest: where it is, and its bytes.
pub(super) fn guest_io() -> Result<(PathBuf, Vec<u8>)> {
    let tool = cargo::static_program("xtask", "guest_io")?;
    let bytes = fs::read(&tool).context(|| format!("{} cannot be read", tool.display()))?;
    Ok((tool, bytes))
}

pub(super) fn run(rounds: usize, icount: bool) -> Result<i32> {
    let assets = Assets::open(false)?;
    let kernel = assets.kernel(Series::V6_1, Flavour::Cloud)?;
    let vmlinux = kernel.vmlinux();
    let initrd = guest_image::initrd(&assets, &[kernel], Contents::WithDevices)?;
    let vmm = cargo::reference_vmm()?;
    let (tool, program) = guest_io()?;
    let programs = [("bin/guest-io", &*program)];
    let initrd = with_programs(&initrd, &programs, "target/bench-io.cpio")?;
    let qemu = assets.qemu()?.command();
    let contenders = [
        Contender {
            name: "reference-vmm",
            words: ours(&vmm, &vmlinux, &initrd),
            unix: true,
        },
        Contender {
            name: "QEMU microvm",
            words: theirs(&qemu, &vmlinux, &initrd, false),
            unix: false,
        },
        Contender {
            name: "QEMU, vhost-net",
            words: theirs(&qemu, &vmlinux, &initrd, true),
            unix: false,
        },
    ];
    let mut argv = cargo::inside_lab(RUN_COMMAND);
    argv.push(tool.into());
    for Contender { words, unix, .. } in &contenders {
        argv.push(if *unix { "unix" } else { "vsock" }.into());
        argv.push(words.len().to_string().into());
        argv.extend(words.iter().cloned());
    }

    let step = Step::begin(format!("{rounds} guests of each in the lab"));
    // For each contender and each figure the rounds' values.
    let mut names: Vec<String> = Vec::new();
    let mut results = vec![Vec::<Vec<f64>>::new(); contenders.len()];
    for number in 1..=rounds {
        for (at, name, value) in round(&argv, icount)? {
            let figure = names.iter().position(|known| *known == name);
            let figure = figure.unwrap_or_else(|| {
                names.push(name);
                names.len() - 1
            });
            let Some(of) = results.get_mut(at) else {
                continue;
            };
            of.resize(of.len().max(figure + 1), Vec::new());
            of[figure].push(value);
        }
        say(format!("round {number} of {rounds}"));
    }
    step.end();
    let clock = if icount {
        ", which counts instructions"
    } else {
        ""
    };
    println!("\nmedian of {rounds} (spread from least to most); in the lab's time{clock}\n");
    print!("{:<26}", "");
    for contender in &contenders {
        print!("{:>24}", contender.name);
    }
    println!();
    for (figure, name) in names.iter().enumerate() {
        print!("{name:<26}");
        for of in &mut results {
            let empty = &mut Vec::new();
            let values = of.get_mut(figure).unwrap_or(empty);
            let (_, middle, _) = super::ranks(values);
            let spread = values
                .last()
                .zip(values.first())
                .map_or(f64::NAN, |(most, least)| most - least);
            print!(
                "{:>24}",
                format!("{middle:.1} ({:.1} %)", spread / middle * 100.0)
            );
        }
        println!();
    }
    Ok(0)
}

fn ours(vmm: &Path, vmlinux: &Path, initrd: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![vmm.into(), "run".into()];
    for (flag, value) in [
        ("--kernel", vmlinux.as_os_str().to_owned()),
        ("--initrd", initrd.as_os_str().to_owned()),
        ("--cmdline", CMDLINE.into()),
        ("--memory", "256M".into()),
        ("--disk", format!("path={DISK}").into()),
        ("--net", format!("tap={TAP}").into()),
        ("--vsock", format!("cid=42,uds={VSOCK}").into()),
    ] {
        words.push(flag.into());
        words.push(value);
    }
    words
}

/// QEMU at its best: io_uring, and a thread of its own for the disk.
fn theirs(qemu: &Command, vmlinux: &Path, initrd: &Path, vhost: bool) -> Vec<OsString> {
    let mut words = boot::microvm(qemu, vmlinux, initrd, CMDLINE);
    let vhost = if vhost { "on" } else { "off" };
    for word in [
        "-global",
        "virtio-mmio.force-legacy=false",
        "-object",
        "iothread,id=disk",
        "-drive",
        &format!("file={DISK},if=none,id=disk,format=raw,cache=writeback,aio=io_uring"),
        "-device",
        "virtio-blk-device,drive=disk,iothread=disk",
        "-netdev",
        &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"),
        "-device",
        "virtio-net-device,netdev=net",
        "-device",
        "vhost-vsock-device,guest-cid=42",
    ] {
        words.push(word.into());
    }
    words
}

/// The image with programs behind it, as a file of the workspace: the kernel unpacks one archive after the other.
pub(super) fn with_programs(
    initrd: &Path,
    programs: &[(&str, &[u8])],
    name: &str,
) -> Result<PathBuf> {
    let mut bytes = fs::read(initrd).context(|| format!("{} cannot be read", initrd.display()))?;
    // An archive begins at a multiple of four bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut archive = Archive::new();
    for (place, program) in programs {
        archive.file(place, 0o755, program);
    }
    bytes.extend(archive.finish());
    // QEMU's microvm has its ACPI tables in the last page of memory and puts the image's end there as well: over them, and the
    // guest finds no interrupt controller, unless the image leaves nearly all of that page.
    bytes.resize(bytes.len().next_multiple_of(0x1000) + 4, 0);
    let path = crate::host::workspace().join(name);
    fs::write(&path, bytes).context(|| format!("{} cannot be written", path.display()))?;
    Ok(path)
}

/// One lab machine: place of the contender, name of the figure, its value.
fn round(argv: &[OsString], icount: bool) -> Result<Vec<(usize, String, f64)>> {
    let options = lab::Options {
        icount,
        time_limit: ROUND_LIMIT,
        memory_mib: 3072,
        ..lab::Options::default()
    };
    let output = boot::in_lab(&options, argv)?;
    let figures = output.lines().filter_map(parse_result).collect::<Vec<_>>();
    match figures.is_empty() {
        true => Err(Failure::new("the guests in the lab told nothing")),
        false => Ok(figures),
    }
}

/// Inside the lab: the program, and for each contender its vsock, the count of its words and the words.
pub(crate) fn run_command(args: Vec<OsString>) -> Result<i32> {
    let mut args = args.into_iter();
    let tool = args.next().ok_or_else(|| Failure::usage("no program"))?;
    super::make_tap(&tool, TAP)?;
    let mut at = 0;
    while let Some(vsock) = args.next() {
        let count = args
            .next()
            .and_then(|word| word.to_str()?.parse::<usize>().ok());
        let words = args.by_ref().take(count.unwrap_or(0)).collect::<Vec<_>>();
        for (name, value) in measure(&tool, vsock == "unix", &words)? {
            println!("{RESULT_MARK}{at} {name} {value}");
        }
        at += 1;
    }
    Ok(0)
}

/// One guest, from a new disk.
fn measure(tool: &OsString, unix: bool, words: &[OsString]) -> Result<Vec<(String, f64)>> {
    let disk = fs::File::create(DISK).and_then(|file| file.set_len(DISK_LEN));
    disk.context(|| format!("{DISK} cannot be made"))?;
    let socket = format!("{VSOCK}_5000");
    let _ = fs::remove_file(&socket);
    let mut host = Command::new(tool);
    match unix {
        true => host.args(["host", "unix", &socket]),
        false => host.args(["host", "vsock"]),
    };
    let host = host.stdout(Stdio::piped()).spawn();
    let mut host = Ended(host.context(|| "the host's side does not start".into())?);
    let mut ready = String::new();
    if let Some(out) = host.0.stdout.take() {
        let _ = BufReader::new(out).read_line(&mut ready);
    }
    if ready.trim() != "ready" {
        return Err(Failure::new("the host's side does not listen"));
    }
    let (program, args) = words
        .split_first()
        .ok_or_else(|| Failure::usage("a contender has no words"))?;
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output();
    let output = output.context(|| format!("{} does not start", program.display()))?;
    let console = String::from_utf8_lossy(&output.stdout);
    let figures: Vec<_> = console.lines().filter_map(parse_figure).collect();
    match figures.len() == FIGURES {
        true => Ok(figures),
        false => Err(Failure::new(format!(
            "{} ({}) told {} figures of {FIGURES}:\n{console}\n{}",
            program.display(),
            output.status,
            figures.len(),
            String::from_utf8_lossy(&output.stderr)
        ))),
    }
}

/// Of the disk five, of TCP two, of vsock one.
const FIGURES: usize = 8;

fn parse_figure(line: &str) -> Option<(String, f64)> {
    let (name, value) = line.split_once("guest: io ")?.1.trim().split_once(' ')?;
    Some((name.to_owned(), value.parse().ok()?))
}

fn parse_result(line: &str) -> Option<(usize, String, f64)> {
    let (at, rest) = line.strip_prefix(RESULT_MARK)?.split_once(' ')?;
    let (name, value) = rest.split_once(' ')?;
    Some((at.parse().ok()?, name.to_owned(), value.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_of_the_guests_and_a_result_of_the_labs_are_read_back() {
        let figure = parse_figure("[   1.2] guest: io disk-read-MiB/s 12.500\r");
        assert_eq!(figure, Some(("disk-read-MiB/s".into(), 12.5)));
        let result = parse_result("xtask-io: 1 disk-read-MiB/s 12.5");
        assert_eq!(result, Some((1, "disk-read-MiB/s".into(), 12.5)));
        for other in ["guest: io x", "xtask-io: x y 1", ""] {
            assert_eq!((parse_figure(other), parse_result(other)), (None, None));
        }
    }
}
