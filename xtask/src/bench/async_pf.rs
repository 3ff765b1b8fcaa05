// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What asynchronous page faults give a guest whose memory comes late, in the lab: two tasks on one vCPU, one of which
//! touches pages that take [`DELAY`] each, and one that counts (`guest-io cold`). How far the counting comes meanwhile,
//! against how far it comes alone in the same time: where the guest is offered the feature, and where it is not.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::slow_pages::SlowPages;
use super::{Ended, boot, io};
use crate::assets::{Assets, Flavour, Series};
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::guest_image::{self, Contents};
use crate::lab;
use crate::ui::{Step, say};

/// The command line's word for the part inside the lab: not for people.
pub(crate) const RUN_COMMAND: &str = "bench-async-pf-run";

const RESULT_MARK: &str = "xtask-async-pf:";

const CMDLINE: &str = "console=ttyS0 quiet guest.run=cold";
/// How many pages are late, by how much each, and what each begins with.
const PAGES: u32 = 20;
const DELAY: Duration = Duration::from_millis(50);
const MARK: &[u8] = b"guest: cold page";

/// A processor without the feature.
const HIDDEN: &str = r#"{"clear": ["kvm_async_pf", "kvm_async_pf_int", "kvm_async_pf_vmexit"]}"#;

/// In the lab.
const DIR: &str = "/run/async-pf";
const TRACING: &str = "/sys/kernel/tracing";
/// KVM takes a fault for later: the vCPU is told so, or halts until the page is there.
const LATER: &str = "kvm_async_pf_not_present";

const LIMIT: Duration = Duration::from_secs(900);

/// What is compared: who is offered the feature, and whether who waits has real-time priority.
const WAYS: [(&str, bool, bool); 4] = [
    ("of the same priority, offered", true, false),
    ("of the same priority, hidden", false, false),
    ("of a higher priority, offered", true, true),
    ("of a higher priority, hidden", false, true),
];

/// What came of a restore.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Turn {
    /// Steps of the counting, and how many it does alone in the same time.
    steps: f64,
    alone: f64,
    /// That time, milliseconds.
    took: f64,
    /// From the restore to the guest's end: faults that the handler served, those that KVM took for later, and those of
    /// which it told the guest.
    faults: f64,
    later: f64,
    told: f64,
}

pub(super) fn run(rounds: usize) -> Result<i32> {
    let assets = Assets::open(false)?;
    let kernel = assets.kernel(Series::V6_1, Flavour::Cloud)?;
    let vmlinux = kernel.vmlinux();
    let initrd = guest_image::initrd(&assets, &[kernel], Contents::Plain)?;
    let vmm = cargo::reference_vmm()?;
    let (_, tool) = io::guest_io()?;
    // And one to warm up with.
    let cold = format!("#!/bin/sh\nexec guest-io cold {}\n", PAGES + 1);
    let programs = [("bin/guest-io", &*tool), ("bin/cold", cold.as_bytes())];
    let initrd = io::with_programs(&initrd, &programs, "target/bench-async-pf.cpio")?;
    let mut argv = cargo::inside_lab(RUN_COMMAND);
    argv.push(rounds.to_string().into());
    argv.extend([vmm, vmlinux, initrd].map(OsString::from));

    let step = Step::begin(format!("{rounds} restores of each in the lab"));
    let options = lab::Options {
        time_limit: LIMIT,
        memory_mib: 4096,
        ..lab::Options::default()
    };
    let output = boot::in_lab(&options, &argv)?;
    step.end();
    let turns: Vec<_> = output.lines().filter_map(parse_result).collect();
    if turns.len() != rounds * WAYS.len() {
        return Err(Failure::new("the guests in the lab told too little"));
    }
    println!(
        "\na task touches {PAGES} pages that take {} ms each, another counts: how far it comes, of what it comes to alone in the \
         same time; median of {rounds} (from least to most)\n",
        DELAY.as_millis()
    );
    println!(
        "{:<32} {:>24} {:>9} {:>8} {:>10} {:>8}",
        "who waits is", "counted", "ms", "faults", "for later", "told"
    );
    let mut middles = Vec::new();
    for (at, (name, ..)) in WAYS.iter().enumerate() {
        let of: Vec<_> = turns.iter().filter(|(way, _)| *way == at).collect();
        let middle = |figure: fn(&Turn) -> f64| {
            let mut values: Vec<_> = of.iter().map(|(_, turn)| figure(turn)).collect();
            let (_, middle, _) = super::ranks(&mut values);
            let ends = values.first().zip(values.last());
            let (least, most) = ends.unwrap_or((&f64::NAN, &f64::NAN));
            (middle, *least, *most)
        };
        let (share, least, most) = middle(|turn| turn.steps / turn.alone);
        let share_text = format!(
            "{:.1} % ({:.1} to {:.1})",
            share * 1e2,
            least * 1e2,
            most * 1e2
        );
        println!(
            "{name:<32} {share_text:>24} {:>9.0} {:>8} {:>10} {:>8}",
            middle(|turn| turn.took).0,
            middle(|turn| turn.faults).0,
            middle(|turn| turn.later).0,
            middle(|turn| turn.told).0
        );
        middles.push(share);
    }
    if let [offered, hidden, ..] = middles[..] {
        println!(
            "\nwith asynchronous page faults the other task does {:.2}× as much",
            offered / hidden
        );
    }
    say(
        "faults: that the handler served; for later: that KVM did not wait for; told: of which it told the guest, which then \
         runs something else. The rest is the guest's kernel's own, and its vCPU halts until the page is there",
    );
    Ok(0)
}

fn result_line(at: usize, turn: &Turn) -> String {
    let Turn {
        steps,
        alone,
        took,
        faults,
        later,
        told,
    } = turn;
    format!("{RESULT_MARK} {at} {steps} {alone} {took} {faults} {later} {told}")
}

fn parse_result(line: &str) -> Option<(usize, Turn)> {
    let mut words = line.strip_prefix(RESULT_MARK)?.split_whitespace();
    let at = words.next()?.parse().ok()?;
    let figures: Vec<f64> = words.filter_map(|word| word.parse().ok()).collect();
    let [steps, alone, took, faults, later, told] = figures[..] else {
        return None;
    };
    let turn = Turn {
        steps,
        alone,
        took,
        faults,
        later,
        told,
    };
    Some((at, turn))
}

/// Inside the lab: how many rounds; the monitor, the kernel and the initramfs.
pub(crate) fn run_command(args: Vec<OsString>) -> Result<i32> {
    let [rounds, vmm, kernel, initrd] = &args[..] else {
        return Err(Failure::usage("rounds, monitor, kernel, initramfs"));
    };
    let rounds = super::times("rounds", rounds)?;
    let vmm = Path::new(vmm);
    fs::create_dir_all(DIR).context(|| format!("{DIR} cannot be made"))?;
    let model = Path::new(DIR).join("cpu.json");
    fs::write(&model, HIDDEN).context(|| format!("{} cannot be written", model.display()))?;
    for (name, cpu) in [("offered", OsStr::new("host")), ("hidden", model.as_ref())] {
        freeze(vmm, [kernel, initrd, cpu], &frozen(name == "offered"))?;
    }
    trace(&format!("events/kvm/{LATER}/enable"), "1")?;
    for _ in 0..rounds {
        for (at, (_, offered, first)) in WAYS.iter().enumerate() {
            let turn = turn(vmm, &frozen(*offered), *first)?;
            println!("{}", result_line(at, &turn));
        }
    }
    Ok(0)
}

fn frozen(offered: bool) -> PathBuf {
    Path::new(DIR).join(if offered { "offered" } else { "hidden" })
}

/// Writes to a file of the kernel's tracing.
fn trace(file: &str, what: &str) -> Result<()> {
    let file = Path::new(TRACING).join(file);
    fs::write(&file, what).context(|| format!("{} cannot be written", file.display()))
}

/// A snapshot of a guest that has written its pages.
fn freeze(vmm: &Path, [kernel, initrd, cpu]: [&OsStr; 3], to: &Path) -> Result<()> {
    let control = to.with_extension("api");
    let mut command = Command::new(vmm);
    command.arg("run");
    for (flag, value) in [
        ("--kernel", kernel),
        ("--initrd", initrd),
        ("--cpu", cpu),
        ("--cmdline", CMDLINE.as_ref()),
        ("--memory", "256M".as_ref()),
        ("--api-sock", control.as_ref()),
    ] {
        command.arg(flag).arg(value);
    }
    let (_guest, _asks, mut says) = start(&mut command)?;
    find(&mut says, "guest: cold ready")?;
    let orders: [&[&OsStr]; 2] = [&["pause".as_ref()], &["snapshot".as_ref(), to.as_ref()]];
    for order in orders {
        let mut ctl = Command::new(vmm);
        ctl.args(["ctl", "--api-sock"]).arg(&control).args(order);
        let done = ctl.stdin(Stdio::null()).stdout(Stdio::null()).status();
        if !done.context(|| "ctl does not start".into())?.success() {
            return Err(Failure::new(format!("ctl {order:?} failed")));
        }
    }
    Ok(())
}

/// A guest goes on from a snapshot, and what it is asked to measure.
fn turn(vmm: &Path, from: &Path, first: bool) -> Result<Turn> {
    let socket = Path::new(DIR).join("handler");
    let _ = fs::remove_file(&socket); // of the turn before
    let handler = SlowPages::start(&socket, &from.join("memory"), MARK, DELAY)?;
    trace("trace", "")?;
    let mut command = Command::new(vmm);
    command
        .args(["restore", "--stats=json", "--from"])
        .arg(from);
    command.arg("--page-handler").arg(&socket);
    command.stderr(Stdio::piped());
    let (mut guest, mut asks, mut says) = start(&mut command)?;
    let words = if first {
        "measure first\n"
    } else {
        "measure\n"
    };
    let asked = asks.write_all(words.as_bytes());
    asked.context(|| "the guest is not there to be asked".into())?;
    let line = find(&mut says, "guest: cold steps ")?;
    let measured = parse_measured(&line);
    let [steps, alone, micros] =
        measured.ok_or_else(|| Failure::new(format!("the guest said {line:?}")))?;
    find(&mut says, "guest: cold touched all")?;
    let asked = asks.write_all(b"end\n");
    asked.context(|| "the guest is not there to be asked".into())?;
    let (mut rest, mut stats) = (String::new(), String::new());
    let read = says.read_to_string(&mut rest);
    read.context(|| "the guest's console".into())?;
    if let Some(told) = &mut guest.0.stderr {
        let read = told.read_to_string(&mut stats);
        read.context(|| "the monitor's numbers".into())?;
    }
    let served = handler.join()?;
    let events = fs::read_to_string(Path::new(TRACING).join("trace"));
    let events = events.context(|| "the kernel's trace cannot be read".into())?;
    let later = events.lines().filter(|line| line.contains(LATER)).count();
    Ok(Turn {
        steps,
        alone,
        took: micros / 1e3,
        faults: served as f64,
        later: later as f64,
        told: told(&stats),
    })
}

/// A monitor, its guest's console: what is asked there, and what is said.
fn start(command: &mut Command) -> Result<(Ended, ChildStdin, BufReader<ChildStdout>)> {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = Ended(child.context(|| "the monitor does not start".into())?);
    let ends = child.0.stdin.take().zip(child.0.stdout.take());
    let (asks, says) = ends.ok_or_else(|| Failure::new("the monitor has no console"))?;
    Ok((child, asks, BufReader::new(says)))
}

/// Reads on to the line that has this in it.
fn find(says: &mut impl BufRead, what: &str) -> Result<String> {
    let mut heard = String::new();
    loop {
        let mut line = Vec::new();
        let read = says.read_until(b'\n', &mut line);
        let line = String::from_utf8_lossy(&line);
        if read.context(|| "the guest's console".into())? == 0 {
            return Err(Failure::new(format!(
                "the guest never said {what:?}:\n{heard}"
            )));
        }
        if line.contains(what) {
            return Ok(line.into_owned());
        }
        heard += &line;
    }
}

/// Of `guest: cold steps 7 of 9 in 50 us`: the numbers.
fn parse_measured(line: &str) -> Option<[f64; 3]> {
    let said = line.split_once("guest: cold steps ")?.1;
    let numbers: Vec<f64> = said
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    numbers.try_into().ok()
}

/// How many page faults KVM has injected, of the monitor's numbers. With nested paging it injects no others; zeros are
/// not said.
fn told(stats: &str) -> f64 {
    let parsed = stats
        .lines()
        .rev()
        .find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let parsed = parsed.unwrap_or_default();
    let counts = parsed["kvm"]["vcpus"][0].as_array();
    let mut counts = counts.into_iter().flatten();
    let found = counts.find(|count| count["name"] == "pf_guest");
    found
        .and_then(|count| count["value"].as_f64())
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_has_measured_and_a_result_of_the_labs_are_read_back() {
        let line = "guest: cold steps 70 of 90 in 5000 us\r\n";
        assert_eq!(parse_measured(line), Some([70.0, 90.0, 5000.0]));
        assert_eq!(parse_measured("guest: cold steps 70 of"), None);
        let turn = Turn {
            steps: 1.0,
            alone: 2.0,
            took: 3.5,
            faults: 4.0,
            later: 5.0,
            told: 6.0,
        };
        let line = result_line(3, &turn);
        assert_eq!(parse_result(&line), Some((3, turn)));
        assert_eq!(parse_result("xtask-async-pf: 3 1"), None);
    }

    #[test]
    fn what_was_told_is_found_among_the_monitors_numbers() {
        let stats = r#"{"kvm": {"vcpus": [[{"name": "exits", "value": 9}, {"name": "pf_guest", "value": 7}]]}}"#;
        assert_eq!(told(&format!("a line\n{stats}\n")), 7.0);
        assert_eq!(told("{}"), 0.0);
    }
}
