// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host that refuses any one of KVM's calls while a guest goes on from a snapshot: the monitor ends by itself with one
//! line, or does without the call. `LONG_TESTS=1` refuses every call; the short form each kind's first and last.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use guests::{image, keeper::keeper64};
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::end::EndSignal;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::SnapshotRequest;
use reference_vmm::vm::Machine;
use support::tracer::{Inject, Kind, Trace, trace};
use support::{WATCHDOG, file, long, need_kvm, not_one_line};

const ERRNOS: [i32; 4] = [libc::EINVAL, libc::ENOMEM, libc::EPERM, libc::EIO];

/// Goes on from `dir` with a `q` at its console, at which the guest ends.
fn restore(dir: &str, inject: &[Inject]) -> Trace {
    let typed = file(b"q");
    let stdin: OwnedFd = File::open(&typed).unwrap().into();
    trace(&["restore", "--from", dir], Some(stdin), inject, WATCHDOG)
}

#[test]
fn each_call_that_is_refused_ends_a_restore_with_one_line_or_is_done_without() {
    need_kvm();
    for irqchip in [Irqchip::Split, Irqchip::Kernel] {
        let kernel = file(&image::elf64(keeper64()));
        let config = Config {
            cmdline: "1 ".into(),
            memory: Memory::new(16 << 20),
            irqchip,
            debug_exit: Some(0xf4),
            ..Config::new(&*kernel)
        };
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let end = Arc::new(EndSignal::new().unwrap());
        let nowhere = File::create("/dev/null").unwrap();
        let machine = Machine::build(&config, nowhere, &end).unwrap();
        let running = machine.start().unwrap();
        running
            .snapshot(&SnapshotRequest::new(dir.clone()))
            .unwrap();
        drop(running);
        let dir = dir.to_str().unwrap();

        let good = restore(dir, &[]);
        assert_eq!(
            (good.status.code(), good.stderr.as_str()),
            (Some(1), ""),
            "{good}"
        );
        let mut calls: BTreeMap<Kind, Vec<usize>> = BTreeMap::new();
        for call in good.kvm().filter(|call| call.kind != Kind::kvm("KVM_RUN")) {
            calls.entry(call.kind.clone()).or_default().push(call.nth);
        }
        assert!(calls.len() > 24, "{calls:?}");
        let mut ended = 0;
        let all = calls.into_iter().flat_map(|(kind, mut nths)| {
            if !long() {
                nths.drain(1..nths.len().max(2) - 1);
            }
            nths.into_iter().map(move |nth| (kind.clone(), nth))
        });
        for (number, (kind, nth)) in all.enumerate() {
            let errno = ERRNOS[number % ERRNOS.len()];
            let inject = Inject { kind, nth, errno };
            let trace = restore(dir, std::slice::from_ref(&inject));
            assert_eq!(trace.hung, None, "{irqchip:?} {inject}: {trace}");
            // It hears the `q` at another moment each time, so not every run makes every call.
            if !trace.injected {
                continue;
            }
            if trace.stderr.is_empty() {
                assert_eq!(
                    trace.status.code(),
                    Some(1),
                    "{irqchip:?} {inject}: {trace}"
                );
                assert!(
                    trace.stdout.ends_with(b"!"),
                    "{irqchip:?} {inject}: {trace}"
                );
                continue;
            }
            ended += 1;
            assert_eq!(
                not_one_line(&trace.stderr),
                None,
                "{irqchip:?} {inject}: {trace}"
            );
            let status = trace.status.code();
            assert!(
                matches!(status, Some(1 | 2)),
                "{irqchip:?} {inject}: {trace}"
            );
            println!("{inject}\n    {}", trace.stderr.trim_end());
        }
        assert!(ended > 15, "{ended}");
    }
}
