// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the chores need that is not in the repository: QEMU, busybox, zstd, kernels, memtest86+. Each is a folder of the
//! cache, complete or absent: it is made under another name and renamed when it is whole.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::apt::Apt;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::kernel_image;
use crate::ui::{Step, say};

/// QEMU's first version whose emulation of several CPUs carries the newer kernels.
const QEMU_MAJOR: u32 = 10;

/// Debian's flavours of kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// For virtual machines: fewer drivers, no 9p.
    Cloud,
    /// The one that runs on hardware too.
    Full,
}

/// The series of Debian's kernels that the project runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Series {
    V6_1,
    V6_12,
}

impl Series {
    pub(crate) fn parse(text: &str) -> Result<Series> {
        match text {
            "6.1" => Ok(Series::V6_1),
            "6.12" => Ok(Series::V6_12),
            _ => Err(Failure::usage(format!(
                "there is no kernel series {text} here: 6.1 or 6.12"
            ))),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Series::V6_1 => "6.1",
            Series::V6_12 => "6.12",
        }
    }
}

/// An unpacked kernel package.
pub(crate) struct Kernel {
    dir: PathBuf,
    /// `uname -r` of it.
    pub(crate) release: String,
}

impl Kernel {
    /// The bzImage as Debian ships it.
    pub(crate) fn vmlinuz(&self) -> PathBuf {
        self.dir
            .join("boot")
            .join(format!("vmlinuz-{}", self.release))
    }

    /// The ELF file that was inside the bzImage.
    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The tree of its modules.
    pub(crate) fn modules(&self) -> PathBuf {
        let usr = self.dir.join("usr/lib/modules").join(&self.release);
        if usr.is_dir() {
            usr
        } else {
            self.dir.join("lib/modules").join(&self.release)
        }
    }
}

/// A QEMU that can be run.
pub(crate) struct Qemu {
    program: PathBuf,
    /// The private prefix, where it is not the host's.
    prefix: Option<PathBuf>,
}

impl Qemu {
    /// The command, with its libraries and firmware folders set.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(prefix) = &self.prefix {
            command.env("LD_LIBRARY_PATH", library_path(prefix));
            for base in [prefix.as_path(), Path::new("/")] {
                for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                    command.arg("-L").arg(base.join(dir));
                }
            }
        }
        command
    }

    /// Its major version, if it runs at all.
    fn major(&self) -> Option<u32> {
        let output = self.command().arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_once("version ")?
            .1
            .split('.')
            .next()?
            .parse()
            .ok()
    }
}

/// A zstd that can be run.
pub(crate) struct Zstd {
    program: PathBuf,
    prefix: Option<PathBuf>,
}

impl Zstd {
    /// What is inside a zstd, xz or gzip stream.
    pub(crate) fn unpack(&self, packed: &[u8]) -> Result<Vec<u8>> {
        let mut command = Command::new(&self.program);
        if let Some(prefix) = &self.prefix {
            command.env("LD_LIBRARY_PATH", library_path(prefix));
        }
        filter(command.args(["-q", "-dc"]), packed)
    }
}

fn library_path(prefix: &Path) -> String {
    [
        "usr/lib/x86_64-linux-gnu",
        "lib/x86_64-linux-gnu",
        "usr/lib",
    ]
    .map(|d| prefix.join(d).display().to_string())
    .join(":")
}

/// The cache, and what makes its parts.
pub(crate) struct Assets {
    root: PathBuf,
}

impl Assets {
    /// Opens the cache. With `refresh`, everything in it is made again, from what the archive has today.
    pub(crate) fn open(refresh: bool) -> Result<Assets> {
        let assets = Assets {
            root: host::cache_dir()?,
        };
        if refresh {
            let _lock = assets.lock()?;
            for part in ["tools", "kernels", "images", "memtest86+"] {
                let dir = assets.root.join(part);
                if dir.exists() {
                    fs::remove_dir_all(&dir)
                        .context(|| format!("{} cannot be removed", dir.display()))?;
                }
            }
            Apt::forget_lists(&assets.root.join("apt"));
        }
        Ok(assets)
    }

    fn apt(&self) -> Result<Apt> {
        Apt::open(self.root.join("apt"))
    }

    /// Held while a part is made, so that three chores that start at once on a new host make it once.
    fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::create(&path).context(|| format!("{} cannot be made", path.display()))?;
        // SAFETY: flock on a descriptor that lives as long as the call.
        let busy = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0;
        if busy {
            say("waiting for another xtask that fills the cache");
            // SAFETY: as above.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
                return Err(Failure::new(format!(
                    "{}: {}",
                    path.display(),
                    std::io::Error::last_os_error()
                )));
            }
        }
        Ok(file)
    }

    /// The folder of a part: there already, or made by `make` in a folder that takes its name when it is whole.
    pub(crate) fn part(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let dir = self.root.join(name);
        if dir.is_dir() {
            return Ok(dir);
        }
        let _lock = self.lock()?;
        if dir.is_dir() {
            return Ok(dir); // the one we waited for has made it
        }
        let partial = self.root.join("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)
                .context(|| format!("{} cannot be removed", partial.display()))?;
        }
        fs::create_dir_all(&partial).context(|| format!("{} cannot be made", partial.display()))?;
        make(&partial)?;
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent)
                .context(|| format!("{} cannot be made", parent.display()))?;
        }
        fs::rename(&partial, &dir).context(|| format!("{} cannot be made", dir.display()))?;
        Ok(dir)
    }

    /// Removes a part that turned out to be of no use on this host.
    fn discard(&self, dir: &Path) -> Result<()> {
        let _lock = self.lock()?;
        fs::remove_dir_all(dir).context(|| format!("{} cannot be removed", dir.display()))
    }

    /// QEMU 10 or newer: the host's own, or one unpacked into the cache.
    pub(crate) fn qemu(&self) -> Result<Qemu> {
        if let Some(program) = host::find_program("qemu-system-x86_64") {
            let own = Qemu {
                program,
                prefix: None,
            };
            if own.major().is_some_and(|major| major >= QEMU_MAJOR) {
                return Ok(own);
            }
        }
        for attempt in 0..2 {
            let prefix = self.part("tools/qemu", |dir| {
                let apt = self.apt()?;
                let backports = apt.backports();
                // From trixie on, the release itself has it.
                let release = (apt.codename() == "bookworm").then_some(backports.as_str());
                apt.unpack_closure(&["qemu-system-x86"], release, dir)
            })?;
            let qemu = Qemu {
                program: prefix.join("usr/bin/qemu-system-x86_64"),
                prefix: Some(prefix.clone()),
            };
            match qemu.major() {
                Some(major) if major >= QEMU_MAJOR => return Ok(qemu),
                Some(major) => {
                    self.discard(&prefix)?;
                    return Err(Failure::new(format!(
                        "Debian's archive offers QEMU {major} to this host, and the lab needs {QEMU_MAJOR} or newer: does \
                         this host's mirror carry the backports?"
                    )));
                }
                // The host has lost a library since: resolve what it needs once more.
                None if attempt == 0 => self.discard(&prefix)?,
                None => {}
            }
        }
        Err(Failure::new(
            "the QEMU in the cache does not start: `cargo xtask lab --refresh -- true` makes it again",
        ))
    }

    /// A static busybox.
    pub(crate) fn busybox(&self) -> Result<PathBuf> {
        let dir = self.part("tools/busybox", |dir| {
            let apt = self.apt()?;
            let newest = newest(&apt, "busybox-static")?;
            apt.unpack("busybox-static", &newest, dir)
        })?;
        let usr = dir.join("usr/bin/busybox");
        Ok(if usr.exists() {
            usr
        } else {
            dir.join("bin/busybox")
        })
    }

    /// zstd, which unpacks xz and gzip as well: the host's, or one unpacked into the cache.
    pub(crate) fn zstd(&self) -> Result<Zstd> {
        if let Some(program) = host::find_program("zstd") {
            return Ok(Zstd {
                program,
                prefix: None,
            });
        }
        let prefix = self.part("tools/zstd", |dir| {
            self.apt()?.unpack_closure(&["zstd"], None, dir)
        })?;
        Ok(Zstd {
            program: prefix.join("usr/bin/zstd"),
            prefix: Some(prefix),
        })
    }

    /// Debian's kernel of a series, whichever version the archive has today, unpacked, with its ELF file beside it.
    pub(crate) fn kernel(&self, series: Series, flavour: Flavour) -> Result<Kernel> {
        let (name, meta) = match flavour {
            Flavour::Cloud => ("cloud", "linux-image-cloud-amd64"),
            Flavour::Full => ("full", "linux-image-amd64"),
        };
        // The tool first: a part is made under a lock.
        let zstd = self.zstd()?;
        let dir = self.part(&format!("kernels/{name}-{}", series.name()), |dir| {
            let apt = self.apt()?;
            let prefix = format!("{}.", series.name());
            let found = apt.candidates(meta)?;
            let candidate = found
                .iter()
                .find(|c| c.version.starts_with(&prefix))
                .ok_or_else(|| {
                    let versions: Vec<_> = found.iter().map(|c| c.version.as_str()).collect();
                    Failure::new(format!(
                        "Debian's archive has no {meta} {} today, only: {}",
                        series.name(),
                        versions.join(", ")
                    ))
                })?;
            let package = candidate
                .depends
                .iter()
                .find(|d| d.starts_with("linux-image-"))
                .ok_or_else(|| {
                    Failure::new(format!(
                        "{meta} {} names no kernel package",
                        candidate.version
                    ))
                })?;
            apt.unpack(package, &candidate.version, dir)?;
            let kernel = Kernel::in_dir(dir)?;
            let step = Step::begin(format!(
                "taking vmlinux out of {}",
                kernel.vmlinuz().display()
            ));
            kernel_image::extract(&kernel.vmlinuz(), &kernel.vmlinux(), &zstd)?;
            step.end();
            Ok(())
        })?;
        Kernel::in_dir(&dir)
    }

    /// Debian's memtest86+ as a bzImage.
    pub(crate) fn memtest(&self) -> Result<PathBuf> {
        let dir = self.part("memtest86+", |dir| {
            let apt = self.apt()?;
            let newest = newest(&apt, "memtest86+")?;
            apt.unpack("memtest86+", &newest, dir)
        })?;
        Ok(dir.join("boot/memtest86+x64.bin"))
    }
}

impl Kernel {
    fn in_dir(dir: &Path) -> Result<Kernel> {
        let boot = dir.join("boot");
        let entries =
            fs::read_dir(&boot).context(|| format!("{} cannot be read", boot.display()))?;
        let release = entries
            .filter_map(|entry| {
                Some(
                    entry
                        .ok()?
                        .file_name()
                        .to_str()?
                        .strip_prefix("vmlinuz-")?
                        .to_owned(),
                )
            })
            .next()
            .ok_or_else(|| Failure::new(format!("{} holds no vmlinuz", boot.display())))?;
        Ok(Kernel {
            dir: dir.to_path_buf(),
            release,
        })
    }
}

fn newest(apt: &Apt, package: &str) -> Result<String> {
    let found = apt.candidates(package)?;
    let candidate = found.into_iter().next();
    candidate
        .map(|c| c.version)
        .ok_or_else(|| Failure::new(format!("Debian's archive has no {package} today")))
}

/// What a program makes of `input`.
fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let name = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context(|| format!("{name} does not start"))?;
    let mut stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A filter that stops reading has failed: its status says so.
            let _ = stdin.as_mut().map(|pipe| pipe.write_all(input));
            drop(stdin);
        });
        child.wait_with_output()
    })
    .context(|| format!("{name} cannot be waited for"))?;
    if !output.status.success() {
        return Err(Failure::new(format!("{name} failed ({})", output.status)));
    }
    Ok(output.stdout)
}

/// FNV-1a: enough to tell one text from its next edition.
pub(crate) fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
