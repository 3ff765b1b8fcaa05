// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Post-copy: the guest goes before its memory is there, and what it touches comes first.
//!
//! ```text
//!   source                                                        destination
//!   rounds, none or some (pre-copy) ═════════ data ═════════════► memory
//!   the guest stands still
//!   Missing(runs) ─────────────────────────── control ──────────► these pages are given up
//!   State, Prepared, Go, Started ◄──────────── control ─────────► a pager over them, then the machine
//!                                                                 the guest runs
//!   PageServer over the memory  ◄══ pages 0: what is waited for ═  PeerSource ◄─ Lane::Fault ───┐
//!   that stands still           ◄══ pages 1 …: all else, behind ═  PeerSource ◄─ Lane::Prefetch ┴ Pager
//!   ends                        ◄── Enough ─────────────────────  all is there, or no more is wanted
//! ```
//!
//! It is the same conversation as without ([`mod`](super)), to the letter where nobody asks for it: the offer says that the
//! guest may come so, and a destination that cannot have it (no userfaultfd, or one without `POISON`, or memory of which it
//! does not tell) says so with the remedy in place of `Ready`, before the first page. A version that does not know post-copy
//! refuses such an offer.
//!
//! # The switch
//! [`When`] says when: never, by hand (`ctl migrate-postcopy`), behind so many rounds, after a time, or by itself when it is
//! foretold that pre-copy does not end in time. A round that is at work is ended with the frame that is under way. Then the
//! guest is stopped, and in place of a last round of pages goes the list of those that the destination does not have, or not
//! as they are ([`missing`]). A guest whose rest fits into the downtime is stopped as without post-copy, and all of it is there
//! when it runs.
//!
//! A page is sent once behind the switch: the pager asks for it once, and who touches one that is under way waits for
//! that. With the pages of the rounds before, that is all of memory and what was written again meanwhile; with
//! `after-rounds=0` all of it goes so, each page once.
//!
//! # Whose the guest is
//! The rule is the same: the destination decides once, and from `Started` on the guest is its own. But the guest's memory
//! is in two places then, and **the guest lives only while both processes do**:
//!
//! | dies, or is cut off | before `Started` | behind it, while pages are missing |
//! | --- | --- | --- |
//! | the link | as without: one owner, here or there | the guest goes on with what is there; who touches what is missing waits; the source connects again by itself, and nothing is lost |
//! | the destination | the guest goes on at the source | the guest is lost: the source's memory is of the moment of the switch, and never runs again |
//! | the source | the guest dies with it | the guest is lost when it touches a page that is missing: within the page deadline it is stopped with the reason, or the page is poisoned, as `--on-loss` says |
//!
//! So who wants to lose the guest under no single fault takes pre-copy.
//!
//! # A link that breaks
//! All connections for pages are made by the source, and made again, each second, as long as the destination has not said
//! that it has all ([`serve`]). The destination keeps what was asked for and asks again on the new connection ([`ask`]). The
//! page deadline there (`run --incoming … --page-deadline`, 5 minutes) is how long a fault waits: until then nothing is
//! poisoned. Each side says in its status what it waits for (`ctl migrate-status` here, `ctl status` there). The source
//! gives up only when the destination's process is known to be gone: it is refused where it was, on all of them, and nobody
//! stands between ([`Wire::line`](super::link::Wire::line)); over TCP for as long as
//! [`Patience::refused`](super::source::Patience::refused), for a firewall may do that in the destination's place.
//!
//! Where it was need not be where it is: the source is told another address ([`recover`](super::recover)), and the destination
//! to listen at one more. From then on nobody's refusal is its end. Before a page goes, on whichever connection, both sides
//! prove that they know the migration's number (`proof`), so that who has taken an address, or was named by mistake, gets
//! nothing.
//!
//! What the destination says at last ([`LastWord`]) is what the source says became of the guest: all is there; the guest ended
//! before that, and wants no more; or pages did not come before the page deadline, which is a failure, with how many and why.
//!
//! # How many connections
//! What somebody waits for has one, and all else as many as the rounds had ([`Settings::connections`]). The destination's pager
//! asks for one piece of that at a time, and they take turns: several are no faster than one. One that breaks or says nothing
//! for five seconds is made again, and what was asked for on it is asked for again; the others carry on meanwhile.
//!
//! [`Settings::connections`]: super::source::Settings::connections
//!
//! # Limits
//! - What the guest waits for is not held back by the bandwidth limit; all else is.
//! - Memory that is given back to the host meanwhile would come from the source; no device of this monitor does that.

pub mod ask;
pub mod missing;
pub mod record;
pub mod serve;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// When the guest goes on at the destination without all of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum When {
    /// Never: it goes when all of its memory is there.
    #[default]
    Never,
    /// When somebody says so (`ctl migrate-postcopy`).
    ByHand,
    /// Behind so many rounds, or when somebody says so; 0 is at once.
    AfterRounds(u32),
    /// When memory has been sent for so long, or when somebody says so.
    After(Duration),
    /// When it is foretold that pre-copy does not end in time, or when somebody says so.
    Auto,
}

impl When {
    /// Whether it may come to that.
    pub fn may(self) -> bool {
        self != When::Never
    }
}

/// The words.
pub const WORDS: &str = "never, by-hand, auto, after-rounds=N or after=SECONDS";

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            When::Never => f.write_str("never"),
            When::ByHand => f.write_str("by-hand"),
            When::AfterRounds(rounds) => write!(f, "after-rounds={rounds}"),
            When::After(time) => write!(f, "after={}", time.as_secs_f64()),
            When::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: {WORDS} is wanted");
        Ok(match (text, text.split_once('=')) {
            ("never", _) => When::Never,
            ("by-hand", _) => When::ByHand,
            ("auto", _) => When::Auto,
            (_, Some(("after-rounds", rounds))) => {
                When::AfterRounds(rounds.parse().map_err(|_| wrong())?)
            }
            (_, Some(("after", seconds))) => {
                let seconds = seconds.parse::<f64>().map_err(|_| wrong())?;
                let time = Duration::try_from_secs_f64(seconds);
                When::After(time.map_err(|_| wrong())?)
            }
            _ => return Err(wrong()),
        })
    }
}

impl TryFrom<String> for When {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<When> for String {
    fn from(when: When) -> Self {
        when.to_string()
    }
}

/// What the destination's faults were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Faults {
    /// How often somebody waited for a page.
    pub count: u64,
    /// Half of them waited no longer than this, in nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// What the destination says when it asks for no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastWord {
    /// What its faults were.
    pub faults: Faults,
    /// Pages that it does not have, and wants no more: the guest has ended.
    pub missing: u64,
    /// Pages that it did not get: the guest was stopped for it, or has poison in their place.
    pub lost: u64,
    /// Why they are missing or lost; else nothing.
    pub why: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_word_is_read_as_it_was_written_and_no_other() {
        for word in [
            "never",
            "by-hand",
            "auto",
            "after-rounds=0",
            "after-rounds=7",
            "after=1.5",
            "after=0",
        ] {
            assert_eq!(word.parse::<When>().unwrap().to_string(), word);
        }
        for word in [
            "",
            "after",
            "after=",
            "after=-1",
            "after=x",
            "after-rounds=-1",
            "Auto",
        ] {
            let why = word.parse::<When>().unwrap_err();
            assert!(
                why.contains(&format!("{word:?}")) && why.contains(WORDS),
                "{why}"
            );
        }
    }
}
