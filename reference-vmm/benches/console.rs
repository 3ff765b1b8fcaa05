// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Output of a guest, bytes a second: through hvc0 (virtio-console), in chains of a page as Linux gives them, against
//! the serial port's model, a byte a register write. Both write to /dev/null; neither has the exits of a real guest,
//! which for the serial port are one or two a byte.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use reference_vmm::devices::serial::{ConsoleOut, SerialPort};
use reference_vmm::devices::virtio::console::Console;
use reference_vmm::devices::virtio::console::control::Size;
use reference_vmm::devices::virtio::console::host::{Host, Shared};
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver};
use reference_vmm::end::EndSignal;
use vm_device::DevicePio;
use vm_device::bus::PioAddress;
use vmm_sys_util::eventfd::EventFd;

const BYTES: usize = 64 << 10;
const PAGE: u32 = 4096;

struct NoInterrupt(EventFd);

impl vm_superio::Trigger for NoInterrupt {
    type E = std::io::Error;
    fn trigger(&self) -> std::io::Result<()> {
        let _ = &self.0;
        Ok(())
    }
}

fn null() -> File {
    File::options().write(true).open("/dev/null").unwrap()
}

fn output(c: &mut Criterion) {
    let mut group = c.benchmark_group("64 KiB of a guest's output");
    group.throughput(Throughput::Bytes(BYTES as u64));

    let end = Arc::new(EndSignal::new().unwrap());
    let out = ConsoleOut::new(null(), end).unwrap();
    let interrupt = NoInterrupt(EventFd::new(0).unwrap());
    let port = SerialPort::new(interrupt, out).unwrap();
    group.bench_function("serial port, byte by byte", |b| {
        b.iter(|| {
            for _ in 0..BYTES {
                port.pio_write(PioAddress(0x3f8), 0, b"x");
            }
        });
    });

    for (name, chains) in [
        ("hvc0, a page at a time", 1),
        ("hvc0, 16 pages at a time", 16),
    ] {
        let sink = Some(Box::new(Shared::new(null()).unwrap()) as _);
        let host = Host::Fixed { source: None, sink };
        let mut driver = FakeDriver::new(Console::single(host, Size::default()).unwrap());
        driver.start(0);
        let page = Descriptor {
            address: driver.allocate(PAGE.into()).0,
            len: PAGE,
            ..Descriptor::default()
        };
        group.bench_function(name, |b| {
            b.iter(|| {
                for _ in 0..BYTES / PAGE as usize / chains {
                    for _ in 0..chains {
                        driver.chain(1, &[page]);
                    }
                    driver.notify(1);
                    for _ in 0..chains {
                        driver.used(1);
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, output);
criterion_main!(benches);
