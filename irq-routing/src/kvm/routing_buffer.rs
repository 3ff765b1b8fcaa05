// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `struct kvm_irq_routing` with its entries, as `KVM_SET_GSI_ROUTING` reads it.
//!
//! Beside the bindings' `KvmIrqRouting`, which writes its zeroes one word after the other: of a commit of a
//! thousand routes that was a tenth of the ioctl's time.

use std::mem::{align_of, size_of};

use kvm_bindings::{kvm_irq_routing, kvm_irq_routing_entry};

use super::abi;
use crate::table::Table;

const WORD: usize = size_of::<u64>();
const ENTRY_WORDS: usize = size_of::<kvm_irq_routing_entry>() / WORD;

// The header is a word, and entries follow it without a gap.
const _: () = assert!(size_of::<kvm_irq_routing>() == WORD);
const _: () = assert!(size_of::<kvm_irq_routing_entry>().is_multiple_of(WORD));
const _: () = assert!(align_of::<kvm_irq_routing_entry>() == WORD);

/// A table in KVM's form: the number of entries and no flags, then the entries.
pub struct RoutingBuffer(Vec<u64>);

impl RoutingBuffer {
    pub fn of(table: &Table) -> Self {
        // Its length is at most the host's limit, thousands.
        let count = table.len();
        let mut words = vec![0u64; 1 + count * ENTRY_WORDS];
        if let Some((header, entries)) = words.split_first_mut() {
            let [a, b, c, d] = (count as u32).to_ne_bytes();
            *header = u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]);
            // SAFETY: the words are initialized, as long as `count` entries, and aligned as entries are
            // (asserted above); an entry is made of integers alone, of which any bytes are a value. The
            // slice borrows `words`.
            let entries = unsafe {
                std::slice::from_raw_parts_mut(
                    entries.as_mut_ptr().cast::<kvm_irq_routing_entry>(),
                    count,
                )
            };
            let mut entries = entries.iter_mut();
            table.for_each(|entry| {
                if let Some(to) = entries.next() {
                    *to = abi::to_kvm(&entry);
                }
            });
        }
        Self(words)
    }

    pub fn as_ptr(&self) -> *const kvm_irq_routing {
        self.0.as_ptr().cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gsi::Gsi;
    use crate::route::{Entry, Msi};
    use crate::rules::Rules;

    #[test]
    fn it_has_the_number_of_entries_no_flags_and_every_entry_in_order() {
        let rules = Rules::new(
            crate::IrqchipKind::Kernel {
                pit: crate::Pit::Absent,
            },
            4096,
        );
        let mut table = Table::x86_default();
        for gsi in 24..2000 {
            let msi = Msi {
                address: 0xfee0_0000,
                data: gsi,
                devid: None,
            };
            table.replace(&rules, Gsi(gsi), &[msi.into()]).unwrap();
        }
        for table in [table, Table::new()] {
            let buffer = RoutingBuffer::of(&table);
            // SAFETY: the header, and behind it as many entries as it says.
            let (header, entries) = unsafe {
                let header = *buffer.as_ptr().cast::<[u32; 2]>();
                let entries = buffer.as_ptr().cast::<u64>().add(1).cast();
                let entries: &[kvm_irq_routing_entry] =
                    std::slice::from_raw_parts(entries, header[0] as usize);
                (header, entries)
            };
            assert_eq!(header, [table.len() as u32, 0]);
            // SAFETY: every byte of the buffer is initialized.
            let back = entries
                .iter()
                .map(|entry| unsafe { abi::from_kvm(entry) }.unwrap());
            assert!(back.eq(table.entries().collect::<Vec<Entry>>()));
        }
    }
}
