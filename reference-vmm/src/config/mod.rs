// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VM is to be: plain data, from the command line or a JSON file, checked as a whole before
//! anything is created.

mod dirty_log;
mod error;
mod json;

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cpu_model::CpuModel;
use crate::cpus::Cpus;
use crate::devices::power::DebugExit;
use crate::devices::virtio::block::DiskConfig;
use crate::devices::virtio::console::config::{self as console, ConsoleConfig, PortConfig};
use crate::devices::virtio::net::NetConfig;
use crate::devices::virtio::vsock::VsockConfig;
use crate::devices::{FIXED_PORTS, KERNEL_PORTS};
use crate::memory::Memory;

pub use dirty_log::DirtyLogKind;
pub use error::{ConfigError, JsonFile};
pub(crate) use json::{Size, field, object, read_json};

/// A vCPU's number is its local APIC id, and the 8-bit ids of xAPIC end at 254 (255 is broadcast).
pub const MAX_APIC_ID: u32 = 254;
/// So many vCPUs have such an id.
pub const MAX_CPUS: u32 = MAX_APIC_ID + 1;

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
    /// How KVM logs what the guest writes, when somebody asks.
    pub dirty_log: DirtyLogKind,
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
        if self.memory.guest_memfd && self.dirty_log != DirtyLogKind::Bitmap {
            return Err(ConfigError::Memory {
                given: self.memory.size,
                why: format!(
                    "guest-memfd and --dirty-log {}: KVM has no dirty log for a guest_memfd, so leave one of the two out",
                    self.dirty_log
                ),
            });
        }
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

/// Refuses a path that names nothing, where the kernel would only say that it is not there.
pub(crate) fn check_path(flag: &'static str, path: &Path) -> Result<(), ConfigError> {
    match path.as_os_str().is_empty() {
        true => Err(ConfigError::EmptyPath { flag }),
        false => Ok(()),
    }
}

/// Whether a path could not be opened, or listened at, because of what it says, and not for want of something that the
/// host gives.
pub(crate) fn is_about_the_path(error: &io::Error) -> bool {
    !matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC | libc::EDQUOT | libc::EIO)
    )
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
            dirty_log: DirtyLogKind::default(),
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
        refused(
            |c| {
                c.memory = "1G,guest-memfd".parse().unwrap();
                c.dirty_log = "ring=4096".parse().unwrap();
            },
            "guest-memfd and --dirty-log ring=4096",
        );
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
}
