// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An access allocates nothing, whatever becomes of it.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use io_bus::{Answer, At, BusKind, IoBus, IoDevice, IoRange, MmioAddress, PioAddress};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// Bytes that this thread has allocated and not freed.
    static HELD: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, with a count for each thread.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        HELD.set(HELD.get() + layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        HELD.set(HELD.get() - layout.size() as isize);
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
        io.before_exit();
    }
    assert_eq!(ALLOCATIONS.get(), before);
    assert!(answered > 10_000);
}

/// The numbers that the README states.
#[test]
fn a_range_takes_72_bytes_beside_its_device_and_a_dispatcher_3_kib() {
    let ranges = 1000;
    let bus = IoBus::new();
    let device = std::sync::Arc::new(Device { declines: false });
    let before = HELD.get();
    for n in 0..ranges {
        let range = IoRange::new(n * 0x1000, 0x1000).unwrap();
        let device = std::sync::Arc::clone(&device);
        bus.register(BusKind::Mmio, range, device).unwrap().keep();
    }
    // The bus's own `Arc` of what was registered, here an `Arc` itself: two counts and a pointer.
    let device = 24;
    let each = (HELD.get() - before) / ranges as isize - device;
    assert!((72..=73).contains(&each), "{each} bytes a range");

    // Counting adds what it counts in, and takes it away again.
    let before = HELD.get();
    bus.count(true);
    let each = (HELD.get() - before) / ranges as isize;
    assert!((64..=65).contains(&each), "{each} bytes a range's counters");
    bus.count(false);
    assert_eq!(HELD.get(), before);

    let before = HELD.get();
    let io = bus.dispatcher();
    let outside = HELD.get() - before;
    let inside = size_of_val(&io);
    assert!(inside <= 3072 && outside <= 512, "{inside} and {outside}");
}
