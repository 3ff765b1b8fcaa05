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
//! A VM's interrupts begin with [`Irqchip::create`], before the first vCPU, and [`Routing::new`],
//! the one owner of the table. A device takes a GSI, which is a handle: [`Routing::reserve`] for a
//! legacy pin, [`Routing::allocate`] for a message. It gives the GSI a route if it has none
//! ([`Routing::change`]), and raises it with an [`IrqSource`], an [`Irqfd`] or a [`Line`]. Whatever
//! is dropped is released: lines are lowered, eventfds detached, numbers free again, in that order.
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
//! | `KVM_USERSPACE_IRQ_SOURCE_ID` | kernel: the one source that all [`Line`]s of a GSI share; planned: several sources ORed on a line |
//! | `KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID` | kernel: the source of [`Routing::irqfd_resample`] |
//! | `kvm_set_irq` | [`Line::set`], [`Line::pulse`], with an [`Arrival`] |
//! | `kvm_set_irq_inatomic` | kernel: how an [`Irqfd`] with a message is delivered from the writer's context; [`Irqfd::trigger`] never blocks |
//! | `kvm_set_msi` | kernel: delivers a [`Route::Msi`] |
//! | `kvm_send_userspace_msi` | [`Routing::signal_msi`] |
//! | `kvm_vm_ioctl_irq_line` | [`host::SetIrqLine`] |
//! | `kvm_request_irq_source_id` | planned: a source of a shared [`Line`] |
//! | `kvm_free_irq_source_id` | planned: dropping such a source |
//! | `kvm_irq_ack_notifier` | the resample eventfd of [`Routing::irqfd_resample`]; planned: by `KVM_EXIT_IOAPIC_EOI` for the split irqchip |
//! | `kvm_irq_mask_notifier` | planned: with the user-space IOAPIC of the split irqchip, which has the mask bits |
//! | `kvm_register_irq_mask_notifier` | planned: with the user-space IOAPIC |
//! | `kvm_unregister_irq_mask_notifier` | planned: with the user-space IOAPIC |
//! | `kvm_fire_mask_notifiers` | planned: with the user-space IOAPIC |
//! | `kvm_irq_has_notifier` | planned: with the acknowledgements of the split irqchip |
//! | `kvm_notify_acked_irq` | kernel: writes the resample eventfds of a pin; planned: the same from `KVM_EXIT_IOAPIC_EOI` |
//! | `kvm_register_irq_ack_notifier` | [`Routing::irqfd_resample`]; planned: for the split irqchip |
//! | `kvm_unregister_irq_ack_notifier` | [`Irqfd::detach`] of a resampled one; planned: for the split irqchip |
//! | `kvm_irqfd_init` | kernel: prepares a new VM; nothing to do here |
//! | `kvm_irqfd_exit` | kernel: when its module leaves; nothing to do here |
//! | `kvm_irqfd` | [`Routing::irqfd`], [`Irqfd`], [`host::AttachIrqfd`] |
//! | `kvm_irqfd_release` | kernel: detaches what is left when the VM goes; dropping an [`Irqfd`] does it earlier |
//!
//! # Concurrency
//!
//! Everything is `Send` and `Sync` as far as the host is, and clones of a [`Routing`] are the same
//! table. Commits have one order: a lock is held across the ioctl. [`Routing::table`] gives the
//! committed table without waiting for a commit. Raising an interrupt takes no lock (a [`Line`] takes
//! its own), so vCPU and device threads may do so at any time; one raised during a commit goes along
//! the old route or the new one. To drop a [`GsiHandle`] may wait for a commit, never for a guest. No
//! lock is held while a caller's code runs, so nothing here can deadlock with it.
//!
//! # Threat model
//!
//! A guest chooses the address and data of its MSIs and may raise, mask and unmask as fast as it
//! likes. Whatever it chooses is checked by [`Rules`] or refused by KVM with an error that leaves the
//! table as it was; nothing here panics on it, and the table is bounded by the host's limit. A guest
//! that rewrites its vectors in a loop makes its own vCPU wait for commits; to bound what that costs
//! the host is the VMM's to do. Errors and counters of one device touch no other's GSI.
//!
//! # Save and restore
//!
//! KVM cannot be asked for its table, so the table is the VMM's to save: [`Routing::table`] is plain
//! data ([`Table::entries`]), and a restored VM gives the same entries to a [`Change`]. Eventfds are
//! made anew; what was pending in one is in its counter until it is attached. The state of the
//! in-kernel PICs, IOAPIC and timer is planned.
//!
//! # Limits
//!
//! - x86-64 has the rules, the default table and the ioctls; the entries of other architectures are
//!   data.
//! - The split irqchip has its routes and no IOAPIC yet: devices on it use messages.
//! - The failure of a timer after its irqchip cannot be undone, and is told as what it is
//!   ([`IrqchipError::Pit`]).

#![deny(unsafe_code)]
#![warn(missing_debug_implementations)]

mod error;
pub mod fake;
mod gsi;
pub mod host;
mod irqchip;
mod irqfd;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub mod kvm;
mod line;
mod route;
mod routing;
mod rules;
mod source;
mod table;

pub use error::Error;
pub use gsi::{Gsi, GsiPool};
pub use host::Errno;
pub use irqchip::{Irqchip, IrqchipError, IrqchipKind, Pit};
pub use irqfd::{DetachedIrqfd, Irqfd};
pub use line::{Arrival, Line};
pub use route::{Chip, ChipPin, Entry, HvSint, Msi, Route, S390Adapter, XenEvtchn};
pub use routing::{Change, Committed, GsiHandle, Routing};
pub use rules::{IOAPIC_PINS, PIC_PINS, RouteError, Rules};
pub use source::IrqSource;
pub use table::Table;
