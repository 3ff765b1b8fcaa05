// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest that is told of memory that it has lost (`guests::heeder`), and what it was told.

use std::fs;

use guests::heeder::{
    COUNT, FIRST, FROM, MCG_CAP, Manner, PAGES, QUIT, RECORD, RECORDS, TO, WRONG, heeder64,
};
use reference_vmm::config::Config;
use reference_vmm::end::GuestEnd;
use vm_memory::{Bytes, GuestAddress};

use super::keeper::{Guest, machine};

/// One machine check, as the guest read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    pub mcg_status: u64,
    pub status: u64,
    pub address: u64,
    pub misc: u64,
}

/// Its kernel, and a machine for it.
pub fn heeder(manner: Manner, cpus: u32) -> (tempfile::TempPath, Config) {
    let (kernel, config) = machine(heeder64(), cpus, "16M");
    let cmdline = format!("{} ", manner as u8);
    (kernel, Config { cmdline, ..config })
}

/// Where its page of this number is.
pub fn page(number: u64) -> u64 {
    assert!(number < PAGES);
    FIRST + number * 4096
}

/// Has it compare these pages alone, from its next pass on.
pub fn compares(guest: &Guest, from: u32, to: u32) {
    let memory = guest.running.memory();
    memory.write_obj(from, GuestAddress(FROM)).unwrap();
    memory.write_obj(to, GuestAddress(TO)).unwrap();
}

/// How many machine checks it has had.
pub fn count(guest: &Guest) -> u32 {
    let memory = guest.running.memory();
    memory.read_obj(GuestAddress(COUNT)).unwrap()
}

/// What they said, of the last 1,024 of them.
pub fn told(guest: &Guest) -> Vec<Told> {
    let memory = guest.running.memory();
    let count = count(guest).min(1024);
    let word = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let record = |number: u32| {
        let at = RECORDS + u64::from(number) * RECORD;
        Told {
            mcg_status: word(at),
            status: word(at + 8),
            address: word(at + 16),
            misc: word(at + 24),
        }
    };
    (0..count).map(record).collect()
}

/// IA32_MCG_CAP, as it read it.
pub fn mcg_cap(guest: &Guest) -> u64 {
    let memory = guest.running.memory();
    memory.read_obj(GuestAddress(MCG_CAP)).unwrap()
}

/// What is the same in all that a guest is told of a page of 4 KiB that it touched.
pub fn expect_words(told: &Told, amd: bool) {
    // VAL, UC, EN, MISCV and ADDRV; and Poison, or S, AR and a data load. RIPV, EIPV and MCIP. A physical address, of
    // which 12 bits are not valid.
    let status = match amd {
        true => 0xbc00_0800_0000_0000,
        false => 0xbd80_0000_0000_0134,
    };
    assert_eq!(
        (told.mcg_status, told.status, told.misc),
        (7, status, 0x8c),
        "{told:x?}"
    );
}

/// Whether this host's KVM says enough of an access for a machine check: in the lab it does. Else the guest has ended, and
/// that with the reason.
pub fn tells(guest: &Guest) -> bool {
    match guest.end.get() {
        None => true,
        Some(GuestEnd::Failed(why)) => {
            assert!(
                why.contains("tells of it when the instruction is over"),
                "{why}"
            );
            let in_lab = std::env::var_os("REFERENCE_VMM_LAB").is_some();
            assert!(!in_lab, "{why}");
            println!("NOT TRIED: {why}");
            false
        }
        Some(other) => {
            let memory = guest.running.memory();
            let wrong = [WRONG, WRONG + 8].map(|at| memory.read_obj::<u64>(GuestAddress(at)));
            panic!("{other:?}, {wrong:x?}, {:x?}", told(guest).last())
        }
    }
}

/// Until it has been through its memory so often more, or has ended.
pub fn passes(guest: &mut Guest, count: usize) {
    let until = guest.said.len() + count;
    while guest.said.len() < until && !guest.end.is_told() {
        guest.listen();
    }
}

/// Until it has had so many machine checks, or has ended. What it says meanwhile is heard.
pub fn checks(guest: &mut Guest, until: u32) {
    while count(guest) < until && !guest.end.is_told() {
        guest.listen();
    }
}

/// Whether this host's processor is AMD's, or one of its kind.
pub fn host_is_amd() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    ["AuthenticAMD", "HygonGenuine"]
        .iter()
        .any(|vendor| cpuinfo.contains(vendor))
}

/// Has it quit: what it did not lose is as it wrote it.
pub fn has_the_rest(guest: Guest) {
    assert_eq!(QUIT, guests::keeper::QUIT);
    guest.has_all();
}
