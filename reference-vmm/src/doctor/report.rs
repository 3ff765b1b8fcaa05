// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was found, as text for a reader and as JSON for a program.

use std::fmt;

use serde_json::{Value, json};

use super::capabilities::{Capability, Need};
use super::checks::{Check, Verdict};
use super::coming::UFFD_USES;
use super::host::{Host, Kind};
use crate::host_memory::{HostMemory, Node, Pool, Setting};

/// All that the doctor found out.
#[derive(Debug)]
pub struct Report {
    /// The host.
    pub host: Host,
    /// What its KVM says that it can do; empty without KVM.
    pub capabilities: Vec<Capability>,
    /// What it does; empty without KVM.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether there is a KVM, it has what is required, and no check failed. One that could not be
    /// made is no failure.
    pub fn is_well(&self) -> bool {
        let lacks = |cap: &Capability| cap.need == Need::Required && !cap.is_there();
        self.host.kind != Kind::None
            && !self.capabilities.iter().any(lacks)
            && !self
                .checks
                .iter()
                .any(|check| matches!(check.verdict, Verdict::Failed(_)))
    }

    /// One JSON document, with a newline at its end. Fields may be added; `"version"` changes when
    /// one changes its meaning.
    pub fn to_json(&self) -> String {
        let host = &self.host;
        let memory = &host.memory;
        let word = |setting: &Option<Setting>| setting.as_ref().map(|setting| setting.word.clone());
        let (userfaultfd, features) = match &host.userfaultfd {
            Ok(features) => (Value::Null, json!(features)),
            Err(reason) => (json!(reason), Value::Null),
        };
        let document = json!({
            "version": 1,
            "well": self.is_well(),
            "host": {
                "kind": host.kind.name(),
                "kvm": host.kvm_path.to_string_lossy(),
                "kvm_is_denied": host.is_denied,
                "cpu_flag": host.cpu_flag,
                "modules": host.modules,
                "kernel": host.kernel,
                "userfaultfd_features": features,
                "userfaultfd_problem": userfaultfd,
                "userfaultfd_uses": UFFD_USES.iter().map(|of| {
                    let problem = of.problem(&host.userfaultfd);
                    json!({ "command": of.command, "works": problem.is_none(), "problem": problem })
                }).collect::<Vec<_>>(),
                "huge_pages": memory.pools.iter().map(|pool| json!({
                    "page_size": pool.page_size.bytes(),
                    "pages": pool.pages,
                    "free": pool.free,
                    "reserved": pool.reserved,
                })).collect::<Vec<_>>(),
                "transparent_huge_pages": {
                    "enabled": word(&memory.transparent.private),
                    "shmem_enabled": word(&memory.transparent.shared),
                },
                "numa_nodes": memory.nodes.iter().map(|node| json!({
                    "node": node.number,
                    "bytes": node.total,
                    "free": node.free,
                })).collect::<Vec<_>>(),
                "unread": host.unread,
                "problem": host.problem,
            },
            "capabilities": self.capabilities.iter().map(|cap| json!({
                "crate": cap.wanted_by,
                "name": cap.name,
                "present": cap.is_there(),
                "value": cap.value,
                "need": cap.need.name(),
                "purpose": cap.purpose,
            })).collect::<Vec<_>>(),
            "checks": self.checks.iter().map(|check| {
                let (micros, text) = match &check.verdict {
                    Verdict::Ok { micros, .. } => (json!(micros), Value::Null),
                    Verdict::Failed(why) | Verdict::Unavailable(why) => (Value::Null, json!(why)),
                };
                json!({
                    "crate": check.tries,
                    "name": check.name,
                    "status": check.verdict.name(),
                    "micros": micros,
                    "measured": check.measured,
                    "reason": text,
                })
            }).collect::<Vec<_>>(),
        });
        format!("{document:#}\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.show_host(f)?;
        if self.host.kind == Kind::None {
            return Ok(());
        }
        self.show_capabilities(f)?;
        self.show_checks(f)?;
        let verdict = if self.is_well() {
            "this host is well"
        } else {
            "something is wrong"
        };
        writeln!(f, "\n{verdict}")
    }
}

impl Report {
    fn show_host(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        writeln!(f, "Host")?;
        // What is empty for want of a file that could not be read is not said to be none.
        let none = |words: &'static str| match host.unread {
            Some(_) => "not read",
            None => words,
        };
        let unread = host.unread.as_deref().unwrap_or_default();
        let seen = match host.cpu_flag {
            Some(flag) => format!("{flag} in /proc/cpuinfo"),
            // Read first of all, so it is the first that was not.
            None if unread.starts_with("/proc/cpuinfo") => "not read".into(),
            None => "neither vmx nor svm in /proc/cpuinfo".into(),
        };
        let is = match host.is_denied {
            true => "there, and this user may not open it".into(),
            false => host.kind.name().to_owned(),
        };
        writeln!(f, "  KVM          {is} ({seen})")?;
        writeln!(f, "               {}", host.kind.meaning())?;
        let modules = match host.modules.is_empty() {
            true => none("no module to be seen").into(),
            false => host.modules.join(", "),
        };
        writeln!(f, "  kernel       {}; {modules}", host.kernel)?;
        match &host.userfaultfd {
            Ok(features) => writeln!(
                f,
                "  userfaultfd  yes, one that hears of KVM's page faults, features {features:#x}"
            )?,
            Err(why) => writeln!(f, "  userfaultfd  no: {why}")?,
        }
        for of in &UFFD_USES {
            let says = match (of.problem(&host.userfaultfd), &host.userfaultfd) {
                (None, _) => "yes".into(),
                // Why is said above.
                (Some(_), Err(_)) => "no, for want of it".into(),
                (Some(why), Ok(_)) => format!("no: {why}"),
            };
            writeln!(f, "               {}: {says}", of.command)?;
        }
        show_memory(&host.memory, none, f)?;
        if let Some(unread) = &host.unread {
            writeln!(f, "  not read     {unread}")?;
        }
        for (index, line) in host.problem.iter().enumerate() {
            writeln!(
                f,
                "{}{line}",
                match (index, host.is_denied) {
                    (0, true) => "\nKVM is there, and not to be had: ",
                    (0, false) => "\nNo KVM: ",
                    _ => "  - ",
                }
            )?;
        }
        Ok(())
    }

    fn show_capabilities(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nCapabilities (* without it guests do not run)")?;
        let mut last = "";
        for cap in &self.capabilities {
            if cap.wanted_by != last {
                writeln!(f, "  {}", cap.wanted_by)?;
                last = cap.wanted_by;
            }
            let mark = if cap.need == Need::Required { '*' } else { ' ' };
            let value = match cap.value {
                0 => "no".into(),
                1 => "yes".into(),
                more => more.to_string(),
            };
            writeln!(f, "  {mark} {:<28} {value:>8}  {}", cap.name, cap.purpose)?;
        }
        Ok(())
    }

    fn show_checks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nChecks (a guest of our own, on this KVM)")?;
        for check in &self.checks {
            let name = check.verdict.name();
            write!(f, "  {name:<12} {:<12}", check.name)?;
            match &check.verdict {
                Verdict::Ok { micros } => {
                    writeln!(f, "{micros:>9.1} µs  {} ({})", check.measured, check.tries)?;
                }
                Verdict::Failed(why) | Verdict::Unavailable(why) => {
                    writeln!(f, "{:>9}     {} ({})", "-", why, check.tries)?;
                }
            }
        }
        Ok(())
    }
}

/// What guest memory can be made of: what the options of `--memory` would find.
fn show_memory(
    memory: &HostMemory,
    none: impl Fn(&'static str) -> &'static str,
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    let pool = |pool: &Pool| {
        let (size, pages, free) = (pool.page_size, pool.pages, pool.free);
        match pool.reserved {
            0 => format!("{free} of {pages} free of {size}"),
            reserved => format!("{free} of {pages} free of {size} ({reserved} of those reserved)"),
        }
    };
    let node = |node: &Node| {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let (number, free, total) = (node.number, gib(node.free), gib(node.total));
        format!("{number} ({free:.1} of {total:.1} GiB free)")
    };
    let joined = |words: Vec<String>| match words.is_empty() {
        true => none("none to be seen").to_owned(),
        false => words.join(", "),
    };
    let word = |setting: &Option<Setting>| match setting {
        Some(setting) => setting.word.clone(),
        None => none("none").to_owned(),
    };
    let (pools, nodes) = (memory.pools.iter().map(pool), memory.nodes.iter().map(node));
    writeln!(f, "  huge pages   {}", joined(pools.collect()))?;
    writeln!(
        f,
        "  THP          enabled {}, shmem_enabled {}",
        word(&memory.transparent.private),
        word(&memory.transparent.shared)
    )?;
    writeln!(f, "  NUMA nodes   {}", joined(nodes.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_memory::Transparent;

    fn report(verdict: Verdict) -> Report {
        Report {
            host: Host {
                kvm_path: "/dev/\"kvm\"\n".into(),
                kind: Kind::Software,
                is_denied: false,
                cpu_flag: None,
                modules: vec!["kvm".into()],
                kernel: "6.1".into(),
                userfaultfd: Err("not\tallowed".into()),
                memory: HostMemory {
                    pools: vec![Pool {
                        page_size: memslots::HugePageSize::MIB_2,
                        pages: 16,
                        free: 12,
                        reserved: 2,
                    }],
                    transparent: Transparent {
                        private: Some(Setting {
                            file: "/sys/enabled".into(),
                            word: "madvise".into(),
                            sizes: Vec::new(),
                        }),
                        shared: None,
                    },
                    nodes: vec![Node {
                        number: 3,
                        total: 16 << 30,
                        free: 4 << 30,
                    }],
                },
                unread: None,
                problem: Vec::new(),
            },
            capabilities: vec![Capability {
                wanted_by: "memslots",
                name: "USER_MEMORY",
                need: Need::Required,
                purpose: "guest memory",
                value: 1,
            }],
            checks: vec![Check {
                tries: "io-bus",
                name: "pio",
                measured: "an access",
                verdict,
            }],
        }
    }

    #[test]
    fn both_forms_say_the_same() {
        let report = report(Verdict::Ok { micros: 9.25 });
        assert!(report.is_well());
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["host"]["kvm"], "/dev/\"kvm\"\n");
        assert_eq!(json["host"]["userfaultfd_problem"], "not\tallowed");
        let uses = &json["host"]["userfaultfd_uses"];
        assert_eq!(uses[0]["command"], "restore --lazy");
        assert_eq!(uses[1]["works"], false);
        assert_eq!(uses[1]["problem"], "not\tallowed");
        assert_eq!(json["host"]["huge_pages"][0]["page_size"], 2 << 20);
        assert_eq!(json["host"]["huge_pages"][0]["free"], 12);
        let thp = &json["host"]["transparent_huge_pages"];
        assert_eq!(thp["enabled"], "madvise");
        assert_eq!(thp["shmem_enabled"], Value::Null);
        assert_eq!(json["host"]["numa_nodes"][0]["node"], 3);
        assert_eq!(json["host"]["numa_nodes"][0]["bytes"], 16u64 << 30);
        assert_eq!(json["checks"][0]["micros"], 9.25);
        assert_eq!(json["capabilities"][0]["present"], true);
        let text = report.to_string();
        for line in [
            "  huge pages   12 of 16 free of 2 MiB (2 of those reserved)\n",
            "  THP          enabled madvise, shmem_enabled none\n",
            "  NUMA nodes   3 (4.0 of 16.0 GiB free)\n",
            "               restore --lazy: no, for want of it\n",
            "               restore --page-server and --page-handler (snapshot serve itself needs none, and no KVM): no, for want \
             of it\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in {text}");
        }
        assert!(
            text.contains("  ok           pio               9.2 µs  an access (io-bus)"),
            "{text}"
        );
        assert!(text.ends_with("this host is well\n"));
    }

    #[test]
    fn a_kvm_that_this_user_may_not_open_is_not_said_to_be_none() {
        let mut report = report(Verdict::Ok { micros: 1.0 });
        (report.host.kind, report.host.is_denied) = (Kind::None, true);
        report.host.problem = vec!["cannot open /dev/kvm: EACCES".into(), "join it".into()];
        let text = report.to_string();
        for line in [
            "  KVM          there, and this user may not open it (",
            "\nKVM is there, and not to be had: cannot open /dev/kvm: EACCES\n  - join it\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in {text}");
        }
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["host"]["kvm_is_denied"], true);
        assert_eq!(json["host"]["kind"], "none");
    }

    #[test]
    fn what_could_not_be_read_is_not_said_to_be_none() {
        let mut report = report(Verdict::Ok { micros: 1.0 });
        report.host.memory = HostMemory::default();
        assert!(report.to_string().contains("NUMA nodes   none to be seen"));
        let unread = "/sys/devices/system/node: Too many open files";
        report.host.unread = Some(unread.to_owned());
        let text = report.to_string();
        for line in [
            "  huge pages   not read\n",
            "  THP          enabled not read, shmem_enabled not read\n",
            "  NUMA nodes   not read\n",
            &format!("  not read     {unread}\n"),
        ] {
            assert!(text.contains(line), "{line:?} is not in {text}");
        }
        assert!(text.contains("neither vmx nor svm"), "{text}");
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["host"]["unread"], unread);
        report.host.unread = Some("/proc/cpuinfo: EMFILE".into());
        assert!(report.to_string().contains("(not read)"));
    }

    #[test]
    fn a_failure_or_a_missing_requirement_is_not_well_and_an_absence_is() {
        assert!(report(Verdict::Unavailable("no such thing".into())).is_well());
        let mut failed = report(Verdict::Failed("EIO".into()));
        assert!(!failed.is_well());
        assert!(failed.to_string().contains("EIO") && failed.to_json().contains("EIO"));
        failed.checks.clear();
        assert!(failed.is_well());
        failed.capabilities[0].value = 0;
        assert!(!failed.is_well());
    }
}
