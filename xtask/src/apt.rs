// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A private apt root in the cache: packages are found, downloaded and verified by the host's own apt, with its
//! mirror and keys, and unpacked into a folder. Nothing is installed and no right is needed.
//!
//! apt is told of other places for its lists and archives by options; the host's configuration (proxies, other
//! people's settings) is still read. The host's own dpkg status says which libraries are here already, so only
//! what is missing is downloaded; a program from another release comes with every library it has.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::ui::Step;

/// Lists older than this are fetched again before a package is looked for: an archive drops superseded files.
const LISTS_AGE: Duration = Duration::from_secs(12 * 3600);

/// Kernels are taken from this release where the host's own lacks the series, and guests are of it.
pub(crate) const KERNEL_RELEASE: &str = "bookworm";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

pub(crate) struct Apt {
    root: PathBuf,
    /// The host's release.
    codename: String,
    /// The releases to look in, each with its updates and backports.
    releases: Vec<String>,
    /// Which packages count as installed.
    status: PathBuf,
}

/// One version of a package that the archive has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) version: String,
    pub(crate) depends: Vec<String>,
}

impl Apt {
    /// Opens the private root, and fetches the archive's lists where they are missing or old.
    pub(crate) fn open(root: PathBuf) -> Result<Apt> {
        let codename = host::debian_codename()?;
        let mut releases = vec![codename.clone()];
        if codename != KERNEL_RELEASE {
            releases.push(KERNEL_RELEASE.into());
        }
        let status = "/var/lib/dpkg/status".into();
        Self::fetch(root, codename, releases, status)
    }

    /// As [`open`](Self::open), but for one release, whichever the host has, and as if nothing were installed: what is
    /// unpacked from it needs nothing of the host.
    pub(crate) fn open_apart(root: PathBuf, release: &str) -> Result<Apt> {
        let status = root.join("status");
        fs::create_dir_all(&root).context(|| format!("{} cannot be made", root.display()))?;
        fs::write(&status, "").context(|| format!("{} cannot be written", status.display()))?;
        Self::fetch(root, host::debian_codename()?, vec![release.into()], status)
    }

    fn fetch(
        root: PathBuf,
        codename: String,
        releases: Vec<String>,
        status: PathBuf,
    ) -> Result<Apt> {
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            if host::find_program(program).is_none() {
                return Err(Failure::new(format!(
                    "{program} is not on PATH: install the packages apt and dpkg"
                )));
            }
        }
        let apt = Apt {
            root,
            codename,
            releases,
            status,
        };
        for dir in [
            "parts",
            "preferences",
            "state/lists/partial",
            "cache/archives/partial",
            "debs",
        ] {
            let dir = apt.root.join(dir);
            fs::create_dir_all(&dir).context(|| format!("{} cannot be made", dir.display()))?;
        }
        let sources = apt.sources();
        let file = apt.root.join("parts/lab.sources");
        let stamp = apt.root.join("updated");
        let fresh = fs::read_to_string(&file).is_ok_and(|old| old == sources)
            && age(&stamp).is_some_and(|a| a < LISTS_AGE);
        if !fresh {
            fs::write(&file, sources)
                .context(|| format!("{} cannot be written", file.display()))?;
            let step = Step::begin("fetching the lists of Debian's archive");
            apt.run("apt-get", &["-qq", "update"])?;
            fs::write(&stamp, "").context(|| format!("{} cannot be written", stamp.display()))?;
            step.end();
        }
        Ok(apt)
    }

    /// The lists are fetched again at the next opening.
    pub(crate) fn forget_lists(root: &Path) {
        let _ = fs::remove_file(root.join("updated")); // missing is what is wanted
    }

    /// The releases and mirrors to look in, in deb822 form.
    fn sources(&self) -> String {
        let (main, security) = host_mirrors(&self.codename);
        let signed = if Path::new(KEYRING).exists() {
            format!("Signed-By: {KEYRING}\n")
        } else {
            String::new()
        };
        let stanza = |uri: &str, suites: &str| {
            format!(
                "Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nArchitectures: amd64\n{signed}\n"
            )
        };
        let mut text = String::new();
        for release in &self.releases {
            if release == "sid" {
                text += &stanza(&main, "sid");
            } else {
                text += &stanza(
                    &main,
                    &format!("{release} {release}-updates {release}-backports"),
                );
                text += &stanza(&security, &format!("{release}-security"));
            }
        }
        text
    }

    /// Where `release` and its updates are had from, one `deb` line a suite.
    pub(crate) fn release_sources(&self, release: &str) -> String {
        let (main, security) = host_mirrors(&self.codename);
        let signed = match Path::new(KEYRING).exists() {
            true => format!(" [signed-by={KEYRING}]"),
            false => String::new(),
        };
        let updates = format!("{release}-updates");
        let fixes = format!("{release}-security");
        [(&main, release), (&main, &updates), (&security, &fixes)]
            .map(|(uri, suite)| format!("deb{signed} {uri} {suite} main\n"))
            .concat()
    }

    fn options(&self) -> Vec<OsString> {
        let place = |key: &str, path: PathBuf| {
            let mut option = OsString::from(format!("{key}="));
            option.push(path);
            ["-o".into(), option]
        };
        let mut options = Vec::new();
        options.extend(place("Dir::Etc::sourcelist", "/dev/null".into()));
        options.extend(place("Dir::Etc::sourceparts", self.root.join("parts")));
        options.extend(place("Dir::Etc::preferences", "/dev/null".into()));
        options.extend(place(
            "Dir::Etc::preferencesparts",
            self.root.join("preferences"),
        ));
        options.extend(place("Dir::State", self.root.join("state")));
        options.extend(place("Dir::State::status", self.status.clone()));
        options.extend(place("Dir::Cache", self.root.join("cache")));
        for fixed in [
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Acquire::Retries=3",
            "APT::Sandbox::User=",
            "APT::Update::Post-Invoke=",
            "Debug::NoLocking=true",
        ] {
            options.extend(["-o".into(), OsString::from(fixed)]);
        }
        options
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(self.options())
            .args(args)
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command.stdin(std::process::Stdio::null());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self
            .command(program, args)
            .output()
            .context(|| format!("{program} does not start"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Failure::new(format!(
            "{program} {} failed ({}); is Debian's archive within reach of this host?\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        )))
    }

    /// Every version of `package` there is, the newest first.
    pub(crate) fn candidates(&self, package: &str) -> Result<Vec<Candidate>> {
        let text = self.run("apt-cache", &["show", package])?;
        let mut found = parse_candidates(&text);
        found.sort_by(|a, b| compare_versions(&b.version, &a.version));
        Ok(found)
    }

    /// Downloads `package` at `version` and unpacks it into `into`.
    pub(crate) fn unpack(&self, package: &str, version: &str, into: &Path) -> Result<()> {
        let step = Step::begin(format!("downloading {package} {version}"));
        let debs = self.root.join("debs").join(package);
        fs::create_dir_all(&debs).context(|| format!("{} cannot be made", debs.display()))?;
        let wanted = format!("{package}={version}");
        let output = self
            .command("apt-get", &["-qq", "download", &wanted])
            .current_dir(&debs)
            .output()
            .context(|| "apt-get does not start".into())?;
        if !output.status.success() {
            return Err(Failure::new(format!(
                "{wanted} cannot be downloaded:\n{}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            )));
        }
        step.end();
        unpack_all(&debs, into)?;
        fs::remove_dir_all(&debs).context(|| format!("{} cannot be removed", debs.display()))
    }

    /// Downloads `packages` and whatever of their dependencies this host lacks, and unpacks it all into `into`.
    pub(crate) fn unpack_closure(
        &self,
        packages: &[&str],
        release: Option<&str>,
        into: &Path,
    ) -> Result<()> {
        let step = Step::begin(format!(
            "downloading {} and what it needs",
            packages.join(", ")
        ));
        let archives = self.root.join("cache/archives");
        let mut args = vec![
            "-qq",
            "-y",
            "--download-only",
            "--no-install-recommends",
            "--reinstall",
        ];
        if let Some(release) = release {
            args.extend(["-t", release]);
        }
        args.push("install");
        args.extend(packages);
        self.run("apt-get", &args)?;
        step.end();
        unpack_all(&archives, into)
    }
}

/// The mirror of this host for its release and for security updates, as its own apt is configured.
fn host_mirrors(codename: &str) -> (String, String) {
    let mut main = None;
    let mut security = None;
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let targets = host::output_of(
        "apt-get",
        ["indextargets", "--format", format, "Created-By: Packages"],
    )
    .unwrap_or_default();
    for line in targets.lines() {
        let mut words = line.split_ascii_whitespace();
        if let (Some(uri), Some(release), Some("main")) = (words.next(), words.next(), words.next())
        {
            let release = release.trim_end_matches('/');
            if release == codename || release == "stable" {
                main.get_or_insert_with(|| uri.to_owned());
            } else if release == format!("{codename}-security") || release == "stable-security" {
                security.get_or_insert_with(|| uri.to_owned());
            }
        }
    }
    (
        main.unwrap_or_else(|| "http://deb.debian.org/debian".into()),
        security.unwrap_or_else(|| "http://deb.debian.org/debian-security".into()),
    )
}

fn parse_candidates(text: &str) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(|value| value.trim().to_owned())
        };
        if let Some(version) = field("Version") {
            let depends = field("Depends").unwrap_or_default();
            let depends = depends
                .split(',')
                .filter_map(|d| d.split_ascii_whitespace().next())
                .map(str::to_owned)
                .collect();
            let candidate = Candidate { version, depends };
            if !found.contains(&candidate) {
                found.push(candidate);
            }
        }
    }
    found
}

/// Debian's order of versions, asked of dpkg.
fn compare_versions(a: &str, b: &str) -> std::cmp::Ordering {
    let is = |relation: &str| {
        Command::new("dpkg")
            .args(["--compare-versions", a, relation, b])
            .status()
            .is_ok_and(|status| status.success())
    };
    if is("lt") {
        std::cmp::Ordering::Less
    } else if is("gt") {
        std::cmp::Ordering::Greater
    } else {
        std::cmp::Ordering::Equal
    }
}

/// Unpacks every package file of a folder and removes it.
fn unpack_all(debs: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).context(|| format!("{} cannot be made", into.display()))?;
    let entries = fs::read_dir(debs).context(|| format!("{} cannot be read", debs.display()))?;
    for entry in entries {
        let file = entry
            .context(|| format!("{} cannot be read", debs.display()))?
            .path();
        if file.extension().is_some_and(|e| e == "deb") {
            host::output_of(
                "dpkg-deb",
                ["-x".as_ref(), file.as_os_str(), into.as_os_str()],
            )?;
            fs::remove_file(&file).context(|| format!("{} cannot be removed", file.display()))?;
        }
    }
    Ok(())
}

fn age(file: &Path) -> Option<Duration> {
    let modified = fs::metadata(file).ok()?.modified().ok()?;
    SystemTime::now().duration_since(modified).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_of_a_package_is_seen_once_with_what_it_points_to() {
        let text = "Package: linux-image-amd64\nVersion: 6.12.9-1~bpo12+1\nDepends: linux-image-6.12.9-amd64 (= 6.12.9-1~bpo12+1), foo\n\n\
                    Package: linux-image-amd64\nVersion: 6.1.9-2\nDepends: linux-image-6.1.0-9-amd64 (= 6.1.9-2)\n\n\
                    Package: linux-image-amd64\nVersion: 6.1.9-2\nDepends: linux-image-6.1.0-9-amd64 (= 6.1.9-2)\n";
        let found = parse_candidates(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].depends, ["linux-image-6.12.9-amd64", "foo"]);
        assert_eq!(found[1].version, "6.1.9-2");
    }
}
