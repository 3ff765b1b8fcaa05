// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VM is to be: plain data, from the command line or a JSON file, checked as a whole before
//! anything is created.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::devices::power::DebugExit;
use crate::devices::{FIXED_PORTS, KERNEL_PORTS};
use crate::memory::Memory;

/// A vCPU's local APIC id is its index, and the 8-bit ids of xAPIC end at 254 (255 is broadcast).
pub const MAX_CPUS: u32 = 255;

/// Longest JSON configuration read.
const MAX_CONFIG_FILE: u64 = 1 << 20;

/// Which interrupt controllers the VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// PIC, IOAPIC and local APICs in the kernel: what Linux guests run on for now.
    #[default]
    Kernel,
    /// Local APICs in the kernel, no pin controller: a guest has MSIs and inter-processor
    /// interrupts, and the serial port is polled.
    Split,
    /// No interrupt controller: for bare-metal guests with one purpose.
    None,
}

/// A virtual machine's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// The kernel image: bzImage, ELF or multiboot 1. A file may leave it to the command line.
    #[serde(default)]
    pub kernel: PathBuf,
    /// The initial RAM disk; with multiboot the modules, in order.
    #[serde(default, deserialize_with = "one_or_many")]
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
    /// Guest memory: 256 MiB of ordinary pages by default.
    #[serde(default)]
    pub memory: Memory,
    /// Number of vCPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Interrupt controllers.
    #[serde(default)]
    pub irqchip: Irqchip,
    /// An i8254 timer in the kernel, for guests without ACPI that calibrate by it. Needs
    /// `irqchip: kernel`.
    #[serde(default)]
    pub pit: bool,
    /// Base port of an isa-debug-exit device.
    #[serde(default)]
    pub debug_exit: Option<u16>,
    /// The output of a guest that polls its serial port may be kept in KVM for a moment, which spares
    /// exits, where the host has that: [`coalesce`](crate::devices::coalesce).
    #[serde(default = "yes")]
    pub coalesce_console: bool,
    /// The KVM device.
    #[serde(default = "default_kvm")]
    pub kvm: PathBuf,
}

fn default_cmdline() -> String {
    "console=ttyS0".to_owned()
}

const fn yes() -> bool {
    true
}

fn default_cpus() -> u32 {
    1
}

fn default_kvm() -> PathBuf {
    "/dev/kvm".into()
}

/// A configuration that cannot be; the process ends with status 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The configuration file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration file is too large to be one.
    #[error("the configuration {path} has {len} bytes or more; at most {MAX_CONFIG_FILE} are read")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes, as far as it was asked.
        len: u64,
    },
    /// The configuration file is not the JSON that it should be.
    #[error("the configuration {path} is not valid: {source}")]
    Json {
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
    /// Too few or too many vCPUs.
    #[error("{0} vCPUs: a VM has 1 to {MAX_CPUS}")]
    Cpus(u32),
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
    /// The debug-exit ports would lie over another device or past the last port.
    #[error("debug-exit at port {port:#x}: {why}")]
    DebugExit {
        /// The base port.
        port: u16,
        /// What is in the way.
        why: String,
    },
}

impl Config {
    /// The default machine around `kernel`: 1 vCPU, 256 MiB, in-kernel irqchip, serial console.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Config {
            kernel: kernel.into(),
            initrd: Vec::new(),
            cmdline: default_cmdline(),
            memory: Memory::default(),
            cpus: default_cpus(),
            irqchip: Irqchip::default(),
            pit: false,
            debug_exit: None,
            coalesce_console: true,
            kvm: default_kvm(),
        }
    }

    /// Reads a JSON object with the fields of [`Config`], in kebab-case: those that are not there have the
    /// defaults of [`new`](Self::new), and without a `kernel` somebody else has to name it. `memory` is a
    /// number of bytes, text as for `--memory`, or an object ([`Memory`]); `initrd` is a path or a list of
    /// them.
    ///
    /// # Errors
    /// The file cannot be read or is not such an object. [`validate`](Self::validate) is not called.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let mut len = file.metadata().map_err(read)?.len();
        let mut text = Vec::new();
        if len <= MAX_CONFIG_FILE {
            // A pipe or a device has no length beforehand, and /dev/zero no end.
            file.take(MAX_CONFIG_FILE + 1)
                .read_to_end(&mut text)
                .map_err(read)?;
            len = text.len() as u64;
        }
        if len > MAX_CONFIG_FILE {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
                len,
            });
        }
        let json = |source| ConfigError::Json {
            path: path.to_owned(),
            source,
        };
        // A list of the fields' values in their order would be one to serde.
        if text.trim_ascii_start().starts_with(b"[") {
            let wanted = "a list, and an object is wanted";
            return Err(json(serde::de::Error::custom(wanted)));
        }
        serde_json::from_slice(&text).map_err(json)
    }

    /// Checks every value that can be checked without a host.
    ///
    /// # Errors
    /// The first value that cannot be, with what it may be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::NoKernel);
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.cpus > 1 && self.irqchip == Irqchip::None {
            return Err(ConfigError::CpusWithoutApics(self.cpus));
        }
        self.memory.validate()?;
        if let Some(at) = self.cmdline.bytes().position(|byte| byte == 0) {
            return Err(ConfigError::CmdlineNul(at));
        }
        if let Some(port) = self.debug_exit {
            check_debug_exit(port, self.irqchip)?;
        }
        if self.pit && self.irqchip != Irqchip::Kernel {
            return Err(ConfigError::Pit);
        }
        Ok(())
    }
}

/// Refuses ports that other devices answer at.
fn check_debug_exit(port: u16, irqchip: Irqchip) -> Result<(), ConfigError> {
    let refused = |why: String| Err(ConfigError::DebugExit { port, why });
    let Some(last) = port.checked_add(DebugExit::LEN - 1) else {
        return refused(format!("its {} ports go past 0xffff", DebugExit::LEN));
    };
    let in_kernel = if irqchip == Irqchip::Kernel {
        &KERNEL_PORTS[..]
    } else {
        &[]
    };
    match FIXED_PORTS
        .iter()
        .chain(in_kernel)
        .find(|(_, first, len)| port < first + len && *first <= last)
    {
        Some((device, first, _)) => refused(format!("{device} is at {first:#x}")),
        None => Ok(()),
    }
}

/// Reads a size: bytes, or a number with `K`, `M`, `G` or `T` (powers of 1024; `KiB` and `KB` mean
/// the same, in either case).
///
/// # Errors
/// The text, if it is no size or does not fit in 64 bits.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let bad = || ConfigError::Size(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit = unit.to_ascii_lowercase();
    let shift = match unit
        .strip_suffix("ib")
        .or(unit.strip_suffix('b'))
        .unwrap_or(&unit)
    {
        "" if unit.is_empty() || unit == "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

pub(crate) fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "a size is a number of bytes, or text such as \"512M\""
    )]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Text(text) => parse_size(&text).map_err(serde::de::Error::custom),
    }
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "initrd is a path or a list of paths")]
    enum Paths {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Paths::deserialize(deserializer)? {
        Paths::One(path) => vec![path],
        Paths::Many(paths) => paths,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_usual_forms() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4096B", 4096),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("2G", 2 << 30),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
            ("3KB", 3072),
            ("0", 0),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "12X",
            "1 G",
            "ib",
            "1ib",
            "99999999999999999999",
            "18446744073709551615K",
        ] {
            let error = parse_size(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn each_bad_value_is_refused_with_the_value_in_the_message() {
        let refused = |change: fn(&mut Config), needle: &str| {
            let mut config = Config::new("vmlinux");
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(needle), "{message:?} has no {needle:?}");
        };
        Config::new("vmlinux").validate().unwrap();
        refused(|c| c.kernel = "".into(), "--kernel");
        refused(|c| c.cpus = 0, "0 vCPUs");
        refused(|c| c.cpus = 256, "256 vCPUs");
        refused(
            |c| (c.cpus, c.irqchip) = (2, Irqchip::None),
            "2 vCPUs need --irqchip",
        );
        refused(|c| c.memory = 0.into(), "0 bytes of memory");
        refused(|c| c.memory = ((256 << 20) + 1).into(), "268435457");
        refused(|c| c.memory = (1 << 52).into(), "4503599627370496");
        refused(|c| c.memory = (!4095).into(), "18446744073709547520");
        refused(|c| c.cmdline = "a\0b".into(), "offset 1");
        refused(|c| c.debug_exit = Some(0xffff), "0xffff");
        refused(|c| c.debug_exit = Some(0x3f6), "serial port is at 0x3f8");
        refused(|c| c.debug_exit = Some(0x605 - 3), "0x602");
        refused(
            |c| (c.pit, c.irqchip) = (true, Irqchip::Split),
            "--irqchip kernel",
        );
    }

    #[test]
    fn a_file_has_the_same_fields_and_defaults_and_no_others() {
        let parse = |text: &str| serde_json::from_str::<Config>(text);
        let config = parse(r#"{"kernel": "k", "memory": "1G", "initrd": "i", "debug-exit": 244}"#);
        let expected = Config {
            memory: Memory::new(1 << 30),
            initrd: vec!["i".into()],
            debug_exit: Some(0xf4),
            ..Config::new("k")
        };
        assert_eq!(config.unwrap(), expected);
        assert_eq!(parse(r#"{"kernel": "k"}"#).unwrap(), Config::new("k"));
        // Without a kernel it is a file still, and no machine.
        let none = parse("{}").unwrap();
        assert_eq!(none, Config::new(""));
        assert!(matches!(none.validate(), Err(ConfigError::NoKernel)));
        assert!(
            parse(r#"{"kernel": "k", "cpu": 2}"#)
                .unwrap_err()
                .to_string()
                .contains("`cpu`")
        );
        assert!(parse(r#"{"kernel": "k", "memory": "lots"}"#).is_err());
    }
}
