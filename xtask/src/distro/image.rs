// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The Debian that `cargo xtask boot --distro` boots: an ext4 image with systemd, Debian's cloud kernel and the initramfs
//! that its package makes, and the tools of the load tests. mmdebstrap makes the tree (as debootstrap would, in two
//! thirds of the time, and with the security updates), and the new system's own mke2fs makes the image out of it, so that
//! nothing is mounted and the host's own version is of no matter.
//!
//! mmdebstrap runs each package's scripts in the new tree with chroot: that is what wants root.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::apt::KERNEL_RELEASE as RELEASE;
use crate::assets::{self, Assets};
use crate::failure::{Context, Failure, Result};
use crate::ui::Step;

/// What is installed, beside what every Debian has and what these need.
const PACKAGES: &[&str] = &[
    // The system.
    "systemd",
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "login",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "openssh-server",
    // The kernel, and what makes its initramfs.
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "busybox",
    "zstd",
    // The tools of the load tests.
    "fio",
    "iperf3",
    "socat",
];

/// Run in the course of the installation; each says what it does.
const BEFORE: &str = include_str!("before.sh");
const AFTER: &str = include_str!("after.sh");

/// The file system's options. It is made whole at once, so that no thread of the guest goes on making it; what is free
/// takes no room on the host.
const MKE2FS: &[&str] = &[
    "-q",
    "-t",
    "ext4",
    "-L",
    LABEL,
    "-m",
    "1",
    "-N",
    "65536",
    "-E",
    "lazy_itable_init=0",
];
const SIZE: &str = "2G";

/// The file system's label, by which the kernel finds it on whatever disk.
pub(crate) const LABEL: &str = "guest";

/// What mmdebstrap said, beside the image.
const LOG: &str = "log";

/// Raised when the image's contents change in a way that the above does not show.
const FORMAT: u32 = 1;

/// The files of the system.
#[derive(Debug)]
pub(crate) struct Distro {
    /// The ext4 file system. Read only: whoever boots it writes to a copy.
    pub(crate) disk: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

/// The system from the cache, made where that has none: some 100 MB of packages and a minute.
pub(crate) fn image(assets: &Assets) -> Result<Distro> {
    let key = [PACKAGES, MKE2FS, &[SIZE, BEFORE, AFTER]]
        .concat()
        .join("\n");
    let name = format!(
        "distro/{RELEASE}-{FORMAT}-{:016x}",
        assets::fingerprint(key.as_bytes())
    );
    // The tool first: a part is made under a lock.
    let mmdebstrap = match assets.has(&name) {
        true => None,
        false => {
            need_root()?;
            Some(assets.mmdebstrap()?)
        }
    };
    let dir = assets.part(&name, |dir| {
        let mmdebstrap = match &mmdebstrap {
            Some(tool) => tool,
            // It was there a moment ago.
            None => return Err(Failure::new(format!("{name} has gone: try again"))),
        };
        let step = Step::begin(format!(
            "making a Debian {RELEASE} of {} packages and what they need",
            PACKAGES.len()
        ));
        let root = dir.join("root");
        install(mmdebstrap.command(), &assets.release_sources(RELEASE)?, dir)?;
        take_boot_files(&root, dir)?;
        make_file_system(&root, &dir.join("disk.ext4"))?;
        fs::remove_dir_all(&root).context(|| format!("{} cannot be removed", root.display()))?;
        step.end();
        Ok(())
    })?;
    Ok(Distro {
        disk: dir.join("disk.ext4"),
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd.img"),
    })
}

fn need_root() -> Result<()> {
    // SAFETY: a plain call that cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return Ok(());
    }
    Err(Failure::new(
        "making the Debian image takes root: the packages' scripts run in the new tree (chroot), and its files belong to \
         several users. Run this as root once; the image then stands in that user's cache (~/.cache/reference-vmm-lab)",
    ))
}

/// Installs the packages into `dir/root`.
fn install(mmdebstrap: Command, sources: &str, dir: &Path) -> Result<()> {
    let list = dir.join("sources.list");
    let written = fs::write(&list, sources);
    written.context(|| format!("{} cannot be written", list.display()))?;
    let before = script(dir, "before.sh", BEFORE)?;
    let after = script(dir, "after.sh", AFTER)?;
    let log = dir.join(LOG);
    let log_file = File::create(&log).context(|| format!("{} cannot be made", log.display()))?;
    let stdout = log_file.try_clone().context(|| "no descriptor".into())?;
    let mut mmdebstrap = contained(&mmdebstrap);
    mmdebstrap
        .args(["--mode=root", "--format=directory", "--variant=essential"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg("--aptopt=Acquire::Retries \"3\"")
        // A tree that is not whole is made again: no write of dpkg's need be on the disk before the next.
        .arg("--dpkgopt=force-unsafe-io")
        // What the hooks have written stays.
        .arg("--dpkgopt=force-confold")
        .arg(hook("--essential-hook", &before))
        .arg(hook("--customize-hook", &after))
        .arg(RELEASE)
        .arg(dir.join("root"))
        .arg(&list);
    mmdebstrap
        .env("LC_ALL", "C")
        .env("INITRD", "No")
        // It works as the user _apt too, who does not get into this one's folders.
        .env("TMPDIR", "/tmp")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(log_file);
    let status = mmdebstrap
        .status()
        .context(|| "mmdebstrap does not start".into())?;
    if !status.success() {
        let told = fs::read(&log).unwrap_or_default();
        let told = String::from_utf8_lossy(&told);
        let lines: Vec<_> = told.lines().collect();
        let end = lines[lines.len().saturating_sub(30)..].join("\n");
        return Err(Failure::new(format!(
            "mmdebstrap failed ({status}); is Debian's archive within reach of this host? It said last:\n{end}"
        )));
    }
    Ok(())
}

/// The same command with mounts and processes of its own: what it mounts in the new tree, and what it still runs there,
/// goes with it however it ends, and with us. Whoever begins anew finds neither.
fn contained(command: &Command) -> Command {
    const APART: [&str; 5] = ["--mount", "--mount-proc", "--pid", "--fork", "--kill-child"];
    let apart = Command::new("unshare")
        .args(APART)
        .arg("true")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let mut contained = match apart {
        Ok(status) if status.success() => {
            let mut unshare = Command::new("unshare");
            unshare.args(APART).arg(command.get_program());
            unshare
        }
        // In a container that may not: there mmdebstrap mounts nothing either.
        _ => Command::new(command.get_program()),
    };
    contained.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => contained.env(name, value),
            None => contained.env_remove(name),
        };
    }
    // SAFETY: prctl is async-signal-safe, and nothing else is done between fork and exec.
    unsafe {
        contained.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    contained
}

fn script(dir: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let file = dir.join(name);
    fs::write(&file, text)
        .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o755)))
        .context(|| format!("{} cannot be written", file.display()))?;
    Ok(file)
}

/// mmdebstrap runs a hook that is the path of a program with the new tree as its word.
fn hook(option: &str, program: &Path) -> OsString {
    let mut word = OsString::from(option);
    word.push("=");
    word.push(program);
    word
}

/// The kernel and its initramfs, as the monitor is given them.
fn take_boot_files(root: &Path, dir: &Path) -> Result<()> {
    let boot = root.join("boot");
    let entries = fs::read_dir(&boot).context(|| format!("{} cannot be read", boot.display()))?;
    let names: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    // One kernel is installed, so one file begins with each.
    for wanted in ["vmlinuz", "initrd.img"] {
        let name = names
            .iter()
            .find(|name| name.split('-').next() == Some(wanted))
            .ok_or_else(|| {
                Failure::new(format!(
                    "mmdebstrap has left no {wanted} in {}: {} says why",
                    boot.display(),
                    dir.join(LOG).display()
                ))
            })?;
        let from = boot.join(name);
        fs::copy(&from, dir.join(wanted))
            .context(|| format!("{} cannot be copied", from.display()))?;
    }
    Ok(())
}

/// Runs the mke2fs of `root` on it.
fn make_file_system(root: &Path, disk: &Path) -> Result<()> {
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
        .map(|dir| root.join(dir).display().to_string())
        .join(":");
    // By its own loader, with its own libraries.
    let output = Command::new(root.join("lib64/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(libraries)
        .arg(root.join("sbin/mke2fs"))
        .args(MKE2FS)
        .arg("-d")
        .args([root, disk])
        .arg(SIZE)
        .env("MKE2FS_CONFIG", root.join("etc/mke2fs.conf"))
        .stdin(Stdio::null())
        .output()
        .context(|| "mke2fs does not start".into())?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "mke2fs failed ({}):\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    )))
}
