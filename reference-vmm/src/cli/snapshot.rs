// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm snapshot`: what is done with snapshots where no guest runs.

use std::io;
use std::path::{Path, PathBuf};

use async_pf::working_set::{FileError, HeatMap, WorkingSet};
use lexopt::prelude::*;
use serde_json::json;

use super::restore::TlsFlags;
use super::{Command, UsageError, compression};
use crate::config::check_path;
use crate::end::Chain;
use crate::lazy::WORKING_SET;
use crate::migration::address::Address;
use crate::signals::Signals;
use crate::snapshot::files::HostFiles;
use crate::snapshot::info::{self, SnapshotInfo};
use crate::snapshot::merge::{self, MergeRequest};
use crate::snapshot::serve::{ServeError, ServeRequest, Service};
use crate::text::{json_line, printable};
use crate::units;

/// `reference-vmm snapshot --help`.
pub const SNAPSHOT_HELP: &str = "\
Look at snapshots, check them, make one of many, and serve their memory. No guest runs for it, and there need be no KVM.

Usage: reference-vmm snapshot info DIR [--json|--heat-map]
       reference-vmm snapshot verify DIR [--json]
       reference-vmm snapshot merge DIR... --to OUT [--compress zstd] [--json]
       reference-vmm snapshot serve DIR --listen ADDRESS [OPTIONS]
       reference-vmm snapshot COMMAND --help

Commands:
  info    Say what the snapshot in DIR is: its number, its moment, what it builds on, and which of those beside it
          build on it, memory, devices, disks
  verify  Read all of it and of those that it builds on, and compare it with its checksums
  merge   Make a full snapshot OUT of DIR and all that it builds on
  serve   Send DIR's memory to guests that go on elsewhere (`restore --page-server`)

Options:
  --json           One line of JSON, also of a refusal (fault_message), instead of words
  -h, --help       Show this help

Exit status: 0 done, and what was checked is whole; 1 the host refused; 2 the arguments or the snapshot were
wrong.
";

/// `reference-vmm snapshot info --help`.
pub const INFO_HELP: &str = "\
Say what the snapshot in DIR is: its number, its moment, what it builds on (and why not, where that is missing), which
snapshots in the same folder build on it, memory, devices, disks. Memory is not read, and need not be there: of a
directory with the file `state` alone (`restore --page-server`) it says what that tells.

Usage: reference-vmm snapshot info DIR [--json|--heat-map]

Options:
  --heat-map       Which pages a guest touched first when it went on from there, where a restore has recorded that
                   (`restore --record`), as a picture: lines of characters, and below them what a character means
                   and how much memory it is
  --json           One line of JSON, also of a refusal (fault_message), instead of words
  -h, --help       Show this help

`own` is the memory that an incremental one has itself; `on disk` the room that its file takes on the host. (What `ctl
snapshot` and `merge` say was written is the bytes that went into it: pages that are not zero, compressed or not.)

Exit status: 0 done; 1 the host refused; 2 the arguments or the snapshot were wrong.
";

/// `reference-vmm snapshot verify --help`.
pub const VERIFY_HELP: &str = "\
Read all of the snapshot in DIR and of those that it builds on, and compare it with its checksums.

Usage: reference-vmm snapshot verify DIR [--json]

Options:
  --json           One line of JSON, also of a refusal (fault_message), instead of words
  -h, --help       Show this help

Exit status: 0 all of it is whole; 1 the host refused; 2 the arguments or the snapshot were wrong.
";

/// `reference-vmm snapshot merge --help`.
pub const MERGE_HELP: &str = "\
Make a full snapshot OUT of DIR and all that it builds on, with memory and disks as DIR has them. All of them are
checked, and left alone.

Usage: reference-vmm snapshot merge DIR --to OUT [--compress zstd] [--json]
       reference-vmm snapshot merge FULL DIR... --to OUT [--compress zstd] [--json]

With several, all of a chain is named, in the order in which they were taken, the full one first.

Options:
  --to OUT         The directory that comes out: new, empty, or an older snapshot that is replaced, if none beside it
                   builds on it. It is synced, then renamed
  --compress zstd  Its memory is compressed: a restore reads it and cannot map it
  --json           One line of JSON, also of a refusal (fault_message), instead of words
  -h, --help       Show this help

Exit status: 0 done; 1 the host refused; 2 the arguments or the snapshots were wrong.
";

/// `reference-vmm snapshot serve --help`.
pub const SERVE_HELP: &str = "\
Send the memory of the snapshot in DIR, page by page, to guests that go on from it where only its state is: a copy of
DIR without its file `memory`, and `restore --from COPY --page-server ADDRESS`. Many at once; nothing is written.

Usage: reference-vmm snapshot serve DIR --listen ADDRESS [OPTIONS]

Options:
  --listen ADDRESS Where guests connect to: unix:PATH, which is this user's alone, or tcp:HOST:PORT (port 0: the
                   system chooses one). TCP without TLS has no authentication, so it has to be of this host
                   alone (127.0.0.1)
  --tls-cert FILE  This host's certificate, PEM; with --tls-key and --tls-ca
  --tls-key FILE   Its key, PEM
  --tls-ca FILE    The certificate of the authority that both hosts' certificates are of, PEM. Who has one of those
                   may read the guest's memory
  --verify=off     Memory is not compared with its checksums before it is sent
  --json           One line of JSON when it listens, and one at the end, instead of words
  -h, --help       Show this help

Where it listens is said on stdout, and at the end what was served. DIR and what it builds on are left alone as long.

Exit status: 0 SIGINT, SIGTERM, SIGHUP or SIGQUIT ended it; 1 the host refused, or another process listens at ADDRESS;
2 the arguments or the snapshot were wrong.
";

/// What is done with a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotCommand {
    /// What.
    pub task: SnapshotTask,
    /// One line of JSON instead of words.
    pub json: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotTask {
    /// Say what it is.
    Info(PathBuf),
    /// Say which of its pages a guest touches first.
    HeatMap(PathBuf),
    /// Check it.
    Verify(PathBuf),
    /// Make one of many.
    Merge(MergeRequest),
    /// Send its memory to who asks.
    Serve(ServeRequest),
}

/// Reads the command line behind the word.
pub(super) fn parse(mut parser: lexopt::Parser) -> Result<Command, UsageError> {
    let (mut word, mut dirs, mut to, mut json) = (None, Vec::new(), None, false);
    let mut heat_map = false;
    let mut form = None;
    let (mut listen, mut check, mut tls) = (None, None, TlsFlags::default());
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return help(word, &mut parser),
            Value(first) if word.is_none() && first == "help" => return help(None, &mut parser),
            Long("json") => json = true,
            Long("heat-map") => heat_map = true,
            Long("listen") => {
                let text = parser.value()?.string()?;
                let address = text.parse::<Address>();
                let wrong = |error| UsageError::Command(format!("--listen {error}"));
                listen = Some(address.map_err(wrong)?);
            }
            Long(flag) if TlsFlags::is_one(flag) => {
                let flag = flag.to_owned();
                tls.take(&flag, parser.value()?)?;
            }
            Long("verify") if word.as_deref() == Some("serve") => {
                check = Some(super::on_or_off("--verify", &mut parser)?);
            }
            Long("verify") => {
                let text = "--verify is no option of snapshot: `snapshot verify DIR` checks one, and `restore --verify=off` \
                            goes on from one unchecked";
                return Err(UsageError::Command(text.into()));
            }
            Long("to") => {
                let path = PathBuf::from(parser.value()?);
                check_path("--to", &path)?;
                to = Some(path);
            }
            Long("compress") => form = Some(compression(parser.value()?)?),
            Value(value) if word.is_none() => word = Some(known(value.string()?)?),
            Value(dir) => {
                let dir = PathBuf::from(dir);
                check_path("snapshot", &dir)?;
                dirs.push(dir);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let wrong = |text: String| Err(UsageError::Command(text));
    let is_serve = word.as_deref() == Some("serve");
    let tls = tls.files()?;
    if !is_serve && (listen.is_some() || tls.is_some()) {
        return wrong(
            "--listen, --tls-cert, --tls-key and --tls-ca are options of snapshot serve".into(),
        );
    }
    let is_merge = word.as_deref() == Some("merge");
    if !is_merge && (to.is_some() || form.is_some()) {
        return wrong("--to and --compress are options of snapshot merge".into());
    }
    if heat_map && (json || word.as_deref() != Some("info")) {
        return wrong("--heat-map is an option of snapshot info, and a picture, not JSON".into());
    }
    let task = match (word.as_deref(), &*dirs, to) {
        (Some("merge"), [_, ..], Some(to)) => SnapshotTask::Merge(MergeRequest {
            dirs,
            to,
            compression: form.unwrap_or_default(),
        }),
        (Some("merge"), _, _) => {
            return wrong(
                "snapshot merge: the snapshot's directory and --to OUT are wanted".into(),
            );
        }
        (Some("serve"), [dir], _) => match listen {
            Some(listen) => SnapshotTask::Serve(ServeRequest {
                dir: dir.clone(),
                listen,
                tls,
                verify: check.unwrap_or(true),
            }),
            None => {
                let text = "snapshot serve: --listen unix:PATH or --listen tcp:HOST:PORT is wanted";
                return wrong(text.into());
            }
        },
        (Some("info"), [dir], _) if heat_map => SnapshotTask::HeatMap(dir.clone()),
        (Some("info"), [dir], _) => SnapshotTask::Info(dir.clone()),
        (Some("verify"), [dir], _) => SnapshotTask::Verify(dir.clone()),
        (Some(word @ ("info" | "verify" | "serve")), _, _) => {
            return wrong(format!("snapshot {word}: one directory is wanted"));
        }
        (_, _, _) => return wrong("snapshot: no command; try snapshot --help".into()),
    };
    Ok(Command::Snapshot(SnapshotCommand { task, json }))
}

/// The help of `word`, or of the one that comes next.
fn help(word: Option<String>, parser: &mut lexopt::Parser) -> Result<Command, UsageError> {
    let word = match (word, parser.next()?) {
        (None, Some(Value(next))) => Some(known(next.string()?)?),
        (word, _) => word,
    };
    Ok(Command::Help(match word.as_deref() {
        None => SNAPSHOT_HELP,
        Some("info") => INFO_HELP,
        Some("verify") => VERIFY_HELP,
        Some("merge") => MERGE_HELP,
        // No other is known.
        Some(_) => SERVE_HELP,
    }))
}

/// `word`, if it is a command: asked before what stands behind it is read, which is some command's.
fn known(word: String) -> Result<String, UsageError> {
    const COMMANDS: [&str; 4] = ["info", "verify", "merge", "serve"];
    match COMMANDS.contains(&&*word) {
        true => Ok(word),
        false => Err(UsageError::Command(format!(
            "snapshot {word:?} is not a command{}; there are info, verify, merge and serve",
            super::meant(&word, COMMANDS)
        ))),
    }
}

/// Does it: `print` gets what is for stdout, `say` the line for stderr. The exit status.
///
/// Blocks for the files; [`Serve`](SnapshotTask::Serve) until a signal, so it is called before there is another thread.
pub fn run(
    command: &SnapshotCommand,
    print: impl Fn(&str),
    say: impl FnOnce(std::fmt::Arguments<'_>),
) -> u8 {
    let done = match &command.task {
        SnapshotTask::Info(dir) => SnapshotInfo::read(dir)
            .map(|info| (info.json(), info.to_string()))
            .map_err(|error| (error.exit_status(), Chain(&error).to_string())),
        SnapshotTask::HeatMap(dir) => SnapshotInfo::read(dir)
            .map_err(|error| (error.exit_status(), Chain(&error).to_string()))
            .and_then(|info| heat_map(dir, &info)),
        SnapshotTask::Verify(dir) => info::verify(dir)
            .map(|links| verified(dir, links))
            .map_err(|error| (error.exit_status(), Chain(&error).to_string())),
        SnapshotTask::Merge(request) => merge::merge(request, &HostFiles)
            .map(|report| merged(&request.to, &report))
            .map_err(|error| (error.exit_status(), Chain(&error).to_string())),
        SnapshotTask::Serve(request) => serve(request, |json, words| {
            print(&match command.json {
                true => json_line(&json),
                false => words,
            });
        }),
    };
    match done {
        Ok((json, words)) => {
            print(&match command.json {
                true => json_line(&json),
                false => words,
            });
            0
        }
        Err((status, why)) => {
            if command.json {
                print(&json_line(&json!({ "fault_message": why })));
            }
            say(format_args!("{why}"));
            status
        }
    }
}

/// Serves until a signal that stops: `tell` hears where it listens; what was served comes back.
fn serve(
    request: &ServeRequest,
    tell: impl Fn(serde_json::Value, String),
) -> Result<(serde_json::Value, String), (u8, String)> {
    let failed = |error: ServeError| (error.exit_status(), Chain(&error).to_string());
    let signals = Signals::take_over();
    let signals = signals.map_err(|error| (1, format!("cannot take signals over: {error}")))?;
    let service = Service::open(request).map_err(failed)?;
    let (address, id) = (service.address().to_string(), service.id());
    let json = json!({
        "address": address, "path": request.dir.to_string_lossy(), "id": id.to_string(),
        "memory_bytes": service.memory(),
    });
    let words = format!(
        "serving {} ({id}), {} of memory, at {address}\n",
        shown(&request.dir),
        units::bytes(service.memory())
    );
    tell(json, words);
    let report = service.run(|| signals.next_stop().is_some());
    Ok((report.json(), format!("{report}\n")))
}

/// A character for so many pages that all of memory is 16 lines of 64.
fn heat_map(dir: &Path, info: &SnapshotInfo) -> Result<(serde_json::Value, String), (u8, String)> {
    let record = WorkingSet::load_of(&dir.join(WORKING_SET), info.id.0);
    let record = record.map_err(|error| {
        let shown = shown(dir);
        let makes = format!("restore --from {shown} --record makes");
        match &error {
            FileError::Call { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                (2, format!("{shown} has no working set: {makes} one"))
            }
            // The host's doing, and no fault of the record's.
            FileError::Call { .. } => (1, format!("no working set: {}", Chain(&error))),
            _ => (
                2,
                format!("no working set: {}; {makes} another", Chain(&error)),
            ),
        }
    })?;
    let map = HeatMap::new(&record, 64, 16);
    let words = format!("{}{}", map.to_text(), map.legend());
    Ok((serde_json::Value::Null, words))
}

fn shown(path: &Path) -> String {
    // A terminal obeys control characters.
    printable(&path.to_string_lossy())
}

fn verified(dir: &Path, links: usize) -> (serde_json::Value, String) {
    let words = match links - 1 {
        0 => format!("{} is whole\n", shown(dir)),
        before => format!(
            "{} is whole, and so are the {before} that it builds on\n",
            shown(dir)
        ),
    };
    let path = dir.to_string_lossy();
    (
        json!({ "path": path, "whole": true, "links": links }),
        words,
    )
}

fn merged(to: &Path, report: &merge::MergeReport) -> (serde_json::Value, String) {
    let merge::MergeReport {
        id,
        links,
        memory,
        written,
    } = report;
    let words = format!(
        "{}: {id}, of {links}, {} of {} of memory written\n",
        shown(to),
        units::bytes(*written),
        units::bytes(*memory)
    );
    let json = json!({
        "path": to.to_string_lossy(), "id": id.to_string(), "links": links, "memory_bytes": memory,
        "written_bytes": written,
    });
    (json, words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::packed::Compression;

    fn parsed(words: &str) -> Result<SnapshotTask, String> {
        let words = ["reference-vmm", "snapshot"]
            .into_iter()
            .chain(words.split_whitespace());
        match super::super::parse(words) {
            Ok(Command::Snapshot(command)) => Ok(command.task),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(Chain(&error).to_string()),
        }
    }

    #[test]
    fn a_command_line_is_a_task() {
        assert_eq!(parsed("info /a"), Ok(SnapshotTask::Info("/a".into())));
        assert_eq!(
            parsed("info --heat-map /a"),
            Ok(SnapshotTask::HeatMap("/a".into()))
        );
        assert_eq!(
            parsed("verify --json a"),
            Ok(SnapshotTask::Verify("a".into()))
        );
        let merge = MergeRequest {
            dirs: vec!["a".into(), "b".into()],
            to: "c".into(),
            compression: Compression::Zstd,
        };
        let serve = ServeRequest {
            dir: "a".into(),
            listen: "unix:/s".parse().unwrap(),
            tls: None,
            verify: false,
        };
        let asked = parsed("serve a --verify=off --listen unix:/s");
        assert_eq!(asked, Ok(SnapshotTask::Serve(serve)));
        let asked = parsed("merge a --to=c --compress zstd b");
        assert_eq!(asked, Ok(SnapshotTask::Merge(merge)));
        for (words, needle) in [
            ("", "no command"),
            ("flatten a", "\"flatten\""),
            ("info", "one directory"),
            ("info a b", "one directory"),
            ("verify a --to b", "--to"),
            ("merge a", "--to OUT"),
            ("merge --to a", "directory"),
            ("merge a --to=", "--to"),
            ("merge a --to b --compress gzip", "zstd"),
            ("serve", "one directory"),
            ("serve a", "--listen"),
            ("serve a --listen 4444", "\"4444\" is no address"),
            ("serve a --listen unix:s --to b", "--to"),
            ("serve a --listen unix:s --tls-key k", "go together"),
            ("info a --listen unix:s", "--listen"),
            ("merge a --frob", "--frob"),
            ("verify a --heat-map", "--heat-map"),
            ("info a --heat-map --json", "--heat-map"),
            ("info --verify off a", "`snapshot verify DIR`"),
        ] {
            let error = parsed(words).unwrap_err();
            assert!(error.contains(needle), "{words}: {error}");
        }
        for help in [
            SNAPSHOT_HELP,
            INFO_HELP,
            VERIFY_HELP,
            MERGE_HELP,
            SERVE_HELP,
        ] {
            assert!(help.lines().all(|line| line.len() <= 120));
        }
    }
}
