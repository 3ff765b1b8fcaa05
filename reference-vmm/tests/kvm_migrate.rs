// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migration over the real KVM: a guest that knows what it has goes from one machine to another while it runs, over
//! connections that break.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use guests::dirtier::dirtier64;
use guests::image;
use guests::keeper::keeper64;
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::devices::virtio::block::DiskConfig;
use reference_vmm::end::{EndSignal, GuestEnd};
use reference_vmm::memory::Memory;
use reference_vmm::migration::address::Address;
use reference_vmm::migration::incoming::{Incoming, IncomingError, IncomingRequest};
use reference_vmm::migration::outgoing::{MigrateRequest, Order, Outgoing, OutgoingError};
use reference_vmm::migration::record::MigrationRecord;
use reference_vmm::migration::source::WhenStuck;
use reference_vmm::snapshot::{SnapshotError, SnapshotRequest};
use reference_vmm::vm::{BuildError, ControlError, Machine, RunState, Running};
use support::keeper::{Guest, digits, keeper};
use support::{Vmm, long, need_kvm};

/// Moves the guest to `to`, for which `incoming` waits.
fn migrate(
    guest: &Guest,
    incoming: Incoming,
    request: &MigrateRequest,
) -> (
    Result<MigrationRecord, OutgoingError>,
    Result<Guest, IncomingError>,
) {
    migrate_to(guest, incoming, request, Machine::start)
}

/// [`migrate`], where `start` starts what has come.
fn migrate_to(
    guest: &Guest,
    incoming: Incoming,
    request: &MigrateRequest,
    start: impl FnOnce(Machine) -> Result<Running, BuildError> + Send,
) -> (
    Result<MigrationRecord, OutgoingError>,
    Result<Guest, IncomingError>,
) {
    let end = Arc::new(EndSignal::new().unwrap());
    let (console, writer) = std::io::pipe().unwrap();
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            let stop = || {
                gone.load(Ordering::Relaxed)
                    .then(|| "no source is left".to_owned())
            };
            incoming.receive(writer, &end, &stop, start)
        });
        let here = Outgoing::default().migrate(&guest.running, &guest.end, request);
        gone.store(here.is_err(), Ordering::Relaxed);
        let there = there.join().unwrap().map(|running| Guest {
            running,
            end: Arc::clone(&end),
            console,
            said: Vec::new(),
        });
        (here, there)
    })
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("incoming");
    (folder, path)
}

/// To wherever `incoming` listens. This guest writes all that it has without rest, on a host that interprets it: it is
/// stopped when that is seen.
fn request(to: &Address) -> MigrateRequest {
    MigrateRequest {
        when_stuck: WhenStuck::Stop,
        ..MigrateRequest::new(to.to_string())
    }
}

#[test]
fn a_guest_goes_from_machine_to_machine_and_has_lost_nothing() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let hops = if long() { 20 } else { 3 };
    for (cpus, irqchip) in [
        (1, Irqchip::Split),
        (1, Irqchip::Kernel),
        (4, Irqchip::Split),
        (4, Irqchip::Kernel),
    ] {
        let (_kernel, config) = keeper(cpus, irqchip);
        let mut guest = Guest::boot(&config);
        let mut all = String::new();
        for hop in 0..hops {
            guest.hear(1 + hop * 7 % 5);
            let (_folder, path) = place();
            let address = match hop % 2 {
                0 => Address::Unix(path),
                _ => "tcp:127.0.0.1:0".parse().unwrap(),
            };
            let incoming = Incoming::bind(&IncomingRequest::new(address)).unwrap();
            let request = MigrateRequest {
                connections: 1 + hop as u32 % 3,
                compression: ["none", "zstd"][hop % 2].into(),
                ..request(incoming.address())
            };
            let (here, there) = migrate(&guest, incoming, &request);
            let record = here.unwrap();
            assert!(record.rounds.len() >= 2, "{record:?}");
            assert!(record.downtime().is_some());
            assert_eq!(guest.running.state(), RunState::Paused);
            assert!(guest.running.resume().is_err());
            // It is another one's by now.
            let (_folder, dir) = place();
            let taken = guest.running.snapshot(&SnapshotRequest::new(&dir));
            assert!(matches!(
                taken,
                Err(SnapshotError::Control(ControlError::HandOver))
            ));
            let (said, end) = guest.leave();
            assert_eq!(end, None, "{cpus} {irqchip:?} hop {hop}: {said}");
            all += &said;
            guest = there.unwrap();
        }
        guest.hear(2);
        let (said, end) = guest.quit();
        all += &said;
        let what = format!("{cpus} {irqchip:?}: {all}");
        assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{what}");
        assert_eq!(all, digits(all.len() - 1) + "!", "{what}");
    }
}

/// A machine whose guest writes some 80 MiB a second, for which there is a request over a connection of 4.
fn too_fast(
    when_stuck: WhenStuck,
) -> (
    tempfile::TempPath,
    Guest,
    impl Fn(&Address) -> MigrateRequest,
) {
    let kernel = support::file(&image::elf64(dirtier64()));
    let config = Config {
        memory: Memory::new(16 << 20),
        debug_exit: Some(0xf4),
        ..Config::new(&*kernel)
    };
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    let request = move |to: &Address| MigrateRequest {
        bandwidth_limit: Some(4 << 20),
        // What is not certain by then is given up on as well.
        time_s: 60,
        when_stuck,
        ..MigrateRequest::new(to.to_string())
    };
    (kernel, guest, request)
}

#[test]
fn a_guest_that_writes_faster_than_its_memory_goes_stays_or_goes_slowed_as_was_asked_for() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, mut guest, request) = too_fast(WhenStuck::Cancel);
    let (_folder, path) = place();
    let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
    let request = request(incoming.address());
    let (here, there) = migrate(&guest, incoming, &request);
    let why = here.unwrap_err().to_string();
    for needle in ["pages are left", "it would stand still for", "--when-stuck"] {
        assert!(why.contains(needle), "{why}");
    }
    assert!(there.is_err());
    assert_eq!(guest.running.state(), RunState::Running);
    guest.hear(2);

    let (_folder, path) = place();
    let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
    let request = MigrateRequest {
        destination: incoming.address().to_string(),
        when_stuck: WhenStuck::Throttle,
        ..request
    };
    let (here, there) = migrate(&guest, incoming, &request);
    let record = here.unwrap();
    println!("{}", record.summary());
    let slowed: Vec<_> = record
        .rounds
        .iter()
        .map(|round| round.throttle_percent)
        .collect();
    assert!(slowed.is_sorted() && slowed[0] == 0, "{slowed:?}");
    assert!(record.throttle_percent >= 20, "{slowed:?}");
    let summary = record.summary();
    let words = format!("slowed by up to {} %", record.throttle_percent);
    assert!(summary.contains(&words), "{summary}");
    // Nobody slows it any more, here or there.
    let mut there = there.unwrap();
    drop(guest.running.throttle().unwrap());
    drop(there.running.throttle().unwrap());
    let (mut all, end) = guest.leave();
    assert_eq!(end, None, "{all}");
    there.hear(5);
    let (said, end) = there.leave();
    all += &said;
    assert_eq!(end, None, "{all}");
    assert_eq!(all, digits(all.len()));
}

#[test]
fn a_migration_that_is_cancelled_leaves_the_guest_as_fast_as_it_was() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, mut guest, request) = too_fast(WhenStuck::Throttle);
    let (_folder, path) = place();
    let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
    let request = request(incoming.address());
    let (outgoing, there) = (Outgoing::default(), Arc::new(EndSignal::new().unwrap()));
    let (_console, writer) = std::io::pipe().unwrap();
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = || {
            gone.load(Ordering::Relaxed)
                .then(|| "no source is left".to_owned())
        };
        let there = &there;
        let arrived = scope.spawn(move || {
            incoming
                .receive(writer, there, &stop, Machine::start)
                .is_ok()
        });
        let here = scope.spawn(|| outgoing.migrate(&guest.running, &guest.end, &request));
        // It is in force: another one is refused.
        while outgoing
            .record()
            .map_or(0, |record| record.throttle_percent)
            == 0
        {
            std::thread::yield_now();
        }
        assert!(guest.running.throttle().is_err());
        outgoing.order(Order::Cancel).unwrap();
        let why = here.join().unwrap().unwrap_err().to_string();
        assert!(why.contains("cancelled"), "{why}");
        gone.store(true, Ordering::Relaxed);
        assert!(!arrived.join().unwrap());
    });
    drop(guest.running.throttle().unwrap());
    guest.hear(5);
    let (said, end) = guest.leave();
    assert_eq!((said.clone(), end), (digits(said.len()), None));
}

/// Passes connections on from one socket to another, and cuts all of them when so many bytes went in one direction.
struct Proxy {
    path: PathBuf,
    bytes: [AtomicUsize; 2],
    cut: AtomicBool,
    direction: usize,
    after: usize,
    lines: std::sync::Mutex<Vec<UnixStream>>,
}

impl Proxy {
    fn new(folder: &Path, to: PathBuf, direction: usize, after: usize) -> Arc<Self> {
        let path = folder.join("proxy");
        let listener = UnixListener::bind(&path).unwrap();
        let proxy = Arc::new(Proxy {
            path,
            bytes: Default::default(),
            cut: AtomicBool::new(false),
            direction,
            after,
            lines: Default::default(),
        });
        let this = Arc::clone(&proxy);
        // It ends with the process.
        std::thread::spawn(move || {
            for from in listener.incoming() {
                let from = from.unwrap();
                // Nobody there: the source hears its end.
                let Ok(to) = UnixStream::connect(&to) else {
                    continue;
                };
                this.lines.lock().unwrap().push(from.try_clone().unwrap());
                this.lines.lock().unwrap().push(to.try_clone().unwrap());
                let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
                for (direction, (from, to)) in [(from, to), back].into_iter().enumerate() {
                    let this = Arc::clone(&this);
                    std::thread::spawn(move || this.pass(direction, from, to));
                }
            }
        });
        proxy
    }

    fn pass(&self, direction: usize, mut from: UnixStream, mut to: UnixStream) {
        use std::io::Write;
        let mut chunk = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut chunk) {
            let before = self.bytes[direction].fetch_add(len, Ordering::SeqCst);
            let strikes = direction == self.direction && before + len > self.after;
            let mut pass = len;
            if strikes && !self.cut.swap(true, Ordering::SeqCst) {
                pass = self.after.saturating_sub(before);
            }
            if to.write_all(&chunk[..pass]).is_err() || pass < len {
                break;
            }
        }
        if self.cut.load(Ordering::SeqCst) {
            for line in self.lines.lock().unwrap().drain(..) {
                let _ = line.shutdown(std::net::Shutdown::Both);
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }
}

#[test]
fn a_wire_that_is_cut_anywhere_leaves_one_guest_that_has_lost_nothing() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, config) = keeper(2, Irqchip::Split);
    // How much goes in each direction.
    let sizes = {
        let guest = Guest::boot(&config);
        let (folder, path) = place();
        let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path.clone()))).unwrap();
        let proxy = Proxy::new(folder.path(), path, 0, usize::MAX);
        let (here, there) = migrate(
            &guest,
            incoming,
            &request(&Address::Unix(proxy.path.clone())),
        );
        here.unwrap();
        drop(there.unwrap());
        [0, 1].map(|way| proxy.bytes[way].load(Ordering::SeqCst))
    };
    let mut places = vec![(0, 0), (0, 30), (0, 1000)];
    // What the destination says are few short messages, of one time more than of another; the last says that it has it.
    places.extend((0..sizes[1] + 48).step_by(6).map(|after| (1, after)));
    let steps = if long() { 40 } else { 6 };
    places.extend((1..=steps).map(|step| (0, sizes[0] * step / steps)));
    let mut guest = Guest::boot(&config);
    let (mut all, mut moved, mut stayed) = (String::new(), 0, 0);
    for (direction, after) in places {
        guest.hear(1);
        let (folder, path) = place();
        let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path.clone()))).unwrap();
        let proxy = Proxy::new(folder.path(), path, direction, after);
        let (here, there) = migrate(
            &guest,
            incoming,
            &request(&Address::Unix(proxy.path.clone())),
        );
        match (here, there) {
            (Ok(_), Ok(there)) => {
                let (said, end) = guest.leave();
                assert_eq!(end, None, "{direction} {after}: {said}");
                all += &said;
                guest = there;
                moved += 1;
            }
            (Err(_), Err(_)) => {
                assert_eq!(
                    guest.running.state(),
                    RunState::Running,
                    "{direction} {after}"
                );
                stayed += 1;
            }
            (here, there) => panic!("{direction} {after}: {here:?}, {:?}", there.err()),
        }
    }
    assert!(moved > 0 && stayed > 5, "{moved} {stayed}");
    let (said, end) = guest.quit();
    all += &said;
    assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{all}");
    assert_eq!(all, digits(all.len() - 1) + "!");
}

#[test]
fn a_guest_that_cannot_be_moved_or_whose_destination_says_nothing_is_told_why() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let guest = Guest::boot(&config);
    let (_folder, path) = place();
    // Closes as one does that wants TLS.
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let closing = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = closing.local_addr().unwrap().port();
    std::thread::spawn(move || closing.incoming().for_each(drop));
    let migrate_to = |address: &Address| {
        let outgoing = Outgoing::default();
        let request = request(address);
        let moved = outgoing.migrate(&guest.running, &guest.end, &request);
        reference_vmm::end::Chain(&moved.unwrap_err()).to_string()
    };
    let migrate = || migrate_to(&Address::Unix(path.clone()));
    let why = migrate_to(&format!("tcp:127.0.0.1:{port}").parse().unwrap());
    assert!(why.contains("does the destination want TLS"), "{why}");
    // Which no Unix socket has.
    let why = migrate();
    assert!(!why.contains("TLS"), "{why}");
    guest.running.pause().unwrap();
    let why = migrate();
    assert!(
        why.starts_with("the guest is paused here, as it was: "),
        "{why}"
    );
    assert_eq!(guest.running.state(), RunState::Paused);
    guest.running.resume().unwrap();
    guest.has_all();
}

#[test]
fn a_guest_that_is_paused_arrives_paused_and_is_resumed_there() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for (cpus, irqchip) in [(1, Irqchip::Split), (2, Irqchip::Kernel)] {
        let (_kernel, config) = keeper(cpus, irqchip);
        let mut guest = Guest::boot(&config);
        guest.hear(3);
        guest.running.pause().unwrap();
        let mut all = String::new();
        // From one to the next, as it is.
        for _ in 0..2 {
            let (_folder, path) = place();
            let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
            let request = request(incoming.address());
            let (here, there) = migrate(&guest, incoming, &request);
            let record = here.unwrap();
            assert!(record.paused, "{record:?}");
            let (said, end) = guest.leave();
            assert_eq!(end, None, "{said}");
            all += &said;
            guest = there.unwrap();
            assert_eq!(guest.running.state(), RunState::Paused);
            // Also behind what holds it for a while.
            let (_folder, dir) = place();
            guest.snapshot(&SnapshotRequest::new(&dir));
            assert_eq!(guest.running.state(), RunState::Paused);
            guest.is_saved_in(&dir);
            assert_eq!(guest.said, b"", "it runs");
        }
        guest.running.resume().unwrap();
        assert_eq!(guest.running.state(), RunState::Running);
        guest.hear(3);
        let (said, end) = guest.quit();
        all += &said;
        assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{all}");
        assert_eq!(all, digits(all.len() - 1) + "!");
    }
}

#[test]
fn a_guest_that_cannot_be_started_where_it_comes_goes_on_where_it_was() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for threads in [false, true] {
        let (_kernel, config) = keeper(2, Irqchip::Split);
        let mut guest = Guest::boot(&config);
        guest.hear(1);
        let (_folder, path) = place();
        let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
        let request = request(incoming.address());
        // Before its threads, and when all of them are there.
        let refuse = |machine: Machine| {
            let running = threads.then(|| machine.start()).transpose()?;
            drop(running);
            Err(BuildError::Process {
                what: "start a thread",
                source: std::io::ErrorKind::WouldBlock.into(),
            })
        };
        let (here, there) = migrate_to(&guest, incoming, &request, refuse);
        let why = reference_vmm::end::Chain(&here.unwrap_err()).to_string();
        assert!(why.contains("cannot start a thread"), "{why}");
        let why = there.map(drop).unwrap_err().to_string();
        assert!(why.contains("cannot be here"), "{why}");
        assert_eq!(guest.running.state(), RunState::Running);
        guest.hear(2);
        guest.has_all();
    }
}

#[test]
fn a_disk_that_cannot_be_the_guests_is_found_before_its_memory_goes() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, mut config) = keeper(1, Irqchip::Split);
    let folder = tempfile::tempdir().unwrap();
    let (disk, other) = (folder.path().join("disk"), folder.path().join("other"));
    let make = |path: &Path, len| {
        let file = std::fs::File::create(path).unwrap();
        file.set_len(len).unwrap();
    };
    make(&disk, 4096 * 512);
    config.disks.push(DiskConfig::new(&disk));
    let mut guest = Guest::boot(&config);
    let incoming = |elsewhere: Option<&Path>| {
        let (folder, path) = place();
        let mut request = IncomingRequest::new(Address::Unix(path));
        let disks = elsewhere.map(|path| (0, path.to_owned()));
        request.overrides.disks = disks.into_iter().collect();
        (folder, Incoming::bind(&request))
    };
    // Nobody need wait for a guest to find that there is nothing.
    let (_folder, nothing) = incoming(Some(&other));
    let error = nothing.unwrap_err();
    assert_eq!(error.exit_status(), 2);
    let why = error.to_string();
    assert!(why.contains("--disk: cannot open"), "{why}");
    let refused = |elsewhere, spoil: &dyn Fn(), needle: &str| {
        let (_folder, incoming) = incoming(elsewhere);
        let incoming = incoming.unwrap();
        let coming = incoming.coming();
        spoil();
        let request = request(incoming.address());
        let (here, there) = migrate(&guest, incoming, &request);
        let why = reference_vmm::end::Chain(&here.unwrap_err()).to_string();
        assert!(why.contains(needle), "{why}");
        let why = there.map(drop).unwrap_err().to_string();
        assert!(why.contains(needle), "{why}");
        assert!(coming.came().is_none(), "memory was asked for");
        assert_eq!(guest.running.state(), RunState::Running);
    };
    make(&other, 2048 * 512);
    let sizes = "it has 2048 sectors, the guest's disk 4096";
    refused(Some(&other), &|| (), sizes);
    let gone = || std::fs::remove_file(&other).unwrap();
    refused(Some(&other), &gone, "cannot open");
    // Another file is under the name that it had.
    std::fs::rename(&disk, &other).unwrap();
    make(&disk, 4096 * 512);
    refused(None, &|| (), "it is another file");
    std::fs::rename(&other, &disk).unwrap();
    // The lock is the source's, and then no more.
    make(&other, 4096 * 512);
    for elsewhere in [None, Some(&*other)] {
        guest.hear(1);
        let (_folder, incoming) = incoming(elsewhere);
        let incoming = incoming.unwrap();
        let request = request(incoming.address());
        let (here, there) = migrate(&guest, incoming, &request);
        here.unwrap();
        guest.leave();
        guest = there.unwrap();
    }
    guest.has_all();
}

#[test]
fn a_guest_that_has_its_threads_where_it_comes_stands_still_there_until_it_is_handed_over() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, config) = keeper(2, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (_folder, path) = place();
    let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
    let request = request(incoming.address());
    let start = |machine: Machine| {
        let running = machine.start()?;
        assert_eq!(running.state(), RunState::Paused);
        assert_eq!(running.resume(), Err(ControlError::HandOver));
        Ok(running)
    };
    let (here, there) = migrate_to(&guest, incoming, &request, start);
    here.unwrap();
    let mut there = there.unwrap();
    assert_eq!(there.running.state(), RunState::Running);
    let (mut all, _) = guest.leave();
    there.hear(2);
    let (said, _) = there.leave();
    all += &said;
    assert_eq!(all, digits(all.len()));
}

/// A monitor's process, with its control socket.
struct Process {
    running: support::Running,
    socket: PathBuf,
}

impl Process {
    fn boot(folder: &Path) -> Self {
        let socket = folder.join("source.api");
        let kernel = folder.join("kernel");
        std::fs::write(&kernel, image::elf64(keeper64())).unwrap();
        let vmm = Vmm::run(&kernel).args(["--cmdline", "1 "]);
        let vmm = vmm.words("--memory 16M --debug-exit --irqchip split --api-sock");
        let mut running = vmm.arg(&socket).start();
        // Its socket is there before it speaks.
        running.wait_for("1");
        Process { running, socket }
    }

    /// One that waits for a guest.
    fn incoming(folder: &Path, words: &str) -> (Self, PathBuf) {
        let (socket, path) = (folder.join("there.api"), folder.join("incoming"));
        let vmm = Vmm::command(["run", "--incoming"]);
        let vmm = vmm.arg(format!("unix:{}", path.display()));
        let mut running = vmm.words("--api-sock").arg(&socket).words(words).start();
        running.wait_for_stderr("a guest is waited for at");
        (Process { running, socket }, path)
    }

    fn command(&self, words: &str) -> Vmm {
        Vmm::command(["ctl", "--api-sock"])
            .arg(&self.socket)
            .words(words)
    }

    fn ctl(&self, words: &str) -> support::Ended {
        self.command(words).output()
    }
}

#[test]
fn ctl_moves_a_guest_and_the_process_that_had_it_ends_well() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let source = Process::boot(folder.path());
    let (there, path) = Process::incoming(folder.path(), "");
    let report = folder.path().join("report.html");
    let words = format!(
        "migrate --to unix:{} --report {}",
        path.display(),
        report.display()
    );
    let moved = source.ctl(&words);
    moved.expect_status(0);
    assert!(moved.text().contains("moved"), "{moved}");
    let ended = source.running.wait();
    ended.expect_status(0);
    assert!(
        ended.to_string().contains("the guest has moved to"),
        "{ended}"
    );
    assert_eq!(there.ctl("status").expect_status(0).text(), "running\n");
    assert!(report.exists());
    let mut there = there.running;
    there.wait_for(
        char::from(b'0' + ((ended.text().len() + 2) % 10) as u8).encode_utf8(&mut [0; 4]),
    );
    there.signal(libc::SIGTERM);
    let all = ended.text() + &there.wait().expect_status(0).text();
    assert_eq!(all, digits(all.len()));
}

#[test]
fn a_guest_stays_when_its_destination_is_killed_or_the_migration_is_cancelled() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for cancel in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let source = Process::boot(folder.path());
        let (there, path) = Process::incoming(folder.path(), "");
        // So slowly that it is there when this has had its turn.
        let words = format!("migrate --bandwidth 64K --to unix:{}", path.display());
        let migrate = source.command(&words).start();
        // Nothing has begun yet, or no memory goes.
        while !source
            .ctl("migrate-status --json")
            .text()
            .contains("\"at-work\":{")
        {}
        match cancel {
            true => drop(source.ctl("migrate-cancel").expect_status(0)),
            false => there.running.signal(libc::SIGKILL),
        }
        let ended = migrate.wait();
        ended.expect_status(1);
        assert_eq!(
            source.ctl("status").expect_status(0).text(),
            "running\n",
            "{ended}"
        );
        if cancel {
            assert!(ended.to_string().contains("cancelled"), "{ended}");
            let there = there.running.wait();
            there.expect_status(1);
            assert!(there.to_string().contains("cancelled"), "{there}");
        }
        let status = source.ctl("migrate-status");
        let lines = status.expect_status(0).text().lines().count();
        assert!(lines > 1, "{status}");
        source.running.signal(libc::SIGTERM);
        source.running.wait().expect_status(0);
    }
}

#[test]
fn a_destination_that_has_too_few_descriptors_for_anything_leaves_the_guest_where_it_was() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let source = Process::boot(folder.path());
    // One at least for the source's first connection: without it nobody is told anything.
    for more in 1.. {
        let (there, path) = Process::incoming(folder.path(), "");
        // What it needs by itself it has.
        there.ctl("--timeout 30 status").expect_status(0);
        let pid = there.running.pid();
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count() as u64;
        let limit = libc::rlimit {
            rlim_cur: open + more,
            rlim_max: open + more,
        };
        // SAFETY: reads one rlimit, and writes none.
        let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
        assert_eq!(set, 0);
        let moved = source.ctl(&format!("migrate --to unix:{}", path.display()));
        if moved.text().contains("moved") {
            // A VM, a vCPU, a connection of pages, epoll and stdin at the least.
            assert!(more > 5, "{more}: {moved}");
            let said = source.running.wait().expect_status(0).text();
            let mut there = there.running;
            let next = char::from(b'0' + ((said.len() + 2) % 10) as u8);
            there.wait_for(next.encode_utf8(&mut [0; 4]));
            there.signal(libc::SIGTERM);
            let all = said + &there.wait().expect_status(0).text();
            assert_eq!(all, digits(all.len()));
            return;
        }
        moved.expect_status(1);
        let status = source.ctl("status");
        assert_eq!(
            status.expect_status(0).text(),
            "running\n",
            "{more}: {moved}"
        );
        let there = there.running.wait();
        there.expect_status(1);
        assert!(
            there.to_string().contains("os error 24"),
            "{more}: {moved}, {there}"
        );
    }
}

#[test]
fn a_process_that_waits_for_a_guest_is_stopped_by_a_signal_and_says_what_is_wrong_with_its_words() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (there, path) = Process::incoming(folder.path(), "");
    // Its socket answers.
    let status = there.ctl("--timeout 30 status");
    assert_eq!(status.expect_status(0).text(), "not started\n");
    for words in ["pause", "migrate-cancel", "load /s", "snapshot /s"] {
        let refused = there.ctl(words);
        let path = path.to_str().unwrap();
        refused.expect_status(1).expect_line(&[
            "waited for at",
            path,
            "migrate-cancel there",
            "SIGTERM",
        ]);
    }
    // In use is the host's state, whichever socket it is.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = format!("tcp:{}", taken.local_addr().unwrap());
    for address in [format!("unix:{}", path.display()), tcp] {
        let refused = Vmm::command(["run", "--incoming", &address]).output();
        refused
            .expect_status(1)
            .expect_line(&["--incoming", &address]);
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let address = format!("unix:{}", file.display());
    let refused = Vmm::command(["run", "--incoming", &address]).output();
    refused.expect_status(2).expect_line(&["no socket"]);
    there.running.signal(libc::SIGTERM);
    there.running.wait().expect_status(0);
    assert!(!there.socket.exists());
    assert!(!path.exists());
    for (words, needle) in [
        ("run --incoming nowhere", "nowhere"),
        ("run --incoming tcp:0.0.0.0:0", "--tls-cert"),
        ("run --incoming unix:/x --tls-cert /c", "go together"),
        (
            "run --incoming unix:/x --kernel k",
            "--kernel: that comes from the source",
        ),
        (
            "run --incoming unix:/x --disk path=x",
            "comes from the snapshot or the source",
        ),
        ("run --incoming unix:/x --from d", "--from"),
        ("run --incoming unix:/x --disk 0:path=/x/y.raw", "/x/y.raw"),
    ] {
        let refused = Vmm::command::<[&str; 0]>([]).words(words).output();
        refused.expect_status(2).expect_line(&[needle]);
    }
}

#[test]
fn a_guest_that_has_moved_is_neither_moved_nor_resumed_here_again() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(3);
    let (_folder, path) = place();
    let incoming = Incoming::bind(&IncomingRequest::new(Address::Unix(path))).unwrap();
    let request = request(incoming.address());
    let end = Arc::new(EndSignal::new().unwrap());
    let (console, writer) = std::io::pipe().unwrap();
    let outgoing = Outgoing::default();
    let running = std::thread::scope(|scope| {
        let there = scope.spawn(|| incoming.receive(writer, &end, &|| None, Machine::start));
        let moved = outgoing.migrate(&guest.running, &guest.end, &request);
        moved.unwrap();
        there.join().unwrap().unwrap()
    });
    let mut there = Guest {
        running,
        end,
        console,
        said: Vec::new(),
    };
    there.hear(2);
    // Whoever asked at the same time comes to its turn now.
    let again = outgoing.migrate(&guest.running, &guest.end, &request);
    assert!(
        matches!(&again, Err(OutgoingError::Moved(to)) if *to == request.destination),
        "{again:?}"
    );
    assert_eq!(outgoing.moved_to(), Some(request.destination.clone()));
    assert!(matches!(
        outgoing.resume(&guest.running, &guest.end),
        Err(None)
    ));
    assert_eq!(guest.running.state(), RunState::Paused);
    there.hear(2);
    guest.leave();
    there.leave();
}
