// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Log lines about a VM or a vCPU, which no guest can make flow (`kvm_err` to `vcpu_unimpl` of
//! `kvm_host.h`).
//!
//! | macro | level | limit |
//! | --- | --- | --- |
//! | [`kvm_err!`](crate::kvm_err), [`kvm_info!`](crate::kvm_info), [`kvm_debug!`](crate::kvm_debug), [`vcpu_debug!`](crate::vcpu_debug) | error, info, debug | 10 lines in 5 s at each call ([`RateLimit::KERNEL`]) |
//! | [`kvm_pr_unimpl!`](crate::kvm_pr_unimpl), [`vcpu_unimpl!`](crate::vcpu_unimpl) | warn, or as said | once for each key at each call ([`OncePerKey`]) |
//!
//! A limit belongs to a place in the code, for all VMs of the process together: where one VM's guest uses it
//! up, a line of another VM at that place is suppressed too, for as long as the interval lasts (and the next
//! line says how many were). What must not be lost so, and what tells of an event that no guest can repeat,
//! goes to `log` itself, or to a [`RateLimit`] for each VM.
//!
//! A line begins with its [`Identity`], and says how many of its kind were suppressed before it:
//!
//! ```text
//! vm web-1 vcpu 3: no device at port 0x5658
//! vm web-1: the clock went back (17 lines of this kind were suppressed before)
//! ```
//!
//! What a line says is made only if it is logged: arguments are evaluated neither for a level that is
//! off nor for a suppressed line.
//!
//! ```
//! use kvm_core::{Identity, VcpuId, kvm_err, vcpu_unimpl};
//!
//! let vcpu = Identity::vm("web-1").vcpu(VcpuId(3));
//! for port in [0x5658_u16, 0x5658, 0x511] {
//!     vcpu_unimpl!(&vcpu, u64::from(port); "no device at port {port:#x}"); // two lines
//! }
//! kvm_err!(&Identity::vm("web-1"), "the clock went back");
//! ```

mod limit;
mod once;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub use limit::{Admission, RateLimit};
#[doc(hidden)]
pub use log as __log;
pub use once::{Occurrence, OncePerKey};

use crate::identity::Identity;

/// Monotonic time since the first call in this process: what the macros' limits are measured by.
#[must_use]
pub fn now() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// A key of anything: an exit's kind, a name.
pub fn key(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Writes a line that a limit let pass. For the macros.
#[doc(hidden)]
pub fn write(
    level: log::Level,
    target: &str,
    who: &Identity,
    suppressed: u64,
    what: std::fmt::Arguments<'_>,
) {
    match suppressed {
        0 => log::log!(target: target, level, "{who}: {what}"),
        1 => log::log!(
            target: target, level,
            "{who}: {what} (one line of this kind was suppressed before)"
        ),
        more => log::log!(
            target: target, level,
            "{who}: {what} ({more} lines of this kind were suppressed before)"
        ),
    }
}

/// A rate-limited line at a level. For the macros.
#[doc(hidden)]
#[macro_export]
macro_rules! __kvm_limited {
    ($level:ident, $who:expr, $($what:tt)+) => {{
        static SITE: $crate::logging::RateLimit = $crate::logging::RateLimit::KERNEL;
        let level = $crate::logging::__log::Level::$level;
        if $crate::logging::__log::log_enabled!(level)
            && let $crate::logging::Admission::Passed { suppressed } =
                SITE.admit($crate::logging::now())
        {
            $crate::logging::write(
                level, ::core::module_path!(), $who, suppressed, ::core::format_args!($($what)+),
            );
        }
    }};
}

/// A line for each key. For the macros.
#[doc(hidden)]
#[macro_export]
macro_rules! __kvm_once {
    ($level:ident, $who:expr, $key:expr, $($what:tt)+) => {{
        static SITE: $crate::logging::OncePerKey = $crate::logging::OncePerKey::new();
        let level = $crate::logging::__log::Level::$level;
        if $crate::logging::__log::log_enabled!(level) {
            let who: &$crate::Identity = $who;
            if let $crate::logging::Occurrence::Logged { suppressed } =
                SITE.occurred(who, $key, $crate::logging::now())
            {
                $crate::logging::write(
                    level, ::core::module_path!(), who, suppressed, ::core::format_args!($($what)+),
                );
            }
        }
    }};
}

/// `kvm_err!(&identity, "format", …)`: an error, rate-limited ([`logging`](crate::logging)):
/// at this place, for all VMs of the process together.
#[macro_export]
macro_rules! kvm_err {
    ($who:expr, $($what:tt)+) => { $crate::__kvm_limited!(Error, $who, $($what)+) };
}

/// `kvm_info!(&identity, "format", …)`: news, rate-limited ([`logging`](crate::logging)):
/// at this place, for all VMs of the process together.
#[macro_export]
macro_rules! kvm_info {
    ($who:expr, $($what:tt)+) => { $crate::__kvm_limited!(Info, $who, $($what)+) };
}

/// `kvm_debug!(&identity, "format", …)`: a detail, rate-limited ([`logging`](crate::logging)):
/// at this place, for all VMs of the process together.
#[macro_export]
macro_rules! kvm_debug {
    ($who:expr, $($what:tt)+) => { $crate::__kvm_limited!(Debug, $who, $($what)+) };
}

/// [`kvm_debug!`](crate::kvm_debug), of a vCPU: the header's name for it.
#[macro_export]
macro_rules! vcpu_debug {
    ($who:expr, $($what:tt)+) => { $crate::__kvm_limited!(Debug, $who, $($what)+) };
}

/// `kvm_pr_unimpl!(&identity, key; "format", …)`: the guest asked for what is not there. Logged once
/// for each `key` (a `u64`) at this place and in this VM ([`OncePerKey`](crate::logging::OncePerKey)),
/// as a warning; `kvm_pr_unimpl!(Info, …)` at another level of the `log` crate. The room for keys is this
/// place's, for all VMs of the process together: a VM that fills it leaves the others one line a minute.
#[macro_export]
macro_rules! kvm_pr_unimpl {
    ($level:ident, $who:expr, $key:expr; $($what:tt)+) => {
        $crate::__kvm_once!($level, $who, $key, $($what)+)
    };
    ($who:expr, $key:expr; $($what:tt)+) => { $crate::__kvm_once!(Warn, $who, $key, $($what)+) };
}

/// [`kvm_pr_unimpl!`](crate::kvm_pr_unimpl), of a vCPU: the header's name for it. What one vCPU asked
/// for already is not logged again for the others.
#[macro_export]
macro_rules! vcpu_unimpl {
    ($level:ident, $who:expr, $key:expr; $($what:tt)+) => {
        $crate::__kvm_once!($level, $who, $key, $($what)+)
    };
    ($who:expr, $key:expr; $($what:tt)+) => { $crate::__kvm_once!(Warn, $who, $key, $($what)+) };
}
