// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VM is to be: plain data, from the command line or a JSON file, checked as a whole before
//! anything is created.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use kvm_core::arch::x86_64::Topology;
use kvm_core::arch::x86_64::cpuid::UnknownBaseline;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::cpu_model::CpuModel;
use crate::cpus::Cpus;
use crate::devices::power::DebugExit;
use crate::devices::virtio::block::DiskConfig;
use crate::devices::virtio::console::config::{self as console, ConsoleConfig, PortConfig};
use crate::devices::virtio::net::NetConfig;
use crate::devices::virtio::vsock::VsockConfig;
use crate::devices::{FIXED_PORTS, KERNEL_PORTS};
use crate::memory::Memory;

/// A vCPU's number is its local APIC id, and the 8-bit ids of xAPIC end at 254 (255 is broadcast).
pub const MAX_APIC_ID: u32 = 254;
/// So many vCPUs have such an id.
pub const MAX_CPUS: u32 = MAX_APIC_ID + 1;

/// Longest JSON configuration read.
const MAX_CONFIG_FILE: u64 = 1 << 20;

/// Which interrupt controllers the VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// PIC, IOAPIC and local APICs in the kernel.
    Kernel,
    /// Local APICs in the kernel, the IOAPIC in the monitor, and no PIC: a machine that is made and
    /// ended without a grace period of KVM's.
    #[default]
    Split,
    /// No interrupt controller: for bare-metal guests with one purpose.
    None,
}

/// A virtual machine's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The kernel image: bzImage, ELF or multiboot 1. There is no machine without one, but a file may
    /// leave it to the command line.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk; with multiboot the modules, in order.
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Guest memory: 256 MiB of ordinary pages by default.
    pub memory: Memory,
    /// How many vCPUs, and how they are arranged: one by default.
    pub cpus: Cpus,
    /// Which processor the guest sees.
    pub cpu: CpuModel,
    /// Interrupt controllers.
    pub irqchip: Irqchip,
    /// An i8254 timer in the kernel, for guests without ACPI that calibrate by it. Needs
    /// `irqchip: kernel`.
    pub pit: bool,
    /// Base port of an isa-debug-exit device.
    pub debug_exit: Option<u16>,
    /// The output of a guest that polls its serial port may be kept in KVM for a moment, which spares
    /// exits, where the host has that: [`coalesce`](crate::devices::coalesce).
    pub coalesce_console: bool,
    /// Disks, virtio-block, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Network cards, virtio-net.
    pub nets: Vec<NetConfig>,
    /// A vsock device, virtio-vsock.
    pub vsock: Option<VsockConfig>,
    /// Where hvc0 leads to, a virtio-console of its own.
    pub console: ConsoleConfig,
    /// Named ports, of another virtio-console.
    pub ports: Vec<PortConfig>,
    /// An entropy device, virtio-rng.
    pub rng: bool,
    /// The KVM device.
    pub kvm: PathBuf,
}

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

impl Config {
    /// The default machine around `kernel`: 1 vCPU, 256 MiB, split irqchip, serial console.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Config {
            kernel: Some(kernel.into()),
            ..Config::default()
        }
    }

    /// Reads a JSON object with the fields of [`Config`], in kebab-case: those that are not there have the
    /// defaults of [`new`](Self::new), and without a `kernel` somebody else has to name it. `memory` is a
    /// number of bytes, text as for `--memory`, or an object ([`Memory`]); `cpus` is a number or an object
    /// ([`Cpus`]); `initrd` is a path or a list of them.
    ///
    /// # Errors
    /// The file cannot be read or is not such an object. [`validate`](Self::validate) is not called.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        read_json(JsonFile::Configuration, path)
    }

    /// Checks every value that can be checked without a host.
    ///
    /// # Errors
    /// The first value that cannot be, with what it may be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let kernel = self.kernel.as_ref().ok_or(ConfigError::NoKernel)?;
        let kernel = [("--kernel", kernel), ("--kvm", &self.kvm)].into_iter();
        let initrds = self.initrd.iter().map(|path| ("--initrd", path));
        for (flag, path) in kernel.chain(initrds) {
            check_path(flag, path)?;
        }
        let cpus = self.cpus.topology()?.cpus();
        if cpus > 1 && self.irqchip == Irqchip::None {
            return Err(ConfigError::CpusWithoutApics(cpus));
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
        self.check_devices()?;
        match self.irqchip == Irqchip::None && self.has_virtio() {
            true => Err(ConfigError::VirtioWithoutInterrupts),
            false => Ok(()),
        }
    }

    fn check_devices(&self) -> Result<(), ConfigError> {
        for disk in &self.disks {
            disk.check()
                .map_err(|error| ConfigError::device("--disk", error))?;
        }
        for net in &self.nets {
            net.check()
                .map_err(|error| ConfigError::device("--net", error))?;
        }
        if let Some(vsock) = &self.vsock {
            let checked = vsock.check();
            checked.map_err(|error| ConfigError::device("--vsock", error))?;
        }
        console::check(&self.console, &self.ports)
            .map_err(|error| ConfigError::device(error.flag(), error))
    }

    /// Whether there is a virtio device in it.
    fn has_virtio(&self) -> bool {
        let none = self.disks.is_empty() && self.nets.is_empty() && self.vsock.is_none();
        self.rng || !none || self.console != ConsoleConfig::Off || !self.ports.is_empty()
    }
}

/// Reads a JSON object of at most [`MAX_CONFIG_FILE`] bytes from a regular file.
pub(crate) fn read_json<T: DeserializeOwned>(
    what: JsonFile,
    path: &Path,
) -> Result<T, ConfigError> {
    let read = |source| ConfigError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    // Asked before the file is opened, because opening a pipe waits for its other end.
    let file_type = fs::metadata(path).map_err(read)?.file_type();
    if !file_type.is_file() {
        return Err(ConfigError::NotAFile {
            what,
            path: path.to_owned(),
            is: match file_type.is_dir() {
                true => "a directory",
                false => "not a regular file",
            },
        });
    }
    let file = File::open(path).map_err(read)?;
    let mut len = file.metadata().map_err(read)?.len();
    let mut text = Vec::new();
    if len <= MAX_CONFIG_FILE {
        // A file may grow meanwhile, and those of /proc have no length beforehand.
        file.take(MAX_CONFIG_FILE + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        len = text.len() as u64;
    }
    if len > MAX_CONFIG_FILE {
        return Err(ConfigError::TooLarge {
            what,
            path: path.to_owned(),
            len,
        });
    }
    let json = |source| ConfigError::Json {
        what,
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

/// Refuses a path that names nothing, where the kernel would only say that it is not there.
pub(crate) fn check_path(flag: &'static str, path: &Path) -> Result<(), ConfigError> {
    match path.as_os_str().is_empty() {
        true => Err(ConfigError::EmptyPath { flag }),
        false => Ok(()),
    }
}

impl Default for Config {
    /// The machine of [`Config::new`], without a kernel yet.
    fn default() -> Self {
        Config {
            kernel: None,
            initrd: Vec::new(),
            cmdline: "console=ttyS0".to_owned(),
            memory: Memory::default(),
            cpus: Cpus::default(),
            cpu: CpuModel::default(),
            irqchip: Irqchip::default(),
            pit: false,
            debug_exit: None,
            coalesce_console: true,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            console: ConsoleConfig::Off,
            ports: Vec::new(),
            rng: false,
            kvm: "/dev/kvm".into(),
        }
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

/// The value of `key`; of what is wrong with it, the error says where it is.
pub(crate) fn field<'de, T, A>(map: &mut A, key: &str) -> Result<T, A::Error>
where
    T: Deserialize<'de>,
    A: MapAccess<'de>,
{
    let value = map.next_value();
    value.map_err(|error| de::Error::custom(format_args!("{key}: {error}")))
}

/// Reads an object, key by key with its value by [`field`]; `read` says no where there is no such key.
pub(crate) fn object<'de, A: MapAccess<'de>>(
    mut map: A,
    keys: &'static [&'static str],
    mut read: impl FnMut(&str, &mut A) -> Result<bool, A::Error>,
) -> Result<(), A::Error> {
    let mut seen: Vec<String> = Vec::new();
    while let Some(key) = map.next_key::<String>()? {
        if seen.contains(&key) {
            return Err(de::Error::custom(format_args!("{key} is there twice")));
        }
        if !read(&key, &mut map)? {
            return Err(de::Error::unknown_field(&key, keys));
        }
        seen.push(key);
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ConfigVisitor)
    }
}

struct ConfigVisitor;

impl<'de> Visitor<'de> for ConfigVisitor {
    type Value = Config;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
        const KEYS: &[&str] = &[
            "kernel",
            "initrd",
            "cmdline",
            "memory",
            "cpus",
            "cpu",
            "irqchip",
            "pit",
            "debug-exit",
            "coalesce-console",
            "disk",
            "net",
            "vsock",
            "console",
            "port",
            "rng",
            "kvm",
        ];
        let mut config = Config::default();
        object(map, KEYS, |key, map| {
            match key {
                "kernel" => config.kernel = field(map, key)?,
                "initrd" => config.initrd = field::<Paths, A>(map, key)?.0,
                "cmdline" => config.cmdline = field(map, key)?,
                "memory" => config.memory = field(map, key)?,
                "cpus" => config.cpus = field(map, key)?,
                "cpu" => config.cpu = field(map, key)?,
                "irqchip" => config.irqchip = field(map, key)?,
                "pit" => config.pit = field(map, key)?,
                "debug-exit" => config.debug_exit = field(map, key)?,
                "coalesce-console" => config.coalesce_console = field(map, key)?,
                "disk" => config.disks = field::<Several<_>, A>(map, key)?.0,
                "net" => config.nets = field::<Several<_>, A>(map, key)?.0,
                "vsock" => config.vsock = Some(field(map, key)?),
                "console" => config.console = field(map, key)?,
                "port" => config.ports = field::<Several<_>, A>(map, key)?.0,
                "rng" => config.rng = field(map, key)?,
                "kvm" => config.kvm = field(map, key)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(config)
    }
}

/// A size, as a number of bytes or as text.
pub(crate) struct Size(pub(crate) u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or text such as \"512M\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map(Size).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// One object or several.
struct Several<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Several<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SeveralVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for SeveralVisitor<T> {
            type Value = Several<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or a list of objects")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Several<T>, A::Error> {
                let one = T::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Several(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Several<T>, A::Error> {
                let mut several = Vec::new();
                while let Some(one) = seq.next_element()? {
                    several.push(one);
                }
                Ok(Several(several))
            }
        }
        deserializer.deserialize_any(SeveralVisitor(PhantomData))
    }
}

/// One path or several.
struct Paths(Vec<PathBuf>);

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PathsVisitor;
        impl<'de> Visitor<'de> for PathsVisitor {
            type Value = Paths;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path or a list of paths")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<Paths, E> {
                Ok(Paths(vec![path.into()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Paths, A::Error> {
                let mut paths = Vec::new();
                while let Some(path) = seq.next_element()? {
                    paths.push(path);
                }
                Ok(Paths(paths))
            }
        }
        deserializer.deserialize_any(PathsVisitor)
    }
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
        refused(|c| c.kernel = None, "--kernel");
        refused(|c| c.kernel = Some("".into()), "--kernel \"\"");
        refused(|c| c.kvm = "".into(), "--kvm \"\"");
        refused(|c| c.initrd = vec!["i".into(), "".into()], "--initrd \"\"");
        refused(|c| c.cpus = 0.into(), "0 vCPUs");
        refused(|c| c.cpus = 256.into(), "256 vCPUs");
        refused(
            |c| (c.cpus, c.irqchip) = (2.into(), Irqchip::None),
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
        assert_eq!(none, Config::default());
        assert!(matches!(none.validate(), Err(ConfigError::NoKernel)));
        assert!(
            parse(r#"{"kernel": "k", "colour": 2}"#)
                .unwrap_err()
                .to_string()
                .contains("`colour`")
        );
    }

    #[test]
    fn what_is_wrong_in_a_file_is_told_with_its_key_and_its_value() {
        for (text, needles) in [
            (
                r#"{"kernel": 1}"#,
                &["kernel: ", "`1`", "line 1 column 12"][..],
            ),
            (r#"{"initrd": 5}"#, &["initrd: ", "`5`", "a path or a list"]),
            (r#"{"initrd": ["i", 5]}"#, &["initrd: ", "`5`"]),
            (r#"{"cpus": "two"}"#, &["cpus: ", "\"two\""]),
            (r#"{"cpus": 4294967296}"#, &["cpus: ", "`4294967296`"]),
            (
                r#"{"irqchip": "apic"}"#,
                &["irqchip: ", "`apic`", "`split`"],
            ),
            (r#"{"pit": 1}"#, &["pit: ", "`1`"]),
            (r#"{"debug-exit": 65536}"#, &["debug-exit: ", "`65536`"]),
            (
                r#"{"coalesce-console": "on"}"#,
                &["coalesce-console: ", "\"on\""],
            ),
            (r#"{"memory": "lots"}"#, &["memory: ", "\"lots\""]),
            (r#"{"memory": -1}"#, &["memory: ", "`-1`"]),
            (r#"{"memory": {"size": "x"}}"#, &["memory: size: ", "\"x\""]),
            (
                r#"{"memory": {"size": []}}"#,
                &["memory: size: ", "sequence"],
            ),
            (r#"{"memory": {"shared": 5}}"#, &["memory: shared: ", "`5`"]),
            (
                r#"{"memory": {"hugepages": 3}}"#,
                &["memory: hugepages: ", "`3`"],
            ),
            (r#"{"memory": {"thp": "on"}}"#, &["memory: thp: ", "`on`"]),
            (r#"{"memory": {"numa": -1}}"#, &["memory: numa: ", "`-1`"]),
            (r#"{"pit": true, "pit": true}"#, &["pit", "twice"]),
        ] {
            let error = serde_json::from_str::<Config>(text).unwrap_err();
            let error = error.to_string();
            for needle in needles {
                assert!(
                    error.contains(needle),
                    "{text}: {error:?} has no {needle:?}"
                );
            }
            assert_eq!(error.matches(" at line ").count(), 1, "{error}");
        }
    }
}
