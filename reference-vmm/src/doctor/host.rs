// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which of the three kinds of host this is, and what its user can do about it.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kvm_core::{Kvm, OpenError};
use memslots::uffd::{Features, Uffd};

use crate::host_memory::{Files, HostMemory, SYSFS};

/// Where KVM's device is, unless a path is given.
const USUAL_PATH: &str = "/dev/kvm";

/// What kind of KVM a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The processor runs guest code itself.
    Hardware,
    /// KVM's whole interface, and no virtualization in the processor that it sees: guest code is
    /// interpreted (KVM's PVM back end, some nested set-ups).
    Software,
    /// There is none, or it cannot be opened.
    None,
}

impl Kind {
    /// One word for programs.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Hardware => "hardware",
            Kind::Software => "software",
            Kind::None => "none",
        }
    }

    /// What that means for guests.
    pub fn meaning(self) -> &'static str {
        match self {
            Kind::Hardware => "guests run at native speed",
            Kind::Software => {
                "guests are interpreted, about a million instructions a second; for a stock Linux: \
                 cargo xtask boot"
            }
            Kind::None => "without KVM, guests run in the lab only: cargo xtask boot",
        }
    }
}

/// What was found out about the host without running a guest.
#[derive(Debug)]
pub struct Host {
    /// Where KVM was looked for.
    pub kvm_path: PathBuf,
    /// Which kind it is.
    pub kind: Kind,
    /// It is there, and this user may not open it.
    pub is_denied: bool,
    /// The virtualization that the processor shows: `vmx`, `svm`, or nothing.
    pub cpu_flag: Option<&'static str>,
    /// KVM's modules, as far as they can be seen (those built in may not show).
    pub modules: Vec<String>,
    /// The kernel's release.
    pub kernel: String,
    /// The features of `userfaultfd` for faults of KVM itself, or why there is none.
    pub userfaultfd: Result<u64, String>,
    /// What guest memory can be made of.
    pub memory: HostMemory,
    /// The first file that could not be read though it is there, and why: what would be empty of the
    /// above may not be.
    pub unread: Option<String>,
    /// Why KVM cannot be used, and what to do; empty where it can.
    pub problem: Vec<String>,
}

/// Looks at the host, and opens its KVM if it can be opened.
pub(super) fn examine(kvm_path: &Path) -> (Host, Option<Kvm>) {
    let files = Files::default();
    let cpuinfo = files.text(Path::new("/proc/cpuinfo"));
    let cpu_flag = cpuinfo.and_then(|text| cpu_flag(&text));
    let modules = modules(&files);
    let opened = Kvm::open_at(kvm_path);
    let kind = match (&opened, cpu_flag) {
        (Err(_), _) => Kind::None,
        (Ok(_), Some(_)) => Kind::Hardware,
        (Ok(_), None) => Kind::Software,
    };
    let problem = match &opened {
        Ok(_) => Vec::new(),
        Err(error) => {
            let mut problem = vec![reason(error)];
            problem.extend(advice(error, Path::new(USUAL_PATH), cpu_flag, &modules));
            problem
        }
    };
    let is_denied = matches!(&opened, Err(error) if is_denied(error));
    let host = Host {
        kvm_path: kvm_path.to_owned(),
        kind,
        is_denied,
        cpu_flag,
        modules,
        kernel: files
            .text(Path::new("/proc/sys/kernel/osrelease"))
            .map_or_else(|| "unknown".into(), |release| release.trim().into()),
        userfaultfd: Uffd::open(Features::NONE, Features::NONE)
            .map(|uffd| uffd.available().bits())
            .map_err(|error| super::coming::advice(&error)),
        memory: HostMemory::read_by(&files, Path::new(SYSFS)),
        unread: files.unread(),
        problem,
    };
    (host, opened.ok())
}

/// Whether what is there is a device, and this user may not open it.
fn is_denied(error: &OpenError) -> bool {
    match error {
        OpenError::Open { path, errno } => {
            let is_there = path
                .metadata()
                .is_ok_and(|is| is.file_type().is_char_device());
            is_there && matches!(errno.errno(), libc::EACCES | libc::EPERM)
        }
        _ => false,
    }
}

/// The first of the virtualization flags in the text of `/proc/cpuinfo`.
fn cpu_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"]
        .into_iter()
        .find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

fn modules(files: &Files) -> Vec<String> {
    let names = files.folder(Path::new("/sys/module")).into_iter();
    let mut names: Vec<String> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    names.sort();
    names
}

/// Why KVM cannot be opened. The error's own advice is left out where [`advice`] knows more.
fn reason(error: &OpenError) -> String {
    match error {
        OpenError::Open { path, errno }
            if matches!(errno.errno(), libc::ENOENT | libc::EACCES | libc::EPERM) =>
        {
            format!("cannot open {}: {errno}", path.display())
        }
        other => other.to_string(),
    }
}

/// What to do where KVM cannot be opened, the likeliest first.
fn advice(
    error: &OpenError,
    usual: &Path,
    cpu_flag: Option<&str>,
    modules: &[String],
) -> Vec<String> {
    let mut advice = Vec::new();
    let back_end = modules.iter().find(|module| module.starts_with("kvm_"));
    let (path, errno) = match error {
        OpenError::Open { path, errno } => (path, errno.errno()),
        OpenError::ApiVersion { path, .. } => (path, 0),
        _ => return advice,
    };
    // The wrong file says nothing about this host.
    if path != usual && usual.exists() && !matches!(errno, libc::EMFILE | libc::ENFILE) {
        return vec![format!("there is a {}: use that", usual.display())];
    }
    match errno {
        libc::EACCES | libc::EPERM => advice.extend(error.advice()),
        libc::ENOENT => advice.push(match (back_end, cpu_flag) {
            (Some(module), _) => format!(
                "{module} is loaded: in a container, pass {} in; else sudo modprobe -r {module} \
                 and load it again, and see dmesg",
                usual.display()
            ),
            (None, Some("vmx")) => "the processor has VMX: sudo modprobe kvm_intel".into(),
            (None, Some(_)) => "the processor has SVM: sudo modprobe kvm_amd".into(),
            (None, None) => "the processor shows neither VMX nor SVM: switch virtualization on in \
                             the firmware, or nested virtualization in the hypervisor that this \
                             machine runs under"
                .into(),
        }),
        // The error says itself what can be done.
        _ => {}
    }
    advice.push(
        "without KVM, everything runs in the lab, a machine that QEMU emulates: cargo xtask boot, \
         or cargo xtask lab -- COMMAND"
            .into(),
    );
    advice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_a_word_of_the_flags_line() {
        let with = |flags: &str| cpu_flag(&format!("processor : 0\nflags\t\t: fpu {flags} sse\n"));
        assert_eq!(with("vmx"), Some("vmx"));
        assert_eq!(with("svm"), Some("svm"));
        assert_eq!(with("svm_lock avmx"), None);
        assert_eq!(cpu_flag("vmx flags : svm\n"), None);
        assert_eq!(cpu_flag(""), None);
    }

    #[test]
    fn a_device_that_is_there_and_is_refused_is_told_from_none() {
        let denied = |path: &str, errno| {
            is_denied(&OpenError::Open {
                path: path.into(),
                errno: kvm_core::Errno::new(errno),
            })
        };
        assert!(denied("/dev/null", libc::EACCES));
        assert!(!denied("/dev/null", libc::EBUSY));
        assert!(!denied("/no/such/device", libc::EACCES));
        assert!(!denied("/etc/group", libc::EACCES), "it is no device");
    }

    #[test]
    fn advice_fits_what_was_found_and_ends_with_the_lab_where_there_is_no_other_device() {
        let missing = Path::new("/no/such/device");
        let error = |path: &str, errno| OpenError::Open {
            path: path.into(),
            errno: kvm_core::Errno::new(errno),
        };
        let first = |errno, flag, modules: &[&str]| {
            let modules: Vec<String> = modules.iter().map(|name| (*name).to_owned()).collect();
            let advice = advice(&error("/no/such/device", errno), missing, flag, &modules);
            assert!(advice.last().unwrap().contains("cargo xtask lab"));
            advice[0].clone()
        };
        let absent = libc::ENOENT;
        assert!(first(absent, Some("vmx"), &["kvm"]).contains("modprobe kvm_intel"));
        assert!(first(absent, Some("svm"), &[]).contains("modprobe kvm_amd"));
        assert!(first(absent, Some("svm"), &["kvm", "kvm_amd"]).contains("container"));
        assert!(first(absent, None, &[]).contains("firmware"));
        assert!(first(libc::EACCES, None, &[]).contains("usermod"));
        assert!(first(libc::EPERM, None, &[]).contains("--device /no/such/device"));
        // What has nothing to do with users and modules.
        for errno in [libc::EMFILE, libc::EBUSY, libc::EIO] {
            assert!(first(errno, Some("vmx"), &[]).contains("cargo xtask lab"));
        }
        // Another file than KVM's, where that is there.
        let usual = Path::new("/dev/null");
        let other = OpenError::ApiVersion {
            path: "/dev/zero".into(),
            found: -1,
        };
        for error in [other, error("/nope", absent), error("/root", libc::EACCES)] {
            let advice = advice(&error, usual, Some("vmx"), &[]);
            assert_eq!(advice, ["there is a /dev/null: use that"]);
        }
    }
}
