// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every command, and every command within one, says how it is used: on stdout, with status 0, whatever stands before
//! the question.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::Vmm;

/// What these words say.
#[track_caller]
fn help(words: &str) -> String {
    let ended = Vmm::command::<[&str; 0]>([]).words(words).output();
    ended.expect_status(0).expect_silence();
    ended.text()
}

/// The first words of each line of `help` under "Commands:", as they are indented there.
fn commands(help: &str) -> Vec<String> {
    let (_, list) = help.split_once("\nCommands:\n").expect("commands");
    let list = list.split("\n\n").next().unwrap();
    let lines = list.lines().filter_map(|line| line.strip_prefix("  "));
    let lines = lines.filter(|line| !line.starts_with(' '));
    let words = lines.map(|line| line.split_whitespace().next().unwrap());
    words.map(str::to_owned).collect()
}

#[test]
fn every_command_at_every_level_shows_its_usage() {
    // What is asked for, and what the usage begins with.
    let mut table: Vec<(String, String)> = Vec::new();
    let top = help("--help");
    let names = commands(&top);
    assert_eq!(
        names,
        ["run", "restore", "ctl", "snapshot", "cpu", "doctor", "help"]
    );
    for name in names {
        let usage = match name.as_str() {
            "help" => "run --kernel".to_owned(),
            name => name.to_owned(),
        };
        table.push((name.clone(), usage));
        match name.as_str() {
            "ctl" => {
                let all = commands(&help("ctl --help"));
                assert_eq!(all.len(), 15, "{all:?}");
                // Each is in the list of all commands as well.
                let words: Vec<_> = top.split([' ', ',', '\n']).collect();
                for verb in all {
                    assert!(words.contains(&verb.as_str()), "{verb}");
                    table.push((
                        format!("ctl {verb}"),
                        format!("ctl --api-sock PATH {verb} "),
                    ));
                }
            }
            "snapshot" => {
                for verb in commands(&help("snapshot --help")) {
                    table.push((format!("snapshot {verb}"), format!("snapshot {verb} ")));
                }
            }
            "run" => {
                let usage = "run --incoming ADDRESS";
                assert!(top.contains(usage), "{top}");
                for words in ["run --incoming", "run --incoming unix:/x"] {
                    table.push((words.to_owned(), usage.into()));
                }
            }
            _ => {}
        }
    }
    for (words, usage) in table {
        let usage = format!("Usage: reference-vmm {usage}");
        let said = help(&format!("{words} --help"));
        assert!(said.contains(&usage), "{words}: {said}");
        for question in [format!("{words} -h"), format!("help {words}")] {
            assert_eq!(help(&question), said, "{question}");
        }
    }
    assert_eq!(help("help"), top);
    assert_eq!(help("-h"), top);
    assert_eq!(
        help("run --help --incoming x"),
        help("run --incoming --help")
    );
    assert_eq!(help("ctl help load"), help("ctl load --help"));
    assert_eq!(help("snapshot help merge"), help("snapshot merge --help"));
}

#[test]
fn a_command_that_is_none_has_no_help() {
    for words in [
        "help frob",
        "frob --help",
        "ctl frob --help",
        "help ctl frob",
        "snapshot help frob",
    ] {
        let ended = Vmm::command::<[&str; 0]>([]).words(words).output();
        ended.expect_status(2).expect_stdout("");
        ended.expect_line(&["frob", "is not a command"]);
    }
}
