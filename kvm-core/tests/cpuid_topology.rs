// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Topologies as promises: what a guest reads back from the leaves is what was asked for. On the leaves
//! of real hosts, for every machine of up to 256 processors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

#[path = "common/leaves.rs"]
mod leaves;

use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::cpuid::{Place, TopologyLevels, Vendor, differences};
use kvm_core::arch::x86_64::{CpuidError, CpuidPlan, Topology};
use leaves::{amd, find, intel};

/// Every topology of up to `most` processors.
fn topologies(most: u32) -> impl Iterator<Item = Topology> {
    (1..=most).flat_map(move |sockets| {
        (1..=most / sockets).flat_map(move |cores| {
            (1..=most / sockets / cores)
                .map(move |threads| Topology::new(sockets, cores, threads).unwrap())
        })
    })
}

fn cpuid(topology: Topology, id: VcpuId, host: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let plan = CpuidPlan {
        id,
        topology,
        tsc_deadline: true,
        arat: None,
        mca_recovery: false,
    };
    plan.apply(host).unwrap().as_slice().to_vec()
}

/// Some processors of a machine: the first and last of the machine, of a socket and of a core.
fn some(topology: Topology) -> BTreeSet<u32> {
    let last = topology.cpus() - 1;
    let (threads, cpus) = (topology.threads(), topology.cpus_of_socket());
    [0, 1, threads - 1, threads, cpus - 1, cpus, last]
        .into_iter()
        .filter(|index| *index <= last)
        .collect()
}

#[test]
fn apic_ids_are_unique_ascend_and_lead_back_to_their_places() {
    for topology in topologies(256) {
        let ids: Vec<_> = topology.apic_ids().collect();
        assert_eq!(ids.len(), topology.cpus() as usize, "{topology}");
        assert!(ids.is_sorted_by(|a, b| a < b), "{topology}");
        assert_eq!(ids.last(), Some(&topology.highest_apic_id()), "{topology}");
        let mut places = BTreeSet::new();
        for (index, id) in (0..).zip(&ids) {
            let place = topology.place_of(*id).unwrap();
            assert_eq!(topology.place(index), Some(place), "{topology}");
            assert!(places.insert(place), "{topology}: {place:?} twice");
        }
        // And nobody else has a place.
        let have: BTreeSet<_> = ids.iter().map(|id| id.0).collect();
        for id in 0..=ids.last().unwrap().0 + 9 {
            let placed = topology.place_of(VcpuId(id)).is_some();
            assert_eq!(placed, have.contains(&id), "{topology}: {id}");
        }
    }
}

#[test]
fn leaf_0xb_read_back_is_the_topology_asked_for() {
    for host in [intel(), amd()] {
        for topology in topologies(256) {
            for index in some(topology) {
                let (id, place) = (
                    topology.apic_id(index).unwrap(),
                    topology.place(index).unwrap(),
                );
                let list = cpuid(topology, id, &host);
                let levels = TopologyLevels::read(&list, 0xb).unwrap();
                assert_eq!(levels.apic_id, id, "{topology}");
                assert_eq!(levels.place(), place, "{topology}");
                assert_eq!(levels.threads, topology.threads(), "{topology}");
                let cpus = topology.cpus_of_socket();
                assert_eq!(levels.cpus_of_socket, cpus, "{topology}");
                // Each field is no wider than it has to be.
                let fits = |bits: u32, count: u32| {
                    1_u32 << bits >= count && (bits == 0 || 1_u32 << (bits - 1) < count)
                };
                let core_bits = levels.socket_bits - levels.thread_bits;
                assert!(fits(levels.thread_bits, topology.threads()), "{topology}");
                assert!(fits(core_bits, topology.cores()), "{topology}");
                if Vendor::of(&host) == Vendor::Intel {
                    assert_eq!(TopologyLevels::read(&list, 0x1f), Some(levels));
                }
            }
        }
    }
}

/// The place of a processor as Linux 6.12 finds it on an AMD processor, from leaf 0x8000_0008 alone: no
/// threads.
fn amd_legacy(list: &[kvm_cpuid_entry2]) -> (u32, u32) {
    let leaf = find(list, 0x8000_0008, 0);
    (leaf.ecx >> 12 & 0xf, (leaf.ecx & 0xff) + 1)
}

#[test]
fn the_old_leaves_agree_with_the_new_ones() {
    for host in [intel(), amd()] {
        for topology in topologies(256) {
            for index in some(topology) {
                let (id, place) = (
                    topology.apic_id(index).unwrap(),
                    topology.place(index).unwrap(),
                );
                let list = cpuid(topology, id, &host);
                let span = 1_u32 << topology.socket_bits();
                let one = find(&list, 1, 0);
                assert_eq!(one.ebx >> 24, id.0 & 0xff, "{topology}");
                assert_eq!(one.ebx >> 16 & 0xff, span.min(255), "{topology}");
                let several = topology.cpus_of_socket() > 1;
                assert_eq!(one.edx >> 28 & 1 != 0, several, "{topology}");

                let (cache, caches) = match Vendor::of(&host) {
                    Vendor::Amd => (0x8000_001d, 4),
                    _ => (4, 4),
                };
                for index in 0..caches {
                    let leaf = find(&list, cache, index);
                    let bits = match leaf.eax >> 5 & 7 {
                        1 | 2 => topology.thread_bits(),
                        _ => topology.socket_bits(),
                    };
                    assert_eq!((leaf.eax >> 14 & 0xfff) + 1, 1 << bits, "{topology}");
                }
                if Vendor::of(&host) == Vendor::Amd {
                    let counted = (topology.socket_bits(), topology.cpus_of_socket());
                    assert_eq!(amd_legacy(&list), counted, "{topology}");
                    let features = find(&list, 0x8000_0001, 0).ecx;
                    assert_eq!(features >> 1 & 1 != 0, several, "{topology}");
                    let compute = find(&list, 0x8000_001e, 0);
                    assert_eq!(compute.eax, id.0, "{topology}");
                    assert_eq!(compute.ebx & 0xff, place.core, "{topology}");
                    assert_eq!((compute.ebx >> 8 & 0xff) + 1, topology.threads());
                    assert_eq!(compute.ecx, place.socket & 0xff, "{topology}");
                    // Linux reads threads of an AMD core only with TopologyExtensions.
                    if topology.threads() > 1 {
                        assert_ne!(features & 1 << 22, 0, "{topology}");
                    }
                } else {
                    // Cores as Linux counted them before leaf 0xb: from leaf 4, in whole bits.
                    let cores = (find(&list, 4, 0).eax >> 26) + 1;
                    let core_bits = topology.socket_bits() - topology.thread_bits();
                    assert_eq!(cores, (1 << core_bits).min(64), "{topology}");
                }
            }
        }
    }
}

#[test]
fn amd_with_leaf_0x8000_0026_is_told_there_too() {
    let mut host = amd();
    host.push(kvm_cpuid_entry2 {
        function: 0x8000_0026,
        ..Default::default()
    });
    for topology in topologies(48) {
        let id = topology.highest_apic_id();
        let list = cpuid(topology, id, &host);
        let level = |index| find(&list, 0x8000_0026, index);
        // Core, complex, die, socket, the end.
        let kinds: Vec<_> = (0..5).map(|index| level(index).ecx >> 8 & 0xff).collect();
        assert_eq!(kinds, [1, 2, 3, 4, 0]);
        let core = level(0);
        assert_eq!(core.eax, topology.thread_bits(), "{topology}");
        assert_eq!(core.ebx, topology.threads(), "{topology}");
        for above in 1..4 {
            assert_eq!(level(above).eax, topology.socket_bits(), "{topology}");
            assert_eq!(level(above).ebx, topology.cpus_of_socket(), "{topology}");
        }
        assert!((0..5).all(|index| level(index).edx == id.0));
    }
}

#[test]
fn what_is_not_about_the_topology_is_the_hosts() {
    let about = [
        1,
        4,
        0xb,
        0x1f,
        0x8000_0000,
        0x8000_0001,
        0x8000_0008,
        0x8000_001d,
        0x8000_001e,
    ];
    for host in [intel(), amd()] {
        for topology in topologies(64) {
            let list = cpuid(topology, topology.highest_apic_id(), &host);
            for found in differences(&host, &list) {
                assert!(about.contains(&found.word.leaf), "{topology}: {found}");
            }
            // And made twice it is the same.
            let again = cpuid(topology, topology.highest_apic_id(), &list);
            assert_eq!(differences(&list, &again), []);
            assert_eq!(list.len(), again.len());
        }
    }
}

#[test]
fn a_number_that_no_processor_has_is_refused_with_the_topology() {
    let topology = Topology::new(2, 3, 1).unwrap();
    for id in [3, 7, 8, u32::MAX] {
        let plan = CpuidPlan {
            id: VcpuId(id),
            topology,
            tsc_deadline: false,
            arat: None,
            mca_recovery: false,
        };
        let error = plan.apply(&intel()).unwrap_err();
        let id = VcpuId(id);
        assert_eq!(error, CpuidError::Id { id, topology });
        let text = error.to_string();
        assert!(text.contains("2 sockets of 3 cores") && text.contains(&id.to_string()));
    }
    let place = Place {
        socket: 1,
        core: 2,
        thread: 0,
    };
    assert_eq!(topology.place_of(VcpuId(6)), Some(place));
}
