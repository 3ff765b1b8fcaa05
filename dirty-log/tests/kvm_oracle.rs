// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel is the oracle, for every way of KVM's to log: vCPUs write pseudo-random pages by themselves
//! while harvests run, and the VMM writes too. The union of what was harvested is exactly what they wrote;
//! and what was copied after the harvests is, in the end, what is in memory. The first fails where a bit
//! is lost or made up; the second where a page is watched again too late.
//!
//! `LONG_TESTS=1` makes it 1,500 rounds for each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Machine, Order, Random, long};
use dirty_log::{
    DirtyLog, DirtySource, Harvest, KvmBitmap, KvmManualBitmap, LogChoice, LogInForce, PAGE_SIZE,
    PageRun, RingSize, Union,
};

const PAGES: u64 = 1024;

/// What a copier has, over all of its harvests.
struct Copier {
    shadow: Vec<u8>,
    seen: BTreeSet<u64>,
    random: Random,
}

impl Copier {
    /// Copies what is on offer, all, half, or nothing, and forgets as much.
    fn deal_with(&mut self, machine: &Machine, mut harvest: Harvest<'_>) {
        let whim = self.random.below(4);
        if whim == 0 {
            return; // the wire broke before anything was sent
        }
        let runs: Vec<PageRun> = harvest.runs().collect();
        let sent = if whim == 1 {
            runs.len() / 2
        } else {
            runs.len()
        };
        for run in &runs[..sent] {
            for page in run.first..run.end() {
                let at = (page * PAGE_SIZE) as usize;
                machine.copy(page, &mut self.shadow[at..at + PAGE_SIZE as usize]);
                self.seen.insert(page);
            }
            if whim == 1 {
                harvest.forget(*run).unwrap();
            }
        }
        if whim > 1 {
            harvest.commit();
        }
    }

    /// One look: whole, or in parts.
    fn look(&mut self, machine: &Machine, log: &mut DirtyLog<Union>) {
        if self.random.below(2) == 0 {
            self.deal_with(machine, log.harvest().unwrap());
            return;
        }
        let mut parts = log.parts(64 << self.random.below(4)).unwrap();
        while let Some(part) = parts.next_part().unwrap() {
            self.deal_with(machine, part);
            if self.random.below(16) == 0 {
                return; // the round is given up half-way
            }
        }
    }
}

fn kvm_source(machine: &Machine) -> Box<dyn DirtySource + Send> {
    let extent = machine.extent();
    match machine.in_force {
        LogInForce::Bitmap => Box::new(KvmBitmap::new(machine.vm.clone(), extent).unwrap()),
        LogInForce::ManualProtect { .. } => Box::new(
            KvmManualBitmap::new(machine.vm.clone(), extent)
                .unwrap()
                .with_chunk(192),
        ),
        LogInForce::Ring(_) => Box::new(machine.rings.log(&extent).unwrap()),
        other => panic!("{other:?}"),
    }
}

fn oracle(choice: LogChoice, vcpus: usize, short: u64) {
    let mut machine = Machine::new(choice, PAGES);
    let source = Union::new(PAGES)
        .with(kvm_source(&machine))
        .unwrap()
        .with(machine.writes.clone())
        .unwrap();
    let mut log = DirtyLog::new(machine.extent(), source).unwrap();
    machine.install(true);
    machine.start(vcpus);
    let first = log.harvest().unwrap();
    let initially_set = LogInForce::ManualProtect {
        initially_set: true,
    };
    let at_first = if machine.in_force == initially_set {
        PAGES
    } else {
        0
    };
    assert_eq!(first.count(), at_first, "what a log begins with");
    first.commit();

    let mut random = Random(0x1234_5678_9abc_def1 + vcpus as u64);
    let mut copier = Copier {
        shadow: machine.contents().to_vec(),
        seen: BTreeSet::new(),
        random: Random(99),
    };
    let rounds = if long() { 1500 } else { short };
    let mut looks = 0;
    for round in 0..rounds {
        copier.seen.clear();
        let orders: Vec<Order> = (0..vcpus)
            .map(|_| Order {
                state: random.below(1 << 32) as u32,
                steps: 1 + random.below(1500) as u32,
            })
            .collect();
        let mut wrote: BTreeSet<u64> = orders.iter().flat_map(|order| order.pages(PAGES)).collect();
        machine.give(&orders);
        let mut running = vcpus;
        while running > 0 {
            if random.below(2) == 0 {
                let page = random.below(PAGES);
                machine.vmm_writes(page, round << 32 | looks);
                wrote.insert(page);
            }
            copier.look(&machine, &mut log);
            looks += 1;
            running -= machine.finished();
        }
        // All have stopped: what is left now is the last stop's.
        let last = log.harvest().unwrap();
        copier.random = Random(copier.random.below(u64::MAX) | 1);
        for run in last.runs() {
            for page in run.first..run.end() {
                let at = (page * PAGE_SIZE) as usize;
                machine.copy(page, &mut copier.shadow[at..at + PAGE_SIZE as usize]);
                copier.seen.insert(page);
            }
        }
        last.commit();
        let missing: Vec<_> = wrote.difference(&copier.seen).collect();
        let made_up: Vec<_> = copier.seen.difference(&wrote).collect();
        assert!(
            missing.is_empty() && made_up.is_empty(),
            "round {round}: missing {missing:?}, never written {made_up:?}"
        );
        assert!(
            copier.shadow == machine.contents(),
            "round {round}: the copy is not what is in memory"
        );
    }
    assert!(log.harvest().unwrap().bitmap().is_clean());
    println!("{looks} looks in {rounds} rounds");
    if matches!(machine.in_force, LogInForce::Ring(_)) {
        assert_eq!(machine.rings.unknown().0, 0, "all slots that log are known");
    }
}

fn manual(initially_set: bool) -> LogChoice {
    LogChoice::ManualProtect { initially_set }
}

/// The largest: a host that interprets its guests makes an entry for each write.
fn ring() -> LogChoice {
    LogChoice::Ring(RingSize::MAX)
}

#[test]
fn the_bitmap_misses_nothing_with_one_vcpu() {
    oracle(LogChoice::Bitmap, 1, 30);
}

#[test]
fn the_bitmap_misses_nothing_with_three_vcpus() {
    oracle(LogChoice::Bitmap, 3, 15);
}

#[test]
fn manual_protect_misses_nothing_with_one_vcpu() {
    oracle(manual(false), 1, 30);
}

#[test]
fn manual_protect_misses_nothing_with_three_vcpus() {
    oracle(manual(false), 3, 15);
}

#[test]
fn manual_protect_initially_set_misses_nothing() {
    oracle(manual(true), 2, 15);
}

#[test]
fn the_ring_misses_nothing_with_one_vcpu() {
    oracle(ring(), 1, 30);
}

#[test]
fn the_ring_misses_nothing_with_three_vcpus() {
    oracle(ring(), 3, 15);
}

extern "C" fn nothing(_: libc::c_int) {}

/// Runs `work` while another thread sends this one a signal, as fast as it can.
fn in_a_storm<T>(work: impl FnOnce() -> T) -> T {
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: a handler that does nothing; nothing else in this program uses the signal.
    unsafe { libc::signal(libc::SIGUSR2, handler as libc::sighandler_t) };
    // SAFETY: no argument.
    let target = unsafe { libc::pthread_self() };
    let stop = Arc::new(AtomicBool::new(false));
    let storm = {
        let stop = stop.clone();
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: the thread lives until this one is joined.
                unsafe { libc::pthread_kill(target, libc::SIGUSR2) };
            }
        })
    };
    // The storm is ended also where the work panics.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    stop.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Linux 6.16 and later leave pages unwatched where a signal meets the reset: none does, and nothing has to
/// be suspected.
#[test]
fn no_signal_meets_the_reset_of_a_full_ring() {
    const MANY: u64 = 8192;
    let mut machine = Machine::new(ring(), MANY);
    let mut log = DirtyLog::new(machine.extent(), kvm_source(&machine)).unwrap();
    machine.install(true);
    machine.start(2);
    for round in 0..if long() { 200 } else { 4 } {
        let orders = [2 * round + 1, 2 * round + 2].map(|state| Order {
            state,
            steps: 15_000,
        });
        machine.give(&orders);
        machine.wait_one();
        machine.wait_one();
        let reaped = in_a_storm(|| machine.rings.reap().unwrap());
        assert!(reaped.entries > 5000, "{reaped:?}");
        assert!(!reaped.suspect && !reaped.overrun, "{reaped:?}");
        let wrote: BTreeSet<u64> = orders.iter().flat_map(|order| order.pages(MANY)).collect();
        let harvest = log.harvest().unwrap();
        let seen: BTreeSet<u64> = harvest
            .runs()
            .flat_map(|run| run.first..run.end())
            .collect();
        assert!(seen == wrote, "round {round}");
        harvest.commit();
    }
}

/// No harvest runs: rings fill, vCPUs leave the guest, and what they reap waits for the next harvest. Where
/// the host's KVM overruns its rings, that is noticed, and every page counts as dirty.
#[test]
fn a_ring_that_fills_is_reaped_by_its_vcpu_and_loses_nothing() {
    const MANY: u64 = 8192;
    let small = LogChoice::Ring(RingSize::new(1024).unwrap());
    let mut machine = Machine::new(small, MANY);
    let mut log = DirtyLog::new(machine.extent(), kvm_source(&machine)).unwrap();
    machine.install(true);
    machine.start(2);
    let orders = [11, 12].map(|state| Order {
        state,
        steps: 20_000,
    });
    machine.give(&orders);
    machine.wait_one();
    machine.wait_one();
    let mut told = Vec::new();
    machine
        .rings
        .told(|vcpu, entries| told.push((vcpu, entries)));
    assert!(
        told.iter().all(|(_, entries)| *entries > 1024),
        "the rings were full: {told:?}"
    );
    let wrote: BTreeSet<u64> = orders.iter().flat_map(|order| order.pages(MANY)).collect();
    let harvest = log.harvest().unwrap();
    let seen: BTreeSet<u64> = harvest
        .runs()
        .flat_map(|run| run.first..run.end())
        .collect();
    harvest.commit();
    if log.harvest().unwrap().count() == MANY {
        println!("this host's KVM overran its rings; all {MANY} pages count as dirty");
        assert_eq!(seen.len() as u64, MANY);
        assert!(!machine.rings.trust(), "an overrun is for good");
        // The lab's kvm_amd runs the guest on (an emulated) processor, and stops at the soft limit.
        assert!(std::env::var_os("REFERENCE_VMM_LAB").is_none());
    } else {
        assert_eq!(seen, wrote);
    }
}
