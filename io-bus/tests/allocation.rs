// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An access allocates nothing, whatever becomes of it.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use io_bus::{Answer, At, BusKind, IoBus, IoDevice, IoRange, MmioAddress, PioAddress};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, with a count for each thread.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Device {
    declines: bool,
}

impl Device {
    fn answer(&self) -> Answer {
        match self.declines {
            true => Answer::Declined,
            false => Answer::Accepted,
        }
    }
}

impl IoDevice for Device {
    fn read(&self, _: At, _: &mut [u8]) -> Answer {
        self.answer()
    }
    fn write(&self, _: At, _: &[u8]) -> Answer {
        self.answer()
    }
}

#[test]
fn an_access_allocates_nothing() {
    let bus = IoBus::new();
    for kind in BusKind::ALL {
        for n in 0..64 {
            let range = IoRange::new(n * 0x40, 0x30).unwrap();
            for declines in [true, false] {
                bus.register(kind, range, Device { declines })
                    .unwrap()
                    .keep();
            }
        }
    }
    let mut io = bus.dispatcher();
    let before = ALLOCATIONS.get();
    let mut answered = 0;
    for address in 0..0x2000_u16 {
        let mut data = [0; 12];
        for len in [1, 2, 4, 8, 12] {
            let data = &mut data[..len];
            answered += usize::from(
                io.mmio_read(MmioAddress(address.into()), data)
                    .is_answered(),
            );
            answered += usize::from(
                io.mmio_write(MmioAddress(address.into()), data)
                    .is_answered(),
            );
            answered += usize::from(
                io.pio_read_repeated(PioAddress(address), 2, data)
                    .is_answered(),
            );
            answered += usize::from(io.pio_write(PioAddress(address), data).is_answered());
        }
    }
    assert_eq!(ALLOCATIONS.get(), before);
    assert!(answered > 10_000);
}
