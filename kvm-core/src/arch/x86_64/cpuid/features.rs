// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The names of CPUID's bits: those of Linux's `/proc/cpuinfo`, and for what is not shown there those of
//! the kernel's cpufeatures.h. Bits of KVM's own leaf have the names of its documentation. What
//! `/proc/cpuinfo` shows and is no bit has no name here (`nopl`, `rep_good`); its `constant_tsc` and
//! `nonstop_tsc` are one bit, `invtsc`, as QEMU has it.
//!
//! Not every bit has a name here, and none needs one: it is shown and edited by its number then.

use super::leaves::{Register, Word};

/// What kind of thing a bit stands for. It decides what a [`Baseline`](super::Baseline) does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// Instructions that programs use by themselves: a baseline has those of its level and no others.
    Instructions,
    /// The operating system's: paging, interrupts, saving of state, mitigations, time, random numbers.
    /// Kept by a baseline.
    Platform,
    /// Made for each VM, or changed by the guest while it runs: the host is not asked whether it has it.
    Machine,
}

/// A bit with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// Where it is.
    pub word: Word,
    /// Its bit there, 0 to 31.
    pub bit: u32,
    /// What it stands for.
    pub kind: FeatureKind,
}

impl Feature {
    /// Its bit as a mask.
    #[must_use]
    pub const fn mask(&self) -> u32 {
        1 << self.bit
    }
}

/// A word all of whose bits stand for features: set where there is one. (Words that are not in
/// [`FEATURE_WORDS`] hold numbers.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureWord {
    /// Which.
    pub word: Word,
    /// What a bit without a name is taken for.
    pub unnamed: FeatureKind,
    bits: &'static [(u32, &'static str, FeatureKind)],
}

impl FeatureWord {
    /// Its bits with names.
    pub fn features(&self) -> impl Iterator<Item = Feature> {
        let word = self.word;
        self.bits.iter().map(move |(bit, name, kind)| Feature {
            name,
            word,
            bit: *bit,
            kind: *kind,
        })
    }

    /// The bits of one kind as a mask, those without a name included.
    #[must_use]
    pub fn mask(&self, kind: FeatureKind) -> u32 {
        let of = |pick: &dyn Fn(FeatureKind) -> bool| {
            let bits = self.bits.iter().filter(|(_, _, kind)| pick(*kind));
            bits.fold(0, |mask, (bit, _, _)| mask | 1 << bit)
        };
        let named = of(&|_| true);
        of(&|of| of == kind) | if self.unnamed == kind { !named } else { 0 }
    }
}

use FeatureKind::{Instructions as I, Machine as M, Platform as P};
use Register::{Eax, Ebx, Ecx, Edx};

const fn word(
    leaf: u32,
    subleaf: u32,
    register: Register,
    unnamed: FeatureKind,
    bits: &'static [(u32, &'static str, FeatureKind)],
) -> FeatureWord {
    FeatureWord {
        word: Word::new(leaf, subleaf, register),
        unnamed,
        bits,
    }
}

/// Every word whose bits stand for features.
#[rustfmt::skip]
pub static FEATURE_WORDS: &[FeatureWord] = &[
    word(0x1, 0, Ecx, I, &[
        (0, "pni", I), (1, "pclmulqdq", I), (2, "dtes64", P), (3, "monitor", P), (4, "ds_cpl", P),
        (5, "vmx", P), (6, "smx", P), (7, "est", P), (8, "tm2", P), (9, "ssse3", I), (10, "cid", P),
        (11, "sdbg", P), (12, "fma", I), (13, "cx16", I), (14, "xtpr", P), (15, "pdcm", P), (17, "pcid", P),
        (18, "dca", P), (19, "sse4_1", I), (20, "sse4_2", I), (21, "x2apic", M), (22, "movbe", I),
        (23, "popcnt", I), (24, "tsc_deadline_timer", M), (25, "aes", I), (26, "xsave", P),
        (27, "osxsave", M), (28, "avx", I), (29, "f16c", I), (30, "rdrand", P), (31, "hypervisor", M),
    ]),
    word(0x1, 0, Edx, I, &[
        (0, "fpu", I), (1, "vme", P), (2, "de", P), (3, "pse", P), (4, "tsc", P), (5, "msr", P),
        (6, "pae", P), (7, "mce", P), (8, "cx8", I), (9, "apic", M), (11, "sep", P), (12, "mtrr", P),
        (13, "pge", P), (14, "mca", P), (15, "cmov", I), (16, "pat", P), (17, "pse36", P), (18, "pn", P),
        (19, "clflush", P), (21, "dts", P), (22, "acpi", P), (23, "mmx", I), (24, "fxsr", I),
        (25, "sse", I), (26, "sse2", I), (27, "ss", P), (28, "ht", M), (29, "tm", P), (31, "pbe", P),
    ]),
    word(0x6, 0, Eax, P, &[
        (0, "dtherm", P), (1, "ida", P), (2, "arat", M), (4, "pln", P), (6, "pts", P), (7, "hwp", P),
        (8, "hwp_notify", P), (9, "hwp_act_window", P), (10, "hwp_epp", P), (11, "hwp_pkg_req", P),
        (19, "hfi", P),
    ]),
    word(0x7, 0, Ebx, I, &[
        (0, "fsgsbase", P), (1, "tsc_adjust", P), (2, "sgx", P), (3, "bmi1", I), (4, "hle", I),
        (5, "avx2", I), (6, "fdp_excptn_only", P), (7, "smep", P), (8, "bmi2", I), (9, "erms", P),
        (10, "invpcid", P), (11, "rtm", I), (12, "cqm", P), (13, "zero_fcs_fds", P), (14, "mpx", I),
        (15, "rdt_a", P), (16, "avx512f", I), (17, "avx512dq", I), (18, "rdseed", P), (19, "adx", I),
        (20, "smap", P), (21, "avx512ifma", I), (23, "clflushopt", P), (24, "clwb", P), (25, "intel_pt", P),
        (26, "avx512pf", I), (27, "avx512er", I), (28, "avx512cd", I), (29, "sha_ni", I),
        (30, "avx512bw", I), (31, "avx512vl", I),
    ]),
    word(0x7, 0, Ecx, I, &[
        (1, "avx512vbmi", I), (2, "umip", P), (3, "pku", P), (4, "ospke", M), (5, "waitpkg", I),
        (6, "avx512_vbmi2", I), (7, "user_shstk", P), (8, "gfni", I), (9, "vaes", I), (10, "vpclmulqdq", I),
        (11, "avx512_vnni", I), (12, "avx512_bitalg", I), (13, "tme", P), (14, "avx512_vpopcntdq", I),
        (16, "la57", P), (22, "rdpid", P), (24, "bus_lock_detect", P), (25, "cldemote", I), (27, "movdiri", I),
        (28, "movdir64b", I), (29, "enqcmd", I), (30, "sgx_lc", P), (31, "pks", P),
    ]),
    word(0x7, 0, Edx, I, &[
        (2, "avx512_4vnniw", I), (3, "avx512_4fmaps", I), (4, "fsrm", P), (5, "uintr", I),
        (8, "avx512_vp2intersect", I), (9, "srbds_ctrl", P), (10, "md_clear", P), (11, "rtm_always_abort", P),
        (13, "tsx_force_abort", P), (14, "serialize", I), (15, "hybrid_cpu", P), (16, "tsxldtrk", I),
        (18, "pconfig", P), (19, "arch_lbr", P), (20, "ibt", P), (22, "amx_bf16", I), (23, "avx512_fp16", I),
        (24, "amx_tile", I), (25, "amx_int8", I), (26, "spec_ctrl", P), (27, "intel_stibp", P),
        (28, "flush_l1d", P), (29, "arch_capabilities", P), (30, "core_capabilities", P),
        (31, "spec_ctrl_ssbd", P),
    ]),
    word(0x7, 1, Eax, I, &[
        (0, "sha512", I), (1, "sm3", I), (2, "sm4", I), (4, "avx_vnni", I), (5, "avx512_bf16", I),
        (6, "lass", P), (7, "cmpccxadd", I), (10, "fzrm", P), (11, "fsrs", P), (12, "fsrc", P), (17, "fred", P),
        (18, "lkgs", P), (19, "wrmsrns", P), (21, "amx_fp16", I), (22, "hreset", P), (23, "avx_ifma", I),
        (26, "lam", P), (27, "msrlist", P),
    ]),
    word(0x7, 1, Edx, I, &[
        (4, "avx_vnni_int8", I), (5, "avx_ne_convert", I), (8, "amx_complex", I), (10, "avx_vnni_int16", I),
        (14, "prefetchiti", I), (18, "cet_sss", P), (19, "avx10", I),
    ]),
    word(0x7, 2, Edx, P, &[
        (0, "intel_psfd", P), (1, "ipred_ctrl", P), (2, "rrsba_ctrl", P), (3, "ddpd_u", P), (4, "bhi_ctrl", P),
        (5, "mcdt_no", P),
    ]),
    word(0xd, 1, Eax, P, &[
        (0, "xsaveopt", P), (1, "xsavec", P), (2, "xgetbv1", P), (3, "xsaves", P), (4, "xfd", P),
    ]),
    word(0x4000_0001, 0, Eax, P, &[
        (0, "kvm_clocksource", P), (1, "kvm_nop_io_delay", P), (2, "kvm_mmu_op", P),
        (3, "kvm_clocksource2", P), (4, "kvm_async_pf", P), (5, "kvm_steal_time", P), (6, "kvm_pv_eoi", P),
        (7, "kvm_pv_unhalt", P), (9, "kvm_pv_tlb_flush", P), (10, "kvm_async_pf_vmexit", P),
        (11, "kvm_pv_send_ipi", P), (12, "kvm_poll_control", P), (13, "kvm_pv_sched_yield", P),
        (14, "kvm_async_pf_int", P), (15, "kvm_msi_ext_dest_id", P), (16, "kvm_hc_map_gpa_range", P),
        (17, "kvm_migration_control", P), (24, "kvm_clocksource_stable", P),
    ]),
    // A hint is a wish of the monitor's that no host offers.
    word(0x4000_0001, 0, Edx, M, &[(0, "kvm_hints_realtime", M)]),
    word(0x8000_0001, 0, Ecx, I, &[
        (0, "lahf_lm", I), (1, "cmp_legacy", M), (2, "svm", P), (3, "extapic", P), (4, "cr8_legacy", P),
        (5, "abm", I), (6, "sse4a", I), (7, "misalignsse", I), (8, "3dnowprefetch", I), (9, "osvw", P),
        (10, "ibs", P), (11, "xop", I), (12, "skinit", P), (13, "wdt", P), (15, "lwp", I), (16, "fma4", I),
        (17, "tce", P), (19, "nodeid_msr", P), (21, "tbm", I), (22, "topoext", M), (23, "perfctr_core", P),
        (24, "perfctr_nb", P), (26, "bpext", P), (27, "ptsc", P), (28, "perfctr_llc", P), (29, "mwaitx", P),
    ]),
    // AMD repeats bits of leaf 1 here.
    word(0x8000_0001, 0, Edx, I, &[
        (0, "amd_fpu", P), (1, "amd_vme", P), (2, "amd_de", P), (3, "amd_pse", P), (4, "amd_tsc", P),
        (5, "amd_msr", P), (6, "amd_pae", P), (7, "amd_mce", P), (8, "amd_cx8", P), (9, "amd_apic", M),
        (11, "syscall", I), (12, "amd_mtrr", P), (13, "amd_pge", P), (14, "amd_mca", P), (15, "amd_cmov", P),
        (16, "amd_pat", P), (17, "amd_pse36", P), (19, "mp", P), (20, "nx", P), (22, "mmxext", I),
        (23, "amd_mmx", P), (24, "amd_fxsr", P), (25, "fxsr_opt", P), (26, "pdpe1gb", P), (27, "rdtscp", P),
        (29, "lm", I), (30, "3dnowext", I), (31, "3dnow", I),
    ]),
    // What is done with a machine check is the guest's and the monitor's; the host has no part in it.
    word(0x8000_0007, 0, Ebx, P, &[(0, "overflow_recov", M), (1, "succor", M), (3, "smca", P)]),
    word(0x8000_0007, 0, Edx, P, &[(8, "invtsc", P)]),
    word(0x8000_0008, 0, Ebx, P, &[
        (0, "clzero", I), (1, "irperf", P), (2, "xsaveerptr", P), (4, "rdpru", I), (9, "wbnoinvd", P),
        (12, "amd_ibpb", P), (14, "amd_ibrs", P), (15, "amd_stibp", P), (17, "amd_stibp_always_on", P),
        (24, "amd_ssbd", P), (25, "virt_ssbd", P), (26, "amd_ssb_no", P), (28, "amd_psfd", P),
        (29, "btc_no", P), (30, "ibpb_ret", P),
    ]),
    word(0x8000_000a, 0, Edx, P, &[
        (0, "npt", P), (1, "lbrv", P), (2, "svm_lock", P), (3, "nrip_save", P), (4, "tsc_scale", P),
        (5, "vmcb_clean", P), (6, "flushbyasid", P), (7, "decodeassists", P), (10, "pausefilter", P),
        (12, "pfthreshold", P), (13, "avic", P), (15, "v_vmsave_vmload", P), (16, "vgif", P),
        (18, "x2avic", P), (20, "v_spec_ctrl", P), (25, "vnmi", P), (28, "svme_addr_chk", P),
    ]),
    word(0x8000_0021, 0, Eax, P, &[
        (0, "no_nested_data_bp", P), (2, "lfence_rdtsc", P), (6, "null_sel_clr_base", P), (8, "autoibrs", P),
        (9, "no_smm_ctl_msr", P), (20, "prefetchi", I), (27, "sbpb", P), (28, "ibpb_brtype", P),
        (29, "srso_no", P),
    ]),
];

/// The feature of this name.
#[must_use]
pub fn feature(name: &str) -> Option<Feature> {
    let mut all = FEATURE_WORDS.iter().flat_map(FeatureWord::features);
    all.find(|feature| feature.name == name)
}

/// What other people call a feature, and what it is called here.
const ALIASES: &[(&str, &str)] = &[
    ("cmpxchg16b", "cx16"),
    ("cmpxchg8b", "cx8"),
    ("constant_tsc", "invtsc"),
    ("lahf", "lahf_lm"),
    ("lzcnt", "abm"),
    ("nonstop_tsc", "invtsc"),
    ("pclmul", "pclmulqdq"),
    ("sha", "sha_ni"),
    ("sse3", "pni"),
];

/// The feature that somebody means who writes `name`, of which there is none.
pub(super) fn meant(name: &str) -> Option<&'static str> {
    let bare = |name: &str| -> String {
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        letters.map(|letter| letter.to_ascii_lowercase()).collect()
    };
    let wanted = bare(name);
    let aliased = ALIASES.iter().find(|(alias, _)| bare(alias) == wanted);
    let mut all = FEATURE_WORDS.iter().flat_map(FeatureWord::features);
    aliased
        .map(|(_, name)| *name)
        .or_else(|| Some(all.find(|feature| bare(feature.name) == wanted)?.name))
}

pub(super) fn feature_word(word: Word) -> Option<&'static FeatureWord> {
    FEATURE_WORDS.iter().find(|known| known.word == word)
}

/// The names of the bits that are set in `mask`, ascending; a bit without a name is `0x7.0 ebx[22]`.
#[must_use]
pub fn bit_names(word: Word, mask: u32) -> Vec<String> {
    let known = feature_word(word);
    let name = |bit| {
        let mut named = known.into_iter().flat_map(FeatureWord::features);
        match named.find(|feature| feature.bit == bit) {
            Some(feature) => feature.name.to_owned(),
            None => format!("{word}[{bit}]"),
        }
    };
    (0..32)
        .filter(|bit| mask & 1 << bit != 0)
        .map(name)
        .collect()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_name_and_every_bit_is_there_once() {
        let (mut names, mut words) = (HashSet::new(), HashSet::new());
        for word in FEATURE_WORDS {
            assert!(words.insert(word.word), "{}", word.word);
            let mut bits = HashSet::new();
            for found in word.features() {
                assert!(found.bit < 32 && bits.insert(found.bit), "{}", found.name);
                assert!(names.insert(found.name), "{}", found.name);
                assert_eq!(feature(found.name), Some(found));
            }
            let kinds = [I, P, M].map(|kind| word.mask(kind));
            assert_eq!(kinds.iter().fold(0, |all, mask| all ^ mask), u32::MAX);
        }
        assert_eq!(feature("no such feature"), None);
    }

    #[test]
    fn what_is_meant_by_a_name_that_is_none_is_one() {
        for (alias, name) in ALIASES {
            assert!(
                feature(alias).is_none() && feature(name).is_some(),
                "{alias}"
            );
            assert_eq!(meant(alias), Some(*name));
        }
        for (written, name) in [
            ("SSE4.1", "sse4_1"),
            ("avx512vnni", "avx512_vnni"),
            ("AES", "aes"),
        ] {
            assert_eq!(meant(written), Some(name));
        }
        assert_eq!(meant("warp"), None);
        assert_eq!(meant(""), None);
    }

    #[test]
    fn bits_are_called_by_name_and_else_by_place() {
        let word = Word::new(7, 0, Ebx);
        assert_eq!(bit_names(word, 1 << 5 | 1 << 22), ["avx2", "0x7.0 ebx[22]"]);
        let number = Word::new(0x16, 0, Eax);
        assert_eq!(bit_names(number, 1), ["0x16.0 eax[0]"]);
    }
}
