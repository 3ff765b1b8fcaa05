// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm ctl`: the control socket's client on the command line. All that it does is a request of the
//! [API](crate::api)'s.

use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;
use serde_json::{Map, Value, json};

use crate::api::Client;
use crate::api::client::ClientError;
use crate::cli::{self, UsageError};
use crate::config::check_path;
use crate::migration::outgoing::Order;
use crate::snapshot::disks::DiskCopies;
use crate::snapshot::packed::Compression;
use crate::snapshot::{SnapshotKind, SnapshotRequest};

mod migrate;

pub use migrate::Migrate;

/// `reference-vmm ctl --help`.
pub const HELP: &str = "\
Ask something of a monitor that runs, through its control socket (`run --api-sock PATH`).

Usage: reference-vmm ctl --api-sock PATH COMMAND [--json] [--timeout SECS]

Commands:
  status        Say whether the guest is running, paused or not started
  pause         Pause the guest: its vCPUs, its devices and its input
  resume        Let it go on
  snapshot DIR  Write a snapshot of it to the directory DIR, which is new, empty, or an older snapshot that is
                replaced. A guest that runs is paused for it and goes on. `restore --from DIR` has it go on
    --track[=off]      Track what is written behind it, so that the next may build on it; or no more
    --base PREV        Only what was written since PREV, the last one, which has to be kept
    --compress zstd    Compress memory, while the guest stands still; a restore reads it and cannot map it
    --disks name|reflink|copy
                       What becomes of disks that the guest writes: only their names are in it, or clones of
                       them, or copies where the file system does not clone [name]
    --background       Memory is written when the guest goes on already: it is paused for a moment, however much
                       memory there is. Says how long, how many pages were protected in it, and what one took
  load DIR [--resume]
                Have a monitor that waits for it (`restore` without --from) make the guest of the snapshot DIR, which
                stays paused without --resume
  migrate       Move the guest to the monitor that waits for it (`run --incoming`) at --to, while it runs
  migrate-cancel  Give that up; the guest stays where it is
  migrate-status  Say how it goes, or how the last one went
  migrate-settle here|there
                Say where the guest is, when the monitor says that it cannot find that out. Look first: who says so
                wrongly has two guests, or none
  power-button  Press the power button, at which a guest with ACPI powers off
  config        Say what the machine is
  stats         Say what the guest has done so far, in numbers
  version       Say the monitor's version

Options:
  --api-sock PATH  The monitor's control socket
  --json           One line of JSON, also of a refusal (fault_message), instead of words
  --timeout SECS   How long to wait for the answer [60]
  -h, --help       Show this help

Options of migrate:
  --to ADDRESS     unix:PATH, or tcp:HOST:PORT, which beyond this host needs TLS
  --connections N  How many connections carry memory [1]
  --compress zstd[:LEVEL]
                   Compress it [none]
  --bandwidth SIZE So many bytes a second at most, as in 100M; 64K or more
  --downtime MS    How long the guest may stand still, in milliseconds [100]
  --max-time SECS  How long memory is sent while the guest runs [3600]
  --when-stuck cancel|throttle|stop
                   When it writes faster than that goes: give up; slow it by 20 %, then 10 % more at a time, up to
                   99 %, and give up if that does not help; or stop it for as long as it takes [cancel]
  --tls-cert FILE, --tls-key FILE, --tls-ca FILE
                   This host's certificate, its key, and the authority's certificate, PEM
  --tls-name NAME  Whom the other's certificate is for, if not the host in ADDRESS
  --report FILE    Write a report with plots there, HTML

The migration goes on if this command is ended: migrate-cancel ends it. --timeout is not for its answer.

Exit status: 0 done; 1 the monitor refused, or is gone; 2 the arguments were wrong.
";

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Question {
    /// Whether it runs.
    Status,
    /// To pause.
    Pause,
    /// To go on.
    Resume,
    /// To write a snapshot.
    Snapshot(SnapshotRequest),
    /// To go on from this snapshot, and whether at once.
    Load(PathBuf, bool),
    /// To move it.
    Migrate(Box<Migrate>),
    /// How that goes.
    MigrateStatus,
    /// To give it up, or where the guest is.
    MigrateOrder(Order),
    /// To press the power button.
    PowerButton,
    /// What the machine is.
    Config,
    /// What the guest has done.
    Stats,
    /// The monitor's version.
    Version,
}

/// A command line of `ctl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ctl {
    /// The monitor's socket.
    pub api_sock: PathBuf,
    /// What is asked.
    pub question: Question,
    /// One line of JSON instead of words.
    pub json: bool,
    /// How long the answer is waited for.
    pub timeout: Duration,
}

const QUESTIONS: [(&str, Question); 9] = [
    ("migrate-cancel", Question::MigrateOrder(Order::Cancel)),
    ("migrate-status", Question::MigrateStatus),
    ("status", Question::Status),
    ("pause", Question::Pause),
    ("resume", Question::Resume),
    ("power-button", Question::PowerButton),
    ("config", Question::Config),
    ("stats", Question::Stats),
    ("version", Question::Version),
];

/// The questions with arguments.
const LOAD: &str = "load";
const SNAPSHOT: &str = "snapshot";
const MIGRATE: &str = "migrate";
const SETTLE: &str = "migrate-settle";

/// Reads what follows `ctl`; none if its help is asked for.
pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Option<Ctl>, UsageError> {
    let (mut api_sock, mut question, mut json, mut timeout) = (None, None, false, 60);
    let mut resume = false;
    let mut options = SnapshotOptions::default();
    let (mut migrate, mut flags) = (false, migrate::Flags::default());
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Long("api-sock") => api_sock = Some(cli::api_sock(&mut parser)?),
            Long("json") => json = true,
            Long("timeout") => {
                timeout = cli::number_within("--timeout", parser.value()?, 1..=u32::MAX)?;
            }
            Long("resume") => resume = true,
            Value(word) if question.is_none() && !migrate && word == MIGRATE => migrate = true,
            Value(word) if question.is_none() && !migrate && word == SETTLE => {
                let order = match parser.next()? {
                    Some(Value(word)) if word == "here" => Order::Here,
                    Some(Value(word)) if word == "there" => Order::There,
                    _ => {
                        let text = "ctl migrate-settle: here or there is wanted behind the word";
                        return Err(UsageError::Command(text.into()));
                    }
                };
                question = Some(Question::MigrateOrder(order));
            }
            Value(word) if question.is_none() && !migrate && word == SNAPSHOT => {
                let dir = dir(&mut parser, "ctl snapshot: the directory that it is to be")?;
                question = Some(Question::Snapshot(SnapshotRequest::new(dir)));
            }
            Long("track") => options.track = Some(cli::on_or_off("--track", &mut parser)?),
            Long("base") => {
                let base = PathBuf::from(parser.value()?);
                check_path("--base", &base)?;
                options.base = Some(told_path("--base", base)?);
            }
            // Of migrate it is one of its own.
            Long("compress") if !migrate => {
                options.compression = Some(cli::compression(&mut parser)?);
            }
            Long("background") => options.background = true,
            Long("disks") => {
                let disks = parser.value()?.parse_with(|word| match word {
                    "name" => Ok(DiskCopies::Name),
                    "reflink" => Ok(DiskCopies::Reflink),
                    "copy" => Ok(DiskCopies::Copy),
                    _ => Err("--disks is name, reflink or copy"),
                })?;
                options.disks = Some(disks);
            }
            Value(word) if question.is_none() && !migrate && word == LOAD => {
                let dir = dir(&mut parser, "ctl load: the snapshot's directory")?;
                question = Some(Question::Load(dir, false));
            }
            Value(word) if question.is_none() && !migrate => {
                let known = QUESTIONS.iter().find(|(name, _)| word == *name);
                let Some((_, known)) = known else {
                    let names = QUESTIONS.iter().map(|(name, _)| *name);
                    let names: Vec<_> = names.chain([SNAPSHOT, LOAD, MIGRATE, SETTLE]).collect();
                    return Err(UsageError::Command(format!(
                        "ctl {} is not a command; there are {}",
                        word.display(),
                        names.join(", ")
                    )));
                };
                question = Some(known.clone());
            }
            Long(flag) => {
                let flag = flag.to_owned();
                if !flags.take(&flag, &mut parser)? {
                    return Err(Long(&flag).unexpected().into());
                }
            }
            other => return Err(other.unexpected().into()),
        }
    }
    match (migrate, flags.any()) {
        (true, _) => question = Some(Question::Migrate(Box::new(flags.migrate()?))),
        (false, None) => {}
        (false, Some(flag)) => {
            let text = format!("ctl: --{flag} is for migrate");
            return Err(UsageError::Command(text));
        }
    }
    match &mut question {
        Some(Question::Load(_, at_once)) => *at_once = resume,
        _ if resume => {
            let text =
                "ctl: --resume is of `load` alone; a guest that is paused goes on by `resume`";
            return Err(UsageError::Command(text.into()));
        }
        _ => {}
    }
    let missing = |what: &str| UsageError::Command(format!("ctl: {what}; try ctl --help"));
    match &mut question {
        Some(Question::Snapshot(request)) => options.apply(request),
        _ if options != SnapshotOptions::default() => {
            let text =
                "--track, --base, --compress, --disks and --background are options of snapshot DIR";
            return Err(missing(text));
        }
        _ => {}
    }
    Ok(Some(Ctl {
        api_sock: api_sock.ok_or_else(|| missing("no --api-sock PATH"))?,
        question: question.ok_or_else(|| missing("no command"))?,
        json,
        timeout: Duration::from_secs(timeout.into()),
    }))
}

/// The directory behind a word, as the monitor has to know it: it may be at home elsewhere.
fn dir(parser: &mut lexopt::Parser, what: &str) -> Result<PathBuf, UsageError> {
    match parser.next()? {
        Some(Value(dir)) if !dir.is_empty() => told_path(what, dir.into()),
        _ => Err(UsageError::Command(format!(
            "{what} is wanted behind the word"
        ))),
    }
}

/// A path as the monitor is told it: from the root on, for it may be at home elsewhere, and as JSON has it.
fn told_path(what: &str, path: PathBuf) -> Result<PathBuf, UsageError> {
    let path = std::path::absolute(&path).unwrap_or(path);
    match path.to_str() {
        Some(_) => Ok(path),
        None => Err(UsageError::Command(format!(
            "{what}: {path:?} is not UTF-8, and the monitor is told of it in JSON"
        ))),
    }
}

/// Options of `snapshot DIR`.
#[derive(Debug, Default, PartialEq, Eq)]
struct SnapshotOptions {
    base: Option<PathBuf>,
    track: Option<bool>,
    compression: Option<Compression>,
    disks: Option<DiskCopies>,
    background: bool,
}

impl SnapshotOptions {
    fn apply(self, request: &mut SnapshotRequest) {
        if self.base.is_some() {
            request.kind = SnapshotKind::Diff { base: self.base };
        }
        request.track = self.track;
        request.compression = self.compression.unwrap_or_default();
        request.disks = self.disks.unwrap_or_default();
        request.background = self.background;
    }
}

/// The body of a request for a snapshot: what is as it is without saying is not said.
fn snapshot_body(request: &SnapshotRequest) -> Value {
    let mut body = json!({ "snapshot_type": "Full", "snapshot_path": request.dir });
    if let SnapshotKind::Diff { base } = &request.kind {
        body["snapshot_type"] = "Diff".into();
        if let Some(base) = base {
            body["base"] = json!(base);
        }
    }
    if let Some(track) = request.track {
        body["track"] = track.into();
    }
    match request.compression {
        Compression::None => {}
        Compression::Zstd => body["compress"] = "zstd".into(),
    }
    match request.disks {
        DiskCopies::Name => {}
        DiskCopies::Reflink => body["disks"] = "reflink".into(),
        DiskCopies::Copy => body["disks"] = "copy".into(),
    }
    if request.background {
        body["background"] = true.into();
    }
    body
}

/// Asks, and says the answer: `print` gets what is for stdout, `say` the line for stderr. The exit status.
pub fn run(options: &Ctl, print: impl FnOnce(&str), say: impl FnOnce(fmt::Arguments<'_>)) -> u8 {
    let refused = match ask(options) {
        Ok(Said::Yes(text)) => {
            print(&text);
            return 0;
        }
        Ok(Said::Refused(why)) => why,
        Err(error) => error.to_string(),
    };
    if options.json {
        print(&format!("{}\n", json!({ "fault_message": refused })));
    }
    say(format_args!("{}", crate::end::Chain(&Refused(refused))));
    1
}

/// A line on its way to a terminal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

enum Said {
    Yes(String),
    Refused(String),
}

fn ask(options: &Ctl) -> Result<Said, ClientError> {
    let state = |state: &str| Some(json!({ "state": state }));
    let (method, target, body) = match &options.question {
        Question::Status => ("GET", "/", None),
        Question::Pause => ("PATCH", "/vm", state("Paused")),
        Question::Resume => ("PATCH", "/vm", state("Resumed")),
        Question::PowerButton => {
            let action = json!({ "action_type": "SendCtrlAltDel" });
            ("PUT", "/actions", Some(action))
        }
        Question::Snapshot(request) => ("PUT", "/snapshot/create", Some(snapshot_body(request))),
        Question::Load(dir, resume) => {
            let load = json!({ "snapshot_path": dir, "resume_vm": resume });
            ("PUT", "/snapshot/load", Some(load))
        }
        Question::Migrate(_) | Question::MigrateStatus => ("GET", "/migrate", None),
        Question::MigrateOrder(order) => ("PATCH", "/migrate", Some(json!({ "order": order }))),
        Question::Config => ("GET", "/vm/config", None),
        Question::Stats => ("GET", "/stats", None),
        Question::Version => ("GET", "/version", None),
    };
    let answer = match &options.question {
        Question::Migrate(asked) => migrate::ask(&options.api_sock, options.timeout, asked)?,
        _ => {
            let mut client = Client::connect(&options.api_sock, options.timeout)?;
            client.call(method, target, body.as_ref())?
        }
    };
    Ok(match answer.fault() {
        Some(why) => Said::Refused(why),
        None => Said::Yes(told(options, answer.body.unwrap_or_default())),
    })
}

/// The answer as it is printed.
fn told(options: &Ctl, body: Value) -> String {
    let (words, body) = match &options.question {
        Question::Pause | Question::Load(_, false) => {
            ("paused".into(), json!({ "state": "Paused" }))
        }
        Question::Resume | Question::Load(_, true) => {
            ("running".into(), json!({ "state": "Running" }))
        }
        Question::Snapshot(request) => {
            let dir = request.dir.display().to_string();
            let shown = dir.escape_debug().to_string();
            match body {
                Value::Object(mut cost) => {
                    let words = background_words(&shown, &cost);
                    cost.insert("snapshot_path".into(), dir.into());
                    (words, Value::Object(cost))
                }
                _ => (shown, json!({ "snapshot_path": dir })),
            }
        }
        Question::Migrate(_) | Question::MigrateStatus => (migrate::words(&body), body),
        Question::MigrateOrder(Order::Cancel) => {
            ("cancelled".into(), json!({ "order": Order::Cancel }))
        }
        Question::MigrateOrder(order) => ("settled".into(), json!({ "order": order })),
        Question::PowerButton => ("pressed".into(), json!({ "pressed": true })),
        Question::Status => (text(&body["state"]).to_lowercase(), body),
        Question::Version => (text(&body["firecracker_version"]), body),
        Question::Config | Question::Stats => {
            let mut lines = String::new();
            flat("", &body, &mut lines);
            // The newline of the last is added below.
            lines.pop();
            (lines, body)
        }
    };
    match options.json {
        true => format!("{body}\n"),
        false => words + "\n",
    }
}

/// What a snapshot in the background cost.
fn background_words(dir: &str, cost: &Map<String, Value>) -> String {
    let number = |name: &str| cost.get(name).map_or_else(|| "?".into(), text);
    format!(
        "{dir}: the guest stood still for {} us, in which {} pages were protected, {} us each; {} us in all",
        number("pause_us"),
        number("protected_pages"),
        number("us_per_page"),
        number("total_us"),
    )
}

fn text(value: &Value) -> String {
    match value {
        // A terminal obeys control characters.
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    }
}

/// A line for each number and word: where it is, and what it is.
fn flat(path: &str, value: &Value, lines: &mut String) {
    let below = |name: &str| match path {
        "" => name.escape_debug().to_string(),
        path => format!("{path}.{}", name.escape_debug()),
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                flat(&below(name), value, lines);
            }
        }
        Value::Array(values) if !values.is_empty() => {
            for (at, value) in values.iter().enumerate() {
                flat(&below(&at.to_string()), value, lines);
            }
        }
        // A string of String's takes everything.
        leaf => drop(writeln!(lines, "{path} {}", text(leaf))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Result<Option<Ctl>, UsageError> {
        parse(lexopt::Parser::from_args(words.split_whitespace()))
    }

    #[test]
    fn a_command_line_is_a_socket_and_a_question() {
        let expected = Ctl {
            api_sock: "/s".into(),
            question: Question::PowerButton,
            json: true,
            timeout: Duration::from_secs(5),
        };
        for words in [
            "--api-sock /s power-button --json --timeout 5",
            "--json --timeout=5 power-button --api-sock=/s",
        ] {
            assert_eq!(parsed(words).unwrap(), Some(expected.clone()));
        }
        assert_eq!(parsed("--help").unwrap(), None);
        let asked = parsed("--api-sock /s snapshot /a/b").unwrap().unwrap();
        assert_eq!(
            asked.question,
            Question::Snapshot(SnapshotRequest::new("/a/b"))
        );
        let asked = "--base /a --api-sock /s snapshot --track=off /b --disks copy --compress zstd";
        assert!(parsed(asked).is_err());
        let asked = "--base /a --api-sock /s snapshot /b --track=off --disks copy --compress zstd";
        let Question::Snapshot(request) = parsed(asked).unwrap().unwrap().question else {
            panic!("{asked}")
        };
        let body = json!({
            "snapshot_type": "Diff", "snapshot_path": "/b", "base": "/a", "track": false, "compress": "zstd",
            "disks": "copy",
        });
        assert_eq!(snapshot_body(&request), body);
        let asked = "--api-sock /s snapshot /b --background";
        let Question::Snapshot(request) = parsed(asked).unwrap().unwrap().question else {
            panic!("{asked}")
        };
        assert_eq!(snapshot_body(&request)["background"], true);
        for (words, resume) in [
            ("load /a", false),
            ("load /a --resume", true),
            ("--resume load /a", true),
        ] {
            let asked = parsed(&format!("--api-sock /s {words}")).unwrap().unwrap();
            assert_eq!(
                asked.question,
                Question::Load("/a".into(), resume),
                "{words}"
            );
        }
        for (words, needle) in [
            ("pause", "--api-sock"),
            ("--api-sock /s", "no command"),
            ("--api-sock /s halt", "halt"),
            ("--api-sock /s snapshot", "directory"),
            ("--api-sock /s snapshot --json", "directory"),
            ("--api-sock /s pause resume", "resume"),
            ("--api-sock /s load --resume", "directory"),
            ("--api-sock /s pause --resume", "--resume is of `load`"),
            ("--api-sock= pause", "--api-sock \"\""),
            ("--api-sock /s pause --timeout 0s", "--timeout"),
            (
                "--api-sock /s pause --timeout 0",
                "--timeout \"0\": a whole number from 1",
            ),
            (
                "--api-sock /s migrate --to tcp:1.2.3.4:5 --connections 99999",
                "--connections \"99999\": a whole number from 1 to",
            ),
            (
                "--api-sock /s migrate --to unix:/s --downtime 0",
                "--downtime \"0\"",
            ),
            (
                "--api-sock /s migrate --to unix:/s --max-time 0",
                "--max-time \"0\"",
            ),
            (
                "--api-sock /s migrate --to unix:/s --bandwidth 100",
                "--bandwidth \"100\"",
            ),
            ("--api-sock /s pause --frob", "--frob"),
            ("--api-sock /s pause --track", "options of snapshot"),
            ("--api-sock /s pause --background", "options of snapshot"),
            (
                "--api-sock /s snapshot /a --disks move",
                "name, reflink or copy",
            ),
            ("--api-sock /s snapshot /a --compress lz4", "zstd"),
            ("--api-sock /s snapshot /a --base=", "--base"),
        ] {
            let refused = parsed(words).unwrap_err().to_string();
            assert!(refused.contains(needle), "{words}: {refused}");
        }
    }

    #[test]
    fn a_path_that_json_cannot_have_is_refused_with_its_bytes() {
        use std::ffi::OsString;
        use std::os::unix::ffi::OsStringExt;
        for (words, more) in [
            (&["snapshot", "?"][..], ""),
            (&["snapshot", "/a", "--base", "?"], "--base"),
            (&["load", "?"], ""),
            (
                &[
                    "migrate",
                    "--to=unix:/s",
                    "--tls-cert",
                    "/c",
                    "--tls-key",
                    "?",
                    "--tls-ca",
                    "/a",
                ],
                "--tls-key",
            ),
        ] {
            let words = words.iter().map(|word| match *word {
                "?" => OsString::from_vec(b"/tmp/\xff".to_vec()),
                word => word.into(),
            });
            let words = ["--api-sock".into(), "/s".into()].into_iter().chain(words);
            let refused = parse(lexopt::Parser::from_args(words)).unwrap_err();
            let refused = refused.to_string();
            assert!(refused.contains("\"/tmp/\\xFF\" is not UTF-8"), "{refused}");
            assert!(refused.contains(more), "{refused}");
        }
    }

    #[test]
    fn every_word_is_in_the_help() {
        let source = include_str!("ctl.rs");
        for (start, _) in source.match_indices("Long(\"") {
            let flag = source[start + 6..].split('"').next().unwrap();
            assert!(
                flag.is_empty() || HELP.contains(&format!("--{flag}")),
                "{flag}"
            );
        }
        for (name, _) in QUESTIONS {
            assert!(HELP.contains(&format!("\n  {name} ")), "{name}");
        }
        for name in [SNAPSHOT, LOAD] {
            assert!(HELP.contains(&format!("\n  {name} DIR ")));
        }
    }

    #[test]
    fn an_answer_is_a_line_for_each_thing_that_it_says() {
        let options = |question, json| Ctl {
            api_sock: "/s".into(),
            question,
            json,
            timeout: Duration::from_secs(1),
        };
        let body = json!({"a": {"b": [1, "x\n"]}, "c": []});
        let words = told(&options(Question::Stats, false), body.clone());
        assert_eq!(words, "a.b.0 1\na.b.1 x\\n\nc []\n");
        let line = told(&options(Question::Stats, true), body);
        assert_eq!(line.lines().count(), 1);
        let snapshot = || Question::Snapshot(SnapshotRequest::new("/s"));
        assert_eq!(told(&options(snapshot(), false), Value::Null), "/s\n");
        let cost =
            json!({"pause_us": 312, "protected_pages": 5, "us_per_page": 0.4, "total_us": 9000});
        assert_eq!(
            told(&options(snapshot(), false), cost),
            "/s: the guest stood still for 312 us, in which 5 pages were protected, 0.4 us each; 9000 us in all\n"
        );
        let status = json!({ "state": "Paused" });
        assert_eq!(told(&options(Question::Status, false), status), "paused\n");
    }
}
