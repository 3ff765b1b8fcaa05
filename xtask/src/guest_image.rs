// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests' initramfs: busybox and an init that reports what the guest sees, or gives a shell. `guest-init.sh`
//! says which words of the kernel's command line it obeys. One image serves every kernel of the tests: it holds
//! the few modules that they want for each.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::assets::{self, Assets, Flavour, Kernel, Series};
use crate::cpio::Archive;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::modules::{Modules, in_order};

/// The power button, where its events are read, and the device that a panic is told to.
const MODULES: &[&str] = &["button", "evdev", "pvpanic-mmio"];

/// The drivers of virtio devices, in the images that are made for guests with devices. None is loaded unless the kernel's
/// command line names it (`guest.modules=`), so that a test has the driver that it is about and no other.
pub(crate) const DEVICES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
];

/// The driver of that name, if it is one of [`DEVICES`]; kernels take `-` for `_`.
pub(crate) fn device(name: &str) -> Result<&'static str> {
    let wanted = name.replace('-', "_");
    let found = DEVICES.iter().copied().find(|device| *device == wanted);
    found.ok_or_else(|| {
        Failure::usage(format!(
            "there is no driver {name:?} in the guests' image, only: {}",
            DEVICES.join(", ")
        ))
    })
}

/// What every device stands on: it comes with each of [`DEVICES`].
const TRANSPORT: &str = "virtio_mmio";

/// Raised when the image's contents change.
const FORMAT: u32 = 2;

const INIT: &str = include_str!("guest-init.sh");

/// The kernels of the tests, under the names that the tests know.
const TEST_KERNELS: &[(&str, Series, Flavour)] = &[
    ("vmlinuz-cloud-6.1", Series::V6_1, Flavour::Cloud),
    ("vmlinuz-full-6.1", Series::V6_1, Flavour::Full),
    ("vmlinuz-6.12", Series::V6_12, Flavour::Full),
];

/// What an image holds beside busybox and the init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Nothing that a guest without devices has no use for: the smaller image is unpacked sooner.
    Plain,
    /// [`DEVICES`] too.
    WithDevices,
}

/// An initramfs for `kernels`, made where the cache has none.
pub(crate) fn initrd(assets: &Assets, kernels: &[Kernel], contents: Contents) -> Result<PathBuf> {
    let (kind, devices) = match contents {
        Contents::Plain => ("guest", &[][..]),
        Contents::WithDevices => ("guest-devices", DEVICES),
    };
    let busybox = assets.busybox()?;
    let zstd = assets.zstd()?;
    let releases: Vec<_> = kernels.iter().map(|k| k.release.as_str()).collect();
    let name = format!(
        "images/{kind}-{}-{FORMAT}-{:016x}",
        releases.join("-"),
        assets::fingerprint([MODULES, devices, &[INIT]].concat().join("\n").as_bytes())
    );
    let dir = assets.part(&name, |dir| {
        let mut archive = Archive::new();
        for folder in ["bin", "dev", "proc", "sys", "etc", "tmp", "modules"] {
            archive.directory(folder);
        }
        archive.character_device("dev/console", 5, 1);
        add_busybox(&mut archive, &busybox)?;
        archive.file("init", 0o755, INIT.as_bytes());
        for kernel in kernels {
            let modules = Modules::of(kernel, &zstd)?;
            add_modules(&mut archive, &kernel.release, devices, &modules)?;
        }
        let plain = dir.join("initrd.cpio");
        fs::write(&plain, archive.finish())
            .context(|| format!("{} cannot be written", plain.display()))?;
        let packed = dir.join("initrd.cpio.gz");
        let out =
            fs::File::create(&packed).context(|| format!("{} cannot be made", packed.display()))?;
        let status = Command::new(&busybox)
            .args(["gzip", "-c"])
            .arg(&plain)
            .stdin(Stdio::null())
            .stdout(out)
            .status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failure::new(format!("gzip failed ({status})"))),
            Err(error) => Err(Failure::new(format!(
                "{} does not start: {error}",
                busybox.display()
            ))),
        }
    })?;
    Ok(dir.join("initrd.cpio.gz"))
}

/// The folder of kernels and images that the lab tests boot (`LAB_KERNELS`).
pub(crate) fn test_kernels(assets: &Assets) -> Result<PathBuf> {
    let mut kernels = Vec::new();
    for (_, series, flavour) in TEST_KERNELS {
        kernels.push(assets.kernel(*series, *flavour)?);
    }
    let memtest = assets.memtest()?;
    let plain = initrd(assets, &kernels, Contents::Plain)?;
    let with_devices = initrd(assets, &kernels, Contents::WithDevices)?;
    let mut files = vec![
        ("memtest86+x64.bin".to_owned(), memtest),
        ("initrd-scripted.cpio.gz".to_owned(), plain),
        ("initrd-devices.cpio.gz".to_owned(), with_devices),
    ];
    for ((name, ..), kernel) in TEST_KERNELS.iter().zip(&kernels) {
        files.push(((*name).to_owned(), kernel.vmlinuz()));
        // The ELF file within, for the other boot protocols.
        files.push((name.replace("vmlinuz", "vmlinux"), kernel.vmlinux()));
    }
    // The folder's name follows from where its files come from.
    let stamp: String = files
        .iter()
        .map(|(name, file)| format!("{name} {}\n", file.display()))
        .collect();
    let name = format!(
        "images/tests-{:016x}",
        assets::fingerprint(stamp.as_bytes())
    );
    assets.part(&name, |dir| {
        for (name, file) in &files {
            let copy = dir.join(name);
            fs::hard_link(file, &copy)
                .or_else(|_| fs::copy(file, &copy).map(|_| ()))
                .context(|| format!("{} cannot be made", copy.display()))?;
        }
        Ok(())
    })
}

/// The modules of one kernel: `order` lists what is loaded always, `NAME.needs` what `guest.modules=NAME` asks for.
fn add_modules(
    archive: &mut Archive,
    release: &str,
    devices: &[&str],
    modules: &Modules<'_>,
) -> Result<()> {
    archive.directory(&format!("modules/{release}"));
    let mut lists = vec![("order".to_owned(), in_order(MODULES, modules)?)];
    for device in devices {
        let list = format!("{device}.needs");
        lists.push((list, in_order(&[TRANSPORT, device], modules)?));
    }
    let mut there = HashSet::new();
    for (list, wanted) in lists {
        let mut names = String::new();
        for module in wanted {
            names += &format!("{}\n", module.name);
            let file = format!("modules/{release}/{}.ko", module.name);
            if there.insert(module.name) {
                archive.file(&file, 0o644, &module.data);
            }
        }
        archive.file(
            &format!("modules/{release}/{list}"),
            0o644,
            names.as_bytes(),
        );
    }
    Ok(())
}

/// busybox under all of its names.
pub(crate) fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<()> {
    let program = fs::read(busybox).context(|| format!("{} cannot be read", busybox.display()))?;
    archive.file("bin/busybox", 0o755, &program);
    archive.symlink("bin/sh", "busybox");
    for applet in host::output_of(busybox, ["--list"])?
        .lines()
        .filter(|a| !matches!(*a, "busybox" | "sh"))
    {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}
