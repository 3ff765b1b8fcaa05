// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the chores need that is not in the repository: QEMU, busybox, zstd, kernels, memtest86+, a Debian. Each is a folder
//! of the cache, complete or absent: it is made under another name and renamed when it is whole.

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

/// The first QEMU, major and minor, whose emulated CPU loses no interrupt at a nested guest's exit. Before, every exit
/// changed the word of pending interrupts without the lock that whoever raises one holds, and a timer's or another CPU's
/// interrupt that came at that moment was gone: once in some fifty boots the guest, or the whole lab machine, stood still
/// (qemu-devel, 20250829153115.1590048-2-pbonzini@redhat.com).
const QEMU_LEAST: (u32, u32) = (10, 2);

/// The release of Debian whose backports have it.
const QEMU_RELEASE: &str = "trixie";

/// Where the installer's package has its images.
const INSTALLER_IMAGES: &str = "usr/lib/debian-installer/images/12/amd64";

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
        let Some(prefix) = &self.prefix else {
            return Command::new(&self.program);
        };
        // By its own loader: it is from another release than the host perhaps, and so is its C library.
        let mut command = Command::new(prefix.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(library_path(prefix))
            .arg(&self.program);
        for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(prefix.join(dir));
        }
        command
    }

    /// Its version, if it runs at all: major and minor.
    fn version(&self) -> Option<(u32, u32)> {
        let output = self.command().arg("--version").output().ok()?;
        parse_version(&String::from_utf8_lossy(&output.stdout))
    }
}

/// Of `QEMU emulator version 11.1.3 (Debian …)`, major and minor.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_once("version ")?.1.split('.');
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
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

/// A script `prefix/name` that runs a program unpacked below `prefix` with its libraries and these words first.
fn wrapped(prefix: &Path, name: &str, program: &str, words: &str) -> Result<PathBuf> {
    let script = prefix.join(name);
    let text = format!(
        "#!/bin/sh\nLD_LIBRARY_PATH='{}' exec '{}' {words} \"$@\"\n",
        library_path(prefix),
        prefix.join(program).display()
    );
    let made = fs::write(&script, text).and_then(|()| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
    });
    made.context(|| format!("{} cannot be written", script.display()))?;
    Ok(script)
}

/// A mmdebstrap that can be run.
pub(crate) struct Mmdebstrap {
    script: PathBuf,
    /// Where perl's modules are unpacked, if the host has perl-base alone.
    modules: Option<PathBuf>,
}

impl Mmdebstrap {
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("perl");
        if let Some(prefix) = &self.modules {
            command.env("PERL5LIB", perl_modules(prefix));
        }
        command.arg(&self.script);
        command
    }
}

/// The folders of perl's modules below `prefix`, each named for its version.
fn perl_modules(prefix: &Path) -> String {
    let mut found = Vec::new();
    for parent in ["usr/lib/x86_64-linux-gnu/perl", "usr/share/perl"] {
        let versions = fs::read_dir(prefix.join(parent));
        let versions = versions.into_iter().flatten().flatten();
        found.extend(versions.map(|version| version.path().display().to_string()));
    }
    found.join(":")
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
            for part in [
                "tools",
                "kernels",
                "images",
                "memtest86+",
                "distro",
                "installer",
            ] {
                let dir = assets.root.join(part);
                if dir.exists() {
                    fs::remove_dir_all(&dir)
                        .context(|| format!("{} cannot be removed", dir.display()))?;
                }
            }
            for root in ["apt", "apt-qemu"] {
                Apt::forget_lists(&assets.root.join(root));
            }
        }
        Ok(assets)
    }

    /// Whether the cache has this part.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.root.join(name).is_dir()
    }

    /// Where a release of Debian is had from, as lines of a `sources.list`.
    pub(crate) fn release_sources(&self, release: &str) -> Result<String> {
        Ok(self.apt()?.release_sources(release))
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

    /// A QEMU that is new enough: the host's own, or one unpacked into the cache with all its libraries.
    pub(crate) fn qemu(&self) -> Result<Qemu> {
        if let Some(program) = host::find_program("qemu-system-x86_64") {
            let own = Qemu {
                program,
                prefix: None,
            };
            if own.version().is_some_and(|version| version >= QEMU_LEAST) {
                return Ok(own);
            }
        }
        let prefix = self.part("tools/qemu-apart", |dir| {
            let apt = Apt::open_apart(self.root.join("apt-qemu"), QEMU_RELEASE)?;
            let backports = format!("{QEMU_RELEASE}-backports");
            apt.unpack_closure(&["qemu-system-x86"], Some(&backports), dir)
        })?;
        let qemu = Qemu {
            program: prefix.join("usr/bin/qemu-system-x86_64"),
            prefix: Some(prefix.clone()),
        };
        match qemu.version() {
            Some(version) if version >= QEMU_LEAST => Ok(qemu),
            Some((major, minor)) => {
                self.discard(&prefix)?;
                let (least_major, least_minor) = QEMU_LEAST;
                Err(Failure::new(format!(
                    "Debian's {QEMU_RELEASE}-backports offers QEMU {major}.{minor}, and the lab needs {least_major}.{least_minor} \
                     or newer: does this host's mirror carry the backports?"
                )))
            }
            None => Err(Failure::new(
                "the QEMU in the cache does not start: `cargo xtask lab --refresh -- true` makes it again",
            )),
        }
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

    /// gdb for the lab's test of `--gdb`: the host's, or Debian's smallest unpacked into the cache, behind a script
    /// that finds its libraries.
    pub(crate) fn gdb(&self) -> Result<PathBuf> {
        if let Some(program) = host::find_program("gdb") {
            return Ok(program);
        }
        let prefix = self.part("tools/gdb", |dir| {
            self.apt()?.unpack_closure(&["gdb-minimal"], None, dir)
        })?;
        let data = prefix.join("usr/share/gdb");
        let words = format!("--data-directory='{}'", data.display());
        wrapped(&prefix, "gdb", "usr/bin/gdb", &words)
    }

    /// A folder with mke2fs, e2fsck and debugfs, for the lab's tests of disks: the host's, or Debian's unpacked into the
    /// cache, each behind a script that finds its libraries.
    pub(crate) fn e2fsprogs(&self) -> Result<PathBuf> {
        const PROGRAMS: [&str; 3] = ["mke2fs", "e2fsck", "debugfs"];
        // Where distributions have them; a user's PATH may not lead there.
        let ours = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        let has_all = |dir: &&PathBuf| PROGRAMS.iter().all(|name| dir.join(name).exists());
        if let Some(dir) = ours.iter().find(has_all) {
            return Ok(dir.clone());
        }
        let prefix = self.part("tools/e2fsprogs", |dir| {
            self.apt()?.unpack_closure(&["e2fsprogs"], None, dir)
        })?;
        for name in PROGRAMS {
            // Newer releases have it below usr.
            let usr = format!("usr/sbin/{name}");
            let program = match prefix.join(&usr).exists() {
                true => usr,
                false => format!("sbin/{name}"),
            };
            wrapped(&prefix, name, &program, "")?;
        }
        Ok(prefix)
    }

    /// The kernel and the initramfs of Debian's installer, as it starts from the network and talks on a serial console.
    pub(crate) fn installer(&self) -> Result<(PathBuf, PathBuf)> {
        let dir = self.part("installer", |dir| {
            let apt = self.apt()?;
            let package = "debian-installer-12-netboot-amd64";
            apt.unpack(package, &newest(&apt, package)?, dir)?;
            // The one with a picture is twice as large and not for a serial line.
            let picture = dir.join(INSTALLER_IMAGES).join("gtk");
            fs::remove_dir_all(&picture)
                .context(|| format!("{} cannot be removed", picture.display()))
        })?;
        let text = dir
            .join(INSTALLER_IMAGES)
            .join("text/debian-installer/amd64");
        Ok((text.join("linux"), text.join("initrd.gz")))
    }

    /// mmdebstrap, which makes Debian systems.
    pub(crate) fn mmdebstrap(&self) -> Result<Mmdebstrap> {
        let tool = self.part("tools/mmdebstrap", |dir| {
            let apt = self.apt()?;
            let newest = newest(&apt, "mmdebstrap")?;
            apt.unpack("mmdebstrap", &newest, dir)
        })?;
        // Every Debian has perl-base, which lacks some of what it wants.
        let wanted = ["-MPod::Usage", "-MMath::BigInt", "-MTerm::ANSIColor", "-e1"];
        let modules = match host::output_of("perl", wanted) {
            Ok(_) => None,
            Err(_) => Some(self.part("tools/perl-modules", |dir| {
                self.apt()?.unpack_closure(&["perl"], None, dir)
            })?),
        };
        Ok(Mmdebstrap {
            script: tool.join("usr/bin/mmdebstrap"),
            modules,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_s_version_is_read() {
        let text = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright\n";
        assert_eq!(parse_version(text), Some((11, 1)));
        assert!(parse_version("QEMU emulator version 10.0.2 (Debian)").unwrap() < QEMU_LEAST);
        assert_eq!(parse_version("no such file"), None);
    }
}
