// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: each flag sets a field of [`Config`], so that what can be said here can be
//! said in a file or by a program as well.

pub(crate) mod restore;
pub mod snapshot;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use kvm_core::arch::x86_64::cpuid::Template;
use lexopt::prelude::*;

use crate::config::{Config, ConfigError, DirtyLogKind, Irqchip, MAX_CPUS, check_path};
use crate::cpu_model::CpuModel;
use crate::cpus::Cpus;
use crate::ctl;
use crate::devices::virtio::block::DiskConfig;
use crate::devices::virtio::console::config::{ConsoleConfig, PortConfig};
use crate::devices::virtio::net::NetConfig;
use crate::devices::virtio::vsock::VsockConfig;
use crate::gdb;
use crate::memory::Memory;
use crate::migration::incoming::IncomingRequest;
use crate::snapshot::RestoreRequest;
use crate::snapshot::packed::Compression;

/// What the user asked for.
#[derive(Debug)]
pub enum Command {
    /// `run` and `restore`: boot a guest, or have one go on.
    Run(Box<Run>),
    /// `cpu`: which processors this host can be.
    Cpu {
        /// The model to compare with the host.
        template: Template,
        /// One JSON document instead of lines.
        json: bool,
        /// The KVM device.
        kvm: PathBuf,
    },
    /// `doctor`: what this host's KVM can do.
    Doctor {
        /// One JSON document instead of lines.
        json: bool,
        /// The KVM device.
        kvm: PathBuf,
    },
    /// `snapshot`: something with snapshots where no guest runs.
    Snapshot(snapshot::SnapshotCommand),
    /// `ctl`: something of a monitor that runs.
    Ctl(ctl::Ctl),
    /// `--help`, with the text.
    Help(&'static str),
    /// `--version`.
    Version,
}

/// `run` and how it is watched.
#[derive(Debug)]
pub struct Run {
    /// The machine; of `restore`, what is not the snapshot's.
    pub config: Config,
    /// The snapshot that the machine goes on from, instead of being booted.
    pub restore: Option<RestoreRequest>,
    /// A client of the control socket says what the machine goes on from (`PUT /snapshot/load`), which is laid over this.
    pub load: Option<RestoreRequest>,
    /// The guest comes from another process, instead of being booted.
    pub incoming: Option<IncomingRequest>,
    /// Print the timeline at the end.
    pub timeline: bool,
    /// Count accesses, and print all counters at the end.
    pub stats: Option<StatsForm>,
    /// What the monitor logs to stderr.
    pub log: log::LevelFilter,
    /// How long a guest has to power off after SIGTERM pressed its power button, in seconds. With 0 that stops it at once, and
    /// no button is pressed.
    pub shutdown_timeout: u32,
    /// Where a debugger is waited for.
    pub gdb: Option<gdb::Address>,
    /// The control socket.
    pub api_sock: Option<PathBuf>,
    /// Every snapshot begins to track what is written behind it; of `restore` its request says so.
    pub track_dirty_pages: bool,
}

/// How the counters are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsForm {
    /// Tables.
    Text,
    /// One line of JSON.
    Json,
}

/// A command line that makes no sense; the process ends with status 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// An unknown flag, a missing value, a value that is not a number.
    #[error("{0}")]
    Args(#[from] lexopt::Error),
    /// A value that is no number where one is wanted.
    #[error("{flag} {value:?}: a whole number from {least} to {most} is wanted")]
    Number {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        value: OsString,
        /// The least that it may be.
        least: u32,
        /// The most.
        most: u32,
    },
    /// A flag's value makes no sense.
    #[error("{flag}: {source}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong with its value.
        source: ConfigError,
    },
    /// No address to wait for gdb at.
    #[error("--gdb {0}")]
    Gdb(gdb::NoAddress),
    /// A value that parses and cannot be.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// No command, or not one of ours.
    #[error("{0}")]
    Command(String),
}

/// `reference-vmm --help`.
pub const HELP: &str = "\
A microVM monitor for KVM.

Usage: reference-vmm run --kernel FILE [OPTIONS]
       reference-vmm run --config FILE [OPTIONS]
       reference-vmm run --incoming ADDRESS [OPTIONS]
       reference-vmm restore --from DIR [OPTIONS]
       reference-vmm restore --api-sock PATH [OPTIONS]
       reference-vmm cpu [--cpu MODEL] [--json] [--kvm PATH]
       reference-vmm ctl --api-sock PATH COMMAND [--json]
       reference-vmm snapshot info|verify|merge DIR... [--json]
       reference-vmm snapshot serve DIR --listen ADDRESS
       reference-vmm doctor [--json] [--kvm PATH]
       reference-vmm help [COMMAND...]

Commands:
  run      Boot a guest with its serial console on this terminal; with --incoming wait for one that
           `ctl migrate` sends
  restore  Have the guest of a snapshot go on where it was
  ctl      Ask something of a monitor that runs: status, pause, resume, snapshot, load, migrate,
           migrate-cancel, migrate-postcopy, migrate-status, migrate-recover, migrate-settle,
           power-button, config, stats, version
  snapshot Say what a snapshot is (info), check it (verify), make one of a chain of them (merge), or send its
           memory to guests that go on elsewhere (serve)
  cpu      Say which processors this host can be for a guest, and what a model changes
  doctor   Say what this host's KVM offers, and try it
  help     Show the help of a command, and of one within it: help ctl snapshot

Options:
  -h, --help     Show help; after a command, its own
  -V, --version  Show the version

Exit status: 0 the guest powered off, rebooted or was stopped; 1 the monitor failed;
2 the arguments or the configuration were wrong, or ask for what this host has not (huge pages
that it lacks, for example); 3 the guest crashed; with --debug-exit also what the guest chose.
";

/// `reference-vmm run --help`.
pub const RUN_HELP: &str = "\
Boot a guest with its serial console on this terminal.

Usage: reference-vmm run --kernel FILE [OPTIONS]
       reference-vmm run --config FILE [OPTIONS]
       reference-vmm run --incoming ADDRESS [OPTIONS]    (its own: run --incoming --help)

Options:
  --kernel FILE            Kernel image: bzImage, ELF (64-bit Linux or PVH) or multiboot 1
  --initrd FILE            Initial RAM disk; again for each further multiboot module
  --cmdline TEXT           Kernel command line [console=ttyS0]
  --memory SIZE[,OPT]...   Guest memory: bytes, or 512M, 2G [256M]. Options:
                             shared             in memfds that other processes can map
                             hugepages[=2M|1G]  from the host's pool of huge pages, reserved now
                             prefault           all of it made present now
                             thp=always|never   transparent huge pages [as the host is set]
                             numa=NODE          from this node of the host alone
                             guest-memfd        in a guest_memfd, of which KVM takes its pages by
                                                itself (Linux 6.18). Whole snapshots in a pause and
                                                their restore; nothing else that saves or moves it
  --cpus N[,OPT]...        Number of vCPUs, 1 to 255 [1]. Options, which have to multiply to N:
                             sockets=N          sockets of the machine [1]
                             cores=N            cores of a socket [what makes up the number]
                             threads=N          threads of a core [1]
  --cpu MODEL              Which processor the guest sees [host]: host; x86-64-v1, -v2, -v3 or -v4, a
                           level's instructions and no others; or FILE.json, a template.
                           `reference-vmm cpu` says which the host can be
  --irqchip KIND           split (local APICs in KVM, the IOAPIC in the monitor, no PIC), kernel (all
                           three in KVM) or none (one vCPU, no ACPI) [split]
  --pit                    An i8254 timer, for guests that calibrate by it; with --irqchip kernel
  --coalesce-console=off   Serial output of a guest that polls does not stay in KVM for up to 10 ms,
                           and each byte costs an exit [on]
  --dirty-log KIND         How KVM notes which pages the guest writes, while a chain of snapshots or a
                           migration asks: bitmap, or ring[=ENTRIES], a list for each vCPU [bitmap]
  --debug-exit[=PORT]      QEMU's isa-debug-exit [0xf4]: the guest writes V there, and the
                           exit status is (V << 1) | 1
  --disk path=FILE[,OPT]...
                           A disk, virtio-block: a raw file or a block device; again for more. It is
                           locked: one VM writes to it, or several read. Options:
                             readonly           the guest cannot write
                             cache=writeback|unsafe  whether a flush by the guest makes what it
                                                wrote durable; unsafe: flushes do nothing, and a
                                                crash of the host may break its file systems
                                                [writeback]
                             id=SERIAL          up to 20 letters, digits, - _ . by which the guest
                                                knows the disk
                             queues=N           1 to 16, a thread each [1]
                             io=auto|uring|threads  io_uring, or threads that wait; auto is
                                                io_uring where the host permits it [auto]
  --net tap=NAME[,OPT]...  A network card, virtio-net, at the host's tap NAME, which exists (`ip
                           tuntap add NAME mode tap user $USER`, `ip link set NAME up`); again for
                           more. Options:
                             mac=MAC            the guest's address [random]
                             queues=N           1 to 8 queue pairs, a thread each, with a tap that
                                                was made with multi_queue [1]
                             mtu=N              what the guest is told [nothing: it takes 1500]
  --vsock cid=N,uds=PATH   A vsock device: the guest has the address N [3 to 4294967294]. Who
                           connects to the Unix socket PATH on the host and sends \"CONNECT PORT\\n\"
                           is connected to the guest's PORT, and hears \"OK N\\n\" first; the guest's
                           connections to PORT of CID 2 go to the Unix socket PATH_PORT
  --console TO             A virtio console, hvc0 in Linux (console=hvc0): stdio, file=PATH, unix=PATH (a
                           socket to connect to) or off [off]. With stdio it has the input, and COM1
                           shows its output still
  --port name=NAME,unix=PATH|file=PATH
                           A port between a program of the guest's, at /dev/virtio-ports/NAME in Linux,
                           and a socket to connect to, or a file that is written; may be repeated
  --rng                    An entropy device, virtio-rng: the guest has random numbers at once
  --config FILE            Read the above from a JSON file first: {\"kernel\": \"bzImage\",
                           \"memory\": \"1G\", \"cpus\": 2}. What is on the command line as well counts there
                           alone, wherever it stands; the kernel may be on either
  --shutdown-timeout SECS  Time for the guest to power off after SIGTERM [10]; with 0 it is stopped at once
  --kvm PATH               KVM device [/dev/kvm]
  --stats[=json]           Say on stderr at the end, and at each SIGUSR1, what the guest did: exits,
                           accesses to each device and to none, coalesced writes, memory, and what
                           KVM itself counted that is not 0
  --gdb ADDRESS            Wait for gdb before the guest's first instruction, at unix:PATH or
                           tcp:ADDRESS:PORT; who can connect there owns the guest
  --api-sock PATH          Listen at this Unix socket for what is asked of the guest while it runs: HTTP with
                           Firecracker's paths; `reference-vmm ctl` and curl are clients. Who can
                           connect owns the guest: the socket is its user's alone
  --incoming ADDRESS       Boot nothing: wait for a guest that `ctl migrate` sends. `run --incoming --help` lists
                           what goes with it
  --track-dirty-pages      Each snapshot tracks what is written behind it, as by `ctl snapshot --track`
  --timeline               Say on stderr at the end what happened when, in microseconds
  --log LEVEL              off, error, warn, info, debug or trace [warn]
  -h, --help               Show this help

The guest's console is on stdin and stdout, everything else on stderr. On a terminal, Ctrl-A x
stops the guest and Ctrl-A Ctrl-A types one Ctrl-A. SIGTERM presses the guest's power button and
stops it after the timeout, or at once if the guest has no ACPI; a second one, SIGINT, SIGHUP and
SIGQUIT stop it at once, and SIGTERM does a guest that is paused. SIGUSR1 shows where each vCPU is: its registers, on stderr; with --stats
also the numbers so far, while the guest runs on (as JSON they are a line of their own).
What the guest wrote before its end is waited for; a signal that stops it cuts that short. While
memory is made present, before the guest starts, SIGTERM also stops it at once. A signal that is
ignored when the monitor starts stays ignored, as SIGINT and SIGQUIT are in a script's background job.

A guest that only halts is not over: with an irqchip the monitor waits for it until it is stopped.
Where KVM is a software one (`reference-vmm doctor` says so), a stock Linux shows nothing for many
minutes, or ends with an internal error of KVM; `cargo xtask boot` boots it in the lab instead.

Exit status: 0 the guest powered off, rebooted or was stopped; 1 the monitor failed; 2 the
arguments or the configuration were wrong, or ask for what this host has not (huge pages that it
lacks, for example); 3 the guest crashed (its registers are shown), or said through pvpanic that its
kernel panicked. With --debug-exit the guest chooses an odd one, which may be 1 or 3: statuses 1 and
3 of the monitor's own come with a line on stderr.
";

/// `reference-vmm cpu --help`.
pub const CPU_HELP: &str = "\
Say which processors this host can be for a guest, and what a model changes: the features that it hides or
adds, by the names of /proc/cpuinfo where it shows them (`invtsc` is its constant_tsc and nonstop_tsc).

Usage: reference-vmm cpu [--cpu MODEL] [--json] [--kvm PATH]

Options:
  --cpu MODEL  As of `run`: host; x86-64-v1, -v2, -v3 or -v4; or FILE.json [host]
  --json       One JSON document instead of lines, also of a model that the host cannot be (`missing`)
  --kvm PATH   KVM device [/dev/kvm]
  -h, --help   Show this help

A template is a JSON object, all of whose fields may be left out:
  {\"name\": \"fleet\", \"base\": \"x86-64-v2\", \"set\": [\"aes\"], \"clear\": [\"rdtscp\"],
   \"registers\": [{\"leaf\": \"0x1\", \"subleaf\": 0, \"register\": \"eax\", \"value\": \"0x306f0\"},
                 {\"leaf\": \"0x7\", \"register\": \"edx\", \"bits\": \"0bxx…x0xxxx\"}]}
`base` is host or a level; `bits` are 32, bit 31 first: 1 sets, 0 clears, x leaves.

Exit status: 0 the host can be this model; 2 it cannot, and what it lacks is named; 1 there is no KVM.
";

/// `reference-vmm doctor --help`.
pub const DOCTOR_HELP: &str = "\
Say what this host's KVM offers, and try it with a guest of the monitor's own. Says as well whether `restore --lazy`
and `ctl snapshot --background` will work, which need a userfaultfd, and what to do where not.

Usage: reference-vmm doctor [--json] [--kvm PATH]

Options:
  --json      One JSON document instead of lines
  --kvm PATH  KVM device [/dev/kvm]
  -h, --help  Show this help

Exit status: 0 everything that was tried works; 1 something does not, or there is no KVM.
";

/// Reads a command line, the program's name first.
///
/// # Errors
/// What is wrong, with the value. Whether files exist is found later.
pub fn parse<I>(args: I) -> Result<Command, UsageError>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    let mut parser = lexopt::Parser::from_iter(args);
    match parser.next()? {
        Some(Short('h') | Long("help")) => alone(parser, Command::Help(HELP)),
        Some(Short('V') | Long("version")) => alone(parser, Command::Version),
        Some(Value(command)) if command == "help" => help(parser),
        Some(Value(command)) if command == "run" => run(parser),
        Some(Value(command)) if command == "restore" => restore::parse(parser),
        Some(Value(command)) if command == "snapshot" => snapshot::parse(parser),
        Some(Value(command)) if command == "ctl" => Ok(match ctl::parse(parser)? {
            ctl::Parsed::Ctl(ctl) => Command::Ctl(ctl),
            ctl::Parsed::Help(text) => Command::Help(text),
        }),
        Some(Value(command)) if command == "doctor" => doctor(parser),
        Some(Value(command)) if command == "cpu" => cpu(parser),
        Some(Value(command)) => Err(UsageError::Command(format!(
            "{} is not a command{}; the commands are run, restore, snapshot, cpu, ctl, doctor and help",
            command.display(),
            meant(&command.to_string_lossy(), COMMANDS)
        ))),
        Some(other) => Err(other.unexpected().into()),
        None => Err(UsageError::Command("no command; try --help".into())),
    }
}

/// The words that may come first.
const COMMANDS: [&str; 7] = ["run", "restore", "snapshot", "cpu", "ctl", "doctor", "help"];

/// Asks whether the one of `names` is meant that `word`, which is none of them, is likest to; nothing where it is like none.
pub(crate) fn meant<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    let names = names.into_iter().filter_map(|name| {
        // A letter of three, and one more, may be wrong: what is shorter than that is like anything.
        let wrong = edits(word, name);
        (wrong <= 1 + name.len() / 5 && wrong < name.len().min(3)).then_some((wrong, name))
    });
    match names.min_by_key(|(wrong, _)| *wrong) {
        Some((_, name)) => format!(" (is {name} meant?)"),
        None => String::new(),
    }
}

/// How many letters of `a` have to be taken out, put in, changed, or changed with their neighbour until it is `b`.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    // For each beginning of `b`, from the last two beginnings of `a`.
    let mut row: Vec<usize> = (0..=b.len()).collect();
    let (mut above, mut last) = (row.clone(), None);
    for (taken, c) in a.chars().enumerate() {
        let mut next = vec![taken + 1];
        for (at, of) in b.iter().enumerate() {
            let cell = |row: &[usize], at: usize| row.get(at).copied().unwrap_or(usize::MAX - 1);
            let changed = cell(&row, at) + usize::from(c != *of);
            let mut least = changed.min(cell(&row, at + 1) + 1).min(cell(&next, at) + 1);
            let before = at.checked_sub(1).and_then(|before| b.get(before));
            if before == Some(&c) && last == Some(*of) {
                least = least.min(cell(&above, at - 1) + 1);
            }
            next.push(least);
        }
        above = std::mem::replace(&mut row, next);
        last = Some(c);
    }
    row.last().copied().unwrap_or_default()
}

/// What stands by itself.
fn alone(mut parser: lexopt::Parser, command: Command) -> Result<Command, UsageError> {
    match parser.next()? {
        None => Ok(command),
        Some(other) => Err(other.unexpected().into()),
    }
}

/// `help COMMAND…` is `COMMAND… --help`.
fn help(mut parser: lexopt::Parser) -> Result<Command, UsageError> {
    let words: Vec<OsString> = parser.raw_args()?.collect();
    match words.first() {
        None => Ok(Command::Help(HELP)),
        Some(word) if word == "help" || is_help(word) => Ok(Command::Help(HELP)),
        Some(_) => {
            let program = "reference-vmm".into();
            let words = [program].into_iter().chain(words);
            parse(words.chain(["--help".into()]))
        }
    }
}

fn is_help(word: &OsString) -> bool {
    word == "--help" || word == "-h"
}

/// Options of `run` that have a value, if they have one, in the same word.
const MAY_HAVE_A_VALUE: [&str; 3] = ["--debug-exit", "--coalesce-console", "--stats"];

/// What a flag does to the configuration.
type Edit = Box<dyn FnOnce(&mut Config)>;

fn run(mut parser: lexopt::Parser) -> Result<Command, UsageError> {
    // A guest that comes brings its machine along: what is said of it is said as of one that is restored.
    let words: Vec<OsString> = parser.raw_args()?.collect();
    let incoming = |word: &OsString| {
        let word = word.to_string_lossy();
        word == "--incoming" || word.starts_with("--incoming=")
    };
    let comes = words.iter().any(incoming);
    if comes && words.iter().any(is_help) {
        // Also behind an `--incoming` that has no address yet.
        return Ok(Command::Help(restore::INCOMING_HELP));
    }
    parser = lexopt::Parser::from_args(words);
    if comes {
        return restore::parse_incoming(parser);
    }
    // Flags override the file wherever it stands among them, so they are kept until it is read.
    let mut file = None;
    let mut changes: Vec<Edit> = Vec::new();
    let mut initrd = Vec::new();
    let (mut disks, mut nets, mut ports) = (Vec::new(), Vec::new(), Vec::new());
    let mut run = Run::new(Config::default());
    // The one before, if it may have a value.
    let mut last = None;
    while let Some(arg) = parser.next()? {
        let before = last.take();
        last = bare(&arg, &MAY_HAVE_A_VALUE);
        match arg {
            Value(word) => return Err(stray(before, &word, "")),
            Short('h') | Long("help") => return Ok(Command::Help(RUN_HELP)),
            Long("config") => {
                let path = PathBuf::from(parser.value()?);
                check_path("--config", &path)?;
                file = Some(path);
            }
            Long("kernel") => {
                let path = PathBuf::from(parser.value()?);
                changes.push(Box::new(move |config| config.kernel = Some(path)));
            }
            Long("initrd") => initrd.push(PathBuf::from(parser.value()?)),
            Long("cmdline") => {
                let text = parser.value()?.string()?;
                changes.push(Box::new(move |config| config.cmdline = text));
            }
            Long("memory") => {
                let flag = "--memory";
                let wrong = |source| UsageError::Flag { flag, source };
                let memory: Memory = parser.value()?.string()?.parse().map_err(wrong)?;
                changes.push(Box::new(move |config| config.memory = memory));
            }
            Long("cpus") => {
                let cpus = cpus(parser.value()?)?;
                changes.push(Box::new(move |config| config.cpus = cpus));
            }
            Long("cpu") => {
                let cpu = cpu_model(parser.value()?)?;
                changes.push(Box::new(move |config| config.cpu = cpu));
            }
            Long("irqchip") => {
                let kind = parser.value()?.parse_with(|kind| match kind {
                    "kernel" => Ok(Irqchip::Kernel),
                    "split" => Ok(Irqchip::Split),
                    "none" => Ok(Irqchip::None),
                    _ => Err("--irqchip is kernel, split or none"),
                })?;
                changes.push(Box::new(move |config| config.irqchip = kind));
            }
            Long("coalesce-console") => {
                let on = on_or_off("--coalesce-console", &mut parser)?;
                changes.push(Box::new(move |config| config.coalesce_console = on));
            }
            Long("dirty-log") => {
                let kind = device("--dirty-log", parser.value()?, str::parse::<DirtyLogKind>)?;
                changes.push(Box::new(move |config| config.dirty_log = kind));
            }
            Long("disk") => disks.push(device("--disk", parser.value()?, DiskConfig::parse)?),
            Long("net") => nets.push(device("--net", parser.value()?, NetConfig::parse)?),
            Long("vsock") => {
                let vsock = device("--vsock", parser.value()?, VsockConfig::parse)?;
                changes.push(Box::new(move |config| config.vsock = Some(vsock)));
            }
            Long("console") => {
                let to = device("--console", parser.value()?, ConsoleConfig::parse)?;
                changes.push(Box::new(move |config| config.console = to));
            }
            Long("port") => ports.push(device("--port", parser.value()?, PortConfig::parse)?),
            Long("rng") => changes.push(Box::new(|config| config.rng = true)),
            Long("pit") => changes.push(Box::new(|config| config.pit = true)),
            Long("debug-exit") => {
                let port = match parser.optional_value() {
                    Some(port) => port.parse_with(parse_port)?,
                    None => 0xf4,
                };
                changes.push(Box::new(move |config| config.debug_exit = Some(port)));
            }
            Long("track-dirty-pages") => run.track_dirty_pages = true,
            Long(flag) if restore::is_lazy(flag) => return Err(restore::comes_later(flag)),
            Long("kvm") => {
                let path = PathBuf::from(parser.value()?);
                changes.push(Box::new(move |config| config.kvm = path));
            }
            Long(flag) => {
                let flag = flag.to_owned();
                run.take_flag(&flag, &mut parser)?;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let config = &mut run.config;
    if let Some(file) = file {
        *config = Config::from_file(&file)?;
    }
    if !initrd.is_empty() {
        config.initrd = initrd;
    }
    if !disks.is_empty() {
        config.disks = disks;
    }
    if !nets.is_empty() {
        config.nets = nets;
    }
    if !ports.is_empty() {
        config.ports = ports;
    }
    for change in changes {
        change(config);
    }
    config.validate()?;
    if run.track_dirty_pages && config.memory.guest_memfd {
        let why = "KVM has no dirty log for a guest_memfd, and --track-dirty-pages is for that: leave one of the two out";
        return Err(UsageError::from(ConfigError::Memory {
            given: config.memory.size,
            why: why.to_owned(),
        }));
    }
    Ok(Command::Run(Box::new(run)))
}

impl Run {
    fn new(config: Config) -> Self {
        Run {
            config,
            restore: None,
            load: None,
            incoming: None,
            timeline: false,
            stats: None,
            log: log::LevelFilter::Warn,
            shutdown_timeout: 10,
            gdb: None,
            api_sock: None,
            track_dirty_pages: false,
        }
    }

    /// Takes one of the flags that `run` and `restore` have in common: those of how the machine is watched.
    fn take_flag(&mut self, flag: &str, parser: &mut lexopt::Parser) -> Result<(), UsageError> {
        match Long(flag) {
            Long("timeline") => self.timeline = true,
            Long("stats") => self.stats = Some(stats_form(parser.optional_value())?),
            Long("log") => self.log = log_level(parser.value()?)?,
            Long("shutdown-timeout") => {
                let flag = "--shutdown-timeout";
                self.shutdown_timeout = number(flag, parser.value()?, 0..=u32::MAX)?;
            }
            Long("api-sock") => self.api_sock = Some(api_sock(parser)?),
            Long("gdb") => {
                let address = parser.value()?.string()?.parse();
                self.gdb = Some(address.map_err(UsageError::Gdb)?);
            }
            other => return Err(other.unexpected().into()),
        }
        Ok(())
    }
}

fn stats_form(form: Option<OsString>) -> Result<StatsForm, UsageError> {
    let Some(form) = form else {
        return Ok(StatsForm::Text);
    };
    Ok(form.parse_with(|form| match form {
        "json" => Ok(StatsForm::Json),
        "text" => Ok(StatsForm::Text),
        _ => Err("--stats has one form besides text: json"),
    })?)
}

fn log_level(level: OsString) -> Result<log::LevelFilter, UsageError> {
    Ok(level.parse_with(|level| {
        level
            .parse()
            .map_err(|_| "--log is off, error, warn, info, debug or trace")
    })?)
}

/// A device's options, which its own module reads.
fn device<T, E: fmt::Display>(
    flag: &'static str,
    value: OsString,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, UsageError> {
    let text = value.string()?;
    parse(&text).map_err(|error| ConfigError::device(flag, error).into())
}

fn doctor(mut parser: lexopt::Parser) -> Result<Command, UsageError> {
    let (mut json, mut kvm) = (false, PathBuf::from("/dev/kvm"));
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(Command::Help(DOCTOR_HELP)),
            Long("json") => json = true,
            Long("kvm") => {
                kvm = parser.value()?.into();
                check_path("--kvm", &kvm)?;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Doctor { json, kvm })
}

fn cpu(mut parser: lexopt::Parser) -> Result<Command, UsageError> {
    let (mut json, mut kvm, mut model) = (false, PathBuf::from("/dev/kvm"), CpuModel::default());
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(Command::Help(CPU_HELP)),
            Long("json") => json = true,
            Long("cpu") => model = cpu_model(parser.value()?)?,
            Long("kvm") => {
                kvm = parser.value()?.into();
                check_path("--kvm", &kvm)?;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let template = model.template()?;
    Ok(Command::Cpu {
        template,
        json,
        kvm,
    })
}

fn cpu_model(value: OsString) -> Result<CpuModel, UsageError> {
    let flag = "--cpu";
    CpuModel::try_from(PathBuf::from(value)).map_err(|source| UsageError::Flag { flag, source })
}

/// The number of vCPUs, and behind it how they are arranged.
fn cpus(value: OsString) -> Result<Cpus, UsageError> {
    let (first, options) = match value.to_str().and_then(|text| text.split_once(',')) {
        Some((first, options)) => (first.into(), Some(options.to_owned())),
        None => (value, None),
    };
    // What is a number and not one of these is refused with the rest of the machine.
    let mut cpus = Cpus::new(number("--cpus", first, 1..=MAX_CPUS)?);
    let mut options = options.iter().flat_map(|options| options.split(','));
    let flag = "--cpus";
    options
        .try_for_each(|option| cpus.option(option))
        .map_err(|source| UsageError::Flag { flag, source })?;
    Ok(cpus)
}

/// The optional value of a flag that is on where it is there.
pub(crate) fn on_or_off(
    flag: &'static str,
    parser: &mut lexopt::Parser,
) -> Result<bool, UsageError> {
    match parser.optional_value().map(|word| word.string()) {
        None => Ok(true),
        Some(word) => match word?.as_str() {
            "on" => Ok(true),
            "off" => Ok(false),
            word => Err(UsageError::Command(format!(
                "{flag} is on or off, and not {word:?}"
            ))),
        },
    }
}

/// The one of `flags`, which have a value in the same word if they have one, that this is.
pub(crate) fn bare(arg: &lexopt::Arg<'_>, flags: &[&'static str]) -> Option<&'static str> {
    let Long(name) = arg else {
        return None;
    };
    let mut flags = flags.iter().copied();
    flags.find(|flag| flag.strip_prefix("--") == Some(name))
}

/// A word where none is wanted. Behind `flag`, whose value would have stood in the same word, it is meant for that.
pub(crate) fn stray(flag: Option<&str>, word: &OsStr, instead: &str) -> UsageError {
    let word = word.to_string_lossy();
    UsageError::Command(match flag {
        Some(flag) => format!(
            "{word:?} stands alone: the value of {flag} stands in the same word, {flag}={word}"
        ),
        None => format!("{word:?} is no option{instead}"),
    })
}

/// The value of `--compress`.
pub(crate) fn compression(value: OsString) -> Result<Compression, UsageError> {
    let compression = value.parse_with(|word| match word {
        "zstd" => Ok(Compression::Zstd),
        "none" => Ok(Compression::None),
        _ => Err("--compress is zstd or none"),
    });
    Ok(compression?)
}

/// The value of `--api-sock`.
pub(crate) fn api_sock(parser: &mut lexopt::Parser) -> Result<PathBuf, UsageError> {
    let path = PathBuf::from(parser.value()?);
    check_path("--api-sock", &path)?;
    Ok(path)
}

/// `range` is only told.
pub(crate) fn number(
    flag: &'static str,
    value: OsString,
    range: RangeInclusive<u32>,
) -> Result<u32, UsageError> {
    let number = value.to_str().and_then(|text| unsigned(text)?.parse().ok());
    let (least, most) = range.into_inner();
    number.ok_or(UsageError::Number {
        flag,
        value,
        least,
        most,
    })
}

/// The same, and a number outside `range` is refused as well: where nothing behind it would do so.
pub(crate) fn number_within(
    flag: &'static str,
    value: OsString,
    range: RangeInclusive<u32>,
) -> Result<u32, UsageError> {
    let number = number(flag, value.clone(), range.clone())?;
    let (least, most) = range.clone().into_inner();
    range
        .contains(&number)
        .then_some(number)
        .ok_or(UsageError::Number {
            flag,
            value,
            least,
            most,
        })
}

/// `text` if it has no sign, which Rust's numbers may have.
fn unsigned(text: &str) -> Option<&str> {
    (!text.starts_with('+')).then_some(text)
}

fn parse_port(text: &str) -> Result<u16, &'static str> {
    let port = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) => unsigned(hex).and_then(|hex| u16::from_str_radix(hex, 16).ok()),
        None => unsigned(text).and_then(|text| text.parse().ok()),
    };
    port.ok_or("--debug-exit is a port, a number from 0 to 0xffff")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn parsed(args: &[&str]) -> Result<Command, UsageError> {
        parse([&["reference-vmm"], args].concat())
    }

    fn config(args: &[&str]) -> Config {
        match parsed(&[&["run"], args].concat()).unwrap() {
            Command::Run(run) => run.config,
            other => panic!("{other:?}"),
        }
    }

    fn refused(args: &[&str]) -> String {
        parsed(args).unwrap_err().to_string()
    }

    #[test]
    fn flags_set_the_fields_that_they_name() {
        assert_eq!(config(&["--kernel", "k"]), Config::new("k"));
        let flags = "--kernel=k --initrd a --initrd b --cmdline c --memory 2G --cpus 4 \
                     --irqchip split --debug-exit --kvm /k";
        let expected = Config {
            initrd: vec!["a".into(), "b".into()],
            cmdline: "c".into(),
            memory: Memory::new(2 << 30),
            cpus: 4.into(),
            irqchip: Irqchip::Split,
            debug_exit: Some(0xf4),
            kvm: "/k".into(),
            ..Config::new("k")
        };
        assert_eq!(
            config(&flags.split_whitespace().collect::<Vec<_>>()),
            expected
        );
        assert_eq!(
            config(&["--kernel", "k", "--debug-exit=0x501"]).debug_exit,
            Some(0x501)
        );
        for (flag, on) in [
            ("--coalesce-console=off", false),
            ("--coalesce-console=on", true),
            ("--coalesce-console", true),
        ] {
            assert_eq!(config(&["--kernel", "k", flag]).coalesce_console, on);
        }
    }

    #[test]
    fn flags_override_the_file_wherever_they_stand() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(br#"{"kernel": "from-file", "cpus": 2, "memory": "1G"}"#)
            .unwrap();
        let path = file.path().to_str().unwrap();
        let got = config(&["--cpus", "3", "--config", path]);
        assert_eq!(
            got,
            Config {
                cpus: 3.into(),
                memory: Memory::new(1 << 30),
                ..Config::new("from-file")
            }
        );
        assert_eq!(
            config(&["--kernel", "k", "--config", path]).kernel,
            Some(PathBuf::from("k"))
        );
    }

    #[test]
    fn the_kernel_may_be_on_the_command_line_alone() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(br#"{"cpus": 2}"#).unwrap();
        let path = file.path().to_str().unwrap();
        let expected = Config {
            cpus: 2.into(),
            ..Config::new("k")
        };
        for args in [
            ["--kernel", "k", "--config", path],
            ["--config", path, "--kernel", "k"],
        ] {
            assert_eq!(config(&args), expected);
        }
        assert!(refused(&["run", "--config", path]).contains("--kernel"));
    }

    #[test]
    fn a_command_that_is_nearly_one_is_asked_about() {
        for (args, needle) in [
            (&["restor"][..], "is restore meant?"),
            (&["rnu", "--kernel", "k"], "is run meant?"),
            (&["snapsot", "info"], "is snapshot meant?"),
            (
                &["snapshot", "server", "a", "--listen", "unix:s"],
                "snapshot \"server\" is not a command (is serve meant?)",
            ),
            (&["snapshot", "verfiy", "a"], "is verify meant?"),
            (&["snapshot", "help", "inf"], "is info meant?"),
            (&["ctl", "stauts"], "is status meant?"),
            (&["ctl", "migrate-cancle"], "is migrate-cancel meant?"),
        ] {
            let message = refused(args);
            assert!(message.contains(needle), "{args:?}: {message}");
        }
        for args in [&["boot"][..], &["x"], &["snapshot", "list"], &["ctl", "go"]] {
            let message = refused(args);
            assert!(!message.contains("meant"), "{args:?}: {message}");
        }
    }

    #[test]
    fn wrong_words_are_refused_with_the_word() {
        for (args, needle) in [
            (&["run"][..], "--kernel"),
            (&["run", "--kernel", "k", "--cpus", "0"], "0 vCPUs"),
            (&["run", "--kernel", "k", "--cpus", "-1"], "-1"),
            (&["run", "--kernel", "k", "--cpus", "+4"], "--cpus \"+4\""),
            (
                &["run", "--kernel", "k", "--shutdown-timeout", "+4"],
                "\"+4\"",
            ),
            (&["run", "--kernel", "k", "--debug-exit=+244"], "+244"),
            (&["run", "--kernel", "k", "--debug-exit=0x+f4"], "0x+f4"),
            (
                &["run", "--kernel", "k", "--cpu", ""],
                "--cpu: \"\" is no processor model",
            ),
            (
                &["run", "--kernel", "k", "--cpus", "many"],
                "--cpus \"many\": a whole number from 1 to 255",
            ),
            (
                &["run", "--kernel", "k", "--cpus="],
                "--cpus \"\": a whole number from 1 to 255",
            ),
            (
                &["run", "--kernel", "k", "--memory", "x"],
                "--memory: \"x\" is not a size",
            ),
            (
                &["run", "--kernel", "k", "--debug-exit=x"],
                "\"x\": --debug-exit",
            ),
            (&["run", "--kernel", "k", "--initrd="], "--initrd \"\""),
            (&["run", "--kernel", "k", "--kvm="], "--kvm \"\""),
            (&["run", "--kernel="], "--kernel \"\""),
            (&["run", "--config="], "--config \"\""),
            (&["doctor", "--kvm="], "--kvm \"\""),
            (&["--version", "x"], "\"x\""),
            (&["-V", "--json"], "--json"),
            (&["--help", "run"], "\"run\""),
            (&["run", "--kernel", "k", "--memory", "0"], "0 bytes"),
            (&["run", "--kernel", "k", "--memory", "8EB"], "8EB"),
            (&["run", "--kernel", "k", "--irqchip", "apic"], "apic"),
            (&["run", "--kernel", "k", "--debug-exit=0x10000"], "0x10000"),
            (&["run", "--kernel", "k", "--coalesce-console=no"], "no"),
            (
                &["run", "--kernel", "k", "--cpu", "i486"],
                "--cpu: \"i486\"",
            ),
            (&["run", "--kernel", "k", "--cpus", "4,cores=3"], "4 vCPUs"),
            (&["run", "--kernel", "k", "--frob"], "--frob"),
            (&["cpu", "--cpu", "i486"], "--cpu: \"i486\""),
            (&["run", "--kernel", "k", "extra"], "\"extra\" is no option"),
            (
                &["run", "--kernel", "k", "--debug-exit", "0x501"],
                "--debug-exit=0x501",
            ),
            (&["run", "--kernel"], "--kernel"),
            (&["run", "--config", "/no/such/file"], "/no/such/file"),
            (
                &["run", "--kernel", "k", "--gdb", "1234"],
                "--gdb \"1234\": unix:PATH or tcp:ADDRESS:PORT",
            ),
            (&["run", "--kernel", "k", "--gdb"], "--gdb"),
            (&["run", "--kernel", "k", "--api-sock="], "--api-sock \"\""),
            (&["ctl", "--api-sock", "s"], "no command"),
            (&["boot"], "boot"),
            (&["doctor", "--xml"], "--xml"),
            (&[], "--help"),
        ] {
            let message = refused(args);
            assert!(
                message.contains(needle),
                "{args:?}: {message:?} has no {needle:?}"
            );
        }
    }

    #[test]
    fn every_flag_is_in_the_help() {
        let source = include_str!("cli.rs");
        for (start, _) in source.match_indices("Long(\"") {
            let flag = source[start + 6..].split('"').next().unwrap();
            let snapshot = snapshot::MERGE_HELP;
            let help = [HELP, ctl::HELP, RUN_HELP, CPU_HELP, DOCTOR_HELP, snapshot].concat();
            assert!(
                flag.is_empty() || help.contains(&format!("--{flag}")),
                "--{flag}"
            );
        }
    }
}
