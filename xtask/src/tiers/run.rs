// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs test programs one after the other, here or inside the lab, and notes what each said.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Tier;
use super::said::{Reader, Said};
use crate::cargo::{self, Program};
use crate::failure::{Context, Failure, Result};
use crate::lab;
use crate::ui::say;

/// The command line's word for the runner inside the lab: not for people.
pub(crate) const RUN_COMMAND: &str = "test-run";

/// One program that runs longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(15 * 60);
const LONG_TIME_LIMIT: Duration = Duration::from_secs(3 * 3600);

/// How an outcome travels from the lab: one line of JSON behind this.
const OUTCOME_MARK: &str = "xtask-outcome: ";

/// What a test program did.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) tier: Tier,
    pub(crate) place: String,
    pub(crate) name: String,
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
    pub(crate) seconds: f64,
    /// Why the program did not end as a test harness does.
    pub(crate) trouble: Option<String>,
    /// The tests that failed.
    pub(crate) failures: Vec<String>,
    /// Those that failed and were run again.
    pub(crate) again: Vec<String>,
    /// What those that failed said, each time.
    pub(crate) said: Vec<Said>,
}

impl Outcome {
    pub(crate) fn is_good(&self) -> bool {
        self.failed == 0 && self.trouble.is_none()
    }

    /// A part of the tests that could not be run to its end.
    pub(crate) fn broken(tier: Tier, place: &str, trouble: &str) -> Outcome {
        Outcome {
            tier,
            place: place.into(),
            name: "—".into(),
            passed: 0,
            failed: 0,
            ignored: 0,
            seconds: 0.0,
            trouble: Some(trouble.into()),
            failures: Vec::new(),
            again: Vec::new(),
            said: Vec::new(),
        }
    }

    /// What is to be run again of a program that failed: these tests, or (none) all of it.
    pub(crate) fn left(&self) -> &[String] {
        match &self.trouble {
            None if self.failures.len() as u64 == self.failed => &self.failures,
            _ => &[],
        }
    }

    /// This, after what was [`left`](Outcome::left) has been run again.
    pub(crate) fn followed_by(self, next: Outcome) -> Outcome {
        let left = self.left().len() as u64;
        let all = left == 0;
        let run = next.passed + next.failed;
        let trouble = match next.trouble {
            None if !all && run != left => Some(format!("{run} of {left} tests were run again")),
            trouble => trouble,
        };
        let (mut again, mut said) = (self.again, self.said);
        said.extend(next.said);
        again.extend(match all {
            true => vec!["all of it".to_owned()],
            false => self.failures,
        });
        Outcome {
            passed: next.passed + if all { 0 } else { self.passed },
            ignored: self.ignored.max(next.ignored),
            seconds: self.seconds + next.seconds,
            trouble,
            again,
            said,
            ..next
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "tier": self.tier.name(), "place": self.place, "name": self.name, "passed": self.passed,
            "failed": self.failed, "ignored": self.ignored, "seconds": self.seconds, "trouble": self.trouble,
            "failures": self.failures, "again": self.again,
            "said": self.said.iter().map(|said| json!([said.test, said.lines])).collect::<Vec<_>>(),
        })
    }

    fn from_json(value: &Value) -> Option<Outcome> {
        Some(Outcome {
            tier: Tier::parse(value["tier"].as_str()?).ok()?,
            place: value["place"].as_str()?.into(),
            name: value["name"].as_str()?.into(),
            passed: value["passed"].as_u64()?,
            failed: value["failed"].as_u64()?,
            ignored: value["ignored"].as_u64()?,
            seconds: value["seconds"].as_f64()?,
            trouble: value["trouble"].as_str().map(str::to_owned),
            failures: strings(&value["failures"]),
            again: strings(&value["again"]),
            said: value["said"].as_array()?.iter().filter_map(said).collect(),
        })
    }

    /// Takes in a line of a harness's output.
    fn count(&mut self, line: &str) -> bool {
        if let Some(test) = line.trim().strip_prefix("test ")
            && let Some(test) = test.strip_suffix(" ... FAILED")
        {
            // What is behind the name is no part of it.
            let kinds = [" - should panic", " - compile fail", " - compile"];
            let mut names = kinds.iter().filter_map(|kind| test.strip_suffix(kind));
            self.failures.push(names.next().unwrap_or(test).to_owned());
        }
        let Some(counts) = counts(line) else {
            return false;
        };
        self.passed += counts[0];
        self.failed += counts[1];
        self.ignored += counts[2];
        true
    }
}

fn said(value: &Value) -> Option<Said> {
    Some(Said {
        test: value[0].as_str()?.to_owned(),
        lines: strings(&value[1]),
    })
}

fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(|text| text.as_str().map(str::to_owned))
        .collect()
}

/// Passed, failed and ignored of a `test result:` line.
fn counts(line: &str) -> Option<[u64; 3]> {
    let rest = line
        .trim_start()
        .strip_prefix("test result: ")?
        .split_once(". ")?
        .1;
    let number = |word: &str| {
        let part = rest.split(';').find(|part| part.trim().ends_with(word))?;
        part.trim().split(' ').next()?.parse().ok()
    };
    Some([number("passed")?, number("failed")?, number("ignored")?])
}

/// Programs of one tier in one place.
pub(crate) struct Suite {
    pub(crate) tier: Tier,
    pub(crate) place: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, OsString)>,
}

impl Suite {
    pub(crate) fn run(&self, programs: &[Program]) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for (index, program) in programs.iter().enumerate() {
            let name = name_of(program);
            say(format!(
                "[{}/{}] {} tests on {}: {name}",
                index + 1,
                programs.len(),
                self.tier.name(),
                self.place
            ));
            outcomes.push(self.run_one(program, name, &[]));
        }
        outcomes
    }

    /// As [`run`](Suite::run), and what failed once more when all else is done, a test at a time: it is told what failed at
    /// first and what it said, and it is good if it is good then.
    pub(crate) fn run_and_again(&self, programs: &[Program]) -> Vec<Outcome> {
        let mut outcomes = self.run(programs);
        for (program, outcome) in programs.iter().zip(&mut outcomes) {
            if outcome.is_good() {
                continue;
            }
            let (name, tests) = (name_of(program), outcome.left());
            say(format!(
                "FAILED on {}, and run again: {name} {}",
                self.place,
                tests.join(" ")
            ));
            let next = self.run_one(program, name, tests);
            *outcome = outcome.clone().followed_by(next);
        }
        outcomes
    }

    /// Of a program these tests, one at a time; where there are none, all, as they are run.
    fn run_one(&self, program: &Program, name: String, tests: &[String]) -> Outcome {
        let mut command = Command::new(&program.file);
        if !tests.is_empty() {
            command.args(["--exact", "--test-threads=1"]).args(tests);
        }
        command
            .args(&self.args)
            .current_dir(&program.package_dir)
            .env("CARGO_MANIFEST_DIR", &program.package_dir)
            .env("CARGO_PKG_NAME", &program.package);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        observe(
            command,
            Outcome {
                tier: self.tier,
                name,
                ..Outcome::broken(self.tier, &self.place, "")
            },
            io::stdout(),
        )
    }
}

/// `io-bus unit tests`, `io-bus kvm_x`.
pub(crate) fn name_of(program: &Program) -> String {
    match program.kind.as_str() {
        "test" => format!("{} {}", program.package, program.target),
        "bin" => format!("{} unit tests (program)", program.package),
        _ => format!("{} unit tests", program.package),
    }
}

/// Runs a harness with its output passed on; what it counted, and whether it ended well.
fn observe(mut command: Command, blank: Outcome, out: impl Write + Send + 'static) -> Outcome {
    let mut outcome = Outcome {
        trouble: None,
        ..blank
    };
    let begun = Instant::now();
    // A group of its own, so that a time limit reaches what the test has started; and it ends with us.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // SAFETY: prctl is async-signal-safe, and nothing else is done between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            outcome.trouble = Some(format!(
                "{} does not start: {error}",
                command.get_program().display()
            ));
            return outcome;
        }
    };
    let (lines, said) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        thread::spawn(move || pass_on(stdout, out, &lines));
    }
    let limit = if std::env::var_os("LONG_TESTS").is_some() {
        LONG_TIME_LIMIT
    } else {
        TIME_LIMIT
    };
    let mut counted = false;
    let mut reader = Reader::default();
    loop {
        match said.recv_timeout(limit.saturating_sub(begun.elapsed())) {
            Ok(line) => {
                counted |= outcome.count(&line);
                reader.line(&line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                outcome.trouble = Some(format!(
                    "ran longer than {} s and was ended",
                    limit.as_secs()
                ));
                let group = i32::try_from(child.id()).unwrap_or(i32::MAX);
                // SAFETY: a plain call; the group is our child's own, and the child has not been waited for.
                unsafe { libc::kill(-group, libc::SIGKILL) };
                // The line that it had begun names the test that hung.
                while let Ok(line) = said.recv_timeout(Duration::from_secs(1)) {
                    reader.line(&line);
                }
                break;
            }
        }
    }
    let status = child.wait();
    outcome.seconds = begun.elapsed().as_secs_f64();
    if outcome.trouble.is_none() {
        outcome.trouble = match status {
            Err(error) => Some(format!("cannot be waited for: {error}")),
            Ok(status) => match (status.code(), status.signal()) {
                (Some(0), _) => None,
                (_, Some(signal)) => Some(format!("ended by signal {signal}")),
                // The harness's own way to say that tests failed, which the counts say as well.
                (Some(101), _) if counted && outcome.failed > 0 => None,
                (code, _) => Some(format!("exit status {}", code.unwrap_or(-1))),
            },
        };
        if outcome.trouble.is_none() && !counted {
            outcome.passed += 1; // a program with a harness of its own says it with its status
        }
    }
    outcome.said = reader.end(outcome.trouble.is_some());
    outcome
}

fn pass_on(stdout: impl Read, mut out: impl Write, lines: &mpsc::Sender<String>) {
    for line in BufReader::new(stdout)
        .split(b'\n')
        .map_while(io::Result::ok)
    {
        // A closed stdout has no reader to miss it; the counts still matter.
        let _ = out
            .write_all(&line)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush());
        if lines
            .send(String::from_utf8_lossy(&line).into_owned())
            .is_err()
        {
            return;
        }
    }
}

/// The examples in the documentation, which only cargo can run.
pub(crate) fn documentation(packages: &[&str]) -> Result<Outcome> {
    say("pure tests on this host: the examples in the documentation");
    let mut command = cargo::command();
    command
        .args(["test", "--doc", "--no-fail-fast"])
        .args(packages);
    let blank = Outcome {
        name: "documentation".into(),
        ..Outcome::broken(Tier::Pure, "this host, documentation", "")
    };
    Ok(observe(command, blank, io::stdout()))
}

/// What the lab's runner is to run: written on the host, read inside.
pub(crate) struct List(Value);

impl List {
    /// Of each program these tests; where there are none, all.
    pub(crate) fn of(tier: Tier, programs: &[(&Program, &[String])], place: &str) -> List {
        let programs: Vec<_> = programs
            .iter()
            .map(|(program, tests)| {
                json!({
                    "tier": tier.name(), "package": program.package, "dir": program.package_dir,
                    "target": program.target, "kind": program.kind, "file": program.file, "tests": tests,
                })
            })
            .collect();
        List(json!({ "place": place, "programs": programs }))
    }

    pub(crate) fn write(&self, file: &Path) -> Result<PathBuf> {
        fs::write(file, self.0.to_string())
            .context(|| format!("{} cannot be written", file.display()))?;
        Ok(file.to_path_buf())
    }
}

/// Inside the lab: runs the programs of a list, and tells each outcome in a line.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    let [file] = &args[..] else {
        return Err(Failure::usage("one list of tests is wanted"));
    };
    let text = fs::read_to_string(file).context(|| format!("{} cannot be read", file.display()))?;
    let list: Value =
        serde_json::from_str(&text).context(|| format!("{} is no list", file.display()))?;
    let place = list["place"].as_str().unwrap_or("the lab");
    let programs: Vec<(Tier, Program, Vec<String>)> = list["programs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(program_of)
        .collect();
    for (index, (tier, program, tests)) in programs.iter().enumerate() {
        let name = name_of(program);
        println!(
            "xtask: [{}/{}] {} tests in {place}: {name}",
            index + 1,
            programs.len(),
            tier.name()
        );
        // One at a time: an emulated CPU and a few GiB are all there is.
        let mut args = vec!["--include-ignored".into()];
        if tests.is_empty() {
            args.push("--test-threads=1".into());
        }
        if *tier == Tier::Lab {
            // Times are told and never asserted; and so is a guest that had to be started again.
            args.push("--show-output".into());
        }
        let suite = Suite {
            tier: *tier,
            place: place.into(),
            args,
            env: Vec::new(),
        };
        println!(
            "{OUTCOME_MARK}{}",
            suite.run_one(program, name, tests).to_json()
        );
    }
    Ok(0)
}

fn program_of(value: &Value) -> Option<(Tier, Program, Vec<String>)> {
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let program = Program {
        package: text("package")?,
        package_dir: text("dir")?.into(),
        target: text("target")?,
        kind: text("kind")?,
        test: true,
        file: text("file")?.into(),
    };
    let tier = Tier::parse(&text("tier")?).ok()?;
    Some((tier, program, strings(&value["tests"])))
}

/// Runs the lab's runner: its output is passed on, each line behind `label`, the outcomes taken out of it.
pub(crate) fn collect(
    options: &lab::Options,
    argv: &[OsString],
    label: &'static str,
) -> (Vec<Outcome>, Result<i32>) {
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&outcomes);
    let mut partial = Vec::new();
    let sink = move |stream: lab::Stream, bytes: &[u8]| {
        if stream == lab::Stream::Stderr {
            let _ = io::stderr().write_all(bytes); // as with any closed output
            return;
        }
        partial.extend_from_slice(bytes);
        while let Some(end) = partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = partial.drain(..=end).collect();
            let outcome = std::str::from_utf8(&line).ok().and_then(|text| {
                // A test may have left its last line open.
                let (_, json) = text.split_once(OUTCOME_MARK)?;
                Outcome::from_json(&serde_json::from_str(json).ok()?)
            });
            match outcome {
                Some(outcome) => noted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(outcome),
                None => {
                    let mut out = io::stdout().lock();
                    let _ = out
                        .write_all(label.as_bytes())
                        .and_then(|()| out.write_all(&line))
                        .and_then(|()| out.flush());
                }
            }
        }
    };
    let status = lab::run_with(options, argv, Box::new(sink));
    let outcomes = std::mem::take(&mut *outcomes.lock().unwrap_or_else(PoisonError::into_inner));
    (outcomes, status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_harness_s_result_line_is_counted() {
        let line = "test result: FAILED. 12 passed; 1 failed; 3 ignored; 0 measured; 7 filtered out; finished in 0.01s";
        assert_eq!(counts(line), Some([12, 1, 3]));
        assert_eq!(
            counts("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured"),
            Some([0, 0, 0])
        );
        assert_eq!(counts("test a ... ok"), None);
    }

    #[test]
    fn an_outcome_survives_the_way_out_of_the_lab() {
        let mut outcome = Outcome::broken(Tier::Kvm, "the lab", "signal 6");
        outcome.seconds = 1.5;
        outcome.failures = vec!["a::b".into()];
        outcome.again = vec!["c".into()];
        outcome.said = vec![Said {
            test: "a::b".into(),
            lines: vec!["thread 'a::b' panicked".into(), "why".into()],
        }];
        assert_eq!(Outcome::from_json(&outcome.to_json()), Some(outcome));
    }

    #[test]
    fn what_failed_is_known_by_name_and_counts_as_its_second_run_has_it() {
        let run = |lines: &str| {
            let mut outcome = Outcome {
                trouble: None,
                ..Outcome::broken(Tier::Lab, "the lab", "")
            };
            for line in lines.lines() {
                outcome.count(line);
            }
            outcome
        };
        let first = run("test a ... ok\ntest b ... FAILED\n\
             test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured");
        assert_eq!(first.left(), ["b"]);
        let good = "test b ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured";
        let mut first_said = first.clone();
        first_said.said = vec![Said {
            test: "b".into(),
            lines: vec!["why".into()],
        }];
        let both = first_said.clone().followed_by(run(good));
        assert!(both.is_good());
        assert_eq!(both.said, first_said.said);
        assert_eq!((both.passed, both.failed, both.ignored), (2, 0, 2));
        assert_eq!(both.again, ["b"]);
        let bad =
            "test b ... FAILED\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured";
        let both = first.clone().followed_by(run(bad));
        assert_eq!((both.passed, both.failed), (1, 1));
        // What did not run is not good.
        let none = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured";
        assert!(!first.clone().followed_by(run(none)).is_good());
        let panics = run("test c - should panic ... FAILED\n\
             test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured");
        assert_eq!(panics.left(), ["c"]);
        // One that was ended is run as a whole, and counts as a whole.
        let ended = Outcome {
            trouble: Some("ended by signal 9".into()),
            ..first
        };
        assert!(ended.left().is_empty());
        let all = "test result: ok. 2 passed; 0 failed; 2 ignored; 0 measured";
        let both = ended.followed_by(run(all));
        assert!(both.is_good());
        assert_eq!((both.passed, both.again.len()), (2, 1));
    }

    #[test]
    fn a_program_that_fails_or_dies_is_no_success() {
        let run = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            observe(command, Outcome::broken(Tier::Pure, "here", ""), io::sink())
        };
        assert!(run("exit 0").is_good());
        let failed =
            run("echo 'test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured'; exit 101");
        assert_eq!(
            (failed.passed, failed.failed, failed.is_good()),
            (1, 2, false)
        );
        assert!(!run("exit 1").is_good());
        assert!(!run("kill -9 $$").is_good());
        let after =
            run("echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured'; kill -6 $$");
        assert!(!after.is_good());
        // And says what it said last.
        let dies = run("echo 'test a ... ok'; printf 'test b ... '; kill -9 $$");
        assert_eq!(dies.said.len(), 1);
        assert_eq!(dies.said[0].lines, ["test a ... ok", "test b ..."]);
        let fails = run("echo 'failures:'; echo '---- a stdout ----'; echo why; \
             echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured'; exit 101");
        assert_eq!(fails.trouble, None);
        assert_eq!((fails.said.len(), fails.said[0].test.as_str()), (1, "a"));
        assert_eq!(fails.said[0].lines, ["why"]);
    }
}
