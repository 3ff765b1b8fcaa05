// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many processors, and how they are arranged: `--cpus 8,sockets=2,cores=2,threads=2`.
//!
//! What is left out is found as QEMU finds it: no threads and one socket, and cores make up the number;
//! where the cores are given, sockets do; where both are, threads do. What is given and does not multiply
//! to the number is refused.

use std::fmt;

use kvm_core::arch::x86_64::Topology;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::config::{ConfigError, MAX_APIC_ID, MAX_CPUS, field, object};

/// The machine's processors, as they were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// How many.
    pub count: u32,
    /// Sockets of the machine.
    pub sockets: Option<u32>,
    /// Cores of a socket.
    pub cores: Option<u32>,
    /// Threads of a core.
    pub threads: Option<u32>,
}

impl Cpus {
    /// So many cores of one socket.
    pub const fn new(count: u32) -> Self {
        Cpus {
            count,
            sockets: None,
            cores: None,
            threads: None,
        }
    }

    /// Reads one option behind the number: `sockets=N`, `cores=N` or `threads=N`.
    ///
    /// # Errors
    /// The option, if it is none of these, has no such value, or was there before.
    pub fn option(&mut self, option: &str) -> Result<(), ConfigError> {
        let wrong = |why: &str| ConfigError::CpusOption {
            option: option.to_owned(),
            why: why.to_owned(),
        };
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let place = match key {
            "sockets" => &mut self.sockets,
            "cores" => &mut self.cores,
            "threads" => &mut self.threads,
            _ => return Err(wrong("not one of sockets=N, cores=N, threads=N")),
        };
        // `parse` would take a sign.
        let digits = value.bytes().all(|byte| byte.is_ascii_digit());
        let number = value.parse().ok().filter(|number| digits && *number > 0);
        let number = number.ok_or_else(|| wrong("a number from 1 on is wanted"))?;
        match place.replace(number) {
            None => Ok(()),
            Some(_) => Err(wrong("it is there twice")),
        }
    }

    /// The topology.
    ///
    /// # Errors
    /// No vCPU or too many, numbers that do not multiply, or APIC ids beyond those of the xAPIC.
    pub fn topology(&self) -> Result<Topology, ConfigError> {
        let count = self.count;
        if !(1..=MAX_CPUS).contains(&count) {
            return Err(ConfigError::Cpus(count));
        }
        let rest = |given: [u32; 2]| {
            given[0]
                .checked_mul(given[1])
                .map(|of| (count / of.max(1)).max(1))
        };
        let (sockets, cores, threads) = (self.sockets, self.cores, self.threads);
        let full = match (sockets, cores, threads) {
            (Some(sockets), Some(cores), None) => {
                (sockets, cores, rest([sockets, cores]).unwrap_or(1))
            }
            (None, Some(cores), threads) => {
                let threads = threads.unwrap_or(1);
                (rest([cores, threads]).unwrap_or(1), cores, threads)
            }
            (sockets, None, threads) => {
                let (sockets, threads) = (sockets.unwrap_or(1), threads.unwrap_or(1));
                (sockets, rest([sockets, threads]).unwrap_or(1), threads)
            }
            (Some(sockets), Some(cores), Some(threads)) => (sockets, cores, threads),
        };
        let (sockets, cores, threads) = full;
        let product = u64::from(sockets)
            .saturating_mul(cores.into())
            .saturating_mul(threads.into());
        let topology = Topology::new(sockets, cores, threads).ok();
        let topology = topology.filter(|_| product == u64::from(count));
        let topology = topology.ok_or(ConfigError::Topology(*self))?;
        let highest = topology.highest_apic_id().0;
        if highest > MAX_APIC_ID {
            return Err(ConfigError::ApicIds { topology, highest });
        }
        Ok(topology)
    }
}

impl Cpus {
    /// Why there is no topology of these numbers: in what was given, and nothing that it was filled up with.
    pub(crate) fn misfit(&self) -> String {
        let named = [
            ("sockets", self.sockets),
            ("cores", self.cores),
            ("threads", self.threads),
        ];
        let given = named
            .iter()
            .filter_map(|(name, number)| number.map(|number| (name, number)));
        let texts: Vec<_> = given
            .clone()
            .map(|(name, n)| format!("{name}={n}"))
            .collect();
        // Each has 32 bits.
        let product: u128 = given.map(|(_, number)| u128::from(number)).product();
        let (count, text) = (self.count, texts.join(" × "));
        let vcpus = match count {
            1 => "1 vCPU is".to_owned(),
            _ => format!("{count} vCPUs are"),
        };
        match texts.len() {
            // Sockets, cores and threads: nothing is left to make up the number.
            3 => format!("{vcpus} not {text}, which is {product}"),
            2 => format!("{vcpus} no multiple of {text}, which is {product}"),
            _ => format!("{vcpus} no multiple of {text}"),
        }
    }
}

impl Default for Cpus {
    /// One.
    fn default() -> Self {
        Cpus::new(1)
    }
}

impl From<u32> for Cpus {
    fn from(count: u32) -> Self {
        Cpus::new(count)
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CpusVisitor)
    }
}

struct CpusVisitor;

impl<'de> Visitor<'de> for CpusVisitor {
    type Value = Cpus;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of vCPUs, or an object with their count, sockets, cores and threads")
    }

    fn visit_u64<E: de::Error>(self, count: u64) -> Result<Cpus, E> {
        let wrong = || E::invalid_value(de::Unexpected::Unsigned(count), &self);
        u32::try_from(count).map(Cpus::new).map_err(|_| wrong())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Cpus, A::Error> {
        const KEYS: &[&str] = &["count", "sockets", "cores", "threads"];
        let (mut cpus, mut counted) = (Cpus::default(), false);
        object(map, KEYS, |key, map| {
            match key {
                "count" => (cpus.count, counted) = (field(map, key)?, true),
                "sockets" => cpus.sockets = Some(field(map, key)?),
                "cores" => cpus.cores = Some(field(map, key)?),
                "threads" => cpus.threads = Some(field(map, key)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        if !counted {
            return Err(de::Error::missing_field("count"));
        }
        Ok(cpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Topology, ConfigError> {
        let mut words = text.split(',');
        let mut cpus = Cpus::new(words.next().unwrap().parse().unwrap());
        words.try_for_each(|word| cpus.option(word))?;
        cpus.topology()
    }

    #[test]
    fn what_is_left_out_makes_up_the_number() {
        for (text, expected) in [
            ("1", (1, 1, 1)),
            ("255", (1, 255, 1)),
            ("8,threads=2", (1, 4, 2)),
            ("8,sockets=2", (2, 4, 1)),
            ("8,cores=2", (4, 2, 1)),
            ("8,cores=2,threads=2", (2, 2, 2)),
            ("8,sockets=2,cores=2", (2, 2, 2)),
            ("8,sockets=2,threads=2", (2, 2, 2)),
            ("12,threads=2,sockets=2,cores=3", (2, 3, 2)),
        ] {
            let topology = parsed(text).unwrap();
            let got = (topology.sockets(), topology.cores(), topology.threads());
            assert_eq!(got, expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_numbers() {
        for (text, needle) in [
            ("0", "0 vCPUs"),
            ("256", "256 vCPUs"),
            ("4,cores=3", "4 vCPUs are no multiple of cores=3"),
            ("5,threads=2", "5 vCPUs are no multiple of threads=2"),
            ("1,threads=2", "1 vCPU is no multiple of threads=2"),
            (
                "8,sockets=3,threads=2",
                "8 vCPUs are no multiple of sockets=3 × threads=2, which is 6",
            ),
            (
                "4,sockets=2,cores=2,threads=2",
                "4 vCPUs are not sockets=2 × cores=2 × threads=2, which is 8",
            ),
            (
                "4,sockets=4294967295,cores=4294967295",
                "which is 18446744065119617025",
            ),
            ("4,cores=0", "\"cores=0\""),
            ("4,cores=+2", "\"cores=+2\""),
            ("4,cores=99999999999", "\"cores=99999999999\""),
            ("4,cores", "\"cores\""),
            ("4,dies=2", "\"dies=2\""),
            ("4,", "\"\""),
            ("4,cores=2,cores=2", "twice"),
            // 43 sockets of 8 APIC ids, of which 5 have a processor.
            ("215,sockets=43,cores=5", "APIC id 340"),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(
                error.contains(needle),
                "{text}: {error:?} has no {needle:?}"
            );
        }
    }

    #[test]
    fn json_has_a_number_or_an_object() {
        let json = |text: &str| serde_json::from_str::<Cpus>(text);
        assert_eq!(json("4").unwrap(), Cpus::new(4));
        let expected = Cpus {
            threads: Some(2),
            ..Cpus::new(4)
        };
        assert_eq!(json(r#"{"count": 4, "threads": 2}"#).unwrap(), expected);
        for (text, needle) in [
            ("-1", "`-1`"),
            ("4294967296", "`4294967296`"),
            (r#""two""#, "\"two\""),
            (r#"{"threads": 2}"#, "`count`"),
            (r#"{"count": 4, "dies": 2}"#, "`dies`"),
            (r#"{"count": 4, "cores": "x"}"#, "cores: "),
        ] {
            let error = json(text).unwrap_err().to_string();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
