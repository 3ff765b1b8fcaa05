// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the table costs over the bare ioctls, in the same run on this host's KVM:
//! `cargo bench -p irq-routing`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

#[path = "common/by_turns.rs"]
mod by_turns;

use std::hint::black_box;
use std::time::Instant;

use by_turns::by_turns;
use criterion::{BenchmarkId, Criterion, criterion_group};
use irq_routing::ioapic::SplitIoapic;
use irq_routing::{Gsi, GsiHandle, Irqchip, IrqchipKind, Msi, Routing};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };

fn vm() -> (VmFd, Irqchip) {
    let kvm = Kvm::new().expect("/dev/kvm must be there and open");
    let vm = kvm.create_vm().unwrap();
    let irqchip = Irqchip::create(&vm, SPLIT).unwrap();
    (vm, irqchip)
}

/// Another message in each round, so that each commit is one that the guest could see.
fn msi(round: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: 0x30 + round % 0x80,
        devid: None,
    }
}

fn raw_table(routes: u32, round: u32) -> KvmIrqRouting {
    let mut table = KvmIrqRouting::new(routes as usize).unwrap();
    for (gsi, entry) in (24..).zip(table.as_mut_slice()) {
        *entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = 0xfee0_0000;
        entry.u.msi.data = msi(round).data;
    }
    table
}

fn commit(c: &mut Criterion) {
    let mut group = c.benchmark_group("commit");
    for routes in [1u32, 64, 1000] {
        let (vm, irqchip) = vm();
        let mut round = 0;
        let id = |name| BenchmarkId::new(name, routes);

        group.bench_function(id("ioctl alone"), |b| {
            let tables = [raw_table(routes, 0), raw_table(routes, 1)];
            b.iter(|| {
                round += 1;
                vm.set_gsi_routing(&tables[round as usize % 2]).unwrap();
            });
        });
        group.bench_function(id("by hand"), |b| {
            b.iter(|| {
                round += 1;
                vm.set_gsi_routing(&raw_table(routes, round)).unwrap();
            });
        });

        let routing = Routing::new(&vm, &irqchip);
        let gsis: Vec<GsiHandle> = (0..routes).map(|_| routing.allocate().unwrap()).collect();
        group.bench_function(id("irq-routing"), |b| {
            b.iter(|| {
                round += 1;
                let mut change = routing.change();
                for gsi in &gsis {
                    change.route(gsi, msi(round));
                }
                black_box(change.commit().unwrap());
            });
        });
        group.bench_function(id("irq-routing, nothing visible"), |b| {
            b.iter(|| {
                let mut change = routing.change();
                for gsi in &gsis {
                    change.route(gsi, msi(round));
                }
                black_box(change.commit().unwrap());
            });
        });
    }
    group.finish();
}

fn irqfd(c: &mut Criterion) {
    let (vm, irqchip) = vm();
    let routing = Routing::new(&vm, &irqchip);
    let gsi = routing.allocate().unwrap();
    let mut group = c.benchmark_group("irqfd");

    // No route: what KVM does with the interrupt is left out.
    let raw = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.register_irqfd(&raw, gsi.gsi().0).unwrap();
    group.bench_function("write of an eventfd", |b| b.iter(|| raw.write(1).unwrap()));
    let source = routing.source(&gsi);
    group.bench_function("trigger of a source", |b| {
        b.iter(|| source.trigger().unwrap())
    });

    group.bench_function("attach and detach, ioctls alone", |b| {
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        b.iter(|| {
            vm.register_irqfd(&fd, gsi.gsi().0).unwrap();
            vm.unregister_irqfd(&fd, gsi.gsi().0).unwrap();
        });
    });
    group.bench_function("attach and detach", |b| {
        let mut detached = Some(routing.irqfd(&gsi).unwrap().detach().unwrap());
        b.iter(|| {
            let attached = detached.take().unwrap().attach().unwrap();
            detached = Some(attached.detach().unwrap());
        });
    });
    group.finish();
}

/// A route that changes under an irqfd, as a guest does that moves an MSI-X vector to another processor.
fn route_change(c: &mut Criterion) {
    let (vm, irqchip) = vm();
    let routing = Routing::new(&vm, &irqchip);
    let gsi = routing.allocate().unwrap();
    let mut group = c.benchmark_group("route change of a GSI with an irqfd");
    let mut round = 0;
    let mut next = || {
        round += 1;
        msi(round)
    };
    group.bench_function("ioctl alone, nothing attached", |b| {
        let tables = [raw_table(1, 0), raw_table(1, 1)];
        let mut round = 0;
        b.iter(|| {
            round += 1;
            vm.set_gsi_routing(&tables[round % 2]).unwrap();
        });
    });
    // The ioctls above have replaced the table: let it be the routing's again.
    routing.route(&gsi, next()).unwrap();
    group.bench_function("kept attached", |b| {
        let _irqfd = routing.irqfd(&gsi).unwrap();
        b.iter(|| routing.route(&gsi, next()).unwrap());
    });
    group.bench_function("detached, routed, attached", |b| {
        let mut irqfd = Some(routing.irqfd(&gsi).unwrap());
        b.iter(|| {
            let detached = irqfd.take().unwrap().detach().unwrap();
            routing.route(&gsi, next()).unwrap();
            irqfd = Some(detached.attach().unwrap());
        });
    });
    group.finish();
}

fn ioapic(c: &mut Criterion) {
    let (vm, irqchip) = vm();
    let routing = Routing::new(&vm, &irqchip);
    let ioapic = SplitIoapic::new(&routing).unwrap();
    let gsis = [4, 5].map(|pin| routing.reserve(Gsi(pin)).unwrap());
    // Pin 4 edge-triggered, pin 5 level-triggered.
    for (pin, low) in [(4, 0x50u32), (5, 0x8051)] {
        ioapic.write(0x00, &[0x10 + 2 * pin]);
        ioapic.write(0x10, &low.to_le_bytes());
    }
    // Never run: its APIC is disabled, and the message ends there.
    let _vcpu = vm.create_vcpu(0).unwrap();
    let mut group = c.benchmark_group("ioapic");
    group.bench_function("KVM_SIGNAL_MSI alone", |b| {
        let msi = kvm_msi {
            address_lo: 0xfee0_0000,
            data: 0x50,
            ..Default::default()
        };
        b.iter(|| vm.signal_msi(msi).unwrap());
    });
    let [edge, level] = [0, 1].map(|at| ioapic.line(&gsis[at]).unwrap());
    group.bench_function("pulse of an edge pin", |b| b.iter(|| edge.pulse().unwrap()));
    group.bench_function("pulse of a level pin", |b| {
        b.iter(|| level.pulse().unwrap())
    });
    group.bench_function("the guest masks and unmasks a pin", |b| {
        b.iter(|| {
            ioapic.write(0x10, &0x1_8051u32.to_le_bytes());
            ioapic.write(0x10, &0x8051u32.to_le_bytes());
        });
    });
    group.bench_function("EOI of a pin whose line is low", |b| {
        b.iter(|| ioapic.eoi(black_box(0x51)))
    });
    group.finish();
}

criterion_group!(benches, commit, irqfd, route_change, ioapic);

fn commit_by_turns(routes: u32) {
    let machines = [(); 2].map(|()| vm());
    let (vm, irqchip) = &machines[0];
    let routing = Routing::new(vm, irqchip);
    let gsis: Vec<GsiHandle> = (0..routes).map(|_| routing.allocate().unwrap()).collect();
    let mut round = 0;
    let mut ours = || {
        round += 1;
        let start = Instant::now();
        let mut change = routing.change();
        for gsi in &gsis {
            change.route(gsi, msi(round));
        }
        black_box(change.commit().unwrap());
        start.elapsed()
    };
    let tables = [raw_table(routes, 0), raw_table(routes, 1)];
    let mut other = 0;
    let mut floor = || {
        other += 1;
        let start = Instant::now();
        machines[1].0.set_gsi_routing(&tables[other % 2]).unwrap();
        start.elapsed()
    };
    by_turns(
        &format!("{routes} MSI routes in one commit, by turns"),
        3000,
        [("irq-routing", &mut ours), ("ioctl alone", &mut floor)],
    );
}

fn main() {
    // `cargo test --benches` runs this too, without it.
    if std::env::args().any(|arg| arg == "--bench") {
        [1, 64, 1000].into_iter().for_each(commit_by_turns);
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
