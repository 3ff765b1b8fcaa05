// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lab's initramfs: busybox, the kernel's modules, and an init that shows the host's tree and starts the agent.

use std::fs;
use std::path::{Path, PathBuf};

use crate::assets::{self, Assets, Kernel, Zstd};
use crate::cpio::Archive;
use crate::failure::{Context, Result};
use crate::guest_image::add_busybox;
use crate::modules::{Modules, in_order};
use crate::ui::Step;

/// What the lab needs of the kernel; each comes with what it depends on. Those that are built in are skipped.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm-amd",
    "tun",
    "virtio_blk",
    "virtio_net",
    "vhost_net",
    "vhost_vsock",
    // A host's file system that can be frozen and lost, with its checksums, which no dependency names.
    "crc32c_generic",
    "ext4",
    "loop",
];

/// Raised when the image's contents change, so that an older one in a cache is not taken for it.
const FORMAT: u32 = 3;

const INIT: &str = include_str!("init.sh");

/// The image for `kernel`, made where the cache has none.
pub(crate) fn image(assets: &Assets, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = assets.busybox()?;
    let zstd = assets.zstd()?;
    let name = format!(
        "images/lab-{}-{FORMAT}-{:016x}",
        kernel.release,
        assets::fingerprint(INIT.as_bytes())
    );
    let dir = assets.part(&name, |dir| {
        let step = Step::begin(format!("making the lab's initramfs for {}", kernel.release));
        fs::write(dir.join("initrd"), build(kernel, &busybox, &zstd)?)
            .context(|| format!("{} cannot be written", dir.display()))?;
        step.end();
        Ok(())
    })?;
    Ok(dir.join("initrd"))
}

fn build(kernel: &Kernel, busybox: &Path, zstd: &Zstd) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in [
        "bin", "dev", "proc", "sys", "modules", "lower", "layer", "root",
    ] {
        archive.directory(dir);
    }
    archive.character_device("dev/console", 5, 1);
    add_busybox(&mut archive, busybox)?;
    let mut order = String::new();
    for module in in_order(MODULES, &Modules::of(kernel, zstd)?)? {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.data);
        order += &format!("{}\n", module.name);
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    Ok(archive.finish())
}
