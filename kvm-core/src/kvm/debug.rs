// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU under a debugger: translation, breakpoints and steps, exceptions given back, NMI. Each call is
//! for the vCPU's own thread, or for a vCPU that no thread runs: KVM makes a caller elsewhere wait until
//! the vCPU comes out of the guest.

use kvm_bindings::kvm_guest_debug;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

use super::vcpu::{Vcpu, failed};
use super::vm::Error;
use crate::arch::x86_64::{
    GuestDebug, Injection, SetGuestDebug, Translate, dr6_for_guest, translated,
};
use crate::identity::VcpuId;
use crate::run::VcpuView;

impl SetGuestDebug for VcpuFd {
    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Errno> {
        VcpuFd::set_guest_debug(self, debug)
    }
}

impl Translate for VcpuFd {
    fn translate(&self, linear: u64) -> Result<Option<GuestAddress>, Errno> {
        self.translate_gva(linear).map(|answer| translated(&answer))
    }
}

impl Vcpu {
    /// `KVM_TRANSLATE`: see [`Translate`].
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn translate(&self, linear: u64) -> Result<Option<GuestAddress>, Error> {
        translate(self.id(), self.fd(), linear)
    }

    /// `KVM_SET_GUEST_DEBUG`: the vCPU runs with this, and nothing else, from its next entry on.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`]; the vCPU's debugging is what it was.
    pub fn set_guest_debug(&self, debug: &GuestDebug) -> Result<(), Error> {
        set_guest_debug(self.id(), self.fd(), debug)
    }

    /// `KVM_NMI`: a non-maskable interrupt, which the guest takes as it is entered. From another thread:
    /// [`VcpuSet::nmi`](crate::VcpuSet::nmi).
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn nmi(&self) -> Result<(), Error> {
        self.fd().nmi().map_err(failed(self.id(), "KVM_NMI"))
    }
}

impl VcpuView<'_, VcpuFd> {
    /// [`Vcpu::translate`], for a handler.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn translate(&self, linear: u64) -> Result<Option<GuestAddress>, Error> {
        translate(self.id(), self.fd(), linear)
    }

    /// [`Vcpu::set_guest_debug`], for a handler.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`]; the vCPU's debugging is what it was.
    pub fn set_guest_debug(&self, debug: &GuestDebug) -> Result<(), Error> {
        set_guest_debug(self.id(), self.fd(), debug)
    }

    /// Gives an exception back to the guest that it belongs to
    /// ([`DebugCause::Guest`](crate::arch::x86_64::DebugCause::Guest)), and goes on with `debug`, which is
    /// what the vCPU ran with. The guest finds in its DR6 what happened.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`]; neither the vCPU's debugging nor its DR6 has changed.
    pub fn inject(&self, debug: &GuestDebug, injection: Injection) -> Result<(), Error> {
        let id = self.id();
        let set = || {
            let argument = debug.injecting(injection);
            SetGuestDebug::set_guest_debug(self.fd(), &argument)
                .map_err(failed(id, "KVM_SET_GUEST_DEBUG"))
        };
        let Injection::Debug { dr6 } = injection else {
            return set();
        };
        let before = self
            .fd()
            .get_debug_regs()
            .map_err(failed(id, "KVM_GET_DEBUGREGS"))?;
        let mut after = before;
        after.dr6 = dr6_for_guest(before.dr6, dr6);
        let set_registers = |registers| {
            self.fd()
                .set_debug_regs(registers)
                .map_err(failed(id, "KVM_SET_DEBUGREGS"))
        };
        set_registers(&after)?;
        set().inspect_err(|_| {
            if let Err(error) = set_registers(&before) {
                log::warn!("{error}; the guest's DR6 has changed");
            }
        })
    }

    /// [`Vcpu::nmi`], for a handler.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn nmi(&self) -> Result<(), Error> {
        self.fd().nmi().map_err(failed(self.id(), "KVM_NMI"))
    }
}

fn translate(id: VcpuId, fd: &VcpuFd, linear: u64) -> Result<Option<GuestAddress>, Error> {
    Translate::translate(fd, linear).map_err(failed(id, "KVM_TRANSLATE"))
}

fn set_guest_debug(id: VcpuId, fd: &VcpuFd, debug: &GuestDebug) -> Result<(), Error> {
    SetGuestDebug::set_guest_debug(fd, &debug.to_kvm()).map_err(failed(id, "KVM_SET_GUEST_DEBUG"))
}
