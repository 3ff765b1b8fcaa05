// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who a log line, an error or a thread is about.

use std::fmt;
use std::sync::Arc;

/// A vCPU's number in its VM: the argument of `KVM_CREATE_VCPU`, on x86 its APIC id as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u32);

impl fmt::Display for VcpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u32> for VcpuId {
    fn from(id: u32) -> Self {
        Self(id)
    }
}

/// The VM, and where there is one the vCPU, that a message is about: `vm web-1 vcpu 3`. This crate's
/// own log lines begin with it, and so do those of the macros of [`logging`](crate::logging).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    vm: Arc<str>,
    vcpu: Option<VcpuId>,
}

impl Identity {
    /// A VM.
    #[must_use]
    pub fn vm(name: impl Into<Arc<str>>) -> Self {
        Self {
            vm: name.into(),
            vcpu: None,
        }
    }

    /// The VM's name.
    #[must_use]
    pub fn vm_name(&self) -> &str {
        &self.vm
    }

    /// A vCPU of this VM.
    #[must_use]
    pub fn vcpu(&self, id: VcpuId) -> Self {
        Self {
            vm: self.vm.clone(),
            vcpu: Some(id),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm {}", self.vm)?;
        match self.vcpu {
            Some(id) => write!(f, " vcpu {id}"),
            None => Ok(()),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_which_vm_and_which_vcpu() {
        let vm = Identity::vm("web-1");
        assert_eq!(vm.to_string(), "vm web-1");
        assert_eq!(vm.vcpu(VcpuId(3)).to_string(), "vm web-1 vcpu 3");
    }
}
