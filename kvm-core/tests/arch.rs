// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! CPUID, boot registers and tables as promises: what the guest will conclude from them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

use std::collections::HashSet;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_segment, kvm_sregs};
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::{
    BootState, CpuidError, CpuidPlan, LongModeTables, RegisterDump, TablesError, Topology,
    boot_msrs, gdt, initial_fpu,
};
use proptest::prelude::*;
use vm_memory::GuestAddress;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    let flags = if index > 0 {
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    } else {
        0
    };
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn vendor(name: &[u8; 12], highest: u32) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    leaf(0, 0, [highest, word(0), word(8), word(4)])
}

/// A host's list with the leaves that matter, and some that must not change.
fn host(name: &[u8; 12], noise: u32) -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(name, 0x1f),
        leaf(1, 0, [0x306f0, noise, noise & !(1 << 24), noise]),
        leaf(4, 0, [noise & !0xff | 0x21, 0x01c0_003f, 63, 0]),
        leaf(4, 1, [noise & !0xff | 0x43, 0x01c0_003f, 63, 0]),
        leaf(4, 2, [noise & !0xff | 0x63, 0x01c0_003f, 63, 0]),
        leaf(4, 3, [0, 0, 0, 0]),
        leaf(6, 0, [4, 0, 0, 0]),
        leaf(7, 0, [2, noise, noise, noise]),
        leaf(0xb, 0, [1, 2, 0x100, 77]),
        leaf(0xb, 1, [7, 128, 0x201, 77]),
        leaf(0xd, 1, [noise, noise, noise, noise]),
        leaf(0x1f, 0, [1, 2, 0x100, 77]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        leaf(0x4000_0001, 0, [noise | 1 << 24, 0, 0, 0]),
        leaf(0x8000_0001, 0, [noise, noise, noise, noise]),
        leaf(0x8000_0002, 0, [noise, noise, noise, noise]),
        leaf(0x8000_0008, 0, [0x3030, noise, noise, noise]),
        leaf(0x8000_001d, 3, [noise & !0xff | 0x63, 0x03c0_003f, 63, 0]),
        leaf(0x8000_001e, 0, [9, 0x109, 0x101, 0]),
    ]
}

fn plan(id: u32, cpus: u32) -> CpuidPlan {
    CpuidPlan {
        id: VcpuId(id),
        topology: Topology::flat(cpus).unwrap(),
        tsc_deadline: true,
        arat: None,
        mca_recovery: false,
    }
}

/// Linux asks for `succor` at each, and for `overflow_recov` where one came before another was looked at; of AMD's alone.
#[test]
fn a_guest_is_told_that_it_can_recover_from_machine_checks_where_it_knows_amds() {
    for (vendor, mca_recovery, due) in [
        (AMD, true, 0b1011),
        (AMD, false, 0b1000),
        (b"HygonGenuine", true, 0b1011),
        (INTEL, true, 0b1000),
        (b"AnotherMaker", true, 0b1000),
    ] {
        let mut host = host(vendor, 0);
        let plan = CpuidPlan {
            mca_recovery,
            ..plan(0, 1)
        };
        // Without the leaf there is none to be told in.
        let without = plan.apply(&host).unwrap();
        assert!(
            !without
                .as_slice()
                .iter()
                .any(|leaf| leaf.function == 0x8000_0007)
        );
        host.push(leaf(0x8000_0007, 0, [1, 0b1000, 3, 0x100]));
        let told = plan.apply(&host).unwrap();
        let told = find(told.as_slice(), 0x8000_0007, 0);
        assert_eq!([told.eax, told.ebx, told.ecx, told.edx], [1, due, 3, 0x100]);
    }
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    *leaves
        .iter()
        .find(|leaf| (leaf.function, leaf.index) == (function, index))
        .unwrap()
}

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";

proptest! {
    #[test]
    fn a_guest_counts_one_socket_of_n_cores_with_their_own_apic_ids(
        noise: u32,
        cpus in prop_oneof![1_u32..20, 1_u32..4096],
        intel: bool,
    ) {
        let host = host(if intel { INTEL } else { AMD }, noise);
        let mut apic_ids = HashSet::new();
        for id in [0, cpus / 2, cpus - 1] {
            let cpuid = plan(id, cpus).apply(&host).unwrap();
            let all = cpuid.as_slice();
            for function in [0xb, 0x1f] {
                let (thread, core, end) =
                    (find(all, function, 0), find(all, function, 1), find(all, function, 2));
                // As Linux reads it: level types, then APIC id >> shift is the package.
                prop_assert_eq!([thread.ecx, core.ecx, end.ecx], [0x100, 0x201, 2]);
                prop_assert_eq!((thread.eax, thread.ebx, core.ebx, end.ebx), (0, 1, cpus, 0));
                prop_assert!(1_u64 << core.eax >= u64::from(cpus));
                prop_assert!(cpus == 1 || 1_u64 << (core.eax - 1) < u64::from(cpus));
                prop_assert_eq!((core.edx, core.edx >> core.eax), (id, 0));
            }
            apic_ids.insert(find(all, 0xb, 1).edx);

            let one = find(all, 1, 0);
            prop_assert_eq!(one.ebx >> 24, id & 0xff);
            prop_assert_eq!(one.ebx >> 16 & 0xff, cpus.next_power_of_two().min(255));
            prop_assert_eq!(one.ebx & 0xffff, noise & 0xffff);
            prop_assert_eq!(one.edx >> 28 & 1, u32::from(cpus > 1));
            prop_assert_eq!((one.ecx >> 31, one.ecx >> 24 & 1), (1, 1));

            // The first two cache levels are a core's own, the third is everyone's.
            let sharing = |leaf: kvm_cpuid_entry2| leaf.eax >> 14 & 0xfff;
            let everyone = (cpus.next_power_of_two() - 1).min(0xfff);
            prop_assert_eq!(sharing(find(all, 4, 0)), 0);
            prop_assert_eq!(sharing(find(all, 4, 1)), 0);
            prop_assert_eq!(sharing(find(all, 4, 2)), everyone);
            prop_assert_eq!(sharing(find(all, 0x8000_001d, 3)), everyone);
            prop_assert_eq!(find(all, 4, 0).eax >> 26, everyone.min(63));
            prop_assert_eq!(find(all, 0x8000_001e, 0).eax, id);

            let amd8 = find(all, 0x8000_0008, 0);
            if intel {
                prop_assert_eq!(amd8.ecx, noise);
            } else {
                prop_assert_eq!(amd8.ecx & 0xff, (cpus - 1).min(255));
                prop_assert!(1_u64 << (amd8.ecx >> 12 & 0xf) >= u64::from(cpus));
                prop_assert_eq!(find(all, 0x8000_0001, 0).ecx >> 1 & 1, u32::from(cpus > 1));
            }
            // What is not about the topology is the host's.
            for (function, index) in
                [(7, 0), (0xd, 1), (0x4000_0000, 0), (0x4000_0001, 0), (0x8000_0002, 0), (6, 0)]
            {
                prop_assert_eq!(find(all, function, index), find(&host, function, index));
            }
            // And made twice it is the same.
            let again = plan(id, cpus).apply(all).unwrap();
            prop_assert_eq!(again.as_slice(), all);
        }
        prop_assert_eq!(apic_ids.len(), HashSet::from([0, cpus / 2, cpus - 1]).len());
    }

    #[test]
    fn any_host_list_gives_a_cpuid_or_an_error(
        leaves in prop::collection::vec(
            (prop_oneof![0_u32..0x20, 0x4000_0000_u32..0x4000_0004, 0x8000_0000_u32..0x8000_0027],
             0_u32..4, any::<[u32; 4]>()),
            0..300),
        id in prop_oneof![0_u32..8, any::<u32>()],
        cpus in prop_oneof![0_u32..8, any::<u32>()],
        arat: Option<bool>,
    ) {
        let host: Vec<_> = leaves.into_iter().map(|(f, i, r)| leaf(f, i, r)).collect();
        let Ok(topology) = Topology::flat(cpus) else {
            prop_assert!(cpus == 0 || cpus > 1 << 31);
            return Ok(());
        };
        let plan = CpuidPlan { id: VcpuId(id), topology, tsc_deadline: false, arat, mca_recovery: false };
        match plan.apply(&host) {
            Ok(cpuid) => {
                prop_assert!(id < cpus && cpuid.as_slice().len() <= host.len() + 11);
                for leaf in cpuid.as_slice() {
                    if leaf.function == 1 {
                        prop_assert_eq!(leaf.ecx >> 24 & 1, 0);
                    }
                    if let (6, Some(arat)) = (leaf.function, arat) {
                        prop_assert_eq!(leaf.eax >> 2 & 1, u32::from(arat));
                    }
                }
            }
            Err(CpuidError::Id { .. }) => prop_assert!(id >= cpus),
            Err(CpuidError::TooMany(n)) => prop_assert!(n > 256),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn the_page_tables_map_every_address_below_their_end_to_itself(
        gib in 1_u16..6,
        page in 0_u64..0x1000,
        at in any::<[u64; 8]>(),
    ) {
        let base = GuestAddress(page << 12);
        let tables = LongModeTables::new(base, gib).unwrap();
        let bytes = tables.bytes();
        prop_assert_eq!(bytes.len() as u64, tables.len());
        let entry = |table: u64, index: u64| {
            let at = (table - base.0 + 8 * index) as usize;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        for address in at {
            let address = address % (u64::from(gib) << 30);
            let pml4e = entry(tables.cr3().0, address >> 39 & 511);
            let pdpte = entry(pml4e & !0xfff, address >> 30 & 511);
            let pde = entry(pdpte & !0xfff, address >> 21 & 511);
            prop_assert_eq!([pml4e & 0xfff, pdpte & 0xfff, pde & 0xfff], [3, 3, 0x83]);
            prop_assert_eq!((pde & !0xfff) + (address & 0x1f_ffff), address);
        }
        // Nothing beyond.
        prop_assert_eq!(entry(tables.cr3().0, 1), 0);
        let pdpt = entry(tables.cr3().0, 0) & !0xfff;
        prop_assert_eq!(entry(pdpt, u64::from(gib)), 0);
        prop_assert_eq!(&bytes[..48], &gdt(true)[..]);
    }
}

#[test]
fn leaf_0xb_is_left_out_where_the_processor_is_too_old_for_it() {
    let old = [vendor(INTEL, 7), leaf(1, 0, [0; 4])];
    let cpuid = plan(0, 4).apply(&old).unwrap();
    assert!(cpuid.as_slice().iter().all(|leaf| leaf.function < 0xb));
    // And made where the host's list does not have it.
    let new = [vendor(INTEL, 0x1f), leaf(1, 0, [0; 4])];
    let cpuid = plan(2, 4).apply(&new).unwrap();
    assert_eq!(find(cpuid.as_slice(), 0xb, 1).edx, 2);
    assert!(cpuid.as_slice().iter().all(|leaf| leaf.function != 0x1f));
}

#[test]
fn boot_msrs_are_those_that_the_processor_has() {
    let indices = |cpuid: &[_]| boot_msrs(cpuid).iter().map(|m| m.index).collect::<Vec<_>>();
    let (mtrr, none) = (leaf(1, 0, [0, 0, 0, 1 << 12]), leaf(1, 0, [0; 4]));
    assert_eq!(indices(&[vendor(INTEL, 1), mtrr]), [0x1a0, 0x2ff]);
    assert_eq!(indices(&[vendor(AMD, 1), mtrr]), [0x2ff]);
    assert_eq!(indices(&[vendor(AMD, 1), none]), [0; 0]);
    assert_eq!(indices(&[]), [0; 0]);
}

#[test]
fn tables_out_of_place_are_refused() {
    let at = |base, gib| LongModeTables::new(GuestAddress(base), gib);
    assert_eq!(
        at(0x1001, 1),
        Err(TablesError::Unaligned(GuestAddress(0x1001)))
    );
    assert_eq!(at(0x1000, 0), Err(TablesError::Size(0)));
    assert_eq!(at(0x1000, 513), Err(TablesError::Size(513)));
    for base in [(1 << 30) - 0x1000, 1 << 30, u64::MAX - 0xfff] {
        assert!(
            matches!(at(base, 1), Err(TablesError::OutOfReach { .. })),
            "{base:#x}"
        );
    }
    assert!(at((1 << 30) - 0x4000, 1).is_ok());
    assert!(at(0, 512).is_ok());
}

fn reset() -> kvm_sregs {
    kvm_sregs {
        apic_base: 0xfee0_0900,
        cr0: 0x6000_0010,
        cs: kvm_segment {
            base: 0xffff_0000,
            selector: 0xf000,
            ..Default::default()
        },
        ..Default::default()
    }
}

#[test]
fn the_ways_in_are_those_of_their_protocols() {
    let tables = LongModeTables::new(GuestAddress(0x9000), 1).unwrap();
    let long = BootState::long_mode(&reset(), &tables, GuestAddress(0x100_0200), 0x7000);
    assert_eq!(
        (long.regs.rip, long.regs.rsi, long.regs.rflags),
        (0x100_0200, 0x7000, 2)
    );
    assert_eq!(
        (
            long.sregs.cs.selector,
            long.sregs.ds.selector,
            long.sregs.cs.l
        ),
        (0x10, 0x18, 1)
    );
    assert_eq!(
        (long.sregs.cr0, long.sregs.cr4, long.sregs.efer),
        (0x8000_0011, 0x20, 0x500)
    );
    assert_eq!(
        (long.sregs.cr3, long.sregs.gdt.base, long.sregs.gdt.limit),
        (0xa000, 0x9000, 47)
    );
    assert_eq!(long.sregs.apic_base, 0xfee0_0900);

    let flat = BootState::protected_mode(&reset(), GuestAddress(0x10_0000), 0x2bad_b002, 0x500);
    assert_eq!(
        (flat.regs.rip, flat.regs.rax, flat.regs.rbx),
        (0x10_0000, 0x2bad_b002, 0x500)
    );
    assert_eq!(
        (flat.sregs.cr0, flat.sregs.cr4, flat.sregs.efer),
        (0x11, 0, 0)
    );
    for segment in [flat.sregs.cs, flat.sregs.ds, flat.sregs.es, flat.sregs.ss] {
        let shape = (
            segment.base,
            segment.limit,
            segment.db,
            segment.l,
            segment.g,
        );
        assert_eq!(shape, (0, u32::MAX, 1, 0, 1));
    }
    assert_eq!(
        (flat.sregs.tr.type_, flat.sregs.tr.limit, flat.sregs.tr.s),
        (0xb, 0x67, 0)
    );

    let real = BootState::real_mode(&reset(), 0xf000, 0xfff0);
    assert_eq!(
        (real.sregs.cs.base, real.regs.rip, real.sregs.cr0),
        (0xf_0000, 0xfff0, 0x10)
    );
    let fpu = initial_fpu();
    assert_eq!((fpu.fcw, fpu.mxcsr), (0x37f, 0x1f80));
}

#[test]
fn a_register_dump_names_the_mode_and_every_register() {
    let tables = LongModeTables::new(GuestAddress(0x9000), 1).unwrap();
    let long = BootState::long_mode(&reset(), &tables, GuestAddress(0xabc), 0x7000);
    let dump = RegisterDump {
        regs: long.regs,
        sregs: long.sregs,
    };
    let text = dump.to_string();
    assert!(
        text.starts_with("RIP 0010:0000000000000abc  RFLAGS 00000002  64-bit mode\n"),
        "{text}"
    );
    for name in [
        "RAX",
        "R15",
        "CR2",
        "EFER 500",
        "GS",
        "LDT",
        "GDT",
        "IDT",
        "not usable",
    ] {
        assert!(text.contains(name), "{name} in\n{text}");
    }
}
