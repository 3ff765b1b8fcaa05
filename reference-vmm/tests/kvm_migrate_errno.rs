// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host that a guest migrates to, and that refuses any one of KVM's calls: the guest is there, or has stayed, and has lost
//! nothing in either case. `LONG_TESTS=1` refuses every call; the short form the first of every sixth
//! kind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use reference_vmm::config::Irqchip;
use reference_vmm::end::Chain;
use reference_vmm::migration::outgoing::{MigrateRequest, Outgoing};
use reference_vmm::migration::source::WhenStuck;
use reference_vmm::vm::RunState;
use support::keeper::{Guest, keeper};
use support::tracer::{Call, Inject, Kind, Trace, trace};
use support::{WATCHDOG, long, need_kvm, not_one_line};

const ERRNOS: [i32; 4] = [libc::EINVAL, libc::ENOMEM, libc::EPERM, libc::EIO];

/// Has a guest migrate to a process that is traced, and end where it is then: the trace, and why it stayed.
fn come(irqchip: Irqchip, inject: &[Inject]) -> (Trace, Result<(), String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("incoming");
    let (_kernel, config) = keeper(1, irqchip);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (stdin, mut typed) = std::io::pipe().unwrap();
    let ended = AtomicBool::new(false);
    let (trace, moved) = std::thread::scope(|scope| {
        let here = scope.spawn(|| {
            let request = MigrateRequest {
                when_stuck: WhenStuck::Stop,
                ..MigrateRequest::new(format!("unix:{}", path.display()))
            };
            while !path.exists() && !ended.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            loop {
                let over = ended.load(Ordering::Acquire);
                let moved = Outgoing::default().migrate(&guest.running, &guest.end, &request);
                match moved {
                    Ok(_) => {
                        // It may have been lost there.
                        let _ = typed.write_all(b"q");
                        return Ok(());
                    }
                    Err(error) => {
                        let text = Chain(&error).to_string();
                        // Not yet, maybe.
                        if over || !text.contains("nobody listens") {
                            return Err(text);
                        }
                    }
                }
            }
        });
        let address = format!("unix:{}", path.display());
        let words = ["run", "--incoming", &address];
        let trace = trace(&words, Some(stdin.into()), inject, WATCHDOG);
        ended.store(true, Ordering::Release);
        (trace, here.join().unwrap())
    });
    match &moved {
        Ok(()) => {
            assert_eq!(guest.running.state(), RunState::Paused);
            assert!(guest.running.resume().is_err());
        }
        Err(_) => {
            assert_eq!(guest.running.state(), RunState::Running);
            guest.hear(2);
            guest.has_all();
        }
    }
    (trace, moved)
}

#[test]
fn each_call_that_is_refused_where_a_guest_comes_to_leaves_it_where_it_is_or_is_done_without() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let mut stayed = 0;
    for irqchip in [Irqchip::Split, Irqchip::Kernel] {
        let (good, moved) = come(irqchip, &[]);
        moved.unwrap();
        assert_eq!(good.status.code(), Some(1), "{good}");
        let runs = |call: &&Call| call.kind == Kind::kvm("KVM_RUN");
        let mut kinds = BTreeSet::new();
        let ahead = good.kvm().take_while(|call| !runs(call));
        let calls: Vec<_> = ahead
            .filter(|call| long() || kinds.insert(call.kind.clone()))
            .map(|call| (call.kind.clone(), call.nth))
            .step_by(if long() { 1 } else { 6 })
            .collect();
        assert!(calls.len() > 4, "{calls:?}");
        for (number, (kind, nth)) in calls.into_iter().enumerate() {
            let errno = ERRNOS[number % ERRNOS.len()];
            let inject = Inject { kind, nth, errno };
            let (trace, moved) = come(irqchip, std::slice::from_ref(&inject));
            let what = format!("{irqchip:?} {inject}: {moved:?} {trace}");
            println!("{inject}\n    {moved:?}\n    {}", trace.stderr.trim_end());
            assert!(trace.injected && trace.hung.is_none(), "{what}");
            if moved.is_ok() {
                assert_eq!(trace.status.code(), Some(1), "{what}");
                assert!(trace.stdout.ends_with(b"!"), "{what}");
            } else {
                stayed += 1;
                let status = trace.status.code();
                assert!(matches!(status, Some(1 | 2)), "{what}");
                assert!(trace.stdout.is_empty(), "{what}");
                let lines: Vec<_> = trace.stderr.lines().collect();
                // What waits for a guest says so.
                let last = lines.last().unwrap_or(&"");
                assert_eq!(not_one_line(last), None, "{what}");
            }
        }
    }
    assert!(stayed > 5, "{stayed}");
}
