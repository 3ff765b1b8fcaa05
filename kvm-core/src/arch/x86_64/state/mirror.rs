// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Plain structures of our own beside KVM's: one list of fields makes the structure, its serde form and
//! both conversions, so that none of the three can forget a field.

/// Makes a public structure with named fields, the serde form of it, and `From` both ways for the
/// structure of KVM's ABI. Each field has the same name there, or says which it has; padding is zero.
macro_rules! mirror {
    (
        $(#[$attr:meta])*
        $name:ident of $kvm:ident {
            $( $(#[$field_attr:meta])* $field:ident $(as $theirs:ident)? : $type:ty, )+
        }
    ) => {
        $(#[$attr])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
        pub struct $name {
            $( $(#[$field_attr])* pub $field: $type, )+
        }

        impl From<kvm_bindings::$kvm> for $name {
            fn from(kvm: kvm_bindings::$kvm) -> Self {
                Self { $( $field: mirror!(@get kvm $field $($theirs)?).into(), )+ }
            }
        }

        impl From<$name> for kvm_bindings::$kvm {
            // Bindgen's structures have padding under several names: it is what is not assigned.
            #[allow(clippy::field_reassign_with_default)]
            fn from(ours: $name) -> Self {
                let mut kvm = Self::default();
                $( mirror!(@get kvm $field $($theirs)?) = ours.$field.into(); )+
                kvm
            }
        }
    };
    (@get $kvm:ident $field:ident) => { $kvm.$field };
    (@get $kvm:ident $field:ident $theirs:ident) => { $kvm.$theirs };
}
pub(super) use mirror;
