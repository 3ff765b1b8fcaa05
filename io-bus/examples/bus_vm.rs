// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A whole virtual machine of `kvm-ioctls` and `io-bus`: a port that prints, and an MMIO counter.
//!
//! `cargo run -p io-bus --example bus_vm`, on any host whose /dev/kvm you may open.

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use io_bus::{Direction, IoBus, MmioAddress, MmioRange, PioAddress, PioExit, PioRange};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_device::{DeviceMmio, DevicePio};

/// Prints what is written to it.
struct Console(Mutex<String>);

impl DevicePio for Console {
    fn pio_read(&self, _: PioAddress, _: u16, data: &mut [u8]) {
        data.fill(b'?');
    }
    fn pio_write(&self, _: PioAddress, _: u16, data: &[u8]) {
        if let Ok(mut text) = self.0.lock() {
            text.extend(data.iter().map(|byte| char::from(*byte)));
        }
    }
}

/// Gives the next digit at every read.
struct Counter(AtomicU8);

impl DeviceMmio for Counter {
    fn mmio_read(&self, _: MmioAddress, _: u64, data: &mut [u8]) {
        data.fill(self.0.fetch_add(1, Ordering::Relaxed));
    }
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}

#[repr(align(4096))]
struct Page([u8; 4096]);

fn run() -> Result<(), Box<dyn Error>> {
    // Three times: al = the byte at 0x8000, which is the counter's; out to port 0xe9. Then halt.
    let guest = b"\xba\xe9\x00\xb9\x03\x00\xa0\x00\x80\xee\xe2\xfa\xf4";

    let bus = IoBus::new();
    let console = Arc::new(Console(Mutex::default()));
    let ports = PioRange::new(PioAddress(0xe9), 1)?;
    let _console = bus.register_pio(ports, console.clone())?;
    let counter = Counter(AtomicU8::new(b'1'));
    let _counter = bus.register_mmio(MmioRange::new(MmioAddress(0x8000), 0x1000)?, counter)?;

    let vm = Kvm::new()?.create_vm()?;
    let mut page = Box::new(Page([0; 4096]));
    page.0[..guest.len()].copy_from_slice(guest);
    let slot = kvm_bindings::kvm_userspace_memory_region {
        guest_phys_addr: 0x1000,
        memory_size: 4096,
        userspace_addr: &raw mut *page as u64,
        ..Default::default()
    };
    // SAFETY: the page is a whole one, lives as long as the VM, and only the guest uses it.
    unsafe { vm.set_user_memory_region(slot)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    })?;

    let mut io = bus.dispatcher();
    loop {
        let outcome = match vcpu.run()? {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => match PioExit::of(&mut vcpu) {
                None => return Err("an exit at a port, and no data".into()),
                Some(exit) => match exit.direction {
                    Direction::Read => io.pio_read_repeated(exit.port, exit.width, exit.data),
                    Direction::Write => io.pio_write_repeated(exit.port, exit.width, exit.data),
                },
            },
            VcpuExit::MmioRead(address, data) => io.mmio_read(MmioAddress(address), data),
            VcpuExit::MmioWrite(address, data) => io.mmio_write(MmioAddress(address), data),
            VcpuExit::Hlt => break,
            exit => return Err(format!("unexpected exit {exit:?}").into()),
        };
        if !outcome.is_answered() {
            eprintln!("an access that nobody answered");
        }
    }
    let text = console.0.lock().map_err(|_| "a device panicked")?;
    println!("the guest wrote {text:?}");
    Ok(())
}

fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    eprint!("bus_vm: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        eprint!(": {error}");
        source = error.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
