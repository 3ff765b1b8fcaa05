// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A whole virtual machine in a page: one page of memory, one vCPU, "hello" on port 0x3f8.
//!
//! `cargo run -p kvm-core --example tiny_vm`, or paste it into a crate with kvm-core and kvm-bindings.

use std::error::Error;
use std::process::ExitCode;

use kvm_bindings::kvm_userspace_memory_region as Region;
use kvm_core::arch::x86_64::BootState;
use kvm_core::{Exit, Flow, Kvm, VcpuId, VcpuSet, VcpuView};

/// cs: mov si, message; mov cx, 6; mov dx, 0x3f8; cs rep outsb; hlt
const GUEST: &[u8] = b"\xbe\x0d\x10\xb9\x06\x00\xba\xf8\x03\x2e\xf3\x6e\xf4hello\n";

#[repr(align(4096))]
struct Page([u8; 4096]);

fn run() -> Result<(), Box<dyn Error>> {
    let mut memory = Box::new(Page([0; 4096]));
    memory.0[..GUEST.len()].copy_from_slice(GUEST);
    let region = Region {
        guest_phys_addr: 0x1000,
        memory_size: 4096,
        userspace_addr: memory.0.as_mut_ptr() as u64,
        ..Default::default()
    };
    let setup = Kvm::open()?.create_vm()?.named("tiny");
    // SAFETY: the page is the guest's alone, and outlives the VM: it is dropped after it.
    unsafe { setup.fd().set_user_memory_region(region)? };
    let vm = setup.finish();

    let vcpu = vm.create_vcpu(VcpuId(0))?;
    vcpu.set_boot_state(&BootState::real_mode(&vcpu.sregs()?, 0, 0x1000))?;
    let runner = VcpuSet::new(vm.identity().clone()).enroll(vcpu)?;
    let Err(halt) = runner.run(|_: &VcpuView<'_, _>, exit: Exit<'_>| match exit {
        Exit::PioOut {
            port: 0x3f8, data, ..
        } => {
            print!("{}", String::from_utf8_lossy(data));
            Flow::Continue
        }
        Exit::Hlt => Flow::Stop("the guest halted"),
        _ => Flow::Stop("an exit that it should not make"),
    });
    println!("{}", halt.reason);
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tiny_vm: {error}");
            ExitCode::FAILURE
        }
    }
}
