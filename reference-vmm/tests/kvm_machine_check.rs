// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that are told of memory that they have lost, over the real KVM: one that heeds it goes on with the rest, and one
//! that does not is stopped with the reason. Where KVM says too little of an access (one that interprets guests) each is
//! stopped, and that is said; the lab's is held to more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use guests::heeder::{Manner, PAGES, heeder64};
use reference_vmm::api::Client;
use reference_vmm::config::Config;
use reference_vmm::cpu_model::CpuModel;
use reference_vmm::end::GuestEnd;
use reference_vmm::lazy::{LazyRequest, LazyState, OnLoss};
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::{RestoreRequest, SnapshotRequest};
use support::heeder::{
    compares, count, expect_words, has_the_rest, heeder, host_is_amd, mcg_cap, page, passes, tells,
    told,
};
use support::keeper::Guest;
use support::{Vmm, WATCHDOG, file, need_kvm};

/// The pages that are lost together, for they are one piece of the file.
const PIECE: Range<u64> = 512..768;
/// Those of them that it compares, and some before.
const COMPARED: Range<u64> = 500..536;
/// The one that is lost alone.
const ALONE: u64 = PAGES - 1;

/// A snapshot of a guest that has been through its memory, and compares these pages from now on.
fn frozen(config: &Config, pages: Range<u64>) -> (tempfile::TempDir, PathBuf) {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshot");
    let mut guest = Guest::boot(config);
    guest.hear(3);
    only(&guest, pages);
    guest.hear(3);
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    (folder, dir)
}

fn only(guest: &Guest, pages: Range<u64>) {
    compares(guest, pages.start as u32, pages.end as u32);
}

/// All but what is lost.
fn has_the_others(mut guest: Guest) {
    for pages in [0..PIECE.start, PIECE.end..PAGES] {
        only(&guest, pages);
        guest.hear(3);
    }
    has_the_rest(guest);
}

/// Has this page, and all of its MiB, be lost.
fn wreck(dir: &Path, number: u64) {
    let (link, _) = Link::open(dir).unwrap();
    let (_, place) = link.map().locate(page(number)).unwrap();
    let at = place.offset + (page(number) - place.guest);
    let memory = File::options().write(true).open(dir.join("memory"));
    memory.unwrap().write_all_at(&[1; 8], at + 100).unwrap();
}

/// It goes on without.
fn without(dir: &Path) -> Guest {
    Guest::restore(&RestoreRequest {
        lazy: Some(LazyRequest {
            on_loss: OnLoss::Poison,
            ..LazyRequest::default()
        }),
        ..RestoreRequest::new(dir)
    })
}

/// Where it was told of.
fn places(guest: &Guest) -> BTreeSet<u64> {
    told(guest).iter().map(|told| told.address).collect()
}

/// Why it was stopped.
fn reason(mut guest: Guest) -> String {
    while !guest.end.is_told() {
        guest.listen();
    }
    match guest.leave().1 {
        Some(GuestEnd::Failed(why)) => why,
        other => panic!("it did not fail: {other:?}"),
    }
}

#[test]
fn a_guest_that_heeds_is_told_of_each_page_that_it_lost_and_goes_on_with_the_others() {
    // AMD's machine checks go to one processor of several.
    for cpus in if host_is_amd() { vec![1, 2] } else { vec![1] } {
        let (_kernel, config) = heeder(Manner::Heeds, cpus);
        let (_folder, dir) = frozen(&config, COMPARED);
        wreck(&dir, PIECE.start);
        let mut guest = without(&dir);
        passes(&mut guest, 3);
        if !tells(&guest) {
            return;
        }
        let lost = PIECE.start..COMPARED.end;
        assert_eq!(places(&guest), lost.map(page).collect());
        for told in told(&guest) {
            expect_words(&told, host_is_amd());
        }
        let progress = guest.running.lazy_progress().unwrap();
        assert!(progress.lost.is_some_and(|lost| (24..=256).contains(&lost)));
        assert!([LazyState::Bringing, LazyState::Damaged].contains(&progress.state));
        let stats = guest.running.stats();
        assert!(stats.machine_checks >= 48, "{}", stats.machine_checks);
        has_the_others(guest);
    }
}

#[test]
fn a_guest_that_heeds_may_touch_one_lost_page_as_often_as_it_will() {
    let (_kernel, config) = heeder(Manner::Heeds, 1);
    let (_folder, dir) = frozen(&config, 1000..PAGES);
    wreck(&dir, ALONE);
    let mut guest = without(&dir);
    passes(&mut guest, 2);
    if !tells(&guest) {
        return;
    }
    // With a little other work between, and with none.
    for from in [ALONE - 8, ALONE] {
        let before = count(&guest);
        compares(&guest, from as u32, PAGES as u32);
        guest.hear(24);
        assert!(count(&guest) >= before + 20);
        assert_eq!(places(&guest), BTreeSet::from([page(ALONE)]));
    }
    has_the_rest(guest);
}

#[test]
fn a_guest_that_does_not_heed_is_stopped_with_what_it_lost_and_why_it_was_not_told() {
    for (manner, needle, before) in [
        (Manner::Off, "(CR4.MCE)", 0),
        (Manner::Masked, "IA32_MC9_CTL", 0),
        (Manner::Nests, "(MCG_STATUS.MCIP)", 1),
        (Manner::Returns, "same instruction from 8 machine", 8),
    ] {
        let (_kernel, config) = heeder(manner, 1);
        let (_folder, dir) = frozen(&config, 1000..PAGES);
        wreck(&dir, ALONE);
        let mut guest = without(&dir);
        passes(&mut guest, usize::MAX);
        if !tells_before(&guest, needle) {
            continue;
        }
        assert_eq!(count(&guest), before, "{manner:?}");
        let why = reason(guest);
        let at = format!("{:#x}", page(ALONE));
        assert!(why.contains(&at) && why.contains("poisoned"), "{why}");
        println!("{manner:?}: {why}");
    }
}

/// Whether it ended so, and not because this KVM says too little.
fn tells_before(guest: &Guest, needle: &str) -> bool {
    match guest.end.get() {
        Some(GuestEnd::Failed(why)) if why.contains(needle) => true,
        _ => tells(guest),
    }
}

/// Intel's guests have other words, and a check on all processors at once, which is not given.
#[test]
fn a_guest_with_intels_cpuid_is_told_as_intels_processors_do_it() {
    // "GenuineIntel"
    let template = r#"{"registers": [{"leaf": 0, "register": "ebx", "value": "0x756e6547"},
        {"leaf": 0, "register": "edx", "value": "0x49656e69"}, {"leaf": 0, "register": "ecx", "value": "0x6c65746e"}]}"#;
    let template = file(template.as_bytes());
    for cpus in [1, 2] {
        let (_kernel, config) = heeder(Manner::Heeds, cpus);
        let cpu = CpuModel::File(template.to_path_buf());
        let (_folder, dir) = frozen(&Config { cpu, ..config }, 1000..PAGES);
        wreck(&dir, ALONE);
        let mut guest = without(&dir);
        passes(&mut guest, 3);
        if cpus > 1 && tells_before(&guest, "several vCPUs with Intel's CPUID") {
            reason(guest);
            continue;
        }
        if !tells(&guest) {
            return;
        }
        assert_eq!(places(&guest), BTreeSet::from([page(ALONE)]));
        for told in told(&guest) {
            expect_words(&told, false);
        }
        has_the_rest(guest);
    }
}

#[test]
fn the_program_says_how_much_is_lost_and_how_often_the_guest_was_told() {
    let (_kernel, config) = heeder(Manner::Heeds, 1);
    let (folder, dir) = frozen(&config, COMPARED);
    wreck(&dir, PIECE.start);
    let mut guest = without(&dir);
    passes(&mut guest, 3);
    if !tells(&guest) {
        let why = reason(guest);
        let ended = Vmm::command(["restore", "--on-loss=poison", "--from"]).arg(&dir);
        let ended = ended.output();
        ended.expect_status(1);
        let said = why.rsplit("; ").next().unwrap();
        assert!(ended.stderr.contains(said), "{said} is not in {ended}");
        return;
    }
    has_the_others(guest);
    let socket = folder.path().join("api");
    let mut run = Vmm::command(["restore", "--on-loss=poison", "--stats", "--from"])
        .arg(&dir)
        .arg("--api-sock")
        .arg(&socket)
        .stdin_pipe()
        .start();
    run.wait_for("9012");
    let status = Vmm::command(["ctl", "--api-sock"]).arg(&socket);
    let status = status.arg("status").output();
    status.expect_status(0);
    let said = status.text();
    assert!(said.contains(" pages are lost"), "{said}");
    let mut client = Client::connect(&socket, WATCHDOG).unwrap();
    let stats = client.call("GET", "/stats", None).unwrap().body.unwrap();
    let number = |of: &serde_json::Value| of.as_u64().unwrap();
    assert!(number(&stats["lazy"]["progress"]["lost"]) >= 24, "{stats}");
    assert!(number(&stats["machine-checks"]) >= 48, "{stats}");
    run.type_in(b"q");
    let ended = run.wait();
    ended.expect_status(1);
    for needle in [" lost\n", "machine checks for lost memory: "] {
        assert!(ended.stderr.contains(needle), "no {needle:?} in {ended}");
    }
    let told = ended.stderr.matches("the guest has a machine check");
    assert_eq!(told.count(), 1, "{ended}");
}

/// `heeder64` is a guest as others are, where nothing is lost.
#[test]
fn a_guest_that_lost_nothing_is_told_nothing() {
    need_kvm();
    assert!(heeder64().len() < 4096, "its handler is where its code is");
    for manner in [Manner::Heeds, Manner::Off, Manner::Masked] {
        let (_kernel, config) = heeder(manner, 1);
        let mut guest = Guest::boot(&config);
        guest.hear(3);
        assert_eq!(count(&guest), 0);
        // MCG_CTL_P and ten banks; MCG_SER_P too, but of kvm_amd, which has no bits above MCG_CTL_P.
        let cap = mcg_cap(&guest);
        assert!([0x100_010a, 0x10a].contains(&cap), "{cap:#x}");
        has_the_rest(guest);
    }
}
