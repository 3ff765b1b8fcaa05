// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How an interrupt finds its vCPU: the interrupt controllers that KVM has for a VM, the table that
//! says where each global system interrupt (GSI) goes, and what raises them.
//!
//! ```text
//!   serial, virtio, vhost, VFIO          the VMM                        KVM
//!
//!   IrqSource ─► Irqfd  ── eventfd ──┐
//!                Line   ── KVM_IRQ_LINE ──► GSI ──► table ──► PIC / IOAPIC pin ──► vCPU
//!                                             (Routing is the   MSI ──────────────► vCPU
//!                                              one owner)
//!   Routing::signal_msi ── KVM_SIGNAL_MSI, no table ──────────────────────────────► vCPU
//! ```
//!
//! With the split irqchip the pins are the VMM's, a [`SplitIoapic`](ioapic::SplitIoapic):
//!
//! ```text
//!   PinLine ─┐ ORed       ┌─ KVM_SIGNAL_MSI ─────────────────────────────────► vCPU
//!   PinLine ─┴─► pin ─► redirection entry ─► table (GSI = pin): whose EOIs KVM reports,
//!                 ▲       ▲                  and what an irqfd on the GSI raises
//!                 │       └── the guest's writes to 0xfec00000
//!                 └── EOI ◄── ack notifiers ◄── KVM_EXIT_IOAPIC_EOI ◄──────── vCPU
//! ```
//!
//! A VM's interrupts begin with [`Irqchip::create`], before the first vCPU, and [`Routing::new`],
//! the one owner of the table. A device takes a GSI, which is a handle: [`Routing::reserve`] for a
//! legacy pin, [`Routing::allocate`] for a message. It gives the GSI a route if it has none
//! ([`Routing::change`]), and raises it with an [`IrqSource`], an [`Irqfd`], a [`Line`] (shared by
//! several sources: [`SharedLine`]) or, split, a [`PinLine`](ioapic::PinLine); [`LevelSource`] is any of
//! these lines. Whatever is dropped is released: lines are lowered, eventfds detached, numbers free
//! again, in that order.
//!
//! # What costs what
//!
//! Changing the table waits for a grace period inside KVM, which is cheap on an idle host and
//! milliseconds on a busy one. So it is never paid where no one could tell the difference:
//!
//! - The default routes of the in-kernel irqchip are KVM's own doing. A serial port on GSI 4 commits
//!   nothing: [`IrqSource`] attaches an eventfd (no grace period) when it is first raised.
//! - A [`Change`] gathers any number of routes into one `KVM_SET_GSI_ROUTING`, and makes none when
//!   the routes are those that KVM has. [`Change::defer`] leaves them to the next commit or to the
//!   first thing that attaches to one of them: masked MSI-X vectors cost nothing.
//! - A GSI that is given up keeps its message in KVM, where no one can raise it, until the next
//!   commit. A number that is taken again never inherits a route: whatever attaches to it commits
//!   first.
//! - The guest's writes to the redirection table of a [`SplitIoapic`](ioapic::SplitIoapic) ask
//!   nothing of the kernel, but to send a level that was pending. An edge of a pin is one
//!   `KVM_SIGNAL_MSI`; a level is the same, after one commit when its route is not KVM's yet, with
//!   which all other pins' go along. So a guest that sets up all 24 pins pays for one commit; masking
//!   and unmasking, as threaded handlers do, costs none. Only while an irqfd is attached to a pin is
//!   a change of that pin's route committed at once.
//! - An EOI exit costs no ioctl, or one `KVM_SIGNAL_MSI` for each line that is still high.
//!
//! What does wait for a grace period: a commit, detaching an irqfd, and the life and death of the
//! in-kernel irqchip itself ([`IrqchipKind`]).
//!
//! # Example
//!
//! With the fake host that the crate's own tests use; `Arc<VmFd>` or `&VmFd` of kvm-ioctls takes its
//! place in a VMM (`examples/serial_interrupt.rs` is a whole one).
//!
//! ```
//! use irq_routing::fake::{Call, FakeHost};
//! use irq_routing::{Gsi, Irqchip, IrqchipKind, Msi, Pit, Routing};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = FakeHost::new();
//! let irqchip = Irqchip::create(&vm, IrqchipKind::Kernel { pit: Pit::PresentWithSpeaker })?;
//! let routing = Routing::new(&vm, &irqchip);
//! # vm.take_calls();
//!
//! // COM1: a pin of the default table. With `vm_superio::Serial::new(com1, …)` no glue is needed.
//! let com1 = routing.source(&routing.reserve(Gsi(4))?);
//! com1.trigger()?;
//! assert_eq!(vm.take_calls(), [Call::AttachIrqfd(Gsi(4))]);
//!
//! // A device with two message vectors: one commit.
//! let vectors = [routing.allocate()?, routing.allocate()?];
//! let mut change = routing.change();
//! for (gsi, data) in vectors.iter().zip([0x41, 0x42]) {
//!     change.route(gsi, Msi { address: 0xfee0_0000, data, devid: None });
//! }
//! change.commit()?;
//! let irqfds = [routing.irqfd(&vectors[0])?, routing.irqfd(&vectors[1])?];
//! irqfds[0].trigger()?;
//! assert_eq!(vm.take_calls()[0], Call::SetGsiRouting(42));
//! # Ok(())
//! # }
//! ```
//!
//! A split irqchip:
//!
//! ```
//! use irq_routing::fake::{Call, FakeHost};
//! use irq_routing::ioapic::SplitIoapic;
//! use irq_routing::{Arrival, Gsi, Irqchip, IrqchipKind, Routing};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = FakeHost::new();
//! let irqchip = Irqchip::create(&vm, IrqchipKind::Split { pins: 24 })?;
//! let routing = Routing::new(&vm, &irqchip);
//! let ioapic = SplitIoapic::new(&routing)?;
//! // On the bus: register_mmio(0xfec00000.., Arc::new(ioapic.clone())). The guest programs pin 10,
//! // level-triggered, as vector 0x3a:
//! ioapic.write(0x00, &[0x10 + 2 * 10]);
//! ioapic.write(0x10, &0x803au32.to_le_bytes());
//!
//! let line = ioapic.line(&routing.reserve(Gsi(10))?)?;
//! # vm.take_calls();
//! assert_eq!(line.set(true)?, Arrival::Delivered { to: 1 });
//! let calls = vm.take_calls();
//! assert!(matches!(calls[..], [Call::SetGsiRouting(1), Call::SignalMsi(_)]));
//! // VcpuExit::IoapicEoi(0x3a), with the line still high: once more.
//! ioapic.eoi(0x3a);
//! assert!(matches!(vm.take_calls()[..], [Call::SignalMsi(_)]));
//! # Ok(())
//! # }
//! ```
//!
//! # Header map
//!
//! What became of the identifiers of Linux's `include/linux/kvm_host.h` (3.17) that are about
//! routing. "Kernel" is what KVM does alone; what user space does about it follows.
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_s390_adapter_int` | [`S390Adapter`] |
//! | `kvm_kernel_irq_routing_entry` | [`Entry`], with a [`Route`]; [`kvm::abi`] has both directions of the ABI's form |
//! | `kvm_irq_routing_table` | [`Table`] |
//! | `KVM_MAX_IRQ_ROUTES` | [`Rules::limit`], asked of the host |
//! | `kvm_setup_default_irq_routing` | [`Table::x86_default`]; KVM installs it by itself, so nothing is committed |
//! | `kvm_set_irq_routing` | [`Change::commit`], [`host::SetGsiRouting`] |
//! | `kvm_set_routing_entry` | [`Rules::check`] |
//! | `kvm_free_irq_routing` | kernel: frees the table with the VM; here dropping [`Routing`] frees the copy |
//! | `kvm_irq_routing_update` | kernel: refreshes attached irqfds after a commit, which is why an [`Irqfd`] may stay attached while its route changes |
//! | `kvm_irq_map_gsi` | [`Table::map_gsi`] |
//! | `kvm_irq_map_chip_pin` | [`Table::map_chip_pin`] |
//! | `KVM_USERSPACE_IRQ_SOURCE_ID` | kernel: the one source that all [`Line`]s of a GSI share; [`SharedLine`] ORs several before it |
//! | `KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID` | kernel: the source of [`Routing::irqfd_resample`] |
//! | `kvm_set_irq` | [`LevelSource::set`], [`Line::pulse`], with an [`Arrival`]; in an IOAPIC here [`Ioapic::set_line`](ioapic::Ioapic::set_line) |
//! | `kvm_set_irq_inatomic` | [`LevelSource::try_set`], [`Routing::try_signal`], [`IrqSource::try_trigger`]; kernel: how an [`Irqfd`] with a message is delivered from the writer's context |
//! | `kvm_set_msi` | kernel: delivers a [`Route::Msi`] |
//! | `kvm_send_userspace_msi` | [`Routing::signal_msi`] |
//! | `kvm_vm_ioctl_irq_line` | [`host::SetIrqLine`] |
//! | `kvm_request_irq_source_id` | [`SharedLine::source`], [`SplitIoapic::line`](ioapic::SplitIoapic::line); as many as there are devices, not 64 |
//! | `kvm_free_irq_source_id` | dropping a [`LineSource`] or a [`PinLine`](ioapic::PinLine) |
//! | `kvm_irq_ack_notifier` | the resample eventfd of [`Routing::irqfd_resample`]; split: [`Notifier`](ioapic::Notifier), by `KVM_EXIT_IOAPIC_EOI` |
//! | `kvm_irq_mask_notifier` | [`Notifier`](ioapic::Notifier), of the split irqchip, whose mask bits are here |
//! | `kvm_register_irq_mask_notifier` | [`SplitIoapic::register_mask_notifier`](ioapic::SplitIoapic::register_mask_notifier) |
//! | `kvm_unregister_irq_mask_notifier` | dropping the [`Notifier`](ioapic::Notifier) |
//! | `kvm_fire_mask_notifiers` | the guest's write to a redirection entry: [`SplitIoapic::write`](ioapic::SplitIoapic::write) |
//! | `kvm_irq_has_notifier` | [`SplitIoapic::has_ack_notifier`](ioapic::SplitIoapic::has_ack_notifier) |
//! | `kvm_notify_acked_irq` | kernel: writes the resample eventfds of a pin; split: [`SplitIoapic::eoi`](ioapic::SplitIoapic::eoi) |
//! | `kvm_register_irq_ack_notifier` | [`Routing::irqfd_resample`]; split: [`SplitIoapic::register_ack_notifier`](ioapic::SplitIoapic::register_ack_notifier) |
//! | `kvm_unregister_irq_ack_notifier` | [`Irqfd::detach`] of a resampled one; split: dropping the [`Notifier`](ioapic::Notifier) |
//! | `kvm_irqfd_init` | kernel: prepares a new VM; nothing to do here |
//! | `kvm_irqfd_exit` | kernel: when its module leaves; nothing to do here |
//! | `kvm_irqfd` | [`Routing::irqfd`], [`Irqfd`], [`host::AttachIrqfd`] |
//! | `kvm_irqfd_release` | kernel: detaches what is left when the VM goes; dropping an [`Irqfd`] does it earlier |
//!
//! # Concurrency
//!
//! Everything is `Send` and `Sync` as far as the host is, and clones of a [`Routing`] are the same
//! table. Commits have one order: a lock is held across the ioctl. [`Routing::table`] gives the
//! committed table without waiting for a commit. Raising an interrupt takes no lock (a [`Line`]
//! takes its own, and a [`PinLine`](ioapic::PinLine) the chip's, which is held across
//! `KVM_SIGNAL_MSI` and the commit that a level may need), so vCPU and device threads may do so at
//! any time; one raised during a commit goes along the old route or the new one. Notifiers run with
//! no lock held, on the thread of the vCPU that wrote or acknowledged; to drop one waits for its
//! calls on other threads. To drop a [`GsiHandle`] may wait for a commit, never for a guest. No
//! lock is held while a caller's code runs, so nothing here can deadlock with it.
//!
//! # What never waits
//!
//! The `try_` forms ([`Line::try_set`], [`LineSource::try_set`],
//! [`PinLine::try_set`](ioapic::PinLine::try_set), [`IrqSource::try_trigger`],
//! [`Routing::try_signal`]) take no lock that another thread holds, commit nothing and attach nothing:
//! where one of these would be needed they answer [`Error::WouldBlock`] and have changed nothing, as
//! `kvm_set_irq_inatomic` does. [`Routing::signal_msi`] and [`Irqfd::trigger`] take no lock as they
//! are. A thread that may not wait prepares before: [`IrqSource::enable`], [`Routing::flush`].
//!
//! What is left is one system call. `KVM_IRQ_LINE_STATUS` and `KVM_SIGNAL_MSI` read KVM's table
//! under SRCU, which never waits, and take spinlocks of KVM's PICs and IOAPIC, held for as long as a
//! look at their pins takes; a message with many destinations is a loop over the vCPUs. A write to an
//! irqfd's eventfd takes the eventfd's spinlock, and KVM leaves to a worker what it cannot deliver
//! there. None of them takes a mutex, waits for a grace period or for a guest; vCPUs are kicked and
//! not waited for. (The thread can be preempted meanwhile, as anywhere.)
//!
//! # Threat model
//!
//! A guest chooses the address and data of its MSIs and may raise, mask and unmask as fast as it
//! likes. Whatever it chooses is checked by [`Rules`] or refused by KVM with an error that leaves
//! the table as it was; nothing here panics on it, and the table is bounded by the host's limit. A
//! guest that rewrites the vectors of level-triggered pins in a loop makes itself wait for commits,
//! and whoever raises one of the chip's lines meanwhile, for the chip's lock is held; to bound what
//! that costs the host is the VMM's to do, and a thread that must not wait has the `try_` forms. Errors and counters of one device touch no other's GSI.
//! Accesses of any width and offset to the IOAPIC are answered; what fails on the guest's behalf is
//! kept for [`SplitIoapic::take_error`](ioapic::SplitIoapic::take_error), one error at a time.
//!
//! # Save and restore
//!
//! KVM cannot be asked for its table, so the table is the VMM's to save: [`Routing::table`] is plain
//! data ([`Table::entries`]), and a restored VM gives the same entries to a [`Change`]. Eventfds are
//! made anew; what was pending in one is in its counter until it is attached. The IOAPIC of a split
//! irqchip has its [`IoapicState`](ioapic::IoapicState) (serde with the feature `with-serde`), which
//! [`kvm::abi`] turns into `kvm_ioapic_state` and back: the routes of its pins come from there and
//! need not be saved. The order is restore, lines, local APICs,
//! [`redeliver`](ioapic::SplitIoapic::redeliver), vCPUs.
//!
//! The PICs, the IOAPIC and the timer of the in-kernel irqchip have theirs by [`Irqchip::state`] and
//! [`Irqchip::restore`]: an [`IrqchipState`], plain data again. There the order is table, local
//! APICs, restore, lines, vCPUs: KVM's IOAPIC sends at once what is pending. As both IOAPICs have
//! one state, a guest that uses no PIC and no timer can move from either kind of irqchip to the
//! other. The serialized forms have a version, and [`StateVersion`] says which are read.
//!
//! # Limits
//!
//! - x86-64 has the rules, the default table and the ioctls; the entries of other architectures are
//!   data.
//! - An irqfd on a pin of the split IOAPIC is an edge that passes it by: no remote IRR, no count;
//!   one written just before the pin is unmasked may arrive after it. For a level-triggered pin
//!   take a [`PinLine`](ioapic::PinLine); resampling eventfds are the in-kernel irqchip's.
//! - KVM reports no EOI of an edge-triggered pin, so ack notifiers are for level-triggered ones.
//! - A level-triggered message that no APIC took (all of its destinations disabled) is sent again at
//!   the next level, access or EOI of its pin, as KVM's IOAPIC does it, not when an APIC is enabled.
//! - A guest that acknowledges a line without making its device lower it gets nothing else done; KVM's
//!   and QEMU's IOAPIC slow such a storm down after 10,000 in a row, this one does not.
//! - The IOAPIC sends no remappable-format messages.
//! - The failure of a timer after its irqchip cannot be undone, and is told as what it is
//!   ([`IrqchipError::Pit`]).

#![deny(unsafe_code)]
#![warn(missing_debug_implementations)]

mod error;
pub mod fake;
mod gsi;
pub mod host;
pub mod ioapic;
mod irqchip;
mod irqfd;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub mod kvm;
mod level;
mod line;
mod route;
mod routing;
mod rules;
mod shared_line;
mod source;
mod table;
mod version;
mod wait;

pub use error::Error;
pub use gsi::{Gsi, GsiPool};
pub use host::Errno;
pub use irqchip::{
    Irqchip, IrqchipError, IrqchipKind, IrqchipPart, IrqchipState, IrqchipStateError,
    KernelIrqchipState, PicState, Pit, PitChannelState, PitState,
};
pub use irqfd::{DetachedIrqfd, Irqfd};
pub use line::{Arrival, LevelSource, Line};
pub use route::{Chip, ChipPin, Entry, HvSint, Msi, Route, S390Adapter, XenEvtchn};
pub use routing::{Change, Committed, GsiHandle, Routing};
pub use rules::{IOAPIC_PINS, PIC_PINS, RouteError, Rules};
pub use shared_line::{LineSource, SharedLine};
pub use source::IrqSource;
pub use table::Table;
pub use version::{StateVersion, UnknownVersion};

/// The README's examples, so that they compile.
#[cfg(all(
    doctest,
    feature = "kvm",
    feature = "vm-device",
    feature = "vm-superio"
))]
#[doc = include_str!("../README.md")]
mod readme {}
