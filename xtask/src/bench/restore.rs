// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a restore costs, on this host's KVM: from exec to the guest's first byte and to its answer, for guests of several
//! sizes, against the boot of a tiny guest of that size in the same round; and what each of many guests of one snapshot takes
//! of the host.
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guests::image;

use super::{Ended, fleet, host_kvm, ranks};
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::plot::{self, Axis, Line, Panel};
use crate::ui::Step;

/// Of how much memory guests are, MiB.
const SIZES: [u32; 3] = [256, 1024, 2048];
/// The record's name in a snapshot's directory.
const WORKING_SET: &str = "working_set";
/// And that of its pages.
const WORKING_SET_PAGES: &str = "working_set_pages";
/// How long a guest may take to fill its memory, or to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How memory comes.
pub(super) struct Way {
    pub name: &'static str,
    flags: &'static [&'static str],
    /// Whether the file is first taken out of the page cache.
    cold: bool,
    /// Whether what an earlier guest touched is known.
    recorded: bool,
    /// Whether many of its guests run side by side.
    pub fleet: bool,
}

pub(super) const WAYS: [Way; 7] = [
    Way {
        name: "mapped, unchecked",
        flags: &["--verify=off"],
        cold: false,
        recorded: false,
        fleet: true,
    },
    Way {
        name: "mapped, unchecked, cold",
        flags: &["--verify=off"],
        cold: true,
        recorded: false,
        fleet: false,
    },
    Way {
        name: "lazy",
        flags: &["--lazy"],
        cold: false,
        recorded: false,
        fleet: true,
    },
    Way {
        name: "lazy, cold",
        flags: &["--lazy"],
        cold: true,
        recorded: false,
        fleet: false,
    },
    UNRECORDED,
    RECORDED,
    Way {
        name: "read and compared",
        flags: &["--map=off"],
        cold: false,
        recorded: false,
        fleet: true,
    },
];

/// What is compared of a record: both restores read nothing but what is wanted, for a MiB that is checked is read as a whole.
const UNRECORDED: Way = Way {
    name: "lazy, unchecked, cold",
    flags: &["--lazy", "--verify=off"],
    cold: true,
    recorded: false,
    fleet: false,
};
const RECORDED: Way = Way {
    name: "lazy, unchecked, cold, recorded",
    recorded: true,
    ..UNRECORDED
};

pub(super) fn run(rounds: usize, real_time: bool, plot: Option<&Path>) -> Result<i32> {
    let reason = host_kvm()?;
    let vmm = cargo::reference_vmm()?;
    REAL_TIME.store(real_time, Ordering::Relaxed);
    let dir = host::workspace().join("target/xtask/restore");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).context(|| format!("{} cannot be made", dir.display()))?;
    let done = measure(&vmm, &dir, rounds, &reason, plot);
    let _ = fs::remove_dir_all(&dir);
    done
}

/// What was measured of one way and size, in milliseconds, a number a round.
struct Starts {
    way: &'static Way,
    mib: u32,
    firsts: Vec<f64>,
    answers: Vec<f64>,
}

fn measure(vmm: &Path, dir: &Path, rounds: usize, kvm: &str, plot: Option<&Path>) -> Result<i32> {
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
    snapshot(vmm, &sleeper, fleet::FLEET_SIZE, dir)?;
    step.end();

    let step = Step::begin(format!("{rounds} starts of each, interleaved"));
    let mut boots = SIZES.map(|mib| (mib, Vec::new()));
    let each = |way| {
        SIZES.map(|mib| Starts {
            way,
            mib,
            firsts: Vec::new(),
            answers: Vec::new(),
        })
    };
    let mut starts: Vec<_> = WAYS.iter().flat_map(each).collect();
    for _ in 0..rounds {
        for (mib, boots) in &mut boots {
            boots.push(boot(vmm, &tiny, *mib)?);
        }
        for of in &mut starts {
            let (mut guest, first) = restore(vmm, dir, of.way, of.mib)?;
            of.firsts.push(first);
            of.answers.push(guest.hears(b'>')?);
        }
    }
    step.end();
    println!("{kvm}");
    println!(
        "milliseconds from exec, median of {rounds} (10th–90th percentile), and of the boot in the same round\n"
    );
    println!(
        "{:<32} {:>6} {:>24} {:>22} {:>28}",
        "memory", "MiB", "first byte", "of the boot", "answer"
    );
    for (mib, boots) in &boots {
        let boots = summary(boots);
        println!("{BOOTED:<32} {mib:>6} {boots:>24}");
    }
    for of in &starts {
        let boots = boots.iter().find(|(mib, _)| *mib == of.mib);
        let boots = boots.map_or(&[][..], |(_, boots)| boots);
        let ratios = of.firsts.iter().zip(boots);
        let ratios: Vec<f64> = ratios.map(|(first, boot)| first / boot).collect();
        println!(
            "{:<32} {:>6} {:>24} {:>22} {:>28}",
            of.way.name,
            of.mib,
            summary(&of.firsts),
            summary(&ratios),
            summary(&of.answers)
        );
    }
    println!();
    for mib in SIZES {
        let of = |name: &str| {
            let mut all = starts.iter();
            let found = all.find(|of| of.way.name == name && of.mib == mib);
            found.map(|of| middle(&of.answers))
        };
        if let (Some(without), Some(with)) = (of(UNRECORDED.name), of(RECORDED.name)) {
            println!(
                "{mib} MiB, cold: with a recorded working set the answer comes {:.2} times as fast as without",
                without / with
            );
        }
    }
    fleet::measure(vmm, dir)?;
    if let Some(dir) = plot {
        let title = "A guest goes on from its snapshot: time from exec, by its memory";
        plot::write(dir, "restore.svg", title, &panels(&boots, &starts))?;
    }
    Ok(0)
}

/// The tiny guest that everything is compared with.
const BOOTED: &str = "tiny guest, booted";

/// To the first byte, and to the answer.
fn panels(boots: &[(u32, Vec<f64>)], starts: &[Starts]) -> Vec<Panel> {
    let line = |name: &str, points| Line {
        name: name.into(),
        points,
        dots: true,
    };
    let ways = |of: &dyn Fn(&Starts) -> f64| {
        let lines = WAYS.iter().map(|way| {
            let own = starts.iter().filter(|start| start.way.name == way.name);
            line(
                way.name,
                own.map(|start| (f64::from(start.mib), of(start))).collect(),
            )
        });
        lines.collect::<Vec<_>>()
    };
    let booted = boots
        .iter()
        .map(|(mib, all)| (f64::from(*mib), middle(all)));
    let mut first = vec![line(BOOTED, booted.collect())];
    first.extend(ways(&|start| middle(&start.firsts)));
    let answer = ways(&|start| middle(&start.answers));
    let panels = [("First byte", first), ("Answer", answer)];
    let panels = panels.map(|(title, lines)| {
        let values = lines.iter().flat_map(|line| &line.points);
        Panel {
            title: title.into(),
            x: Axis {
                title: "MiB".into(),
                from: 200.0,
                to: 2600.0,
                ticks: SIZES.map(|mib| (f64::from(mib), mib.to_string())).into(),
                log: true,
            },
            y: Axis::log("ms", values.map(|(_, y)| *y).collect::<Vec<_>>()),
            lines,
        }
    });
    panels.into()
}

fn middle(values: &[f64]) -> f64 {
    ranks(&mut values.to_vec()).1
}

/// The milliseconds to a tiny guest's first byte.
fn boot(vmm: &Path, tiny: &Path, mib: u32) -> Result<f64> {
    let memory = format!("--memory={mib}M");
    let argv: [&OsStr; 4] = [
        "run".as_ref(),
        "--kernel".as_ref(),
        tiny.as_ref(),
        memory.as_ref(),
    ];
    Guest::start(vmm, &argv)?.hears(b'*')
}

pub(super) fn summary(values: &[f64]) -> String {
    let (low, middle, high) = ranks(&mut values.to_vec());
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
pub(super) fn restore(vmm: &Path, dir: &Path, way: &Way, mib: u32) -> Result<(Guest, f64)> {
    let mut guest = start(vmm, dir, way, mib)?;
    let first = guest.hears(b'<')?;
    Ok((guest, first))
}

/// The guest that is about to go on.
pub(super) fn start(vmm: &Path, dir: &Path, way: &Way, mib: u32) -> Result<Guest> {
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
    Guest::start(vmm, &argv)
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

/// Whether all that is measured has a real-time priority. Relaxed: set before there is another thread.
static REAL_TIME: AtomicBool = AtomicBool::new(false);
/// The monitors', and of who waits for what they say: it is heard at once, though a monitor's threads have all processors.
const MONITOR: libc::c_int = 10;
const LISTENER: libc::c_int = 20;

/// Gives this thread a real-time priority, if that is wanted.
fn prioritize(priority: libc::c_int) -> Result<()> {
    if !REAL_TIME.load(Ordering::Relaxed) {
        return Ok(());
    }
    let priority = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: of this thread; the priority lives as long as the call.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context(|| "--real-time".into()),
    }
}

/// A monitor and what its guest says.
pub(super) struct Guest {
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
        // The monitor has what this thread has at this moment.
        prioritize(MONITOR)?;
        let begun = Instant::now();
        let child = Command::new(vmm)
            .args(argv)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        prioritize(LISTENER)?;
        let mut child = child.context(|| format!("{} does not start", vmm.display()))?;
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
    pub fn hears(&mut self, what: u8) -> Result<f64> {
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

    /// Its monitor's process.
    pub fn id(&self) -> u32 {
        self.child.0.id()
    }

    /// Ends it as a user does, and waits for that.
    fn end(mut self) -> Result<()> {
        let id = self.child.0.id() as libc::pid_t;
        // SAFETY: takes no pointer; the child has not been waited for, so the number is its own.
        unsafe { libc::kill(id, libc::SIGINT) };
        let ended = self.child.0.wait();
        ended.map(drop).context(|| "a monitor does not end".into())
    }
}
