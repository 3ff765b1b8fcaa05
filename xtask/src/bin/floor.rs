// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The floor that `cargo xtask bench startup` compares with: the system calls that no monitor can do without, in the
//! order that costs least, for a guest that writes one byte and resets. `floor none|split|kernel` says which
//! interrupt controllers are made. No checks beyond a failed call, no cleaning up: the process's end does that.

use std::io;

const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xae04;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const KVM_CREATE_IRQCHIP: libc::c_ulong = 0xae60;
const KVM_RUN: libc::c_ulong = 0xae80;
const KVM_SET_REGS: libc::c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: libc::c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: libc::c_ulong = 0x4138_ae84;
const KVM_ENABLE_CAP: libc::c_ulong = 0x4068_aea3;
const KVM_CAP_SPLIT_IRQCHIP: u32 = 121;
const KVM_EXIT_IO: u32 = 2;

const MEMORY: usize = 128 << 20;
const ENTRY: usize = 0x1000;

/// mov dx, 0x3f8; mov al, '*'; out dx, al; mov al, 0xfe; out 0x64, al; hlt
const GUEST: &[u8] = &[
    0xba, 0xf8, 0x03, 0xb0, b'*', 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xf4,
];

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest: u64,
    size: u64,
    host: u64,
}

#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

/// `struct kvm_sregs`: the code segment comes first, its base before its selector.
#[repr(C, align(8))]
struct Sregs([u8; 312]);

/// `struct kvm_regs`: the instruction pointer is the 17th, the flags the 18th.
#[repr(C)]
struct Regs([u64; 18]);

fn main() {
    let irqchip = std::env::args().nth(1).unwrap_or_default();
    if let Err(error) = run(&irqchip) {
        eprintln!("floor {irqchip}: {error}");
        std::process::exit(1);
    }
}

fn done(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn map(size: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(at.cast())
    }
}

fn run(irqchip: &str) -> io::Result<()> {
    // SAFETY: the path is a C string.
    let kvm = done(unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })?;
    // SAFETY: takes no pointer.
    let vm = done(unsafe { libc::ioctl(kvm, KVM_CREATE_VM, 0) })?;
    let memory = map(
        MEMORY,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        -1,
    )?;
    // SAFETY: the mapping is larger than the guest's end, and no one else knows it.
    unsafe { std::ptr::copy_nonoverlapping(GUEST.as_ptr(), memory.add(ENTRY), GUEST.len()) };
    let region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest: 0,
        size: MEMORY as u64,
        host: memory as u64,
    };
    // SAFETY: KVM reads the region; the memory behind it stays mapped to the process's end.
    done(unsafe { libc::ioctl(vm, KVM_SET_USER_MEMORY_REGION, &raw const region) })?;
    match irqchip {
        "split" => {
            let cap = EnableCap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                flags: 0,
                args: [24, 0, 0, 0],
                pad: [0; 64],
            };
            // SAFETY: KVM reads the capability.
            done(unsafe { libc::ioctl(vm, KVM_ENABLE_CAP, &raw const cap) })?;
        }
        "kernel" => {
            // SAFETY: takes no pointer.
            done(unsafe { libc::ioctl(vm, KVM_CREATE_IRQCHIP, 0) })?;
        }
        _ => {}
    }
    // SAFETY: takes no pointer.
    let vcpu = done(unsafe { libc::ioctl(vm, KVM_CREATE_VCPU, 0) })?;
    // SAFETY: takes no pointer.
    let size = done(unsafe { libc::ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0) })?;
    let size = usize::try_from(size).unwrap_or(4096);
    let shared = map(size, libc::MAP_SHARED, vcpu)?;

    let mut sregs = Sregs([0; 312]);
    // SAFETY: KVM fills a structure of the size that the call's number says.
    done(unsafe { libc::ioctl(vcpu, KVM_GET_SREGS, &raw mut sregs) })?;
    sregs.0[..8].fill(0);
    sregs.0[12..14].fill(0);
    // SAFETY: KVM reads a structure of that size.
    done(unsafe { libc::ioctl(vcpu, KVM_SET_SREGS, &raw const sregs) })?;
    let mut regs = Regs([0; 18]);
    regs.0[16] = ENTRY as u64;
    regs.0[17] = 2;
    // SAFETY: KVM reads a structure of that size.
    done(unsafe { libc::ioctl(vcpu, KVM_SET_REGS, &raw const regs) })?;

    loop {
        // SAFETY: takes no pointer.
        done(unsafe { libc::ioctl(vcpu, KVM_RUN, 0) })?;
        // SAFETY: `struct kvm_run` is mapped there and larger than this; KVM writes it only within KVM_RUN.
        let (reason, port, data) = unsafe {
            let at = shared.add(40).cast::<u64>().read_volatile();
            (
                shared.add(8).cast::<u32>().read_volatile(),
                shared.add(34).cast::<u16>().read_volatile(),
                shared
                    .add(usize::try_from(at).unwrap_or(0) % size)
                    .cast::<u8>(),
            )
        };
        match (reason, port) {
            (KVM_EXIT_IO, 0x3f8) => {
                // SAFETY: one byte within the shared mapping.
                unsafe { libc::write(1, data.cast(), 1) };
            }
            (KVM_EXIT_IO, 0x64) => return Ok(()),
            other => {
                return Err(io::Error::other(format!(
                    "an exit not looked for: {other:?}"
                )));
            }
        }
    }
}
