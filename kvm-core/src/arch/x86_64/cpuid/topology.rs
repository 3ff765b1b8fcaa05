// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sockets, cores and threads, and the APIC ids that say where a processor stands among them.
//!
//! ```text
//!   APIC id   ┌──────────┬───────────┬──────────┐
//!             │  socket  │   core    │  thread  │
//!             └──────────┴───────────┴──────────┘
//!              the rest    core_bits   thread_bits     each just wide enough for its count
//! ```
//!
//! A guest takes an id apart by shifts (Intel SDM volume 3, "Detecting Hardware Multi-Threading Support
//! and Topology"; AMD APM volume 3, appendix E.5), so each field has whole bits, and where a count is no
//! power of two there are ids that nobody has: 3 cores have 0, 1 and 2 in their socket, and 3 is left
//! out. A vCPU's number in KVM is its APIC id ([`VcpuId`]): create vCPU `i` with
//! [`Topology::apic_id`]`(i)`, and the local APIC, start-up IPIs and message destinations agree with
//! CPUID by themselves. ACPI's MADT has to be told the same ids.

use std::fmt;

use crate::identity::VcpuId;

/// Why there is no such topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// A machine without a processor.
    #[error(
        "a machine of {} has no processor: each is 1 or more",
        Numbers(*sockets, *cores, *threads)
    )]
    Zero {
        /// Sockets.
        sockets: u32,
        /// Cores of a socket.
        cores: u32,
        /// Threads of a core.
        threads: u32,
    },
    /// APIC ids end at 2³² − 2, and vCPU numbers with them.
    #[error(
        "a machine of {} needs APIC ids of more than 31 bits",
        Numbers(*sockets, *cores, *threads)
    )]
    TooMany {
        /// Sockets.
        sockets: u32,
        /// Cores of a socket.
        cores: u32,
        /// Threads of a core.
        threads: u32,
    },
}

/// How many sockets a machine has, cores a socket, and threads a core. At least one of each, and no APIC
/// id beyond 31 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

/// Where a processor stands: its socket in the machine, its core in the socket, its thread in the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// From 0.
    pub socket: u32,
    /// From 0 in each socket.
    pub core: u32,
    /// From 0 in each core.
    pub thread: u32,
}

impl Topology {
    /// `sockets` sockets of `cores` cores of `threads` threads.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub const fn new(sockets: u32, cores: u32, threads: u32) -> Result<Self, TopologyError> {
        if sockets == 0 || cores == 0 || threads == 0 {
            return Err(TopologyError::Zero {
                sockets,
                cores,
                threads,
            });
        }
        let bits = width(sockets) + width(cores) + width(threads);
        if bits > 31 {
            return Err(TopologyError::TooMany {
                sockets,
                cores,
                threads,
            });
        }
        Ok(Self {
            sockets,
            cores,
            threads,
        })
    }

    /// One socket of `cpus` cores of one thread: APIC ids without gaps.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub const fn flat(cpus: u32) -> Result<Self, TopologyError> {
        Self::new(1, cpus, 1)
    }

    /// Sockets of the machine.
    #[must_use]
    pub const fn sockets(self) -> u32 {
        self.sockets
    }

    /// Cores of a socket.
    #[must_use]
    pub const fn cores(self) -> u32 {
        self.cores
    }

    /// Threads of a core.
    #[must_use]
    pub const fn threads(self) -> u32 {
        self.threads
    }

    /// Processors of the machine, as an operating system counts them.
    #[must_use]
    pub const fn cpus(self) -> u32 {
        // At most 2³¹, or `new` had said no.
        self.sockets * self.cores * self.threads
    }

    /// Processors of a socket.
    #[must_use]
    pub const fn cpus_of_socket(self) -> u32 {
        self.cores * self.threads
    }

    /// Bits of the APIC id that tell threads of a core apart.
    #[must_use]
    pub const fn thread_bits(self) -> u32 {
        width(self.threads)
    }

    /// Bits of the APIC id that tell processors of a socket apart: those of the core and of the thread.
    #[must_use]
    pub const fn socket_bits(self) -> u32 {
        width(self.cores) + width(self.threads)
    }

    /// The place of processor `index`: threads first, then cores, then sockets. `None` beyond the last.
    #[must_use]
    pub const fn place(self, index: u32) -> Option<Place> {
        if index >= self.cpus() {
            return None;
        }
        Some(Place {
            socket: index / self.cpus_of_socket(),
            core: index / self.threads % self.cores,
            thread: index % self.threads,
        })
    }

    /// The APIC id of processor `index`, and so its number in KVM. `None` beyond the last.
    #[must_use]
    pub const fn apic_id(self, index: u32) -> Option<VcpuId> {
        match self.place(index) {
            Some(Place {
                socket,
                core,
                thread,
            }) => Some(VcpuId(
                socket << self.socket_bits() | core << self.thread_bits() | thread,
            )),
            None => None,
        }
    }

    /// The place of the processor with this APIC id; `None` of an id that nobody has.
    #[must_use]
    pub fn place_of(self, id: VcpuId) -> Option<Place> {
        let place = Place {
            socket: id.0 >> self.socket_bits(),
            core: (id.0 & ((1 << self.socket_bits()) - 1)) >> self.thread_bits(),
            thread: id.0 & ((1 << self.thread_bits()) - 1),
        };
        let there =
            place.socket < self.sockets && place.core < self.cores && place.thread < self.threads;
        there.then_some(place)
    }

    /// All APIC ids, ascending.
    pub fn apic_ids(self) -> impl Iterator<Item = VcpuId> {
        (0..self.cpus()).filter_map(move |index| self.apic_id(index))
    }

    /// The highest APIC id.
    #[must_use]
    pub fn highest_apic_id(self) -> VcpuId {
        self.apic_id(self.cpus() - 1).unwrap_or_default()
    }
}

/// `2 sockets of 4 cores of 1 thread`.
impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Numbers(self.sockets, self.cores, self.threads).fmt(f)
    }
}

/// Sockets, cores and threads, of a topology or of none.
struct Numbers(u32, u32, u32);

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = |n: u32| if n == 1 { "" } else { "s" };
        let Numbers(sockets, cores, threads) = *self;
        write!(f, "{sockets} socket{} of ", s(sockets))?;
        write!(f, "{cores} core{} of ", s(cores))?;
        write!(f, "{threads} thread{}", s(threads))
    }
}

/// Bits that tell `count` things apart; 32 of more than 2³¹.
const fn width(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn three_cores_leave_an_id_out() {
        let topology = Topology::new(2, 3, 2).unwrap();
        let ids: Vec<_> = topology.apic_ids().map(|id| id.0).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(topology.highest_apic_id(), VcpuId(13));
        assert_eq!(topology.place_of(VcpuId(6)), None);
        assert_eq!(topology.to_string(), "2 sockets of 3 cores of 2 threads");
    }

    #[test]
    fn what_has_no_processor_or_too_many_is_refused_with_the_numbers() {
        for (sockets, cores, threads) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (u32::MAX, 1, 1)] {
            let error = Topology::new(sockets, cores, threads).unwrap_err();
            assert!(error.to_string().contains(&sockets.to_string()), "{error}");
            assert!(!error.to_string().contains("1 cores"), "{error}");
        }
        assert!(Topology::new(1 << 11, 1 << 10, 1 << 10).is_ok());
        assert!(Topology::new(1 << 11, 1 << 10, 1 << 11).is_err());
    }
}
