// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An exit at a port with the width of its items, which `kvm_ioctls::VcpuExit` does not tell.

use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::VcpuFd;

use crate::trace::Direction;
use vm_device::bus::PioAddress;

/// Where KVM puts a port's data: the page after `kvm_run`'s (`KVM_PIO_PAGE_OFFSET`), x86's of 4 KiB.
const DATA_OFFSET: u64 = 4096;
const DATA_SIZE: usize = 4096;

/// An exit at a port: one `in` or `out`, or the items of a `rep ins` or `rep outs`.
///
/// `data` holds a whole number of items of `width` bytes, all of them accesses to `port`:
/// [`pio_read_repeated`](crate::Dispatcher::pio_read_repeated) and
/// [`pio_write_repeated`](crate::Dispatcher::pio_write_repeated) carry them out. (x86_64 alone.)
#[derive(Debug)]
pub struct PioExit<'a> {
    /// The port.
    pub port: PioAddress,
    /// The bytes of one item: 1, 2 or 4.
    pub width: usize,
    /// Whether the guest reads.
    pub direction: Direction,
    /// The items' bytes, in `kvm_run`'s mapping: what the guest wrote, or is to read.
    pub data: &'a mut [u8],
}

impl<'a> PioExit<'a> {
    /// The exit that `vcpu` came out of `KVM_RUN` with, if it is one at a port. To be called where
    /// [`VcpuFd::run`] has given `VcpuExit::IoIn(..)` or `IoOut(..)`, whose own data is let go.
    pub fn of(vcpu: &'a mut VcpuFd) -> Option<Self> {
        let run = vcpu.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return None;
        }
        // SAFETY: plain numbers, of which any bits are some; the exit's reason says that they are
        // these.
        let io = unsafe { run.__bindgen_anon_1.io };
        let width = usize::from(io.size);
        let len = width.checked_mul(usize::try_from(io.count).ok()?)?;
        // `kvm_run` can be written by safe code: what it says is not believed.
        if io.data_offset != DATA_OFFSET || len > DATA_SIZE {
            return None;
        }
        let start = (run as *mut kvm_run).cast::<u8>();
        // SAFETY: on x86 the mapping has the page after `kvm_run`'s (of three, the data's and the
        // ring's are the others), `len` bytes lie within it, and the slice borrows the vCPU, without
        // which nobody runs it or makes another slice of it.
        let data = unsafe { std::slice::from_raw_parts_mut(start.add(DATA_SIZE), len) };
        Some(Self {
            port: PioAddress(io.port),
            width,
            direction: match u32::from(io.direction) {
                KVM_EXIT_IO_IN => Direction::Read,
                _ => Direction::Write,
            },
            data,
        })
    }
}
