// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm cpu`: which models this host can be, and what a model changes.

use std::fmt;
use std::path::Path;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_core::Kvm;
use kvm_core::arch::x86_64::cpuid::{
    Baseline, Difference, Signature, Template, TemplateError, differences, vendor_name,
};
use serde::Serialize;

use crate::vm::BuildError;

/// A host's processor, and a model beside it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuReport {
    host: Host,
    levels: Vec<Level>,
    cpu: String,
    /// What the host lacks for the model. Empty: it can be it.
    missing: Vec<String>,
    differences: Vec<Differs>,
}

#[derive(Debug, Serialize)]
struct Host {
    vendor: String,
    family: u32,
    model: u32,
    stepping: u32,
}

#[derive(Debug, Serialize)]
struct Level {
    name: &'static str,
    missing: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Differs {
    leaf: String,
    subleaf: u32,
    register: String,
    host: String,
    guest: String,
    removed: Vec<String>,
    added: Vec<String>,
    #[serde(skip)]
    line: String,
}

impl From<&Difference> for Differs {
    fn from(found: &Difference) -> Self {
        Differs {
            leaf: format!("{:#x}", found.word.leaf),
            subleaf: found.word.subleaf,
            register: found.word.register.to_string(),
            host: format!("{:#x}", found.host),
            guest: format!("{:#x}", found.guest),
            removed: found.removed(),
            added: found.added(),
            line: found.to_string(),
        }
    }
}

impl CpuReport {
    /// Asks the host's KVM, and applies the template to its answer.
    ///
    /// # Errors
    /// There is no KVM.
    pub fn ask(kvm: &Path, template: &Template) -> Result<Self, BuildError> {
        let supported = Kvm::open_at(kvm)?.supported_cpuid()?;
        Self::of(supported.as_slice(), template)
    }

    /// The report on `host`, a `KVM_GET_SUPPORTED_CPUID`'s answer.
    ///
    /// # Errors
    /// The template cannot be applied to any host.
    pub fn of(host: &[kvm_cpuid_entry2], template: &Template) -> Result<Self, BuildError> {
        let (missing, differences) = match template.apply(host) {
            Ok(guest) => (Vec::new(), differences(host, &guest)),
            Err(TemplateError::Missing { missing, .. }) => (missing, Vec::new()),
            Err(other) => return Err(other.into()),
        };
        let signature = Signature::of(host);
        let level = |(level, missing): (Baseline, _)| Level {
            name: level.name(),
            missing,
        };
        Ok(CpuReport {
            host: Host {
                vendor: vendor_name(host),
                family: signature.family,
                model: signature.model,
                stepping: signature.stepping,
            },
            levels: Template::levels(host).into_iter().map(level).collect(),
            cpu: template.name().to_owned(),
            missing,
            differences: differences.iter().map(Differs::from).collect(),
        })
    }

    /// Why the host cannot be this model.
    pub fn refusal(&self) -> Option<BuildError> {
        let refusal = || TemplateError::Missing {
            template: self.cpu.clone(),
            missing: self.missing.clone(),
        };
        (!self.missing.is_empty()).then(|| refusal().into())
    }

    /// One JSON document and a newline.
    pub fn json(&self) -> String {
        // Strings and numbers alone: there is nothing that JSON could not say.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }
}

impl fmt::Display for CpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host {
            vendor,
            family,
            model,
            stepping,
        } = &self.host;
        writeln!(
            f,
            "host: {vendor}, family {family}, model {model}, stepping {stepping}"
        )?;
        for Level { name, missing } in &self.levels {
            if missing.is_empty() {
                writeln!(f, "{name}: provided")?;
            } else {
                writeln!(f, "{name}: lacks {}", missing.join(" "))?;
            }
        }
        let cpu = &self.cpu;
        if self.differences.is_empty() {
            return writeln!(f, "--cpu {cpu}: what this host's KVM supports, unchanged");
        }
        writeln!(f, "--cpu {cpu}: what this host's KVM supports, but for")?;
        for found in &self.differences {
            writeln!(f, "  {}", found.line)?;
        }
        Ok(())
    }
}
