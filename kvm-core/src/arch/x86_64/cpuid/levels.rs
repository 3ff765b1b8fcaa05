// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The leaves that tell a topology, written and read.
//!
//! | leaf | who reads it | what it says here |
//! | --- | --- | --- |
//! | 1 | all, of old | initial APIC id, ids a socket spans, HTT |
//! | 4 | Intel | who shares a cache, cores of a socket |
//! | 0xb, 0x1f | Intel; AMD since Zen | thread and core level, each with its shift and count, the whole APIC id |
//! | 0x8000_0001 | AMD | CmpLegacy, TopologyExtensions |
//! | 0x8000_0008 | AMD | processors of a socket, bits of the APIC id below it |
//! | 0x8000_001d | AMD | who shares a cache |
//! | 0x8000_001e | AMD | APIC id, core, threads of a core, node |
//! | 0x8000_0026 | AMD since Zen 4 | as 0xb, with complex, die and socket |
//!
//! Who shares a cache is told in APIC ids, gaps included: Linux rounds an id down to a multiple of that
//! number to find the first sharer (cacheinfo.c). So it is the width of the field and no count. Levels 1
//! and 2 are a core's own, higher ones a socket's. One NUMA node a socket.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::leaves::{Vendor, find, set_to, subleaf, subleaf_mut};
use super::topology::{Place, Topology};
use crate::identity::VcpuId;

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const AMD_CMP_LEGACY: u32 = 1 << 1;
const AMD_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

const EXTENDED_TOPOLOGY: u32 = 0xb;
const V2_EXTENDED_TOPOLOGY: u32 = 0x1f;
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const HIGHEST_EXTENDED: u32 = 0x8000_0000;

/// Types of a level, Intel SDM volume 2, CPUID leaf 0x1f.
mod level {
    pub(super) const INVALID: u32 = 0;
    pub(super) const THREAD: u32 = 1;
    pub(super) const CORE: u32 = 2;
}

/// Types of a level of leaf 0x8000_0026, AMD APM volume 3, E.4. A level's shift leads to the next one:
/// the one called "core" has the threads of a core.
mod amd_level {
    pub(super) const CORE: u32 = 1;
    pub(super) const COMPLEX: u32 = 2;
    pub(super) const DIE: u32 = 3;
    pub(super) const SOCKET: u32 = 4;
}

/// The topology leaves of one processor.
pub(super) struct Writer {
    pub(super) topology: Topology,
    pub(super) id: VcpuId,
    pub(super) place: Place,
}

impl Writer {
    /// Makes the topology leaves true; `leaves` is the host's list.
    pub(super) fn write(&self, leaves: &mut Vec<kvm_cpuid_entry2>) {
        let vendor = Vendor::of(leaves);
        let listed = |function| leaves.iter().any(|leaf| leaf.function == function);
        // The host's list has 0x1f only where the processor does; 0xb it may leave to us.
        let v2 = listed(V2_EXTENDED_TOPOLOGY);
        let amd_extended = listed(AMD_EXTENDED_TOPOLOGY);
        leaves.retain(|leaf| {
            let made_anew = [
                EXTENDED_TOPOLOGY,
                V2_EXTENDED_TOPOLOGY,
                AMD_EXTENDED_TOPOLOGY,
            ];
            !made_anew.contains(&leaf.function)
        });
        for leaf in leaves.iter_mut() {
            self.edit(leaf, vendor);
        }
        if vendor == Vendor::Amd && self.topology.threads() > 1 {
            self.extend_amd(leaves);
        }
        let highest = find(leaves, 0).map_or(0, |leaf| leaf.eax);
        if highest >= EXTENDED_TOPOLOGY {
            leaves.extend(self.levels(EXTENDED_TOPOLOGY));
        }
        if highest >= V2_EXTENDED_TOPOLOGY && v2 {
            leaves.extend(self.levels(V2_EXTENDED_TOPOLOGY));
        }
        if amd_extended {
            leaves.extend(self.amd_levels());
        }
    }

    /// How many APIC ids a socket spans.
    fn span(&self) -> u32 {
        1 << self.topology.socket_bits()
    }

    fn edit(&self, leaf: &mut kvm_cpuid_entry2, vendor: Vendor) {
        let amd = vendor == Vendor::Amd;
        let several = self.topology.cpus_of_socket() > 1;
        match leaf.function {
            1 => {
                // EBX: CLFLUSH and brand index kept; the initial APIC id and the count have 8 bits.
                leaf.ebx =
                    leaf.ebx & 0xffff | self.span().min(255) << 16 | (self.id.0 & 0xff) << 24;
                set_to(&mut leaf.edx, LEAF1_EDX_HTT, several);
                // APIC ids beyond 8 bits need it; KVM emulates it everywhere.
                if self.topology.highest_apic_id().0 > 254 {
                    leaf.ecx |= LEAF1_ECX_X2APIC;
                }
            }
            4 if leaf.eax & 0x1f != 0 => {
                let core_ids = 1 << (self.topology.socket_bits() - self.topology.thread_bits());
                leaf.eax = self.shared(leaf.eax) & 0x03ff_ffff | (core_ids - 1_u32).min(63) << 26;
            }
            0x8000_0001 if amd => set_to(&mut leaf.ecx, AMD_CMP_LEGACY, several),
            0x8000_0008 if amd => {
                let count = (self.topology.cpus_of_socket() - 1).min(255);
                let width = self.topology.socket_bits().min(15);
                leaf.ecx = leaf.ecx & !0xf0ff | count | width << 12;
            }
            0x8000_001d if leaf.eax & 0x1f != 0 => leaf.eax = self.shared(leaf.eax),
            AMD_TOPOLOGY => self.amd_topology(leaf),
            _ => {}
        }
    }

    /// EAX of a cache leaf with bits 25:14, the APIC ids that share the cache less one.
    fn shared(&self, eax: u32) -> u32 {
        let bits = match eax >> 5 & 7 {
            3.. => self.topology.socket_bits(),
            _ => self.topology.thread_bits(),
        };
        let sharing = ((1_u32 << bits) - 1).min(0xfff);
        eax & !(0xfff << 14) | sharing << 14
    }

    /// Leaf 0x8000_001e: extended APIC id; core and threads of a core; node, one a socket.
    fn amd_topology(&self, leaf: &mut kvm_cpuid_entry2) {
        leaf.eax = self.id.0;
        leaf.ebx = self.place.core & 0xff | (self.topology.threads() - 1).min(255) << 8;
        leaf.ecx = self.place.socket & 0xff;
    }

    /// Threads of a core are told by leaf 0x8000_001e, and Linux believes leaf 0xb of an AMD processor
    /// only where TopologyExtensions says that there is such a leaf. It stands for leaves alone.
    fn extend_amd(&self, leaves: &mut Vec<kvm_cpuid_entry2>) {
        let Some(highest) = find(leaves, HIGHEST_EXTENDED).map(|leaf| leaf.eax) else {
            return;
        };
        if highest < 0x8000_0001 {
            return;
        }
        subleaf_mut(leaves, 0x8000_0001, 0).ecx |= AMD_TOPOLOGY_EXTENSIONS;
        self.amd_topology(subleaf_mut(leaves, AMD_TOPOLOGY, 0));
        subleaf_mut(leaves, HIGHEST_EXTENDED, 0).eax = highest.max(AMD_TOPOLOGY);
    }

    /// Leaf 0xb or 0x1f: threads of a core, processors of the socket, the end.
    fn levels(&self, function: u32) -> Vec<kvm_cpuid_entry2> {
        let Self { topology, .. } = self;
        let thread = (level::THREAD, topology.thread_bits(), topology.threads());
        let core = (
            level::CORE,
            topology.socket_bits(),
            topology.cpus_of_socket(),
        );
        self.list(function, &[thread, core, (level::INVALID, 0, 0)])
    }

    /// Leaf 0x8000_0026: one complex and one die a socket.
    fn amd_levels(&self) -> Vec<kvm_cpuid_entry2> {
        let Self { topology, .. } = self;
        let socket = |kind| (kind, topology.socket_bits(), topology.cpus_of_socket());
        let core = (amd_level::CORE, topology.thread_bits(), topology.threads());
        let above = [amd_level::COMPLEX, amd_level::DIE, amd_level::SOCKET].map(socket);
        let end = (level::INVALID, 0, 0);
        let all: Vec<_> = [core].into_iter().chain(above).chain([end]).collect();
        self.list(AMD_EXTENDED_TOPOLOGY, &all)
    }

    fn list(&self, function: u32, levels: &[(u32, u32, u32)]) -> Vec<kvm_cpuid_entry2> {
        let level = |(index, (kind, shift, count)): (u32, &(u32, u32, u32))| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: *shift,
            ebx: count & 0xffff,
            ecx: index | kind << 8,
            edx: self.id.0,
            ..Default::default()
        };
        (0..).zip(levels).map(level).collect()
    }
}

/// What an operating system reads from leaf 0xb or 0x1f of one processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopologyLevels {
    /// The processor's APIC id.
    pub apic_id: VcpuId,
    /// Bits of it below the core.
    pub thread_bits: u32,
    /// Bits of it below the socket.
    pub socket_bits: u32,
    /// Threads of a core.
    pub threads: u32,
    /// Processors of a socket.
    pub cpus_of_socket: u32,
}

impl TopologyLevels {
    /// Reads `function` (0xb or 0x1f): each subleaf until the first that is invalid, or absent. Levels
    /// between core and socket count as part of the core level, as operating systems do that know none.
    /// `None` where the leaf says nothing, or shifts by more than an id has.
    #[must_use]
    pub fn read(leaves: &[kvm_cpuid_entry2], function: u32) -> Option<Self> {
        let mut found = None;
        // Six types are defined; more subleaves say nothing new.
        for index in 0..8 {
            let Some(leaf) = subleaf(leaves, function, index) else {
                break;
            };
            let (kind, shift, count) = (leaf.ecx >> 8 & 0xff, leaf.eax & 0x1f, leaf.ebx & 0xffff);
            if kind == level::INVALID {
                break;
            }
            let levels = found.get_or_insert(Self {
                apic_id: VcpuId(leaf.edx),
                thread_bits: 0,
                socket_bits: 0,
                threads: 1,
                cpus_of_socket: 1,
            });
            if kind == level::THREAD {
                (levels.thread_bits, levels.threads) = (shift, count);
            }
            (levels.socket_bits, levels.cpus_of_socket) = (shift, count);
        }
        found.filter(|levels| levels.thread_bits <= levels.socket_bits)
    }

    /// Where the processor stands.
    #[must_use]
    pub const fn place(&self) -> Place {
        let id = self.apic_id.0;
        Place {
            socket: id >> self.socket_bits,
            core: (id & ((1 << self.socket_bits) - 1)) >> self.thread_bits,
            thread: id & ((1 << self.thread_bits) - 1),
        }
    }
}
