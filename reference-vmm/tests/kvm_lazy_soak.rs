// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restores again and again of guests that run before their memory is read, four vCPUs each, while what brings it fails,
//! dawdles, is cut off or killed. Each guest has the right data, or is stopped with the reason: never anything else, and
//! nobody waits much longer than the deadline.
//!
//! What goes wrong in a round is drawn from its number and the seed, which is printed: `SOAK_SEED=N` draws the same again, and
//! `SOAK_ROUND=N` does that one alone. `LONG_TESTS=1` makes it 1,000 rounds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_pf::external::{receive, serve};
use async_pf::pager::PagerConfig;
use async_pf::trouble::{Draw, Troubled, severed};
use async_pf::{FilePiece, FileSource, PageSource};
use guests::image;
use guests::verifier::{FIRST, PAGES, PASSES, key, verifier64};
use kvm_core::BusErrors;
use memslots::Gfn;
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::end::{Chain, EndSignal, GuestEnd};
use reference_vmm::lazy::{LazyRequest, LazyState, WORKING_SET};
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::info;
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotKind, SnapshotRequest};
use reference_vmm::vm::Machine;
use support::keeper::{Guest, keeper};
use support::{WATCHDOG, file, long, need_kvm};
use vm_memory::{Bytes, GuestAddress};

/// How long who touches a page waits for it at most.
const DEADLINE: Duration = Duration::from_secs(2);
const CPUS: u32 = 4;

/// A page of the verifier's that is not zero.
fn page(draw: &mut Draw) -> u64 {
    FIRST + (draw.below(PAGES / 8) * 8 + 1 + draw.below(7)) * 4096
}

/// A snapshot to go on from.
struct Form {
    dir: PathBuf,
    /// Of a guest that compares what it has; else of one that writes as well.
    verifies: bool,
    /// A handler in another process can bring it.
    plain: bool,
}

/// What becomes of the memory on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    /// A handler's source fails and dawdles, but not for good.
    Rough,
    /// The same, behind connections that are cut and short of breath.
    Severed,
    /// A byte of the file was changed before.
    Flipped(u64),
    /// The file is written to, or cut off, while the guest runs.
    Written(u64),
    Cut(u64),
    /// A handler's source has not this page, or never answers for it.
    Bad(u64),
    Mute(u64),
    /// A handler that is killed when it has fetched so often.
    Killed(u64),
}

impl Trouble {
    fn draw(draw: &mut Draw) -> Self {
        match draw.below(12) {
            0..3 => Trouble::Nothing,
            3 => Trouble::Rough,
            4 | 5 => Trouble::Severed,
            6 => Trouble::Flipped(page(draw)),
            7 => Trouble::Written(page(draw)),
            8 => Trouble::Cut(page(draw)),
            9 => Trouble::Bad(page(draw)),
            // It takes as long as the deadline.
            10 if draw.once_in(4) => Trouble::Mute(page(draw)),
            10 => Trouble::Nothing,
            _ => Trouble::Killed(draw.below(40)),
        }
    }

    fn is_handlers(self) -> bool {
        use Trouble::*;
        matches!(self, Rough | Severed | Bad(_) | Mute(_) | Killed(_))
    }

    /// Whether all comes: none where that is a question of who is first.
    fn is_harmless(self) -> Option<bool> {
        match self {
            Trouble::Nothing | Trouble::Rough | Trouble::Severed => Some(true),
            Trouble::Written(_) | Trouble::Cut(_) => None,
            _ => Some(false),
        }
    }

    /// How long a page may take. Where all comes it is late only if it hangs, however busy the host is.
    fn deadline(self) -> Duration {
        match self.is_harmless() {
            Some(true) => WATCHDOG,
            _ => DEADLINE,
        }
    }

    /// What is said when it does not; the first is said of each.
    fn says(self) -> &'static [&'static str] {
        match self {
            Trouble::Flipped(_) => &["does not come", "the checksum is"],
            Trouble::Written(_) | Trouble::Cut(_) => &["does not come"],
            Trouble::Killed(_) => &["has ended, and the guest's memory with it"],
            // It is poisoned, and the guest has run into it.
            _ => &["memory"],
        }
    }
}

/// Memory comes from a file that the test has changed, or the monitor's own pager from a whole one, or from a handler.
struct Round<'a> {
    number: u64,
    trouble: Trouble,
    form: &'a Form,
    draw: Draw,
}

/// Says which round it was, if that failed.
struct Failing(String);

impl Drop for Failing {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("failed: {}", self.0);
        }
    }
}

const SOCKET: &str = "SOAK_HANDLER_SOCKET";
const FILE: &str = "SOAK_HANDLER_FILE";
const TROUBLE: &str = "SOAK_HANDLER_TROUBLE";

/// The pages of a file, with trouble.
fn troubled(file: FileSource, trouble: Trouble, seed: u64) -> Arc<dyn PageSource> {
    let source = Troubled::new(file, Draw::at(seed));
    match trouble {
        Trouble::Rough => Arc::new(source.rough()),
        Trouble::Severed => {
            let source = Arc::new(source.rough());
            Arc::new(severed(source, seed, 1_500_000, 2000).unwrap())
        }
        Trouble::Bad(page) => Arc::new(source.without(page)),
        Trouble::Mute(page) => Arc::new(source.mute(page)),
        Trouble::Killed(after) => Arc::new(source.at_each(move |fetched| {
            if fetched >= after {
                // SAFETY: ends this process, without a word.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            }
        })),
        _ => Arc::new(source),
    }
}

/// Not a test but the handler, in a process of its own.
#[test]
fn a_handler() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let memory = File::open(std::env::var_os(FILE).unwrap()).unwrap();
    let words = std::env::var(TROUBLE).unwrap();
    let words: Vec<&str> = words.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    let (seed, of) = (number(0), number(2));
    let trouble = match words[1] {
        "rough" => Trouble::Rough,
        "severed" => Trouble::Severed,
        "bad" => Trouble::Bad(of),
        "mute" => Trouble::Mute(of),
        "killed" => Trouble::Killed(of),
        _ => Trouble::Nothing,
    };
    // Where one looks for it once it listens.
    let soon = PathBuf::from(&socket).with_extension("soon");
    let listener = UnixListener::bind(&soon).unwrap();
    std::fs::rename(&soon, &socket).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let given = receive(&stream, WATCHDOG).unwrap();
    let piece = FilePiece {
        first: Gfn(0),
        pages: memory.metadata().unwrap().len() / 4096,
        offset: 0,
    };
    let file = FileSource::new(memory, [piece]).unwrap();
    let source = troubled(file, trouble, seed);
    let config = PagerConfig {
        workers: 2,
        deadline: trouble.deadline(),
        ..PagerConfig::default()
    };
    let mut draw = Draw::at(seed);
    let pager = serve(given, source, config).unwrap();
    for _ in 0..draw.below(40) {
        let first = draw.below(4000);
        // Out of range, or not.
        let _ = pager.prefetch(0, Gfn(first)..Gfn(first + draw.below(30)));
    }
    if draw.once_in(2) {
        pager.prefetch_rest();
    }
    if trouble == Trouble::Severed && draw.once_in(2) {
        // The monitor watches the process, and not the stream.
        drop(stream);
        loop {
            thread::park();
        }
    }
    // Until the monitor is done.
    stream.set_read_timeout(None).unwrap();
    assert_eq!(
        std::io::copy(&mut &stream, &mut std::io::sink()).unwrap(),
        0
    );
}

/// A handler that runs. Dropped, it is killed.
struct Handler(Child);

impl Handler {
    fn start(socket: &Path, dir: &Path, trouble: Trouble, seed: u64) -> Self {
        let offset = |page| offset(dir, page) / 4096;
        let words = match trouble {
            Trouble::Rough => "rough 0".to_owned(),
            Trouble::Severed => "severed 0".to_owned(),
            Trouble::Bad(page) => format!("bad {}", offset(page)),
            Trouble::Mute(page) => format!("mute {}", offset(page)),
            Trouble::Killed(after) => format!("killed {after}"),
            _ => "nothing 0".to_owned(),
        };
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_handler", "--nocapture"])
            // It is killed in the midst of whatever it does: a profile of half of it would be of no use to anybody.
            .env("LLVM_PROFILE_FILE", "/dev/null")
            .env(SOCKET, socket)
            .env(FILE, dir.join("memory"))
            .env(TROUBLE, format!("{seed} {words}"))
            .stdout(Stdio::null())
            .spawn();
        let handler = Handler(child.unwrap());
        let begun = Instant::now();
        while !socket.exists() {
            assert!(begun.elapsed() < WATCHDOG);
            thread::yield_now();
        }
        handler
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // Gone, or not.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

/// The offset of a page in the plain file `memory`.
fn offset(dir: &Path, address: u64) -> u64 {
    let (link, _) = Link::open(dir).unwrap();
    let (_, place) = link.map().locate(address).unwrap();
    place.offset + (address - place.guest)
}

/// Snapshots of each form.
fn forms(folder: &Path) -> Vec<Form> {
    let mut forms = Vec::new();
    let plain = Compression::None;
    let (verifies, writes) = (true, false);
    for (name, memory, compression) in [
        ("plain", "16M", plain),
        ("shared", "16M,shared", plain),
        ("zstd", "16M", Compression::Zstd),
    ] {
        let kernel = file(&image::elf64(verifier64()));
        let config = Config {
            cmdline: format!("{CPUS} "),
            memory: memory.parse::<Memory>().unwrap(),
            cpus: CPUS.into(),
            irqchip: Irqchip::Split,
            debug_exit: Some(0xf4),
            ..Config::new(&*kernel)
        };
        let mut guest = Guest::boot(&config);
        guest.hear(2);
        let dir = folder.join(name);
        guest.snapshot(&SnapshotRequest {
            compression,
            ..SnapshotRequest::new(&dir)
        });
        guest.leave();
        let plain = compression == plain;
        forms.push(Form {
            dir,
            verifies,
            plain,
        });
    }
    let (_kernel, config) = keeper(CPUS, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    for number in 0..2 {
        guest.hear(2);
        let dir = folder.join(format!("link{number}"));
        let kind = match number {
            0 => SnapshotKind::Full,
            _ => SnapshotKind::Diff {
                base: Some(folder.join("link0")),
            },
        };
        guest.snapshot(&SnapshotRequest {
            kind,
            track: Some(true),
            ..SnapshotRequest::new(&dir)
        });
        forms.push(Form {
            dir,
            verifies: writes,
            plain: number == 0,
        });
    }
    guest.leave();
    forms
}

fn copy_of(dir: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for name in ["state", "memory"] {
        std::fs::copy(dir.join(name), to.join(name)).unwrap();
    }
}

/// The guest, or why there is none.
fn restored(request: &RestoreRequest) -> Result<Guest, String> {
    let end = Arc::new(EndSignal::new().unwrap());
    let (console, writer) = std::io::pipe().unwrap();
    let machine = Machine::restore(request, &writer, &end).map_err(|error| match end.get() {
        Some(GuestEnd::Failed(why)) => why.clone(),
        _ => Chain(&error).to_string(),
    })?;
    Ok(Guest {
        running: machine.start().unwrap(),
        end,
        console,
        said: Vec::new(),
    })
}

/// Until it has ended by itself; why.
fn stopped(mut guest: Guest) -> String {
    let begun = Instant::now();
    while !guest.end.is_told() {
        assert!(begun.elapsed() < DEADLINE + WATCHDOG, "it goes on");
        guest.listen();
    }
    match guest.leave().1 {
        Some(GuestEnd::Failed(why) | GuestEnd::Crashed(why)) => why,
        end => panic!("neither right nor stopped: {end:?}"),
    }
}

impl Round<'_> {
    fn run(mut self, folder: &Path) {
        let (trouble, form) = (self.trouble, self.form);
        let place = folder.join(format!("round{}", self.number));
        std::fs::create_dir(&place).unwrap();
        let spoils = matches!(
            trouble,
            Trouble::Flipped(_) | Trouble::Written(_) | Trouble::Cut(_)
        );
        let dir = match spoils {
            true => {
                let dir = place.join("s");
                copy_of(&form.dir, &dir);
                dir
            }
            false => form.dir.clone(),
        };
        let spoil = || {
            let file = File::options().write(true).open(dir.join("memory"));
            let file = file.unwrap();
            match trouble {
                Trouble::Flipped(page) | Trouble::Written(page) => {
                    file.write_all_at(&[0x5a], offset(&dir, page) + 1).unwrap();
                }
                Trouble::Cut(page) => file.set_len(offset(&dir, page)).unwrap(),
                _ => {}
            }
        };
        if matches!(trouble, Trouble::Flipped(_)) {
            spoil();
        }
        let socket = place.join("handler");
        let seed = self.draw.state();
        let is_handlers = trouble.is_handlers() || form.plain && self.draw.once_in(5) && !spoils;
        let handler = is_handlers.then(|| Handler::start(&socket, &dir, trouble, seed));
        let record = self.draw.once_in(3).then_some(Duration::from_secs(3600));
        let request = RestoreRequest {
            verify: trouble != Trouble::Nothing || self.draw.once_in(2),
            lazy: Some(LazyRequest {
                deadline: trouble.deadline(),
                workers: 1 + self.draw.below(3) as usize,
                record: record.filter(|_| handler.is_none()),
                handler: handler.is_some().then_some(socket),
                ..LazyRequest::default()
            }),
            ..RestoreRequest::new(&dir)
        };
        let guest = restored(&request);
        if matches!(trouble, Trouble::Written(_) | Trouble::Cut(_)) {
            spoil();
        }
        let why = match (guest, trouble.is_harmless()) {
            (Ok(guest), Some(true)) => {
                self.right(guest, handler.is_none(), &place);
                None
            }
            (Ok(guest), Some(false)) => Some(stopped(guest)),
            (Ok(mut guest), None) => {
                // It is whole before it was touched, or it is stopped.
                while !guest.end.is_told() && guest.said.len() < 4 {
                    guest.listen();
                }
                match guest.running.settle_memory() {
                    Ok(_) => {
                        guest.has_all();
                        None
                    }
                    Err(_) => Some(stopped(guest)),
                }
            }
            (Err(why), harmless) => {
                assert_ne!(harmless, Some(true), "it is not restored: {why}");
                Some(why)
            }
        };
        if let Some(why) = &why {
            let said = trouble.says().iter().all(|words| why.contains(words));
            assert!(said, "{why}");
        }
        drop(handler);
        std::fs::remove_dir_all(&place).unwrap();
    }

    /// All of it is there, whatever is done meanwhile.
    fn right(&mut self, mut guest: Guest, own: bool, place: &Path) {
        let verifies = self.form.verifies;
        for number in 0..self.draw.below(4) {
            match self.draw.below(4) {
                0 => {
                    guest.running.pause().unwrap();
                    guest.running.resume().unwrap();
                }
                // Protects what it writes from being written to; with a handler that is refused.
                1 => {
                    let copy = place.join(format!("copy{number}"));
                    guest.snapshot(&SnapshotRequest {
                        background: own,
                        ..SnapshotRequest::new(&copy)
                    });
                    info::verify(&copy).unwrap();
                }
                2 if verifies => {
                    let memory = guest.running.memory();
                    for _ in 0..64 {
                        let page = page(&mut self.draw);
                        let word = |at| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
                        let has = (word(page), word(page + 4092));
                        assert_eq!(has, (key(page), !key(page)), "{page:#x}");
                    }
                }
                _ => guest.hear(1),
            }
        }
        if own && self.draw.once_in(2) {
            guest.running.settle_memory().unwrap();
        }
        if verifies {
            // The others say nothing.
            let memory = guest.running.memory();
            let passes = || memory.read_obj::<u32>(GuestAddress(PASSES)).unwrap();
            let (begun, before) = (Instant::now(), passes());
            while passes().wrapping_sub(before) < CPUS {
                assert!(!guest.end.is_told(), "{:?}", guest.end.get());
                assert!(begun.elapsed() < 2 * WATCHDOG, "{} passes", passes());
                thread::yield_now();
            }
        }
        guest.hear(2);
        if own {
            guest.running.settle_memory().unwrap();
            let progress = guest.running.lazy_progress().unwrap();
            let is = (progress.state, progress.missing, progress.lost);
            assert_eq!(is, (LazyState::Whole, Some(0), Some(0)));
        }
        guest.has_all();
        // What was recorded is read ahead by the rounds that follow, some of them.
        if self.draw.once_in(3) {
            let _ = std::fs::remove_file(self.form.dir.join(WORKING_SET));
        }
    }
}

#[test]
fn what_a_restored_guest_finds_is_right_or_it_is_stopped_whatever_becomes_of_its_memory_on_the_way()
{
    need_kvm();
    // A page that is poisoned is told to a vCPU's thread by SIGBUS, where KVM does as hardware does.
    BusErrors::install().unwrap();
    let number = |name: &str| std::env::var(name).ok().map(|said| said.parse().unwrap());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("SOAK_SEED").unwrap_or(now.as_nanos() as u64 % 1_000_000_000);
    let rounds = match number("SOAK_ROUND") {
        Some(one) => one..one + 1,
        None if long() => 0..1000,
        // In an emulated machine each takes long.
        None if std::env::var_os("REFERENCE_VMM_LAB").is_some() => 0..6,
        None => 0..16,
    };
    eprintln!("SOAK_SEED={seed}, {} rounds", rounds.end - rounds.start);
    let folder = tempfile::tempdir().unwrap();
    let forms = forms(folder.path());
    let mut counts = HashMap::new();
    for number in rounds {
        let mut draw = Draw::of(seed, number);
        let trouble = Trouble::draw(&mut draw);
        // A page of the verifier's is one that it looks at; a handler's and a spoilt file's is a plain one.
        let fits = |form: &&Form| match trouble {
            Trouble::Nothing => true,
            Trouble::Rough | Trouble::Severed => form.plain,
            _ => form.plain && form.verifies,
        };
        let fitting: Vec<_> = forms.iter().filter(fits).collect();
        let form = fitting[draw.below(fitting.len() as u64) as usize];
        let name = form.dir.file_name().unwrap().display();
        let _failing = Failing(format!(
            "SOAK_SEED={seed} SOAK_ROUND={number}: {trouble:?}, {name}"
        ));
        let words = format!("{trouble:?}");
        let kind = words.split('(').next().unwrap().to_owned();
        *counts.entry(kind).or_insert(0) += 1;
        let round = Round {
            number,
            trouble,
            form,
            draw,
        };
        round.run(folder.path());
    }
    eprintln!("{counts:?}");
}
