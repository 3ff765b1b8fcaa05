// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm ctl`: the control socket's client on the command line. All that it does is a request of the
//! [API](crate::api)'s.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lexopt::prelude::*;
use serde_json::{Map, Value, json};

use crate::api::Client;
use crate::api::client::{ClientError, MAX_ANSWER};
use crate::cli::{self, UsageError};
use crate::config::check_path;
use crate::lazy::{self, LazySaid};
use crate::migration::outgoing::Order;
use crate::migration::recover::Recover;
use crate::snapshot::disks::DiskCopies;
use crate::snapshot::packed::Compression;
use crate::snapshot::{SnapshotKind, SnapshotRequest};
use crate::text::{json_line, printable};
use crate::units;

mod due;
mod help;
mod load;
mod migrate;
mod waits;

pub use help::HELP;
pub use load::Load;
pub use migrate::Migrate;

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
    /// To go on from a snapshot.
    Load(Box<Load>),
    /// To move it.
    Migrate(Box<Migrate>),
    /// How that goes.
    MigrateStatus,
    /// To give it up, or where the guest is.
    MigrateOrder(Order),
    /// To go another way, when the guest has gone and its memory follows it.
    MigrateRecover(Recover),
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

/// A command line of `ctl`, or the help that it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    Ctl(Ctl),
    Help(&'static str),
}

/// The questions without arguments.
const QUESTIONS: [(&str, Question); 10] = [
    ("migrate-cancel", Question::MigrateOrder(Order::Cancel)),
    ("migrate-postcopy", Question::MigrateOrder(Order::Postcopy)),
    ("migrate-status", Question::MigrateStatus),
    ("status", Question::Status),
    ("pause", Question::Pause),
    ("resume", Question::Resume),
    ("power-button", Question::PowerButton),
    ("config", Question::Config),
    ("stats", Question::Stats),
    ("version", Question::Version),
];

/// Reads what follows `ctl`.
pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Parsed, UsageError> {
    let (mut api_sock, mut json, mut timeout) = (None, false, None);
    let (mut command, mut operands) = (None::<String>, VecDeque::new());
    let (mut resume, mut compress) = (false, None);
    let mut lazy = LazySaid::default();
    let mut options = SnapshotOptions::default();
    let mut flags = migrate::Flags::default();
    let mut last = None;
    while let Some(arg) = parser.next()? {
        let before = last.take();
        last = cli::bare(&arg, &["--track", "--record", "--postcopy"]);
        match arg {
            // Not the directory that it could be: that is ./off.
            Value(word) if before.is_some_and(|flag| is_value_of(flag, &word)) => {
                return Err(cli::stray(before, &word, ""));
            }
            Short('h') | Long("help") => return Ok(Parsed::Help(help(command, &mut parser)?)),
            Value(word) if command.is_none() && word == "help" => {
                return Ok(Parsed::Help(help(None, &mut parser)?));
            }
            Long("api-sock") => api_sock = Some(cli::api_sock(&mut parser)?),
            Long("json") => json = true,
            Long("timeout") => {
                let seconds = cli::number_within("--timeout", parser.value()?, 1..=u32::MAX)?;
                timeout = Some(seconds);
            }
            Long("resume") => resume = true,
            Long("track") => options.track = Some(cli::on_or_off("--track", &mut parser)?),
            Long("base") => {
                let base = PathBuf::from(parser.value()?);
                check_path("--base", &base)?;
                options.base = Some(told_path("--base", base)?);
            }
            // Of snapshot and of migrate, in which it is not the same.
            Long("compress") => compress = Some(parser.value()?),
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
            Value(word) if command.is_none() => command = Some(known(word)?),
            Value(word) => operands.push_back(word),
            Long(flag) if cli::restore::is_lazy(flag) => {
                let flag = flag.to_owned();
                cli::restore::take_lazy(&flag, &mut lazy, &mut parser)?;
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
    let wrong = |what: &str| UsageError::Command(format!("ctl: {what}; try ctl --help"));
    let command = command.ok_or_else(|| wrong("no command"))?;
    let is = |name: &str| command == name;
    let of_load = |flag: &str| is("load") && flag.starts_with("tls-");
    let of_recover = is("migrate-recover");
    match flags
        .any()
        .filter(|flag| !is("migrate") && !of_recover && !of_load(flag))
    {
        Some("listen") => return Err(wrong("--listen is for migrate-recover")),
        Some(flag) => return Err(UsageError::Command(format!("ctl: --{flag} is for migrate"))),
        None if resume && !is("load") => {
            let text = "--resume is of `load` alone; a guest that is paused goes on by `resume`";
            return Err(wrong(text));
        }
        None if lazy.any() && !is("load") => {
            let text = "--lazy, --on-loss, --page-deadline, --record, --page-handler and --page-server are options of load DIR";
            return Err(wrong(text));
        }
        None => {}
    }
    let of_snapshot = options != SnapshotOptions::default();
    if !is("snapshot") && (of_snapshot || (compress.is_some() && !is("migrate"))) {
        let text =
            "--track, --base, --compress, --disks and --background are options of snapshot DIR";
        return Err(wrong(text));
    }
    let question = match command.as_str() {
        "migrate" => Question::Migrate(Box::new(flags.migrate(compress)?)),
        "migrate-recover" => Question::MigrateRecover(flags.recover()?),
        "migrate-settle" => {
            let word = operands.pop_front();
            Question::MigrateOrder(match word.as_ref().and_then(|word| word.to_str()) {
                Some("here") => Order::Here,
                Some("there") => Order::There,
                other => {
                    let found = other.map_or(String::new(), |word| format!(", and not {word:?}"));
                    let text =
                        format!("migrate-settle: say where the guest is, here or there{found}");
                    return Err(wrong(&text));
                }
            })
        }
        "snapshot" => {
            options.compression = compress.map(cli::compression).transpose()?;
            let what = "ctl snapshot: the directory that it is to be";
            let mut request = SnapshotRequest::new(dir(operands.pop_front(), what)?);
            options.apply(&mut request);
            Question::Snapshot(request)
        }
        "load" => {
            let what = "ctl load: the snapshot's directory";
            let dir = dir(operands.pop_front(), what)?;
            if let Some(handler) = lazy.handler.take() {
                lazy.handler = Some(told_path("--page-handler", handler)?);
            }
            flags.load(&mut lazy)?;
            Question::Load(Box::new(Load { dir, resume, lazy }))
        }
        name => {
            let mut questions = QUESTIONS.into_iter();
            let found = questions.find(|(of, _)| *of == name);
            found.ok_or_else(|| wrong("no command"))?.1
        }
    };
    if let Some(more) = operands.pop_front() {
        return Err(Value(more).unexpected().into());
    }
    // A snapshot that is not waited for is made all the same.
    let patience = match question {
        Question::Snapshot(_) => 86_400,
        _ => 60,
    };
    Ok(Parsed::Ctl(Ctl {
        api_sock: api_sock.ok_or_else(|| wrong("no --api-sock PATH"))?,
        question,
        json,
        timeout: Duration::from_secs(timeout.unwrap_or(patience).into()),
    }))
}

/// Whether `word`, behind a `flag` whose value stands in the same word, looks like that value.
fn is_value_of(flag: &str, word: &OsStr) -> bool {
    match flag {
        "--record" => word.as_encoded_bytes().iter().all(u8::is_ascii_digit),
        // A migration takes no other word.
        "--postcopy" => !help::COMMANDS.iter().any(|(name, _)| word == *name),
        _ => word == "on" || word == "off",
    }
}

/// The name of a command.
fn known(word: OsString) -> Result<String, UsageError> {
    let names = || help::COMMANDS.iter().map(|(name, _)| *name);
    match names().find(|name| word == *name) {
        Some(name) => Ok(name.to_owned()),
        None => Err(UsageError::Command(format!(
            "ctl {} is not a command{}; there are {}",
            word.display(),
            cli::meant(&word.to_string_lossy(), names()),
            names().collect::<Vec<_>>().join(", ")
        ))),
    }
}

/// The help of `command`, or of the word that comes next.
fn help(command: Option<String>, parser: &mut lexopt::Parser) -> Result<&'static str, UsageError> {
    let command = match (command, parser.next()?) {
        (None, Some(Value(word))) => Some(known(word)?),
        (command, _) => command,
    };
    Ok(help::of(command.as_deref()))
}

/// The directory behind a word, as the monitor has to know it: it may be at home elsewhere.
fn dir(word: Option<OsString>, what: &str) -> Result<PathBuf, UsageError> {
    match word {
        Some(dir) if !dir.is_empty() => told_path(what, dir.into()),
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
        print(&json_line(&json!({ "fault_message": refused })));
    }
    say(format_args!("{}", crate::end::Chain(&Refused(refused))));
    1
}

/// The most of an answer in words, bytes. Each line has all names on the way to its value, so that a few long ones may come
/// to many times what was sent.
const MOST_WORDS: usize = 4 * MAX_ANSWER;

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
        Question::Load(load) => ("PUT", "/snapshot/load", Some(load.body())),
        Question::Migrate(_) | Question::MigrateStatus => ("GET", "/migrate", None),
        Question::MigrateOrder(order) => ("PATCH", "/migrate", Some(json!({ "order": order }))),
        Question::MigrateRecover(recover) => ("PATCH", "/migrate", Some(recover.body())),
        Question::Config => ("GET", "/vm/config", None),
        Question::Stats => ("GET", "/stats", None),
        Question::Version => ("GET", "/version", None),
    };
    let answer = match &options.question {
        Question::Migrate(asked) => migrate::ask(&options.api_sock, options.timeout, asked)?,
        _ => {
            let began = Instant::now();
            let connected = Client::connect(&options.api_sock, options.timeout);
            let called = connected.and_then(|mut client| {
                client.wait_for(options.timeout.saturating_sub(began.elapsed()));
                let snapshot = matches!(options.question, Question::Snapshot(_));
                let _watch = snapshot.then(|| waits::watch(&options.api_sock, "a snapshot"));
                client.call(method, target, body.as_ref())
            });
            called.map_err(|error| explained(&options.question, error))?
        }
    };
    if let Some(why) = answer.fault() {
        return Ok(Said::Refused(why));
    }
    let strange = |why| ClientError::Strange {
        path: options.api_sock.clone(),
        why,
    };
    if let Some(why) = due::wrong(&options.question, &answer) {
        return Err(strange(why));
    }
    match told(options, answer.body.unwrap_or_default()) {
        Some(text) => Ok(Said::Yes(text)),
        None => Err(strange(format!(
            "in words it has more than {MOST_WORDS} bytes; --json says it as it is"
        ))),
    }
}

/// With what it means to who asked this, where that is more than the error knows.
fn explained(question: &Question, error: ClientError) -> ClientError {
    let more =
        |source: io::Error, what: &str| io::Error::new(source.kind(), format!("{source}; {what}"));
    match (question, error) {
        // Nobody knows here whether it had begun: what still waits for its turn is not, without who asked.
        (Question::Snapshot(request), ClientError::Gone { path, source })
            if source.kind() == io::ErrorKind::TimedOut =>
        {
            let dir = request.dir.display().to_string();
            let what = format!(
                "a snapshot that has begun goes on in the monitor, and is whole when {0}/state is there (snapshot info {0}); one \
                 that waits for memory whose page server is away is given up",
                printable(&dir)
            );
            let source = more(source, &what);
            ClientError::Gone { path, source }
        }
        (
            Question::MigrateStatus | Question::MigrateOrder(_) | Question::MigrateRecover(_),
            ClientError::Connect { path, source },
        ) if source.kind() == io::ErrorKind::NotFound => {
            let what = "a guest that has moved takes its monitor's socket along: ask the monitor at the destination";
            let source = more(source, what);
            ClientError::Connect { path, source }
        }
        (_, error) => error,
    }
}

/// The answer as it is printed; none where that would be more than [`MOST_WORDS`].
fn told(options: &Ctl, body: Value) -> Option<String> {
    let (words, body) = match &options.question {
        Question::Load(load) if load.resume => ("running".into(), json!({ "state": "Running" })),
        Question::Pause if body.is_object() => {
            let coming = lazy::coming(&body["lazy"]);
            ("paused".to_owned() + &coming.unwrap_or_default(), body)
        }
        Question::Pause | Question::Load(_) => ("paused".into(), json!({ "state": "Paused" })),
        Question::Resume => ("running".into(), json!({ "state": "Running" })),
        Question::Snapshot(request) => {
            let dir = request.dir.display().to_string();
            let shown = printable(&dir);
            match body {
                Value::Object(mut cost) => {
                    let words = snapshot_words(&shown, &cost);
                    cost.insert("snapshot_path".into(), dir.into());
                    (words, Value::Object(cost))
                }
                _ => (shown, json!({ "snapshot_path": dir })),
            }
        }
        Question::Migrate(_) | Question::MigrateStatus => (migrate::words(&body), body),
        Question::MigrateOrder(order @ Order::Postcopy) => {
            ("switched to post-copy".into(), json!({ "order": order }))
        }
        Question::MigrateOrder(Order::Cancel) => {
            ("cancelled".into(), json!({ "order": Order::Cancel }))
        }
        Question::MigrateOrder(order) => ("settled".into(), json!({ "order": order })),
        Question::MigrateRecover(Recover::To { address, .. }) => {
            let words = format!("connections go to {}", printable(address));
            (words, json!({ "to": address }))
        }
        Question::MigrateRecover(Recover::Listen { .. }) => {
            (format!("listens at {} too", text(&body["listen"])), body)
        }
        Question::PowerButton => ("pressed".into(), json!({ "pressed": true })),
        Question::Status => {
            let state = text(&body["state"]).to_lowercase();
            let coming = lazy::coming(&body["lazy"]);
            let waits = body["waits-for"].as_str();
            let waits = waits.map(|what| format!(", waits for {}", printable(what)));
            (state + &coming.or(waits).unwrap_or_default(), body)
        }
        Question::Version => (text(&body["firecracker_version"]), body),
        Question::Config | Question::Stats => {
            let mut lines = String::new();
            // One line of JSON is no longer than what came.
            if !options.json && !flat("", &body, &mut lines) {
                return None;
            }
            // The newline of the last is added below.
            lines.pop();
            (lines, body)
        }
    };
    Some(match options.json {
        true => json_line(&body),
        false => words + "\n",
    })
}

/// What a snapshot cost the guest.
fn snapshot_words(dir: &str, cost: &Map<String, Value>) -> String {
    let number = |name: &str| cost.get(name).map_or_else(|| "?".into(), text);
    let mut words = format!("{dir}: ");
    // A string takes everything.
    // A guest that stays paused has no time in which something was done.
    let (_, then) = match cost.get("pause_us") {
        None | Some(Value::Null) => (write!(words, "the guest stays paused"), ";"),
        Some(us) => {
            let time = time(us);
            (
                write!(words, "the guest stood still for {time}"),
                ", in which",
            )
        }
    };
    let _ = match cost.get("protected_pages").map(Value::as_u64) {
        None => Ok(()),
        Some(Some(0)) => write!(words, "{then} no page had to be protected"),
        Some(_) => write!(
            words,
            "{then} {} pages were protected, {} us each",
            number("protected_pages"),
            number("us_per_page")
        ),
    };
    let total = cost.get("total_us").map_or_else(|| "?".into(), time);
    let _ = write!(words, "; {total} in all");
    let bytes = |name: &str| cost.get(name).and_then(Value::as_u64).map(units::bytes);
    if let (Some(written), Some(memory)) = (bytes("written_bytes"), bytes("memory_bytes")) {
        let _ = write!(words, "; {written} of {memory} of memory written");
    }
    if cost.get("ended_recording") == Some(&Value::Bool(true)) {
        words += "; the recording of what it touches first (--record) ended with it";
    }
    words
}

/// Microseconds, as people read them; what is no such number as it came.
fn time(micros: &Value) -> String {
    match micros.as_u64() {
        Some(micros) => units::time(Duration::from_micros(micros)),
        None => text(micros),
    }
}

fn text(value: &Value) -> String {
    match value {
        // A terminal obeys control characters.
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

/// A line for each number and word: where it is, and what it is. False where that comes to be more than [`MOST_WORDS`].
fn flat(path: &str, value: &Value, lines: &mut String) -> bool {
    let below = |name: &str| match path {
        "" => printable(name),
        path => format!("{path}.{}", printable(name)),
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => fields
            .iter()
            .all(|(name, value)| flat(&below(name), value, lines)),
        Value::Array(values) if !values.is_empty() => values
            .iter()
            .enumerate()
            .all(|(at, value)| flat(&below(&at.to_string()), value, lines)),
        leaf => {
            // A string of String's takes everything.
            let _ = writeln!(lines, "{path} {}", text(leaf));
            lines.len() <= MOST_WORDS
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Result<Ctl, UsageError> {
        match parse(lexopt::Parser::from_args(words.split_whitespace()))? {
            Parsed::Ctl(ctl) => Ok(ctl),
            Parsed::Help(help) => panic!("{words}: {help}"),
        }
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
            assert_eq!(parsed(words).unwrap(), expected);
        }
        let asked = parsed("--api-sock /s snapshot /a/b").unwrap();
        assert_eq!(
            asked.question,
            Question::Snapshot(SnapshotRequest::new("/a/b"))
        );
        let asked = "--base /a --api-sock /s --compress zstd snapshot --track=off /b --disks copy";
        let Question::Snapshot(request) = parsed(asked).unwrap().question else {
            panic!("{asked}")
        };
        let body = json!({
            "snapshot_type": "Diff", "snapshot_path": "/b", "base": "/a", "track": false, "compress": "zstd",
            "disks": "copy",
        });
        assert_eq!(snapshot_body(&request), body);
        let asked = "--api-sock /s snapshot /b --background";
        let Question::Snapshot(request) = parsed(asked).unwrap().question else {
            panic!("{asked}")
        };
        assert_eq!(snapshot_body(&request)["background"], true);
        for (words, body) in [
            (
                "migrate-recover --to tcp:h:1 --tls-name n",
                json!({ "order": "Recover", "to": "tcp:h:1", "tls_name": "n" }),
            ),
            (
                "migrate-recover --listen unix:/s",
                json!({ "order": "Recover", "listen": "unix:/s" }),
            ),
        ] {
            let asked = parsed(&format!("--api-sock /s {words}")).unwrap();
            let Question::MigrateRecover(recover) = asked.question else {
                panic!("{words}")
            };
            assert_eq!(recover.body(), body);
        }
        for (words, resume) in [
            ("load /a", false),
            ("load /a --resume", true),
            ("--resume load /a", true),
        ] {
            let asked = parsed(&format!("--api-sock /s {words}")).unwrap();
            assert_eq!(
                asked.question,
                Question::Load(Box::new(Load::new("/a", resume))),
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
            ("--api-sock /s snapshot /a /b", "\"/b\""),
            (
                "--api-sock /s migrate-settle",
                "say where the guest is, here or there",
            ),
            ("--api-sock /s migrate-settle nowhere", "not \"nowhere\""),
            ("--api-sock /s migrate-settle here there", "\"there\""),
            ("--api-sock /s pause --to unix:/s", "--to is for migrate"),
            (
                "--api-sock /s pause --listen unix:/s",
                "--listen is for migrate-recover",
            ),
            (
                "--api-sock /s migrate --to unix:/s --listen unix:/t",
                "--listen is of migrate-recover",
            ),
            ("--api-sock /s migrate-recover", "one of the two is wanted"),
            (
                "--api-sock /s migrate-recover --to unix:/s --listen unix:/t",
                "one of the two",
            ),
            (
                "--api-sock /s migrate-recover --listen unix:/t --tls-name a",
                "one of the two",
            ),
            (
                "--api-sock /s migrate-recover --to s",
                "\"s\" is no address",
            ),
            (
                "--api-sock /s migrate-recover --to unix:/s --downtime 3",
                "are all that it has",
            ),
            (
                "--api-sock /s migrate-recover --to unix:/s --tls-ca a",
                "begun with",
            ),
            (
                "--api-sock /s migrate --track --to unix:/s",
                "options of snapshot",
            ),
            ("--api-sock /s pause --compress zstd", "options of snapshot"),
            ("help frob", "ctl frob is not a command"),
            ("--api-sock /s load --resume", "directory"),
            ("--api-sock /s pause --resume", "--resume is of `load`"),
            ("--api-sock /s pause --lazy", "options of load"),
            ("--api-sock /s snapshot /a --record", "options of load"),
            ("--api-sock /s load --record 5 /a", "--record=5"),
            ("--api-sock /s load /a --record=0", "--record \"0\""),
            ("--api-sock /s load /a --on-loss retry", "stop or poison"),
            (
                "--api-sock /s load /a --page-deadline 0",
                "--page-deadline \"0\"",
            ),
            ("--api-sock /s load /a --page-handler=", "--page-handler"),
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
            (
                "--api-sock /s migrate --postcopy by-hand --to unix:/s",
                "--postcopy=by-hand",
            ),
            (
                "--api-sock /s --postcopy after=2 migrate --to unix:/s",
                "--postcopy=after=2",
            ),
            ("--api-sock /s snapshot --track off", "--track=off"),
            ("--api-sock /s snapshot /a --track off", "--track=off"),
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
    fn every_command_has_its_help_and_every_flag_is_in_one() {
        for source in [include_str!("ctl.rs"), include_str!("ctl/migrate.rs")] {
            for (start, _) in source.match_indices("Long(\"") {
                let flag = source[start + 6..].split('"').next().unwrap();
                let flag = format!("--{flag}");
                let mut all = help::COMMANDS.iter().map(|(_, help)| help);
                assert!(all.any(|help| help.contains(&flag)), "{flag}");
            }
        }
        let asks = |words: &str| match parse(lexopt::Parser::from_args(words.split_whitespace())) {
            Ok(Parsed::Help(help)) => help,
            other => panic!("{words}: {other:?}"),
        };
        for words in ["--help", "-h", "help", "--api-sock /s --help"] {
            assert_eq!(asks(words), HELP);
        }
        for (name, help) in help::COMMANDS {
            assert!(HELP.contains(&format!("\n  {name} ")), "{name}");
            let usage = format!("Usage: reference-vmm ctl --api-sock PATH {name} ");
            assert!(help.contains(&usage), "{name}");
            for words in [
                format!("{name} --help"),
                format!("--api-sock /s {name} -h"),
                format!("{name} /a --json --help"),
                format!("--help {name}"),
                format!("help {name}"),
            ] {
                assert_eq!(asks(&words), help, "{words}");
            }
            assert!(help.lines().all(|line| line.len() <= 120), "{name}");
        }
        for (name, _) in QUESTIONS {
            assert_ne!(help::of(Some(name)), HELP, "{name}");
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
        let told = |options: &Ctl, body| told(options, body).unwrap();
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
            "/s: the guest stood still for 312 us, in which 5 pages were protected, 0.4 us each; 9.00 ms in all\n"
        );
        let none =
            json!({"pause_us": 312, "protected_pages": 0, "us_per_page": null, "total_us": 9000});
        assert_eq!(
            told(&options(snapshot(), false), none),
            "/s: the guest stood still for 312 us, in which no page had to be protected; 9.00 ms in all\n"
        );
        for (pause, words) in [
            (json!(312), "the guest stood still for 312 us"),
            (Value::Null, "the guest stays paused"),
        ] {
            let cost = json!({"pause_us": pause, "total_us": 9000});
            assert_eq!(
                told(&options(snapshot(), false), cost),
                format!("/s: {words}; 9.00 ms in all\n")
            );
        }
        for (pages, each, words) in [
            (0, Value::Null, "no page had to be protected"),
            (5, json!(0.4), "5 pages were protected, 0.4 us each"),
        ] {
            let cost = json!({"pause_us": null, "protected_pages": pages, "us_per_page": each, "total_us": 9000});
            assert_eq!(
                told(&options(snapshot(), false), cost),
                format!("/s: the guest stays paused; {words}; 9.00 ms in all\n")
            );
        }
        let status = json!({ "state": "Paused" });
        assert_eq!(told(&options(Question::Status, false), status), "paused\n");
        // Escaped once.
        let address = "unix:/a\u{9b}b";
        let listen = Question::MigrateRecover(Recover::Listen {
            address: address.into(),
        });
        let words = told(&options(listen, false), json!({ "listen": address }));
        assert_eq!(words, "listens at unix:/a\\u{9b}b too\n");
    }
    #[test]
    fn a_long_name_over_many_numbers_is_refused_in_words_and_told_as_json() {
        let mut options = Ctl {
            api_sock: "/s".into(),
            question: Question::Stats,
            json: false,
            timeout: Duration::from_secs(1),
        };
        let (name, numbers) = ("x".repeat(1 << 20), vec![0; 1 << 20]);
        let body = json!({ "exits": [], name: numbers });
        assert_eq!(told(&options, body.clone()), None);
        options.json = true;
        assert_eq!(told(&options, body.clone()).unwrap(), format!("{body}\n"));
    }
}
