// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The written form of a template, for serde: JSON above all. [`Template`] shows it.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::baseline::Baseline;
use super::bits::BitPattern;
use super::leaves::{Register, Word};
use super::template::{Edit, Template, TemplateError};

/// A template as it is written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a processor model is an object with name, base, set, clear and registers"
)]
pub(super) struct Written {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    set: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    clear: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    registers: Vec<WrittenEdit>,
}

/// An edit as it is written: either `bits` or `value`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenEdit {
    leaf: Number,
    #[serde(default)]
    subleaf: Number,
    register: Register,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bits: Option<Bits>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<Number>,
}

/// Why what is written is no template.
#[derive(Debug, thiserror::Error)]
pub(super) enum WrittenError {
    #[error("base: {0}")]
    Base(#[from] super::baseline::UnknownBaseline),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("{0}: an edit has either \"bits\" or \"value\"")]
    Either(Word),
}

impl TryFrom<Written> for Template {
    type Error = WrittenError;

    fn try_from(written: Written) -> Result<Self, WrittenError> {
        let mut template = match written.base.as_deref() {
            None | Some("host") => Template::host(),
            Some(name) => Template::baseline(name.parse::<Baseline>()?),
        };
        for name in &written.set {
            template = template.with(name)?;
        }
        for name in &written.clear {
            template = template.without(name)?;
        }
        // Names of features by now, however many there are.
        let [set, clear] =
            [&written.set, &written.clear].map(|list| list.iter().collect::<BTreeSet<_>>());
        let names: Vec<_> = set
            .intersection(&clear)
            .map(|name| (*name).clone())
            .collect();
        if !names.is_empty() {
            return Err(TemplateError::Contradiction { names }.into());
        }
        for edit in written.registers {
            let word = Word::new(edit.leaf.0, edit.subleaf.0, edit.register);
            let bits = match (edit.bits, edit.value) {
                (Some(bits), None) => bits.0,
                (None, Some(value)) => BitPattern::value(value.0),
                _ => return Err(WrittenError::Either(word)),
            };
            template = template.edit(Edit { word, bits });
        }
        Ok(match written.name {
            Some(name) => template.named(name),
            None => template,
        })
    }
}

impl From<Template> for Written {
    fn from(template: Template) -> Self {
        let edit = |Edit { word, bits }: &Edit| WrittenEdit {
            leaf: Number(word.leaf),
            subleaf: Number(word.subleaf),
            register: word.register,
            bits: Some(Bits(*bits)),
            value: None,
        };
        Written {
            name: Some(template.name().to_owned()),
            base: template.base().map(|level| level.name().to_owned()),
            registers: template.edits().iter().map(edit).collect(),
            ..Written::default()
        }
    }
}

/// A pattern as text.
#[derive(Clone, Copy, Debug)]
struct Bits(BitPattern);

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Bits;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("0b and 32 of 0, 1 and x, bit 31 first")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bits, E> {
                text.parse().map(Bits).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// 32 bits: a number, or hexadecimal text, which JSON has no number for.
#[derive(Clone, Copy, Debug, Default)]
struct Number(u32);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrText;
        impl Visitor<'_> for NumberOrText {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of 32 bits, or text such as \"0x80000008\"")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Number, E> {
                let wrong = || E::invalid_value(de::Unexpected::Unsigned(number), &self);
                u32::try_from(number).map(Number).map_err(|_| wrong())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Number, E> {
                let digits = text.strip_prefix("0x");
                // `from_str_radix` would take a sign.
                let digits = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
                let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
                let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
                number.map(Number).ok_or_else(wrong)
            }
        }
        deserializer.deserialize_any(NumberOrText)
    }
}
