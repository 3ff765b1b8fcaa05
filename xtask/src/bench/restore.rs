// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a restore costs, on this host's KVM: from exec to the guest's first byte and to its answer, for guests of several
//! sizes, against a tiny guest's boot; and what each of many guests of one snapshot takes of the host.
//!
//! The guest has filled all of its memory and waits at its serial port. The character that it waits for lies in the
//! monitor's stdin when that starts; it says a byte at once, and another when it has looked at 8 MiB of pages here and there.
//! A cold restore is one whose memory file is not in the host's page cache. One with a record reads ahead what an earlier
//! restore of the same snapshot has touched.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guests::image;

use super::{Ended, host_kvm, ranks};
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::ui::{Step, say};

/// Of how much memory guests are, MiB.
const SIZES: [u32; 3] = [256, 1024, 2048];
/// Of how much the guests are that run side by side.
const FLEET_SIZE: u32 = 256;
/// How many do of whom memory is shared, and of whom it is not: all of it is in the host's memory as often.
const FLEET: usize = 100;
const FLEET_APART: usize = 20;
/// The record's name in a snapshot's directory.
const WORKING_SET: &str = "working_set";
/// And that of its pages.
const WORKING_SET_PAGES: &str = "working_set_pages";
/// How long a guest may take to fill its memory, or to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How memory comes.
struct Way {
    name: &'static str,
    flags: &'static [&'static str],
    /// Whether the file is first taken out of the page cache.
    cold: bool,
    /// Whether what an earlier guest touched is known.
    recorded: bool,
    /// How many of its guests run side by side; 0 is no fleet of them.
    fleet: usize,
}

const WAYS: [Way; 7] = [
    Way {
        name: "mapped",
        flags: &["--verify=off"],
        cold: false,
        recorded: false,
        fleet: FLEET,
    },
    Way {
        name: "mapped, cold",
        flags: &["--verify=off"],
        cold: true,
        recorded: false,
        fleet: 0,
    },
    Way {
        name: "lazy",
        flags: &["--lazy"],
        cold: false,
        recorded: false,
        fleet: FLEET_APART,
    },
    Way {
        name: "lazy, cold",
        flags: &["--lazy"],
        cold: true,
        recorded: false,
        fleet: 0,
    },
    UNRECORDED,
    RECORDED,
    Way {
        name: "read and compared",
        flags: &["--map=off"],
        cold: false,
        recorded: false,
        fleet: FLEET_APART,
    },
];

/// What is compared of a record: both restores read nothing but what is wanted, for a MiB that is checked is read as a whole.
const UNRECORDED: Way = Way {
    name: "unchecked, cold",
    flags: &["--lazy", "--verify=off"],
    cold: true,
    recorded: false,
    fleet: 0,
};
const RECORDED: Way = Way {
    name: "the same, recorded",
    recorded: true,
    ..UNRECORDED
};

pub(super) fn run(rounds: usize) -> Result<i32> {
    let reason = host_kvm()?;
    let vmm = cargo::reference_vmm()?;
    let dir = host::workspace().join("target/xtask/restore");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).context(|| format!("{} cannot be made", dir.display()))?;
    let done = measure(&vmm, &dir, rounds, &reason);
    let _ = fs::remove_dir_all(&dir);
    done
}

fn measure(vmm: &Path, dir: &Path, rounds: usize, kvm: &str) -> Result<i32> {
    let program = |name: &str, code: &[u8]| -> Result<PathBuf> {
        let file = dir.join(name);
        let written = fs::write(&file, image::elf64(code));
        written.context(|| format!("{} cannot be written", file.display()))?;
        Ok(file)
    };
    let tiny = program("tiny.elf", guests::boot::byte_and_reset64())?;
    let sleeper = program("sleeper.elf", guests::sleeper::sleeper64())?;
    let step = Step::begin(
        "snapshots of guests that have filled their memory, and what a restore touches",
    );
    for mib in SIZES {
        snapshot(vmm, &sleeper, mib, dir)?;
        record(vmm, dir, mib)?;
    }
    step.end();

    let step = Step::begin(format!("{rounds} starts of each, interleaved"));
    let mut boots = Vec::new();
    let mut starts: Vec<_> = WAYS
        .iter()
        .flat_map(|way| SIZES.map(|mib| (way, mib, Vec::new(), Vec::new())))
        .collect();
    for _ in 0..rounds {
        let argv: [&OsStr; 5] = [
            "run".as_ref(),
            "--kernel".as_ref(),
            tiny.as_ref(),
            "--memory".as_ref(),
            "1G".as_ref(),
        ];
        boots.push(Guest::start(vmm, &argv)?.hears(b'*')?);
        for (way, mib, firsts, answers) in &mut starts {
            let (mut guest, first) = restore(vmm, dir, way, *mib)?;
            firsts.push(first);
            answers.push(guest.hears(b'>')?);
        }
    }
    step.end();
    let (_, boot, _) = ranks(&mut boots);
    println!("{kvm}");
    println!(
        "milliseconds from exec, median of {rounds} (10th–90th percentile); `run` of a tiny guest of 1 GiB to its first \
         byte: {}\n",
        summary(&mut boots)
    );
    println!(
        "{:<20} {:>6} {:>24} {:>8} {:>24}",
        "memory", "MiB", "first byte", "of run", "answer"
    );
    for (way, mib, firsts, answers) in &mut starts {
        let (_, first, _) = ranks(firsts);
        println!(
            "{:<20} {mib:>6} {:>24} {:>7.2}× {:>24}",
            way.name,
            summary(firsts),
            first / boot,
            summary(answers)
        );
    }
    println!();
    for mib in SIZES {
        let mut of = |name: &str| {
            let mut all = starts.iter_mut();
            let found = all.find(|(way, size, ..)| way.name == name && *size == mib);
            found.map(|(.., answers)| ranks(answers).1)
        };
        if let (Some(without), Some(with)) = (of(UNRECORDED.name), of(RECORDED.name)) {
            println!(
                "{mib} MiB, cold: with a recorded working set the answer comes {:.2} times as fast as without",
                without / with
            );
        }
    }
    println!(
        "\nguests of one snapshot of {FLEET_SIZE} MiB side by side, each having answered: what one more takes\n"
    );
    println!(
        "{:<20} {:>6} {:>14} {:>14} {:>24}",
        "memory", "guests", "KiB, process", "KiB, host", "ms to its answer"
    );
    for way in WAYS.iter().filter(|way| way.fleet > 0) {
        let step = Step::begin(format!("{} guests, memory {}", way.fleet, way.name));
        let mut taken = fleet(vmm, dir, way)?;
        step.end();
        println!(
            "{:<20} {:>6} {:>14} {:>14} {:>24}",
            way.name,
            way.fleet,
            taken.process_kib,
            taken.host_kib,
            summary(&mut taken.answers)
        );
    }
    say(
        "of the process: its share of resident memory and page tables; of the host: what /proc/meminfo has available less",
    );
    Ok(0)
}

fn summary(values: &mut [f64]) -> String {
    let (low, middle, high) = ranks(values);
    format!("{middle:.2} ({low:.2}–{high:.2})")
}

fn snapshot_dir(dir: &Path, mib: u32) -> PathBuf {
    dir.join(format!("guest-{mib}"))
}

/// A snapshot of a guest that has filled its memory.
fn snapshot(vmm: &Path, sleeper: &Path, mib: u32, dir: &Path) -> Result<()> {
    let control = dir.join("control");
    // All behind the first 4 MiB.
    let pages = (mib - 4) * 256;
    let (memory, pages) = (format!("{mib}M"), pages.to_string());
    let argv: [&OsStr; 9] = [
        "run".as_ref(),
        "--kernel".as_ref(),
        sleeper.as_ref(),
        "--memory".as_ref(),
        memory.as_ref(),
        "--cmdline".as_ref(),
        pages.as_ref(),
        "--api-sock".as_ref(),
        control.as_ref(),
    ];
    let mut guest = Guest::start_silent(vmm, &argv)?;
    guest.hears(b'r')?;
    let to = snapshot_dir(dir, mib);
    let orders: [&[&OsStr]; 2] = [&["pause".as_ref()], &["snapshot".as_ref(), to.as_ref()]];
    for order in orders {
        let mut ctl = Command::new(vmm);
        ctl.args(["ctl", "--api-sock"])
            .arg(&control)
            .args(order)
            .stdin(Stdio::null());
        let output = ctl.output().context(|| "ctl does not start".into())?;
        if !output.status.success() {
            return Err(Failure::new(format!(
                "ctl {order:?} failed:\n{}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            )));
        }
    }
    Ok(())
}

/// Where what a restore touches is kept, out of the way of those that are to know nothing of it.
fn record_file(dir: &Path, mib: u32) -> PathBuf {
    dir.join(format!("record-{mib}"))
}

/// Records what a guest touches until it has answered.
fn record(vmm: &Path, dir: &Path, mib: u32) -> Result<()> {
    let from = snapshot_dir(dir, mib);
    let argv: [&OsStr; 4] = [
        "restore".as_ref(),
        "--record=3600".as_ref(),
        "--from".as_ref(),
        from.as_ref(),
    ];
    let mut guest = Guest::start(vmm, &argv)?;
    guest.hears(b'>')?;
    guest.end()?;
    let (made, kept) = (from.join(WORKING_SET), record_file(dir, mib));
    let moved = fs::rename(&made, &kept);
    moved.context(|| format!("{} was not recorded", made.display()))
}

/// The guest that goes on, and the milliseconds until it said its first byte.
fn restore(vmm: &Path, dir: &Path, way: &Way, mib: u32) -> Result<(Guest, f64)> {
    let from = snapshot_dir(dir, mib);
    let known = from.join(WORKING_SET);
    // What is kept of the record's pages is of no account without it.
    let known_pages = from.join(WORKING_SET_PAGES);
    match way.recorded {
        true => drop(
            fs::copy(record_file(dir, mib), &known)
                .context(|| format!("{} cannot be written", known.display()))?,
        ),
        // There is none, unless the one before had it.
        false => drop(fs::remove_file(&known)),
    }
    if way.cold {
        forget(&from.join("memory"))?;
        if known_pages.exists() {
            forget(&known_pages)?;
        }
    }
    let mut argv: Vec<OsString> = vec!["restore".into(), "--from".into(), from.into()];
    argv.extend(way.flags.iter().map(OsString::from));
    let argv: Vec<&OsStr> = argv.iter().map(OsString::as_os_str).collect();
    let mut guest = Guest::start(vmm, &argv)?;
    let first = guest.hears(b'<')?;
    Ok((guest, first))
}

/// Takes a file out of the page cache.
fn forget(file: &Path) -> Result<()> {
    let failed = || format!("{} stays in the page cache", file.display());
    let open = File::open(file).context(failed)?;
    open.sync_all().context(failed)?;
    // SAFETY: takes no pointer.
    match unsafe { libc::posix_fadvise(open.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)).context(failed),
    }
}

/// A monitor and what its guest says.
struct Guest {
    begun: Instant,
    child: Ended,
    says: ChildStdout,
    _asks: Option<ChildStdin>,
}

impl Guest {
    /// One that is asked.
    fn start(vmm: &Path, argv: &[&OsStr]) -> Result<Self> {
        let mut guest = Self::start_silent(vmm, argv)?;
        if let Some(asks) = &mut guest._asks {
            asks.write_all(b"x")
                .context(|| format!("{argv:?} takes no input"))?;
        }
        Ok(guest)
    }

    fn start_silent(vmm: &Path, argv: &[&OsStr]) -> Result<Self> {
        let begun = Instant::now();
        let mut child = Command::new(vmm)
            .args(argv)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| format!("{} does not start", vmm.display()))?;
        let (says, asks) = (child.stdout.take(), child.stdin.take());
        let child = Ended(child);
        let says = says.ok_or_else(|| Failure::new("a monitor without stdout"))?;
        Ok(Guest {
            begun,
            child,
            says,
            _asks: asks,
        })
    }

    /// Waits until it says this; the milliseconds from its start.
    fn hears(&mut self, what: u8) -> Result<f64> {
        loop {
            let mut ready = libc::pollfd {
                fd: self.says.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            let limit = i32::try_from(PATIENCE.as_millis()).unwrap_or(i32::MAX);
            // SAFETY: one pollfd, which lives as long as the call.
            if unsafe { libc::poll(&raw mut ready, 1, limit) } <= 0 {
                return Err(Failure::new("a guest says nothing"));
            }
            let mut byte = [0];
            let read = self.says.read(&mut byte);
            match read.context(|| "a guest cannot be heard".into())? {
                0 => return Err(Failure::new("a monitor ended before its guest answered")),
                _ if byte == [what] => return Ok(self.begun.elapsed().as_secs_f64() * 1e3),
                _ => {}
            }
        }
    }

    /// Ends it as a user does, and waits for that.
    fn end(mut self) -> Result<()> {
        let id = self.child.0.id() as libc::pid_t;
        // SAFETY: takes no pointer; the child has not been waited for, so the number is its own.
        unsafe { libc::kill(id, libc::SIGINT) };
        let ended = self.child.0.wait();
        ended.map(drop).context(|| "a monitor does not end".into())
    }

    /// Its share of resident memory, and its page tables, KiB.
    fn kib(&self) -> Result<u64> {
        let id = self.child.0.id();
        Ok(field(&format!("/proc/{id}/smaps_rollup"), "Pss:")?
            + field(&format!("/proc/{id}/status"), "VmPTE:")?)
    }
}

/// A number of KiB behind a word of /proc.
fn field(file: &str, word: &str) -> Result<u64> {
    let text = fs::read_to_string(file).context(|| format!("{file} cannot be read"))?;
    kib(&text, word).ok_or_else(|| Failure::new(format!("{file} has no {word}")))
}

fn kib(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

struct Taken {
    process_kib: u64,
    host_kib: u64,
    answers: Vec<f64>,
}

fn fleet(vmm: &Path, dir: &Path, way: &Way) -> Result<Taken> {
    let mut guests: Vec<Guest> = Vec::with_capacity(way.fleet);
    let mut answers = Vec::with_capacity(way.fleet);
    let mut alone = (0, 0);
    for _ in 0..way.fleet {
        let (mut guest, _) = restore(vmm, dir, way, FLEET_SIZE)?;
        answers.push(guest.hears(b'>')?);
        guests.push(guest);
        if let [first] = &guests[..] {
            alone = (first.kib()?, available()?);
        }
    }
    let all: u64 = guests.iter().map(Guest::kib).sum::<Result<u64>>()?;
    let left = available()?;
    let more = guests.len().saturating_sub(1).max(1) as u64;
    Ok(Taken {
        process_kib: all.saturating_sub(alone.0) / more,
        host_kib: alone.1.saturating_sub(left) / more,
        answers,
    })
}

/// What the host has left, once what was freed a moment ago has come back.
fn available() -> Result<u64> {
    thread::sleep(Duration::from_millis(200));
    field("/proc/meminfo", "MemAvailable:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_proc_is_read() {
        let text = "Rss:     12 kB\nPss:            4096 kB\nPss_Anon:       7 kB\n";
        assert_eq!(kib(text, "Pss:"), Some(4096));
        assert_eq!(kib(text, "Swap:"), None);
        assert_eq!(kib("Pss: much", "Pss:"), None);
    }
}
