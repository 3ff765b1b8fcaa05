// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lab's initramfs: busybox, the kernel's modules, and an init that shows the host's tree and starts the agent.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::assets::{Assets, Kernel, Zstd};
use crate::cpio::Archive;
use crate::failure::{Context, Failure, Result};
use crate::host;
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
    "vhost_net",
    "vhost_vsock",
];

/// Raised when the image's contents change, so that an older one in a cache is not taken for it.
const FORMAT: u32 = 1;

const INIT: &str = include_str!("init.sh");

/// The image for `kernel`, made where the cache has none.
pub(crate) fn image(assets: &Assets, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = assets.busybox()?;
    let zstd = assets.zstd()?;
    let name = format!(
        "images/lab-{}-{FORMAT}-{:016x}",
        kernel.release,
        fingerprint(INIT.as_bytes())
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
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(busybox).context(|| format!("{} cannot be read", busybox.display()))?,
    );
    archive.symlink("bin/sh", "busybox");
    for applet in host::output_of(busybox, ["--list"])?
        .lines()
        .filter(|a| !matches!(*a, "busybox" | "sh"))
    {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    let mut order = String::new();
    for module in in_order(MODULES, &Modules::of(kernel, zstd)?)? {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.data);
        order += &format!("{}\n", module.name);
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    Ok(archive.finish())
}

/// The module files of a kernel, by name.
struct Modules<'a> {
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
    zstd: &'a Zstd,
}

#[derive(Clone)]
struct Module {
    name: String,
    data: Vec<u8>,
    depends: Vec<String>,
}

impl<'a> Modules<'a> {
    fn of(kernel: &Kernel, zstd: &'a Zstd) -> Result<Modules<'a>> {
        let root = kernel.modules();
        let mut files = HashMap::new();
        let mut pending = vec![root.join("kernel")];
        while let Some(dir) = pending.pop() {
            for entry in
                fs::read_dir(&dir).context(|| format!("{} cannot be read", dir.display()))?
            {
                let path = entry
                    .context(|| format!("{} cannot be read", dir.display()))?
                    .path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = path
                    .file_name()
                    .and_then(|n| n.to_str())
                    .and_then(|n| n.split_once(".ko"))
                {
                    files.insert(normal(name.0), path.clone());
                }
            }
        }
        let list = root.join("modules.builtin");
        let text =
            fs::read_to_string(&list).context(|| format!("{} cannot be read", list.display()))?;
        let built_in = text
            .lines()
            .filter_map(|l| Some(normal(l.rsplit('/').next()?.strip_suffix(".ko")?)))
            .collect();
        Ok(Modules {
            files,
            built_in,
            zstd,
        })
    }

    fn load(&self, name: &str) -> Result<Option<Module>> {
        let Some(path) = self.files.get(name) else {
            if self.built_in.contains(name) {
                return Ok(None);
            }
            return Err(Failure::new(format!("this kernel has no module {name}")));
        };
        let packed = fs::read(path).context(|| format!("{} cannot be read", path.display()))?;
        let data = match path.extension().and_then(|e| e.to_str()) {
            Some("xz" | "gz" | "zst") => self.zstd.unpack(&packed)?,
            Some("ko") => packed,
            _ => {
                return Err(Failure::new(format!(
                    "{} is packed in a way unknown here",
                    path.display()
                )));
            }
        };
        let depends = dependencies(&data);
        Ok(Some(Module {
            name: name.to_owned(),
            data,
            depends,
        }))
    }
}

/// Kernel modules are the same under `-` and `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// What `depends=a,b` in a module's `.modinfo` says.
fn dependencies(module: &[u8]) -> Vec<String> {
    let mark = b"\0depends=";
    let Some(at) = module.windows(mark.len()).position(|w| w == mark) else {
        return Vec::new();
    };
    let list = module[at + mark.len()..]
        .split(|b| *b == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(list)
        .split(',')
        .filter(|n| !n.is_empty())
        .map(normal)
        .collect()
}

/// The wanted modules with all that they depend on, each after what it needs.
fn in_order(wanted: &[&str], modules: &Modules<'_>) -> Result<Vec<Module>> {
    fn visit(
        name: &str,
        modules: &Modules<'_>,
        seen: &mut HashSet<String>,
        out: &mut Vec<Module>,
    ) -> Result<()> {
        if seen.insert(name.to_owned())
            && let Some(module) = modules.load(name)?
        {
            for needed in &module.depends {
                visit(needed, modules, seen, out)?;
            }
            out.push(module);
        }
        Ok(())
    }
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for name in wanted {
        visit(&normal(name), modules, &mut seen, &mut out)?;
    }
    Ok(out)
}

/// FNV-1a: enough to tell one text from its next edition.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_needs_are_read_from_its_modinfo() {
        assert_eq!(
            dependencies(b"license=GPL\0depends=kvm,ccp,irq-bypass\0name=kvm_amd\0"),
            ["kvm", "ccp", "irq_bypass"]
        );
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
