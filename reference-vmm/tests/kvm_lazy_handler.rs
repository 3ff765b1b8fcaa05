// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page-fault handler in another process, as Firecracker has them, brings a guest's memory, and may die of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use async_pf::external::receive;
use guests::image;
use guests::verifier::verifier64;
use reference_vmm::api::Client;
use reference_vmm::end::GuestEnd;
use reference_vmm::lazy::{LazyRequest, LazyState};
use reference_vmm::snapshot::info;
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotRequest};
use serde_json::json;
use support::keeper::{Guest, machine};
use support::rsp::{Gdb, packet};
use support::uffd::copy_page;
use support::{Vmm, WATCHDOG, need_kvm};

const SOCKET: &str = "LAZY_HANDLER_SOCKET";
const FILE: &str = "LAZY_HANDLER_FILE";
const PAGES: &str = "LAZY_HANDLER_PAGES";
/// Behind them it hangs instead: it reads messages no more, or reads them and answers none.
const HANGS: &str = "LAZY_HANDLER_HANGS";
/// It dies of the first page that lies there in the file, or behind.
const DIES_AT: &str = "LAZY_HANDLER_DIES_AT";

/// Its process ends behind the first page, and a child of its goes on in its place.
const LEAVES: &str = "LAZY_HANDLER_LEAVES";

/// Not a test but the handler, in a process of its own: serves the pages of a file, and dies behind so many.
#[test]
fn a_handler() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let memory = File::open(std::env::var_os(FILE).unwrap()).unwrap();
    let most: usize = std::env::var(PAGES).unwrap().parse().unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let (mut is_served, serves) = io::pipe().unwrap();
    let leaves = std::env::var_os(LEAVES).is_some();
    // SAFETY: the child goes on alone, and needs no lock that another thread of the test's may have had.
    if leaves && unsafe { libc::fork() } != 0 {
        drop(serves);
        let _ = is_served.read(&mut [0]);
        std::process::exit(0);
    }
    let mut serves = Some(serves);
    let (stream, _) = listener.accept().unwrap();
    let given = receive(&stream, WATCHDOG).unwrap();
    // It is non-blocking, and polled as handlers do.
    let uffd = given.userfaultfd;
    let mut served = 0;
    let dies_at = std::env::var(DIES_AT).map_or(u64::MAX, |at| at.parse().unwrap());
    loop {
        let hangs = std::env::var(HANGS).ok().filter(|_| served >= most);
        let told = match hangs.as_deref() {
            Some("deaf") => -1,
            _ => uffd.as_raw_fd(),
        };
        let mut fds = [told, stream.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: two pollfds.
        assert!(unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } > 0);
        if fds[1].revents != 0 {
            std::process::exit(0); // the monitor has ended
        }
        let mut message = [0; 32];
        let copy = uffd.try_clone().unwrap();
        match File::from(copy).read(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            read => assert_eq!(read.unwrap(), 32),
        }
        // `struct uffd_msg`: a page fault, and where.
        assert_eq!(message[0], 0x12);
        if hangs.is_some() {
            continue;
        }
        if served == most {
            std::process::exit(0);
        }
        served += 1;
        let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
        let (_, offset, page) = given.mappings.locate(address).unwrap();
        if offset >= dies_at {
            std::process::exit(0);
        }
        let mut bytes = [0; 4096];
        memory.read_exact_at(&mut bytes, offset).unwrap();
        copy_page(&uffd, page, &bytes);
        drop(serves.take());
    }
}

/// A handler that runs. Dropped, it is killed.
struct Handler {
    child: Child,
    socket: PathBuf,
}

impl Handler {
    fn start(folder: &Path, dir: &Path, pages: usize) -> Self {
        Self::start_as(folder, dir, pages, &[])
    }

    fn start_as(folder: &Path, dir: &Path, pages: usize, how: &[(&str, &str)]) -> Self {
        let name = how.first().map_or("", |(_, how)| how);
        let socket = folder.join(format!("handler{pages}{name}"));
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_handler", "--nocapture"])
            // It is killed in the midst of whatever it does: a profile of half of it would be of no use to anybody.
            .env("LLVM_PROFILE_FILE", "/dev/null")
            .env(SOCKET, &socket)
            .env(FILE, dir.join("memory"))
            .env(PAGES, pages.to_string())
            .envs(how.iter().copied())
            .spawn();
        let begun = Instant::now();
        while !socket.exists() {
            assert!(begun.elapsed() < WATCHDOG);
            std::thread::yield_now();
        }
        Handler {
            child: child.unwrap(),
            socket,
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // Gone, or not.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// A snapshot of a guest that compares all of its memory.
fn taken(dir: &Path, compression: Compression) {
    let (_kernel, config) = machine(verifier64(), 4, "16M");
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    guest.snapshot(&SnapshotRequest {
        compression,
        ..SnapshotRequest::new(dir)
    });
    guest.leave();
}

fn from(dir: &Path, handler: &Handler) -> RestoreRequest {
    RestoreRequest {
        lazy: Some(LazyRequest {
            handler: Some(handler.socket.clone()),
            ..LazyRequest::default()
        }),
        ..RestoreRequest::new(dir)
    }
}

#[test]
fn a_guest_whose_memory_another_process_brings_has_all_of_it() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let handler = Handler::start(folder.path(), &dir, usize::MAX);
    let mut guest = Guest::restore(&from(&dir, &handler));
    guest.hear(2);
    let progress = guest.running.lazy_progress().unwrap();
    assert_eq!(
        (progress.state, progress.missing),
        (LazyState::External, None)
    );
    // What needs the userfaultfd is refused, with the reason; what reads memory has it all.
    let copy = folder.path().join("copy");
    let background = SnapshotRequest {
        background: true,
        ..SnapshotRequest::new(&copy)
    };
    let refused = guest.running.snapshot(&background).unwrap_err().to_string();
    assert!(
        refused.contains("a page-fault handler in another process"),
        "{refused}"
    );
    assert!(!copy.exists());
    guest.snapshot(&SnapshotRequest::new(&copy));
    info::verify(&copy).unwrap();
    guest.hear(2);
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&copy));
    guest.hear(2);
    guest.has_all();
}

/// A guest whose memory this handler brings ends when that does, and says so.
fn ends_with(dir: &Path, handler: &Handler) {
    let said = Vmm::command(["restore", "--from"])
        .arg(dir)
        .args(["--page-handler", handler.socket.to_str().unwrap()])
        .stdin_pipe()
        .output();
    said.expect_status(1);
    said.expect_line(&["the page-fault handler at", "has ended"]);
}

#[test]
fn a_handler_that_dies_stops_the_guest_with_the_reason_wherever_it_is() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    for pages in [0, 1, 2, 3, 50, 1000] {
        let handler = Handler::start(folder.path(), &dir, pages);
        let begun = Instant::now();
        ends_with(&dir, &handler);
        assert!(begun.elapsed() < WATCHDOG);
    }
}

#[test]
fn a_handler_that_serves_for_who_listened_is_the_one_whose_end_counts() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let mut handler = Handler::start_as(folder.path(), &dir, usize::MAX, &[(LEAVES, "leaves")]);
    let mut guest = Guest::restore(&from(&dir, &handler));
    assert!(handler.child.wait().unwrap().success());
    guest.hear(2);
    guest.has_all();
    // And where it ends as well.
    let handler = Handler::start_as(folder.path(), &dir, 50, &[(LEAVES, "dies")]);
    ends_with(&dir, &handler);
}

#[test]
fn a_handler_that_lives_and_brings_nothing_is_given_up_at_the_page_deadline() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    for (pages, how, on_loss) in [
        (0, "deaf", "stop"),
        (50, "mute", "stop"),
        (50, "deaf", "poison"),
    ] {
        let handler = Handler::start_as(folder.path(), &dir, pages, &[(HANGS, how)]);
        let ended = Vmm::command(["restore", "--page-deadline", "1", "--from"])
            .arg(&dir)
            .args(["--on-loss", on_loss, "--page-handler"])
            .arg(&handler.socket)
            .stdin_pipe()
            .output();
        match (on_loss, ended.status.code()) {
            // A guest that fetches its next instruction from a poisoned page has crashed, as far as KVM says.
            ("poison", Some(3)) => {}
            _ => {
                ended.expect_status(1);
            }
        }
        let said = &ended.stderr;
        let why = "lives and has brought nothing for 1.00 s, while somebody waits";
        assert!(said.contains(why), "{how}: {said}");
    }
}

#[test]
fn a_handler_that_is_killed_stops_the_guest() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let mut handler = Handler::start(folder.path(), &dir, usize::MAX);
    let mut guest = Guest::restore(&from(&dir, &handler));
    // It has come to its second vCPU at most.
    handler.child.kill().unwrap();
    while !guest.end.is_told() {
        guest.listen();
    }
    let end = guest.leave().1;
    let Some(GuestEnd::Failed(why)) = end else {
        panic!("{end:?}");
    };
    assert!(
        why.contains("has ended, and the guest's memory with it"),
        "{why}"
    );
}

#[test]
fn what_cannot_be_handed_off_is_refused_before_there_is_a_guest() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::Zstd);
    let restore = |socket: &str| {
        Vmm::command(["restore", "--from"])
            .arg(&dir)
            .args(["--page-handler", socket])
            .limit(Duration::from_secs(60))
            .output()
    };
    restore("/nowhere/handler")
        .expect_status(2)
        .expect_line(&["compressed", "snapshot merge"]);
    taken(&dir, Compression::None);
    restore("/nowhere/handler")
        .expect_status(1)
        .expect_line(&["nobody listens at /nowhere/handler: there is no such socket"]);
    // What it brings first nobody here sees.
    Vmm::command([
        "restore",
        "--page-handler=/nowhere/handler",
        "--record",
        "--from",
    ])
    .arg(&dir)
    .limit(Duration::from_secs(60))
    .output()
    .expect_status(2)
    .expect_line(&["--record and --page-handler"]);
}

/// A monitor that waits for a load, and who asks for it.
fn waiting(socket: &Path) -> (support::Running, Client) {
    let monitor = Vmm::command(["restore", "--api-sock"])
        .arg(socket)
        .stdin_pipe()
        .start();
    loop {
        match Client::connect(socket, WATCHDOG) {
            Ok(client) => return (monitor, client),
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn a_load_that_waits_for_memory_is_given_up_when_who_asked_for_it_is_gone_and_another_has_its_turn()
{
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let [socket, deaf] = ["api", "deaf"].map(|name| folder.path().join(name));
    let listener = UnixListener::bind(&deaf).unwrap();
    let (monitor, _client) = waiting(&socket);
    let ctl = |words: &str| {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&socket);
        ctl.arg("load").arg(&dir).words(words)
    };
    // Nobody brings the first page that the machine needs, for a day.
    let load = ctl("--page-deadline 86400 --page-handler").arg(&deaf);
    let load = load.start();
    let (stream, _) = listener.accept().unwrap();
    let _given = receive(&stream, WATCHDOG).unwrap();
    load.signal(libc::SIGKILL);
    load.wait();
    ctl("").output().expect_status(0);
    monitor.signal(libc::SIGTERM);
    monitor.wait().expect_status(0);
}

#[test]
fn while_the_first_memory_is_waited_for_the_control_socket_says_so_and_a_signal_ends_that() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let [socket, deaf] = ["api", "deaf"].map(|name| folder.path().join(name));
    let listener = UnixListener::bind(&deaf).unwrap();
    let restore = Vmm::command(["restore", "--page-deadline", "86400", "--page-handler"]);
    let restore = restore.arg(&deaf).arg("--from").arg(&dir);
    let monitor = restore.arg("--api-sock").arg(&socket).start();
    let (stream, _) = listener.accept().unwrap();
    let _given = receive(&stream, WATCHDOG).unwrap();
    let ctl = |words: &str| {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&socket);
        ctl.words(words).output()
    };
    ctl("status").expect_status(0).expect_stdout(
        "not started, waits for memory that the machine needs first (of the page server or the page-fault handler)\n",
    );
    ctl("config")
        .expect_status(1)
        .expect_line(&["There is no guest here yet"]);
    monitor.signal(libc::SIGTERM);
    monitor.wait().expect_status(0);
    assert!(!socket.exists());
}

#[test]
fn a_handler_that_has_as_many_as_it_takes_is_said_to_accept_nobody() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let path = folder.path().join("full");
    let _listener = reference_vmm::unix_socket::Listener::bind(&path, 1).unwrap();
    let mut full = Vec::new();
    while let Ok(stream) = reference_vmm::unix_socket::connect(&path) {
        full.push(stream);
    }
    let restore = Vmm::command(["restore", "--page-deadline", "1", "--page-handler"]).arg(&path);
    let restore = restore.arg("--from").arg(&dir).output();
    restore.expect_status(1).expect_line(&["accepts nobody"]);
}

#[test]
fn what_is_lost_with_a_handler_is_in_no_snapshot_of_a_guest_that_goes_on_without() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let handler = Handler::start(folder.path(), &dir, 1);
    let socket = folder.path().join("api");
    let (monitor, mut client) = waiting(&socket);
    // Paused, so that it touches nothing of what is lost.
    let load = json!({
        "snapshot_path": dir, "on_loss": "poison",
        "mem_backend": { "backend_type": "Uffd", "backend_path": handler.socket },
    });
    let answer = client.call("PUT", "/snapshot/load", Some(&load)).unwrap();
    assert_eq!(answer.status, 204, "{answer:?}");
    drop(handler);
    let begun = Instant::now();
    while client.call("GET", "/", None).unwrap().body.unwrap()["lazy"]["lost"].is_null() {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
    let other = folder.path().join("other");
    Vmm::command(["ctl", "--api-sock"])
        .arg(&socket)
        .arg("snapshot")
        .arg(&other)
        .output()
        .expect_status(1)
        .expect_line(&["have not come", "the page-fault handler at", "has ended"]);
    assert!(!other.exists());
    monitor.signal(libc::SIGTERM);
    monitor.wait().expect_status(0);
}

/// In the file: behind all that a guest that stands still needs.
const FAR: u64 = 8 << 20;

/// A handler that dies when somebody touches what is far behind.
fn dying(folder: &Path, dir: &Path) -> Handler {
    Handler::start_as(folder, dir, usize::MAX, &[(DIES_AT, &FAR.to_string())])
}

/// It ended with the handler's reason, and by its own way.
fn ended_for_it(ended: &support::Ended) {
    ended.expect_status(1);
    let why = "has ended, and the guest's memory with it; with --on-loss poison";
    assert!(ended.stderr.contains(why), "{ended}");
    let parked = "keeps the guest from being stopped";
    assert!(!ended.stderr.contains(parked), "{ended}");
}

#[test]
fn a_snapshot_under_which_the_handler_dies_is_refused_with_the_reason() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    for on_loss in ["poison", "stop"] {
        let handler = dying(folder.path(), &dir);
        let socket = folder.path().join(on_loss);
        let (monitor, mut client) = waiting(&socket);
        let load = json!({
            "snapshot_path": dir, "on_loss": on_loss,
            "mem_backend": { "backend_type": "Uffd", "backend_path": handler.socket },
        });
        let answer = client.call("PUT", "/snapshot/load", Some(&load)).unwrap();
        assert_eq!(answer.status, 204, "{answer:?}");
        let other = folder.path().join("other");
        let taken = Vmm::command(["ctl", "--api-sock"])
            .arg(&socket)
            .arg("snapshot")
            .arg(&other)
            .output();
        assert!(!other.exists());
        fs::remove_file(&handler.socket).unwrap();
        if on_loss == "stop" {
            // Whether it was answered still is a matter of moments.
            taken.expect_status(1);
            ended_for_it(&monitor.wait());
            continue;
        }
        taken.expect_status(1).expect_line(&[
            "the page-fault handler at",
            "has ended, and the guest's memory",
        ]);
        // It has touched nothing of that, and is there.
        let state = client.call("GET", "/", None).unwrap().body.unwrap();
        assert_eq!(state["state"], "Paused", "{state}");
        monitor.signal(libc::SIGTERM);
        monitor.wait().expect_status(0);
    }
}

#[test]
fn a_debugger_that_reads_what_is_lost_has_an_error() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    for on_loss in ["poison", "stop"] {
        let handler = dying(folder.path(), &dir);
        let socket = folder.path().join(on_loss);
        let mut monitor = Vmm::command(["restore", "--from"])
            .arg(&dir)
            .args(["--on-loss", on_loss, "--page-handler"])
            .arg(&handler.socket)
            .arg("--gdb")
            .arg(format!("unix:{}", socket.display()))
            .stdin_pipe()
            .start();
        monitor.wait_for_stderr("waits for a debugger");
        let mut gdb = Gdb::unix(&socket);
        gdb.hello();
        let there = gdb.memory(image::LOAD_ADDR.into(), 8);
        assert_eq!(there.len(), 16, "{there}");
        let far = 12 << 20;
        if on_loss == "stop" {
            gdb.send(&format!("m{far:x},8"));
            ended_for_it(&monitor.wait());
        } else {
            assert_eq!(gdb.memory(far, 8), "E0e");
            assert_eq!(gdb.set_memory(far, &[1]), "E0e");
            // What is there it can have.
            assert_eq!(gdb.memory(image::LOAD_ADDR.into(), 8), there);
            gdb.raw(&packet(b"k"));
            monitor.wait().expect_status(0);
        }
        fs::remove_file(&handler.socket).unwrap();
    }
}

#[test]
fn a_client_of_firecrackers_api_says_where_the_handler_is() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    taken(&dir, Compression::None);
    let handler = Handler::start(folder.path(), &dir, usize::MAX);
    let socket = folder.path().join("api");
    let (mut monitor, mut client) = waiting(&socket);
    let load = |path: &Path| {
        json!({
            "snapshot_path": dir, "resume_vm": true,
            "mem_backend": { "backend_type": "Uffd", "backend_path": path },
        })
    };
    // One that fails is answered, and another may come.
    let nowhere = load(Path::new("/nowhere"));
    let refused = client
        .call("PUT", "/snapshot/load", Some(&nowhere))
        .unwrap();
    assert!(refused.fault().unwrap().contains("/nowhere"), "{refused:?}");
    let loaded = load(&handler.socket);
    let answer = client.call("PUT", "/snapshot/load", Some(&loaded)).unwrap();
    assert_eq!(answer.status, 204, "{answer:?}");
    monitor.wait_for("5");
    let answer = client.call("GET", "/", None).unwrap();
    assert_eq!(answer.body.unwrap()["lazy"]["state"], "external");
    monitor.type_in(b"q");
    monitor.wait().expect_status(1).expect_silence();
}
