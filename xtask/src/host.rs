// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this host is: its distribution, its KVM, its tools, and where things are kept on it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure, Result};

/// The three kinds of host of the project's notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvmKind {
    /// `/dev/kvm` opens and the CPU says `vmx` or `svm`: everything runs here, at native speed.
    Hardware,
    /// `/dev/kvm` opens, the CPU shows neither: guest code is interpreted, a stock kernel is out of reach.
    Software,
    /// No `/dev/kvm` that opens.
    None,
}

/// The kind of KVM here, and the reason in a few words.
pub(crate) fn kvm() -> (KvmKind, String) {
    match fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Err(error) => (KvmKind::None, format!("/dev/kvm does not open: {error}")),
        Ok(_) => {
            let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            match cpu_flag(&cpuinfo, &["vmx", "svm"]) {
                Some(flag) => (KvmKind::Hardware, format!("/dev/kvm opens and the CPU has {flag}")),
                None => (
                    KvmKind::Software,
                    "/dev/kvm opens but the CPU has neither vmx nor svm: this KVM interprets guest code".into(),
                ),
            }
        }
    }
}

fn cpu_flag<'a>(cpuinfo: &str, wanted: &[&'a str]) -> Option<&'a str> {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))?
        .1;
    wanted
        .iter()
        .copied()
        .find(|w| flags.split_ascii_whitespace().any(|flag| flag == *w))
}

/// The frequency of this host's time-stamp counter.
pub(crate) fn tsc_khz() -> u64 {
    // A reading is the counter between two looks at the clock; the tightest of a few is taken, for we may be put
    // aside in the middle of one.
    fn reading() -> (u64, Instant) {
        (0..16)
            .map(|_| {
                let before = Instant::now();
                // SAFETY: every x86-64 CPU has the instruction.
                let ticks = unsafe { std::arch::x86_64::_rdtsc() };
                (before.elapsed(), ticks, before)
            })
            .min_by_key(|(width, ..)| *width)
            .map_or((0, Instant::now()), |(_, ticks, at)| (ticks, at))
    }
    let (from, begun) = reading();
    thread::sleep(Duration::from_millis(20));
    let (to, ended) = reading();
    let nanos = u64::try_from((ended - begun).as_nanos())
        .unwrap_or(u64::MAX)
        .max(1);
    to.wrapping_sub(from).saturating_mul(1_000_000) / nanos
}

/// The folder that everything downloaded goes to: the user's cache, so that a fresh clone finds it again.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|v| Path::new(v).is_absolute()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = env::var_os("HOME")
                .filter(|v| !v.is_empty())
                .ok_or_else(|| Failure::new("neither XDG_CACHE_HOME nor HOME is set: set one to say where the cache goes"))?;
            PathBuf::from(home).join(".cache")
        }
    };
    let dir = base.join("reference-vmm-lab");
    fs::create_dir_all(&dir)
        .context(|| format!("the cache folder {} cannot be made", dir.display()))?;
    Ok(dir)
}

/// The root of the repository: the folder above this crate's.
pub(crate) fn workspace() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let here = manifest.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// Debian's name of this release (`bookworm`), or why there is none.
pub(crate) fn debian_codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        text.lines().find_map(|line| {
            Some(
                line.strip_prefix(name)?
                    .strip_prefix('=')?
                    .trim_matches('"')
                    .to_owned(),
            )
        })
    };
    let id = field("ID").unwrap_or_default();
    if id != "debian" {
        return Err(Failure::new(format!(
            "this host is {}, and the tools and kernels of the lab come from Debian's archive through apt; run this on \
             Debian 12 or newer (a container of debian:bookworm will do)",
            field("PRETTY_NAME").unwrap_or_else(|| "no known Linux distribution".into())
        )));
    }
    // Testing and unstable have no code name of their own in some images.
    Ok(field("VERSION_CODENAME").unwrap_or_else(|| "sid".into()))
}

/// Where a program stands on PATH.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Runs a program to its end; its stdout as text, or a failure with its stderr.
pub(crate) fn output_of<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = S>,
) -> Result<String> {
    let program = program.as_ref();
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .context(|| format!("{} does not start", program.display()))?;
    if !output.status.success() {
        return Err(Failure::new(format!(
            "{} failed ({}):\n{}",
            program.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_frequency_is_that_of_a_cpu() {
        let khz = tsc_khz();
        assert!((500_000..10_000_000).contains(&khz), "{khz} kHz");
    }

    #[test]
    fn a_flag_is_found_as_a_whole_word_only() {
        let cpuinfo = "processor : 0\nflags\t\t: fpu svm_lock vmmcall svm\n";
        assert_eq!(cpu_flag(cpuinfo, &["vmx", "svm"]), Some("svm"));
        assert_eq!(cpu_flag("flags : svm_lock vmxx\n", &["vmx", "svm"]), None);
        assert_eq!(cpu_flag("", &["vmx"]), None);
    }
}
