// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is being injected into a vCPU, or waits to be.

#![forbid(unsafe_code)]

use kvm_bindings::kvm_vcpu_events;

// The names that bindgen gave the parts.
use kvm_bindings::{
    kvm_vcpu_events__bindgen_ty_1 as kvm_exception, kvm_vcpu_events__bindgen_ty_2 as kvm_interrupt,
    kvm_vcpu_events__bindgen_ty_3 as kvm_nmi, kvm_vcpu_events__bindgen_ty_4 as kvm_smi,
};

/// What is being injected into a vCPU, or waits (`struct kvm_vcpu_events`). A flag is 0 or 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct Events {
    /// An exception.
    pub exception: ExceptionEvent,
    /// An external or software interrupt.
    pub interrupt: InterruptEvent,
    /// A non-maskable interrupt.
    pub nmi: NmiEvent,
    /// System management mode.
    pub smi: SmiEvent,
    /// Flag: a triple fault waits. Only of a VM that has `KVM_CAP_X86_TRIPLE_FAULT_EVENT` enabled.
    pub triple_fault: u8,
    /// The start-up vector, where `flags` say that it counts; KVM never says so.
    pub sipi_vector: u32,
    /// `KVM_VCPUEVENT_VALID_*`: which of the above KVM gave, and is to take.
    pub flags: u32,
}

/// An exception on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct ExceptionEvent {
    /// Flag: it is being delivered.
    pub injected: u8,
    /// Flag: it waits, and its side effects are to come. Apart from `injected` only in a VM that has
    /// `KVM_CAP_EXCEPTION_PAYLOAD` enabled.
    pub pending: u8,
    /// The vector.
    pub vector: u8,
    /// Flag: there is an error code.
    pub has_error_code: u8,
    /// The error code.
    pub error_code: u32,
    /// Flag: there is a payload.
    pub has_payload: u8,
    /// What CR2 or DR6 is to become.
    pub payload: u64,
}

macro_rules! part {
    ($(#[$attr:meta])* $name:ident of $kvm:ident { $( $(#[$doc:meta])* $field:ident as $theirs:ident, )+ }) => {
        $(#[$attr])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
        pub struct $name { $( $(#[$doc])* pub $field: u8, )+ }

        impl From<$kvm> for $name {
            fn from(kvm: $kvm) -> Self {
                Self { $( $field: kvm.$theirs, )+ }
            }
        }

        impl From<$name> for $kvm {
            #[allow(clippy::needless_update)]
            fn from(ours: $name) -> Self {
                Self { $( $theirs: ours.$field, )+ ..Default::default() }
            }
        }
    };
}

part! {
    /// An external or software interrupt on its way.
    InterruptEvent of kvm_interrupt {
        /// Flag: it is being delivered.
        injected as injected,
        /// The vector.
        vector as nr,
        /// Flag: by `INT n`.
        soft as soft,
        /// The interrupt shadow: bits `KVM_X86_SHADOW_INT_*`.
        shadow as shadow,
    }
}

part! {
    /// A non-maskable interrupt on its way.
    NmiEvent of kvm_nmi {
        /// Flag: it is being delivered.
        injected as injected,
        /// How many wait, at most two.
        pending as pending,
        /// Flag: masked until the next `IRET`.
        masked as masked,
    }
}

part! {
    /// System management mode.
    SmiEvent of kvm_smi {
        /// Flag: the vCPU is in it.
        smm as smm,
        /// Flag: an SMI waits.
        pending as pending,
        /// Flag: it came while NMIs were masked.
        inside_nmi as smm_inside_nmi,
        /// Flag: an INIT waits for the end of it. (KVM keeps any pending INIT here.)
        latched_init as latched_init,
    }
}

impl From<kvm_vcpu_events> for Events {
    fn from(kvm: kvm_vcpu_events) -> Self {
        Self {
            exception: ExceptionEvent {
                injected: kvm.exception.injected,
                pending: kvm.exception.pending,
                vector: kvm.exception.nr,
                has_error_code: kvm.exception.has_error_code,
                error_code: kvm.exception.error_code,
                has_payload: kvm.exception_has_payload,
                payload: kvm.exception_payload,
            },
            interrupt: kvm.interrupt.into(),
            nmi: kvm.nmi.into(),
            smi: kvm.smi.into(),
            triple_fault: kvm.triple_fault.pending,
            sipi_vector: kvm.sipi_vector,
            flags: kvm.flags,
        }
    }
}

impl From<Events> for kvm_vcpu_events {
    fn from(ours: Events) -> Self {
        let mut kvm = Self {
            exception: kvm_exception {
                injected: ours.exception.injected,
                nr: ours.exception.vector,
                has_error_code: ours.exception.has_error_code,
                pending: ours.exception.pending,
                error_code: ours.exception.error_code,
            },
            interrupt: ours.interrupt.into(),
            nmi: ours.nmi.into(),
            smi: ours.smi.into(),
            sipi_vector: ours.sipi_vector,
            flags: ours.flags,
            exception_has_payload: ours.exception.has_payload,
            exception_payload: ours.exception.payload,
            ..Default::default()
        };
        kvm.triple_fault.pending = ours.triple_fault;
        kvm
    }
}
