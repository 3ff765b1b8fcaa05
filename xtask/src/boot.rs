// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask boot`: an unmodified Debian kernel under reference-vmm, to a shell on this terminal.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::assets::{Assets, Flavour, Series};
use crate::cargo;
use crate::distro;
use crate::failure::{Context, Failure, Result, STATUS_USAGE};
use crate::guest_image::{self, Contents};
use crate::host::{self, KvmKind};
use crate::lab;
use crate::ui::say;

/// The command line's word for the part that runs beside the VMM: not for people.
pub(crate) const WATCH_COMMAND: &str = "boot-watch";

const USAGE: &str = "\
Boots a stock Debian kernel under reference-vmm, to a shell on this terminal (Ctrl-A x ends it at once). When stdin
is no terminal, the guest reports what it sees and powers off. Where this host has no hardware KVM, all of it happens
in the lab: there the files that OPTIONS name (disks, consoles) are this host's to read, and what is written to them is
gone at the end. The timeline of the boot follows on stderr.

Usage: cargo xtask boot [OPTIONS] [-- OPTIONS OF reference-vmm run]

  --kernel FILE        another kernel image than Debian's
  --initrd FILE        another initramfs than the one made here
  --cpus N             the guest's CPUs (1)
  --memory SIZE        its memory, such as 512M or 6G (256M), and what `reference-vmm run --help` lists behind it
                       (huge pages are the lab's to have: cargo xtask lab -- sh -c 'echo 300 >/proc/sys/vm/nr_hugepages; …')
  --stats[=json]       what the guest did, on stderr at the end, as `reference-vmm run` says it
  --cmdline TEXT       added to the kernel's command line (ignore_loglevel shows all that it says)
  --full               Debian's full kernel instead of the cloud one
  --release 6.1|6.12   the kernel's series (6.1)
  --modules A,B        the drivers that the guest loads: virtio_blk, virtio_net, virtio_console, virtio_rng,
                       vmw_vsock_virtio_transport. Those of the devices among the OPTIONS it loads anyway
  --distro             a whole Debian instead of a kernel and a shell: systemd on a disk, a network, vsock, to its login. Root
                       has no password. It is made once (by root, in a minute) and cached; what it writes is gone at its
                       end. When stdin is no terminal, a script logs in, looks whether all services run, and powers off
  --vmm FILE           another program than the reference-vmm of this tree
  --lab                in the lab, even where this host could do without

What the options ask of reference-vmm is tried first: a wrong one is told before anything is downloaded or started, and
where it is plainly wrong, before anything is built.";

/// `cargo xtask boot`.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    use lexopt::prelude::*;
    let mut kernel = None;
    let mut initrd = None;
    let mut cpus = String::from("1");
    let mut memory = None;
    let mut distro = false;
    let mut added = String::new();
    let mut flavour = Flavour::Cloud;
    let mut series = Series::V6_1;
    let mut modules = Vec::new();
    let mut vmm = None;
    let mut force_lab = false;
    let mut passed_on: Vec<OsString> = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("kernel") => kernel = Some(existing(parser.value()?)?),
            Long("initrd") => initrd = Some(existing(parser.value()?)?),
            Long("cpus") => {
                cpus = parser.value()?.string()?;
                plausible_cpus(&cpus)?;
            }
            Long("memory") => {
                let size = parser.value()?.string()?;
                plausible_memory(&size)?;
                memory = Some(size);
            }
            Long("cmdline") => added = parser.value()?.string()?,
            Long("distro") => distro = true,
            Long("full") => flavour = Flavour::Full,
            Long("release") => series = Series::parse(&parser.value()?.string()?)?,
            Long("modules") => {
                let list = parser.value()?.string()?;
                for name in list.split(',') {
                    modules.push(guest_image::device(name)?);
                }
            }
            Long("vmm") => vmm = Some(existing(parser.value()?)?),
            Long("lab") => force_lab = true,
            Long("stats") => passed_on.push(match parser.optional_value() {
                Some(form) if form == "json" || form == "text" => {
                    format!("--stats={}", form.string()?).into()
                }
                Some(form) => {
                    let told = format!("--stats={form:?}: json or text is wanted");
                    return Err(Failure::usage(told));
                }
                None => "--stats".into(),
            }),
            Value(word) => {
                passed_on.push(word);
                passed_on.extend(parser.raw_args()?);
            }
            Short('h') | Long("help") => {
                crate::ui::show(USAGE);
                return Ok(0);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if distro && (flavour != Flavour::Cloud || series != Series::V6_1 || !modules.is_empty()) {
        return Err(Failure::usage(
            "--distro has a kernel and modules of its own: --full, --release and --modules are not for it (--kernel is)",
        ));
    }
    let memory = memory.unwrap_or_else(|| if distro { "512M" } else { "256M" }.to_owned());
    let interactive = io::stdin().is_terminal();
    // From notices up: the kernel's first line and its last are notices or worse, and in the lab a character of the
    // console costs about a millisecond.
    let mut cmdline = String::from("console=ttyS0 loglevel=6");
    if interactive {
        cmdline.push_str(" guest.then=shell");
    }
    modules.extend(drivers_of(&passed_on));
    let contents = match modules.is_empty() {
        true => Contents::Plain,
        false => Contents::WithDevices,
    };
    if !modules.is_empty() {
        cmdline.push_str(&format!(" guest.modules={}", modules.join(",")));
    }
    if !added.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&added);
    }
    let mut machine: Vec<OsString> = vec!["--memory".into(), memory.clone().into()];
    machine.extend(["--cpus".into(), cpus.into()]);
    if !distro {
        machine.extend(["--cmdline".into(), cmdline.into()]);
    }
    machine.extend(passed_on);
    let vmm = match vmm {
        Some(file) => file,
        None => cargo::reference_vmm()?,
    };
    try_options(&vmm, &machine)?;
    if distro {
        return distro::boot(distro::Wanted {
            vmm,
            kernel,
            initrd,
            cmdline: added,
            machine,
            guest_mib: guest_mib(&memory),
            force_lab,
        });
    }

    let assets = Assets::open(false)?;
    let mut stock = Vec::new();
    let kernel = match kernel {
        Some(file) => file,
        None => {
            let kernel = assets.kernel(series, flavour)?;
            let file = kernel.vmlinuz();
            stock.push(kernel);
            file
        }
    };
    let initrd = match initrd {
        Some(file) => file,
        None => guest_image::initrd(&assets, &stock, contents)?,
    };
    let mut argv: Vec<OsString> = vec![
        vmm.into(),
        "run".into(),
        "--timeline".into(),
        "--kernel".into(),
        kernel.into(),
    ];
    argv.extend(["--initrd".into(), initrd.into()]);
    argv.extend(machine);

    let (kind, reason) = host::kvm();
    if kind == KvmKind::Hardware && !force_lab {
        return watch(argv);
    }
    let reason = if kind == KvmKind::Hardware {
        "--lab was given".into()
    } else {
        reason
    };
    say(format!(
        "booting in the lab (its own start takes some 10 s), because {reason}"
    ));
    let inside: Vec<OsString> = cargo::inside_lab(WATCH_COMMAND)
        .into_iter()
        .chain(argv)
        .collect();
    let options = lab::Options {
        stdin: true,
        // The guest's memory, and as much again as the lab itself wants.
        memory_mib: guest_mib(&memory).clamp(1024, 64 << 10) + 1024,
        time_limit: if interactive {
            Duration::from_secs(7 * 24 * 3600)
        } else {
            Duration::from_secs(300)
        },
        ..lab::Options::default()
    };
    lab::run(&options, &inside)
}

/// The drivers of the devices that options of reference-vmm give the guest.
fn drivers_of(options: &[OsString]) -> Vec<&'static str> {
    const DRIVERS: [(&str, &str); 5] = [
        ("--disk", "virtio_blk"),
        ("--net", "virtio_net"),
        ("--vsock", "vmw_vsock_virtio_transport"),
        ("--rng", "virtio_rng"),
        ("--console", "virtio_console"),
    ];
    let given = |name: &str| {
        options.iter().any(|option| {
            let option = option.to_string_lossy();
            option.split('=').next() == Some(name)
        })
    };
    let found = DRIVERS.into_iter().filter(|(name, _)| given(name));
    found.map(|(_, driver)| driver).collect()
}

/// A kernel that is not there: with it the VMM says nothing else of right options.
const NO_KERNEL: &str = "/no/such/kernel/only-the-options-are-tried";

/// What of `--cpus` can be told without the VMM, which may have to be built first.
fn plausible_cpus(cpus: &str) -> Result<()> {
    match cpus.parse() {
        Ok(1..=255_u32) => Ok(()),
        _ => Err(Failure::usage(format!(
            "--cpus {cpus:?}: a whole number from 1 to 255 is wanted"
        ))),
    }
}

/// And of `--memory`: a size, and words that are options.
fn plausible_memory(memory: &str) -> Result<()> {
    const OPTIONS: [&str; 6] = ["size", "shared", "hugepages", "prefault", "thp", "numa"];
    for (index, part) in memory.split(',').enumerate() {
        let key = part.split('=').next().unwrap_or_default();
        let is_size = index == 0 && part.starts_with(|first: char| first.is_ascii_digit());
        if !is_size && !OPTIONS.contains(&key) {
            return Err(Failure::usage(format!(
                "--memory {memory:?}: {part:?} is no size, such as 512M, and no option of memory"
            )));
        }
    }
    Ok(())
}

/// Asks the VMM whether these options are right, which it would say itself only after the lab's whole start. What only
/// the machine with the KVM knows comes later.
fn try_options(vmm: &Path, options: &[OsString]) -> Result<()> {
    let tried = Command::new(vmm)
        .arg("run")
        .args(options)
        // Last, so that it counts: what is tried must not start a guest.
        .args(["--kernel", NO_KERNEL])
        .stdin(Stdio::null())
        .output()
        .context(|| format!("{} does not start", vmm.display()))?;
    match refusal(tried.status.code(), &String::from_utf8_lossy(&tried.stderr)) {
        None => Ok(()),
        Some(told) => Err(Failure::usage(told)),
    }
}

/// What a VMM that was given [`NO_KERNEL`] said of its options, if those were wrong.
fn refusal(status: Option<i32>, stderr: &str) -> Option<&str> {
    let told = stderr.trim_end();
    (status == Some(STATUS_USAGE) && !told.contains(NO_KERNEL))
        .then(|| told.strip_prefix("reference-vmm: ").unwrap_or(told))
}

/// The size in what follows `--memory`, in MiB: bytes or with a unit, first or as `size=`. 256, its default, where there
/// is none; what is wrong the VMM has said.
fn guest_mib(memory: &str) -> u32 {
    let parts = || memory.split(',');
    let size = parts().find_map(|part| part.strip_prefix("size="));
    let size = size.or(parts().next()).unwrap_or_default();
    let digits = size.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = size.split_at(digits);
    let shift = match unit.bytes().next().map(|unit| unit.to_ascii_lowercase()) {
        Some(b'k') => 10,
        Some(b'm') => 20,
        Some(b'g') => 30,
        Some(b't') => 40,
        _ => 0,
    };
    let bytes = number
        .parse()
        .map(|number: u128| number.saturating_mul(1 << shift));
    bytes.map_or(256, |bytes| u32::try_from(bytes >> 20).unwrap_or(u32::MAX))
}

fn existing(file: OsString) -> Result<PathBuf> {
    std::path::absolute(&file)
        .ok()
        .filter(|path| path.is_file())
        .ok_or_else(|| Failure::usage(format!("there is no file {}", file.display())))
}

/// Runs the VMM, passes its console on, and tells the timeline at its end.
pub(crate) fn watch(argv: Vec<OsString>) -> Result<i32> {
    let (program, args) = argv
        .split_first()
        .ok_or_else(|| Failure::usage("no VMM was given"))?;
    let begun = Instant::now();
    let mut vmm = Command::new(program)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| format!("{} does not start", program.display()))?;
    let stderr = vmm.stderr.take();
    let told = thread::spawn(move || stderr.map(told_by_vmm).unwrap_or_default());
    let mut seen = match vmm.stdout.take() {
        Some(stdout) => seen_on_console(stdout, io::stdout(), begun),
        None => Vec::new(),
    };
    let status = vmm
        .wait()
        .context(|| "the VMM cannot be waited for".into())?;
    let ended = begun.elapsed();
    seen.extend(told.join().unwrap_or_default());
    seen.sort();
    // The guest may have left its last line open.
    eprintln!("\nBoot timeline:");
    for (at, what) in seen {
        eprintln!("{:>10.1} ms  {what}", at.as_secs_f64() * 1e3);
    }
    eprintln!("{:>10.1} ms  the VMM has ended", ended.as_secs_f64() * 1e3);
    use std::os::unix::process::ExitStatusExt;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

type Moment = (Duration, String);

/// The VMM's own moments (`timeline: EVENT MICROSECONDS`), while the rest of its stderr is passed on.
fn told_by_vmm(stderr: impl Read) -> Vec<Moment> {
    let mut moments = Vec::new();
    for line in BufReader::new(stderr)
        .split(b'\n')
        .map_while(io::Result::ok)
    {
        let line = String::from_utf8_lossy(&line).into_owned();
        match timeline_line(&line) {
            // Its end is seen from here too, on the clock of what the console said last.
            Some((_, event)) if event == "exit" => {}
            Some(moment) => moments.push(moment),
            None => eprintln!("{line}"),
        }
    }
    moments
}

fn timeline_line(line: &str) -> Option<Moment> {
    let (event, micros) = line
        .trim_end()
        .strip_prefix("timeline: ")?
        .rsplit_once(' ')?;
    let at = Duration::from_micros(micros.parse().ok()?);
    let what = match event {
        "start" => "VMM start".into(),
        "first-entry" => "first guest instruction".into(),
        "first-output" => "first byte of the guest's console".into(),
        other => other.to_owned(),
    };
    Some((at, what))
}

/// Passes the console on as it comes, and notes when the lines of interest are there.
fn seen_on_console(mut stdout: impl Read, mut out: impl Write, begun: Instant) -> Vec<Moment> {
    // Each is looked for once. A quiet kernel leaves some of them out.
    let mut wanted = vec![
        (&b"Linux version"[..], "kernel's first line"),
        (b"guest: init", "init"),
        (b"reboot: Power down", "power-off"),
    ];
    let mut moments = Vec::new();
    let mut buffer = [0; 16 << 10];
    let mut line = Vec::new();
    while let Ok(n @ 1..) = stdout.read(&mut buffer) {
        let _ = out.write_all(&buffer[..n]).and_then(|()| out.flush()); // a closed stdout does not stop the guest
        for byte in &buffer[..n] {
            line.push(*byte);
            if let Some(index) = wanted.iter().position(|(mark, _)| line.ends_with(mark)) {
                let (_, what) = wanted.remove(index);
                moments.push((begun.elapsed(), what.to_owned()));
            }
            if *byte == b'\n' {
                line.clear();
            }
        }
    }
    moments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_labs_size_follows_the_guests_in_each_form() {
        for (memory, mib) in [
            ("512M", 512),
            ("6g,hugepages=2M,shared", 6 << 10),
            ("1GiB", 1 << 10),
            ("shared,size=2G", 2 << 10),
            ("1073741824,prefault", 1 << 10),
            ("524288K", 512),
            ("1T", 1 << 20),
            ("thp=always", 256),
        ] {
            assert_eq!(guest_mib(memory), mib, "{memory}");
        }
    }

    #[test]
    fn what_is_plainly_wrong_is_refused_before_anything_is_built() {
        let refused = |words: &str| {
            let words = words.split_whitespace().map(OsString::from);
            let failure = command(words.collect()).unwrap_err();
            assert_eq!(failure.status(), STATUS_USAGE, "{failure}");
            failure.to_string()
        };
        for (words, told) in [
            ("--cpus 0", "--cpus \"0\""),
            ("--cpus=", "--cpus \"\""),
            ("--cpus two", "1 to 255"),
            ("--memory x", "\"x\" is no size"),
            ("--memory 1G,huge", "\"huge\""),
            ("--memory=", "\"\" is no size"),
            ("--stats=xml", "\"xml\""),
            ("--modules virtio_blk,floppy", "floppy"),
            ("--distro --full", "--full"),
            ("--distro --memory 1X,", "--memory"),
            ("--frob", "--frob"),
        ] {
            let failure = refused(words);
            assert!(failure.contains(told), "{words}: {failure}");
        }
        for memory in [
            "512M",
            "size=1G,shared",
            "thp=always",
            "6G,hugepages,numa=0",
        ] {
            plausible_memory(memory).unwrap();
        }
    }

    #[test]
    fn a_guest_loads_the_drivers_of_the_devices_that_it_is_given() {
        let words = "--disk path=/x --net=tap=t0 --memory --rng2".split_whitespace();
        let options: Vec<_> = words.map(OsString::from).collect();
        assert_eq!(drivers_of(&options), ["virtio_blk", "virtio_net"]);
    }

    #[test]
    fn only_what_the_vmm_says_of_its_options_keeps_it_from_being_started() {
        let wrong = "reference-vmm: 0 vCPUs: a VM has 1 to 255\n";
        let told = Some("0 vCPUs: a VM has 1 to 255");
        assert_eq!(refusal(Some(STATUS_USAGE), wrong), told);
        let right =
            format!("reference-vmm: cannot open the kernel image {NO_KERNEL}: No such file\n");
        assert_eq!(refusal(Some(STATUS_USAGE), &right), None);
        assert_eq!(refusal(Some(1), "reference-vmm: KVM is missing\n"), None);
        assert_eq!(refusal(None, ""), None);
    }

    #[test]
    fn the_vmms_moments_are_told_from_its_messages() {
        assert_eq!(
            timeline_line("timeline: first-entry 1500"),
            Some((
                Duration::from_micros(1500),
                "first guest instruction".into()
            ))
        );
        assert_eq!(timeline_line("timeline: first-entry"), None);
        assert_eq!(timeline_line("reference-vmm: timeline: start 1"), None);
    }

    #[test]
    fn moments_are_found_on_the_console_in_their_order() {
        let console = b"x\r\n[0.0] Linux version 6\r\nguest: init 1\r\nshell says guest: init\r\n[1] reboot: Power down\r\n";
        let seen: Vec<_> = seen_on_console(&console[..], io::sink(), Instant::now())
            .into_iter()
            .map(|(_, what)| what)
            .collect();
        assert_eq!(seen, ["kernel's first line", "init", "power-off"]);
    }
}
