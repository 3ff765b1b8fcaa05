// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that runs on the slots: what it and this process write, the other reads; a slot that is removed, moved or
//! read-only is so for the guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memslots::{Backing, Gfn, Mapping, Memslots, NewSlot, Slot, SlotFlags};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

/// 16-bit code at 0x1000: adds 1 to the byte at `[ds:0]`, reads it back and sends it to port 0x10, for ever.
const CODE: &[u8] = &[
    0xfe, 0x06, 0x00, 0x00, // incb [0]
    0xa0, 0x00, 0x00, //       mov al, [0]
    0xe6, 0x10, //             out 0x10, al
    0xeb, 0xf5, //             jmp start
];
const CODE_AT: GuestAddress = GuestAddress(0x1000);
/// Where the guest's data segment begins.
const DATA_AT: GuestAddress = GuestAddress(0x2_0000);

fn kvm() -> Kvm {
    Kvm::new().expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out")
}

struct Machine {
    vcpu: VcpuFd,
    memslots: Memslots,
    _code: Slot,
}

#[derive(Debug, PartialEq)]
enum Event {
    /// The guest sent this byte to its port.
    Sent(u8),
    /// The guest touched memory that is nobody's.
    MmioRead(u64),
    MmioWrite(u64, u8),
}

impl Machine {
    fn new() -> Self {
        let vm: Arc<VmFd> = Arc::new(kvm().create_vm().unwrap());
        let memslots = Memslots::new(Arc::clone(&vm));
        let code = memslots
            .create(CODE_AT, Backing::anonymous(0x1000), SlotFlags::NONE)
            .unwrap();
        memslots.snapshot().write_slice(CODE, CODE_AT).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        (sregs.ds.base, sregs.ds.selector) = (DATA_AT.0, (DATA_AT.0 >> 4) as u16);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE_AT.0, 2);
        vcpu.set_regs(&regs).unwrap();
        Self {
            vcpu,
            memslots,
            _code: code,
        }
    }

    fn data(&self, backing: Backing, flags: SlotFlags) -> Slot {
        self.memslots.create(DATA_AT, backing, flags).unwrap()
    }

    /// Where the guest's data segment begins from now on.
    fn data_at(&self, address: GuestAddress) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.ds.base, sregs.ds.selector) = (address.0, (address.0 >> 4) as u16);
        self.vcpu.set_sregs(&sregs).unwrap();
    }

    /// Runs to the guest's next event. An MMIO read is answered with `answer`.
    fn run(&mut self, answer: u8) -> Event {
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, &[byte]) => Event::Sent(byte),
            VcpuExit::MmioRead(address, data) => {
                data.fill(answer);
                Event::MmioRead(address)
            }
            VcpuExit::MmioWrite(address, &[byte]) => Event::MmioWrite(address, byte),
            other => panic!("an exit that this guest does not cause: {other:?}"),
        }
    }
}

#[test]
fn what_one_side_writes_the_other_reads() {
    for backing in [
        Backing::anonymous(0x1000),
        Backing::memfd(0x1000),
        Backing::anonymous(8 << 20),
    ] {
        let mut machine = Machine::new();
        let _data = machine.data(backing, SlotFlags::NONE);
        let ram = machine.memslots.ram();
        ram.memory().write_obj(41u8, DATA_AT).unwrap();
        assert_eq!(machine.run(0), Event::Sent(42));
        assert_eq!(ram.memory().read_obj::<u8>(DATA_AT).unwrap(), 42);
        ram.memory().write_obj(7u8, DATA_AT).unwrap();
        assert_eq!(machine.run(0), Event::Sent(8));
    }
}

#[test]
fn a_removed_slot_is_gone_for_the_guest_and_for_devices() {
    let mut machine = Machine::new();
    let data = machine.data(Backing::anonymous(0x1000), SlotFlags::NONE);
    let ram = machine.memslots.ram();
    assert_eq!(machine.run(0), Event::Sent(1));
    data.remove().unwrap().wait();
    assert!(
        !machine
            .memslots
            .snapshot()
            .is_visible(Gfn::containing(DATA_AT))
    );
    let refused = ram.memory().read_obj::<u8>(DATA_AT).unwrap_err();
    assert!(
        matches!(refused, GuestMemoryError::InvalidGuestAddress(DATA_AT)),
        "{refused}"
    );
    assert_eq!(machine.run(0x20), Event::MmioRead(DATA_AT.0));
    assert_eq!(machine.run(0x20), Event::MmioWrite(DATA_AT.0, 0x21));
    assert_eq!(machine.run(0x30), Event::MmioRead(DATA_AT.0));
    assert_eq!(machine.run(0x30), Event::Sent(0x30));
    // And a new one in its place is memory again, empty.
    let _data = machine.data(Backing::anonymous(0x1000), SlotFlags::NONE);
    assert_eq!(machine.run(0), Event::Sent(1));
}

#[test]
fn a_moved_slot_takes_its_contents_along() {
    let mut machine = Machine::new();
    let elsewhere = GuestAddress(0x50_0000);
    let mut data = machine
        .memslots
        .create(elsewhere, Backing::anonymous(0x1000), SlotFlags::NONE)
        .unwrap();
    machine
        .memslots
        .snapshot()
        .write_obj(99u8, elsewhere)
        .unwrap();
    assert_eq!(machine.run(0), Event::MmioRead(DATA_AT.0));
    data.relocate(DATA_AT).unwrap().wait();
    assert_eq!(data.extent().start(), DATA_AT);
    // The increment that was under way ends in memory or as MMIO, as the host has it; the next round does not.
    while machine.run(0) != Event::Sent(100) {}
    assert_eq!(
        machine.memslots.snapshot().read_obj::<u8>(DATA_AT).unwrap(),
        100
    );
}

#[test]
fn a_read_only_slot_is_read_by_the_guest_and_its_writes_are_exits() {
    let mut machine = Machine::new();
    let _rom = machine.data(Backing::anonymous(0x1000), SlotFlags::READ_ONLY);
    // The loader's view fills it.
    machine.memslots.snapshot().write_obj(5u8, DATA_AT).unwrap();
    assert_eq!(machine.run(0), Event::MmioWrite(DATA_AT.0, 6));
    assert_eq!(machine.run(0), Event::Sent(5));
    assert_eq!(
        machine.memslots.snapshot().read_obj::<u8>(DATA_AT).unwrap(),
        5
    );
}

#[test]
fn a_read_only_slot_and_a_writable_one_are_cut_from_one_mapping() {
    let (rom_at, ram_at) = (GuestAddress(0x3_0000), DATA_AT);
    for backing in [Backing::anonymous(0x3000), Backing::memfd(0x3000)] {
        let mut machine = Machine::new();
        let whole = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
        let slot = |start, offset, flags| NewSlot {
            start,
            backing: Backing::part(&whole, offset, 0x1000),
            flags,
        };
        let slots = machine.memslots.create_all([
            slot(ram_at, 0, SlotFlags::NONE),
            slot(rom_at, 0x1000, SlotFlags::READ_ONLY),
        ]);
        let mut slots = slots.unwrap();
        let loader = machine.memslots.snapshot();
        loader.write_obj(5u8, rom_at).unwrap();
        loader.write_obj(70u8, ram_at).unwrap();
        let device = machine.memslots.ram();
        device.memory().write_obj(6u8, rom_at).unwrap_err();

        assert_eq!(machine.run(0), Event::Sent(71));
        machine.data_at(rom_at);
        // What was under way with the old segment ends first.
        assert_eq!(machine.run(0), Event::MmioWrite(rom_at.0, 6));
        assert_eq!(machine.run(0), Event::Sent(5));

        // One slot more over what is RAM already: what the guest writes there, the ROM shows, and takes no write itself.
        let high = GuestAddress(0x50_0000);
        let shadow = slot(high, 0, SlotFlags::READ_ONLY);
        slots.extend(machine.memslots.create_all([shadow]).unwrap());
        machine.data_at(high);
        assert_eq!(machine.run(0), Event::MmioWrite(high.0, 72));
        assert_eq!(machine.run(0), Event::Sent(71));
        machine.data_at(ram_at);
        assert_eq!(machine.run(0), Event::Sent(72));
        assert_eq!(device.memory().read_obj::<u8>(high).unwrap(), 72);

        // One goes, and the others have their memory as before.
        drop((slots.remove(0), loader, whole));
        machine.data_at(high);
        assert_eq!(machine.run(0), Event::MmioWrite(high.0, 73));
        assert_eq!(machine.run(0), Event::Sent(72));
    }
}
