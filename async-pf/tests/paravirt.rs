// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest writes is decoded exactly or refused, and comes back as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use async_pf::{
    ApfData, AsyncPfEnable, AsyncPfFeatures, AsyncPfMsrs, AsyncPfVector, MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT, MsrError,
};
use proptest::prelude::*;

const ALL: AsyncPfFeatures = AsyncPfFeatures {
    async_pf: true,
    vmexit: true,
    interrupt: true,
};

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_enable_value_is_refused_or_round_trips(value: u64, low in 0u64..64) {
        let value = value & !0x3f | low;
        match AsyncPfEnable::decode(value, ALL) {
            Ok(enable) => {
                prop_assert_eq!(enable.encode(), value);
                prop_assert_eq!(enable.address() % 64, 0);
                prop_assert_eq!(enable.is_active(), value & 9 == 9);
            }
            Err(error) => {
                let bits = value & 0x30;
                prop_assert_ne!(bits, 0);
                prop_assert_eq!(
                    error, MsrError::Reserved { msr: MSR_KVM_ASYNC_PF_EN, value, bits });
            }
        }
    }

    #[test]
    fn every_vector_value_is_refused_or_round_trips(value in prop_oneof![0u64..512, any::<u64>()]) {
        match AsyncPfVector::decode(value, ALL) {
            Ok(vector) => prop_assert_eq!(vector.encode(), value),
            Err(_) => prop_assert!(value > 255),
        }
    }

    #[test]
    fn features_change_their_own_bits_of_cpuid_only(eax: u32, pick in 0u8..8) {
        let features = AsyncPfFeatures {
            async_pf: pick & 1 != 0, vmexit: pick & 2 != 0, interrupt: pick & 4 != 0 };
        let changed = features.apply(eax);
        prop_assert_eq!(AsyncPfFeatures::from_eax(changed), features);
        prop_assert_eq!((changed ^ eax) & !0x4410, 0);
        prop_assert_eq!(AsyncPfFeatures::from_eax(eax).apply(eax), eax);
    }

    #[test]
    fn the_shared_structure_round_trips(bytes: [u8; 8]) {
        let data = ApfData::from_bytes(bytes);
        prop_assert_eq!(data.to_bytes(), bytes);
        prop_assert_eq!(data.not_present(), bytes[0] & 1 != 0);
        prop_assert_eq!(data.ready().unwrap_or(0), data.token);
    }
}

#[test]
fn what_cpuid_does_not_offer_is_refused() {
    let none = AsyncPfFeatures::default();
    let old = AsyncPfFeatures {
        async_pf: true,
        ..none
    };
    assert!(AsyncPfEnable::decode(0, none).is_err());
    assert!(AsyncPfEnable::decode(0x1000 | 1, old).is_ok());
    assert!(matches!(
        AsyncPfEnable::decode(0x1000 | 5, old),
        Err(MsrError::NotOffered { bits: 4, .. })
    ));
    assert!(matches!(
        AsyncPfEnable::decode(0x1000 | 9, old),
        Err(MsrError::NotOffered { bits: 8, .. })
    ));
    assert!(AsyncPfVector::decode(0x20, old).is_err());
    assert_eq!(AsyncPfEnable::at(0x1020), None, "not on 64 bytes");
}

#[test]
fn a_restore_sets_the_vector_before_it_enables() {
    let msrs = AsyncPfMsrs {
        enable: AsyncPfEnable::at(0x1040).unwrap(),
        vector: AsyncPfVector(0xec),
    };
    assert_eq!(
        msrs.restore(),
        [(MSR_KVM_ASYNC_PF_INT, 0xec), (MSR_KVM_ASYNC_PF_EN, 0x1049)]
    );
    assert_eq!(AsyncPfMsrs::SAVED, msrs.restore().map(|(index, _)| index));
}

#[test]
fn a_wake_up_for_all_has_the_token_of_all_ones() {
    assert_eq!(
        ApfData::wake_all().to_bytes(),
        [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]
    );
    assert_eq!(ApfData::default().ready(), None);
}

/// Firecracker 5738: a snapshot that kept `EN` and lost `INT`.
#[test]
fn a_snapshot_that_lost_the_vector_is_refused() {
    let msrs = AsyncPfMsrs {
        enable: AsyncPfEnable::at(0x1040).unwrap(),
        vector: AsyncPfVector(0xec),
    };
    let saved = |kept: &[u32]| {
        let all = msrs.restore().into_iter();
        let kept: Vec<_> = all.filter(|(index, _)| kept.contains(index)).collect();
        AsyncPfMsrs::from_saved(kept.into_iter().chain([(0x10, 7)]), ALL)
    };
    assert_eq!(saved(&AsyncPfMsrs::SAVED), Ok(msrs));
    assert_eq!(
        saved(&[MSR_KVM_ASYNC_PF_EN]),
        Err(MsrError::NoVector { enable: 0x1049 })
    );
    assert_eq!(saved(&[]), Ok(AsyncPfMsrs::default()), "never took part");

    // Saved with the feature, restored without: refused, not switched off behind the guest's back.
    let none = AsyncPfFeatures::default();
    assert!(matches!(
        AsyncPfMsrs::from_saved(msrs.restore(), none),
        Err(MsrError::NotOffered { .. })
    ));
    let off = AsyncPfMsrs::SAVED.map(|index| (index, 0));
    assert_eq!(
        AsyncPfMsrs::from_saved(off, none),
        Ok(AsyncPfMsrs::default())
    );
}
