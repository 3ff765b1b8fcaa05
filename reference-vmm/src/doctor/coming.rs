// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What of snapshots and migrations needs a userfaultfd that hears of KVM's faults, whether this user and this kernel have one that will do, and what to do where not.

use memslots::uffd::{Features, OpenError};

/// One thing that it takes a userfaultfd to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UffdUse {
    /// What is said on the command line.
    pub command: &'static str,
    /// The features that it needs, beyond missing pages.
    pub needs: Features,
    /// Since when kernels have them.
    since: &'static str,
}

/// All of them.
pub const UFFD_USES: [UffdUse; 5] = [
    UffdUse {
        command: "restore --lazy",
        needs: Features::POISON,
        since: "Linux 6.6",
    },
    UffdUse {
        command: "ctl snapshot --background",
        needs: Features::PAGEFAULT_FLAG_WP,
        since: "Linux 5.7",
    },
    // Which is not anonymous.
    UffdUse {
        command: "ctl snapshot --background, with --memory …,shared or …,hugepages=SIZE",
        needs: Features::WP_HUGETLBFS_SHMEM,
        since: "Linux 5.19",
    },
    // Who serves needs none.
    UffdUse {
        command: "restore --page-server and --page-handler (snapshot serve itself needs none, and no KVM)",
        needs: Features::POISON,
        since: "Linux 6.6",
    },
    // Who sends needs none.
    UffdUse {
        command: "run --incoming, of a guest that comes by post-copy (ctl migrate --postcopy, which itself needs none)",
        needs: Features::POISON,
        since: "Linux 6.6",
    },
];

impl UffdUse {
    /// Why it does not work with what this host has, and what to do; nothing where it works.
    pub fn problem(&self, has: &Result<u64, String>) -> Option<String> {
        let has = match has {
            Ok(bits) => Features::from_bits(*bits),
            // It says itself what can be done.
            Err(why) => return Some(why.clone()),
        };
        if has.contains(self.needs) {
            return None;
        }
        let (missing, since) = (self.needs.without(has), self.since);
        Some(format!(
            "this kernel's userfaultfd lacks {missing}: {since} has it"
        ))
    }
}

/// Why there is no userfaultfd, and what the user can do about it, who need not be told what happened twice.
pub(super) fn advice(error: &OpenError) -> String {
    match error {
        OpenError::Denied { device, .. } => {
            let device = match device.0 {
                libc::ENOENT => {
                    "there is no /dev/userfaultfd, which Linux 6.1 and newer have (in a container, pass it in)"
                }
                _ => "sudo setfacl -m u:$USER:rw /dev/userfaultfd, until the next boot",
            };
            format!(
                "this user may have none that hears of KVM's page faults: {device}; or sudo sysctl \
                 vm.unprivileged_userfaultfd=1; or run with CAP_SYS_PTRACE"
            )
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_a_feature_names_it_and_who_has_it() {
        let [lazy, background, shared, server, postcopy] = UFFD_USES;
        // Linux 6.1's, and all.
        let (old, all) = (Ok(0x1fff), Ok(0x1fff | Features::POISON.bits()));
        for of in &UFFD_USES {
            assert_eq!(of.problem(&all), None);
        }
        assert_eq!(background.problem(&old), None);
        assert_eq!(shared.problem(&old), None);
        let why = lazy.problem(&old).unwrap();
        assert!(why.contains("POISON") && why.contains("Linux 6.6"), "{why}");
        // A guest whose source is away may have to be told so as well.
        for (of, word) in [(server, "--page-server"), (postcopy, "post-copy")] {
            assert!(of.command.contains(word), "{of:?}");
            assert_eq!(of.problem(&old), Some(why.clone()));
        }
        // Linux 5.15's: of anonymous memory alone.
        let older = Ok(0x7ff);
        assert_eq!(background.problem(&older), None);
        let why = shared.problem(&older).unwrap();
        let says = why.contains("WP_HUGETLBFS_SHMEM") && why.contains("Linux 5.19");
        assert!(says, "{why}");
        let none = Err("because".to_owned());
        assert_eq!(lazy.problem(&none).as_deref(), Some("because"));
    }

    #[test]
    fn who_may_have_none_is_told_of_each_way_to_one() {
        let denied = |device| {
            advice(&OpenError::Denied {
                errno: memslots::Errno(libc::EPERM),
                device: memslots::Errno(device),
            })
        };
        for (device, needle) in [
            (libc::ENOENT, "there is no /dev/userfaultfd"),
            (libc::EACCES, "setfacl -m u:$USER:rw /dev/userfaultfd"),
        ] {
            let said = denied(device);
            assert!(said.contains(needle), "{said}");
            assert!(said.contains("vm.unprivileged_userfaultfd=1"), "{said}");
        }
    }
}
