// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a coalesced zone saves on the serial port: a guest writes a byte 4,000 times, with a zone
//! over the port and without, on this host's KVM, in one run. And what it costs an exit that finds
//! nothing to drain.
//!
//! `cargo bench -p io-bus --bench coalesced`, where /dev/kvm is.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/vm/mod.rs"]
mod vm;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use io_bus::{BusKind, IoBus, PioAddress, PioRange};
use vm_device::DevicePio;

const WRITES: u32 = 4000;

/// A serial port that loses all.
struct Null;

impl DevicePio for Null {
    fn pio_read(&self, _: PioAddress, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: PioAddress, _: u16, _: &[u8]) {}
}

fn serial(c: &mut Criterion) {
    let mut group = c.benchmark_group("serial port, a byte");
    group.throughput(Throughput::Elements(WRITES.into()));
    group.sample_size(20);
    for zone in [false, true] {
        let mut machine = vm::machine_with(guests::io::io_serial(), WRITES);
        let bus = IoBus::new();
        let ports = PioRange::new(PioAddress(0x3f8), 8).unwrap();
        let _serial = bus.register_pio(ports, Null).unwrap();
        bus.attach_coalesced_ring(machine.ring()).unwrap();
        let _zone = zone.then(|| {
            let vm = machine.vm.clone();
            bus.coalesce(vm, BusKind::Pio, ports.into()).unwrap()
        });
        let mut io = bus.dispatcher();
        let name = if zone { "coalesced" } else { "an exit each" };
        group.bench_function(name, |b| {
            b.iter(|| {
                machine.restart();
                machine.drive(&mut io)
            })
        });
    }
    group.finish();
}

fn empty(c: &mut Criterion) {
    let machine = vm::machine(&[]);
    let mut group = c.benchmark_group("before_exit");
    let without = IoBus::new();
    let mut io = without.dispatcher();
    group.bench_function("no ring", |b| b.iter(|| io.before_exit()));
    let with = IoBus::new();
    with.attach_coalesced_ring(machine.ring()).unwrap();
    let mut io = with.dispatcher();
    group.bench_function("an empty ring", |b| b.iter(|| io.before_exit()));
    group.finish();
}

criterion_group!(benches, serial, empty);
criterion_main!(benches);
