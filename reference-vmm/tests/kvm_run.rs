// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm run` with bare-metal guests on this host's KVM: what goes in comes out, and every
//! end is the documented one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use guests::{boot, image, monitor};
use support::pty::Pty;
use support::{Running, Vmm, WATCHDOG, elf, file, need_kvm};

#[test]
fn an_elf_kernel_gets_its_command_line_and_its_initrd() {
    need_kvm();
    let (kernel, initrd) = (elf(boot::boot_params64()), file(&[7; 0x1234]));
    let ended = Vmm::run(&kernel)
        .words("--debug-exit --cmdline quiet=1 --initrd")
        .arg(&initrd)
        .output();
    ended.expect_status(1).expect_silence();
    let text = ended.text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], ["quiet=1", "00001234"], "{ended}");
    assert!(
        lines[2].parse::<u32>().unwrap() >= 2,
        "RAM on both sides of the ISA window: {ended}"
    );
}

#[test]
fn a_bzimage_gets_the_same_as_an_elf_kernel() {
    need_kvm();
    let (kernel, initrd) = (
        file(&image::bzimage(boot::boot_params64())),
        file(&[7; 0x321]),
    );
    let ended = Vmm::run(&kernel)
        .words("--debug-exit --cmdline a=b --initrd")
        .arg(&initrd)
        .output();
    ended.expect_status(1).expect_silence();
    assert!(ended.text().starts_with("a=b\n00000321\n"), "{ended}");
}

#[test]
fn a_pvh_kernel_gets_its_start_info() {
    need_kvm();
    let kernel = file(&image::elf64_pvh(boot::pvh32()));
    let ended = Vmm::run(&kernel)
        .words("--debug-exit --cmdline hello")
        .output();
    ended
        .expect_status(1)
        .expect_stdout("Phello\n")
        .expect_silence();
}

#[test]
fn a_multiboot_kernel_gets_its_modules_in_order() {
    need_kvm();
    let kernel = file(&image::multiboot(boot::multiboot32()));
    let modules = [file(b"one"), file(b"two"), file(b"three")];
    let mut vmm = Vmm::run(&kernel).words("--debug-exit --cmdline arg");
    for module in &modules {
        vmm = vmm.arg("--initrd").arg(module);
    }
    let ended = vmm.output();
    ended.expect_status(1).expect_silence();
    let text = ended.text();
    assert!(
        text.starts_with("M3") && text.ends_with(" arg\n"),
        "{ended}"
    );
}

#[test]
fn debug_exit_gives_the_process_its_status() {
    need_kvm();
    let hello = elf(boot::hello64());
    Vmm::run(&hello)
        .arg("--debug-exit")
        .output()
        .expect_status(1)
        .expect_stdout("hello\n");
    let echo = elf(boot::echo64());
    for port in ["--debug-exit", "--debug-exit=0xf4", "--debug-exit=244"] {
        let mut running = Vmm::run(&echo).arg(port).stdin_pipe().start();
        running.type_in(b"q");
        running
            .wait()
            .expect_status(0x21)
            .expect_stdout("q")
            .expect_silence();
    }
}

#[test]
fn reset_and_power_off_end_with_status_0() {
    need_kvm();
    let ended = Vmm::boot(boot::byte_and_reset64()).output();
    ended.expect_status(0).expect_stdout("*").expect_silence();
    Vmm::boot(boot::poweroff64())
        .output()
        .expect_status(0)
        .expect_silence();
}

#[test]
fn a_triple_fault_ends_with_status_3_and_the_guests_registers() {
    need_kvm();
    for irqchip in ["kernel", "split", "none"] {
        let ended = Vmm::boot(boot::triple_fault64())
            .args(["--irqchip", irqchip])
            .output();
        ended.expect_status(3);
        for needle in ["vCPU 0: triple fault", "RIP ", "RAX ", "CR3 "] {
            assert!(ended.stderr.contains(needle), "no {needle}\n{ended}");
        }
        // kvm_amd resets a vCPU that has shut down, and says nothing of what it was.
        let lost = ended.stderr.contains("its registers are lost");
        let shown = ["RAX 1122334455667788", "RBX 00000000feedface"]
            .iter()
            .all(|register| ended.stderr.contains(register));
        assert!(shown != lost, "{ended}");
        assert!(!ended.stderr.contains("panicked at"), "{ended}");
    }
}

#[test]
fn a_panic_told_through_pvpanic_ends_with_status_3() {
    need_kvm();
    let ended = Vmm::boot(boot::pvpanic64()).output();
    ended.expect_status(3).expect_line(&["panic"]);
}

#[test]
fn a_guest_that_nothing_can_wake_does_not_hang_its_monitor() {
    need_kvm();
    // With a local APIC in the kernel the halt stays there, and a signal is what ends it.
    let ended = Vmm::boot(monitor::halt64())
        .words("--irqchip none")
        .output();
    ended.expect_stdout("up\n");
    assert!(ended.status.code().is_some(), "{ended}");
    let mut running = Vmm::boot(monitor::halt64()).start();
    running.wait_for("up\n");
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

#[test]
fn every_vcpu_announces_itself_up_to_64() {
    need_kvm();
    let kernel = elf(boot::smp64());
    for cpus in ["1", "2", "64"] {
        let ended = Vmm::run(&kernel)
            .args(["--debug-exit", "--cpus", cpus, "--cmdline", cpus])
            .output();
        let dots = ".".repeat(cpus.parse().unwrap());
        ended.expect_status(1).expect_stdout(&dots).expect_silence();
    }
}

#[test]
fn every_kind_of_irqchip_runs_a_guest() {
    need_kvm();
    let kernel = elf(boot::hello64());
    for flags in [
        "--irqchip none",
        "--irqchip split",
        "--irqchip kernel",
        "--irqchip kernel --pit",
    ] {
        let ended = Vmm::run(&kernel).words(flags).arg("--debug-exit").output();
        ended
            .expect_status(1)
            .expect_stdout("hello\n")
            .expect_silence();
    }
}

/// More than the UART's FIFO and a pipe hold, with every byte value but `q` in it.
fn much_input() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..5000u32).map(|i| (i * 7 + i / 256) as u8).collect();
    bytes
        .iter_mut()
        .filter(|byte| **byte == b'q')
        .for_each(|byte| *byte = b'Q');
    bytes.push(b'q');
    bytes
}

#[test]
fn piped_input_loses_nothing() {
    need_kvm();
    for guest in [boot::echo64(), monitor::echo_irq64()] {
        let input = much_input();
        let mut running = Vmm::boot(guest).arg("--debug-exit").stdin_pipe().start();
        running.type_in(&input);
        running.close_stdin();
        let ended = running.wait();
        ended.expect_status(0x21);
        let echoed = ended
            .stdout
            .strip_prefix(b"ready\n")
            .unwrap_or(&ended.stdout);
        assert!(
            echoed == input,
            "{} bytes came back of {}",
            echoed.len(),
            input.len()
        );
    }
}

#[test]
fn a_file_as_input_loses_nothing() {
    need_kvm();
    let input = much_input();
    let source = file(&input);
    for guest in [boot::echo64(), monitor::echo_irq64()] {
        let stdin = File::open(&source).unwrap();
        let ended = Vmm::boot(guest)
            .arg("--debug-exit")
            .stdin_file(stdin)
            .output();
        ended.expect_status(0x21);
        let echoed = ended
            .stdout
            .strip_prefix(b"ready\n")
            .unwrap_or(&ended.stdout);
        assert!(
            echoed == input,
            "{} bytes came back of {}",
            echoed.len(),
            input.len()
        );
    }
}

#[test]
fn monitors_that_share_a_pipe_as_their_input_can_all_be_stopped() {
    need_kvm();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut all = [(); 3].map(|()| {
        Vmm::boot(monitor::echo_irq64())
            .stdin_file(reader.try_clone().unwrap())
            .start()
    });
    for running in &mut all {
        running.wait_for("ready\n");
    }
    // Each byte wakes all of them, and is one's. Another that seems to be in a read for it has to obey too.
    let reader = File::from(OwnedFd::from(reader));
    let reads = |running: &Running| {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", running.pid()));
        call.is_ok_and(|call| call.starts_with("0 "))
    };
    for _ in 0..1_000 {
        if all.iter().any(reads) {
            break;
        }
        writer.write_all(b"a").unwrap();
        let deadline = Instant::now() + WATCHDOG;
        while filled(&reader) > 0 {
            assert!(Instant::now() < deadline, "nobody reads");
            std::thread::yield_now();
        }
    }
    for running in all {
        running.signal(libc::SIGINT);
        running.wait().expect_status(0);
    }
}

#[test]
fn typed_input_interrupts_a_guest_that_sleeps() {
    need_kvm();
    let mut running = Vmm::boot(monitor::echo_irq64())
        .arg("--debug-exit")
        .stdin_pipe()
        .start();
    running.wait_for("ready\n");
    for word in ["one", "two", "three"] {
        running.type_in(word.as_bytes());
        running.wait_for(word);
    }
    running.type_in(b"q");
    running
        .wait()
        .expect_status(0x21)
        .expect_stdout("ready\nonetwothreeq");
}

#[test]
fn sigusr1_shows_where_each_vcpu_is_and_the_guest_goes_on() {
    need_kvm();
    let mut running = Vmm::boot(monitor::echo_irq64())
        .args(["--debug-exit", "--cpus", "2"])
        .stdin_pipe()
        .start();
    running.wait_for("ready\n");
    running.signal(libc::SIGUSR1);
    for vcpu in ["vCPU 0:\nRIP ", "vCPU 1:\nRIP "] {
        running.wait_for_stderr(vcpu);
    }
    running.type_in(b"still here, q");
    let ended = running.wait();
    ended
        .expect_status(0x21)
        .expect_stdout("ready\nstill here, q");
}

#[test]
fn a_guest_that_initialises_its_own_boot_processor_is_told_so_and_not_what_kvm_is() {
    need_kvm();
    for irqchip in ["split", "kernel"] {
        let ended = Vmm::boot(monitor::init_self64())
            .words("--irqchip")
            .arg(irqchip)
            .output();
        ended.expect_status(3).expect_stdout("up\n");
        for needle in ["vCPU 0", "INIT", "0xfffffff0"] {
            assert!(ended.stderr.contains(needle), "{needle}: {ended}");
        }
        for misleading in ["doctor", "registers are lost"] {
            assert!(!ended.stderr.contains(misleading), "{ended}");
        }
    }
}

#[test]
fn sigusr1_shows_the_statistics_of_a_guest_that_runs_on() {
    need_kvm();
    for (form, needles) in [
        ("--stats", ["  vcpu1 ", "the serial port "]),
        (
            "--stats=json",
            ["{\"exits\":[{", "\"device\":\"the serial port\""],
        ),
    ] {
        let mut running = Vmm::boot(monitor::echo_irq64())
            .words("--debug-exit --cpus 2")
            .arg(form)
            .stdin_pipe()
            .start();
        running.wait_for("ready\n");
        running.signal(libc::SIGUSR1);
        // Registers as well.
        for needle in [needles[0], needles[1], "vCPU 0:\nRIP "] {
            running.wait_for_stderr(needle);
        }
        // It runs on, and says the numbers again at the end: more of them.
        running.type_in(b"still here, q");
        let ended = running.wait();
        ended
            .expect_status(0x21)
            .expect_stdout("ready\nstill here, q");
        assert_eq!(ended.stderr.matches(needles[0]).count(), 2, "{ended}");
        if form == "--stats=json" {
            let numbers = ended.stderr.lines().filter(|line| line.starts_with('{'));
            let written: Vec<u64> = numbers
                .map(|line| {
                    let stats: serde_json::Value = serde_json::from_str(line).unwrap();
                    let devices = stats["devices"].as_array().unwrap();
                    let port = devices
                        .iter()
                        .find(|one| one["device"] == "the serial port");
                    port.unwrap()["written-bytes"].as_u64().unwrap()
                })
                .collect();
            assert!(
                written.len() == 2 && written[0] + 13 <= written[1],
                "{written:?}"
            );
        }
    }
}

#[test]
fn without_stats_sigusr1_shows_registers_alone() {
    need_kvm();
    let mut running = Vmm::boot(boot::spin64()).start();
    running.wait_for("up\n");
    running.signal(libc::SIGUSR1);
    running.wait_for_stderr("vCPU 0:\nRIP ");
    running.signal(libc::SIGINT);
    let ended = running.wait();
    ended.expect_status(0);
    assert!(!ended.stderr.contains("exits"), "{ended}");
}

#[test]
fn input_that_ends_or_was_never_there_does_not_end_the_guest() {
    need_kvm();
    let hello = elf(boot::hello64());
    Vmm::run(&hello)
        .arg("--debug-exit")
        .output()
        .expect_status(1)
        .expect_stdout("hello\n");
    let closed = Vmm::run(&hello).arg("--debug-exit").stdin_closed().output();
    closed
        .expect_status(1)
        .expect_stdout("hello\n")
        .expect_silence();
    let mut running = Vmm::boot(boot::spin64()).stdin_pipe().start();
    running.wait_for("up\n");
    running.close_stdin();
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

#[test]
fn a_terminal_is_raw_while_the_guest_runs_and_ctrl_a_x_quits() {
    need_kvm();
    let pty = Pty::new();
    let before = pty.settings();
    let mut running = Vmm::boot(boot::spin64()).stdin_file(pty.terminal()).start();
    running.wait_for("up\n");
    assert!(pty.settings().is_raw(), "{:?}", pty.settings());
    pty.type_in(b"\x01x");
    running
        .wait()
        .expect_status(0)
        .expect_stdout("up\n")
        .expect_silence();
    assert_eq!(pty.settings(), before);
}

#[test]
fn keys_on_a_terminal_reach_the_guest_as_they_are() {
    need_kvm();
    let pty = Pty::new();
    let mut running = Vmm::boot(monitor::echo_irq64())
        .arg("--debug-exit")
        .stdin_file(pty.terminal())
        .start();
    running.wait_for("ready\n");
    // Ctrl-C, Enter, Ctrl-D, Ctrl-A and Ctrl-Z are keys, not the terminal's commands.
    pty.type_in(b"\x03\r\x04\x01\x01\x1aq");
    running
        .wait()
        .expect_status(0x21)
        .expect_stdout("ready\n\x03\r\x04\x01\x1aq");
}

#[test]
fn the_terminal_is_restored_whatever_the_end() {
    need_kvm();
    let pty = Pty::new();
    let before = pty.settings();
    let run = |kernel: &[u8]| Vmm::boot(kernel).stdin_file(pty.terminal());
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let mut running = run(boot::spin64()).start();
        running.wait_for("up\n");
        running.signal(signal);
        running.wait().expect_status(0);
        assert_eq!(pty.settings(), before, "after signal {signal}");
    }
    run(boot::triple_fault64()).output().expect_status(3);
    assert_eq!(pty.settings(), before, "after a triple fault");
    run(boot::pvpanic64()).output().expect_status(3);
    assert_eq!(pty.settings(), before, "after a panic");
    run(boot::poweroff64()).output().expect_status(0);
    assert_eq!(pty.settings(), before, "after power-off");
    run(boot::hello64())
        .words("--kvm /dev/null")
        .output()
        .expect_status(1);
    assert_eq!(pty.settings(), before, "after a failure");
}

#[test]
fn sigterm_stops_a_guest_without_acpi_at_once() {
    need_kvm();
    for cpus in ["1", "4"] {
        // With the timeout that this guest must not be given, the watchdog would bite.
        let mut running = Vmm::boot(boot::spin64())
            .args(["--shutdown-timeout", "3600", "--cpus", cpus])
            .start();
        running.wait_for("up\n");
        running.signal(libc::SIGTERM);
        running.wait().expect_status(0).expect_stdout("up\n");
    }
}

#[test]
fn a_user_without_room_for_pending_signals_can_stop_a_guest() {
    need_kvm();
    let mut running = Vmm::boot(boot::spin64()).words("--cpus 2").start();
    running.wait_for("up\n");
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: reads one rlimit.
    let limited = unsafe {
        libc::prlimit(
            running.pid(),
            libc::RLIMIT_SIGPENDING,
            &none,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(limited, 0);
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

#[test]
fn sigterm_presses_the_power_button() {
    need_kvm();
    let mut running = Vmm::boot(monitor::button64())
        .words("--shutdown-timeout 3600")
        .start();
    running.wait_for("up\n");
    running.signal(libc::SIGTERM);
    running
        .wait()
        .expect_status(0)
        .expect_stdout("up\nbutton\n");
}

#[test]
fn a_guest_that_ignores_its_button_is_stopped() {
    need_kvm();
    let kernel = elf(monitor::deaf64());
    // By the timeout.
    let mut running = Vmm::run(&kernel).words("--shutdown-timeout 1").start();
    running.wait_for("up\n");
    running.signal(libc::SIGTERM);
    let ended = running.wait();
    ended.expect_status(0);
    assert!(ended.stderr.contains("power off"), "{ended}");
    // By a second SIGTERM, and by SIGINT.
    for second in [libc::SIGTERM, libc::SIGINT] {
        let mut running = Vmm::run(&kernel)
            .words("--shutdown-timeout 3600 --log info")
            .start();
        running.wait_for("up\n");
        running.signal(libc::SIGTERM);
        running.wait_for_stderr("button");
        running.signal(second);
        running.wait().expect_status(0);
    }
    // At once where no time is given.
    let mut running = Vmm::run(&kernel).words("--shutdown-timeout 0").start();
    running.wait_for("up\n");
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

/// A pipe of one page: its reader and its writer.
fn small_pipe() -> (File, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    // SAFETY: plain numbers.
    assert!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 4096);
    (OwnedFd::from(reader).into(), writer.into())
}

/// Bytes in a pipe.
fn filled(reader: &File) -> usize {
    let mut bytes = 0;
    // SAFETY: FIONREAD writes one int.
    let done = unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &mut bytes) };
    assert_eq!(done, 0);
    bytes as usize
}

#[test]
fn sigterm_ends_a_run_whose_output_nobody_reads() {
    need_kvm();
    for input in [&b""[..], b"typed meanwhile"] {
        let (reader, writer) = small_pipe();
        let mut running = Vmm::boot(monitor::flood64())
            .stdin_pipe()
            .stdout_file(writer)
            .start();
        let deadline = Instant::now() + WATCHDOG;
        // A pipe takes a piece whole or not at all, and KVM's ring of coalesced writes gives up to 169
        // bytes in one.
        while filled(&reader) <= 4096 - 169 {
            assert!(Instant::now() < deadline, "the pipe never filled");
            std::thread::yield_now();
        }
        running.type_in(input);
        running.signal(libc::SIGTERM);
        running.wait().expect_status(0);
    }
}

#[test]
fn a_terminal_that_is_full_does_not_keep_a_run_from_ending() {
    need_kvm();
    let pty = Pty::new();
    let mut running = Vmm::boot(monitor::flood64())
        .stdin_pipe()
        .stdout_file(pty.terminal())
        .start();
    let full = || {
        let mut poll = libc::pollfd {
            fd: pty.slave.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, 0) == 0 }
    };
    let deadline = Instant::now() + WATCHDOG;
    while !full() {
        assert!(Instant::now() < deadline, "the terminal never filled");
        std::thread::yield_now();
    }
    running.type_in(b"typed meanwhile");
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

#[test]
fn a_stderr_that_is_full_does_not_keep_a_run_from_ending() {
    need_kvm();
    let full = || {
        let (reader, writer) = small_pipe();
        let mut file = File::from(writer);
        while filled(&reader) < 4096 {
            file.write_all(b"x").unwrap();
        }
        (reader, file)
    };
    for (flags, signals) in [
        ("", &[libc::SIGUSR1, libc::SIGINT][..]),
        ("--stats", &[libc::SIGINT]),
        ("--log info", &[libc::SIGTERM]),
    ] {
        let (_reader, stderr) = full();
        let mut running = Vmm::boot(boot::spin64())
            .words(flags)
            .stderr_file(stderr)
            .start();
        running.wait_for("up\n");
        for &signal in signals {
            running.signal(signal);
        }
        running.wait().expect_status(0);
    }
    let (_reader, stderr) = full();
    let ended = Vmm::boot(boot::triple_fault64())
        .stderr_file(stderr)
        .output();
    ended.expect_status(3);
}

#[test]
fn a_console_in_a_file_that_may_grow_no_more_does_not_end_the_guest() {
    need_kvm();
    let out = tempfile::tempfile().unwrap();
    let ended = Vmm::boot(guests::console::polled64())
        .words("--debug-exit --cmdline 20000e")
        .stdout_file(out.try_clone().unwrap())
        .file_size(8192)
        .output();
    ended.expect_status(1);
    // A measured binary adds a line of its own: its profile may grow no more either.
    let told = ended.stderr.matches("no more output").count();
    assert!(
        told == 1 && ended.stderr.contains("File too large"),
        "{ended}"
    );
    assert_eq!(out.metadata().unwrap().len(), 8192);
}

#[test]
fn a_slow_reader_gets_every_byte() {
    need_kvm();
    let (mut reader, writer) = small_pipe();
    let running = Vmm::boot(monitor::flood64()).stdout_file(writer).start();
    let mut bytes = vec![0; 10_000];
    reader.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == b'x'));
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

#[test]
fn output_that_cannot_be_written_is_said_once_and_the_guest_goes_on() {
    need_kvm();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let ended = Vmm::boot(boot::hello64())
        .arg("--debug-exit")
        .stdout_file(full)
        .output();
    ended
        .expect_status(1)
        .expect_line(&["No space left on device"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Vmm::boot(boot::hello64())
        .arg("--debug-exit")
        .stdout_file(writer)
        .output();
    ended.expect_status(1).expect_line(&["Broken pipe"]);
}

#[test]
fn threads_have_names() {
    need_kvm();
    let mut running = Vmm::boot(boot::spin64()).words("--cpus 3").start();
    running.wait_for("up\n");
    // A thread names itself, and the first guest speaks while the others' threads begin.
    let deadline = Instant::now() + WATCHDOG;
    for name in ["vcpu0", "vcpu1", "vcpu2", "reference-vmm"] {
        loop {
            let names = running.threads();
            if names.iter().any(|n| n == name) {
                break;
            }
            assert!(Instant::now() < deadline, "{names:?} has no {name}");
            std::thread::yield_now();
        }
    }
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}

#[test]
fn the_timeline_tells_when_what_happened_in_order() {
    need_kvm();
    let ended = Vmm::boot(boot::hello64())
        .words("--debug-exit --timeline")
        .output();
    ended.expect_status(1);
    let mut last = 0;
    for event in ["start", "first-entry", "first-output", "exit"] {
        let prefix = format!("timeline: {event} ");
        let line = ended
            .stderr
            .lines()
            .find_map(|line| line.strip_prefix(&prefix));
        let at: u64 = line
            .unwrap_or_else(|| panic!("no {event}\n{ended}"))
            .parse()
            .unwrap();
        assert!(at >= last, "{event} before its time\n{ended}");
        last = at;
    }
}

#[test]
fn a_configuration_file_does_what_flags_do() {
    need_kvm();
    let (kernel, initrd) = (elf(boot::boot_params64()), file(&[1; 0x77]));
    let json = format!(
        r#"{{"kernel": {kernel:?}, "initrd": {initrd:?}, "cmdline": "from-file", "memory": "64M",
            "cpus": 1, "irqchip": "split", "debug-exit": 244}}"#
    );
    let config = file(json.as_bytes());
    let ended = Vmm::command(["run", "--config"]).arg(&config).output();
    ended.expect_status(1).expect_silence();
    assert!(ended.text().starts_with("from-file\n00000077\n"), "{ended}");
    let ended = Vmm::command(["run", "--cmdline", "from-flag", "--config"])
        .arg(&config)
        .output();
    ended.expect_status(1);
    assert!(ended.text().starts_with("from-flag\n00000077\n"), "{ended}");
}

#[test]
fn memory_may_be_small_or_cross_the_hole() {
    need_kvm();
    let kernel = elf(boot::boot_params64());
    for (memory, entries) in [("2M", 2), ("128M", 2), ("6G", 3), ("24G", 3)] {
        let ended = Vmm::run(&kernel)
            .args(["--debug-exit", "--memory", memory])
            .output();
        ended.expect_status(1).expect_silence();
        let text = ended.text();
        let count: u32 = text.lines().nth(2).unwrap().parse().unwrap();
        assert!(count >= entries, "{memory}: {ended}");
    }
}

#[test]
fn two_runs_at_once_do_not_disturb_each_other() {
    need_kvm();
    let kernel = elf(boot::echo64());
    let mut runs: Vec<_> = (0..4)
        .map(|_| Vmm::run(&kernel).arg("--debug-exit").stdin_pipe().start())
        .collect();
    for (i, run) in runs.iter_mut().enumerate() {
        run.type_in(i.to_string().as_bytes());
        run.wait_for(&i.to_string());
    }
    for (i, mut run) in runs.into_iter().enumerate() {
        run.type_in(b"q");
        run.wait()
            .expect_status(0x21)
            .expect_stdout(&format!("{i}q"))
            .expect_silence();
    }
}

#[test]
fn a_small_guest_costs_at_most_3_mib() {
    need_kvm();
    let mut running = Vmm::boot(boot::spin64()).start();
    running.wait_for("up\n");
    let peak = running.peak_rss();
    println!("peak resident memory: {peak} KiB");
    // A debug build carries its symbols and its checks.
    if !cfg!(debug_assertions) {
        assert!(peak <= 3 * 1024, "{peak} KiB");
    }
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}
