// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processor models as data: a baseline, and edits of single bits or whole registers on it.

use kvm_bindings::kvm_cpuid_entry2;

use super::baseline::Baseline;
use super::bits::BitPattern;
use super::features::{FEATURE_WORDS, FeatureKind, bit_names, feature, feature_word, meant};
use super::leaves::{Word, subleaf_mut};
use super::xsave;

/// An edit of one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// Which.
    pub word: Word,
    /// What becomes of it.
    pub bits: BitPattern,
}

/// Why a host's processors cannot be this model, or a model is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The model has what the host does not provide.
    #[error("{template} needs what this host's KVM does not provide: {}", missing.join(", "))]
    Missing {
        /// The model's name.
        template: String,
        /// The features, as [`bit_names`] calls them.
        missing: Vec<String>,
    },
    /// A name that no feature has. The message says which may be meant.
    #[error(
        "{0:?} is the name of no feature{meant}; names are those of /proc/cpuinfo where it shows the bit, and bits without a name are edited by leaf and register",
        meant = meant(.0).map_or_else(String::new, |name| format!(" (is {name:?} meant?)"))
    )]
    UnknownFeature(String),
    /// An edit that both sets and clears a bit.
    #[error("{} set and cleared at once", names.join(", "))]
    Contradiction {
        /// The features.
        names: Vec<String>,
    },
}

/// A processor model: what a guest is to be told beyond the topology, whatever host it runs on.
///
/// ```
/// use kvm_core::arch::x86_64::cpuid::{Baseline, Template, TemplateError};
///
/// let model = Template::baseline(Baseline::V1).with("aes")?.without("rdtscp")?;
/// // A host of no features at all cannot be it, and says why.
/// let refused = model.apply(&[]).unwrap_err();
/// assert!(matches!(refused, TemplateError::Missing { missing, .. } if missing.contains(&"aes".into())));
/// # Ok::<(), TemplateError>(())
/// ```
///
/// With the feature `with-serde` it is written as
///
/// ```json
/// {
///   "name": "fleet-2026",
///   "base": "x86-64-v3",
///   "set": ["aes", "pclmulqdq"],
///   "clear": ["invtsc"],
///   "registers": [
///     {"leaf": "0x7", "subleaf": 0, "register": "edx", "bits": "0bxxxx_xxxx_xxxx_xxxx_xxxx_xxxx_xxx0_xxxx"},
///     {"leaf": "0x1", "register": "eax", "value": "0x306f0"}
///   ]
/// }
/// ```
///
/// Names are those of `/proc/cpuinfo` for the bits that it shows, but for its `constant_tsc` and
/// `nonstop_tsc`, which are one bit, `invtsc`; for others those of the kernel's cpufeatures.h and of KVM's
/// documentation. [`FEATURE_WORDS`] has them all.
///
/// Every field may be left out; `base` is the host then. Names are made first, then registers, each in
/// its order.
///
/// The topology's leaves, the hypervisor bit, the TSC-deadline timer and ARAT are
/// [`CpuidPlan`](super::CpuidPlan)'s, which comes later and overwrites what a template says of them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "with-serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "super::json::Written", into = "super::json::Written")
)]
pub struct Template {
    name: String,
    baseline: Option<Baseline>,
    edits: Vec<Edit>,
}

impl Template {
    /// What the host is.
    #[must_use]
    pub fn host() -> Self {
        Self {
            name: "host".to_owned(),
            baseline: None,
            edits: Vec::new(),
        }
    }

    /// A level of the x86-64 psABI.
    #[must_use]
    pub fn baseline(level: Baseline) -> Self {
        Self {
            name: level.name().to_owned(),
            baseline: Some(level),
            edits: Vec::new(),
        }
    }

    /// Gives it another name, for its messages.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The level that its edits start from; `None`: the host.
    #[must_use]
    pub const fn base(&self) -> Option<Baseline> {
        self.baseline
    }

    /// Its edits, in the order in which they are made.
    #[must_use]
    pub fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// With this feature.
    ///
    /// # Errors
    /// [`TemplateError::UnknownFeature`].
    pub fn with(self, name: &str) -> Result<Self, TemplateError> {
        self.feature(name, true)
    }

    /// Without this feature.
    ///
    /// # Errors
    /// [`TemplateError::UnknownFeature`].
    pub fn without(self, name: &str) -> Result<Self, TemplateError> {
        self.feature(name, false)
    }

    /// With this edit as the last.
    #[must_use]
    pub fn edit(mut self, edit: Edit) -> Self {
        self.edits.push(edit);
        self
    }

    fn feature(self, name: &str, there: bool) -> Result<Self, TemplateError> {
        let unknown = || TemplateError::UnknownFeature(name.chars().take(80).collect());
        let found = feature(name).ok_or_else(unknown)?;
        let (set, clear) = if there {
            (found.mask(), 0)
        } else {
            (0, found.mask())
        };
        // One of the two is 0.
        let bits = BitPattern::new(set, clear).unwrap_or_default();
        let word = found.word;
        Ok(self.edit(Edit { word, bits }))
    }

    /// What the edits say of this feature in the end: there, not there, or nothing.
    #[must_use]
    pub fn says(&self, name: &str) -> Option<bool> {
        let found = feature(name)?;
        let edits = self.edits.iter().rev().filter(|e| e.word == found.word);
        edits
            .map(|edit| (edit.bits.set(), edit.bits.clear()))
            .find(|(set, clear)| (set | clear) & found.mask() != 0)
            .map(|(set, _)| set & found.mask() != 0)
    }

    /// The model on this host: `host` is `KVM_GET_SUPPORTED_CPUID`'s answer. A template that changes
    /// nothing gives the host's list as it is.
    ///
    /// Registers that hold numbers (family, brand, cache sizes) are taken as the template says them: no host
    /// is asked. What belongs to features that are gone, such as the extended state of AVX in leaf 0xd, goes
    /// with them.
    ///
    /// # Errors
    /// [`TemplateError::Missing`], with all that the host lacks.
    pub fn apply(&self, host: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, TemplateError> {
        let mut leaves = host.to_vec();
        if self.baseline.is_none() && self.edits.is_empty() {
            return Ok(leaves);
        }
        if let Some(level) = self.baseline {
            restrict(level, &mut leaves);
        }
        for Edit { word, bits } in &self.edits {
            // What is not listed reads as 0, and need not be listed for that.
            if bits.apply(word.of(&leaves)) != word.of(&leaves) {
                let leaf = subleaf_mut(&mut leaves, word.leaf, word.subleaf);
                let register = word.register.of_mut(leaf);
                *register = bits.apply(*register);
            }
        }
        let missing: Vec<_> = FEATURE_WORDS
            .iter()
            .flat_map(|known| {
                let word = known.word;
                let more = word.of(&leaves) & !word.of(host) & !known.mask(FeatureKind::Machine);
                bit_names(word, more)
            })
            .collect();
        if !missing.is_empty() {
            let template = self.name.clone();
            return Err(TemplateError::Missing { template, missing });
        }
        xsave::follow(host, &mut leaves);
        Ok(leaves)
    }

    /// Which levels a host provides, and of the others what it lacks.
    #[must_use]
    pub fn levels(host: &[kvm_cpuid_entry2]) -> [(Baseline, Vec<String>); 4] {
        Baseline::ALL.map(|level| match Self::baseline(level).apply(host) {
            Err(TemplateError::Missing { missing, .. }) => (level, missing),
            _ => (level, Vec::new()),
        })
    }
}

/// The instructions of a level and no others.
fn restrict(level: Baseline, leaves: &mut Vec<kvm_cpuid_entry2>) {
    for known in FEATURE_WORDS {
        let wanted = level
            .features()
            .filter_map(feature)
            .filter(|feature| feature.word == known.word)
            .fold(0, |mask, feature| mask | feature.mask());
        let now = known.word.of(leaves);
        let then = now & !known.mask(FeatureKind::Instructions) | wanted;
        if then != now {
            let leaf = subleaf_mut(leaves, known.word.leaf, known.word.subleaf);
            *known.word.register.of_mut(leaf) = then;
        }
    }
}

/// Whether a register's bits stand for features.
pub(super) fn holds_features(word: Word) -> bool {
    feature_word(word).is_some()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_feature_of_every_level_has_a_name_and_is_an_instruction_or_saves_its_state() {
        for level in Baseline::ALL {
            for name in level.features() {
                let found = feature(name).unwrap_or_else(|| panic!("{level}: {name}"));
                assert!(
                    found.kind == FeatureKind::Instructions || name == "xsave",
                    "{level}: {name}"
                );
            }
        }
    }
}
