// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Linux with one vCPU and two tasks that would run, of which one waits for a page that is held back: with
//! asynchronous page faults the other has the vCPU meanwhile, and who waited is woken, in a copy of the guest too.
//!
//! `guest-io cold` (xtask/src/bin/guest_io/cold.rs) is the two tasks. It writes its pages before a snapshot; restored, the
//! guest has its memory from a page-fault handler in this process, which knows the pages by what they begin with and gives
//! each when the test says so. All others come at once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use async_pf::external::{HandOff, receive};
use reference_vmm::api::Client;
use support::lab::{alone, expect_done, initrd_with_guest_io, scripted};
use support::uffd::copy_page;
use support::{Running, Vmm, WATCHDOG};

const LIMIT: Duration = Duration::from_secs(240);

/// Pages that are touched one after the other, and what each begins with.
const PAGES: usize = 4;
const MARK: &[u8] = b"guest: cold page";

/// A processor without the feature.
const HIDDEN: &str = r#"{"clear": ["kvm_async_pf", "kvm_async_pf_int", "kvm_async_pf_vmexit"]}"#;

/// Who serves a guest's memory, from the file of its snapshot.
struct Handler {
    orders: UnixStream,
    /// Told of each page that is held back.
    held: Receiver<()>,
}

impl Handler {
    /// Gives the page that is held back, and no other.
    const ONE: &[u8] = b"1";
    /// Holds nothing back any more.
    const ALL: &[u8] = b"*";

    fn start(socket: &Path, memory: File) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (orders, ordered) = UnixStream::pair().unwrap();
        let (tell, held) = mpsc::channel();
        std::thread::spawn(move || {
            let (monitor, _) = listener.accept().unwrap();
            let hand_off = receive(&monitor, WATCHDOG).unwrap();
            serve(&hand_off, &memory, &monitor, &ordered, || {
                // Nobody may listen any more.
                let _ = tell.send(());
            });
        });
        Handler { orders, held }
    }

    fn wait_for_a_page(&self) {
        self.held.recv_timeout(LIMIT).unwrap();
    }

    fn give(&self, what: &[u8]) {
        (&self.orders).write_all(what).unwrap();
    }
}

/// Serves until the monitor has ended.
fn serve(
    given: &HandOff,
    memory: &File,
    monitor: &UnixStream,
    mut orders: &UnixStream,
    tell: impl Fn(),
) {
    let mut faults = File::from(given.userfaultfd.try_clone().unwrap());
    let mut held = Vec::new();
    let mut known = HashSet::new();
    let mut holds = true;
    while let [false, ordered, _] =
        readable([monitor.as_raw_fd(), orders.as_raw_fd(), faults.as_raw_fd()])
    {
        if ordered {
            let mut order = [0];
            if orders.read(&mut order).unwrap() == 0 {
                return;
            }
            holds = order == Handler::ONE;
            for (page, bytes) in held.drain(..) {
                copy_page(&given.userfaultfd, page, &bytes);
            }
        }
        let mut message = [0; 32];
        match faults.read(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            read => assert_eq!(read.unwrap(), 32),
        }
        // `struct uffd_msg`: a page fault, and where.
        assert_eq!(message[0], 0x12);
        let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
        let (_, offset, page) = given.mappings.locate(address).unwrap();
        let mut bytes = [0; 4096];
        memory.read_exact_at(&mut bytes, offset).unwrap();
        // A page may be told of again while it is held, and be there when it is.
        if holds && bytes.starts_with(MARK) && known.insert(page) {
            held.push((page, bytes));
            tell();
        } else if !held.iter().any(|(at, _)| *at == page) {
            copy_page(&given.userfaultfd, page, &bytes);
        }
    }
}

/// Waits until one of them can be read; which.
fn readable(fds: [i32; 3]) -> [bool; 3] {
    let mut fds = fds.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: three pollfds.
    assert!(unsafe { libc::poll(fds.as_mut_ptr(), 3, -1) } > 0);
    fds.map(|fd| fd.revents != 0)
}

/// A guest that goes on, and whoever has its memory.
struct Guest {
    running: Running,
    handler: Handler,
    api: std::path::PathBuf,
}

impl Guest {
    /// Boots one and snapshots it before its tasks begin.
    fn freeze(dir: &Path, kernel: &str, offered: bool) {
        let initrd = initrd_with_guest_io();
        let script = format!("exec guest-io cold {PAGES}");
        let api = dir.join("first.api");
        let mut first = scripted(kernel, "", &script)
            .arg("--initrd")
            .arg(&*initrd)
            .arg("--api-sock")
            .arg(&api)
            .stdin_pipe()
            .limit(LIMIT);
        if !offered {
            let model = dir.join("cpu.json");
            std::fs::write(&model, HIDDEN).unwrap();
            first = first.arg("--cpu").arg(model);
        }
        let mut first = first.start();
        first.wait_for("guest: cold ready");
        ctl(&api, &["pause"]);
        ctl(&api, &["snapshot", dir.join("frozen").to_str().unwrap()]);
        first.signal(libc::SIGTERM);
        first.wait().expect_status(0);
    }

    /// Lets it go on, its pages held back, and gives its tasks the word.
    fn thaw(dir: &Path, word: &str) -> Self {
        let socket = dir.join("handler");
        // Of one before.
        let _ = std::fs::remove_file(&socket);
        let memory = File::open(dir.join("frozen/memory")).unwrap();
        let handler = Handler::start(&socket, memory);
        let api = dir.join("api");
        let mut running = Vmm::command(["restore", "--stats", "--from"])
            .arg(dir.join("frozen"))
            // It is held back for as long as the test takes.
            .args(["--page-deadline", "240"])
            .arg("--page-handler")
            .arg(&socket)
            .arg("--api-sock")
            .arg(&api)
            .stdin_pipe()
            .limit(LIMIT)
            .start();
        running.type_in(format!("{word}\n").as_bytes());
        Guest {
            running,
            handler,
            api,
        }
    }

    /// What KVM has counted of the vCPU under this name; zeros are not said.
    fn counted(&self, name: &str) -> u64 {
        let mut client = Client::connect(&self.api, LIMIT).unwrap();
        let stats = client.call("GET", "/stats", None).unwrap().body.unwrap();
        let counts = stats["kvm"]["vcpus"][0].as_array().unwrap();
        let count = counts.iter().find(|count| count["name"] == name);
        count.map_or(0, |count| count["value"].as_u64().unwrap())
    }

    /// How many steps of the counting were told.
    fn steps(&self) -> usize {
        self.running.stdout().matches("guest: cold step").count()
    }

    /// Has all pages been touched, and the guest come to its end; what it said.
    fn end(mut self) -> String {
        end(&mut self.running);
        let ended = self.running.wait();
        expect_end(&ended);
        ended.text()
    }
}

fn end(running: &mut Running) {
    running.wait_for(&format!("guest: cold touched all {PAGES}"));
    running.type_in(b"end\n");
}

/// It has powered off, with nothing on stderr but the numbers.
fn expect_end(ended: &support::Ended) {
    ended.expect_status(0);
    let text = ended.text();
    assert!(text.contains("guest: script done"), "{ended}");
    support::lab::no_complaints(ended);
}

fn ctl(api: &Path, words: &[&str]) {
    let asked = Vmm::command(["ctl", "--api-sock"]).arg(api).args(words);
    asked.limit(LIMIT).output().expect_status(0);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_task_goes_on_while_another_waits_for_a_page() {
    let _alone = alone();
    for kernel in ["vmlinuz-6.12", "vmlinuz-cloud-6.1"] {
        let folder = tempfile::tempdir().unwrap();
        Guest::freeze(folder.path(), kernel, true);
        // Also where who waits would have gone before.
        for word in ["watch", "watch first"] {
            let mut guest = Guest::thaw(folder.path(), word);
            for page in 0..PAGES {
                guest.handler.wait_for_a_page();
                // Nobody has the page. Five steps later one waits for it still, and knows that it does.
                guest
                    .running
                    .wait_for_more(&format!("state D touched {page}\r\n"), 5);
                guest.handler.give(Handler::ONE);
            }
            let told = guest.counted("pf_guest");
            println!("{kernel}, {word}: KVM told the guest of {told} pages that were not there");
            assert!(told >= PAGES as u64);
            guest.end();
        }
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn where_it_is_not_offered_who_waits_for_a_page_has_the_vcpu() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    Guest::freeze(folder.path(), "vmlinuz-cloud-6.1", false);

    // With priority all of it. The vCPU halts meanwhile, for KVM itself is asynchronous, and each tick wakes it.
    let guest = Guest::thaw(folder.path(), "watch first");
    for page in 0..PAGES {
        guest.handler.wait_for_a_page();
        // What was said before, by a serial port, is still to come.
        let still = (0..20).any(|_| {
            let before = guest.steps();
            wakes(&guest, 50);
            guest.steps() == before
        });
        assert!(still, "page {page}: {}", guest.running.stdout());
        guest.handler.give(Handler::ONE);
    }
    assert_eq!(guest.counted("pf_guest"), 0);
    guest.end();

    // Without, its share: the guest does not know that it waits.
    let mut guest = Guest::thaw(folder.path(), "watch");
    for page in 0..PAGES {
        guest.handler.wait_for_a_page();
        guest
            .running
            .wait_for_more(&format!("state R touched {page}\r\n"), 5);
        guest.handler.give(Handler::ONE);
    }
    assert_eq!(guest.counted("pf_guest"), 0);
    assert!(!guest.end().contains("state D"));
}

/// Waits until the halted vCPU has woken so many times.
fn wakes(guest: &Guest, times: u64) {
    let (begun, first) = (Instant::now(), guest.counted("halt_wakeup"));
    while guest.counted("halt_wakeup") < first + times {
        assert!(begun.elapsed() < LIMIT, "the vCPU does not halt");
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn who_waits_for_a_page_at_a_snapshot_is_woken_in_the_copy_and_in_the_original() {
    let _alone = alone();
    for kernel in ["vmlinuz-6.12", "vmlinuz-cloud-6.1"] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        Guest::freeze(dir, kernel, true);
        let mut guest = Guest::thaw(dir, "watch");
        guest.handler.wait_for_a_page();
        guest.running.wait_for_more("state D touched 0\r\n", 1);
        ctl(&guest.api, &["pause"]);
        // It comes now, and KVM has nobody to tell it to.
        guest.handler.give(Handler::ALL);
        let copy = dir.join("copy");
        ctl(&guest.api, &["snapshot", copy.to_str().unwrap()]);
        let restored = Vmm::command(["restore", "--from"]).arg(&copy);
        let mut restored = restored.stdin_pipe().limit(LIMIT).start();
        end(&mut restored);
        expect_done(&restored.wait());
        ctl(&guest.api, &["resume"]);
        guest.end();
    }
}
