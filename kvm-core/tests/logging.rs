// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! No guest makes the log flow, and what was suppressed is told.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use kvm_core::logging::{Admission, Occurrence, OncePerKey, RateLimit};
use kvm_core::{
    Identity, VcpuId, kvm_debug, kvm_err, kvm_info, kvm_pr_unimpl, vcpu_debug, vcpu_unimpl,
};
use proptest::prelude::*;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A naive limit: the begin of its window, what passed in it, and what is untold.
#[derive(Default)]
struct Model {
    window: Option<(u64, u16)>,
    untold: u64,
}

impl Model {
    fn admit(&mut self, now: u64, interval: u64, burst: u16) -> Admission {
        let passed = match self.window {
            Some((began, passed)) if now < began + interval => passed,
            _ => 0,
        };
        if passed >= burst {
            self.untold += 1;
            return Admission::Suppressed;
        }
        let began = match self.window {
            Some((began, _)) if passed > 0 => began,
            _ => now,
        };
        self.window = Some((began, passed + 1));
        Admission::Passed {
            suppressed: std::mem::take(&mut self.untold),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn a_limit_passes_what_a_naive_one_passes(
        interval in 1_u64..5_000,
        burst in 0_u16..6,
        steps in proptest::collection::vec(0_u64..3_000, 0..200),
    ) {
        let limit = RateLimit::new(MS(interval), burst);
        let mut model = Model::default();
        let mut now = 0;
        for step in steps {
            now += step;
            prop_assert_eq!(limit.admit(MS(now)), model.admit(now, interval, burst));
            prop_assert_eq!(limit.untold(), model.untold);
        }
    }

    #[test]
    fn a_key_is_logged_once_for_as_long_as_there_is_room(keys in proptest::collection::vec(0_u64..200, 0..600)) {
        let once = OncePerKey::new();
        let vm = Identity::vm("a");
        let mut logged = HashSet::new();
        let mut extra = 0;
        for key in keys {
            let occurrence = once.occurred(&vm, key, MS(0));
            if logged.contains(&key) {
                prop_assert_eq!(occurrence, Occurrence::Repeated);
            } else if logged.len() < OncePerKey::CAPACITY {
                prop_assert_eq!(occurrence, Occurrence::Logged { suppressed: 0 });
                logged.insert(key);
            } else if extra == 0 {
                prop_assert_eq!(occurrence, Occurrence::Logged { suppressed: 0 });
                extra += 1;
            } else {
                prop_assert_eq!(occurrence, Occurrence::Suppressed);
            }
        }
    }
}

#[test]
fn threads_together_pass_no_more_than_the_burst_and_lose_no_count() {
    let limit = Arc::new(RateLimit::new(MS(1_000), 10));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let limit = limit.clone();
            thread::spawn(move || {
                let (mut passed, mut told) = (0, 0);
                for call in 0..10_000 {
                    if let Admission::Passed { suppressed } = limit.admit(MS(call / 2_500)) {
                        passed += 1;
                        told += suppressed;
                    }
                }
                (passed, told)
            })
        })
        .collect();
    let sums = threads.into_iter().map(|t| t.join().unwrap());
    let (passed, told) = sums.fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    assert_eq!(passed, 10);
    assert_eq!(passed + told + limit.untold(), 40_000);
}

#[test]
fn threads_that_come_with_one_key_log_it_once() {
    let once = Arc::new(OncePerKey::new());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let once = once.clone();
            thread::spawn(move || {
                let vm = Identity::vm("a");
                (0..OncePerKey::CAPACITY as u64)
                    .filter(|key| {
                        matches!(once.occurred(&vm, *key, MS(0)), Occurrence::Logged { .. })
                    })
                    .count()
            })
        })
        .collect();
    let logged: usize = threads.into_iter().map(|t| t.join().unwrap()).sum();
    assert_eq!(logged, OncePerKey::CAPACITY);
    assert_eq!(once.repeats(), 3 * OncePerKey::CAPACITY as u64);
}

#[test]
fn a_guest_that_varies_its_key_gets_a_line_a_minute_that_says_how_many_there_were() {
    let once = OncePerKey::new();
    let vm = Identity::vm("a");
    let mut lines = 0;
    for key in 0..1_000_000 {
        if matches!(once.occurred(&vm, key, MS(0)), Occurrence::Logged { .. }) {
            lines += 1;
        }
    }
    assert_eq!(lines, OncePerKey::CAPACITY + 1);
    let later = once.occurred(&vm, 1 << 40, OncePerKey::INTERVAL);
    let suppressed = 1_000_000 - OncePerKey::CAPACITY as u64 - 1;
    assert_eq!(later, Occurrence::Logged { suppressed });
}

#[test]
fn another_vm_has_its_own_first_line_and_another_vcpu_has_not() {
    let once = OncePerKey::new();
    let logged = Occurrence::Logged { suppressed: 0 };
    assert_eq!(
        once.occurred(&Identity::vm("a").vcpu(VcpuId(0)), 7, MS(0)),
        logged
    );
    assert_eq!(
        once.occurred(&Identity::vm("b").vcpu(VcpuId(0)), 7, MS(0)),
        logged
    );
    assert_eq!(
        once.occurred(&Identity::vm("a").vcpu(VcpuId(1)), 7, MS(0)),
        Occurrence::Repeated
    );
    // Any key is one: the ends of the range too.
    assert_eq!(once.occurred(&Identity::vm("a"), 0, MS(0)), logged);
    assert_eq!(once.occurred(&Identity::vm("a"), u64::MAX, MS(0)), logged);
    assert_eq!(
        once.occurred(&Identity::vm("a"), u64::MAX, MS(0)),
        Occurrence::Repeated
    );
}

#[test]
fn a_clock_that_a_thread_reads_late_does_not_open_the_window_again() {
    let limit = RateLimit::new(MS(1_000), 1);
    assert_eq!(limit.admit(MS(5_000)), Admission::Passed { suppressed: 0 });
    assert_eq!(limit.admit(MS(10)), Admission::Suppressed);
    assert_eq!(
        limit.admit(Duration::MAX),
        Admission::Passed { suppressed: 1 }
    );
    assert_eq!(limit.admit(Duration::MAX), Admission::Suppressed);
}

/// The lines logged so far, of the whole process: tests look for their own.
fn lines() -> &'static Mutex<Vec<String>> {
    struct Keep;
    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    static SET: OnceLock<()> = OnceLock::new();
    impl log::Log for Keep {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            let line = format!("{} {} {}", record.level(), record.target(), record.args());
            LINES.lock().unwrap().push(line);
        }
        fn flush(&self) {}
    }
    SET.get_or_init(|| {
        log::set_logger(&Keep).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
    &LINES
}

fn of(vm: &str) -> Vec<String> {
    let all = lines().lock().unwrap();
    let mine = format!("vm {vm}");
    all.iter()
        .filter(|line| line.contains(&mine))
        .cloned()
        .collect()
}

#[test]
fn a_line_says_its_level_where_it_is_from_and_who_it_is_about() {
    lines();
    let vm = Identity::vm("lines");
    let vcpu = vm.vcpu(VcpuId(2));
    kvm_err!(&vm, "no {}", "clock");
    kvm_info!(&vm, "hello");
    kvm_debug!(&vm, "a detail");
    vcpu_debug!(&vcpu, "its detail");
    kvm_pr_unimpl!(&vm, 1; "no hypercall {:#x}", 1);
    vcpu_unimpl!(Info, &vcpu, 0x570; "no MSR {:#x}", 0x570);
    assert_eq!(
        of("lines"),
        [
            "ERROR logging vm lines: no clock",
            "INFO logging vm lines: hello",
            "DEBUG logging vm lines: a detail",
            "DEBUG logging vm lines vcpu 2: its detail",
            "WARN logging vm lines: no hypercall 0x1",
            "INFO logging vm lines vcpu 2: no MSR 0x570",
        ]
    );
}

#[test]
fn what_is_suppressed_is_not_even_put_into_words() {
    lines();
    let vm = Identity::vm("words");
    let mut made = 0;
    let mut word = || {
        made += 1;
        "said"
    };
    for _ in 0..1_000 {
        vcpu_unimpl!(&vm, 9; "{}", word());
    }
    assert_eq!((made, of("words").len()), (1, 1));
}

#[test]
fn a_level_that_is_off_uses_nothing_up() {
    lines();
    let vm = Identity::vm("off");
    let say = |key| kvm_pr_unimpl!(Trace, &vm, key; "never");
    (0..1_000).for_each(say);
    assert!(of("off").is_empty());
}
