// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which processor a guest is to see: `--cpu host`, a level of the x86-64 psABI, or a template of the
//! user's own in a file.

use std::path::PathBuf;

use kvm_core::arch::x86_64::cpuid::{Baseline, Template};
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, JsonFile, read_json};

/// A processor model, as it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// What the host's KVM supports.
    #[default]
    Host,
    /// A level of the psABI, and no instructions beyond it.
    Baseline(Baseline),
    /// A template ([`Template`]'s JSON form) in this file.
    File(PathBuf),
}

/// Says which of the three a text is: a model's name, or what looks like a file's.
impl TryFrom<PathBuf> for CpuModel {
    type Error = ConfigError;

    fn try_from(path: PathBuf) -> Result<Self, ConfigError> {
        let text = path.to_string_lossy();
        if text == "host" {
            return Ok(CpuModel::Host);
        }
        match text.parse() {
            Ok(level) => Ok(CpuModel::Baseline(level)),
            Err(_) if text.contains('/') || text.ends_with(".json") => Ok(CpuModel::File(path)),
            Err(unknown) => Err(ConfigError::CpuModel(unknown)),
        }
    }
}

impl CpuModel {
    /// The template, read from its file if it is in one.
    ///
    /// # Errors
    /// The file cannot be read or is no template.
    pub fn template(&self) -> Result<Template, ConfigError> {
        match self {
            CpuModel::Host => Ok(Template::host()),
            CpuModel::Baseline(level) => Ok(Template::baseline(*level)),
            CpuModel::File(path) => {
                let template: Named = read_json(JsonFile::CpuModel, path)?;
                Ok(match template.named {
                    true => template.template,
                    // Without a name of its own it has its file's.
                    false => template.template.named(path.display().to_string()),
                })
            }
        }
    }
}

/// A template, and whether it says a name.
struct Named {
    template: Template,
    named: bool,
}

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let template = Template::deserialize(deserializer)?;
        let unsaid = template.base().map_or("host", |level| level.name());
        let named = template.name() != unsaid;
        Ok(Named { template, named })
    }
}

impl<'de> Deserialize<'de> for CpuModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        CpuModel::try_from(PathBuf::from(text)).map_err(de::Error::custom)
    }
}

impl Serialize for CpuModel {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            CpuModel::Host => serializer.serialize_str("host"),
            CpuModel::Baseline(level) => serializer.serialize_str(level.name()),
            CpuModel::File(path) => serializer.collect_str(&path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_name_and_a_file_are_told_apart() {
        let model = |text: &str| CpuModel::try_from(PathBuf::from(text));
        assert_eq!(model("host").unwrap(), CpuModel::Host);
        let v3 = CpuModel::Baseline(Baseline::V3);
        assert_eq!(model("x86-64-v3").unwrap(), v3);
        for file in ["fleet.json", "./x86-64-v3", "/host"] {
            assert_eq!(model(file).unwrap(), CpuModel::File(file.into()));
        }
        for (text, needle) in [("x86-64-v5", "x86-64-v5"), ("", "\"\"")] {
            let error = model(text).unwrap_err().to_string();
            assert!(error.contains(needle), "{error}");
        }
    }
}
