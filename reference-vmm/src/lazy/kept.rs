// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages that a restored guest touches first, kept in one piece beside its snapshot.
//!
//! In the snapshot they lie all over the guest's memory, and a disk that is asked for each of them takes a search a page. Here
//! they lie in the order in which they are read ahead, so that the disk reads on. Each has a checksum of its own, so that a
//! restore that checks what it reads need not read a piece of the snapshot for a page.
//!
//! # The file
//! All numbers are little-endian, checksums are CRC-32 as gzip's.
//!
//! ```text
//!    0   8  magic: 89 52 57 50 0d 0a 1a 0a  ("\x89RWP\r\n\x1a\n")
//!    8   4  version: 1
//!   12   4  number of runs, n: at most 65536
//!   16  16  the snapshot's name
//!   32   4  pages that are kept, m: at most 65536
//!   36   4  where the pages begin: a multiple of 4096
//!   40   4  checksum of the table
//!   44   4  checksum of bytes 0 to 43
//!   48 16n  the table: of each run its first page, a frame number, and how many pages; none of them is zeros alone, for
//!           those are known by the snapshot's state
//!       4m    and of each page that is kept its checksum, in the order of the runs
//!           the pages, in that order
//! ```
//!
//! Whoever made the file had checked the pages: it is made at a restore that does.
//!
//! What is not as it should be is told of once, and from then on the snapshot is read as if there were no such file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use async_pf::working_set::{HoldOut, PlanLimits, ReplayPlan, WorkingSet};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::{Gfn, PAGE_SIZE};

use crate::snapshot::format::{SnapshotId, checksum, u32_at, u64_at};
use crate::snapshot::link;
use crate::snapshot::pages::is_zero;

/// What the file begins with.
pub const MAGIC: [u8; 8] = *b"\x89RWP\r\n\x1a\n";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const RUN: usize = 16;
/// The most pages that are kept: 256 MiB. Those that are touched later have had time to come.
pub const MOST: u64 = 1 << 16;
const PAGE: usize = PAGE_SIZE as usize;
/// What the disk is asked for at once.
const AHEAD: u64 = 32 << 20;

/// A run of pages, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    pages: u64,
    /// The number of its first page among those that are kept.
    at: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.pages
    }
}

/// Writes the pages of `record`, as many as are kept, from `source` to `path`: beside it first, synced and renamed then. One at
/// a time may, and `source` has checked what it gives: what is kept is read without another look at the snapshot.
///
/// # Errors
/// What the file system said, or `source`; nothing is left behind, and what was there is as it was.
pub fn save(
    path: &Path,
    id: SnapshotId,
    record: &WorkingSet,
    source: &dyn PageSource,
    go_on: &dyn Fn() -> bool,
) -> io::Result<u64> {
    let mut partial = path.file_name().unwrap_or_default().to_owned();
    partial.push(".partial");
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(partial);
    let partial = path.with_file_name(hidden);
    let saved = save_by_way_of(&partial, id, record, source, go_on).and_then(|pages| {
        fs::rename(&partial, path)?;
        let folder = path.parent().filter(|of| !of.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(pages)
    });
    if saved.is_err() {
        // Best effort: the error that matters is the first one.
        fs::remove_file(&partial).ok();
    }
    saved
}

fn save_by_way_of(
    partial: &Path,
    id: SnapshotId,
    record: &WorkingSet,
    source: &dyn PageSource,
    go_on: &dyn Fn() -> bool,
) -> io::Result<u64> {
    match fs::remove_file(partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Created, so that no link is followed that somebody has put there.
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600);
    let mut file = file.open(partial)?;
    let (mut runs, mut sums) = (Vec::new(), Vec::new());
    let plan = plan(record);
    // How many of them are zeros is not known yet: they go behind a table of the most that there can be.
    let most = plan.iter().map(|run| run.1).sum::<u64>() as usize;
    let begin = ((HEADER + most * (RUN + 4)) as u64).next_multiple_of(PAGE_SIZE);
    let mut bytes = vec![0; PAGE];
    for (first, pages) in plan {
        for gfn in first..first + pages {
            if !go_on() {
                return Err(io::Error::other("the guest has ended"));
            }
            let fetched = source.fetch_for(Lane::Prefetch, Gfn(gfn), &mut bytes);
            let zero = fetched.map_err(io::Error::other)? == Fetched::Zero || is_zero(&bytes);
            if zero {
                continue;
            }
            let at = sums.len() as u64;
            file.write_all_at(&bytes, begin + at * PAGE_SIZE)?;
            sums.push(checksum(&bytes));
            match runs.last_mut() {
                Some(Run { first, pages, .. }) if *first + *pages == gfn => *pages += 1,
                _ => runs.push(Run {
                    first: gfn,
                    pages: 1,
                    at,
                }),
            }
        }
    }
    file.write_all(&table(id, &runs, &sums, begin))?;
    file.sync_all()?;
    Ok(sums.len() as u64)
}

/// What is kept, in order: the pages as they are read ahead, and those that are held out then.
fn plan(record: &WorkingSet) -> Vec<(u64, u64)> {
    let limits = PlanLimits {
        hold_out: HoldOut::NONE,
        ..PlanLimits::default()
    };
    let mut left = MOST;
    let plan = ReplayPlan::new(record, limits);
    let reads = plan.reads().iter().map_while(|read| {
        let pages = read.pages.min(left);
        left -= pages;
        (pages > 0).then_some((read.first.0, pages))
    });
    reads.collect()
}

/// All that stands before the pages.
fn table(id: SnapshotId, runs: &[Run], sums: &[u32], begin: u64) -> Vec<u8> {
    let mut table = Vec::new();
    for run in runs {
        table.extend(run.first.to_le_bytes());
        table.extend(run.pages.to_le_bytes());
    }
    table.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
    // None of them is as much as 32 bits have.
    let word = |number: u64| (number as u32).to_le_bytes();
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(word(runs.len() as u64));
    bytes.extend(id.0);
    bytes.extend(word(sums.len() as u64));
    bytes.extend(word(begin));
    bytes.extend(checksum(&table).to_le_bytes());
    bytes.extend(checksum(&bytes).to_le_bytes());
    bytes.extend(table);
    bytes
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The file cannot be read.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    /// It is not as it should be.
    #[error("{0}")]
    Form(String),
    /// It is another snapshot's.
    #[error("it is snapshot {0}'s")]
    OtherSnapshot(SnapshotId),
}

/// The pages that are kept, ready to be read.
#[derive(Debug)]
pub struct Kept {
    file: File,
    /// In order of their pages, none over another.
    runs: Vec<Run>,
    sums: Vec<u32>,
    begin: u64,
}

impl Kept {
    /// Those at `path`, of this snapshot; none where there is no such file. Blocks for the table, and has the disk begin with
    /// the pages.
    ///
    /// # Errors
    /// [`KeptError`].
    pub fn load(path: &Path, id: SnapshotId) -> Result<Option<Self>, KeptError> {
        // A pipe in its place does not hold the open up.
        let mut options = OpenOptions::new();
        let open = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = match open {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let metadata = file.metadata()?;
        let wrong = |what: String| Err(KeptError::Form(what));
        if !metadata.is_file() {
            return wrong("it is not a regular file".into());
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        if header[..8] != MAGIC {
            return wrong(format!("it begins with {:02x?}", &header[..8]));
        }
        let word = |at| u32_at(&header, at);
        if checksum(&header[..HEADER - 4]) != word(HEADER - 4) {
            return wrong("the checksum of its header is another".into());
        }
        let (version, runs, kept) = (word(8), u64::from(word(12)), u64::from(word(32)));
        let begin = u64::from(word(36));
        if version != VERSION {
            return wrong(format!("its version is {version}: {VERSION} is known"));
        }
        let mut of = [0; 16];
        of.copy_from_slice(&header[16..32]);
        if of != id.0 {
            return Err(KeptError::OtherSnapshot(SnapshotId(of)));
        }
        let len = runs * RUN as u64 + kept * 4;
        let fits = runs <= MOST && kept <= MOST && begin.is_multiple_of(PAGE_SIZE);
        let end = begin + kept * PAGE_SIZE;
        if !fits || HEADER as u64 + len > begin || end > metadata.len() {
            return wrong(format!(
                "{runs} runs and {kept} pages from {begin:#x} on are not in {} bytes",
                metadata.len()
            ));
        }
        let mut table = vec![0; len as usize];
        file.read_exact_at(&mut table, HEADER as u64)?;
        if checksum(&table) != word(40) {
            return wrong("the checksum of its table is another".into());
        }
        let (of_runs, of_sums) = table.split_at(runs as usize * RUN);
        let mut next = 0;
        let mut runs: Vec<Run> = Vec::with_capacity(runs as usize);
        for entry in of_runs.chunks_exact(RUN) {
            let (first, pages) = (u64_at(entry, 0), u64_at(entry, 8));
            let last = 1 << 52;
            if pages == 0 || pages > last || first > last - pages {
                return wrong(format!("{pages} pages from {first:#x} on are no run"));
            }
            runs.push(Run {
                first,
                pages,
                at: next,
            });
            next += pages;
            if next > kept {
                return wrong(format!(
                    "its runs are of {next} pages and more: {kept} are kept"
                ));
            }
        }
        runs.sort_unstable_by_key(|run| run.first);
        let over = |two: &[Run]| matches!(two, [one, other] if one.end() > other.first);
        if next != kept || runs.windows(2).any(over) {
            return wrong(format!(
                "its runs are of {next} pages, or lie over each other"
            ));
        }
        let sums = of_sums.chunks_exact(4).map(|sum| u32_at(sum, 0));
        // Best effort: what is not there yet is waited for.
        link::begin_to_read(&file, begin, (end - begin).min(AHEAD));
        Ok(Some(Kept {
            sums: sums.collect(),
            file,
            runs,
            begin,
        }))
    }

    /// The run that has this page, or where the next one begins.
    fn find(&self, gfn: u64) -> Result<Run, Option<u64>> {
        let behind = self.runs.partition_point(|run| run.first <= gfn);
        let run = behind.checked_sub(1).and_then(|at| self.runs.get(at));
        match run.filter(|run| gfn < run.end()) {
            Some(run) => Ok(*run),
            None => Err(self.runs.get(behind).map(|run| run.first)),
        }
    }

    /// Reads these pages, if they are all in one run; whether they are.
    fn read(&self, first: Gfn, into: &mut [u8]) -> Result<bool, KeptError> {
        let pages = (into.len() / PAGE) as u64;
        let Ok(run) = self.find(first.0) else {
            return Ok(false);
        };
        if !into.len().is_multiple_of(PAGE) || pages > run.end() - first.0 {
            return Ok(false);
        }
        let at = run.at + (first.0 - run.first);
        self.file.read_exact_at(into, self.begin + at * PAGE_SIZE)?;
        let sums = self.sums.iter().skip(at as usize);
        for (page, (bytes, sum)) in into.chunks_exact(PAGE).zip(sums).enumerate() {
            if checksum(bytes) != *sum {
                let gfn = first.0 + page as u64;
                let what = format!("the checksum of page {gfn:#x} is another");
                return Err(KeptError::Form(what));
            }
        }
        Ok(true)
    }
}

/// Pages out of what is kept, once that is known, and of another source where they are not.
pub(super) struct KeptFirst {
    kept: Arc<OnceLock<Kept>>,
    source: Arc<dyn PageSource>,
    broken: AtomicBool,
}

impl KeptFirst {
    pub(super) fn new(kept: Arc<OnceLock<Kept>>, source: Arc<dyn PageSource>) -> Self {
        KeptFirst {
            kept,
            source,
            broken: AtomicBool::new(false),
        }
    }

    /// What is kept, and of use.
    fn kept(&self) -> Option<&Kept> {
        // Relaxed: who misses it finds the same.
        let of_use = !self.broken.load(Ordering::Relaxed);
        self.kept.get().filter(|_| of_use)
    }
}

impl PageSource for KeptFirst {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        if let Some(kept) = self.kept() {
            match kept.read(first, into) {
                Ok(true) => return Ok(Fetched::Bytes),
                Ok(false) => {}
                Err(why) => {
                    if !self.broken.swap(true, Ordering::Relaxed) {
                        log::warn!("what is kept of the working set is of no use: {why}");
                    }
                }
            }
        }
        self.source.fetch_for(lane, first, into)
    }

    fn overtakes(&self) -> bool {
        self.source.overtakes()
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        let Some(kept) = self.kept() else {
            return self.source.run(first, pages);
        };
        match kept.find(first.0) {
            Ok(run) => (run.end() - first.0).min(pages).max(1),
            Err(next) => {
                let before = next.map_or(pages, |next| pages.min(next - first.0));
                self.source.run(first, before)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::sync::atomic::AtomicU64;

    use async_pf::working_set::Recorder;

    use super::*;

    const ID: SnapshotId = SnapshotId([7; 16]);

    fn known(kept: Kept) -> Arc<OnceLock<Kept>> {
        Arc::new(OnceLock::from(kept))
    }

    /// Each page has its number in it, each third is zero; counts what was asked for.
    #[derive(Default)]
    struct Numbers(AtomicU64);

    fn page(gfn: u64) -> Vec<u8> {
        let byte = if gfn.is_multiple_of(3) { 0 } else { gfn as u8 };
        vec![byte; PAGE]
    }

    impl PageSource for Numbers {
        fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
            let pages = into.chunks_exact_mut(PAGE).zip(first.0..);
            pages.for_each(|(into, gfn)| into.copy_from_slice(&page(gfn)));
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Fetched::Bytes)
        }
    }

    fn record(pages: impl IntoIterator<Item = u64>) -> WorkingSet {
        let recorder = Recorder::new(Gfn(0), 1 << 20, 1 << 18, ID.0).unwrap();
        for gfn in pages {
            recorder.touch(Gfn(gfn));
        }
        recorder.so_far()
    }

    fn saved(pages: impl IntoIterator<Item = u64>) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        save(&path, ID, &record(pages), &Numbers::default(), &|| true).unwrap();
        (folder, path)
    }

    fn fetched(source: &dyn PageSource, gfn: u64, pages: u64) -> Vec<u8> {
        let mut bytes = vec![0xee; pages as usize * PAGE];
        if source.fetch(Gfn(gfn), &mut bytes).unwrap() == Fetched::Zero {
            bytes.fill(0);
        }
        bytes
    }

    const TOUCHED: [u64; 8] = [500, 501, 502, 40, 503, 9000, 41, 800];

    #[test]
    fn what_is_kept_is_read_from_there_and_all_else_from_the_source() {
        let (_folder, path) = saved(TOUCHED);
        let numbers = Arc::new(Numbers::default());
        let kept = Kept::load(&path, ID).unwrap().unwrap();
        let source = KeptFirst::new(known(kept), Arc::clone(&numbers) as _);
        for gfn in TOUCHED {
            assert_eq!(fetched(&source, gfn, 1), page(gfn), "{gfn}");
        }
        // But for those that are zeros, which the source knows.
        let zeros = TOUCHED.iter().filter(|gfn| gfn.is_multiple_of(3)).count() as u64;
        assert_eq!(numbers.0.swap(0, Ordering::Relaxed), zeros);
        // Part of it is not there, or it is of two runs.
        let all: Vec<u8> = (499..506).flat_map(page).collect();
        assert_eq!(fetched(&source, 499, 7), all);
        assert_eq!(numbers.0.load(Ordering::Relaxed), 1);
        // Where the one ends and the other begins is known.
        assert_eq!(source.run(Gfn(490), 100), 10);
        assert_eq!(source.run(Gfn(500), 100), 1);
        assert_eq!(source.run(Gfn(502), 100), 2);
        assert_eq!(source.run(Gfn(9001), 100), 100);
    }

    #[test]
    fn no_more_than_the_limit_is_kept_and_the_first_ones_are() {
        let (_folder, path) = saved((0..MOST + 100).rev());
        let kept = Kept::load(&path, ID).unwrap().unwrap();
        let pages: u64 = kept.runs.iter().map(|run| run.pages).sum();
        let zeros = (100..MOST + 100).filter(|gfn| gfn.is_multiple_of(3) || *gfn as u8 == 0);
        assert_eq!(pages, MOST - zeros.count() as u64);
        assert!(kept.find(MOST + 99).is_ok());
        assert!(kept.find(50).is_err());
    }

    #[test]
    fn a_guest_that_ends_or_a_source_that_fails_leaves_what_was_there() {
        let (folder, path) = saved(TOUCHED);
        let before = fs::read(&path).unwrap();
        let ended = save(&path, ID, &record([1, 2]), &Numbers::default(), &|| false);
        assert!(ended.is_err());
        struct Fails;
        impl PageSource for Fails {
            fn fetch(&self, gfn: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
                Err(SourceError::NoSuchPage { gfn })
            }
        }
        let failed = save(&path, ID, &record([1, 2]), &Fails, &|| true).unwrap_err();
        assert!(failed.to_string().contains("0x1"), "{failed}");
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_snapshots_is_told_by_its_name_and_none_is_none() {
        let (folder, path) = saved(TOUCHED);
        let other = SnapshotId([8; 16]);
        let why = Kept::load(&path, other).unwrap_err().to_string();
        assert!(why.contains(&ID.to_string()), "{why}");
        assert!(
            Kept::load(&folder.path().join("none"), ID)
                .unwrap()
                .is_none()
        );
        let why = Kept::load(folder.path(), ID).unwrap_err().to_string();
        assert!(why.contains("not a regular file"), "{why}");
    }

    #[test]
    fn each_bit_before_the_pages_that_turns_over_is_found_and_each_end_is() {
        let (folder, path) = saved(TOUCHED);
        let good = fs::read(&path).unwrap();
        let kept = Kept::load(&path, ID).unwrap().unwrap();
        let said = HEADER + kept.runs.len() * RUN + kept.sums.len() * 4;
        let bad = folder.path().join("bad");
        for bit in 0..said * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&bad, &bytes).unwrap();
            assert!(Kept::load(&bad, ID).is_err(), "bit {bit}");
        }
        for len in [0, 7, HEADER - 1, HEADER, said - 1, good.len() - 1] {
            fs::write(&bad, &good[..len]).unwrap();
            assert!(Kept::load(&bad, ID).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn runs_that_are_more_than_any_number_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        for (runs, of) in [(4100, 1 << 52), (2, u64::MAX >> 1), (2, 1)] {
            let all = (0..runs).map(|number| Run {
                first: number % 2,
                pages: of,
                at: 0,
            });
            let mut bytes = table(ID, &all.collect::<Vec<_>>(), &[0], 1 << 20);
            bytes.resize((1 << 20) + PAGE, 0);
            fs::write(&path, bytes).unwrap();
            assert!(Kept::load(&path, ID).is_err(), "{runs} of {of}");
        }
    }

    #[test]
    fn what_overtakes_in_the_source_overtakes_here() {
        struct Line(bool);
        impl PageSource for Line {
            fn fetch(&self, _: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
                Ok(Fetched::Zero)
            }
            fn overtakes(&self) -> bool {
                self.0
            }
        }
        for line in [true, false] {
            let (_folder, path) = saved(TOUCHED);
            let kept = Kept::load(&path, ID).unwrap().unwrap();
            assert_eq!(
                KeptFirst::new(known(kept), Arc::new(Line(line))).overtakes(),
                line
            );
        }
    }

    #[test]
    fn a_page_that_is_not_as_it_was_comes_from_the_source_and_so_does_all_behind_it() {
        let (_folder, path) = saved(TOUCHED);
        let numbers = Arc::new(Numbers::default());
        let kept = Kept::load(&path, ID).unwrap().unwrap();
        let Run { at, first, .. } = kept.find(800).unwrap();
        let offset = kept.begin + (at + 800 - first) * PAGE_SIZE;
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xaa], offset + 17).unwrap();
        let source = KeptFirst::new(known(kept), Arc::clone(&numbers) as _);
        assert_eq!(fetched(&source, 500, 1), page(500));
        assert_eq!(numbers.0.load(Ordering::Relaxed), 0);
        assert_eq!(fetched(&source, 800, 1), page(800));
        assert_eq!(fetched(&source, 500, 1), page(500));
        assert_eq!(numbers.0.load(Ordering::Relaxed), 2);
        assert_eq!(source.run(Gfn(500), 100), 100);
    }
}
