// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table and the pool of numbers behave as the simplest models of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod models;

use std::collections::BTreeSet;

use irq_routing::{
    Chip, ChipPin, Entry, Gsi, GsiPool, HvSint, IrqchipKind, Msi, Pit, Route, RouteError, Rules,
    S390Adapter, Table, XenEvtchn,
};
use models::table::Model;
use proptest::prelude::*;

const LIMIT: u32 = 40;

fn rules() -> Rules {
    let mut rules = Rules::new(IrqchipKind::Kernel { pit: Pit::Absent }, LIMIT);
    rules.hv_sint = true;
    rules
}

fn gsi() -> impl Strategy<Value = Gsi> {
    prop_oneof![6 => 0u32..8, 3 => 0..LIMIT + 2].prop_map(Gsi)
}

fn pin() -> impl Strategy<Value = ChipPin> {
    let pin = prop_oneof![8 => 0u32..3, 1 => 6u32..26];
    (0u32..4, pin).prop_map(|(chip, pin)| ChipPin {
        chip: Chip(chip),
        pin,
    })
}

fn route() -> impl Strategy<Value = Route> {
    prop_oneof![
        8 => pin().prop_map(Route::Pin),
        4 => (0u64..3, 0u32..3).prop_map(|(address, data)| Route::Msi(Msi { address, data, devid: None })),
        1 => Just(Route::HvSint(HvSint::default())),
        1 => Just(Route::XenEvtchn(XenEvtchn::default())),
        1 => Just(Route::S390Adapter(S390Adapter::default())),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Insert(Gsi, Route),
    Replace(Gsi, Vec<Route>),
    Clear(Gsi),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (gsi(), route()).prop_map(|(gsi, route)| Step::Insert(gsi, route)),
        2 => (gsi(), prop::collection::vec(route(), 0..4)).prop_map(|(gsi, routes)| Step::Replace(gsi, routes)),
        1 => gsi().prop_map(Step::Clear),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_table_is_the_list_that_the_kernel_would_keep(steps in prop::collection::vec(step(), 1..120)) {
        let (rules, mut table, mut model) = (rules(), Table::new(), Model::new(LIMIT));
        for step in steps {
            let before = table.clone();
            let done = match step {
                Step::Insert(gsi, route) => {
                    let done = table.insert(&rules, Entry { gsi, route }).is_ok();
                    prop_assert_eq!(model.insert(Entry { gsi, route }), done);
                    done
                }
                Step::Replace(gsi, routes) => {
                    let done = table.replace(&rules, gsi, &routes).is_ok();
                    prop_assert_eq!(model.replace(gsi, &routes), done);
                    done
                }
                Step::Clear(gsi) => {
                    table.clear(gsi);
                    model.clear(gsi);
                    true
                }
            };
            prop_assert!(done || table == before, "an error changes nothing");
            prop_assert_eq!(table.entries().collect::<Vec<_>>(), &model.entries[..]);
            prop_assert_eq!(table.len(), model.entries.len());
            let changed: BTreeSet<Gsi> = table.differences(&before).collect();
            for gsi in (0..LIMIT + 2).map(Gsi) {
                let of_gsi = |table: &Table| table.map_gsi(gsi).collect::<Vec<_>>();
                prop_assert_eq!(of_gsi(&table) != of_gsi(&before), changed.contains(&gsi));
            }
        }
        for chip in (0..4).map(Chip) {
            for pin in 0..26 {
                let at = ChipPin { chip, pin };
                prop_assert_eq!(table.map_chip_pin(at), model.owner(at));
            }
        }
        let again = Table::from_entries(&rules, table.entries()).unwrap();
        prop_assert_eq!(again, table);
    }

    #[test]
    fn a_pool_is_a_set_of_numbers(
        limit in 0u32..200,
        steps in prop::collection::vec((0u8..3, 0u32..210, 0u32..210), 1..400),
    ) {
        let (mut pool, mut model) = (GsiPool::new(limit), BTreeSet::new());
        for (step, a, b) in steps {
            match step {
                0 => prop_assert_eq!(pool.take(Gsi(a)), a < limit && model.insert(a)),
                1 => {
                    let free = (a..b.min(limit)).find(|n| !model.contains(n));
                    model.extend(free);
                    prop_assert_eq!(pool.take_lowest(a..b), free.map(Gsi));
                }
                _ => prop_assert_eq!(pool.free(Gsi(a)), model.remove(&a)),
            }
            prop_assert_eq!(pool.is_taken(Gsi(a)), model.contains(&a));
        }
    }
}

#[cfg(feature = "kvm")]
mod abi {
    use super::*;
    use irq_routing::kvm::abi::{AbiError, to_kvm};
    use kvm_bindings::kvm_irq_routing_entry;

    /// Entries of [`to_kvm`], changed in nothing but type and flags.
    fn from_kvm(raw: &kvm_irq_routing_entry) -> Result<Entry, AbiError> {
        // SAFETY: the payload is `to_kvm`'s.
        unsafe { irq_routing::kvm::abi::from_kvm(raw) }
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let any_pin = any::<(u32, u32)>().prop_map(|(chip, pin)| {
            let chip = Chip(chip);
            Route::Pin(ChipPin { chip, pin })
        });
        let any_msi = any::<(u64, u32, Option<u32>)>();
        let any_msi = any_msi.prop_map(|(address, data, devid)| {
            Route::Msi(Msi {
                address,
                data,
                devid,
            })
        });
        let any_adapter = any::<(u64, u64, u64, u32, u32)>().prop_map(|(a, b, c, d, e)| {
            Route::S390Adapter(S390Adapter {
                ind_addr: a,
                summary_addr: b,
                ind_offset: c,
                summary_offset: d,
                adapter_id: e,
            })
        });
        let any_sint =
            any::<(u32, u32)>().prop_map(|(vcpu, sint)| Route::HvSint(HvSint { vcpu, sint }));
        let any_evtchn = any::<(u32, u32, u32)>().prop_map(|(port, vcpu, priority)| {
            Route::XenEvtchn(XenEvtchn {
                port,
                vcpu,
                priority,
            })
        });
        prop_oneof![any_pin, any_msi, any_adapter, any_sint, any_evtchn]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_kind_of_entry_comes_back_as_it_went(gsi in any::<u32>(), route in any_route()) {
            let entry = Entry { gsi: Gsi(gsi), route };
            let raw = to_kvm(&entry);
            prop_assert_eq!(raw.pad, 0);
            prop_assert_eq!(from_kvm(&raw), Ok(entry));
        }
    }

    #[test]
    fn what_the_abi_does_not_have_is_named() {
        let mut raw = to_kvm(&Entry {
            gsi: Gsi(1),
            route: Route::Msi(Msi::default()),
        });
        raw.flags = 2;
        let unknown = AbiError::UnknownFlags { kind: 2, flags: 2 };
        assert_eq!(from_kvm(&raw), Err(unknown));
        raw.type_ = 6;
        assert_eq!(from_kvm(&raw), Err(AbiError::UnknownType(6)));
    }
}

#[test]
fn the_default_table_is_a_pcs() {
    let table = Table::x86_default();
    assert_eq!(table.len(), 40);
    let pin = |chip, pin| Route::Pin(ChipPin { chip, pin });
    let routes = |gsi| table.map_gsi(Gsi(gsi)).collect::<Vec<_>>();
    assert_eq!(routes(4), [pin(Chip::PIC_MASTER, 4), pin(Chip::IOAPIC, 4)]);
    assert_eq!(routes(12), [pin(Chip::PIC_SLAVE, 4), pin(Chip::IOAPIC, 12)]);
    assert_eq!(routes(16), [pin(Chip::IOAPIC, 16)]);
    assert_eq!(routes(24), []);
}

#[test]
fn a_refusal_says_what_and_why() {
    let entry = |gsi, route: Route| Entry {
        gsi: Gsi(gsi),
        route,
    };
    let pin = |chip, pin| Route::Pin(ChipPin { chip, pin });
    let msi = Route::Msi(Msi::default());
    let none = Rules::new(IrqchipKind::None, LIMIT);
    let split = Rules::new(IrqchipKind::Split { pins: 24 }, LIMIT);
    let all = [
        (
            none,
            entry(1, msi),
            "GSI 1: a VM without an irqchip in the kernel has no routing table",
        ),
        (
            split,
            entry(LIMIT, msi),
            "GSI 40 is not below this host's limit of 40",
        ),
        (
            split,
            entry(1, pin(Chip::IOAPIC, 3)),
            "GSI 1: the kernel has no pin 3 on chip 2",
        ),
        (
            rules(),
            entry(1, pin(Chip::PIC_SLAVE, 8)),
            "GSI 1: the kernel has no pin 8 on chip 1",
        ),
        (
            split,
            entry(2, Route::HvSint(HvSint::default())),
            "GSI 2: this host takes no Hyper-V SINT routes",
        ),
    ];
    for (rules, entry, text) in all {
        let refused: RouteError = Table::new().insert(&rules, entry).unwrap_err();
        assert_eq!(refused.to_string(), text);
    }
}
