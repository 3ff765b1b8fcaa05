// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel is the oracle: thousands of random tables, and KVM and this crate give one verdict.
//! `LONG_TESTS=1` asks many more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;

use irq_routing::host::SetGsiRouting;
use irq_routing::kvm::abi;
use irq_routing::{
    Chip, ChipPin, Gsi, Irqchip, IrqchipError, IrqchipKind, Pit, Route, Routing, Rules, Table,
    XenEvtchn,
};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

const KINDS: [IrqchipKind; 3] = [
    IrqchipKind::None,
    IrqchipKind::Kernel { pit: Pit::Absent },
    IrqchipKind::Split { pins: 24 },
];

/// KVM's verdict on a table of any size and content, which kvm-ioctls would not let through.
fn kvm_takes(vm: &VmFd, entries: &[kvm_irq_routing_entry]) -> bool {
    const KVM_SET_GSI_ROUTING: libc::c_ulong = 0x4008_ae6a;
    // The header (nr, flags), then the entries; u64s give the alignment.
    const WORDS: usize = size_of::<kvm_irq_routing_entry>() / size_of::<u64>();
    let mut buffer = vec![0u64; 1 + entries.len() * WORDS];
    buffer[0] = entries.len() as u64;
    // SAFETY: the buffer has room for the entries after its first word, and they are plain
    // integers.
    let result = unsafe {
        let to = buffer.as_mut_ptr().add(1).cast::<kvm_irq_routing_entry>();
        std::ptr::copy_nonoverlapping(entries.as_ptr(), to, entries.len());
        libc::ioctl(vm.as_raw_fd(), KVM_SET_GSI_ROUTING, buffer.as_ptr())
    };
    let error = std::io::Error::last_os_error();
    assert!(
        result == 0 || error.raw_os_error() == Some(libc::EINVAL),
        "only EINVAL is a verdict: {error}"
    );
    result == 0
}

/// This crate's verdict.
fn we_take(rules: &Rules, entries: &[kvm_irq_routing_entry]) -> bool {
    // SAFETY: `entry` sets members of a zeroed payload.
    let typed = |entry| unsafe { abi::from_kvm(entry) };
    let typed: Result<Vec<_>, _> = entries.iter().map(typed).collect();
    // Without an irqchip not even the empty table can be set.
    rules.irqchip != IrqchipKind::None
        && typed.is_ok_and(|typed| Table::from_entries(rules, typed).is_ok())
}

/// Mostly small numbers that collide, at times those around a limit, at times anything.
fn number(limits: &'static [u32]) -> impl Strategy<Value = u32> {
    prop_oneof![12 => 0u32..10, 3 => select(limits), 1 => any::<u32>()]
}

fn entry() -> impl Strategy<Value = kvm_irq_routing_entry> {
    let pin = (
        number(&[2, 3]),
        number(&[7, 8, 15, 16, 23, 24, u32::MAX]),
        Just(0),
    );
    let plausible_pin = (0u32..3, 0u32..8, Just(0));
    let msi = (
        any::<u32>(),
        prop_oneof![4 => Just(0), 1 => any::<u32>()],
        any::<u32>(),
    );
    let xen = (
        number(&[1023, 1024, 4095, 4096]),
        0u32..2,
        prop_oneof![Just(XenEvtchn::PRIO_2LEVEL), any::<u32>()],
    );
    let any_words = (any::<u32>(), any::<u32>(), any::<u32>());
    let kinds = prop_oneof![
        24 => (Just(1u32), plausible_pin),
        2 => (Just(1u32), pin),
        12 => (Just(2u32), msi),
        1 => (Just(3u32), any_words),
        2 => (Just(4u32), any_words),
        3 => (Just(5u32), xen),
        1 => (number(&[6]), any_words),
    ];
    let flags = prop_oneof![40 => Just(0u32), 4 => Just(1u32), 1 => any::<u32>()];
    let gsi = prop_oneof![20 => 0u32..4000, 20 => 0u32..40, 1 => number(&[4095, 4096])];
    (gsi, kinds, flags).prop_map(|(gsi, (type_, (a, b, c)), flags)| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_,
            flags,
            ..Default::default()
        };
        entry.u.pad = [a, b, c, 0, 0, 0, 0, 0];
        entry
    })
}

fn tables() -> impl Strategy<Value = Vec<kvm_irq_routing_entry>> {
    prop_oneof![
        3 => prop::collection::vec(entry(), 0..4),
        1 => prop::collection::vec(entry(), 0..30),
    ]
}

/// The long form asks many more; an emulated host answers a tenth of them in the time.
fn cases() -> u32 {
    let set = |name| std::env::var_os(name).is_some();
    match (set("LONG_TESTS"), set("REFERENCE_VMM_LAB")) {
        (true, false) => 50_000,
        (true, true) => 5_000,
        (false, _) => 1_000,
    }
}

fn agree_on_random_tables(vm: &VmFd, rules: &Rules, cases: u32) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let (taken, refused) = (Cell::new(0), Cell::new(0));
    TestRunner::new(config)
        .run(&tables(), |entries| {
            let verdict = kvm_takes(vm, &entries);
            let count = if verdict { &taken } else { &refused };
            count.set(count.get() + 1);
            prop_assert_eq!(we_take(rules, &entries), verdict);
            Ok(())
        })
        .unwrap();
    let (taken, refused) = (taken.get(), refused.get());
    println!(
        "{:?}: KVM took {taken} tables and refused {refused}",
        rules.irqchip
    );
    if rules.irqchip != IrqchipKind::None {
        let least = cases / 10;
        assert!(
            taken > least && refused > least,
            "one verdict alone proves nothing"
        );
    }
}

#[test]
fn kvm_and_the_rules_give_one_verdict() {
    for kind in KINDS {
        let vm = common::kvm().create_vm().unwrap();
        Irqchip::create(&vm, kind).unwrap();
        let rules = vm.rules(kind);
        agree_on_random_tables(&vm, &rules, cases());
    }
}

#[test]
fn with_32_bit_apic_ids_too() {
    let vm = common::kvm().create_vm().unwrap();
    let kind = IrqchipKind::Split { pins: 0 };
    Irqchip::create(&vm, kind).unwrap();
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [u64::from(KVM_X2APIC_API_USE_32BIT_IDS), 0, 0, 0],
        ..Default::default()
    })
    .unwrap();
    let mut rules = vm.rules(kind);
    rules.x2apic_ids = true;
    agree_on_random_tables(&vm, &rules, cases() / 3);
}

#[test]
fn the_limit_is_kvms() {
    let vm = common::kvm().create_vm().unwrap();
    let kind = IrqchipKind::Kernel { pit: Pit::Absent };
    Irqchip::create(&vm, kind).unwrap();
    let rules = vm.rules(kind);
    // Every GSI with a message, and then one entry more.
    let message = |gsi| kvm_irq_routing_entry {
        gsi,
        type_: 2,
        ..Default::default()
    };
    let full: Vec<_> = (0..rules.limit).map(message).collect();
    let over: Vec<_> = (0..=rules.limit).map(message).collect();
    for (entries, verdict) in [(&full, true), (&over, false)] {
        assert_eq!(kvm_takes(&vm, entries), verdict);
        assert_eq!(we_take(&rules, entries), verdict);
    }
    // As many GSIs, but some go to several pins: KVM counts entries.
    let pin = |gsi, chip| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: 1,
            ..Default::default()
        };
        entry.u.pad = [chip, 0, 0, 0, 0, 0, 0, 0];
        entry
    };
    let mut many: Vec<_> = (0..rules.limit).map(|gsi| pin(gsi, 0)).collect();
    many[1] = pin(0, 1);
    assert!(kvm_takes(&vm, &many) && we_take(&rules, &many));
    many.push(pin(0, 2));
    assert!(!kvm_takes(&vm, &many) && !we_take(&rules, &many));
}

#[test]
fn irqchips_are_made_and_refused_as_the_errors_say() {
    let all = [
        IrqchipKind::None,
        IrqchipKind::Kernel { pit: Pit::Absent },
        IrqchipKind::Kernel { pit: Pit::Present },
        IrqchipKind::Kernel {
            pit: Pit::PresentWithSpeaker,
        },
        IrqchipKind::Split { pins: 0 },
        IrqchipKind::Split { pins: 24 },
        IrqchipKind::Split { pins: 4096 },
    ];
    for kind in all {
        let vm = common::kvm().create_vm().unwrap();
        assert_eq!(Irqchip::create(&vm, kind).unwrap().kind(), kind);
        if kind != IrqchipKind::None {
            // A second one is EEXIST, and the first goes on.
            for second in [
                IrqchipKind::Kernel { pit: Pit::Absent },
                IrqchipKind::Split { pins: 1 },
            ] {
                let error = Irqchip::create(&vm, second).unwrap_err();
                assert_eq!(errno(&error), libc::EEXIST, "{kind:?} {second:?}");
            }
            vm.create_vcpu(0).unwrap();
        }
    }
    // After a vCPU it is too late; more pins than routes were never possible.
    let vm = common::kvm().create_vm().unwrap();
    let too_many = Irqchip::create(&vm, IrqchipKind::Split { pins: 4097 }).unwrap_err();
    assert_eq!(errno(&too_many), libc::EINVAL);
    let _vcpu = vm.create_vcpu(0).unwrap();
    // KVM has two names for "too late".
    for (kind, too_late) in [(KINDS[1], libc::EINVAL), (KINDS[2], libc::EEXIST)] {
        assert_eq!(errno(&Irqchip::create(&vm, kind).unwrap_err()), too_late);
    }

    fn errno(error: &IrqchipError) -> i32 {
        match error {
            IrqchipError::Kernel(source) | IrqchipError::Split { source, .. } => source.errno(),
            other => panic!("{other}"),
        }
    }
}

/// KVM cannot be asked for its table, but what a GSI raises can be seen at the chips' inputs.
#[test]
fn the_default_table_is_what_kvm_installed() {
    let vm = common::kvm().create_vm().unwrap();
    let irqchip = Irqchip::create(&vm, KINDS[1]).unwrap();
    let routing = Routing::new(&vm, &irqchip);
    for number in 0..30 {
        let gsi = routing.reserve(Gsi(number)).unwrap();
        let line = routing.line(&gsi).unwrap();
        let before = requested(&vm);
        line.set(true).unwrap();
        let mut raised: Vec<Route> = requested(&vm).difference(&before).copied().collect();
        // A pin of the slave raises the pin of the master that it is cascaded to.
        raised.retain(|&route| number < 8 || route != pin(Chip::PIC_MASTER, 2));
        let expected: Vec<Route> = routing.table().map_gsi(gsi.gsi()).collect();
        assert_eq!(raised, expected, "{}", gsi.gsi());
    }
}

fn pin(chip: Chip, pin: u32) -> Route {
    Route::Pin(ChipPin { chip, pin })
}

/// The pins at which an interrupt is requested now.
fn requested(vm: &VmFd) -> BTreeSet<Route> {
    let chips = [Chip::PIC_MASTER, Chip::PIC_SLAVE, Chip::IOAPIC];
    let requests = |chip: Chip| {
        let mut state = kvm_bindings::kvm_irqchip {
            chip_id: chip.0,
            ..Default::default()
        };
        vm.get_irqchip(&mut state).unwrap();
        // SAFETY: KVM filled the member that the chip's number says, and all are integers.
        unsafe {
            match chip {
                Chip::IOAPIC => state.chip.ioapic.irr,
                _ => u32::from(state.chip.pic.irr),
            }
        }
    };
    let pins = |chip| {
        let irr = requests(chip);
        (0..32)
            .filter(move |bit| irr & 1 << bit != 0)
            .map(move |bit| pin(chip, bit))
    };
    chips.into_iter().flat_map(pins).collect()
}
