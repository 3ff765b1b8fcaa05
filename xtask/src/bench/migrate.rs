// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that moves from one process to another while it runs, monitors compared in the lab: how long it stands still,
//! as who listens to it sees it. The guest does nothing but to say a dot every five milliseconds; what counts is the time
//! from the last one that the source passed on to the first one of the destination. Or it writes memory without rest as
//! well, and goes by post-copy.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Ended, boot, io};
use crate::assets::{Assets, Flavour, Series};
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::guest_image::{self, Contents};
use crate::lab;
use crate::ui::{Step, say};

/// The command line's word for the part inside the lab: not for people.
pub(crate) const RUN_COMMAND: &str = "bench-migrate-run";

const RESULT_MARK: &str = "xtask-migrate: ";

const CMDLINE: &str = "console=ttyS0 quiet guest.run=beat";
/// What the guest's program is: the init runs it.
const BEAT: &[u8] = b"#!/bin/sh\nexec guest-io beat\n";
/// Of one that writes without rest as well.
const BUSY: &[u8] = b"#!/bin/sh\nguest-io busy &\nexec guest-io beat\n";
/// What the guest says before its first beat.
const BEGUN: &[u8] = b"guest: beat";

/// In the lab.
const CONTROL: &str = "/run/migrate.control";
const WIRE: &str = "/run/migrate.wire";
const INCOMING: &str = "/run/migrate.incoming";
/// When a guest goes before its memory.
const SWITCH: Duration = Duration::from_secs(2);
/// The word for that, before the contenders.
const POSTCOPY: &str = "postcopy";

const LIMIT: Duration = Duration::from_secs(600);
/// How long each step inside may take.
const PATIENCE: Duration = Duration::from_secs(180);

pub(super) fn run(rounds: usize, postcopy: bool) -> Result<i32> {
    let assets = Assets::open(false)?;
    let kernel = assets.kernel(Series::V6_1, Flavour::Cloud)?;
    let vmlinux = kernel.vmlinux();
    let initrd = guest_image::initrd(&assets, &[kernel], Contents::Plain)?;
    let vmm = cargo::reference_vmm()?;
    let (_, tool) = io::guest_io()?;
    let beat = if postcopy { BUSY } else { BEAT };
    let programs = [("bin/guest-io", &*tool), ("bin/beat", beat)];
    let initrd = io::with_programs(&initrd, &programs, "target/bench-migrate.cpio")?;
    let qemu = assets.qemu()?.command();
    let mut theirs = boot::microvm(&qemu, &vmlinux, &initrd, CMDLINE);
    theirs.extend(["-m", "1G"].map(OsString::from));
    let contenders = [
        ("reference-vmm", ours(&vmm, &vmlinux, &initrd)),
        ("QEMU microvm", theirs),
    ];
    let mut argv = cargo::inside_lab(RUN_COMMAND);
    argv.extend(postcopy.then(|| POSTCOPY.into()));
    for (_, words) in &contenders {
        argv.push(words.len().to_string().into());
        argv.extend(words.iter().cloned());
    }
    let step = Step::begin(format!("{rounds} migrations of each in the lab"));
    let mut results = vec![[const { Vec::new() }; 3]; contenders.len()];
    let mut goes: Vec<(String, Vec<f64>)> = Vec::new();
    for number in 1..=rounds {
        for moved in round(&argv)? {
            let at = moved.at;
            let Some((of, (name, _))) = results.get_mut(at).zip(contenders.get(at)) else {
                continue;
            };
            let Moved {
                stood, whole, hush, ..
            } = moved;
            let [stills, wholes, hushes] = of;
            stills.push(stood);
            wholes.push(whole);
            hushes.push(hush);
            let steps: Vec<_> = moved
                .steps
                .iter()
                .map(|(of, ms)| format!("{of} {ms:.1}"))
                .collect();
            let steps = steps.join(", ");
            say(format!(
                "round {number}, {name}: stood still for {stood:.0} ms, in all {whole:.0} ms, then silent for {hush:.0} ms at most \
                 ({steps})"
            ));
            for (step, ms) in moved.steps {
                match goes.iter_mut().find(|(name, _)| *name == step) {
                    Some((_, of)) => of.push(ms),
                    None => goes.push((step, vec![ms])),
                }
            }
        }
    }
    step.end();
    println!(
        "\na guest of 1 GiB that {}; milliseconds of the lab's clock, median of {rounds} (from least to most)\n",
        match postcopy {
            true => "writes 256 MiB without rest, and goes by post-copy after 2 s",
            false => "idles",
        }
    );
    println!(
        "{:<16} {:>26} {:>26} {:>26}",
        "", "stands still", "in all", "longest silence behind it"
    );
    let mut middles = Vec::new();
    for ((name, _), [stills, wholes, hushes]) in contenders.iter().zip(&mut results) {
        let (still, whole, hush) = (summary(stills), summary(wholes), summary(hushes));
        println!("{name:<16} {:>26} {:>26} {:>26}", still.1, whole.1, hush.1);
        middles.push((still.0, whole.0));
    }
    if let [ours, theirs] = middles[..] {
        println!(
            "\nreference-vmm's stands still for {:.3}× as long, and takes {:.3}× in all",
            ours.0 / theirs.0,
            ours.1 / theirs.1
        );
    }
    println!(
        "\nwhere it goes, as reference-vmm itself says, and what is left: milliseconds, median\n"
    );
    for (step, took) in &mut goes {
        let (_, middle, _) = super::ranks(took);
        println!("{step:<28} {middle:>8.1}");
    }
    Ok(0)
}

fn summary(values: &mut [f64]) -> (f64, String) {
    let (_, middle, _) = super::ranks(values);
    let ends = values.first().zip(values.last());
    let (least, most) = ends.unwrap_or((&f64::NAN, &f64::NAN));
    (middle, format!("{middle:.0} ({least:.0} to {most:.0})"))
}

fn ours(vmm: &Path, vmlinux: &Path, initrd: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![vmm.into(), "run".into()];
    for (flag, value) in [
        ("--kernel", vmlinux.as_os_str()),
        ("--initrd", initrd.as_os_str()),
        ("--cmdline", CMDLINE.as_ref()),
        ("--memory", "1G".as_ref()),
        ("--api-sock", CONTROL.as_ref()),
    ] {
        words.extend([flag.into(), value.to_owned()]);
    }
    words
}

/// A guest that has moved.
#[derive(Clone, Debug, Default, PartialEq)]
struct Moved {
    /// The place of the contender.
    at: usize,
    /// How long it stood still, milliseconds.
    stood: f64,
    /// From the asking to its first beat elsewhere.
    whole: f64,
    /// The longest time without a beat in the second behind that.
    hush: f64,
    /// What the monitor itself says that it stood still for: the steps' names, and milliseconds.
    steps: Vec<(String, f64)>,
}

/// One lab machine: what each contender took.
fn round(argv: &[OsString]) -> Result<Vec<Moved>> {
    let options = lab::Options {
        time_limit: LIMIT,
        memory_mib: 4096,
        ..lab::Options::default()
    };
    let output = boot::in_lab(&options, argv)?;
    let figures: Vec<_> = output.lines().filter_map(parse_result).collect();
    match figures.is_empty() {
        true => Err(Failure::new("the migrations in the lab told nothing")),
        false => Ok(figures),
    }
}

fn parse_result(line: &str) -> Option<Moved> {
    let mut words = line.strip_prefix(RESULT_MARK)?.split(' ');
    let mut next = || words.next();
    let (at, stood, whole, hush) = (next()?, next()?, next()?, next()?);
    let step = |word: &str| {
        let (step, ms) = word.split_once('=')?;
        Some((step.to_owned(), ms.parse().ok()?))
    };
    Some(Moved {
        at: at.parse().ok()?,
        stood: stood.parse().ok()?,
        whole: whole.parse().ok()?,
        hush: hush.parse().ok()?,
        steps: words.map(step).collect::<Option<_>>()?,
    })
}

fn result_line(moved: &Moved) -> String {
    let Moved {
        at,
        stood,
        whole,
        hush,
        ..
    } = moved;
    let steps = moved.steps.iter().map(|(step, ms)| format!(" {step}={ms}"));
    format!(
        "{RESULT_MARK}{at} {stood} {whole} {hush}{}",
        steps.collect::<String>()
    )
}

/// Inside the lab: for each contender the count of its words and the words, ours first.
pub(crate) fn run_command(args: Vec<OsString>) -> Result<i32> {
    let number = |word: Option<OsString>| word.and_then(|w| w.to_str()?.parse::<usize>().ok());
    let mut args = args.into_iter().peekable();
    let postcopy = args.next_if(|word| word == POSTCOPY).is_some();
    let mut at = 0;
    while let Some(count) = number(args.next()) {
        let words = args.by_ref().take(count).collect::<Vec<_>>();
        let side = match at {
            0 => Side::Ours,
            _ => Side::Qemu,
        };
        let moved = migrate(at, side, &words, postcopy)?;
        println!("{}", result_line(&moved));
        at += 1;
    }
    Ok(0)
}

/// QEMU's order for it.
const CAPABILITY: &str = "migrate_set_capability postcopy-ram on\n";

#[derive(Clone, Copy)]
enum Side {
    Ours,
    Qemu,
}

impl Side {
    fn source(self, words: &[OsString]) -> Vec<OsString> {
        let mut words = words.to_vec();
        if let Side::Qemu = self {
            let monitor = format!("unix:{CONTROL},server=on,wait=off");
            words.extend(["-monitor".into(), monitor.into()]);
        }
        words
    }

    fn destination(self, words: &[OsString], postcopy: bool) -> Vec<OsString> {
        let wire = OsString::from(format!("unix:{WIRE}"));
        match self {
            Side::Ours => {
                let program = words.first().cloned().unwrap_or_default();
                vec![program, "run".into(), "--incoming".into(), wire]
            }
            Side::Qemu => {
                let mut words = words.to_vec();
                match postcopy {
                    false => words.extend(["-incoming".into(), wire]),
                    // It is told what it is to be before anybody comes.
                    true => {
                        let monitor = format!("unix:{INCOMING},server=on,wait=off");
                        let more = ["-incoming", "defer", "-monitor", &monitor];
                        words.extend(more.map(OsString::from));
                    }
                }
                words
            }
        }
    }

    /// Has the destination listen, where it does not by itself.
    fn listen(self, destination: &Process, postcopy: bool) -> Result<()> {
        if let (Side::Qemu, true) = (self, postcopy) {
            wait_for(Path::new(INCOMING), destination)?;
            let failed = || "QEMU's monitor does not answer".into();
            let mut monitor = UnixStream::connect(INCOMING).context(failed)?;
            let order = format!("{CAPABILITY}migrate_incoming unix:{WIRE}\n");
            monitor.write_all(order.as_bytes()).context(failed)?;
            wait_for(Path::new(WIRE), destination)?;
            return Ok(());
        }
        wait_for(Path::new(WIRE), destination)
    }

    /// Asks the source; does not wait for the end.
    fn ask(self, words: &[OsString], postcopy: bool) -> Result<Asked> {
        match self {
            Side::Ours => {
                let program = words.first().cloned().unwrap_or_default();
                let to = format!("unix:{WIRE}");
                let asked = Command::new(program)
                    .args([
                        "ctl",
                        "--api-sock",
                        CONTROL,
                        "migrate",
                        "--json",
                        "--to",
                        &to,
                    ])
                    .args(postcopy.then(|| format!("--postcopy=after={}", SWITCH.as_secs())))
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .spawn();
                let asked = asked.context(|| "ctl does not start".into())?;
                Ok(Asked::Ours(Ended(asked)))
            }
            Side::Qemu => {
                let failed = || "QEMU's monitor does not answer".into();
                let mut monitor = UnixStream::connect(CONTROL).context(failed)?;
                // As much as it may take: its default limits the bandwidth to 128 MiB/s, and the downtime to 300 ms.
                let orders = "migrate_set_parameter max-bandwidth 10G\nmigrate_set_parameter downtime-limit 100\n";
                let capability = if postcopy { CAPABILITY } else { "" };
                let order = format!("{orders}{capability}migrate -d unix:{WIRE}\n");
                monitor.write_all(order.as_bytes()).context(failed)?;
                if postcopy {
                    let mut again = monitor.try_clone().context(failed)?;
                    thread::spawn(move || {
                        thread::sleep(SWITCH);
                        // If it is not heard, no guest comes, which is told.
                        let _ = again.write_all(b"migrate_start_postcopy\n");
                    });
                }
                Ok(Asked::Qemu { _monitor: monitor })
            }
        }
    }
}

/// Who was asked: lives as long as the migration.
enum Asked {
    Ours(Ended),
    Qemu { _monitor: UnixStream },
}

impl Asked {
    /// What it says, once the guest has moved, that the stop was made of.
    fn steps(self) -> Result<[Vec<(String, f64)>; 2]> {
        let Asked::Ours(mut ctl) = self else {
            return Ok(Default::default());
        };
        let mut said = String::new();
        if let Some(out) = &mut ctl.0.stdout {
            let read = out.read_to_string(&mut said);
            read.context(|| "ctl's answer cannot be read".into())?;
        }
        Ok([steps(&said), behind(&said)])
    }
}

/// Of `ctl migrate --json`: the steps of the stop in their order.
fn steps(said: &str) -> Vec<(String, f64)> {
    let record = serde_json::from_str::<serde_json::Value>(said).unwrap_or_default();
    let steps = record["switch-over"]["steps"].as_array();
    let step = |taken: &serde_json::Value| {
        let name = taken["step"].as_str()?.to_owned();
        Some((name, taken["took-us"].as_f64()? / 1e3))
    };
    steps.into_iter().flatten().filter_map(step).collect()
}

/// Of the same: what followed the guest, and how long it waited for that.
fn behind(said: &str) -> Vec<(String, f64)> {
    let record = serde_json::from_str::<serde_json::Value>(said).unwrap_or_default();
    let followed = &record["postcopy"];
    let (faults, memory) = (&followed["faults"], record["memory-pages"].as_f64());
    let ms = |of: &serde_json::Value| of.as_f64().map(|nanos| nanos / 1e6);
    let parts = [
        ("pages-followed", followed["missing-pages"].as_f64()),
        ("of-them-waited-for", followed["demand-pages"].as_f64()),
        ("faults", faults["count"].as_f64()),
        ("fault-half-ms", ms(&faults["p50-ns"])),
        ("fault-99-of-100-ms", ms(&faults["p99-ns"])),
        ("fault-longest-ms", ms(&faults["max-ns"])),
        (
            "sent-times-memory",
            record["total"]["pages-sent"]
                .as_f64()
                .zip(memory)
                .map(|(sent, all)| sent / all),
        ),
    ];
    let named = parts.into_iter().filter(|_| !followed.is_null());
    named
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
}

/// A guest that moves.
fn migrate(at: usize, side: Side, words: &[OsString], postcopy: bool) -> Result<Moved> {
    for socket in [CONTROL, WIRE, INCOMING] {
        let _ = fs::remove_file(socket);
    }
    let source = Process::start(&side.source(words))?;
    source.hears(BEGUN)?;
    let destination = Process::start(&side.destination(words, postcopy))?;
    side.listen(&destination, postcopy)?;
    // It idles: what its boot dirtied has been forgotten.
    source.beats(200)?;
    let asked_at = Instant::now();
    let asked = side.ask(words, postcopy)?;
    let first = destination.beat()?;
    let mut last = asked_at;
    // The source has said its last word before the destination's first.
    while let Ok(beat) = source.heard.try_recv() {
        last = beat.at;
    }
    let hush = destination.longest_silence(first.at)?;
    let ms = |from: Instant| first.at.duration_since(from).as_secs_f64() * 1e3;
    let (stood, whole) = (ms(last), ms(asked_at));
    let [mut steps, behind] = asked.steps()?;
    if let Side::Ours = side {
        // Up to a beat's interval before the stop, and what the guest needs to come to say something elsewhere.
        let told: f64 = steps.iter().map(|(_, ms)| ms).sum();
        steps.push(("until-it-is-heard".into(), stood - told));
        steps.extend(behind);
    }
    Ok(Moved {
        at,
        stood,
        whole,
        hush: hush.as_secs_f64() * 1e3,
        steps,
    })
}

/// What came from the console at one moment.
struct Heard {
    at: Instant,
    bytes: Vec<u8>,
}

struct Process {
    name: PathBuf,
    heard: Receiver<Heard>,
    _child: Ended,
}

impl Process {
    fn start(words: &[OsString]) -> Result<Self> {
        let (program, args) = words
            .split_first()
            .ok_or_else(|| Failure::usage("a contender has no words"))?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut child =
            Ended(child.context(|| format!("{} does not start", Path::new(program).display()))?);
        let (say, heard) = mpsc::channel();
        if let Some(out) = child.0.stdout.take() {
            thread::spawn(move || listen(out, &say));
        }
        Ok(Process {
            name: Path::new(program).to_owned(),
            heard,
            _child: child,
        })
    }

    fn next(&self) -> Result<Heard> {
        self.heard.recv_timeout(PATIENCE).map_err(|error| {
            let what = match error {
                RecvTimeoutError::Timeout => "says nothing",
                RecvTimeoutError::Disconnected => "has ended",
            };
            Failure::new(format!("{} {what}", self.name.display()))
        })
    }

    /// Waits until it has said this.
    fn hears(&self, what: &[u8]) -> Result<()> {
        let mut said = Vec::new();
        while !said.windows(what.len()).any(|window| window == what) {
            said.extend(self.next()?.bytes);
        }
        Ok(())
    }

    /// Its next beat.
    fn beat(&self) -> Result<Heard> {
        loop {
            let heard = self.next()?;
            if heard.bytes.contains(&b'.') {
                return Ok(heard);
            }
        }
    }

    /// The longest time without a beat in the second from `since` on.
    fn longest_silence(&self, since: Instant) -> Result<Duration> {
        let (mut last, mut longest) = (since, Duration::ZERO);
        while last.duration_since(since) < Duration::from_secs(1) {
            let beat = self.beat()?;
            longest = longest.max(beat.at.duration_since(last));
            last = beat.at;
        }
        Ok(longest)
    }

    fn beats(&self, count: usize) -> Result<()> {
        let mut beaten = 0;
        while beaten < count {
            let heard = self.next()?;
            beaten += heard.bytes.iter().filter(|byte| **byte == b'.').count();
        }
        Ok(())
    }
}

fn listen(mut out: ChildStdout, say: &mpsc::Sender<Heard>) {
    let mut some = [0; 4096];
    while let Ok(read @ 1..) = out.read(&mut some) {
        let bytes = some.get(..read).unwrap_or_default().to_vec();
        let at = Instant::now();
        if say.send(Heard { at, bytes }).is_err() {
            return;
        }
    }
}

/// Waits until `process` listens there.
fn wait_for(socket: &Path, process: &Process) -> Result<()> {
    let begun = Instant::now();
    while !socket.exists() {
        if begun.elapsed() > PATIENCE {
            let name = process.name.display();
            return Err(Failure::new(format!("{name} does not listen")));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_back() {
        let moved = Moved {
            at: 1,
            stood: 21.5,
            whole: 300.0,
            hush: 7.5,
            steps: vec![("pause".into(), 0.5), ("hand-over".into(), 3.25)],
        };
        assert_eq!(parse_result(&result_line(&moved)), Some(moved));
        let bare = Moved::default();
        assert_eq!(parse_result(&result_line(&bare)), Some(bare));
        assert_eq!(parse_result("guest: beat"), None);
    }

    #[test]
    fn what_the_monitor_says_of_the_stop_is_read() {
        let said = r#"{"switch-over":{"steps":[{"step":"pause","took-us":1500},{"step":"state","took-us":20}]}}"#;
        let due = [("pause".to_owned(), 1.5), ("state".to_owned(), 0.02)];
        assert_eq!(steps(said), due);
        assert_eq!(steps(r#"{"fault_message":"no"}"#), []);
    }
}
