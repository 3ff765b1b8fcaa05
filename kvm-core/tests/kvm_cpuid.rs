// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! CPUID on the real KVM: it takes what is made, and a guest that asks reads it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

mod common;

use common::{Machine, kvm, long_tests, watchdog};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_core::arch::x86_64::cpuid::{
    FEATURE_WORDS, FeatureKind, HypervisorLeaves, Register, Template, TemplateError, Timing,
    TopologyLevels, Word, bit_names,
};
use kvm_core::arch::x86_64::{CpuidPlan, Topology};
use kvm_core::{Exit, Flow, HaltReason, Vcpu, VcpuId, VcpuSet, VcpuView};

fn plan(topology: Topology, id: VcpuId) -> CpuidPlan {
    CpuidPlan {
        id,
        topology,
        tsc_deadline: false,
        arat: None,
        mca_recovery: false,
    }
}

/// What the guest reads at each of these places.
fn asked(vcpu: Vcpu, places: &[(u32, u32)]) -> Vec<kvm_cpuid_entry2> {
    let mut answers: Vec<_> = places
        .iter()
        .map(|(function, index)| kvm_cpuid_entry2 {
            function: *function,
            index: *index,
            ..Default::default()
        })
        .collect();
    let set = VcpuSet::new(kvm_core::Identity::vm("cpuid"));
    let mut at = 0;
    let runner = set.enroll(vcpu).unwrap();
    let Err(halt) = runner.run(|_: &VcpuView<'_, _>, exit: Exit<'_>| {
        match exit {
            Exit::PioIn { port, data, .. } => {
                let Some(place) = answers.get(at) else {
                    return Flow::Stop("done");
                };
                let word = if port == 0x10 {
                    place.function
                } else {
                    place.index
                };
                data.copy_from_slice(&word.to_le_bytes());
            }
            Exit::PioOut { port, data, .. } => {
                let word = u32::from_le_bytes(data.try_into().unwrap());
                let answer = &mut answers[at];
                match port {
                    0x20 => answer.eax = word,
                    0x22 => answer.ebx = word,
                    0x24 => answer.ecx = word,
                    _ => (answer.edx, at) = (word, at + 1),
                }
            }
            other => panic!("{other:?}"),
        }
        Flow::Continue
    });
    assert_eq!(halt.reason, HaltReason::Handler("done"));
    answers
}

/// A vCPU with this list, asked by its guest.
fn reads(list: &[kvm_cpuid_entry2], places: &[(u32, u32)]) -> Vec<kvm_cpuid_entry2> {
    let machine = Machine::new(guests::cpu::cpuid());
    let vcpu = machine.vcpu(0);
    let topology = Topology::flat(1).unwrap();
    let cpuid = plan(topology, VcpuId(0)).apply(list).unwrap();
    vcpu.set_cpuid(&cpuid).unwrap();
    asked(vcpu, places)
}

#[test]
fn kvm_takes_the_cpuid_of_every_topology() {
    watchdog(|| {
        let host = kvm().supported_cpuid().unwrap();
        let machine = Machine::new(&[]);
        let vcpu = machine.vcpu(0);
        let most = if long_tests() { 256 } else { 64 };
        let mut taken = 0;
        for sockets in 1..=most {
            for cores in 1..=most / sockets {
                for threads in 1..=most / sockets / cores {
                    let topology = Topology::new(sockets, cores, threads).unwrap();
                    let id = topology.highest_apic_id();
                    let cpuid = plan(topology, id).apply(host.as_slice()).unwrap();
                    if let Err(error) = vcpu.set_cpuid(&cpuid) {
                        panic!("{topology}: {error}");
                    }
                    taken += 1;
                }
            }
        }
        println!("{taken} topologies");
    });
}

#[test]
fn each_vcpu_reads_its_own_place_and_its_local_apic_has_the_same_id() {
    watchdog(|| {
        let host = kvm().supported_cpuid().unwrap();
        for (sockets, cores, threads) in [(1, 4, 1), (2, 3, 2), (3, 1, 2)] {
            let topology = Topology::new(sockets, cores, threads).unwrap();
            let machine = Machine::new(guests::cpu::cpuid());
            for (index, id) in (0..).zip(topology.apic_ids()) {
                let vcpu = machine.vcpu(id.0);
                let cpuid = plan(topology, id).apply(host.as_slice()).unwrap();
                vcpu.set_cpuid(&cpuid).unwrap();
                let read = asked(vcpu, &[(1, 0), (0xb, 0), (0xb, 1), (0xb, 2)]);
                assert_eq!(read[0].ebx >> 24, id.0, "{topology}");
                let levels = TopologyLevels::read(&read, 0xb).unwrap();
                assert_eq!(levels.apic_id, id, "{topology}");
                assert_eq!(Some(levels.place()), topology.place(index), "{topology}");
                assert_eq!(levels.threads, threads, "{topology}");
                assert_eq!(levels.cpus_of_socket, cores * threads, "{topology}");
            }
            let machine = Machine::with_irqchip(&[]);
            for id in topology.apic_ids() {
                let lapic = machine.vcpu(id.0).fd().get_lapic().unwrap();
                assert_eq!(lapic.regs[0x23] as u8, id.0 as u8, "{topology}");
            }
        }
    });
}

#[test]
fn what_a_model_hides_of_the_hosts_list_a_guest_does_not_read() {
    watchdog(|| {
        let host = kvm().supported_cpuid().unwrap();
        let mut provided = 0;
        let words = FEATURE_WORDS.iter().map(|known| known.word);
        let places: Vec<_> = words.map(|w| (w.leaf, w.subleaf)).collect();
        // The software KVM shows its guests some instructions of the processor, whatever their list says:
        // those that a guest reads whose list has none at all.
        let mut none = host.as_slice().to_vec();
        for leaf in &mut none {
            if places.contains(&(leaf.function, leaf.index)) {
                (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0);
                if leaf.function == 7 && leaf.index > 0 {
                    leaf.eax = 0;
                }
            }
        }
        let always = reads(&none, &places);
        for (level, missing) in Template::levels(host.as_slice()) {
            let template = Template::baseline(level);
            let model = match template.apply(host.as_slice()) {
                Ok(model) => model,
                Err(TemplateError::Missing { missing: named, .. }) => {
                    assert_eq!(named, missing);
                    println!("{level}: not here, {}", missing.join(" "));
                    continue;
                }
                Err(other) => panic!("{other}"),
            };
            provided += 1;
            let read = reads(&model, &places);
            for ((known, leaf), bare) in FEATURE_WORDS.iter().zip(&read).zip(&always) {
                let mask = known.mask(FeatureKind::Instructions);
                let got = known.word.register.of(leaf) & mask;
                let always = known.word.register.of(bare) & mask;
                let wanted = known.word.of(&model) & mask;
                assert_eq!(got & !always, wanted & !always, "{level}: {}", known.word);
                assert_eq!(wanted & !got, 0, "{level}: {}", known.word);
            }
        }
        for (known, leaf) in FEATURE_WORDS.iter().zip(&always) {
            let shown = known.word.register.of(leaf) & known.mask(FeatureKind::Instructions);
            if known.word.register != Register::Eax && shown != 0 {
                let names = bit_names(known.word, shown);
                println!("this KVM always shows {}", names.join(" "));
            }
        }
        assert!(provided > 0, "not even x86-64-v1");
    });
}

#[test]
fn kvms_leaves_are_found_where_they_were_moved_to() {
    watchdog(|| {
        let host = kvm().supported_cpuid().unwrap();
        let masked = Template::host().without("kvm_steal_time").unwrap();
        let mut model = masked.apply(host.as_slice()).unwrap();
        let features = Word::new(0x4000_0001, 0, Register::Eax).of(&model);
        let invariant = Word::new(0x8000_0007, 0, Register::Edx).of(&model) & 1 << 8 != 0;
        let timing = Timing::new(2_000_000.try_into().unwrap());
        let moved = HypervisorLeaves::at(0x4000_0100)
            .unwrap()
            .with_timing(timing);
        moved.apply(&mut model);
        let read = reads(
            &model,
            &[(0x4000_0100, 0), (0x4000_0101, 0), (0x4000_0110, 0)],
        );
        assert_eq!([read[0].ebx, read[0].ecx], [0x4b4d_564b, 0x564b_4d56]);
        assert_eq!(read[1].eax, features);
        if invariant {
            assert_eq!(read[0].eax, 0x4000_0110);
            assert_eq!([read[2].eax, read[2].ebx], [2_000_000, 1_000_000]);
        } else {
            assert_eq!(read[0].eax, 0x4000_0101);
        }
    });
}
