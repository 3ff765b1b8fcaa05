// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes whose meaning is the processor's or KVM's: an XSAVE area, an APIC page.

#![forbid(unsafe_code)]

use std::fmt;

/// Bytes that are kept as they came. In text (JSON) a string of hexadecimal digits, two a byte; in
/// binary formats, bytes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StateBytes(pub Vec<u8>);

impl fmt::Debug for StateBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = self.0.iter().filter(|byte| **byte != 0).count();
        write!(f, "{} bytes, {set} of them not 0", self.0.len())
    }
}

impl std::ops::Deref for StateBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(feature = "with-serde")]
mod form {
    use super::{StateBytes, fmt};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    fn digit(nibble: u8) -> char {
        char::from_digit(u32::from(nibble), 16).unwrap_or('0')
    }

    fn value(digit: u8) -> Option<u8> {
        char::from(digit)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    }

    impl Serialize for StateBytes {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            if !serializer.is_human_readable() {
                return serializer.serialize_bytes(&self.0);
            }
            let mut text = String::with_capacity(2 * self.0.len());
            for byte in &self.0 {
                text.push(digit(byte >> 4));
                text.push(digit(byte & 0xf));
            }
            serializer.serialize_str(&text)
        }
    }

    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = StateBytes;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes, or their hexadecimal digits, two a byte")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<StateBytes, E> {
            let (pairs, rest) = text.as_bytes().as_chunks::<2>();
            let byte = |[high, low]: &[u8; 2]| Some(value(*high)? << 4 | value(*low)?);
            let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
            match bytes {
                Some(bytes) if rest.is_empty() => Ok(StateBytes(bytes)),
                _ => Err(E::invalid_value(de::Unexpected::Str("other text"), &self)),
            }
        }

        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<StateBytes, E> {
            Ok(StateBytes(bytes.to_vec()))
        }

        fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<StateBytes, E> {
            Ok(StateBytes(bytes))
        }
    }

    impl<'de> Deserialize<'de> for StateBytes {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            if deserializer.is_human_readable() {
                deserializer.deserialize_str(Visitor)
            } else {
                deserializer.deserialize_byte_buf(Visitor)
            }
        }
    }
}
