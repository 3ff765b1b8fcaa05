// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `run --api-sock` and `ctl` with real guests: what is asked is done, and the socket lives as long as the guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use guests::{debug, monitor};
use serde_json::{Value, json};
use support::rsp::Gdb;
use support::{Ended, Running, Vmm, binary, need_kvm};

struct Guest {
    running: Running,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Guest {
    /// `code` under a monitor with these words, and a socket.
    fn start(code: &[u8], words: &str) -> Self {
        need_kvm();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let vmm = Vmm::boot(code).words(words).arg("--api-sock").arg(&socket);
        Guest {
            running: vmm.start(),
            socket,
            folder,
        }
    }

    fn ctl(&self, words: &str) -> Ended {
        ctl(&self.socket, words)
    }

    /// What `ctl` says in words.
    fn says(&self, question: &str) -> String {
        let ended = self.ctl(question);
        ended.expect_status(0).expect_silence();
        ended.text()
    }

    /// What `ctl --json` says.
    fn json(&self, question: &str) -> Value {
        let ended = self.ctl(&format!("{question} --json"));
        ended.expect_status(0).expect_silence();
        assert_eq!(ended.text().lines().count(), 1, "{ended}");
        serde_json::from_str(&ended.text()).unwrap()
    }
}

fn ctl(socket: &Path, words: &str) -> Ended {
    Vmm::command(["ctl", "--api-sock"])
        .arg(socket)
        .words(words)
        .output()
}

#[test]
fn a_guest_is_paused_and_resumed_and_hears_of_its_power_button_when_it_goes_on() {
    let mut guest = Guest::start(monitor::button64(), "--cpus 2");
    guest.running.wait_for("up\n");
    assert_eq!(guest.says("status"), "running\n");
    assert_eq!(guest.says("pause"), "paused\n");
    assert_eq!(guest.says("pause"), "paused\n");
    assert_eq!(guest.says("status"), "paused\n");
    let who = json!({
        "id": "anonymous-instance", "state": "Paused", "vmm_version": env!("CARGO_PKG_VERSION"),
        "app_name": "reference-vmm",
    });
    assert_eq!(guest.json("status"), who);
    assert_eq!(guest.says("power-button"), "pressed\n");
    // It polls the button all the time, and does not now.
    let exits = |guest: &Guest| guest.json("stats")["exits"].clone();
    let before = exits(&guest);
    assert!(before.is_array() && before == exits(&guest), "{before}");
    assert_eq!(guest.running.stdout(), "up\n");
    assert_eq!(guest.says("resume"), "running\n");
    let ended = guest.running.wait();
    ended
        .expect_status(0)
        .expect_stdout("up\nbutton\n")
        .expect_silence();
    // Gone, and its socket with it.
    assert!(!guest.socket.exists());
    let gone = ctl(&guest.socket, "status");
    gone.expect_status(1)
        .expect_stdout("")
        .expect_line(&["no monitor answers there"]);
    let gone = ctl(&guest.socket, "status --json");
    gone.expect_status(1)
        .expect_line(&["no monitor answers there"]);
    let said: Value = serde_json::from_str(&gone.text()).unwrap();
    assert!(said["fault_message"].is_string(), "{said}");
}

#[test]
fn what_the_machine_is_and_has_done_is_told_a_line_each() {
    let mut guest = Guest::start(
        monitor::button64(),
        "--cpus 4,threads=2 --memory 64M --cmdline quiet --rng",
    );
    guest.running.wait_for("up\n");
    let config = guest.json("config");
    assert_eq!(config["machine-config"]["vcpu_count"], 4);
    assert_eq!(config["machine-config"]["mem_size_mib"], 64);
    assert_eq!(config["machine-config"]["smt"], true);
    assert_eq!(config["entropy"], json!({}));
    let words = guest.says("config");
    assert!(
        words
            .lines()
            .any(|line| line == "boot-source.boot_args quiet"),
        "{words}"
    );
    assert!(
        words
            .lines()
            .any(|line| line == "machine-config.vcpu_count 4"),
        "{words}"
    );
    assert_eq!(
        guest.says("version"),
        concat!(env!("CARGO_PKG_VERSION"), "\n")
    );
    let stats = guest.says("stats");
    assert!(
        stats.lines().any(|line| line.starts_with("exits.0.")),
        "{stats}"
    );
    assert!(!stats.contains("nulltotal") && !stats.ends_with("\n\n"));
}

#[test]
fn what_cannot_be_is_refused_and_the_guest_runs_on() {
    // It has come to no ACPI.
    let mut guest = Guest::start(monitor::halt64(), "--debug-exit");
    guest.running.wait_for("up\n");
    let refused = guest.ctl("power-button");
    refused
        .expect_status(1)
        .expect_stdout("")
        .expect_line(&["power button", "no ACPI"]);
    let refused = guest.ctl("power-button --json");
    let said: Value = serde_json::from_str(&refused.text()).unwrap();
    assert!(said["fault_message"].as_str().unwrap().contains("no ACPI"));
    assert_eq!(guest.says("status"), "running\n");
}

#[test]
fn sigterm_ends_a_paused_guest_at_once_and_takes_the_socket_with_it() {
    let mut guest = Guest::start(monitor::button64(), "--shutdown-timeout 3600");
    guest.running.wait_for("up\n");
    guest.says("pause");
    guest.running.signal(libc::SIGTERM);
    let ended = guest.running.wait();
    ended
        .expect_status(0)
        .expect_stdout("up\n")
        .expect_silence();
    assert!(!guest.socket.exists());
}

#[test]
fn a_guest_that_ends_closes_the_connections_of_its_socket() {
    let mut guest = Guest::start(monitor::button64(), "");
    guest.running.wait_for("up\n");
    let silent: Vec<_> = (0..30)
        .map(|_| std::os::unix::net::UnixStream::connect(&guest.socket).unwrap())
        .collect();
    guest.says("status");
    guest.running.signal(libc::SIGINT);
    guest.running.wait().expect_status(0);
    for mut stream in silent {
        let end = std::io::Read::read(&mut stream, &mut [0]);
        assert!(matches!(end, Ok(0)) || end.is_err());
    }
}

/// The most descriptors that a process may have.
fn limit_descriptors(pid: libc::pid_t, most: u64) {
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: 1024,
    };
    // SAFETY: the limit is valid, and the old one is not asked for.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_host_without_descriptors_for_clients_answers_them_when_it_has_some() {
    let mut guest = Guest::start(monitor::button64(), "");
    guest.running.wait_for("up\n");
    let pid = guest.running.pid();
    assert_eq!(guest.says("status"), "running\n");
    // The lowest number that is free is above all that it may have.
    limit_descriptors(pid, 3);
    // Nobody can be accepted, and the one who has connected waits; for how long is the server's business.
    let silent = guest.ctl("status --timeout 1");
    silent.expect_status(1).expect_line(&["gives no answer"]);
    // Nor does it try without rest.
    let waits = std::os::unix::net::UnixStream::connect(&guest.socket).unwrap();
    guest.running.wait_until_idle("api");
    drop(waits);
    limit_descriptors(pid, 1024);
    assert_eq!(guest.says("status"), "running\n");
    guest.says("power-button");
    guest.running.wait().expect_status(0);
}

#[test]
fn registers_of_a_paused_guest_are_shown() {
    let mut guest = Guest::start(monitor::button64(), "--cpus 2");
    guest.running.wait_for("up\n");
    guest.says("pause");
    guest.running.signal(libc::SIGUSR1);
    guest.running.wait_for_stderr("vCPU 1:");
    guest.running.wait_for_stderr("vCPU 0:");
    guest.says("resume");
    guest.says("power-button");
    guest.running.wait().expect_status(0);
}

#[test]
fn a_guest_in_the_debugger_is_not_paused_and_one_that_is_paused_goes_on_under_it() {
    let folder = tempfile::tempdir().unwrap();
    let address = folder.path().join("gdb");
    let words = format!("--debug-exit --gdb unix:{}", address.display());
    let guest = Guest::start(debug::debug64(), &words);
    // Before the first instruction: paused, and then paused no more, it waits for the debugger still.
    while !guest.socket.exists() {
        std::thread::yield_now();
    }
    assert_eq!(guest.says("pause"), "paused\n");
    assert_eq!(guest.says("resume"), "running\n");
    let mut gdb = Gdb::unix(&address);
    assert!(gdb.ask("?").starts_with('T'));
    let refused = guest.ctl("pause");
    refused
        .expect_status(1)
        .expect_line(&["debugger", "continue"]);
    assert_eq!(guest.says("status"), "running\n");
    continues(&mut gdb, &guest);
    // Asked to stop meanwhile, it does when it is resumed.
    gdb.try_raw(&[3]);
    assert_eq!(guest.says("status"), "paused\n");
    assert_eq!(guest.says("resume"), "running\n");
    assert!(gdb.answer().starts_with('T'));
    // The end does not wait for a debugger that waits for the resume.
    continues(&mut gdb, &guest);
    gdb.try_raw(&[3]);
    guest.running.signal(libc::SIGINT);
    guest.running.wait().expect_status(0);
}

#[test]
fn a_path_that_is_taken_is_told_before_anything_is_made() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let run = |path: &Path| {
        Vmm::boot(monitor::button64())
            .arg("--api-sock")
            .arg(path)
            .output()
    };
    run(&file)
        .expect_status(2)
        .expect_line(&["--api-sock", "no socket"]);
    let long = folder.path().join("x".repeat(120));
    run(&long)
        .expect_status(2)
        .expect_line(&["--api-sock", "107"]);
    run(Path::new("/no/such/folder/s"))
        .expect_status(2)
        .expect_line(&["--api-sock", "No such"]);
    let guest = Guest::start(monitor::button64(), "");
    while !guest.socket.exists() {
        std::thread::yield_now();
    }
    run(&guest.socket)
        .expect_status(1)
        .expect_line(&["another process listens"]);
    // It was not disturbed, and one that is killed is replaced.
    assert_eq!(guest.says("status"), "running\n");
    guest.running.signal(libc::SIGKILL);
    guest.running.wait();
    assert!(guest.socket.exists());
    let mut next = Vmm::boot(monitor::button64())
        .arg("--api-sock")
        .arg(&guest.socket)
        .start();
    next.wait_for("up\n");
    assert_eq!(ctl(&guest.socket, "power-button").text(), "pressed\n");
    next.wait().expect_status(0);
}

/// Has the debugger let the guest go on, and pauses it: refused until the debugger has.
fn continues(gdb: &mut Gdb, guest: &Guest) {
    gdb.send("c");
    loop {
        let asked = guest.ctl("pause");
        if asked.status.success() {
            return;
        }
        asked.expect_status(1).expect_line(&["debugger"]);
    }
}

/// The README's examples of a paused and resumed guest, as they stand there.
#[test]
fn the_readmes_examples_do_what_it_says() {
    let readme = include_str!("../README.md");
    let chapter = readme
        .split("\n## The control socket\n")
        .nth(1)
        .expect("the chapter");
    let example = chapter.split("```sh\n").nth(1).expect("an example");
    let example = example.split("\n```").next().unwrap();
    let mut guest = Guest::start(monitor::button64(), "");
    guest.running.wait_for("up\n");
    // The program's name is a path here, and the socket's too.
    let program = binary();
    let mut said = Vec::new();
    for line in example
        .lines()
        .filter(|line| !line.starts_with("reference-vmm run"))
    {
        let (command, comment) = line.rsplit_once(" # ").expect("what it says");
        let command = command
            .replace("reference-vmm", program.to_str().unwrap())
            .replace("/run/guest.api", guest.socket.to_str().unwrap());
        let output = Command::new("sh").args(["-c", &command]).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.trim_end(), comment.trim(), "{command}");
        said.push(command);
    }
    assert!(
        said.iter()
            .any(|command| command.trim_start().starts_with("curl"))
    );
    assert!(said.iter().any(|command| command.contains(" ctl ")));
    guest
        .running
        .wait()
        .expect_status(0)
        .expect_stdout("up\nbutton\n");
    drop(guest.folder);
}
