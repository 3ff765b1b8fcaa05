// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm restore`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use kvm_core::arch::x86_64::state::ClockRestore;
use lexopt::prelude::*;

use super::{Command, Run, UsageError, device};
use crate::config::{Config, check_path};
use crate::devices::virtio::console::config::{ConsoleConfig, PortConfig};
use crate::devices::virtio::net::{Mac, NetConfig};
use crate::lazy::{LazySaid, OnLoss, PageServerAt};
use crate::migration::address::Address;
use crate::migration::incoming::{IncomingRequest, usual_lazy};
use crate::migration::tls::TlsFiles;
use crate::snapshot::RestoreRequest;

/// `reference-vmm restore --help`.
pub const RESTORE_HELP: &str = "\
Have the guest of a snapshot go on where it was, with its serial console on this terminal.

Usage: reference-vmm restore --from DIR [OPTIONS]
       reference-vmm restore --api-sock PATH [OPTIONS]

Without --from the monitor waits for `ctl load DIR`, or Firecracker's PUT /snapshot/load, which says what the
guest goes on from. All other options hold for that; a load that fails is answered, and another one may come.

Options:
  --from DIR               The snapshot. All of it is read and checked before anything is made. The file of
                           guest memory in it is mapped: leave it alone as long as the guest runs. Many
                           guests may go on from one snapshot
  --disk N:path=FILE       Disk N of the guest, from 0 on, is FILE now: a copy of what the disk was when the
                           snapshot was taken. Without it the disk's file has to be the same one, not written
                           since (of one that is readonly: of the same size, not written since)
  --disks-to FOLDER        Disks that are in the snapshot (`ctl snapshot --disks …`) are cloned or copied to
                           FOLDER/disk0 …, where there is nothing yet, and the guest goes on with those
  --net N:[tap=NAME][,mac=MAC]
                           Network card N, from 0 on, is at the tap NAME now, or has the address MAC, which
                           the guest's driver sees when it starts anew
  --vsock [cid=N][,uds=PATH]
                           The guest has the address N now, and the host's side is at PATH. Its connections
                           are gone in any case, and it is told so
  --console TO             hvc0 leads there now: stdio, file=PATH or unix=PATH. Files are written on
  --port name=NAME,unix=PATH|file=PATH
                           The port NAME leads there now; may be repeated
  --clock advanced|saved   Whether the guest's clocks show the time between, and its timers that are due
                           expire at once, or go on from where they were [advanced]
  --verify=off             Guest memory is not compared with its checksums, which reads all of it; for loads by
                           the control socket as well
  --map=off                Guest memory is read and not mapped, so that `ctl snapshot --background` can be used;
                           with --lazy it never is, so that this changes nothing
  --lazy                   The guest runs before its memory is read: what it touches comes first, the rest behind
                           it. With --verify each MiB of a file is checked before it is used. Leave the files
                           alone until all is there (`ctl status`). Each of --on-loss, --page-deadline, --record,
                           --page-handler and --page-server means --lazy
  --on-loss stop|poison    If memory does not come (an I/O error, a file that was damaged, cut off or changed):
                           the guest is stopped with the reason and status 1, or it goes on, and has a machine
                           check where it touches that memory if KVM tells enough of it [stop]
  --page-deadline SECS     The longest that anybody waits for memory [10]
  --record[=SECS]          For so long [10] only what the guest touches is brought, and is recorded in the
                           snapshot's directory (`working_set`; and, with --verify, its first pages, up to 256 MiB of
                           guest memory, `working_set_pages`): the next --lazy reads it ahead. A snapshot or a
                           migration meanwhile has all of memory brought, and so ends it, which is said; one that is
                           given up before its page server is back (--page-server) does not
  --page-handler SOCKET    A page-fault handler of Firecracker's listens there, in another process, and brings
                           memory. If it ends, or brings nothing for --page-deadline while somebody waits, memory
                           does not come
  --page-server ADDRESS    Memory comes from `snapshot serve`, which listens at unix:PATH or tcp:HOST:PORT and has the
                           same snapshot; DIR need have no file `memory`. When it goes, it is connected to again
                           for as long as --page-deadline says. Beyond this host it takes TLS
  --tls-cert FILE          For --page-server: this host's certificate, PEM; with --tls-key and --tls-ca
  --tls-key FILE           Its key, PEM
  --tls-ca FILE            The certificate of the authority that both hosts' certificates are of, PEM
  --tls-name NAME          Whom the server's certificate is for, if not the host that the address names
  --shutdown-timeout SECS  Time for the guest to power off after SIGTERM [10]; with 0 it is stopped at once
  --track-dirty-pages      Track what the guest writes from the snapshot on, so that `ctl snapshot --base DIR` may
                           build on it
  --kvm PATH               KVM device [the snapshot's]
  --api-sock PATH          As of `run`: pause, resume and snapshot the guest through a socket
  --stats[=json]           As of `run`
  --gdb ADDRESS            As of `run`: before the guest goes on
  --timeline               As of `run`
  --log LEVEL              off, error, warn, info, debug or trace [warn]
  -h, --help               Show this help

Memory, processors and devices are those of the snapshot, and no kernel is read. The guest hears by ACPI
(\"VM Generation ID\") that it goes on from a snapshot, and Linux makes its random numbers anew.

Exit status: 0 the guest powered off, rebooted or was stopped; 1 the monitor failed, nobody is at the page server's
or handler's address, or the snapshot's file of memory was lost while the guest ran (it was cut off, or its disk
fails); 2 the arguments or the snapshot were wrong, it is not for this host, or a disk has moved on; 3 the guest
crashed.
";

/// `reference-vmm run --incoming --help`.
pub const INCOMING_HELP: &str = "\
Wait for the guest of another monitor (`ctl migrate`), and have it go on here.

Usage: reference-vmm run --incoming ADDRESS [OPTIONS]

Options:
  --incoming ADDRESS       Where the other monitor connects to: unix:PATH, from this directory on where it has
                           no / first, or tcp:HOST:PORT, which without TLS has to be of this host alone
                           (127.0.0.1)
  --tls-cert FILE          This host's certificate, PEM; with --tls-key and --tls-ca
  --tls-key FILE           Its key, PEM
  --tls-ca FILE            The certificate of the authority that both hosts' certificates are of, PEM
  --disk N:path=FILE       Disk N of the guest, from 0 on, is at FILE here, with the same contents. Without it the
                           disk is at the path that it had
  --net N:[tap=NAME][,mac=MAC]
                           Network card N, from 0 on, is at the tap NAME here
  --vsock [cid=N][,uds=PATH]
                           The guest has the address N here, and the host's side is at PATH. Its connections
                           are gone in any case, and it is told so
  --console TO             hvc0 leads there now: stdio, file=PATH or unix=PATH. Files are written on
  --port name=NAME,unix=PATH|file=PATH
                           The port NAME leads there now; may be repeated
  --clock advanced|saved   Whether the guest's clocks show the time that it stood still [advanced]
  --page-deadline SECS     Of a guest that comes before its memory (ctl migrate --postcopy): the longest that it waits
                           for memory, while the other monitor makes a connection that broke again [300]
  --on-loss stop|poison    If memory has not come by then: the guest is stopped with the reason, or goes on with what
                           is lost poisoned [stop]
  --shutdown-timeout SECS  Time for the guest to power off after SIGTERM [10]; with 0 it is stopped at once
  --kvm PATH               KVM device [the other monitor's]
  --api-sock PATH          As of `run`. Before the guest is here it answers `ctl status` and `migrate-status`,
                           and refuses the rest
  --stats[=json]           As of `run`
  --gdb ADDRESS            As of `run`: before the guest goes on
  --timeline               As of `run`
  --log LEVEL              off, error, warn, info, debug or trace [warn]
  -h, --help               Show this help

Memory, processors and devices are those of the guest that comes, its serial console is on this terminal. One
guest comes: if that fails once it has been offered, it goes on where it was, and this process ends with status 1
and the reason. Connections of others are closed, and the wait goes on. Both are said on stderr.

Exit status: 0 the guest powered off, rebooted, was stopped or moved on; 1 no guest came, or the monitor failed;
2 the arguments were wrong; 3 the guest crashed.
";

/// Reads what a machine has of its own where it goes on, and how it is watched, behind `run` with an `--incoming`
/// somewhere.
pub(super) fn parse_incoming(parser: lexopt::Parser) -> Result<Command, UsageError> {
    read(parser, true)
}

/// Reads the command line behind the word.
pub(super) fn parse(parser: lexopt::Parser) -> Result<Command, UsageError> {
    read(parser, false)
}

fn read(mut parser: lexopt::Parser, incoming: bool) -> Result<Command, UsageError> {
    let (mut address, mut tls) = (None, TlsFlags::default());
    let mut request = RestoreRequest::new("");
    let mut asked_to_map = false;
    let mut lazy = LazySaid::default();
    let mut run = Run::new(Config::default());
    // The one before, if it may have a value.
    let mut last = None;
    while let Some(arg) = parser.next()? {
        let before = last.take();
        last = super::bare(&arg, &MAY_HAVE_A_VALUE);
        let of = &mut request.overrides;
        match arg {
            Value(word) if !incoming => {
                let otherwise = match request.dir.as_os_str().is_empty() {
                    true => format!(
                        ": the snapshot is named by --from {}",
                        word.to_string_lossy()
                    ),
                    false => String::new(),
                };
                return Err(super::stray(before, &word, &otherwise));
            }
            Long(flag) if OF_THE_SNAPSHOT.contains(&flag) => {
                let (from, command) = match incoming {
                    true => ("source", "run --incoming"),
                    false => ("snapshot", "restore"),
                };
                let text = format!(
                    "--{flag}: that comes from the {from}, and stays what it was: `{command}` takes no --{flag}"
                );
                return Err(UsageError::Command(text));
            }
            Short('h') | Long("help") if incoming => return Ok(Command::Help(INCOMING_HELP)),
            Short('h') | Long("help") => return Ok(Command::Help(RESTORE_HELP)),
            Long("incoming") if incoming => {
                let text = parser.value()?.string()?;
                address = Some(
                    text.parse::<Address>()
                        .map_err(|error| UsageError::Command(format!("--incoming {error}")))?,
                );
            }
            Long("tls-name") if !incoming => tls.set_name(parser.value()?.string()?),
            Long(flag) if TlsFlags::is_one(flag) => {
                let flag = flag.to_owned();
                tls.take(&flag, parser.value()?)?;
            }
            Long("from") if !incoming => {
                request.dir = parser.value()?.into();
                check_path("--from", &request.dir)?;
            }
            Long("disk") => {
                let disk = device("--disk", parser.value()?, disk)?;
                of.disks.push(disk);
            }
            Long("net") => of.nets.push(device("--net", parser.value()?, net)?),
            Long("vsock") => {
                let (cid, uds) = device("--vsock", parser.value()?, vsock)?;
                (of.cid, of.uds) = (cid.or(of.cid), uds.or(of.uds.take()));
            }
            Long("console") => {
                let to = device("--console", parser.value()?, ConsoleConfig::parse)?;
                of.console = Some(to);
            }
            Long("port") => {
                let port = device("--port", parser.value()?, PortConfig::parse)?;
                of.ports.push(port);
            }
            Long("clock") => {
                request.clock = parser.value()?.parse_with(|word| match word {
                    "advanced" => Ok(ClockRestore::Advanced),
                    "saved" => Ok(ClockRestore::AsSaved),
                    _ => Err("--clock is advanced or saved"),
                })?;
            }
            Long("map") if !incoming => {
                request.map = super::on_or_off("--map", &mut parser)?;
                asked_to_map = request.map;
            }
            Long("verify") if !incoming => {
                request.verify = super::on_or_off("--verify", &mut parser)?;
            }
            Long("disks-to") if !incoming => {
                let folder = PathBuf::from(parser.value()?);
                check_path("--disks-to", &folder)?;
                if folder.as_os_str().as_bytes().starts_with(b"--") {
                    let text = format!(
                        "--disks-to: a folder is wanted, and {} is another option; ./{0} is a folder of that name",
                        folder.display()
                    );
                    return Err(UsageError::Command(text));
                }
                request.disks_to = Some(folder);
            }
            Long("track-dirty-pages") if !incoming => request.track = true,
            Long(flag) if incoming && is_of_who_comes(flag) => {
                let flag = flag.to_owned();
                take_lazy(&flag, &mut lazy, &mut parser)?;
            }
            Long(flag) if incoming && is_lazy(flag) => return Err(comes_later(flag)),
            Long(flag) if is_lazy(flag) => {
                let flag = flag.to_owned();
                take_lazy(&flag, &mut lazy, &mut parser)?;
            }
            Long("kvm") => {
                let kvm: PathBuf = parser.value()?.into();
                check_path("--kvm", &kvm)?;
                of.kvm = Some(kvm);
            }
            Long(flag) => {
                let flag = flag.to_owned();
                run.take_flag(&flag, &mut parser)?;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if incoming {
        let mut later = Some(usual_lazy());
        lazy.over(&mut later);
        let address =
            address.ok_or_else(|| UsageError::Command("--incoming ADDRESS is missing".into()))?;
        run.incoming = Some(IncomingRequest {
            address,
            tls: tls.files()?,
            overrides: request.overrides,
            clock: request.clock,
            lazy: later.unwrap_or_default(),
        });
        return Ok(Command::Run(Box::new(run)));
    }
    match (tls.files()?, &mut lazy.page_server) {
        (None, _) => {}
        (tls, Some(server)) => server.tls = tls,
        (Some(_), None) => {
            let text = "--tls-cert, --tls-key, --tls-ca and --tls-name are for --page-server ADDRESS, which is missing";
            return Err(UsageError::Command(text.into()));
        }
    }
    lazy.over(&mut request.lazy);
    if asked_to_map && request.lazy.is_some() {
        let text = "--map: memory that comes later (--lazy and what means it) is not mapped from the file: leave out one of \
                    the two";
        return Err(UsageError::Command(text.into()));
    }
    if request.dir.as_os_str().is_empty() {
        if run.api_sock.is_none() {
            let text = "--from DIR is missing: the snapshot that the guest goes on from (or --api-sock PATH, where that \
                        is said later)";
            return Err(UsageError::Command(text.into()));
        }
        run.load = Some(request);
    } else {
        run.restore = Some(request);
    }
    Ok(Command::Run(Box::new(run)))
}

/// Options that have a value, if they have one, in the same word.
const MAY_HAVE_A_VALUE: [&str; 4] = ["--record", "--map", "--verify", "--stats"];

/// Options of `run` that say what a machine is.
const OF_THE_SNAPSHOT: [&str; 13] = [
    "kernel",
    "initrd",
    "cmdline",
    "memory",
    "cpus",
    "cpu",
    "irqchip",
    "pit",
    "rng",
    "coalesce-console",
    "dirty-log",
    "debug-exit",
    "config",
];

/// Whether this flag is about memory that comes later.
pub(crate) fn is_lazy(flag: &str) -> bool {
    matches!(
        flag,
        "lazy" | "on-loss" | "page-deadline" | "page-handler" | "page-server" | "record"
    )
}

/// Whether it is so of a guest that comes by migration as well.
fn is_of_who_comes(flag: &str) -> bool {
    matches!(flag, "on-loss" | "page-deadline")
}

/// One of them where memory does not come later.
pub(super) fn comes_later(flag: &str) -> UsageError {
    let of = match is_of_who_comes(flag) {
        true => "`restore` and of `run --incoming`",
        false => "`restore`",
    };
    UsageError::Command(format!(
        "--{flag} is an option of {of}, for memory that comes later: leave it out here"
    ))
}

/// Takes one of them.
pub(crate) fn take_lazy(
    flag: &str,
    lazy: &mut LazySaid,
    parser: &mut lexopt::Parser,
) -> Result<(), UsageError> {
    let seconds = |flag, value| {
        let seconds = super::number_within(flag, value, LazySaid::SECONDS)?;
        Ok::<_, UsageError>(Duration::from_secs(seconds.into()))
    };
    match flag {
        "on-loss" => {
            let on_loss = parser.value()?.parse_with(|word| match word {
                "stop" => Ok(OnLoss::Stop),
                "poison" => Ok(OnLoss::Poison),
                _ => Err("--on-loss is stop or poison"),
            })?;
            lazy.on_loss = Some(on_loss);
        }
        "page-deadline" => lazy.deadline = Some(seconds("--page-deadline", parser.value()?)?),
        "page-handler" => {
            let path = PathBuf::from(parser.value()?);
            check_path("--page-handler", &path)?;
            lazy.handler = Some(path);
        }
        "page-server" => {
            let text = parser.value()?.string()?;
            let address = text.parse::<Address>();
            let wrong = |error| UsageError::Command(format!("--page-server {error}"));
            lazy.page_server = Some(Box::new(PageServerAt {
                address: address.map_err(wrong)?,
                tls: None,
            }));
        }
        "record" => {
            let time = parser
                .optional_value()
                .map(|value| seconds("--record", value));
            lazy.record = Some(time.transpose()?.unwrap_or(RECORDED));
        }
        _ => lazy.lazy = true,
    }
    Ok(())
}

/// How long what the guest touches is recorded, where nobody says.
const RECORDED: Duration = Duration::from_secs(10);

/// The files of TLS, as they are read from flags.
#[derive(Default)]
pub(crate) struct TlsFlags {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
    name: Option<String>,
}

impl TlsFlags {
    /// Whether this flag is one of them.
    pub(crate) fn is_one(flag: &str) -> bool {
        matches!(flag, "tls-cert" | "tls-key" | "tls-ca")
    }

    /// Takes one of them.
    ///
    /// # Errors
    /// It is empty.
    pub(crate) fn take(&mut self, flag: &str, value: OsString) -> Result<(), UsageError> {
        let (place, flag) = match flag {
            "tls-cert" => (&mut self.cert, "--tls-cert"),
            "tls-key" => (&mut self.key, "--tls-key"),
            _ => (&mut self.ca, "--tls-ca"),
        };
        let path = PathBuf::from(value);
        check_path(flag, &path)?;
        *place = Some(std::path::absolute(&path).unwrap_or(path));
        Ok(())
    }

    /// Whom the other side's certificate is for.
    pub(crate) fn set_name(&mut self, name: String) {
        self.name = Some(name);
    }

    /// The name, or none, where nothing else was said.
    ///
    /// # Errors
    /// Something else was.
    pub(crate) fn name_alone(self) -> Result<Option<String>, ()> {
        match (self.cert, self.key, self.ca) {
            (None, None, None) => Ok(self.name),
            _ => Err(()),
        }
    }

    /// All three or none.
    ///
    /// # Errors
    /// Some of them.
    pub(crate) fn files(self) -> Result<Option<TlsFiles>, UsageError> {
        let TlsFlags {
            cert,
            key,
            ca,
            name,
        } = self;
        match (cert, key, ca) {
            (Some(cert), Some(key), Some(ca)) => Ok(Some(TlsFiles {
                cert,
                key,
                ca,
                name,
            })),
            (None, None, None) if name.is_none() => Ok(None),
            _ => {
                let text = "--tls-cert, --tls-key and --tls-ca go together";
                Err(UsageError::Command(text.into()))
            }
        }
    }
}

/// `N:OPTIONS`.
fn numbered(text: &str) -> Result<(usize, &str), String> {
    let wrong = || {
        format!(
            "{text:?}: a device's number, from 0 on, and a colon are wanted first, as in 0:path=FILE: which devices there are comes from the \
             snapshot or the source, and this says where one of them is now"
        )
    };
    let (number, options) = text.split_once(':').ok_or_else(wrong)?;
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse().ok().filter(|_| digits);
    Ok((number.ok_or_else(wrong)?, options))
}

/// `KEY=VALUE[,KEY=VALUE]...`, each key one of `keys` and there once: the values, in the order of `keys`.
fn options<'a, const N: usize>(
    text: &'a str,
    keys: [&str; N],
) -> Result<[Option<&'a str>; N], String> {
    let mut values = [None; N];
    for option in text.split(',') {
        let known = option.split_once('=').and_then(|(key, value)| {
            let at = keys.iter().position(|known| *known == key)?;
            Some((values.get_mut(at)?, value))
        });
        let Some((place, value)) = known else {
            let keys = keys.map(|key| format!("{key}=…")).join(", ");
            return Err(format!("{option:?}: not one of {keys}"));
        };
        if value.is_empty() {
            return Err(format!("{option:?}: a value is wanted"));
        }
        if place.replace(value).is_some() {
            return Err(format!("{option:?}: it is there twice"));
        }
    }
    Ok(values)
}

fn disk(text: &str) -> Result<(usize, PathBuf), String> {
    let (number, text) = numbered(text)?;
    // A path may have commas in it: it is all there is.
    match text.strip_prefix("path=") {
        Some(path) if !path.is_empty() => Ok((number, path.into())),
        _ => Err(format!("{text:?}: path=FILE is wanted")),
    }
}

fn net(text: &str) -> Result<(usize, Option<String>, Option<Mac>), String> {
    let (number, text) = numbered(text)?;
    let [tap, mac] = options(text, ["tap", "mac"])?;
    if let Some(tap) = tap {
        let checked = NetConfig::new(tap).check();
        checked.map_err(|error| error.to_string())?;
    }
    let mac = mac.map(|mac| mac.parse().map_err(|why| format!("{mac:?}: {why}")));
    Ok((number, tap.map(str::to_owned), mac.transpose()?))
}

fn vsock(text: &str) -> Result<(Option<u32>, Option<PathBuf>), String> {
    let [cid, uds] = options(text, ["cid", "uds"])?;
    let number = |cid: &str| {
        let digits = cid.bytes().all(|byte| byte.is_ascii_digit());
        let number = cid.parse().ok().filter(|_| digits);
        number.ok_or_else(|| format!("cid={cid}: a number is wanted"))
    };
    Ok((cid.map(number).transpose()?, uds.map(PathBuf::from)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Result<RestoreRequest, String> {
        let words = ["reference-vmm", "restore"]
            .into_iter()
            .chain(words.split_whitespace());
        match super::super::parse(words) {
            Ok(Command::Run(run)) => Ok(run.restore.unwrap()),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(crate::end::Chain(&error).to_string()),
        }
    }

    #[test]
    fn a_clone_gets_files_taps_and_addresses_of_its_own() {
        let request = parsed(
            "--from /s --disk 0:path=/a,b --disk 2:path=c --net 1:tap=t1,mac=02:00:00:00:00:01 --net 0:tap=t0 \
             --vsock uds=/v,cid=7 --console file=/c --port name=p,unix=/p --clock saved --verify=off --map=off --kvm /k",
        );
        let request = request.unwrap();
        let of = &request.overrides;
        assert_eq!(of.disks, [(0, "/a,b".into()), (2, "c".into())]);
        let mac = "02:00:00:00:00:01".parse().ok();
        let nets = [
            (1, Some("t1".to_owned()), mac),
            (0, Some("t0".to_owned()), None),
        ];
        assert_eq!(of.nets, nets);
        assert_eq!((of.cid, of.uds.clone()), (Some(7), Some("/v".into())));
        assert_eq!(of.console, Some(ConsoleConfig::File("/c".into())));
        assert_eq!((of.ports.len(), of.kvm.clone()), (1, Some("/k".into())));
        assert_eq!(
            (request.clock, request.verify || request.map),
            (ClockRestore::AsSaved, false)
        );
        assert_eq!(parsed("--from /s").unwrap(), RestoreRequest::new("/s"));
    }

    #[test]
    fn without_a_snapshot_one_is_waited_for_where_it_can_be_said() {
        let words = "reference-vmm restore --api-sock /a --net 0:tap=t --clock saved";
        let Ok(Command::Run(run)) = super::super::parse(words.split_whitespace()) else {
            panic!("not taken");
        };
        assert_eq!((run.restore, run.api_sock), (None, Some("/a".into())));
        let load = run.load.unwrap();
        assert_eq!(load.overrides.nets, [(0, Some("t".to_owned()), None)]);
        assert_eq!((load.dir, load.clock), ("".into(), ClockRestore::AsSaved));
    }

    #[test]
    fn what_is_of_memory_that_comes_later_says_where_it_does() {
        for (words, needle) in [
            (
                "run --kernel k --page-deadline 3",
                "--page-deadline is an option of `restore` and of `run --incoming`",
            ),
            (
                "run --on-loss poison",
                "--on-loss is an option of `restore` and of `run --incoming`",
            ),
            ("run --lazy", "--lazy is an option of `restore`,"),
            (
                "run --incoming unix:/i --record",
                "--record is an option of `restore`,",
            ),
        ] {
            let words = ["reference-vmm"]
                .into_iter()
                .chain(words.split_whitespace());
            let error = super::super::parse(words).unwrap_err().to_string();
            assert!(error.contains(needle), "{error}");
        }
    }

    #[test]
    fn every_flag_is_in_the_help() {
        // Its own, and those that it has in common with `run`.
        let (_, common) = include_str!("../cli.rs")
            .split_once("fn take_flag")
            .unwrap();
        let (common, _) = common.split_once("\n    }\n").unwrap();
        assert!(common.contains("Long(\"gdb\")"));
        let source = [include_str!("restore.rs"), common].concat();
        for (start, _) in source.match_indices("Long(\"") {
            let flag = source[start + 6..].split('"').next().unwrap();
            let flag = format!("--{flag}");
            // Of the two only.
            let restore = flag != "--incoming";
            let none = [
                "--from",
                "--verify",
                "--map",
                "--disks-to",
                "--track-dirty-pages",
                "--tls-name",
            ];
            let incoming = !none.contains(&flag.as_str());
            assert!(
                flag == "--" || !restore || RESTORE_HELP.contains(&flag),
                "{flag}"
            );
            assert!(
                flag == "--" || !incoming || INCOMING_HELP.contains(&flag),
                "{flag}"
            );
        }
        for help in [RESTORE_HELP, INCOMING_HELP] {
            assert!(help.lines().all(|line| line.len() <= 120));
        }
    }

    #[test]
    fn what_makes_no_sense_is_told_with_its_value() {
        for (words, needle) in [
            ("", "--from DIR is missing"),
            ("--from=", "--from"),
            ("--from s --disk path=a", "\"path=a\""),
            ("--from s --disk +1:path=a", "\"+1:path=a\""),
            ("--from s --disk 0:path=", "path=FILE"),
            ("--from s --disk 0:readonly", "\"readonly\""),
            (
                "--from s --net 0:queues=2",
                "\"queues=2\": not one of tap=…, mac=…",
            ),
            ("--from s --net 0:mac=1", "\"1\": six bytes"),
            ("--from s --net 0:tap=a,tap=b", "twice"),
            ("--from s --net 0:tap=a/b", "a/b"),
            ("--from s --vsock cid=-3", "cid=-3"),
            ("--from s --vsock uds=", "\"uds=\""),
            ("--from s --clock now", "advanced or saved"),
            ("--from s --verify=maybe", "on or off"),
            ("--from s --disks-to=", "--disks-to"),
            ("--from s --disks-to", "--disks-to"),
            (
                "--disks-to --from s",
                "--disks-to: a folder is wanted, and --from is another option",
            ),
            (
                "--from s --memory 1G",
                "--memory: that comes from the snapshot",
            ),
            ("--from s x", "\"x\" is no option"),
            ("x", "--from x"),
            ("--from s --record 5", "--record=5"),
            ("--from s --map off", "--map=off"),
            ("--verify off --from s", "--verify=off"),
            ("--from s --stats json", "--stats=json"),
            ("--from s --lazy --map=on", "--map"),
            ("--map --from s --record", "--map"),
            (
                "--from s --kernel k",
                "--kernel: that comes from the snapshot",
            ),
            (
                "--from s --disk path=x",
                "which devices there are comes from the snapshot",
            ),
        ] {
            let error = parsed(words).unwrap_err();
            assert!(
                error.contains(needle),
                "{words}: {error:?} has no {needle:?}"
            );
        }
    }
}
