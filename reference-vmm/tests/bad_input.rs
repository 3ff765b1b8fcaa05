// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is wrong with the command line, the configuration or the files ends with status 2 and one
//! line that has the wrong value in it, before anything is created: these tests name a KVM device
//! that does not exist, and hear of it (status 1) only where everything else is right.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use guests::{boot, image};
use support::mutate::{Random, mutate};
use support::{Vmm, elf, file, long};

const NO_KVM: &str = "/no/such/kvm";

/// `run --kernel KERNEL` where there is no KVM.
fn run(kernel: impl AsRef<std::ffi::OsStr>) -> Vmm {
    Vmm::run(kernel).args(["--kvm", NO_KVM])
}

/// What follows `run` on the command line is refused, in a line with all of `needles`.
#[track_caller]
fn refused(words: &str, needles: &[&str]) {
    refused_with(2, words, needles);
}

#[track_caller]
fn refused_with(status: i32, words: &str, needles: &[&str]) {
    let kernel = elf(boot::hello64());
    run(&kernel)
        .words(words)
        .output()
        .expect_status(status)
        .expect_stdout("")
        .expect_line(needles);
}

#[track_caller]
fn image_refused(bytes: &[u8], needles: &[&str]) {
    let kernel = file(bytes);
    let path = kernel.display().to_string();
    let ended = run(&kernel).output();
    ended
        .expect_status(2)
        .expect_stdout("")
        .expect_line(&[&path])
        .expect_line(needles);
}

#[test]
fn what_is_right_gets_as_far_as_kvm() {
    for kernel in [
        image::elf64(boot::hello64()),
        image::elf64_pvh(boot::pvh32()),
        image::multiboot(boot::multiboot32()),
        image::bzimage(boot::hello64()),
    ] {
        run(file(&kernel)).output();
        let kernel = file(&kernel);
        run(&kernel)
            .output()
            .expect_status(1)
            .expect_line(&[NO_KVM, "No such file"]);
    }
}

#[test]
fn no_access_to_kvm_says_so_with_the_path() {
    let kernel = elf(boot::hello64());
    for (path, needle) in [("/no/such/kvm", "os error 2"), ("/dev/null", ""), ("/", "")] {
        let ended = Vmm::run(&kernel).args(["--kvm", path]).output();
        ended.expect_status(1).expect_line(&[path, needle]);
    }
}

#[test]
fn commands_and_flags_that_do_not_exist_are_named() {
    for (args, needle) in [
        (&["boot"][..], "boot"),
        (&[], "--help"),
        (&["run"], "--kernel"),
        (&["run", "--kernel"], "--kernel"),
        (&["run", "--kernel="], "--kernel"),
        (&["run", "--frob"], "--frob"),
        (&["run", "-x"], "-x"),
        (&["run", "--kernel", "k", "extra"], "extra"),
        (&["--version", "extra"], "extra"),
        (&["--help", "extra"], "extra"),
        (&["run", "--config="], "--config \"\""),
        (&["run", "--kernel", "k", "--irqchip", "apic"], "apic"),
        (&["run", "--kernel", "k", "--log", "loud"], "loud"),
        (
            &["run", "--kernel", "k", "--shutdown-timeout", "soon"],
            "soon",
        ),
        (&["run", "--kernel", "k", "--debug-exit=0x10000"], "0x10000"),
        (&["doctor", "--xml"], "--xml"),
        (&["cpu", "--xml"], "--xml"),
        (&["cpu", "--cpu"], "--cpu"),
        (&["cpu", "--cpu="], "--cpu: \"\""),
        (&["cpu", "host"], "host"),
    ] {
        let ended = Vmm::command(args).output();
        ended
            .expect_status(2)
            .expect_stdout("")
            .expect_line(&[needle]);
    }
}

#[test]
fn bytes_that_are_no_text_do_not_confuse_the_command_line() {
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"/no/such/\xff\x1b[31m\n");
    Vmm::run(odd).output().expect_status(2).one_line();
    let kernel = elf(boot::hello64());
    for flag in ["--cmdline", "--memory", "--cpus", "--cpu", "--irqchip"] {
        run(&kernel)
            .arg(flag)
            .arg(odd)
            .output()
            .expect_status(2)
            .one_line();
    }
    for flag in ["--initrd", "--config"] {
        run(&kernel)
            .arg(flag)
            .arg(odd)
            .output()
            .expect_status(2)
            .one_line();
    }
    Vmm::run(&kernel)
        .arg("--kvm")
        .arg(odd)
        .output()
        .expect_status(1)
        .one_line();
    Vmm::command([odd]).output().expect_status(2).one_line();
    // What is told to a monitor in JSON: it is not even dialled.
    let ctl = || Vmm::command(["ctl", "--api-sock", "/no/such/socket"]);
    for vmm in [
        ctl().words("snapshot").arg(odd),
        ctl().words("load").arg(odd),
        ctl().words("snapshot /s --base").arg(odd),
    ] {
        let refused = vmm.output();
        refused.expect_status(2).expect_line(&["xFF", "not UTF-8"]);
        refused.one_line();
    }
    for words in [
        "--timeout 0 status",
        "migrate --to tcp:1.2.3.4:5 --connections 99999",
    ] {
        let refused = ctl().words(words).output();
        refused
            .expect_status(2)
            .expect_line(&["a whole number from 1 to"]);
    }
}

#[test]
fn impossible_numbers_of_vcpus_are_refused_with_the_number() {
    for cpus in ["0", "256", "100000", "4294967296", "-1", "two", "1.5", ""] {
        let kernel = elf(boot::hello64());
        run(&kernel)
            .args(["--cpus", cpus])
            .output()
            .expect_status(2)
            .expect_line(&[cpus]);
    }
}

#[test]
fn impossible_arrangements_of_vcpus_are_refused_with_the_numbers() {
    for (cpus, needle) in [
        ("4,cores=3", "4 vCPUs are no multiple of cores=3"),
        ("8,sockets=2,cores=2,threads=4", "which is 16"),
        ("4,cores=0", "--cpus: option \"cores=0\""),
        ("4,cores=-1", "cores=-1"),
        ("4,cores=many", "cores=many"),
        ("4,dies=2", "dies=2"),
        ("4,", "\"\""),
        (",cores=2", "--cpus \"\""),
        ("4,threads=2,threads=2", "twice"),
        ("200,sockets=40", "APIC id"),
        ("4294967295,cores=4294967295", "4294967295 vCPUs"),
    ] {
        refused(&format!("--cpus {cpus}"), &[needle]);
    }
    let config = file(br#"{"cpus": {"count": 4, "cores": 3}}"#);
    refused(
        &format!("--config {}", config.display()),
        &["4 vCPUs are no multiple of cores=3"],
    );
}

#[test]
fn processor_models_that_are_none_are_refused_with_their_name_or_place() {
    for (cpu, needle) in [
        ("i486", "i486"),
        ("x86-64-v5", "x86-64-v5"),
        ("/no/such/model", "/no/such/model"),
        ("none.json", "none.json"),
        ("/dev/zero", "/dev/zero"),
    ] {
        refused(&format!("--cpu {cpu}"), &[needle]);
        let ended = Vmm::command(["cpu", "--kvm", NO_KVM, "--cpu", cpu]).output();
        ended.expect_status(2).expect_line(&[needle]);
    }
    for (text, needle) in [
        ("[]", "object"),
        (r#"{"base": "i486"}"#, "i486"),
        (r#"{"set": ["warp"]}"#, "warp"),
        (r#"{"set": ["avx"], "clear": ["avx"]}"#, "avx"),
        (
            r#"{"registers": [{"leaf": 1, "register": "eax"}]}"#,
            "0x1.0 eax",
        ),
        (
            r#"{"registers": [{"leaf": 1, "register": "eax", "bits": "0b1"}]}"#,
            "0b1",
        ),
        (r#"{"colour": 1}"#, "colour"),
    ] {
        let template = file(text.as_bytes());
        let path = template.display();
        let path = format!("the processor model {path}");
        refused(&format!("--cpu {}", template.display()), &[&path, needle]);
    }
    refused(
        "--cpu none.json",
        &["cannot read the processor model none.json"],
    );
    // One that is right gets as far as KVM.
    let template = file(br#"{"base": "x86-64-v2", "set": ["aes"]}"#);
    let path = template.display().to_string();
    let kernel = elf(boot::hello64());
    let ended = run(&kernel).args(["--cpu", &path]).output();
    ended.expect_status(1).expect_line(&[NO_KVM]);
    let ended = Vmm::command(["cpu", "--kvm", NO_KVM, "--cpu", &path]).output();
    ended.expect_status(1).expect_line(&[NO_KVM]);
}

#[test]
fn impossible_memory_is_refused_with_the_size() {
    for (memory, needle) in [
        ("0", "0 bytes"),
        ("1", "1 bytes"),
        ("1M", "1048576"),
        ("268435457", "268435457"),
        ("4096T", "4503599627370496"),
        ("18446744073709551615", "18446744073709551615"),
        ("18446744073709547520", "18446744073709547520"),
        ("99999999999999999999", "99999999999999999999"),
        ("17179869184G", "17179869184G"),
        ("8EB", "8EB"),
        ("lots", "lots"),
        ("-1", "-1"),
        ("1.5G", "1.5G"),
    ] {
        refused(&format!("--memory {memory}"), &[needle]);
    }
}

#[test]
fn impossible_options_of_memory_are_refused_with_what_to_do() {
    for (memory, needles) in [
        ("512M,huge", &["\"huge\"", "hugepages"][..]),
        ("512M,share=on", &["share=on", "shared"]),
        ("512M,shared=maybe", &["shared=maybe", "on or off"]),
        ("512M,", &["\"\""]),
        ("512M,1G", &["1G"]),
        ("512M,shared,shared", &["shared", "twice"]),
        ("512M,thp=madvise", &["thp=madvise", "always or never"]),
        ("512M,numa=all", &["numa=all", "number"]),
        ("512M,hugepages=3M", &["hugepages=3M", "2M or 1G"]),
        ("513M,hugepages=2M", &["537919488", "2 MiB"]),
        ("1536M,hugepages=1G", &["1610612736", "1 GiB"]),
        ("512M,hugepages=2M,thp=always", &["thp", "leave one"]),
        ("512M,guest-memfd=x", &["guest-memfd=x", "on or off"]),
        (
            "512M,guest-memfd,shared",
            &["536870912", "guest-memfd and shared", "leave one"],
        ),
        (
            "512M,guest-memfd,thp=never",
            &["guest-memfd and thp", "leave one"],
        ),
        (
            "512M,guest-memfd --track-dirty-pages",
            &["dirty log", "--track-dirty-pages"],
        ),
        // What only the host knows, and still before anything is made.
        ("64T,hugepages=2M", &["huge pages of 2 MiB"]),
        ("512M,numa=1023", &["NUMA node 1023"]),
        ("64T,prefault", &["70368744177664", "prefault", "to give"]),
    ] {
        refused(&format!("--memory {memory}"), needles);
    }
    let kernel = elf(boot::hello64());
    for (json, needle) in [
        (r#"{"size": "1G", "huge": true}"#, "`huge`"),
        (r#"{"size": "1G", "thp": "madvise"}"#, "madvise"),
        (r#"{"size": "513M", "hugepages": "2M"}"#, "2 MiB"),
        (r#"{"size": "1G", "hugepages": 5}"#, "hugepages"),
        (r#""1G,huge""#, "huge"),
        ("true", "a size is"),
    ] {
        let text = format!(r#"{{"kernel": {kernel:?}, "kvm": "{NO_KVM}", "memory": {json}}}"#);
        let config = file(text.as_bytes());
        let ended = Vmm::command(["run", "--config"]).arg(&config).output();
        ended.expect_status(2).expect_line(&[needle]);
    }
    // What is right gets as far as KVM, in each form.
    for memory in [
        "512M,shared,prefault,thp=never",
        "512M,numa=0",
        "size=512M",
        "thp=always",
    ] {
        let ended = run(&kernel).args(["--memory", memory]).output();
        ended.expect_status(1).expect_line(&[NO_KVM]);
    }
}

#[test]
fn debug_exit_and_pit_that_cannot_be_are_refused() {
    refused("--debug-exit=0xffff", &["0xffff"]);
    refused("--debug-exit=0x3f8", &["0x3f8"]);
    refused("--debug-exit=0x3f6", &["0x3f6"]);
    refused("--debug-exit=port", &["port"]);
    refused("--pit --irqchip split", &["PIT"]);
    refused("--pit --irqchip none", &["PIT"]);
}

#[test]
fn an_over_long_command_line_is_refused_with_both_lengths() {
    let kernels = [
        (image::elf64(boot::hello64()), 65535),
        (image::bzimage(boot::hello64()), 2047),
        (image::elf64_pvh(boot::pvh32()), 65535),
    ];
    for (kernel, limit) in kernels {
        let kernel = file(&kernel);
        let fits = "x".repeat(limit);
        run(&kernel)
            .args(["--cmdline", &fits])
            .output()
            .expect_status(1)
            .expect_line(&[NO_KVM]);
        let too_long = "x".repeat(limit + 1);
        let ended = run(&kernel).args(["--cmdline", &too_long]).output();
        let (limit, len) = (limit.to_string(), (limit + 1).to_string());
        ended
            .expect_status(2)
            .expect_line(&["command line", &limit, &len]);
    }
}

#[test]
fn a_kernel_that_is_no_file_is_refused_with_its_path() {
    run("/no/such/kernel")
        .output()
        .expect_status(2)
        .expect_line(&["/no/such/kernel"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    run(dir.path())
        .output()
        .expect_status(2)
        .expect_line(&[&path, "directory"]);
    run("/dev/zero")
        .output()
        .expect_status(2)
        .expect_line(&["/dev/zero"]);
    run("/dev/null")
        .output()
        .expect_status(2)
        .expect_line(&["/dev/null"]);
    // A FIFO that nobody writes to must not be waited for.
    let fifo = dir.path().join("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a valid path.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    run(&fifo).output().expect_status(2).expect_line(&["fifo"]);
    let link = dir.path().join("loop");
    std::os::unix::fs::symlink(&link, &link).unwrap();
    run(&link).output().expect_status(2).expect_line(&["loop"]);
    // Procfs files claim to be empty regular files.
    run("/proc/self/maps")
        .output()
        .expect_status(2)
        .expect_line(&["/proc/self/maps"]);
}

#[test]
fn a_kernel_that_may_not_be_read_is_refused() {
    // Root may read every file: for root, a file that cannot be read is one that fails to.
    // SAFETY: plain call.
    if unsafe { libc::geteuid() } == 0 {
        let ended = run("/proc/self/mem").output();
        ended.expect_status(2).expect_line(&["/proc/self/mem"]);
    } else {
        let kernel = elf(boot::hello64());
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o000);
        std::fs::set_permissions(&kernel, mode).unwrap();
        run(&kernel)
            .output()
            .expect_status(2)
            .expect_line(&["Permission denied"]);
    }
}

#[test]
fn what_is_no_kernel_is_refused_with_a_guess() {
    image_refused(b"", &["empty"]);
    image_refused(b"x", &[]);
    image_refused(b"\x7fELF", &[]);
    image_refused(&[0; 4096], &["not a kernel"]);
    image_refused(&[0xff; 100_000], &["not a kernel"]);
    image_refused(b"#!/bin/sh\nexit 0\n", &["script"]);
    image_refused(b"\x1f\x8b\x08\0\0\0\0\0\0\0\0\0", &["gzip"]);
    image_refused(b"070701000000000000000000", &["cpio"]);
}

#[test]
fn a_program_of_this_host_is_refused() {
    // An ELF64 executable, yet position-independent and dynamic.
    let ended = run(support::binary()).output();
    assert!(matches!(ended.status.code(), Some(1 | 2)), "{ended}");
    ended.one_line();
}

#[test]
fn a_truncated_kernel_is_refused_at_every_length() {
    for image in [
        image::elf64(boot::hello64()),
        image::elf64_pvh(boot::pvh32()),
        image::multiboot(boot::multiboot32()),
        image::bzimage(boot::hello64()),
    ] {
        let step = if long() { 1 } else { 97 };
        let lengths = (0..image.len()).step_by(step).chain([image.len() - 1]);
        for len in lengths {
            let kernel = file(&image[..len]);
            let ended = run(&kernel).output();
            // bzImage is padded to 16 bytes: its last ones are not missed.
            let code = ended.status.code();
            assert!(
                code == Some(2) || code == Some(1) && len + 16 > image.len(),
                "{len}: {ended}"
            );
            ended.one_line();
        }
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_with_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let initrd = dir.path().join("initrd");
    for (len, memory) in [(300 << 20, "256M"), (1 << 40, "1G"), (3 << 20, "2M")] {
        std::fs::File::create(&initrd)
            .unwrap()
            .set_len(len)
            .unwrap();
        for kernel in [
            image::elf64(boot::hello64()),
            image::elf64_pvh(boot::pvh32()),
            image::multiboot(boot::multiboot32()),
            image::bzimage(boot::hello64()),
        ] {
            let kernel = file(&kernel);
            let ended = run(&kernel)
                .args(["--memory", memory])
                .arg("--initrd")
                .arg(&initrd)
                .output();
            ended
                .expect_status(2)
                .expect_line(&["initrd", &len.to_string()]);
        }
    }
    let kernel = elf(boot::hello64());
    let ended = run(&kernel).args(["--initrd", "/no/such/initrd"]).output();
    ended.expect_status(2).expect_line(&["/no/such/initrd"]);
    let ended = run(&kernel).arg("--initrd").arg(dir.path()).output();
    ended.expect_status(2).expect_line(&["directory"]);
}

#[test]
fn a_bad_configuration_file_is_refused_with_its_path() {
    let refused = |text: &[u8], needle: &str| {
        let config = file(text);
        let path = config.display().to_string();
        let ended = Vmm::command(["run", "--config", &path])
            .args(["--kvm", NO_KVM])
            .output();
        ended.expect_status(2).expect_line(&[&path, needle]);
    };
    refused(b"", "");
    refused(b"{", "");
    refused(b"[]", "object");
    refused(br#" ["k"]"#, "object");
    refused(b"\xff\xfe", "");
    refused(br#"{"kernel": 1}"#, "kernel: ");
    refused(br#"{"kernel": "k", "colour": 2}"#, "`colour`");
    refused(br#"{"kernel": "k", "cpu": 2}"#, "cpu: ");
    refused(br#"{"kernel": "k", "cpu": "i486"}"#, "i486");
    refused(
        br#"{"kernel": "k", "cpus": {"count": 4, "dies": 2}}"#,
        "`dies`",
    );
    refused(br#"{"kernel": "k", "memory": "lots"}"#, "lots");
    refused(br#"{"kernel": "k", "memory": -1}"#, "memory: ");
    // Of what is long the middle is left out, and the place is told.
    let long = format!(r#"{{"kernel": "k", "memory": "{}"}}"#, "x".repeat(1 << 19));
    refused(long.as_bytes(), "characters …]");
    refused(long.as_bytes(), "at line 1 column");
    refused(br#"{"kernel": "k", "initrd": 5}"#, "initrd: ");
    refused(br#"{"kernel": "k", "cpus": 4294967296}"#, "4294967296");
    refused(br#"{"kernel": "k", "kernel": "k"}"#, "kernel");
    refused("[".repeat(100_000).as_bytes(), "");
    refused(&vec![b' '; (1 << 20) + 1], "1048577");
    for path in ["/no/such/config", "/"] {
        let ended = Vmm::command(["run", "--config", path]).output();
        ended.expect_status(2).expect_line(&[path]);
    }
    // It has no end.
    let ended = Vmm::command(["run", "--config", "/dev/zero"]).output();
    ended
        .expect_status(2)
        .expect_line(&["/dev/zero", "not a regular file"]);
    // What is valid JSON and cannot be is refused as on the command line.
    for (text, needle) in [
        ("{}", "--kernel"),
        (r#"{"kernel": "k", "cpus": 0}"#, "0 vCPUs"),
        (r#"{"kernel": "k", "memory": 0}"#, "0 bytes"),
        (r#"{"kernel": "", "cpus": 1}"#, "--kernel"),
        (r#"{"kernel": "k", "cmdline": "a\u0000b"}"#, "NUL"),
    ] {
        let config = file(text.as_bytes());
        let ended = Vmm::command(["run", "--config"]).arg(&config).output();
        ended.expect_status(2).expect_line(&[needle]);
    }
}

#[test]
fn a_pipe_is_no_configuration_and_no_processor_and_nothing_waits_for_its_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo.json");
    let path = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: a valid path.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    let fifo = fifo.to_str().unwrap();
    let needles = &[fifo, "not a regular file"];
    refused(&format!("--cpu {fifo}"), needles);
    refused(&format!("--config {fifo}"), needles);
    let config = file(format!(r#"{{"cpu": "{fifo}"}}"#).as_bytes());
    refused(&format!("--config {}", config.display()), needles);
    let ended = Vmm::command(["cpu", "--cpu", fifo]).output();
    ended.expect_status(2).expect_line(needles);
}

#[test]
fn a_kernel_beside_a_configuration_file_counts() {
    let kernel = elf(boot::hello64());
    for text in [
        r#"{"cpus": 2}"#,
        r#"{"cpus": 2, "kernel": "/no/such/kernel"}"#,
    ] {
        let config = file(text.as_bytes());
        let ended = run(&kernel).arg("--config").arg(&config).output();
        ended.expect_status(1).expect_line(&[NO_KVM]);
    }
}

#[test]
fn a_message_that_cannot_be_written_changes_no_status() {
    // stderr is a pipe whose reader has gone.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(support::binary());
    let status = command.arg("frob").stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(2));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(support::binary());
    assert!(
        command
            .args(["run", "--help"])
            .stdout(writer)
            .status()
            .unwrap()
            .success()
    );
    std::io::stdout().flush().unwrap();
}

/// Mutated images through the whole binary: whatever the bytes say, there is one line and status 2,
/// or everything is right and KVM is the only thing missing.
fn hostile(name: &str, image: &[u8], headers: usize) {
    let runs = if long() { 2000 } else { 60 };
    let (next, bootable) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= runs {
                        return;
                    }
                    let bytes = mutate(image, headers, &mut Random::new(seed as u64));
                    let kernel = file(&bytes);
                    let ended = run(&kernel).args(["--memory", "64M"]).output();
                    let code = ended.status.code();
                    assert!(matches!(code, Some(1 | 2)), "{name}, seed {seed}: {ended}");
                    let line = ended.one_line();
                    if code == Some(1) {
                        assert!(line.contains(NO_KVM), "{name}, seed {seed}: {ended}");
                        bootable.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    println!(
        "{name}: {} of {runs} mutants could start",
        bootable.into_inner()
    );
}

#[test]
fn hostile_elf_files_are_refused_or_planned() {
    hostile("elf64", &image::elf64(boot::hello64()), 64 + 56);
    hostile(
        "elf64 with a PVH note",
        &image::elf64_pvh(boot::pvh32()),
        64 + 2 * 56 + 20,
    );
}

#[test]
fn hostile_multiboot_images_are_refused_or_planned() {
    let image = image::multiboot(boot::multiboot32());
    hostile("multiboot", &image, 52 + 32);
    // The header is on the second page: rotate it into what is mutated.
    let header = image[4096..].to_vec();
    hostile(
        "multiboot's header",
        &[&header[..], &image[..]].concat(),
        48,
    );
}

#[test]
fn hostile_bzimages_are_refused_or_planned() {
    let image = image::bzimage(boot::hello64());
    hostile("bzImage", &image, 0x268);
    // The setup header alone.
    let mut random = Random::new(1);
    for _ in 0..if long() { 2000 } else { 60 } {
        let mut image = image.clone();
        let header = mutate(&image[0x1f1..0x268], 0x77, &mut random);
        image[0x1f1..0x1f1 + header.len()].copy_from_slice(&header);
        let kernel = file(&image);
        let ended = run(&kernel).args(["--memory", "64M"]).output();
        assert!(matches!(ended.status.code(), Some(1 | 2)), "{ended}");
        ended.one_line();
    }
}

#[test]
fn a_path_of_a_socket_that_is_something_else_is_said_to_be_that() {
    let (mine, folder) = (file(b"mine"), tempfile::tempdir().unwrap());
    let packets = folder.path().join("datagrams");
    let _bound = std::os::unix::net::UnixDatagram::bind(&packets).unwrap();
    let (mine, packets) = (mine.display(), packets.display());
    for (path, is) in [
        (mine.to_string(), "a regular file"),
        (folder.path().display().to_string(), "a directory"),
        (packets.to_string(), "a socket of another kind"),
    ] {
        for words in ["status", "migrate --to unix:/x"] {
            let ctl = Vmm::command(["ctl", "--api-sock", &path]).words(words);
            ctl.output().expect_status(1).expect_line(&[&path, is]);
        }
    }
    for (path, is) in [
        (mine.to_string(), "no socket"),
        (packets.to_string(), "another kind"),
    ] {
        let status = if is == "no socket" { 2 } else { 1 };
        refused_with(
            status,
            &format!("--api-sock {path}"),
            &["--api-sock", &path, is],
        );
        let waits = Vmm::command(["run", "--incoming"]).arg(format!("unix:{path}"));
        waits.output().expect_line(&["--incoming", &path, is]);
    }
}

#[test]
fn an_address_for_gdb_that_is_none_is_refused_with_its_value() {
    for none in [
        "1234",
        "tcp:",
        "tcp::1234",
        "tcp:localhost:1234",
        "tcp:127.0.0.1:65536",
        "unix:",
        "vsock:3:1234",
    ] {
        refused(
            &format!("--gdb {none}"),
            &["--gdb", none, "unix:PATH or tcp:ADDRESS:PORT"],
        );
    }
    refused("--gdb=", &["--gdb \"\"", "unix:PATH"]);
    // A file that is no socket is somebody's.
    let mine = file(b"mine");
    let path = mine.display().to_string();
    refused(&format!("--gdb unix:{path}"), &[&path, "no socket"]);
    assert_eq!(std::fs::read(&mine).unwrap(), b"mine");
}
