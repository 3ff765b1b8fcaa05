// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Feature MSRs: what of the processor is told by MSRs instead of CPUID (`KVM_GET_MSR_FEATURE_INDEX_LIST`
//! and `KVM_GET_MSRS` of the system: Documentation/virt/kvm/api.rst 4.4, 4.18).

use vmm_sys_util::errno::Error as Errno;

/// The two calls on `/dev/kvm`.
pub trait GetMsrFeatures {
    /// The list.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn msr_feature_list(&self) -> Result<Vec<u32>, Errno>;

    /// Reads these, in order, until one is refused; the values of those that were read.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn read_msr_features(&self, indices: &[u32]) -> Result<Vec<u64>, Errno>;
}

/// What the host's KVM can give a guest of the features that MSRs tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MsrFeatures {
    /// Sorted by index.
    values: Vec<(u32, u64)>,
}

impl MsrFeatures {
    /// Asks the host. An MSR that it lists and does not read is left out.
    ///
    /// # Errors
    /// The errno of an ioctl.
    pub fn read(host: &impl GetMsrFeatures) -> Result<Self, Errno> {
        let list = host.msr_feature_list()?;
        let (mut rest, mut values) = (&list[..], Vec::with_capacity(list.len()));
        while !rest.is_empty() {
            let read = host.read_msr_features(rest)?;
            values.extend(rest.iter().copied().zip(read.iter().copied()));
            // The one behind those that were read was refused.
            rest = rest.get(read.len().saturating_add(1)..).unwrap_or_default();
        }
        values.sort_unstable_by_key(|(index, _)| *index);
        values.dedup_by_key(|(index, _)| *index);
        Ok(Self { values })
    }

    /// The value of one; `None` where the host does not tell it.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<u64> {
        let at = self
            .values
            .binary_search_by_key(&index, |(index, _)| *index);
        at.ok()
            .and_then(|at| self.values.get(at))
            .map(|(_, value)| *value)
    }

    /// Index and value of each, by index.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> {
        self.values.iter().copied()
    }
}

/// The name of a feature MSR, as Linux's msr-index.h has it.
#[must_use]
pub const fn msr_feature_name(index: u32) -> Option<&'static str> {
    Some(match index {
        0x8b => "IA32_UCODE_REV",
        0xce => "PLATFORM_INFO",
        0x10a => "IA32_ARCH_CAPABILITIES",
        0x345 => "IA32_PERF_CAPABILITIES",
        0x480 => "IA32_VMX_BASIC",
        0x481 => "IA32_VMX_PINBASED_CTLS",
        0x482 => "IA32_VMX_PROCBASED_CTLS",
        0x483 => "IA32_VMX_EXIT_CTLS",
        0x484 => "IA32_VMX_ENTRY_CTLS",
        0x485 => "IA32_VMX_MISC",
        0x486 => "IA32_VMX_CR0_FIXED0",
        0x487 => "IA32_VMX_CR0_FIXED1",
        0x488 => "IA32_VMX_CR4_FIXED0",
        0x489 => "IA32_VMX_CR4_FIXED1",
        0x48a => "IA32_VMX_VMCS_ENUM",
        0x48b => "IA32_VMX_PROCBASED_CTLS2",
        0x48c => "IA32_VMX_EPT_VPID_CAP",
        0x48d => "IA32_VMX_TRUE_PINBASED_CTLS",
        0x48e => "IA32_VMX_TRUE_PROCBASED_CTLS",
        0x48f => "IA32_VMX_TRUE_EXIT_CTLS",
        0x490 => "IA32_VMX_TRUE_ENTRY_CTLS",
        0x491 => "IA32_VMX_VMFUNC",
        0xc001_1029 => "AMD64_DE_CFG",
        _ => return None,
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Host {
        list: Vec<u32>,
        refused: Vec<u32>,
        errno: Option<i32>,
    }

    impl GetMsrFeatures for Host {
        fn msr_feature_list(&self) -> Result<Vec<u32>, Errno> {
            self.errno
                .map_or(Ok(self.list.clone()), |e| Err(Errno::new(e)))
        }

        fn read_msr_features(&self, indices: &[u32]) -> Result<Vec<u64>, Errno> {
            let read = indices.iter().take_while(|i| !self.refused.contains(i));
            Ok(read.map(|i| u64::from(*i) << 8).collect())
        }
    }

    #[test]
    fn what_is_listed_and_readable_is_told_by_index() {
        for refused in [
            vec![],
            vec![0x8b],
            vec![0xce, 0x480],
            vec![0x10a, 0x8b, 0xce, 0x480],
        ] {
            let list = vec![0x10a, 0x8b, 0xce, 0x480];
            let host = Host {
                list: list.clone(),
                refused: refused.clone(),
                errno: None,
            };
            let features = MsrFeatures::read(&host).unwrap();
            for index in list {
                let expected = (!refused.contains(&index)).then_some(u64::from(index) << 8);
                assert_eq!(features.get(index), expected, "{index:#x} of {refused:x?}");
            }
            assert!(features.iter().is_sorted());
            assert_eq!(features.get(7), None);
        }
    }

    #[test]
    fn an_errno_is_passed_on() {
        let host = Host {
            list: vec![],
            refused: vec![],
            errno: Some(7),
        };
        assert_eq!(MsrFeatures::read(&host), Err(Errno::new(7)));
    }
}
