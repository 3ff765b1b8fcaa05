// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host that refuses any one call: the monitor ends by itself with one line that says what was
//! refused and why, or it does without the call. It does not hang, panic, or leave the terminal as
//! it should not be.
//!
//! Each test lists the calls of a run that goes well, and then runs again for each call and errno
//! with that call refused. `LONG_TESTS=1` takes every pair; the short form takes every call, with
//! the errnos in turn.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guests::{boot, console, image, monitor};
use support::pty::Pty;
use support::rsp::packet;
use support::tracer::{Call, Inject, Kind, Trace, trace};
use support::{WATCHDOG, elf, long, need_kvm, not_one_line};

/// What KVM and the kernel say when they refuse.
const ERRNOS: [i32; 6] = [
    libc::EINVAL,
    libc::ENOMEM,
    libc::EPERM,
    libc::EIO,
    libc::EBUSY,
    libc::ENOSPC,
];

/// A run whose calls are refused one at a time.
struct Scenario {
    args: Vec<String>,
    typed: &'static [u8],
    good: Trace,
}

impl Scenario {
    fn new(kernel: &std::path::Path, words: &str, typed: &'static [u8]) -> Self {
        need_kvm();
        let mut args = vec![
            "run".to_owned(),
            "--kernel".to_owned(),
            kernel.display().to_string(),
        ];
        args.extend(words.split_whitespace().map(str::to_owned));
        let good = Self::run_with(&args, typed, &[]).0;
        assert_eq!(good.hung, None, "{good}");
        assert!(good.stderr.is_empty(), "{good}");
        Scenario { args, typed, good }
    }

    /// A run on a terminal of its own, and whether it left the terminal as it was.
    fn run_with(args: &[String], typed: &[u8], inject: &[Inject]) -> (Trace, bool) {
        let pty = Pty::new();
        let before = pty.settings();
        if !typed.is_empty() {
            pty.type_in(typed);
        }
        let stdin: OwnedFd = pty.terminal();
        let trace = trace(args, Some(stdin), inject, WATCHDOG);
        (trace, pty.settings() == before)
    }

    /// The calls of the monitor itself, each kind's in order: what its start-up code and the dynamic
    /// linker do before `main` is not its own to handle.
    fn calls(&self) -> impl Iterator<Item = &Call> {
        let main = |call: &Call| call.kind == Kind::Syscall(libc::SYS_signalfd4);
        self.good.calls.iter().skip_while(move |call| !main(call))
    }

    /// Refuses each of `calls` with the errnos, and checks each end. Returns each kind's messages
    /// without their errno.
    fn refuse<'a>(
        &'a self,
        calls: impl Iterator<Item = &'a Call>,
        errnos: &[i32],
        allowed: impl Fn(&Call, i32) -> Allowed,
    ) -> BTreeMap<Kind, String> {
        let mut messages = BTreeMap::new();
        let mut pairs = 0;
        for (i, call) in calls.enumerate() {
            let errnos = match long() {
                true => errnos,
                false => &errnos[i % errnos.len()..][..1],
            };
            for &errno in errnos {
                let inject = Inject {
                    kind: call.kind.clone(),
                    nth: call.nth,
                    errno,
                };
                let ran = Self::run_with(&self.args, self.typed, std::slice::from_ref(&inject));
                let problem = self.problem(&ran.0, ran.1, allowed(call, errno), errno);
                if let Some(problem) = problem {
                    let args = self.args.join(" ");
                    panic!(
                        "{problem}: {inject}\nin: {args}\nthe call: {call}\n{}",
                        ran.0
                    );
                }
                if ran.0.status.code() != self.good.status.code() || !ran.0.stderr.is_empty() {
                    let line = ran.0.stderr.trim_end();
                    let said = io::Error::from_raw_os_error(errno).to_string();
                    println!("{inject}\n    {line}");
                    messages.insert(call.kind.clone(), line.replace(&said, "…"));
                } else {
                    println!("{inject}\n    (goes without)");
                }
                pairs += 1;
            }
        }
        assert!(pairs > 0, "there was nothing to refuse");
        messages
    }

    /// What is wrong with how a run ended whose call was refused.
    fn problem(
        &self,
        trace: &Trace,
        terminal: bool,
        allowed: Allowed,
        errno: i32,
    ) -> Option<String> {
        let fails = |why: &str| Some(why.to_owned());
        if trace.hung.is_some() {
            return fails("it hangs");
        }
        if !trace.injected {
            return fails("the call was not made this time");
        }
        if !terminal {
            return fails("the terminal is not as it was");
        }
        let went_on =
            trace.status.code() == self.good.status.code() && trace.stdout == self.good.stdout;
        if went_on && allowed != Allowed::End(1) && allowed != Allowed::End(2) {
            return match trace.stderr.lines().count() {
                0 | 1 => None,
                _ => fails("it went on, with more than one line"),
            };
        }
        if let Some(problem) = not_one_line(&trace.stderr) {
            return fails(problem);
        }
        let statuses = match allowed {
            Allowed::End(status) => status..=status,
            // 2 where too much was asked for: without an answer KVM takes as many vCPUs as the host has processors.
            Allowed::EndOrGoOn => 1..=2,
            Allowed::GoOn => return fails("it did not go on"),
        };
        if !trace
            .status
            .code()
            .is_some_and(|status| statuses.contains(&status))
        {
            return Some(format!("the status is not in {statuses:?}"));
        }
        let said = io::Error::from_raw_os_error(errno).to_string();
        if !trace.stderr.contains(&said) && allowed != Allowed::EndOrGoOn {
            return Some(format!("the line has no {said:?}"));
        }
        None
    }
}

/// How a run may end whose call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allowed {
    /// With this status and one line with the errno.
    End(i32),
    /// With status 1 or 2 and one line, or as if nothing had been.
    EndOrGoOn,
    /// As if nothing had been.
    GoOn,
}

/// Each message names the call that was refused: no two calls have the same.
fn all_different(messages: &BTreeMap<Kind, String>) {
    let mut seen = BTreeMap::new();
    for (kind, message) in messages {
        // kvm-ioctls asks for the size inside of its call that makes a VM.
        if *kind == Kind::kvm("KVM_GET_VCPU_MMAP_SIZE") {
            continue;
        }
        if let Some(other) = seen.insert(message, kind) {
            panic!("{kind} and {other} are refused with the same words: {message}");
        }
    }
}

fn is_kvm(call: &&Call) -> bool {
    // The first run of each vCPU, and one later one.
    matches!(call.kind, Kind::Kvm(_)) && (call.kind != Kind::kvm("KVM_RUN") || call.nth < 3)
}

fn kvm_rule(call: &Call, errno: i32) -> Allowed {
    let optional = call.kind == Kind::kvm("KVM_CHECK_EXTENSION");
    let version = call.kind == Kind::kvm("KVM_GET_API_VERSION");
    let again = matches!(errno, libc::EINTR | libc::EAGAIN);
    match () {
        // A capability that cannot be asked for is one that is not there.
        () if optional => Allowed::EndOrGoOn,
        // kvm-ioctls gives a version of -1, and the line says so.
        () if version => Allowed::EndOrGoOn,
        // A host whose TSC is unstable has no answer.
        () if call.kind == Kind::kvm("KVM_GET_TSC_KHZ") => Allowed::GoOn,
        () if again && call.kind == Kind::kvm("KVM_RUN") => Allowed::GoOn,
        // "No local APIC in the kernel", where a vCPU is made.
        () if call.kind == Kind::kvm("KVM_GET_LAPIC") && errno == libc::EINVAL => {
            Allowed::EndOrGoOn
        }
        () => Allowed::End(1),
    }
}

#[test]
fn each_ioctl_of_a_start_may_be_refused() {
    let kernel = elf(boot::hello64());
    let words = "--debug-exit --cpus 2 --irqchip kernel --pit --memory 6G";
    let scenario = Scenario::new(&kernel, words, b"");
    assert_eq!(scenario.good.stdout, b"hello\n");
    let messages = scenario.refuse(scenario.calls().filter(is_kvm), &ERRNOS, kvm_rule);
    all_different(&messages);
}

#[test]
fn each_ioctl_of_a_start_with_the_other_irqchips_may_be_refused() {
    let kernel = elf(boot::hello64());
    for irqchip in ["split", "none"] {
        let words = format!("--debug-exit --irqchip {irqchip}");
        let scenario = Scenario::new(&kernel, &words, b"");
        let messages = scenario.refuse(scenario.calls().filter(is_kvm), &ERRNOS, kvm_rule);
        all_different(&messages);
    }
}

#[test]
fn a_zone_that_kvm_refuses_is_done_without() {
    let kernel = elf(console::polled64());
    let args = "--debug-exit --cmdline 2000e";
    let scenario = Scenario::new(&kernel, args, b"");
    assert_eq!(scenario.good.stdout, console::pattern(2000));
    let zone = |call: &&Call| call.kind == Kind::kvm("KVM_REGISTER_COALESCED_MMIO");
    let calls = scenario.calls().filter(zone);
    scenario.refuse(calls, &ERRNOS, |_, _| Allowed::GoOn);
}

#[test]
fn a_kvm_run_that_was_interrupted_goes_on() {
    let kernel = elf(boot::hello64());
    let scenario = Scenario::new(&kernel, "--debug-exit", b"");
    let errnos = [libc::EINTR, libc::EAGAIN];
    for errno in errnos {
        let runs = scenario
            .calls()
            .filter(|call| call.kind == Kind::kvm("KVM_RUN"));
        scenario.refuse(runs, &[errno], kvm_rule);
    }
}

#[test]
fn the_question_for_kvms_version_is_asked_again_when_it_is_interrupted_and_its_errno_is_told() {
    let kernel = elf(boot::hello64());
    let scenario = Scenario::new(&kernel, "--debug-exit", b"");
    let asked = || {
        let asks = |call: &&Call| call.kind == Kind::kvm("KVM_GET_API_VERSION");
        scenario.calls().filter(asks)
    };
    assert!(asked().next().is_some());
    let told = scenario.refuse(asked(), &[libc::EINTR], |_, _| Allowed::GoOn);
    assert!(told.is_empty(), "{told:?}");
    let told = scenario.refuse(asked(), &[libc::EPERM], kvm_rule);
    let line = told.values().next().unwrap();
    assert!(
        line.contains("cannot ask /dev/kvm for its KVM API version: …"),
        "{line}"
    );
    let told = scenario.refuse(asked(), &[libc::ENOTTY], kvm_rule);
    let line = told.values().next().unwrap();
    assert!(line.contains("is no KVM device"), "{line}");
}

#[test]
fn a_kvm_run_that_is_refused_for_ever_is_told() {
    need_kvm();
    let kernel = elf(boot::hello64());
    let kernel_path = kernel.display().to_string();
    let inject = |nth| Inject {
        kind: Kind::kvm("KVM_RUN"),
        nth,
        errno: libc::EAGAIN,
    };
    // As where KVM may start no thread of its own.
    let inject: Vec<_> = (0..1000).map(inject).collect();
    for words in ["--cpus=1", "--irqchip=none"] {
        let args = ["run", "--kernel", &kernel_path, "--debug-exit", words].map(str::to_owned);
        let (trace, _) = Scenario::run_with(&args, b"", &inject);
        assert_eq!(trace.hung, None, "{trace}");
        assert_eq!(trace.status.code(), Some(1), "{trace}");
        assert_eq!(not_one_line(&trace.stderr), None, "{trace}");
        for needle in ["vCPU 0", "KVM_RUN", "ulimit -u", "pids.max"] {
            assert!(trace.stderr.contains(needle), "{trace}");
        }
    }
}

#[test]
fn an_interrupt_that_cannot_be_sent_does_not_leave_the_guest_waiting() {
    let kernel = elf(monitor::echo_irq64());
    for (irqchip, sends) in [("split", "KVM_SIGNAL_MSI"), ("kernel", "KVM_IRQFD")] {
        let words = format!("--debug-exit --irqchip {irqchip}");
        let scenario = Scenario::new(&kernel, &words, b"hello q");
        assert_eq!(scenario.good.stdout, b"ready\nhello q");
        let how = |call: &&Call| call.kind == Kind::kvm(sends);
        assert!(scenario.calls().any(|call| how(&call)), "{irqchip}");
        // The -1 by which KVM says that no vCPU took a message leaves the system call as EPERM: no refusal.
        let says_nobody = |errno: &i32| sends == "KVM_SIGNAL_MSI" && *errno == libc::EPERM;
        let errnos: Vec<_> = ERRNOS.into_iter().filter(|e| !says_nobody(e)).collect();
        scenario.refuse(scenario.calls().filter(how), &errnos, kvm_rule);
    }
}

#[test]
fn files_that_cannot_be_opened_or_read_are_named() {
    let kernel = elf(boot::hello64());
    let scenario = Scenario::new(&kernel, "--debug-exit", b"");
    let errnos = [libc::EACCES, libc::EMFILE, libc::EIO, libc::ENOMEM];
    let path = kernel.display().to_string();
    let of_kernel = |call: &&Call| call.kind == Kind::Open(path.clone());
    // A host that has no descriptor left has nothing against the file.
    let messages = scenario.refuse(scenario.calls().filter(of_kernel), &errnos, |_, errno| {
        Allowed::End(if errno == libc::EMFILE { 1 } else { 2 })
    });
    assert!(
        messages.values().all(|line| line.contains(&path)),
        "{messages:?}"
    );

    let of_kvm = |call: &&Call| call.kind == Kind::Open("/dev/kvm".into());
    let messages = scenario.refuse(scenario.calls().filter(of_kvm), &errnos, |_, _| {
        Allowed::End(1)
    });
    assert!(
        messages.values().all(|line| line.contains("/dev/kvm")),
        "{messages:?}"
    );

    // Reads before /dev/kvm is opened are the kernel's header, one behind it its contents.
    let reads = scenario
        .calls()
        .filter(|call| call.kind == Kind::Syscall(libc::SYS_read) && call.args[2] != 8)
        .filter(|call| call.result != Some(0));
    let reads: Vec<_> = reads.take_while(|call| call.args[0] > 2).collect();
    let messages = scenario.refuse(reads.into_iter(), &[libc::EIO], |_, _| Allowed::End(2));
    assert!(
        messages.values().all(|line| line.contains(&path)),
        "{messages:?}"
    );
}

#[test]
fn memory_descriptors_and_threads_may_be_refused() {
    let kernel = elf(boot::hello64());
    let scenario = Scenario::new(&kernel, "--debug-exit --cpus 2 --memory 6G", b"");
    let ours = |call: &&Call| match call.kind {
        // Guest memory (not reserved) and what a vCPU shares with KVM. The allocator's and the
        // standard library's own are theirs: Rust aborts where the heap ends.
        Kind::Map(_, flags) => {
            let allocators = call.args[2] as i32 == libc::PROT_NONE;
            call.args[4] as i32 >= 0 || flags & libc::MAP_NORESERVE != 0 && !allocators
        }
        Kind::Syscall(nr) => matches!(
            nr,
            libc::SYS_eventfd2
                | libc::SYS_signalfd4
                | libc::SYS_epoll_create1
                | libc::SYS_clone3
                | libc::SYS_clone
        ),
        _ => false,
    };
    let calls: Vec<_> = scenario.calls().filter(ours).collect();
    let made = |nr| calls.iter().any(|call| call.kind == Kind::Syscall(nr));
    assert!(
        made(libc::SYS_eventfd2) && made(libc::SYS_signalfd4),
        "{:#?}",
        scenario.good.calls
    );
    assert!(
        made(libc::SYS_clone3) || made(libc::SYS_clone),
        "{:#?}",
        scenario.good.calls
    );
    let maps = calls
        .iter()
        .filter(|call| matches!(call.kind, Kind::Map(..)));
    assert!(
        maps.count() >= 4,
        "two of memory, one a vCPU: {:#?}",
        scenario.good.calls
    );
    let errnos = [libc::ENOMEM, libc::EAGAIN, libc::EPERM, libc::EMFILE];
    scenario.refuse(calls.into_iter(), &errnos, |call, errno| match call.kind {
        // glibc makes EAGAIN of it.
        Kind::Syscall(libc::SYS_clone3 | libc::SYS_clone) if errno == libc::ENOMEM => {
            Allowed::EndOrGoOn
        }
        _ => Allowed::End(1),
    });
}

#[test]
fn the_other_calls_of_a_run_may_be_refused_too() {
    let kernel = elf(boot::hello64());
    let scenario = Scenario::new(&kernel, "--debug-exit", b"");
    let nice_to_have = |call: &&Call| match &call.kind {
        Kind::Syscall(nr) => matches!(
            *nr,
            libc::SYS_epoll_ctl
                | libc::SYS_fcntl
                | libc::SYS_ioctl
                | libc::SYS_madvise
                | libc::SYS_prctl
                | libc::SYS_rt_sigaction
                | libc::SYS_rt_sigprocmask
                | libc::SYS_timerfd_create
        ),
        _ => false,
    };
    // The call that restores the terminal has no substitute.
    let restores = scenario
        .calls()
        .filter(|call| call.kind == Kind::Syscall(libc::SYS_ioctl))
        .filter(|call| call.args[1] == libc::TCSETS)
        .last()
        .map(|call| call.nth);
    assert!(restores.is_some(), "the terminal was never restored");
    let replaceable =
        |call: &&Call| call.kind != Kind::Syscall(libc::SYS_ioctl) || Some(call.nth) != restores;
    // Not EPERM: from epoll_ctl it says that the terminal is a regular file.
    let errnos = [libc::EINVAL, libc::ENOMEM, libc::ENOSPC];
    let calls = scenario.calls().filter(nice_to_have).filter(replaceable);
    scenario.refuse(calls, &errnos, |_, _| Allowed::EndOrGoOn);
}

/// Debuggers, one after the other, each of which says the same whatever it hears.
fn debuggers(socket: &std::path::Path, over: &AtomicBool) {
    let at = |offset: u64| u64::from(image::LOAD_ADDR) + offset;
    let says = [
        "qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+".to_owned(),
        "?".to_owned(),
        "g".to_owned(),
        format!("P0={}", "1".repeat(16)),
        format!("m{:x},4", at(0)),
        format!("Z0,{:x},1", at(5)),
        "vCont;c".to_owned(),
        "vCont;s:p1.1".to_owned(),
        format!("z0,{:x},1", at(5)),
        format!("M{:x},1:01", at(0x1000)),
        "vCont;c".to_owned(),
        "D".to_owned(),
        "vKill;1".to_owned(),
    ];
    while !over.load(Ordering::Relaxed) {
        let Ok(mut peer) = UnixStream::connect(socket) else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        // What is not answered is not waited for longer than a guest that runs needs.
        peer.set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let mut heard = [0; 4096];
        for body in &says {
            if peer.write_all(&packet(body.as_bytes())).is_err() {
                break;
            }
            let mut answer = Vec::new();
            while !answer.contains(&b'#') {
                match peer.read(&mut heard) {
                    Ok(0) | Err(_) => break,
                    Ok(len) => answer.extend(&heard[..len]),
                }
            }
            if peer.write_all(b"+").is_err() {
                break;
            }
        }
    }
}

/// A run under [`debuggers`].
fn debugged(kernel: &std::path::Path, inject: &[Inject]) -> Trace {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb");
    let (kernel, gdb) = (kernel.display(), socket.display());
    let args = format!("run --kernel {kernel} --debug-exit --gdb unix:{gdb}");
    let args: Vec<_> = args.split(' ').map(str::to_owned).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| debuggers(&socket, &over));
        let trace = trace(&args, None, inject, WATCHDOG);
        over.store(true, Ordering::Relaxed);
        assert!(!socket.exists(), "the socket is left behind: {trace}");
        trace
    })
}

/// Which of the debugger's calls is made how often depends on who is faster; so a call that is not made
/// this time is no failure, and as many as there were are tried.
#[test]
fn each_call_of_a_run_under_a_debugger_may_be_refused() {
    need_kvm();
    // It ends by itself, with or without a debugger.
    let kernel = elf(boot::hello64());
    let good = debugged(&kernel, &[]);
    assert_eq!(good.hung, None, "{good}");
    assert_eq!(good.status.code(), Some(1), "{good}");
    let bound = |call: &Call| call.kind == Kind::Syscall(libc::SYS_fchmod);
    let calls = good.calls.iter().skip_while(|call| !bound(call));
    let sockets = |nr: i64| {
        let of_sockets = [
            libc::SYS_socket,
            libc::SYS_fchmod,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_accept4,
            libc::SYS_setsockopt,
            libc::SYS_recvfrom,
            libc::SYS_sendto,
            libc::SYS_poll,
            libc::SYS_eventfd2,
            libc::SYS_clone3,
        ];
        of_sockets.contains(&nr)
    };
    let ours = |call: &&Call| match call.kind {
        Kind::Kvm(_) => is_kvm(call),
        Kind::Syscall(nr) => sockets(nr),
        // The debugger's thread and the vCPUs' ioctls on their sockets.
        Kind::Elsewhere(nr) => sockets(nr) || nr == libc::SYS_ioctl,
        _ => false,
    };
    let step = if long() { 1 } else { 5 };
    let (mut tried, mut refused) = (0, 0);
    for (i, call) in calls.filter(ours).enumerate().step_by(step) {
        let errno = ERRNOS[i / step % ERRNOS.len()];
        let inject = Inject {
            kind: call.kind.clone(),
            nth: call.nth,
            errno,
        };
        let trace = debugged(&kernel, std::slice::from_ref(&inject));
        println!(
            "{inject}: {:?}\n    {}",
            trace.status.code(),
            trace.stderr.trim_end()
        );
        assert_eq!(trace.hung, None, "{inject}\nthe call: {call}\n{trace}");
        assert!(!trace.stderr.contains("panicked"), "{inject}\n{trace}");
        let status = trace.status.code();
        // As it would have been, killed by its debugger, or an error.
        assert!(
            matches!(status, Some(0..=2)),
            "{inject}\nthe call: {call}\n{trace}"
        );
        tried += 1;
        refused += usize::from(trace.injected);
    }
    println!("{refused} of {tried} were refused");
    assert!(refused * 2 > tried, "{refused} of {tried}");
}

#[test]
fn statistics_that_kvm_does_not_give_are_done_without_and_that_is_told() {
    need_kvm();
    let kvm = kvm_core::Kvm::open().unwrap();
    if !kvm.capabilities().binary_stats() {
        return println!("NOT TRIED: this KVM has no KVM_CAP_BINARY_STATS_FD");
    }
    let kernel = elf(boot::hello64());
    let path = kernel.display().to_string();
    let args = ["run", "--kernel", &path, "--debug-exit", "--stats=json"].map(str::to_owned);
    let kind = Kind::kvm("KVM_GET_STATS_FD");
    // A host that has never heard of it, and a process without a descriptor left for the vCPU's.
    for (nth, errno, says) in [
        (0, libc::ENOTTY, "KVM_CAP_BINARY_STATS_FD"),
        (1, libc::EMFILE, "Too many open files"),
    ] {
        let inject = Inject {
            kind: kind.clone(),
            nth,
            errno,
        };
        let (trace, restored) = Scenario::run_with(&args, b"", &[inject]);
        assert!(trace.injected, "{trace}");
        assert!(restored && trace.hung.is_none(), "{trace}");
        assert_eq!(trace.status.code(), Some(1), "{trace}");
        let (line, json) = trace.stderr.trim_end().split_once('\n').unwrap();
        assert!(
            line.contains(says) && line.contains("without KVM's own"),
            "{trace}"
        );
        assert!(json.contains(r#""kvm":null"#), "{trace}");
    }
}

/// A driver of `--rng` that starts it, asks once, waits for the answer or for the device's need of a reset, heals it by
/// a reset where that is, and asks again.
fn rng_driver() -> tempfile::TempPath {
    use guests::virtio::{INTERRUPTS, MEMORY, Op, REGISTERS, driver};
    use virtio_bindings::virtio_mmio::*;
    let register = |register: u32, value| Op::Write(REGISTERS + register, value);
    let poll = |address, value, mask| Op::Poll {
        address,
        value,
        mask,
    };
    let mut ops = Vec::new();
    for round in 0..2_u32 {
        ops.extend([
            register(VIRTIO_MMIO_STATUS, 0),
            poll(REGISTERS + VIRTIO_MMIO_STATUS, 0, u32::MAX),
            // The rings' indices, and that nobody has interrupted.
            Op::Write(MEMORY + 0x1000, 0),
            Op::Write(MEMORY + 0x2000, 0),
            Op::Write(INTERRUPTS, 0),
            register(VIRTIO_MMIO_STATUS, 3),
            register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            register(VIRTIO_MMIO_DRIVER_FEATURES, 1),
            register(VIRTIO_MMIO_STATUS, 0xb),
            register(VIRTIO_MMIO_QUEUE_NUM, 8),
            register(VIRTIO_MMIO_QUEUE_DESC_LOW, MEMORY),
            register(VIRTIO_MMIO_QUEUE_AVAIL_LOW, MEMORY + 0x1000),
            register(VIRTIO_MMIO_QUEUE_USED_LOW, MEMORY + 0x2000),
            register(VIRTIO_MMIO_QUEUE_READY, 1),
            register(VIRTIO_MMIO_STATUS, 0xf),
            // One buffer of 16 bytes to write, made available.
            Op::Write(MEMORY, MEMORY + 0x4000),
            Op::Write(MEMORY + 8, 16),
            Op::Write(MEMORY + 12, 2),
            Op::Write(MEMORY + 0x1000, 1 << 16),
            register(VIRTIO_MMIO_QUEUE_NOTIFY, 0),
            // Used, or a reset is needed: either interrupts once.
            Op::Sleep {
                address: INTERRUPTS,
                value: 1,
                mask: u32::MAX,
            },
            Op::Say(b'0' + round as u8),
        ]);
    }
    // The second time at the latest it works.
    ops.push(poll(MEMORY + 0x2000, 1 << 16, 0xffff_0000));
    ops.push(Op::Say(b'.'));
    ops.push(Op::End(0));
    support::file(&driver(&ops))
}

#[test]
fn what_a_virtio_device_asks_of_the_host_may_be_refused() {
    let kernel = rng_driver();
    for irqchip in ["split", "kernel"] {
        let words = format!("--debug-exit --rng --irqchip {irqchip}");
        let scenario = Scenario::new(&kernel, &words, b"");
        assert_eq!(scenario.good.stdout, b"01.", "{}", scenario.good);
        // From the guest's first instruction on, of the vCPU and of the device's thread.
        let calls = &scenario.good.calls;
        let first = calls
            .iter()
            .position(|call| call.kind == Kind::kvm("KVM_RUN"))
            .unwrap();
        let asks = |call: &&Call| match call.kind {
            Kind::Kvm(_) => {
                call.kind == Kind::kvm("KVM_IOEVENTFD") || call.kind == Kind::kvm("KVM_IRQFD")
            }
            Kind::Elsewhere(nr) => matches!(
                nr,
                libc::SYS_eventfd2
                    | libc::SYS_fcntl
                    | libc::SYS_epoll_create1
                    | libc::SYS_epoll_ctl
                    | libc::SYS_clone3
                    | libc::SYS_getrandom
            ),
            _ => false,
        };
        // Until the guest has said that it was answered: the second start is there to see that it heals.
        let says = |call: &Call| call.kind == Kind::Elsewhere(libc::SYS_pwritev2);
        assert!(calls[first..].iter().any(says), "{}", scenario.good);
        let of_first = calls[first..].iter().take_while(|call| !says(call));
        let calls: Vec<_> = of_first.filter(asks).collect();
        for needed in [
            Kind::Elsewhere(libc::SYS_eventfd2),
            Kind::Elsewhere(libc::SYS_epoll_create1),
            Kind::Elsewhere(libc::SYS_epoll_ctl),
            Kind::Elsewhere(libc::SYS_clone3),
            Kind::kvm("KVM_IOEVENTFD"),
            Kind::kvm("KVM_IRQFD"),
        ] {
            assert!(calls.iter().any(|call| call.kind == needed), "no {needed}");
        }
        let errnos = [libc::ENOMEM, libc::EMFILE, libc::EINVAL, libc::EAGAIN];
        // The guest goes on, with a line that says what its device lacks; or without an interrupt it ends, by status 1.
        scenario.refuse(calls.into_iter(), &errnos, |call, _| match call.kind {
            // The interrupt's own among them, made on the device's thread.
            Kind::Elsewhere(libc::SYS_eventfd2 | libc::SYS_fcntl) => Allowed::EndOrGoOn,
            Kind::Elsewhere(_) => Allowed::GoOn,
            _ if call.kind == Kind::kvm("KVM_IOEVENTFD") => Allowed::GoOn,
            _ => Allowed::EndOrGoOn,
        });
    }
}
