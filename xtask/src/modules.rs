// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A kernel's modules and what each needs, read from the files themselves: neither kmod nor its index is there.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::PathBuf;

use crate::assets::{Kernel, Zstd};
use crate::failure::{Context, Failure, Result};

/// The module files of a kernel, by name.
pub(crate) struct Modules<'a> {
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
    zstd: &'a Zstd,
}

/// One module, unpacked.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) data: Vec<u8>,
    depends: Vec<String>,
}

impl<'a> Modules<'a> {
    /// Finds what `kernel` has.
    pub(crate) fn of(kernel: &Kernel, zstd: &'a Zstd) -> Result<Modules<'a>> {
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
pub(crate) fn in_order(wanted: &[&str], modules: &Modules<'_>) -> Result<Vec<Module>> {
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
