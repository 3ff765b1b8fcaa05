// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lab: an emulated machine with hardware-style KVM, on any x86-64 Linux host.
//!
//! ```text
//!  this process ── QEMU (TCG, SVM and nested paging) ── Debian's kernel, kvm_amd ── agent ── COMMAND
//!       │                        │                             │                      │
//!     stdin, stdout, stderr      │                     overlay(tmpfs over 9p)         │
//!       └──────────── frames over a socket pair and a virtio-serial port ─────────────┘
//! ```
//!
//! [`image`] makes the initramfs, [`machine`] runs QEMU, [`agent`] is the first process inside, [`wire`] what the
//! two sides say. The host's tree is seen read-only under an overlay in memory: the command may write anywhere and
//! nothing of it stays.

pub(crate) mod agent;
mod image;
mod machine;
mod terminal;
mod wire;

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::assets::{Assets, Series};
use crate::failure::{Context, Failure, Result};
use machine::Machine;
use wire::{Frame, Job};

/// The command line's word for the agent: not for people.
pub(crate) const AGENT_COMMAND: &str = "lab-agent";

/// The exit status when the time limit has passed, as `timeout` has it, or the machine stands still.
pub(crate) const STATUS_TIME_LIMIT: i32 = 124;

/// A machine from which nothing has come for so long stands still: its agent says every second that it runs. (An
/// emulated machine does so, seldom; with `--icount` its seconds are longer than ours.)
const SILENCE: Duration = Duration::from_secs(120);

const USAGE: &str = "\
Runs COMMAND as root in an emulated machine whose /dev/kvm is kvm_amd with nested paging, on the host's own tree
(read-only under an overlay in memory), in the same folder. Its output comes as it is written; its exit status is
this command's. What it needs is downloaded once, into the user's cache folder; nothing is installed.

Usage: cargo xtask lab [OPTIONS] -- COMMAND…

  --kernel 6.12|6.1   the machine's kernel (6.12)
  --memory SIZE       its memory, such as 512M or 4G (2G)
  --cpus N            its CPUs (1). With more, QEMU walks the wrong page tables now and then where a guest of the
                      machine begins or ends: guests with several vCPUs die, or the machine does
  --one-thread        its CPUs take turns on one thread of this host, instead of a thread each: slower, and steadier
  --icount            its clock counts instructions: one CPU, slower, and the same times in every run
  --timeout SECONDS   the time limit, the machine's start included (600)
  --env NAME=VALUE    set for COMMAND; may be repeated. PATH, HOME, CARGO*, RUST* and the like are passed on anyway
  --disk IMAGE        a raw image as the machine's /dev/vda; what is written there is gone with the machine
  --console           the machine's console on stderr, with everything that its kernel says
  --monitor SOCKET    QEMU's monitor on a unix socket: `info registers -a` tells where a guest hangs
  --refresh           download everything again, as the archive has it today

Exit status: COMMAND's; 124 the time limit has passed, or the machine stands still; 125 the lab itself failed; 126 or 127 COMMAND does not start.";

/// What a lab machine is to be.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) kernel: Series,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    /// Whether the machine's CPUs take turns on one thread.
    pub(crate) one_thread: bool,
    pub(crate) icount: bool,
    pub(crate) time_limit: Duration,
    pub(crate) env: Vec<OsString>,
    pub(crate) console: bool,
    /// Where QEMU's monitor listens.
    pub(crate) monitor: Option<String>,
    pub(crate) refresh: bool,
    /// Whether the command is to read this process's stdin.
    pub(crate) stdin: bool,
    pub(crate) cwd: Option<PathBuf>,
    /// An image as the machine's disk, `/dev/vda`; what is written to it is gone with the machine.
    pub(crate) disk: Option<PathBuf>,
    /// TCP ports of this host's 127.0.0.1, each with the port of the machine (10.0.2.15, on eth0) that it leads to.
    pub(crate) forwards: Vec<(u16, u16)>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            kernel: Series::V6_12,
            memory_mib: 2048,
            cpus: 1,
            one_thread: false,
            icount: false,
            time_limit: Duration::from_secs(600),
            env: Vec::new(),
            console: false,
            monitor: None,
            refresh: false,
            stdin: false,
            cwd: None,
            disk: None,
            forwards: Vec::new(),
        }
    }
}

/// `cargo xtask lab`.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    use lexopt::prelude::*;
    let mut options = Options {
        stdin: true,
        ..Options::default()
    };
    let mut argv = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("kernel") => options.kernel = Series::parse(&parser.value()?.string()?)?,
            Long("memory") => options.memory_mib = parse_memory(&parser.value()?.string()?)?,
            Long("cpus") => options.cpus = parse_cpus(&parser.value()?.string()?)?,
            Long("one-thread") => options.one_thread = true,
            Long("icount") => options.icount = true,
            Long("timeout") => options.time_limit = Duration::from_secs(parser.value()?.parse()?),
            Long("env") => options.env.push(parser.value()?),
            Long("disk") => options.disk = Some(parser.value()?.into()),
            Long("console") => options.console = true,
            Long("monitor") => options.monitor = Some(parser.value()?.string()?),
            Long("refresh") => options.refresh = true,
            Short('h') | Long("help") => {
                crate::ui::show(USAGE);
                return Ok(0);
            }
            Value(word) => {
                argv.push(word);
                argv.extend(parser.raw_args()?);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if argv.is_empty() {
        return Err(Failure::usage(
            "no command was given: cargo xtask lab [OPTIONS] -- COMMAND…",
        ));
    }
    run(&options, &argv)
}

/// A size such as `512M` or `2G`, in MiB; a bare number is MiB.
pub(crate) fn parse_memory(text: &str) -> Result<u32> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1024),
        _ => (text, 1),
    };
    let size = digits
        .parse::<u32>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .filter(|n| *n >= 256);
    size.ok_or_else(|| {
        Failure::usage(format!(
            "{text} is no memory size for the lab: 256M or more, such as 512M or 2G"
        ))
    })
}

fn parse_cpus(text: &str) -> Result<u32> {
    let cpus = text.parse().ok().filter(|n| (1..=64).contains(n));
    cpus.ok_or_else(|| Failure::usage(format!("{text} is no number of CPUs for the lab: 1 to 64")))
}

/// What reaches the main thread while a command runs.
enum Event {
    Ready,
    Alive,
    Exit(i32),
    Lost(io::Error),
}

/// Which of the command's outputs bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// Takes what the command writes, on a thread of its own.
pub(crate) type Sink = Box<dyn FnMut(Stream, &[u8]) + Send>;

/// Runs a command in a lab of its own; its exit status. Its output goes to this process's.
pub(crate) fn run(options: &Options, argv: &[OsString]) -> Result<i32> {
    let ours = |stream, bytes: &[u8]| {
        // Whoever closed our output does not want the rest; the command runs on.
        let _ = match stream {
            Stream::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes).and_then(|()| out.flush())
            }
            Stream::Stderr => io::stderr().write_all(bytes),
        };
    };
    run_with(options, argv, Box::new(ours))
}

/// Runs a command in a lab of its own, with its output given to `sink`; its exit status.
pub(crate) fn run_with(options: &Options, argv: &[OsString], mut sink: Sink) -> Result<i32> {
    let assets = Assets::open(options.refresh)?;
    let begun = Instant::now();
    let (machine, port) = Machine::start(&assets, options)?;
    let deadline = begun + options.time_limit;
    let (events, happened) = mpsc::channel();
    let from_lab = port
        .try_clone()
        .context(|| "the port cannot be shared".into())?;
    let passing_on = Arc::new(AtomicBool::new(false));
    let passes_on = Arc::clone(&passing_on);
    thread::spawn(move || listen(from_lab, &mut sink, &events, &passes_on));

    let mut to_lab = port;
    let mut raw = None;
    let (mut ready, mut quiet) = (false, false);
    loop {
        let mut left = deadline.saturating_duration_since(Instant::now());
        if ready {
            // Twice: this process may have been stopped itself.
            left = left.min(SILENCE / 2);
        }
        let event = happened.recv_timeout(left);
        let was_quiet = std::mem::replace(&mut quiet, event.is_err());
        match event {
            Ok(Event::Alive) => {}
            // Relaxed: a hint; whoever reads our output may take his time.
            Err(RecvTimeoutError::Timeout)
                if Instant::now() < deadline
                    && (!was_quiet || passing_on.load(Ordering::Relaxed)) => {}
            Ok(Event::Ready) => {
                ready = true;
                let terminal =
                    options.stdin && io::stdin().is_terminal() && io::stdout().is_terminal();
                let size = if terminal { terminal::size() } else { None };
                let sent = Frame::Job(job(options, argv, size)?).send(&mut to_lab);
                sent.context(|| "the lab's port is broken".into())?;
                if size.is_some() {
                    raw = terminal::Raw::enter();
                    follow_window(
                        to_lab
                            .try_clone()
                            .context(|| "the port cannot be shared".into())?,
                    );
                }
                let input = to_lab
                    .try_clone()
                    .context(|| "the port cannot be shared".into())?;
                if options.stdin {
                    thread::spawn(move || feed(input));
                } else {
                    let _ = Frame::Stdin(Vec::new()).send(&mut { input }); // a lost lab is seen by the listener
                }
            }
            Ok(Event::Exit(status)) => return Ok(status),
            Ok(Event::Lost(error)) => {
                drop(raw);
                return Err(Failure::new(format!(
                    "the lab's machine ended before the command did ({error}); its console's last words:\n{}",
                    machine.last_words(Duration::from_secs(1))
                )));
            }
            Err(RecvTimeoutError::Timeout) => {
                drop(raw);
                let mut words = machine.last_words(Duration::ZERO);
                if !words.is_empty() {
                    words = format!("; the lab's console said last:\n{words}");
                }
                if Instant::now() < deadline {
                    let silence = SILENCE.as_secs();
                    let what = format!(
                        "the lab's machine stands still: nothing came from it for {silence} s{words}"
                    );
                    return Err(Failure::new(what).with_status(STATUS_TIME_LIMIT));
                }
                let limit = options.time_limit.as_secs();
                let what =
                    format!("the time limit of {limit} s has passed (--timeout sets it){words}");
                return Err(Failure::new(what).with_status(STATUS_TIME_LIMIT));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::new("the lab's listener ended"));
            }
        }
    }
}

/// Hands on what the command writes, and reports the rest.
fn listen(
    mut from_lab: UnixStream,
    sink: &mut Sink,
    events: &mpsc::Sender<Event>,
    passing_on: &AtomicBool,
) {
    let mut pass_on = |stream, bytes: &[u8]| {
        passing_on.store(true, Ordering::Relaxed);
        sink(stream, bytes);
        passing_on.store(false, Ordering::Relaxed);
    };
    loop {
        let event = match Frame::receive(&mut from_lab) {
            Ok(Frame::Stdout(bytes)) => {
                pass_on(Stream::Stdout, &bytes);
                continue;
            }
            Ok(Frame::Stderr(bytes)) => {
                pass_on(Stream::Stderr, &bytes);
                continue;
            }
            Ok(Frame::Ready) => Event::Ready,
            Ok(Frame::Alive) => Event::Alive,
            Ok(Frame::Exit(status)) => Event::Exit(status),
            Ok(_) => continue,
            Err(error) => Event::Lost(error),
        };
        let last = !matches!(event, Event::Ready | Event::Alive);
        if events.send(event).is_err() || last {
            return;
        }
    }
}

/// Passes our stdin on, to its end.
fn feed(mut to_lab: UnixStream) {
    let mut buffer = [0; 16 << 10];
    loop {
        let n = io::stdin().lock().read(&mut buffer).unwrap_or(0);
        if Frame::Stdin(buffer[..n].to_vec())
            .send(&mut to_lab)
            .is_err()
            || n == 0
        {
            return;
        }
    }
}

/// Tells the lab when the terminal's size changes.
fn follow_window(mut to_lab: UnixStream) {
    // Blocked here, before the thread is made, so that the signal waits for it and disturbs no one else.
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set, which the calls after it read.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGWINCH);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        set.assume_init()
    };
    thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: sigwait reads the set and writes the signal's number; both live as long as the call.
        while unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
            if let Some((rows, columns)) = terminal::size()
                && Frame::Window(rows, columns).send(&mut to_lab).is_err()
            {
                return;
            }
        }
    });
}

fn job(options: &Options, argv: &[OsString], terminal: Option<(u16, u16)>) -> Result<Job> {
    let cwd = match &options.cwd {
        Some(dir) => dir.clone(),
        None => env::current_dir().context(|| "there is no current folder".into())?,
    };
    let mut pairs: Vec<Vec<u8>> = env::vars_os()
        .filter(|(name, _)| name.to_str().is_some_and(is_passed_on))
        .map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'='))
        .collect();
    pairs.push(b"REFERENCE_VMM_LAB=1".to_vec());
    for pair in &options.env {
        if !pair.as_bytes().contains(&b'=') {
            return Err(Failure::usage(format!(
                "--env {}: NAME=VALUE is wanted",
                pair.display()
            )));
        }
        pairs.push(pair.as_bytes().to_vec());
    }
    Ok(Job {
        argv: argv
            .iter()
            .map(|word| OsStr::as_bytes(word).to_vec())
            .collect(),
        env: pairs,
        cwd: cwd.into_os_string().into_vec(),
        terminal,
    })
}

/// The variables that a command in the lab sees of ours.
fn is_passed_on(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "TERM",
        "COLORTERM",
        "LANG",
        "TZ",
        "LONG_TESTS",
    ];
    const PREFIXES: &[&str] = &[
        "LC_",
        "CARGO",
        "RUST",
        "REFERENCE_VMM_",
        "LAB_",
        "PROPTEST_",
    ];
    // What `cargo run` says of this program would mislead another.
    const NOT: &[&str] = &[
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_PRIMARY_",
    ];
    (NAMES.contains(&name) || PREFIXES.iter().any(|p| name.starts_with(p)))
        && !NOT.iter().any(|p| name.starts_with(p))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_the_usual_forms() {
        assert_eq!(parse_memory("512M").ok(), Some(512));
        assert_eq!(parse_memory("2G").ok(), Some(2048));
        assert_eq!(parse_memory("2048").ok(), Some(2048));
        for wrong in ["", "G", "0", "12M", "9999999G", "-1G", "2T"] {
            assert!(parse_memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_command_sees_the_variables_that_matter_and_not_those_of_cargo_run() {
        for name in [
            "PATH",
            "CARGO_HOME",
            "RUST_BACKTRACE",
            "LONG_TESTS",
            "LAB_KERNELS",
            "LC_ALL",
        ] {
            assert!(is_passed_on(name), "{name}");
        }
        for name in [
            "CARGO_MANIFEST_DIR",
            "CARGO_PKG_NAME",
            "LD_LIBRARY_PATH",
            "SSH_AUTH_SOCK",
        ] {
            assert!(!is_passed_on(name), "{name}");
        }
    }
}
