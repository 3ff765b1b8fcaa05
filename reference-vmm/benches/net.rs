// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames through virtio-net against a plain loop of `read` and `write` on the same kind of tap: what the queues, the
//! thread and the interrupts cost. A driver that writes its rings by hand is part of the figures, as the guest's is in
//! life. Transmission is at a tap of the kernel's (so it is for root), reception at a socket.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::os::fd::AsRawFd;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver};
use reference_vmm::devices::virtio::net::fake::FakeTap;
use reference_vmm::devices::virtio::net::iovecs::{IoVecs, write_bytes};
use reference_vmm::devices::virtio::net::tap::{HEADER, KernelTap, Offload, Tap};
use reference_vmm::devices::virtio::net::{Mac, Net};
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

#[path = "../tests/support/tap.rs"]
mod tap;

const RX: usize = 0;
const TX: usize = 1;

/// A frame's length and how many are under way at once: what a socket has room for.
const SIZES: [(usize, usize); 3] = [(60, 64), (1514, 64), (65_000, 2)];

fn driver<T: Tap>(tap: T, features: u64) -> FakeDriver<Net<T>> {
    let mac = Mac::new([2, 0, 0, 0, 0, 1]).unwrap();
    let net = Net::new("bench", mac, None, vec![tap], Offload::UDP).unwrap();
    let mut driver = FakeDriver::new(net);
    driver.start(features);
    driver
}

/// Chains of one buffer each, to be made available again and again.
fn chains<T: Tap>(
    driver: &mut FakeDriver<Net<T>>,
    queue: usize,
    (count, len): (usize, usize),
    flags: u16,
) -> Vec<u16> {
    let chain = |_| {
        let address = driver.allocate(len as u64).0;
        let descriptor = Descriptor {
            address,
            len: len as u32,
            flags,
            next: 0,
        };
        driver.put(queue, &[descriptor])
    };
    (0..count).map(chain).collect()
}

fn turn<T: Tap>(driver: &mut FakeDriver<Net<T>>, queue: usize, heads: &[u16]) {
    for _ in heads {
        black_box(driver.used(queue));
    }
}

fn transmit(c: &mut Criterion) {
    tap::alone();
    for name in ["plain", "virtio"] {
        tap::make_up(name, 0);
    }
    let mut group = c.benchmark_group("transmit to a tap");
    for (len, count) in SIZES {
        group.throughput(Throughput::Elements(count as u64));
        let mut frame = vec![0; HEADER + len];
        // To all, of a kind that nobody takes.
        frame[HEADER..HEADER + 6].fill(0xff);
        frame[HEADER + 12..HEADER + 14].copy_from_slice(&[0x88, 0xb5]);
        {
            let plain = KernelTap::open("plain", 1).unwrap().queues.remove(0);
            group.bench_function(format!("{len} bytes, write"), |b| {
                b.iter(|| {
                    for _ in 0..count {
                        write_bytes(plain.as_raw_fd(), &frame).unwrap();
                    }
                });
            });
        }
        let tap = KernelTap::open("virtio", 1).unwrap().queues.remove(0);
        let mut driver = driver(tap, u64::MAX);
        let heads = chains(&mut driver, TX, (count, frame.len()), 0);
        group.bench_function(format!("{len} bytes, virtio-net"), |b| {
            b.iter(|| {
                for head in &heads {
                    driver.make_available(TX, *head);
                }
                driver.notify(TX);
                turn(&mut driver, TX, &heads);
            });
        });
    }
}

fn receive(c: &mut Criterion) {
    let mut group = c.benchmark_group("receive from a socket");
    for (len, count) in SIZES {
        group.throughput(Throughput::Elements(count as u64));
        let frame = vec![0; HEADER + len];
        {
            let (tap, network) = FakeTap::new().unwrap();
            let mut room = vec![0; 1 << 17];
            group.bench_function(format!("{len} bytes, read"), |b| {
                b.iter(|| {
                    for _ in 0..count {
                        assert!(network.send(&frame).unwrap());
                    }
                    for _ in 0..count {
                        let fd = tap.as_raw_fd();
                        black_box(IoVecs::new().read_from(fd, &mut room).unwrap());
                    }
                });
            });
        }
        // One buffer a frame; and as Linux has them, of 1536 bytes.
        let long = len > 1514;
        for (name, buffers, features) in [
            ("virtio-net", (count, HEADER + len), 0),
            ("virtio-net, merged", (256, 1536), u64::MAX),
        ] {
            let (tap, network) = FakeTap::new().unwrap();
            let mut driver = driver(tap, features);
            let write = VRING_DESC_F_WRITE as u16;
            let heads = chains(&mut driver, RX, buffers, write);
            for head in &heads {
                driver.make_available(RX, *head);
            }
            driver.notify(RX);
            let of_frame = match long && features != 0 {
                true => (HEADER + len).div_ceil(1536),
                false => 1,
            };
            group.bench_function(format!("{len} bytes, {name}"), |b| {
                b.iter(|| {
                    for _ in 0..count {
                        assert!(network.send(&frame).unwrap());
                    }
                    for _ in 0..count * of_frame {
                        let (head, _) = driver.used(RX);
                        driver.make_available(RX, head);
                    }
                    driver.notify(RX);
                });
            });
        }
    }
}

criterion_group!(benches, transmit, receive);
criterion_main!(benches);
