// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as a processor model's JSON, or as a host's leaves and what is to be made of them: nothing
//! panics, and what is made keeps its promises. Shared by `cpuid_any_input.rs` and the fuzz target.

use kvm_bindings::kvm_cpuid_entry2;
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::cpuid::{
    Baseline, BitPattern, Edit, FEATURE_WORDS, FeatureKind, HypervisorLeaves, Register, Signature,
    Template, Timing, TopologyLevels, Word, differences, vendor_name,
};
use kvm_core::arch::x86_64::{CpuidPlan, Topology, boot_msrs};

use crate::leaves::{amd, intel};

pub fn run(input: &[u8]) {
    match input.split_first() {
        Some((0..0x80, text)) => json(text),
        Some((kind, bytes)) => any_leaves(*kind, bytes),
        None => {}
    }
}

fn json(text: &[u8]) {
    let Ok(template) = serde_json::from_slice::<Template>(text) else {
        return;
    };
    let written = serde_json::to_string(&template).expect("what was read can be written");
    let again: Template = serde_json::from_str(&written).expect("what was written can be read");
    assert_eq!(again, template);
    for host in [intel(), amd()] {
        apply(&template, &host);
    }
}

/// A model never has a feature that its host has not.
fn apply(template: &Template, host: &[kvm_cpuid_entry2]) -> Option<Vec<kvm_cpuid_entry2>> {
    let model = template
        .apply(host)
        .map_err(|error| error.to_string())
        .ok()?;
    for known in FEATURE_WORDS {
        let machine = known.mask(FeatureKind::Machine);
        let more = known.word.of(&model) & !known.word.of(host) & !machine;
        assert_eq!(more, 0, "{}", known.word);
    }
    for difference in differences(host, &model) {
        assert!(!difference.to_string().is_empty());
        assert_ne!(difference.host, difference.guest);
    }
    Some(model)
}

/// Takes the input apart.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([(); 4].map(|()| self.byte()))
    }

    /// Mostly one of those that mean something.
    fn function(&mut self) -> u32 {
        match self.byte() {
            low @ 0..0x30 => low.into(),
            low @ 0x30..0x60 => 0x8000_0000 + u32::from(low - 0x30),
            low @ 0x60..0x70 => 0x4000_0000 + 0x100 * u32::from(low & 3) + u32::from(low >> 2 & 3),
            _ => self.word(),
        }
    }

    /// One of the four.
    fn register(&mut self) -> Register {
        Register::ALL[usize::from(self.byte() % 4)]
    }
}

fn any_leaves(kind: u8, bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let mut topology = || bytes.word() % 0x11;
    let shape = (topology(), topology(), topology());
    let index = bytes.word();
    let mut template = match usize::from(kind & 7) {
        level @ 0..4 => Template::baseline(Baseline::ALL[level]),
        _ => Template::host(),
    };
    for _ in 0..kind >> 3 & 3 {
        let word = Word::new(bytes.function(), bytes.byte().into(), bytes.register());
        let (set, clear) = (bytes.word(), bytes.word());
        let bits = BitPattern::new(set & !clear, clear).expect("no bit is in both");
        template = template.edit(Edit { word, bits });
    }
    let (base, khz) = (bytes.word(), bytes.word());
    let mut host = Vec::new();
    while !bytes.0.is_empty() {
        let (function, index) = (bytes.function(), u32::from(bytes.byte() % 8));
        let [eax, ebx, ecx, edx] = [(); 4].map(|()| bytes.word());
        host.push(kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        });
    }

    let _ = (vendor_name(&host), Signature::of(&host), boot_msrs(&host));
    let _ = (
        TopologyLevels::read(&host, 0xb),
        TopologyLevels::read(&host, 0x1f),
    );
    let Some(mut model) = apply(&template, &host) else {
        return;
    };
    let at = HypervisorLeaves::at(base).or(HypervisorLeaves::at(0x4000_0000 | base & 0xff00));
    if let (Ok(mut leaves), kvm_khz) = (at, khz.try_into()) {
        if let Ok(khz) = kvm_khz {
            leaves = leaves.with_timing(Timing::new(khz));
        }
        leaves.apply(&mut model);
        let once = model.clone();
        leaves.apply(&mut model);
        assert_eq!(differences(&once, &model), []);
    }
    let Ok(topology) = Topology::new(shape.0, shape.1, shape.2) else {
        return;
    };
    let id = topology
        .apic_id(index % topology.cpus())
        .unwrap_or(VcpuId(index));
    let plan = CpuidPlan {
        id,
        topology,
        tsc_deadline: khz & 1 != 0,
        arat: Some(khz & 2 != 0),
        mca_recovery: khz & 4 != 0,
    };
    let Ok(cpuid) = plan.apply(&model) else {
        return;
    };
    if let Some(levels) = TopologyLevels::read(cpuid.as_slice(), 0xb) {
        assert_eq!(levels.apic_id, id);
        assert_eq!(Some(levels.place()), topology.place_of(id));
    }
}
