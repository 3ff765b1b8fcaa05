// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Debian kernel under a real gdb, where the KVM is hardware-style: `cargo xtask test` runs it in
//! the lab. gdb is `LAB_GDB`, or that of the host.
//!
//! Debian's System.map is a placeholder, so a symbol's address comes from the guest itself
//! (`/proc/kallsyms`), and `nokaslr` makes it that of the next boot as well.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use support::lab::lab_file;
use support::{Running, Vmm, need_kvm};

const LIMIT: Duration = Duration::from_secs(240);

/// A kernel that waits for gdb at `socket`.
fn linux(socket: &Path, then: &str) -> Running {
    need_kvm();
    let mut running = Vmm::run(lab_file("vmlinux-cloud-6.1"))
        .arg("--initrd")
        .arg(lab_file("initrd-scripted.cpio.gz"))
        .arg("--cmdline")
        .arg(format!("console=ttyS0 quiet nokaslr guest.then={then}"))
        .arg("--gdb")
        .arg(format!("unix:{}", socket.display()))
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    running.wait_for_stderr("waits for a debugger");
    running
}

/// What gdb says to these commands, once it is connected.
struct Gdb {
    child: std::process::Child,
    out: BufReader<ChildStdout>,
    said: String,
}

impl Gdb {
    fn start(socket: &Path, commands: &[&str]) -> Self {
        let program = std::env::var_os("LAB_GDB").unwrap_or_else(|| OsString::from("gdb"));
        let mut command = Command::new(&program);
        command.args(["-nx", "-batch", "-ex", "set pagination off", "-ex"]);
        command.arg("set remotetimeout 120").arg("-ex");
        command.arg(format!("target remote {}", socket.display()));
        for word in commands {
            command.args(["-ex", word]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let child = command.stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let out = BufReader::new(child.stdout.take().unwrap());
        Gdb {
            child,
            out,
            said: String::new(),
        }
    }

    /// Waits until it says this.
    fn wait_for(&mut self, needle: &str) {
        while !self.said.contains(needle) {
            let read = self.out.read_line(&mut self.said).unwrap();
            assert!(read > 0, "gdb never said {needle:?}:\n{}", self.said);
        }
    }

    fn said(mut self) -> String {
        let mut text = self.said;
        self.out.read_to_string(&mut text).unwrap();
        let output = self.child.wait_with_output().unwrap();
        let _ = writeln!(text, "{}", String::from_utf8_lossy(&output.stderr));
        println!("{text}");
        text
    }
}

#[track_caller]
fn has(text: &str, needles: &[&str]) {
    for needle in needles {
        assert!(
            text.contains(needle),
            "no {needle:?} in what gdb said:\n{text}"
        );
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn gdb_debugs_a_stock_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb");

    // Before the first instruction, and away: the kernel boots.
    let mut running = linux(&socket, "shell");
    let text = Gdb::start(
        &socket,
        &["info registers rip cr0 efer", "stepi", "x/i $pc", "detach"],
    )
    .said();
    has(&text, &["rip ", "cr0 ", "=> 0x", "detached"]);
    running.wait_for("guest: a shell");
    running.type_in(b"grep ' __x64_sys_reboot$' /proc/kallsyms | sed s/^/symbol=/\n");
    // The whole line; the shell has echoed the command, which has no T.
    running.wait_for(" T __x64_sys_reboot");
    let symbol = symbol(&running.stdout());

    // Attached to while it runs: a breakpoint that the shell's end runs into.
    let commands = |symbol: &str| {
        [
            format!("break *0x{symbol}"),
            "echo ready\\n".to_owned(),
            "continue".to_owned(),
            "info registers rip rax rdi gs_base cr3".to_owned(),
            "x/2i $pc".to_owned(),
            "stepi".to_owned(),
            "x/i $pc".to_owned(),
            "x/2gx $rsp".to_owned(),
            "info threads".to_owned(),
            "delete".to_owned(),
            "continue".to_owned(),
        ]
    };
    let commands = commands(&symbol);
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    let mut gdb = Gdb::start(&socket, &commands);
    // The guest is stopped, and finds what is typed when it goes on.
    gdb.wait_for("ready");
    running.type_in(b"exit\n");
    hit(&gdb.said(), &symbol);
    running.wait().expect_status(0);

    // Set before the kernel has mapped it.
    let running = linux(&socket, "poweroff");
    hit(&Gdb::start(&socket, &commands).said(), &symbol);
    running.wait().expect_status(0);
}

fn symbol(console: &str) -> String {
    let (_, line) = console.rsplit_once("symbol=ffffffff").unwrap();
    format!("ffffffff{}", &line[..8])
}

/// gdb has stopped at the symbol, stepped, and seen the guest's end.
#[track_caller]
fn hit(text: &str, symbol: &str) {
    has(
        text,
        &[
            "Breakpoint ",
            &format!("rip            0x{symbol}"),
            &format!("=> 0x{symbol}"),
            "(vCPU 0)",
            "gs_base ",
            "exited normally",
        ],
    );
    let stops: Vec<_> = text.matches("=> 0x").collect();
    assert_eq!(stops.len(), 2, "{text}");
    assert!(!text.contains("Cannot"), "{text}");
}
