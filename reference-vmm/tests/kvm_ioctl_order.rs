// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The order of set-up (`vm/mod.rs` has it with its reasons) in the ioctls of a real run: what costs a
//! grace period inside KVM is not asked for, or asked for where it costs none, and nothing is asked
//! twice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use guests::{boot, console, monitor};
use reference_vmm::config::Irqchip;
use reference_vmm::snapshot::SnapshotRequest;
use support::keeper::{Guest, keeper};
use support::tracer::{Inject, Kind, Trace, trace};
use support::{WATCHDOG, elf, file, need_kvm};

/// What registers on KVM's I/O buses or replaces its routing table. A slot made after one of these
/// waits for a grace period.
const BUS_USERS: [&str; 7] = [
    "KVM_CREATE_IRQCHIP",
    "KVM_CREATE_PIT2",
    "KVM_IOEVENTFD",
    "KVM_IRQFD",
    "KVM_SET_GSI_ROUTING",
    "KVM_ENABLE_CAP",
    "KVM_REGISTER_COALESCED_MMIO",
];

fn run(words: &str) -> Trace {
    need_kvm();
    let kernel = elf(boot::hello64());
    let mut args = vec!["run", "--debug-exit", "--kernel", kernel.to_str().unwrap()];
    args.extend(words.split_whitespace());
    let trace = trace(&args, None, &[], WATCHDOG);
    assert_eq!(trace.status.code(), Some(1), "{words}: {trace}");
    assert_eq!(trace.stdout, b"hello\n", "{words}: {trace}");
    trace
}

fn listing(trace: &Trace) -> String {
    trace.kvm().map(|call| format!("{call}\n")).collect()
}

/// Asserts that no `late` call comes before the last `early` one.
fn all_before(trace: &Trace, early: &str, late: &str) {
    let last = trace.positions(early).pop();
    let first = trace.positions(late).first().copied();
    if let (Some(last), Some(first)) = (last, first) {
        assert!(last < first, "{early} after {late}:\n{}", listing(trace));
    }
}

const IRQCHIPS: [&str; 4] = [
    "--irqchip none",
    "--irqchip split",
    "--irqchip kernel",
    "--irqchip kernel --pit",
];

#[test]
fn memory_slots_come_before_whatever_uses_kvms_buses() {
    for words in IRQCHIPS {
        // 6 GiB has two slots, and firmware cuts the first in three: all come first.
        let firmware = if words.contains("none") { 0 } else { 2 };
        for (memory, ranges) in [(" --memory 128M", 1), (" --memory 6G", 2)] {
            let trace = run(&format!("{words}{memory}"));
            let slots = trace.positions("KVM_SET_USER_MEMORY_REGION").len()
                + trace.positions("KVM_SET_USER_MEMORY_REGION2").len();
            assert_eq!(slots, ranges + firmware, "{}", listing(&trace));
            for late in BUS_USERS {
                all_before(&trace, "KVM_SET_USER_MEMORY_REGION", late);
                all_before(&trace, "KVM_SET_USER_MEMORY_REGION2", late);
            }
        }
    }
}

#[test]
fn readers_barriers_are_made_free_before_there_is_a_second_thread() {
    // With one, registering with membarrier waits for a grace period of the whole kernel.
    const REGISTER: u64 = 1 << 4;
    for words in IRQCHIPS {
        let trace = run(words);
        let at =
            |wanted: &dyn Fn(&support::tracer::Call) -> bool| trace.calls.iter().position(wanted);
        let is = |call: &support::tracer::Call, numbers: &[i64]| matches!(call.kind, Kind::Syscall(nr) | Kind::Elsewhere(nr) if numbers.contains(&nr));
        let registered = at(&|call| is(call, &[libc::SYS_membarrier]) && call.args[0] == REGISTER);
        let thread = at(&|call| is(call, &[libc::SYS_clone, libc::SYS_clone3]));
        assert!(registered.is_some() && thread.is_some(), "{trace}");
        assert!(registered < thread, "{trace}");
    }
}

#[test]
fn memory_that_no_guest_of_this_host_can_address_is_refused_before_there_is_a_vm() {
    need_kvm();
    let kernel = elf(boot::hello64());
    let bits = address_bits();
    // `--memory` itself ends at 2^51 bytes.
    if bits > 51 {
        return println!("NOT TRIED: this host has {bits} address bits");
    }
    let size = (1u64 << bits).to_string();
    // More pages in the pool would not help.
    for pages in ["", ",hugepages=2M"] {
        let memory = format!("{size}{pages}");
        let args = [
            "run",
            "--memory",
            &memory,
            "--kernel",
            kernel.to_str().unwrap(),
        ];
        let trace = trace(&args, None, &[], WATCHDOG);
        assert_eq!(trace.status.code(), Some(2), "{trace}");
        assert!(trace.stderr.contains(&size), "{trace}");
        let bits = format!("{bits} address bits");
        assert!(trace.stderr.contains(&bits), "{trace}");
        for late in ["KVM_CREATE_VM", "KVM_SET_USER_MEMORY_REGION"] {
            assert!(trace.positions(late).is_empty(), "{trace}");
        }
    }
}

/// What KVM says that a guest can address: the processor's bits, or fewer where KVM maps fewer.
fn address_bits() -> u32 {
    let kvm = kvm_core::Kvm::open_at(std::path::Path::new("/dev/kvm")).unwrap();
    let cpuid = kvm.supported_cpuid().unwrap();
    let mut leaves = cpuid.as_slice().iter();
    let leaf = leaves.find(|leaf| leaf.function == 0x8000_0008).unwrap();
    match (leaf.eax & 0xff, leaf.eax >> 16 & 0xff) {
        (bits, 0) => bits,
        (bits, mapped) => bits.min(mapped),
    }
}

#[test]
fn the_irqchip_comes_before_the_first_vcpu() {
    for words in IRQCHIPS {
        // Without local APICs there is one vCPU.
        let cpus = if words.contains("none") { 1 } else { 2 };
        let trace = run(&format!("{words} --cpus {cpus}"));
        for early in ["KVM_CREATE_IRQCHIP", "KVM_CREATE_PIT2", "KVM_SET_TSS_ADDR"] {
            all_before(&trace, early, "KVM_CREATE_VCPU");
        }
        let created = trace.positions("KVM_CREATE_IRQCHIP").len();
        assert_eq!(
            created,
            usize::from(words.contains("kernel")),
            "{}",
            listing(&trace)
        );
        assert_eq!(
            trace.positions("KVM_CREATE_VCPU").len(),
            cpus,
            "{}",
            listing(&trace)
        );
    }
}

#[test]
fn a_guest_that_needs_no_interrupt_costs_no_routing_no_irqfd_and_no_ioeventfd() {
    for words in IRQCHIPS {
        let trace = run(words);
        for avoidable in [
            "KVM_SET_GSI_ROUTING",
            "KVM_IOEVENTFD",
            "KVM_IRQFD",
            "KVM_REGISTER_COALESCED_MMIO",
        ] {
            let made = trace.positions(avoidable);
            assert!(made.is_empty(), "{words}: {avoidable}\n{}", listing(&trace));
        }
    }
}

#[test]
fn a_virtio_device_that_its_guest_leaves_alone_costs_kvm_nothing() {
    for words in ["--irqchip split", "--irqchip kernel"] {
        let (without, with) = (run(words), run(&format!("{words} --rng")));
        assert_eq!(
            without.kvm_counts(),
            with.kvm_counts(),
            "{}",
            listing(&with)
        );
        // Nor a thread.
        assert!(
            !with.calls.iter().any(|call| call.thread == "rng"),
            "{with}"
        );
    }
}

#[test]
fn an_interrupt_costs_no_routes_and_an_irqfd_only_where_kvm_has_the_pin() {
    need_kvm();
    let kernel = elf(monitor::echo_irq64());
    for (irqchip, irqfds, messages) in [("split", 0..=0, 1..=8), ("kernel", 1..=1, 0..=0)] {
        let mut args = vec!["run", "--debug-exit", "--irqchip", irqchip, "--kernel"];
        args.push(kernel.to_str().unwrap());
        let (reader, writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut { writer }, b"hello q").unwrap();
        let trace = trace(&args, Some(reader.into()), &[], WATCHDOG);
        assert_eq!(trace.status.code(), Some(0x21), "{trace}");
        let count = |name| trace.positions(name).len();
        for (name, wanted) in [
            ("KVM_SET_GSI_ROUTING", 0..=0),
            ("KVM_IOEVENTFD", 0..=0),
            ("KVM_IRQFD", irqfds),
            ("KVM_SIGNAL_MSI", messages),
        ] {
            assert!(
                wanted.contains(&count(name)),
                "{irqchip}: {name}\n{}",
                listing(&trace)
            );
        }
    }
}

#[test]
fn no_slot_is_deleted_one_by_one_at_the_end() {
    // Deleting a slot waits for a grace period; the process's end frees a VM at once.
    for words in ["--memory 128M", "--memory 6G --cpus 2"] {
        let trace = run(words);
        all_before(&trace, "KVM_SET_USER_MEMORY_REGION", "KVM_RUN");
    }
}

#[test]
fn a_coalesced_zone_comes_from_a_thread_of_its_own_when_a_guest_has_written_much() {
    need_kvm();
    let kernel = elf(console::polled64());
    let kernel = kernel.to_str().unwrap();
    for (much, zones, ends) in [("255e", 0, 0), ("20000e", 1, 0), ("20000i", 1, 1)] {
        let args = ["run", "--debug-exit", "--kernel", kernel, "--cmdline", much];
        let trace = trace(&args, None, &[], WATCHDOG);
        assert_eq!(trace.status.code(), Some(1), "{trace}");
        let kind = Kind::kvm("KVM_REGISTER_COALESCED_MMIO");
        let made: Vec<_> = trace.kvm().filter(|call| call.kind == kind).collect();
        assert_eq!(made.len(), zones, "{much}: {}", listing(&trace));
        // The vCPU does not wait for the grace period, and the process's end for no other: a zone
        // ends before its VM only if the guest goes on by interrupts.
        let kind = Kind::kvm("KVM_UNREGISTER_COALESCED_MMIO");
        let ended: Vec<_> = trace.kvm().filter(|call| call.kind == kind).collect();
        assert_eq!(ended.len(), ends, "{much}: {}", listing(&trace));
        let mut both = made.into_iter().chain(ended);
        assert!(both.all(|call| call.thread == "com1-drain"));
    }
}

#[test]
fn what_need_not_be_repeated_is_done_once() {
    for words in IRQCHIPS {
        let trace = run(words);
        for (name, count) in trace.kvm_counts() {
            let repeats = match &*name {
                // Each asks something else, or runs again after an exit.
                "KVM_CHECK_EXTENSION" | "KVM_RUN" => usize::MAX,
                // Each enables something else.
                "KVM_ENABLE_CAP" => 4,
                // How long the list is, then the list.
                "KVM_GET_MSR_INDEX_LIST" | "KVM_GET_SUPPORTED_CPUID" => 2,
                // One a slot.
                "KVM_SET_USER_MEMORY_REGION" if !words.contains("none") => 3,
                _ => 1,
            };
            assert!(
                count <= repeats,
                "{words}: {name} {count} times\n{}",
                listing(&trace)
            );
        }
        let mut asked: Vec<_> = trace
            .kvm()
            .filter(|call| call.kind == Kind::kvm("KVM_CHECK_EXTENSION"))
            .map(|call| (call.args[0], call.args[2]))
            .collect();
        asked.sort_unstable();
        let all = asked.len();
        asked.dedup();
        assert_eq!(
            asked.len(),
            all,
            "{words}: a capability asked twice\n{}",
            listing(&trace)
        );
    }
}

#[test]
fn a_restore_that_reads_no_memory_first_makes_one_vm() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshot");
    let (_kernel, config) = keeper(2, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    let typed = file(b"q");
    for how in ["--lazy", "--map=on"] {
        let args = ["restore", how, "--from", dir.to_str().unwrap()];
        let stdin = std::fs::File::open(&typed).unwrap();
        let trace = trace(&args, Some(stdin.into()), &[], WATCHDOG);
        assert_eq!(trace.status.code(), Some(1), "{how}: {trace}");
        // Also where KVM gives more than it lists, without hardware virtualization: a vCPU of the machine's shows that.
        let made = trace.positions("KVM_CREATE_VM").len();
        assert_eq!(made, 1, "{how}:\n{}", listing(&trace));
    }
}

#[test]
fn a_start_that_fails_has_run_nothing_of_the_guest() {
    need_kvm();
    let kernel = elf(boot::hello64());
    let kernel = kernel.to_str().unwrap();
    let args = ["run", "--debug-exit", "--cpus", "16", "--kernel", kernel];
    // The last thread that is started is a vCPU's.
    let good = trace(&args, None, &[], WATCHDOG);
    let calls = good.calls.iter();
    let mut threads = calls.filter(|call| call.kind == Kind::Syscall(libc::SYS_clone3));
    let last = threads.next_back().unwrap();
    let inject = Inject {
        kind: last.kind.clone(),
        nth: last.nth,
        errno: libc::EAGAIN,
    };
    let trace = trace(&args, None, &[inject], WATCHDOG);
    assert!(trace.injected && trace.hung.is_none(), "{trace}");
    assert_eq!(trace.status.code(), Some(1), "{trace}");
    assert!(trace.stderr.contains("start a vCPU thread"), "{trace}");
    assert!(trace.stdout.is_empty(), "{trace}");
    let ran = |call: &support::tracer::Call| call.thread == "vcpu0";
    assert!(!trace.calls.iter().any(ran), "{}", listing(&trace));
}

#[test]
fn a_vcpu_more_costs_its_own_calls_alone() {
    let (one, three) = (run("--cpus 1"), run("--cpus 3"));
    let (one, three) = (one.kvm_counts(), three.kvm_counts());
    for (name, count) in &three {
        if !PER_VCPU.contains(&&**name) {
            assert_eq!(Some(count), one.get(name), "{name}");
        }
    }
}

/// Made on each vCPU.
const PER_VCPU: &[&str] = &[
    "KVM_CREATE_VCPU",
    "KVM_SET_CPUID2",
    "KVM_X86_SETUP_MCE",
    "KVM_SET_MSRS",
    "KVM_GET_LAPIC",
    "KVM_SET_LAPIC",
    "KVM_GET_SREGS",
    "KVM_SET_SREGS",
    "KVM_SET_REGS",
    "KVM_SET_FPU",
    "KVM_SET_MP_STATE",
    "KVM_RUN",
];
