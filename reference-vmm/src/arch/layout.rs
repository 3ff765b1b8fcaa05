// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's physical address space, its ports and its interrupts: every fixed number of the
//! machine, once, with the reason why it is what it is.
//!
//! ```text
//! 0                 low RAM: interrupt vectors and BIOS data of a PC, left to the guest
//! BOOT_DATA         what the monitor leaves for the kernel's first instructions
//!   START_INFO_ADDR   PVH start_info or multiboot info, with what they point at
//!   ZERO_PAGE_ADDR    Linux's boot_params
//!   BOOT_STACK_TOP    a stack of one page, growing down from here
//!   BOOT_TABLES_ADDR  GDT and page tables of the long-mode entry
//!   CMDLINE_ADDR      the command line, up to CMDLINE_MAX bytes with its NUL
//! 0x9fc00           EBDA (reserved, empty), then the PC's video and option ROM window
//! FIRMWARE          read-only to the guest, in machines with ACPI
//!   ACPI_TABLES       RSDP first, then the other tables
//!   GENERATION_ID     the machine's number
//!   RESET_VECTOR      code that resets the machine
//! 1 MiB             RAM for the kernel and its initrd
//! MMIO_HOLE         3 GiB to 4 GiB: no RAM
//!   VIRTIO_MMIO         virtio-mmio devices, a page each
//!   0xfec00000          IOAPIC
//!   0xfee00000          local APIC
//!   0xfffbc000          pages that KVM keeps for itself on Intel hosts
//! 4 GiB             the rest of the RAM
//! ```

use std::ops::Range;

use vm_memory::GuestAddress;

/// Page size, bytes.
pub const PAGE: u64 = 4096;

/// End of the conventional memory that a PC's BIOS reports: the last KiB below 640 KiB is the
/// extended BIOS data area. It is empty here, but guests that scan it for tables expect it there.
pub const EBDA: Range<u64> = 0x9_fc00..0xa_0000;

/// Video memory, option ROMs and BIOS of a PC. There is RAM behind it all up to the [`FIRMWARE`] (and
/// behind that too, in machines without ACPI), but no memory map that a guest sees calls it so.
pub const ISA_WINDOW: Range<u64> = 0xa_0000..0x10_0000;

/// Start of extended memory, where kernels are loaded.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// All that the monitor puts below 640 KiB. It avoids page 0, which has the vectors of real mode,
/// and stays below 0x20000, so that a real-mode trampoline of the guest finds room above it.
pub const BOOT_DATA: Range<u64> = 0x6000..0x2_0000;

/// PVH's `hvm_start_info`, or the multiboot information structure, with what they point at: one
/// page, which ends at the zero page.
pub const START_INFO_ADDR: GuestAddress = GuestAddress(0x6000);

/// Linux's `boot_params`, "the zero page".
pub const ZERO_PAGE_ADDR: GuestAddress = GuestAddress(0x7000);

/// First byte above the stack that a kernel starts with. No protocol asks for one; a bare-metal
/// guest in a higher language likes it.
pub const BOOT_STACK_TOP: GuestAddress = GuestAddress(0x9000);

/// GDT and page tables of the long-mode entry, as kvm-core's `LongModeTables` has them: a page with
/// the GDT, PML4, PDPT, and one page directory for each GiB.
pub const BOOT_TABLES_ADDR: GuestAddress = GuestAddress(0x9000);

/// The most that the page tables map, GiB: all addresses at which a kernel is placed. With four page
/// directories the tables end at [`CMDLINE_ADDR`].
pub const IDENTITY_MAX_GIB: u64 = 4;

/// The kernel's command line.
pub const CMDLINE_ADDR: GuestAddress = GuestAddress(0x1_0000);

/// Room for the command line with its NUL, bytes. x86 Linux reads 2048; others more.
pub const CMDLINE_MAX: usize = 0x1_0000;

/// The ACPI tables. The RSDP is at the start: ACPI 6.5, 5.2.5.1 has firmware put it on a 16-byte
/// boundary between 0xe0000 and 0xfffff, where kernels that no one tells the address (multiboot,
/// boot protocols before 2.14) search for it.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_f000;

/// The machine's generation id, 16 bytes: another one after each restore (Microsoft's "Virtual Machine Generation ID",
/// which Linux's `vmgenid` driver knows).
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);

/// What a PC's BIOS takes, the tables and the reset vector here: reserved in every memory map, and a
/// slot of its own that the guest can only read where there is something in it.
pub const FIRMWARE: Range<u64> = 0xe_0000..0x10_0000;

/// Where a PC's BIOS begins to run, f000:fff0: [`reset_vector`](super::reset_vector) is there.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);

/// Guest physical addresses below 4 GiB without RAM. 1 GiB is what devices will need at most, and
/// aligned to 1 GiB so that host and guest can map all RAM with the largest pages.
pub const MMIO_HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// Window of the virtio-mmio devices, at the start of the hole.
pub const VIRTIO_MMIO: Range<u64> = 0xc000_0000..0xc010_0000;

/// Size of one virtio-mmio device's registers: a page, so that each can be mapped or trapped alone.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE;

/// The IOAPIC, where the 82093AA's data sheet has it, and both KVM's model and irq-routing's.
pub const IOAPIC_ADDR: GuestAddress = GuestAddress(irq_routing::ioapic::IOAPIC_BASE);

/// Pins of KVM's IOAPIC; they are GSI 0 and up.
pub const IOAPIC_PINS: u32 = 24;

/// The local APIC's default base (IA32_APIC_BASE after reset).
pub const LAPIC_ADDR: GuestAddress = GuestAddress(0xfee0_0000);

/// The page for `KVM_SET_IDENTITY_MAP_ADDR`: Intel hosts without unrestricted guest mode run real
/// mode with this page table. The kernel's own default.
pub const IDENTITY_MAP_ADDR: GuestAddress = GuestAddress(0xfffb_c000);

/// The three pages for `KVM_SET_TSS_ADDR`, behind the identity map.
pub const TSS_ADDR: GuestAddress = GuestAddress(0xfffb_d000);

/// Both of KVM's private ranges; memory maps call them reserved.
pub const KVM_PRIVATE: Range<u64> = 0xfffb_c000..0xfffc_0000;

/// Port of the first serial port's registers (8 of them).
pub const COM1_PORT: u16 = 0x3f8;

/// Interrupt of the first serial port, as on a PC.
pub const COM1_GSI: u32 = 4;

/// Index and data port of the real-time clock.
pub const RTC_PORT: u16 = 0x70;

/// pvpanic's port (QEMU's default, which guests' drivers take from the DSDT).
pub const PVPANIC_PORT: u16 = 0x505;

/// Keyboard controller's command port. [`RESET_VALUE`] there resets the machine.
pub const RESET_PORT: u16 = 0x64;

/// 8042 command "pulse output port bit 0", wired to the reset line since the PC AT.
pub const RESET_VALUE: u8 = 0xfe;

/// ACPI's sleep control register (ACPI 6.5, 4.8.3.7), one byte: the guest writes
/// `SLP_TYP << 2 | SLP_EN` (bit 5).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;

/// ACPI's sleep status register, one byte: bit 7 is WAK_STS. It reads 0 and ignores writes in a
/// machine that never wakes.
pub const SLEEP_STATUS_PORT: u16 = 0x601;

/// `SLP_TYP` of S5, soft off: the value in the DSDT's `\_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;

/// What the guest writes to [`SLEEP_CONTROL_PORT`] to power off.
pub const SLEEP_CONTROL_S5: u8 = SLEEP_TYPE_S5 << 2 | 1 << 5;

/// Event register of the Generic Event Device, one byte: reads give the pending events
/// (`GED_EVENT_…`) and clear them; a write says that an ACPI system has taken the machine over.
pub const GED_PORT: u16 = 0x602;

/// Interrupt of the Generic Event Device, edge-triggered. 9 is the PC's number for ACPI's own
/// interrupt, which a hardware-reduced machine does not have.
pub const GED_GSI: u32 = 9;

/// Bit of [`GED_PORT`]: the power button was pressed.
pub const GED_EVENT_POWER_BUTTON: u8 = 1 << 0;

/// Bit of [`GED_PORT`]: the machine's [generation id](GENERATION_ID) is another one.
pub const GED_EVENT_GENERATION: u8 = 1 << 1;

/// First GSI for virtio-mmio devices: below are the PC's.
pub const VIRTIO_MMIO_FIRST_GSI: u32 = 16;

// The order above, held: nothing of the boot data overlaps the next.
const _: () = {
    assert!(BOOT_DATA.start == START_INFO_ADDR.0);
    assert!(START_INFO_ADDR.0 + PAGE <= ZERO_PAGE_ADDR.0);
    assert!(ZERO_PAGE_ADDR.0 + 2 * PAGE <= BOOT_STACK_TOP.0);
    assert!(BOOT_STACK_TOP.0 <= BOOT_TABLES_ADDR.0);
    assert!(BOOT_TABLES_ADDR.0 + (3 + IDENTITY_MAX_GIB) * PAGE <= CMDLINE_ADDR.0);
    assert!(CMDLINE_ADDR.0 + CMDLINE_MAX as u64 <= BOOT_DATA.end);
    assert!(BOOT_DATA.end <= EBDA.start);
    assert!(ISA_WINDOW.start == EBDA.end && ISA_WINDOW.end == HIGH_RAM.0);
    assert!(ACPI_TABLES.start >= ISA_WINDOW.start && ACPI_TABLES.end <= ISA_WINDOW.end);
    assert!(ACPI_TABLES.start == FIRMWARE.start && ACPI_TABLES.end <= FIRMWARE.end);
    assert!(GENERATION_ID.0 >= ACPI_TABLES.end && GENERATION_ID.0 + 16 <= RESET_VECTOR.0);
    assert!(RESET_VECTOR.0 >= FIRMWARE.start && FIRMWARE.end == HIGH_RAM.0);
    assert!(FIRMWARE.start.is_multiple_of(PAGE) && FIRMWARE.end.is_multiple_of(PAGE));
    assert!(VIRTIO_MMIO.start >= MMIO_HOLE.start && VIRTIO_MMIO.end <= IOAPIC_ADDR.0);
    assert!(KVM_PRIVATE.start == IDENTITY_MAP_ADDR.0 && IDENTITY_MAP_ADDR.0 + PAGE == TSS_ADDR.0);
    assert!(KVM_PRIVATE.end == TSS_ADDR.0 + 3 * PAGE && KVM_PRIVATE.end <= MMIO_HOLE.end);
};
