// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests' initramfs: busybox and an init that reports what the guest sees, or gives a shell. `guest-init.sh`
//! says which words of the kernel's command line it obeys. One image serves every kernel of the tests: it holds
//! the few modules that they want for each.

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

/// Raised when the image's contents change.
const FORMAT: u32 = 1;

const INIT: &str = include_str!("guest-init.sh");

/// The kernels of the tests, under the names that the tests know.
const TEST_KERNELS: &[(&str, Series, Flavour)] = &[
    ("vmlinuz-cloud-6.1", Series::V6_1, Flavour::Cloud),
    ("vmlinuz-full-6.1", Series::V6_1, Flavour::Full),
    ("vmlinuz-6.12", Series::V6_12, Flavour::Full),
];

/// An initramfs for `kernels`, made where the cache has none.
pub(crate) fn initrd(assets: &Assets, kernels: &[Kernel]) -> Result<PathBuf> {
    let busybox = assets.busybox()?;
    let zstd = assets.zstd()?;
    let releases: Vec<_> = kernels.iter().map(|k| k.release.as_str()).collect();
    let name = format!(
        "images/guest-{}-{FORMAT}-{:016x}",
        releases.join("-"),
        assets::fingerprint(INIT.as_bytes())
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
            archive.directory(&format!("modules/{}", kernel.release));
            let mut order = String::new();
            for module in in_order(MODULES, &Modules::of(kernel, &zstd)?)? {
                archive.file(
                    &format!("modules/{}/{}.ko", kernel.release, module.name),
                    0o644,
                    &module.data,
                );
                order += &format!("{}\n", module.name);
            }
            archive.file(
                &format!("modules/{}/order", kernel.release),
                0o644,
                order.as_bytes(),
            );
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
    let initrd = initrd(assets, &kernels)?;
    let mut files = vec![
        ("memtest86+x64.bin".to_owned(), memtest),
        ("initrd-scripted.cpio.gz".to_owned(), initrd.clone()),
    ];
    for ((name, ..), kernel) in TEST_KERNELS.iter().zip(&kernels) {
        files.push(((*name).to_owned(), kernel.vmlinuz()));
        // The ELF file within, for the other boot protocols.
        files.push((name.replace("vmlinuz", "vmlinux"), kernel.vmlinux()));
    }
    let stamp = initrd
        .parent()
        .and_then(Path::file_name)
        .map(|n| n.display().to_string())
        .unwrap_or_default();
    assets.part(
        &format!(
            "images/tests-2-{:016x}",
            assets::fingerprint(stamp.as_bytes())
        ),
        |dir| {
            for (name, file) in &files {
                let copy = dir.join(name);
                fs::hard_link(file, &copy)
                    .or_else(|_| fs::copy(file, &copy).map(|_| ()))
                    .context(|| format!("{} cannot be made", copy.display()))?;
            }
            Ok(())
        },
    )
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
