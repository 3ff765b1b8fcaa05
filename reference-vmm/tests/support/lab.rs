// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the lab's tests share: the files that `cargo xtask test` names for them, stock guests that run a script or have
//! a shell, and what no kernel may say.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Ended, Running, Vmm, file, need_kvm};

/// One guest at a time: several of several vCPUs on a lab of one CPU wait for each other's spinlocks.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `cargo xtask test` says by this name.
pub fn named(name: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: cargo xtask test"))
}

/// A file of the lab's kernels and images.
pub fn lab_file(name: &str) -> PathBuf {
    let path = PathBuf::from(named("LAB_KERNELS")).join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo xtask test makes it",
        path.display()
    );
    path
}

/// Runs an applet of the lab's busybox, which is to succeed.
pub fn busybox(words: &[&str]) {
    let mut busybox = Command::new(named("LAB_BUSYBOX"));
    let status = busybox.args(words).status().unwrap();
    assert!(status.success(), "busybox {words:?}: {status}");
}

/// Base64 (RFC 4648), for a kernel's command line.
pub fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in text.as_bytes().chunks(3) {
        let mut bits = 0;
        for at in 0..3 {
            bits = bits << 8 | u32::from(three.get(at).copied().unwrap_or(0));
        }
        for at in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * at) & 63) as usize];
            out.push(if at <= three.len() {
                digit as char
            } else {
                '='
            });
        }
    }
    out
}

/// An archive (newc) with one program in it.
fn archive(name: &str, program: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, mode, data) in [(name, 0o100_755, program), ("TRAILER!!!", 0, &[])] {
        let (size, named) = (data.len(), name.len() + 1);
        let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, named, 0];
        out.extend(b"070701");
        for field in fields {
            out.extend(format!("{field:08x}").bytes());
        }
        out.extend(name.bytes().chain([0]));
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// The initramfs with drivers, and `bin/guest-io` (xtask/src/bin/guest_io.rs) behind it.
pub fn initrd_with_guest_io() -> tempfile::TempPath {
    let mut bytes = std::fs::read(lab_file("initrd-devices.cpio.gz")).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let program = std::fs::read(named("LAB_GUEST_IO")).unwrap();
    bytes.extend(archive("bin/guest-io", &program));
    file(&bytes)
}

/// A guest that loads `modules` and runs `script`, which ends at the first command that fails (xtask/src/guest-init.sh).
/// Its initramfs is the caller's to give.
pub fn scripted(kernel: &str, modules: &str, script: &str) -> Vmm {
    with_script("quiet", kernel, modules, script)
}

/// A guest that loads `modules` and gives a [`Shell`] behind [`PROMPT`], without the editor that busybox has on a
/// terminal. `exit` powers it off. Its kernel says nothing on the console. Its initramfs is the caller's to give.
pub fn interactive(kernel: &str, modules: &str) -> Vmm {
    let script = format!("echo '{PROMPT}'; while read -r line; do eval \"$line\" || true; done");
    with_script("loglevel=0", kernel, modules, &script).stdin_pipe()
}

/// What [`interactive`] says when it is ready.
pub const PROMPT: &str = "guest: type commands";

fn with_script(words: &str, kernel: &str, modules: &str, script: &str) -> Vmm {
    need_kvm();
    let script = base64(script);
    let cmdline = format!("console=ttyS0 {words} guest.modules={modules} guest.script={script}");
    Vmm::run(lab_file(kernel)).args(["--cmdline", &cmdline])
}

/// The script came to its end, and the kernel has nothing to complain of.
#[track_caller]
pub fn expect_done(ended: &Ended) {
    ended.expect_status(0).expect_silence();
    assert!(ended.text().contains("guest: script done"), "{ended}");
    no_complaints(ended);
}

/// What no guest's log has on a machine in order.
#[track_caller]
pub fn no_complaints(ended: &Ended) {
    for line in ended.text().lines() {
        for bad in [
            "Oops",
            "BUG:",
            "Kernel panic",
            "WARNING:",
            "soft lockup",
            "rcu_sched detected",
            "blocked for more than",
            "NETDEV WATCHDOG",
            "guest: refused",
        ] {
            assert!(!line.contains(bad), "{line}\n{ended}");
        }
        let acpi = line.contains("ACPI") && (line.contains("rror:") || line.contains("rror ("));
        assert!(!acpi, "{line}\n{ended}");
    }
}

/// A shell on a guest's console. Each command is to succeed.
pub struct Shell {
    running: Running,
    typed: u32,
}

impl Shell {
    /// The shell that says `prompt` when it is ready.
    pub fn at(mut running: Running, prompt: &str) -> Self {
        running.wait_for(prompt);
        let mut shell = Shell { running, typed: 0 };
        shell.run("stty -echo; PS1=");
        shell
    }

    /// Runs a command; what it wrote.
    pub fn run(&mut self, command: &str) -> String {
        self.typed += 1;
        let (before, number) = (self.running.stdout().len(), self.typed + 1000);
        // The marks are not in what is typed, which the console echoes at first.
        let typed = self.typed;
        let marks = format!("echo status-$(({typed} + 1000))=$?; echo end-$(({typed} + 1000))");
        self.type_in(&format!("{command}; {marks}\n"));
        self.running.wait_for(&format!("end-{number}\r\n"));
        let said = self.running.stdout().split_off(before);
        let (answer, status) = said.split_once(&format!("status-{number}=")).unwrap();
        assert!(status.starts_with("0\r\n"), "{command}: {said}");
        answer.to_owned()
    }

    /// Runs a command again and again, until it says this.
    pub fn until(&mut self, command: &str, says: &str) {
        while self.run(command).trim_end() != says {}
    }

    /// Types what is no command, or ends the shell.
    pub fn type_in(&mut self, text: &str) {
        self.running.type_in(text.as_bytes());
    }

    /// The guest's monitor.
    pub fn monitor(&mut self) -> &mut Running {
        &mut self.running
    }

    /// The guest's monitor, and no shell any more.
    pub fn into_monitor(self) -> Running {
        self.running
    }

    /// Waits for the end of the guest.
    pub fn wait(self) -> Ended {
        self.running.wait()
    }
}
