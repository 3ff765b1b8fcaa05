// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The I/O buses of a KVM virtual machine: who answers an access.
//!
//! When a guest touches an address that no memory answers, or a port, its vCPU comes out of
//! `KVM_RUN` with an access in its hands. This crate is what happens next: four buses as KVM has
//! them inside (MMIO, PIO, CCW-notify, fast MMIO), `vm-device` devices on them, a lookup that takes
//! no lock, and registrations that can come, go and move while vCPUs run. For the writes that should
//! not leave the kernel at all there is ioeventfd, and for those that need not leave it one by one,
//! coalescing.
//!
//! ```text
//!   control plane (any thread)                 vCPU threads, after each KVM_RUN
//!
//!   IoBus ── register ──► Registration         Dispatcher    Dispatcher    one each,
//!     │ count, trace        │ unregister          │ before_exit: what KVM coalesced, in order
//!     │ coalesce            │ relocate            │ cookie      │ cookie   &mut self
//!     │                     │ ioeventfds          │             │
//!     ▼                     ▼                     ▼             ▼
//!   next tables ═══ publish (srcu) ════════►  MMIO | PIO | CCW-notify | fast MMIO
//!                     │                           sorted ranges, binary search
//!                     └─ wait until no access          │
//!                        that began before is left     ▼
//!                                                 IoDevice: accepts, declines or defers
//!                                                 DeviceMmio, DevicePio: accept
//! ```
//!
//! # Example
//!
//! ```
//! use io_bus::{IoBus, MmioAddress, MmioRange, Outcome};
//! use vm_device::DeviceMmio;
//!
//! /// A register that reads as its own offset.
//! struct Ruler;
//!
//! impl DeviceMmio for Ruler {
//!     fn mmio_read(&self, _base: MmioAddress, offset: u64, data: &mut [u8]) {
//!         data.fill(offset as u8);
//!     }
//!     fn mmio_write(&self, _base: MmioAddress, _offset: u64, _data: &[u8]) {}
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bus = IoBus::new();
//! let range = MmioRange::new(MmioAddress(0xd000_0000), 0x1000)?;
//! let mut ruler = bus.register_mmio(range, Ruler)?;
//!
//! // On a vCPU's thread; `address` and `data` are KVM_EXIT_MMIO's.
//! let mut io = bus.dispatcher();
//! let mut data = [0; 1];
//! assert_eq!(io.mmio_read(MmioAddress(0xd000_0010), &mut data), Outcome::Answered);
//! assert_eq!(data, [0x10]);
//!
//! // The guest moves the BAR. After `Done`, nobody is inside by the old address any more.
//! assert!(ruler.relocate(0xe000_0000)?.is_done());
//! assert_eq!(io.mmio_read(MmioAddress(0xd000_0010), &mut data), Outcome::Unclaimed);
//! assert_eq!(data, [0xff]);
//! # Ok(())
//! # }
//! ```
//!
//! `examples/bus_vm.rs` is a whole virtual machine of `kvm-ioctls` and this crate.
//!
//! # Who answers
//!
//! - An access belongs to the ranges that hold it **whole**. One that begins in a range and runs
//!   past its end is nobody's, even if a neighbour would answer the rest: `kvm_io_bus_cmp` decides
//!   it so.
//! - Ranges may overlap. They are asked in the order of their first address, then their last, then
//!   their age, and the first device that [accepts](Answer::Accepted) ends it. A `vm-device` device
//!   always accepts; an [`IoDevice`] may decline. (KVM asks in this order too where ranges are
//!   disjoint, equal or begin together. For other overlaps its order depends on history and its
//!   search may miss a range; ours do not.)
//! - A read that nobody answers is all ones, and [`Outcome::Unclaimed`] says so. A device that
//!   leaves the data of a read alone gives all ones as well: what `kvm_run` held before never
//!   reaches the guest.
//! - An MMIO access of more than 8 bytes, or across a page's end, is cut into [`fragments`] as KVM
//!   cuts it, each an access of its own. `rep ins` and `rep outs` are
//!   [repeated](Dispatcher::pio_read_repeated) accesses to one port.
//! - A write to MMIO is offered to the fast MMIO bus first: doorbells, [one
//!   address](IoRange::exact) with any length.
//! - A bus takes [`NR_IOBUS_DEVS`] ranges, or as many as [`IoBus::with_capacity`] says.
//! - A device that cannot answer at once [defers](Answer::Deferred): the access on the bus is over,
//!   and the vCPU's thread [waits](Dispatcher::wait_read) for the answer, or looks now and then. What
//!   the device [made with it](defer) answers from any thread; dropped, it declines, so that the
//!   guest reads all ones and no vCPU hangs. Of an access in several pieces, those after a deferred
//!   one wait for it.
//!
//! # Writes that do not leave the guest one by one
//!
//! - [`Registration::attach_ioeventfd`] has KVM signal an eventfd for a device's doorbell. It is
//!   detached before the device goes, and moves with it: attached at the new address, the range
//!   moved, detached at the old one, so that no write is lost and none is seen twice. [`IoEventFd`]
//!   is the same as a handle of its own.
//! - [`IoBus::coalesce`] has KVM keep writes in a ring, one a virtual machine, which is a page of any
//!   vCPU's mapping ([`MappedRing`], given to [`IoBus::attach_coalesced_ring`]).
//!   [`Dispatcher::before_exit`], called after every return of `KVM_RUN`, carries them out in order,
//!   before the exit that follows is dispatched. Several vCPUs may do so at once: a write is carried
//!   out once, and none overtakes it. [`Dispatcher::has_coalesced`] asks without doing so.
//!
//! # Looking on
//!
//! - [`IoBus::count`] turns counters on, one set a range, and [`IoBus::stats`] reads them, with what
//!   nobody took, and where. [`IoBus::trace`] installs a hook that sees every access as it ended.
//! - Off, both cost an access that is searched for the one branch that asks whether anybody looks on,
//!   and a repeated one nothing: no counter exists, and no access writes to anything that another thread reads but its own cache line of the tables'.
//!
//! # Concurrency contract
//!
//! - Call [`srcu::prepare`] first thing in `main`, before the process has a second thread. The tables
//!   are published through `srcu`, which registers the process for `membarrier(2)` once: microseconds
//!   while there is one thread, 10 ms and more later on, in the first [`IoBus::new`].
//! - Each thread that dispatches owns a [`Dispatcher`]. An access takes no lock, waits for nobody
//!   and allocates nothing; two dispatchers share no cache line that either writes. The row that
//!   answered last for a page (for eight ports) is found again without a search, however many
//!   devices there are.
//! - Between accesses a dispatcher holds nothing. A vCPU that sleeps in the guest keeps no removed
//!   device alive and holds no one up.
//! - [`IoBus`] and [`Registration`] work from any thread while vCPUs run. `register` waits for other
//!   writers only. [`Registration::unregister`], its drop and [`Registration::relocate`] wait until
//!   no access that began before is left: after that no thread is inside the device by that range.
//! - **From inside an access** (a device that removes itself, or another) those do not wait: they
//!   answer [`Removal::Pending`], and the device goes when the access ends. So two devices that
//!   remove each other cannot deadlock, on one bus or on two. The thread knows by itself that it is
//!   inside ([`is_inside_access`]).
//! - Still the caller's to get right: waiting for a removal with a lock held that the device takes
//!   in an access, or having an access wait for a thread that waits for a removal.
//!   [`Registration::unregister_later`] never waits.
//! - A move is one step. An access finds the device at the old range or at the new one; there is no
//!   moment at which it is at neither.
//! - A device may own its registrations. It must not own the [`IoBus`] that it is on, or a
//!   [`Dispatcher`] of it: that circle is never freed.
//! - When a device is dropped by a removal that was pending, this happens on the thread that ends
//!   the last access, which may be a vCPU's.
//! - A deferred answer is waited for by its vCPU alone. Nobody who unregisters, moves or traces
//!   waits for it, and the device may be gone when it comes. What kicks a vCPU out of `KVM_RUN` also
//!   calls its dispatcher's [`Interrupter`]: a signal does not end that wait.
//! - `before_exit` takes the ring's lock only if the ring is not empty, and devices are called with
//!   it held: a vCPU may wait there for another's drain, which is bounded by the ring's length. From
//!   inside an access it does nothing, so a device cannot wait for itself.
//!
//! Publication and grace periods are the `srcu` crate's, which is model-checked. What is added here
//! has models of its own in `tests/loom_bus.rs`: that nobody is inside after `unregister` and
//! `relocate`, that devices which remove each other end, the ring, and deferral.
//!
//! # Threat model
//!
//! The guest is the attacker, and chooses address, length, data and moment of every access. No
//! choice of these panics, allocates, blocks or reads memory that is not the access's; an access
//! costs at most one call to each device whose range holds it. (A device that defers allocates a few
//! words for each access, and the wait is its own choice.) The guest cannot write the ring of
//! coalesced writes; what is read from it is bounded all the same. A guest that removes devices (PCI
//! hot-unplug, a BAR that it moves about) makes the thread that carries this out build a table and
//! wait for the other vCPUs' accesses, never the other way around. Devices are trusted to return;
//! one that panics unwinds through the dispatcher, which stays usable, as does the device behind a
//! [`Locked`]. This crate forbids `unsafe` but for the ioctls, one mapping and a
//! port's data (feature `kvm`).
//!
//! # Save and restore
//!
//! There is nothing to save. Tables hold no guest-visible state beyond which device is where, and
//! that is the devices' own (a BAR's address): restored devices register again. An ioeventfd that
//! was signalled and not read yet is state of the eventfd: a device that is saved drains it first,
//! or looks at its queues once after the restore. Coalesced writes that are in the ring are state of
//! the devices that they are for: once the vCPUs have stopped, [`Dispatcher::before_exit`] on any
//! thread carries them out, and then devices are saved. A vCPU whose access is deferred cannot be
//! saved until the answer has come.
//!
//! # Known limits
//!
//! - Overlapping ranges are searched linearly within the stretch in which they overlap.
//! - A change copies the rows of its bus (some microseconds at 1,000 ranges).
//! - A coalesced write waits for the next exit, of any vCPU. A guest that writes and then sleeps in
//!   the kernel leaves its last writes in the ring until someone calls `before_exit`: a console that
//!   must be prompt has a timer call it, on a dispatcher of that thread.
//! - A zone does not move with a device: end it before the device leaves, and make it again.
//! - Counters are shared by the vCPUs: while they are on, a device that two vCPUs use at once costs
//!   both a cache line that travels.
//! - Between the two steps in which one ioeventfd takes the place that another of the same device
//!   leaves, a write there comes to the device and not to the eventfd.
//! - A deferred answer of more than 8 bytes is cut to 8. No guest's access is longer when it reaches
//!   a device.
//! - KVM makes an exit of each fragment of a wide access and does not say that they belong together,
//!   so neither can a [`Dispatcher`]: a device sees pieces, in order.
//!
//! # Header map
//!
//! What became of `include/linux/kvm_host.h`'s identifiers (Linux 3.17).
//!
//! ## Buses
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_io_device` | [`IoDevice`]; [`Mmio`] and [`Pio`] make one of a `vm-device` device |
//! | `kvm_io_range` | [`IoRange`] |
//! | `NR_IOBUS_DEVS` | [`NR_IOBUS_DEVS`], the default of [`IoBus::with_capacity`] |
//! | `kvm_io_bus` | [`IoBus`], all four of them |
//! | `kvm_bus` | [`BusKind`] |
//! | `KVM_MMIO_BUS` | [`BusKind::Mmio`] |
//! | `KVM_PIO_BUS` | [`BusKind::Pio`] |
//! | `KVM_VIRTIO_CCW_NOTIFY_BUS` | [`BusKind::CcwNotify`] |
//! | `KVM_FAST_MMIO_BUS` | [`BusKind::FastMmio`] |
//! | `KVM_NR_BUSES` | [`BusKind::COUNT`] |
//! | `kvm_io_bus_write` | [`Dispatcher::write`], [`Dispatcher::mmio_write`], [`Dispatcher::pio_write`] |
//! | `kvm_io_bus_write_cookie` | the same: a [`Dispatcher`] keeps the cookies itself |
//! | `kvm_io_bus_read` | [`Dispatcher::read`], [`Dispatcher::mmio_read`], [`Dispatcher::pio_read`] |
//! | `kvm_io_bus_register_dev` | [`IoBus::register`], [`IoBus::register_mmio`], [`IoBus::register_pio`] |
//! | `kvm_io_bus_unregister_dev` | [`Registration::unregister`], or dropping the [`Registration`] |
//!
//! ## Fragments and ioeventfd
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `KVM_MMIO_SIZE` | [`MMIO_SIZE`] |
//! | `KVM_MAX_MMIO_FRAGMENTS` | kernel: a bound on its array of pieces; [`fragments`] is an iterator and needs none |
//! | `kvm_mmio_fragment` | [`Fragment`], from [`fragments`]; [`Fragment::bytes`] is where it joins the others |
//! | `kvm_coalesced_mmio_ring` | [`RingMemory`], of which [`MappedRing`] is KVM's; zones are [`IoBus::coalesce`], draining is [`Dispatcher::before_exit`] |
//! | `kvm_ioeventfd` | [`IoEvent`], with [`Registration::attach_ioeventfd`] or [`IoEventFd::attach`]; the ioctl is [`SetIoEventFd`] |
//! | `kvm_eventfd_init` | kernel: readies a VM's lists of eventfds; here [`IoEventFd`] is the list, a handle each |

#![deny(unsafe_code)]

mod bus;
mod coalesced;
mod cookie;
mod deferred;
mod device;
mod dispatcher;
mod error;
mod fragment;
mod inside;
mod ioeventfd;
mod ioeventfd_set;
#[cfg(all(feature = "kvm", not(loom)))]
#[allow(
    unsafe_code,
    reason = "the crate's ioctls, its one mapping and a port's data"
)]
mod kvm;
mod observe;
mod range;
mod registration;
mod removal;
mod stats;
mod sync;
mod table;
mod tables;
mod trace;
mod unfinished;
mod zone;

pub use bus::{IoBus, NR_IOBUS_DEVS};
pub use coalesced::RingMemory;
pub use deferred::{Completion, Deferral, Interrupter, defer};
pub use device::{Answer, At, IoDevice, Locked, Mmio, Pio};
pub use dispatcher::{Dispatcher, Outcome};
pub use error::Error;
pub use fragment::{Fragment, MMIO_SIZE, PAGE_SIZE, fragments, is_whole};
pub use inside::is_inside_access;
pub use ioeventfd::{IoEvent, IoEventAddress, IoEventFd, SetIoEventFd, WriteLength, WriteMatch};
pub use ioeventfd_set::IoEventId;
#[cfg(all(feature = "kvm", not(loom)))]
pub use kvm::MappedRing;
#[cfg(all(feature = "kvm", not(loom), target_arch = "x86_64"))]
pub use kvm::PioExit;
pub use range::{BusKind, IoRange};
pub use registration::Registration;
pub use removal::{Pending, Removal};
pub use stats::{BusStats, RangeStats, UnclaimedStats};
pub use trace::{Access, Direction, Trace};
/// `vm-device`'s addresses and ranges, of which the methods here are made.
pub use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
pub use zone::{CoalescedZone, SetCoalescedZone};

/// The README's example, so that it compiles.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../README.md")]
mod readme {}
