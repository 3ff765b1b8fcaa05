// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Coalesced zones: the addresses whose writes KVM keeps in its ring.

use std::fmt;
use std::sync::{Arc, Weak};

use vmm_sys_util::errno;

use crate::Error;
use crate::dispatcher::Dispatcher;
use crate::inside::is_inside_access;
use crate::range::{BusKind, IoRange};
use crate::tables::Shared;

/// The capability to have writes coalesced: `KVM_REGISTER_COALESCED_MMIO` on a VM's descriptor.
///
/// Implemented for [`kvm_ioctls::VmFd`] (feature `kvm`), and for references and `Arc`s of whatever
/// has it.
///
/// # Contract
///
/// A call that fails has changed nothing.
///
/// [`kvm_ioctls::VmFd`]: https://docs.rs/kvm-ioctls/latest/kvm_ioctls/struct.VmFd.html
pub trait SetCoalescedZone {
    /// Whether this host's KVM coalesces writes on `bus`: `KVM_CAP_COALESCED_MMIO` for MMIO,
    /// `KVM_CAP_COALESCED_PIO` (Linux 5.0) for PIO, and no other.
    fn can_coalesce(&self, bus: BusKind) -> bool;

    /// Makes `size` bytes at `address` a zone (`register`), or none any more.
    ///
    /// KVM removes every zone that holds the one that is named, so zones must not overlap.
    /// Registering and unregistering wait in KVM for an SRCU grace period.
    ///
    /// # Errors
    ///
    /// ENOSPC: KVM's bus is full. ENOMEM. EINVAL: no bus of KVM's.
    fn set_coalesced_zone(
        &self,
        bus: BusKind,
        address: u64,
        size: u32,
        register: bool,
    ) -> Result<(), errno::Error>;
}

/// Whatever leads to such a host is one.
macro_rules! forwarded_by {
    ($($pointer:ty),*) => {$(
        impl<T: SetCoalescedZone + ?Sized> SetCoalescedZone for $pointer {
            fn can_coalesce(&self, bus: BusKind) -> bool {
                (**self).can_coalesce(bus)
            }

            fn set_coalesced_zone(
                &self,
                bus: BusKind,
                address: u64,
                size: u32,
                register: bool,
            ) -> Result<(), errno::Error> {
                (**self).set_coalesced_zone(bus, address, size, register)
            }
        }
    )*};
}

forwarded_by!(&T, Arc<T>);

/// Addresses whose writes KVM keeps until the next exit; from
/// [`IoBus::coalesce`](crate::IoBus::coalesce).
///
/// Dropping it ends that, and has what was kept carried out.
pub struct CoalescedZone<S: SetCoalescedZone> {
    host: S,
    shared: Weak<Shared>,
    bus: BusKind,
    range: IoRange,
    registered: bool,
}

impl<S: SetCoalescedZone> CoalescedZone<S> {
    pub(crate) fn register(
        shared: &Arc<Shared>,
        host: S,
        bus: BusKind,
        range: IoRange,
    ) -> Result<Self, Error> {
        let coalescible = matches!(bus, BusKind::Mmio | BusKind::Pio)
            && !range.is_exact()
            && range.last() <= bus.last_address();
        let Some(size) = u32::try_from(range.size()).ok().filter(|_| coalescible) else {
            return Err(Error::NotCoalescible { bus, range });
        };
        if !host.can_coalesce(bus) {
            return Err(Error::CannotCoalesce { bus });
        }
        shared.coalescing.add(bus, range, || {
            host.set_coalesced_zone(bus, range.base(), size, true)
                .map_err(|source| Error::RegisterZone { bus, range, source })
        })?;
        Ok(Self {
            host,
            shared: Arc::downgrade(shared),
            bus,
            range,
            registered: true,
        })
    }

    /// The bus that it is on.
    pub fn bus(&self) -> BusKind {
        self.bus
    }

    /// Its addresses.
    pub fn range(&self) -> IoRange {
        self.range
    }

    /// Ends the coalescing and has the writes that KVM has kept until now, of every zone, carried
    /// out: on return the device has seen all of them and every later one leaves the guest. (From
    /// inside an access they stay until the next exit.)
    ///
    /// To be called before the device leaves its range, for a kept write goes to whoever is there
    /// when it is carried out. Ended already, it does nothing.
    ///
    /// # Deadlock
    ///
    /// Devices are called on this thread, here and when a zone is dropped: do not hold a lock that
    /// one of them takes in an access.
    ///
    /// # Errors
    ///
    /// [`Error::UnregisterZone`]; then the zone is as it was, and dropping it tries again.
    pub fn end(&mut self) -> Result<(), Error> {
        if !self.registered {
            return Ok(());
        }
        let (bus, range) = (self.bus, self.range);
        // `register` has made sure that the size is one.
        let size = u32::try_from(range.size()).unwrap_or(u32::MAX);
        let call = || {
            self.host
                .set_coalesced_zone(bus, range.base(), size, false)
                .map_err(|source| Error::UnregisterZone { bus, range, source })
        };
        match self.shared.upgrade() {
            Some(shared) => {
                shared.coalescing.remove(bus, range, call)?;
                if !is_inside_access() && !shared.coalescing.is_empty() {
                    Dispatcher::new(shared).before_exit();
                }
            }
            // Its buses are gone, and the devices with them.
            None => call()?,
        }
        self.registered = false;
        Ok(())
    }
}

impl<S: SetCoalescedZone> Drop for CoalescedZone<S> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("{error}");
        }
    }
}

impl<S: SetCoalescedZone> fmt::Debug for CoalescedZone<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoalescedZone")
            .field("bus", &self.bus)
            .field("range", &self.range)
            .field("registered", &self.registered)
            .finish()
    }
}
