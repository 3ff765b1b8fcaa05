// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM whose COM1 interrupts: vm-superio's serial port raises GSI 4 through an irqfd, in a guest
//! of 59 bytes that echoes what it receives. Run it with
//! `cargo run -p irq-routing --example serial_interrupt`; it prints "hello".

#![allow(missing_docs)]

use std::error::Error;
use std::io::stdout;
use std::process::ExitCode;

use irq_routing::{Gsi, Irqchip, IrqchipKind, Pit, Routing};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_superio::Serial;

/// Real-mode code for 0x1000: sets vector 0x24 to the handler at 0x1030, programs the PIC to
/// deliver interrupt 4 alone (as that vector), lets COM1 interrupt on received data, and halts. The
/// handler echoes bytes up to a newline and then writes to port 0xf4.
const GUEST: [u8; 59] = [
    0x31, 0xc0, 0x8e, 0xd8, 0xc7, 0x06, 0x90, 0x00, 0x30, 0x10, 0xa3, 0x92, 0x00, 0xb0, 0x11, 0xe6,
    0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21, 0xb0, 0xef, 0xe6,
    0x21, 0xba, 0xf9, 0x03, 0xb0, 0x01, 0xee, 0xfb, 0xf4, 0xeb, 0xfd, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, 0x0a, 0x75, 0xfa, 0xe6, 0xf4,
];

#[repr(align(4096))]
struct Ram([u8; 0x10000]);

fn run() -> Result<(), Box<dyn Error>> {
    let vm = Kvm::new()?.create_vm()?;
    // Memory first: behind the in-kernel irqchip it would wait for a grace period.
    let mut ram = Box::new(Ram([0; 0x10000]));
    ram.0[0x1000..][..GUEST.len()].copy_from_slice(&GUEST);
    let region = kvm_userspace_memory_region {
        memory_size: 0x10000,
        userspace_addr: ram.0.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the memory outlives the vCPU, and nothing here touches it while that runs.
    unsafe { vm.set_user_memory_region(region)? };

    let irqchip = Irqchip::create(&vm, IrqchipKind::Kernel { pit: Pit::Absent })?;
    let routing = Routing::new(&vm, &irqchip);
    let com1 = routing.reserve(Gsi(4))?;
    let mut serial = Serial::new(routing.source(&com1), stdout());

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs)?;
    loop {
        match vcpu.run()? {
            VcpuExit::IoIn(port @ 0x3f8..=0x3ff, data) => {
                data[0] = serial.read((port - 0x3f8) as u8)
            }
            VcpuExit::IoOut(port @ 0x3f8..=0x3ff, data) => {
                let offset = (port - 0x3f8) as u8;
                serial
                    .write(offset, data[0])
                    .map_err(|error| format!("{error:?}"))?;
                if offset == 1 {
                    // The guest listens now.
                    serial
                        .enqueue_raw_bytes(b"hello\n")
                        .map_err(|error| format!("{error:?}"))?;
                }
            }
            VcpuExit::IoOut(0xf4, _) => return Ok(()),
            other => return Err(format!("{other:?}").into()),
        }
    }
}

fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    eprint!("serial_interrupt: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        eprint!(": {error}");
        source = error.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
