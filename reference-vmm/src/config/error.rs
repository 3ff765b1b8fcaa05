// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a configuration cannot be.

use std::fmt;
use std::path::PathBuf;

use kvm_core::arch::x86_64::Topology;
use kvm_core::arch::x86_64::cpuid::UnknownBaseline;

use super::json::MAX_CONFIG_FILE;
use super::{MAX_APIC_ID, MAX_CPUS};
use crate::cpus::Cpus;

/// What a JSON file was named for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonFile {
    /// `--config FILE`.
    Configuration,
    /// `--cpu FILE`.
    CpuModel,
}

impl fmt::Display for JsonFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            JsonFile::Configuration => "the configuration",
            JsonFile::CpuModel => "the processor model",
        })
    }
}

/// A configuration that cannot be; the process ends with status 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {what} {path}: {source}")]
    Read {
        /// What it is.
        what: JsonFile,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is a pipe, a device or a directory: opening or reading one could wait for ever.
    #[error("{what} {path} is {is}; give a regular file")]
    NotAFile {
        /// What it is to be.
        what: JsonFile,
        /// The path.
        path: PathBuf,
        /// What is there.
        is: &'static str,
    },
    /// The file is too large to be one.
    #[error("{what} {path} has {len} bytes or more; at most {MAX_CONFIG_FILE} are read")]
    TooLarge {
        /// What it is.
        what: JsonFile,
        /// The file.
        path: PathBuf,
        /// Its length in bytes, as far as it was asked.
        len: u64,
    },
    /// The file is not the JSON that it should be.
    #[error("{what} {path} is not valid: {source}")]
    Json {
        /// What it is.
        what: JsonFile,
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A size is not a number with a unit.
    #[error("{0:?} is not a size; write bytes, or a number with K, M, G or T, such as 512M")]
    Size(String),
    /// No kernel was named.
    #[error("no kernel: --kernel FILE names the image to boot, or \"kernel\" in the --config file")]
    NoKernel,
    /// A file without a name.
    #[error("{flag} \"\": a file's path is wanted")]
    EmptyPath {
        /// What was to name it.
        flag: &'static str,
    },
    /// Too few or too many vCPUs.
    #[error("{0} vCPUs: a VM has 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// An option of the vCPUs that is none, or has a value that it cannot have.
    #[error("option {option:?}: {why}")]
    CpusOption {
        /// The option, as given.
        option: String,
        /// What is wrong with it.
        why: String,
    },
    /// Sockets, cores and threads that do not multiply to the number of vCPUs.
    #[error("{}", .0.misfit())]
    Topology(Cpus),
    /// A topology whose APIC ids the xAPIC has not.
    #[error(
        "{topology} reach APIC id {highest}, and the highest is {MAX_APIC_ID}: numbers that are powers of two leave no ids out"
    )]
    ApicIds {
        /// The topology.
        topology: Topology,
        /// Its highest APIC id.
        highest: u32,
    },
    /// A processor model that is none.
    #[error("{0}, or a file whose name ends in .json or has a / in it")]
    CpuModel(UnknownBaseline),
    /// Several vCPUs and nothing with which one could start another.
    #[error(
        "{0} vCPUs need --irqchip kernel or split: without local APICs the first one cannot start the others"
    )]
    CpusWithoutApics(u32),
    /// Memory is too small, too large, not whole pages, or asks for what does not go together.
    #[error("{given} bytes of memory: {why}")]
    Memory {
        /// The size asked for.
        given: u64,
        /// What is wrong with it.
        why: String,
    },
    /// An option of the memory that is none, or has a value that it cannot have.
    #[error("memory option {option:?}: {why}")]
    MemoryOption {
        /// The option, as given.
        option: String,
        /// What is wrong with it.
        why: String,
    },
    /// A command line with a NUL byte in it, which would end it there.
    #[error("the kernel command line has a NUL byte at offset {0}")]
    CmdlineNul(usize),
    /// The PIT lives in the kernel's irqchip.
    #[error("the PIT needs --irqchip kernel")]
    Pit,
    /// A device's options make no sense.
    #[error("{flag}: {why}")]
    Device {
        /// The flag that asks for it.
        flag: &'static str,
        /// What is wrong.
        why: String,
    },
    /// virtio devices are found by ACPI, and interrupt.
    #[error("virtio devices need --irqchip split or kernel")]
    VirtioWithoutInterrupts,
    /// The debug-exit ports would lie over another device or past the last port.
    #[error("debug-exit at port {port:#x}: {why}")]
    DebugExit {
        /// The base port.
        port: u16,
        /// What is in the way.
        why: String,
    },
}

impl ConfigError {
    /// What a device's own module says of its options.
    pub(crate) fn device(flag: &'static str, why: impl fmt::Display) -> Self {
        let why = why.to_string();
        ConfigError::Device { flag, why }
    }
}
