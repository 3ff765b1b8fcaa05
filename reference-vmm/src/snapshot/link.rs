// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One snapshot's files, opened and checked: a link of a [chain](super::chain), which may have but one.
//!
//! What is in the guest at an address is read through it ([`Link::read`]), whatever form the file has. Who reads while a guest
//! runs on it has each piece checked before the first of its bytes is used ([`Link::check_as_read`]).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use memslots::PAGE_SIZE;

use super::files::{MEMORY, STATE};
use super::first::FirstPages;
use super::format::{self, Checksum, Kind, SnapshotId};
use super::machine::StateError;
use super::packed::{Duplicates, FIRST, Packed, Stored};
use super::pages::{self, PageMap, Piece, Region};
use super::parent::Parent;
use super::ranges::{MOST_RUNS, Ranges};
use super::restore::{NoSnapshot, RestoreError};

/// Bytes of pieces that have been taken out of a compressed file and are kept, in case that they are asked for again.
const KEPT: u64 = 64 << 20;
/// What is read at a time of a piece that is compared with its checksum, bytes: less than a processor's nearest caches have.
const PART: usize = 32 << 10;

/// A snapshot whose files are open. What is opened stays what it is, though the name be another snapshot's then.
#[derive(Debug)]
pub struct Link {
    dir: PathBuf,
    id: SnapshotId,
    parent: Option<Parent>,
    own: Ranges,
    map: PageMap,
    packed: Option<(Packed, Vec<u64>)>,
    duplicates: Duplicates,
    first: Option<Arc<FirstPages>>,
    /// None where memory is elsewhere.
    memory: Option<Arc<File>>,
    kept: Mutex<VecDeque<(usize, Arc<Vec<u8>>)>>,
    as_read: Option<AsRead>,
}

/// How what is read is checked.
#[derive(Debug)]
struct AsRead {
    /// Of each piece, in which [`Look`] it was compared with its checksum, or 0; none where nobody wants that.
    checked: Option<Vec<AtomicU32>>,
    /// Of each piece [`words`](Self::words) of bits, one for each of its pages: that one was zero when the piece was right. The
    /// file system says where holes are, and may be wrong. Made when the first piece has been read, for a guest's start does not
    /// wait for what grows with its memory; none where no piece is compared, or the file has no holes.
    zeros: OnceLock<Vec<AtomicU64>>,
    words: usize,
    pieces: usize,
    look: Mutex<Look>,
    /// Those that are being compared: who wants one of them waits for that, and does not read it as well.
    under_way: Mutex<Vec<usize>>,
    /// Of [`under_way`](Self::under_way).
    done: Condvar,
    /// What the file was when it began.
    modified: Option<SystemTime>,
    len: u64,
    /// Where in the guest the file has something, once somebody has looked.
    data: OnceLock<Ranges>,
}

/// A piece that is being compared with its checksum, by who has this.
struct Turn<'a>(&'a AsRead, usize);

impl AsRead {
    /// The bits of a piece's pages.
    fn zeros_of(&self, number: usize) -> &[AtomicU64] {
        let make = || {
            let words = self.pieces * self.words;
            (0..words).map(|_| AtomicU64::new(0)).collect()
        };
        let from = number.saturating_mul(self.words);
        let of = self.zeros.get_or_init(make).get(from..from + self.words);
        of.unwrap_or_default()
    }

    /// Waits while another compares this piece.
    fn turn(&self, number: usize) -> Turn<'_> {
        // What is in it is whole after each statement.
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while under_way.contains(&number) {
            let waited = self.done.wait(under_way);
            under_way = waited.unwrap_or_else(PoisonError::into_inner);
        }
        under_way.push(number);
        Turn(self, number)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let under_way = self.0.under_way.lock();
        let mut under_way = under_way.unwrap_or_else(PoisonError::into_inner);
        under_way.retain(|number| *number != self.1);
        drop(under_way);
        self.0.done.notify_all();
    }
}

/// What the file was when it was last looked at. One that is written to and has its time put back (`cp -p`) has another change
/// time, which nobody can put back, and so has one that is merely removed, or renamed: what was compared with its checksum
/// before is compared anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    /// From 1 on, another with each change.
    number: u32,
    changed: (i64, i64),
}

/// How often a read is begun anew because the file has changed meanwhile.
const MOST_LOOKS: u32 = 16;

impl Link {
    /// Opens the snapshot in `dir` and checks all of it but the contents of guest memory. The bytes of its file `state`
    /// come with it.
    ///
    /// # Errors
    /// [`RestoreError`], with the file's name in it.
    pub fn open(dir: &Path) -> Result<(Self, Vec<u8>), RestoreError> {
        let path = dir.join(MEMORY);
        let opened = open(&path);
        if let Ok((memory, _)) = &opened {
            // The disk reads the header while the state is looked at.
            begin_to_read(memory, 0, PAGE_SIZE);
        }
        let (mut link, bytes) = Self::open_state(dir)?;
        let opened = opened.map_err(|error| match error {
            RestoreError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                let dir = dir.to_owned();
                RestoreError::NoMemory { dir }
            }
            error => error,
        });
        let (memory, has) = opened?;
        let says = match &link.packed {
            Some((packed, _)) => packed.file_len(),
            None => link.map.file_len(),
        };
        if has != says {
            return Err(RestoreError::MemoryLength { path, has, says });
        }
        let mut head = [0; 32];
        let read = memory.read_exact_at(&mut head, 0);
        read.map_err(|source| RestoreError::Read {
            path: path.clone(),
            source,
        })?;
        let right = pages::check_header(&head, link.id);
        right.map_err(|source| RestoreError::Header { path, source })?;
        link.memory = Some(Arc::new(memory));
        Ok((link, bytes))
    }

    /// Of the snapshot in `dir` the state alone, whose bytes come with it: memory is elsewhere, and a read of it fails.
    ///
    /// # Errors
    /// [`RestoreError`], with the file's name in it.
    pub fn open_state(dir: &Path) -> Result<(Self, Vec<u8>), RestoreError> {
        let path = dir.join(STATE);
        let bytes = read_state(&path).map_err(|error| said_of(dir, error))?;
        let sections = Sections::parse(&bytes);
        let sections = sections.map_err(|source| RestoreError::State { path, source })?;
        let Sections {
            id,
            parent,
            own,
            map,
            packed,
            duplicates,
            first,
        } = sections;
        let packed = packed.map(|packed| {
            let offsets = packed.offsets().collect();
            (packed, offsets)
        });
        let link = Link {
            dir: dir.to_owned(),
            id,
            parent,
            own,
            map,
            packed,
            duplicates,
            first: first.map(Arc::new),
            memory: None,
            kept: Mutex::default(),
            as_read: None,
        };
        Ok((link, bytes))
    }

    /// Whether a read compares each piece that it touches with its checksum.
    pub fn is_checked(&self) -> bool {
        self.as_read.as_ref().is_some_and(|of| of.checked.is_some())
    }

    /// From now on a read is refused where the file has been written to since now, and with `verify` compares each piece
    /// that it touches with its checksum, once.
    ///
    /// # Errors
    /// [`RestoreError::Read`].
    pub fn check_as_read(&mut self, verify: bool) -> Result<(), RestoreError> {
        let is = self.file().and_then(File::metadata);
        let is = is.map_err(|source| self.unreadable(source))?;
        let pieces = self.map.pieces.iter();
        let words = u64::from(self.map.piece).div_ceil(PAGE_SIZE * u64::from(u64::BITS)) as usize;
        self.as_read = Some(AsRead {
            checked: verify.then(|| pieces.map(|_| AtomicU32::new(0)).collect()),
            zeros: OnceLock::new(),
            words,
            pieces: match verify && self.packed.is_none() {
                true => self.map.pieces.len(),
                false => 0,
            },
            look: Mutex::new(Look {
                number: 1,
                changed: (is.ctime(), is.ctime_nsec()),
            }),
            under_way: Mutex::default(),
            done: Condvar::new(),
            modified: is.modified().ok(),
            len: is.len(),
            data: OnceLock::new(),
        });
        Ok(())
    }

    /// Looks where the file has holes, so that [`stored_from`](Self::stored_from) knows of zeros page by page. Blocks for
    /// the file system; of a compressed file there is nothing to know. Ends early, and knows nothing, if `go_on` says so.
    pub fn find_holes(&self, go_on: impl Fn() -> bool) {
        let (Some(as_read), None, Some(memory)) = (&self.as_read, &self.packed, &self.memory)
        else {
            return;
        };
        let mut runs = Vec::new();
        for region in &self.map.regions {
            let mut at = region.offset;
            let end = region.offset + region.len;
            while at < end {
                let start = match seek(memory, at, libc::SEEK_DATA) {
                    Ok(start) if start < end => start,
                    Ok(_) => break,
                    Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
                    // Where it does not say, there may be anything.
                    Err(_) => return,
                };
                let Ok(hole) = seek(memory, start, libc::SEEK_HOLE) else {
                    return;
                };
                if hole <= start || !go_on() || runs.len() >= MOST_RUNS {
                    return;
                }
                at = hole.min(end);
                let guest = |at: u64| region.guest + (at - region.offset);
                runs.push(guest(start)..guest(at));
            }
        }
        // Only one looks.
        let _ = as_read.data.set(Ranges::of(runs));
    }

    /// From `at` on, an address of guest memory, up to `end` at most: whether what is stored is known to be zero, and
    /// where that ends. Reads nothing.
    pub fn stored_from(&self, at: u64, end: u64) -> (bool, u64) {
        if let Some(data) = self.as_read.as_ref().and_then(|of| of.data.get()) {
            return match data.within(at..end).next() {
                Some(run) if run.start == at => (false, run.end),
                Some(run) => (true, run.start),
                None => (true, end),
            };
        }
        let mut until = at;
        let mut zero = None;
        while until < end
            && let Some((number, place)) = self.map.locate(until)
        {
            let piece = self.map.pieces.get(number).copied().unwrap_or_default();
            let empty = piece.checksum.is_none();
            if *zero.get_or_insert(empty) != empty {
                break;
            }
            until = (place.guest + place.len).min(end);
            if !empty {
                break;
            }
        }
        match self.duplicates.within(at..until).next() {
            Some(same) if same.range.start == at => (false, same.range.end),
            Some(same) => (zero.unwrap_or(false), same.range.start),
            None => (zero.unwrap_or(false), until),
        }
    }

    /// Whether what is known to be zero at `range`, because [the file has nothing there](Self::find_holes), is: its pieces are
    /// compared with their checksums, as what was there may have been lost, and are looked at for zeros, as something may be
    /// there whatever the file system says. Each is read for that once; where the state says that it is zero nothing is, and
    /// where nobody compares anything the file system is believed.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::MemoryDamaged`], [`RestoreError::Changed`].
    pub fn are_zeros(&self, range: Range<u64>) -> Result<bool, RestoreError> {
        let mut zeros = true;
        self.read_unchanged(|look| {
            zeros = true;
            let mut at = range.start;
            while at < range.end
                && let Some((number, place)) = self.map.locate(at)
            {
                let end = place.guest + place.len;
                if self.packed.is_none() && self.is_checked() && !self.is_zero_piece(number) {
                    if self.is_unchecked(number, look) {
                        self.read_checked(number, place, 0, &mut [], look)?;
                    }
                    let pages = at - place.guest..end.min(range.end) - place.guest;
                    zeros &= self.were_zeros(number, pages);
                }
                at = end;
            }
            Ok(())
        })?;
        Ok(zeros)
    }

    /// Whether the pages at these bytes of a piece that was compared with its checksum were zero then.
    fn were_zeros(&self, number: usize, bytes: Range<u64>) -> bool {
        let Some(as_read) = &self.as_read else {
            return false;
        };
        let words = as_read.zeros_of(number);
        let mut pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        pages.all(|page| {
            let word = words.get((page / u64::from(u64::BITS)) as usize);
            // Relaxed: behind the look at `checked`, which was set behind it.
            word.is_some_and(|word| {
                word.load(Ordering::Relaxed) >> (page % u64::from(u64::BITS)) & 1 == 1
            })
        })
    }

    /// Its number.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it builds on; none of a full snapshot.
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    /// How many snapshots there are before it.
    pub fn depth(&self) -> u32 {
        self.parent.as_ref().map_or(0, |parent| parent.depth)
    }

    /// The pages that it has: all of a full one.
    pub fn own(&self) -> &Ranges {
        &self.own
    }

    /// Its regions and pieces.
    pub fn map(&self) -> &PageMap {
        &self.map
    }

    /// Its pages that are there once for many.
    pub fn duplicates(&self) -> &Duplicates {
        &self.duplicates
    }

    /// Its pages that are in its state as well; none of a snapshot that has not the section.
    pub fn first_pages(&self) -> Option<&Arc<FirstPages>> {
        self.first.as_ref()
    }

    /// Whether its memory is compressed, and so cannot be mapped.
    pub fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// The file of its memory, unless that is elsewhere.
    pub fn memory(&self) -> Option<&Arc<File>> {
        self.memory.as_ref()
    }

    fn file(&self) -> io::Result<&File> {
        self.memory
            .as_deref()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.file()?.read_exact_at(into, offset)
    }

    /// Whether the file has nothing there. A file system that cannot say so has everything everywhere.
    fn is_hole(&self, at: u64, len: u64) -> bool {
        match self.file().and_then(|file| seek(file, at, libc::SEEK_DATA)) {
            Ok(data) => data >= at + len,
            // Nothing from there to the end.
            Err(error) => error.raw_os_error() == Some(libc::ENXIO),
        }
    }

    /// Reads what it has at `range`, guest physical addresses that are [its own](Self::own), into `out`, which is as long.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::MemoryDamaged`].
    pub fn read(&self, range: Range<u64>, out: &mut [u8]) -> Result<(), RestoreError> {
        self.read_stored(range.start, out)?;
        for same in self.duplicates.within(range.clone()) {
            let (start, end) = (same.range.start - range.start, same.range.end - range.start);
            if let Some(part) = out.get_mut(start as usize..end as usize) {
                self.read_stored(same.of, part)?;
            }
        }
        Ok(())
    }

    /// What is stored for the pages from `at` on.
    fn read_stored(&self, at: u64, out: &mut [u8]) -> Result<(), RestoreError> {
        self.read_unchanged(|look| self.read_as(at, out, look))
    }

    fn read_as(&self, at: u64, out: &mut [u8], look: u32) -> Result<(), RestoreError> {
        let (mut at, mut rest) = (at, out);
        while !rest.is_empty() {
            let found = self.map.locate(at);
            let Some((number, place)) = found else {
                return Err(self.unreadable(io::ErrorKind::UnexpectedEof.into()));
            };
            let skip = at - place.guest;
            let len = (place.len - skip).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(len as usize);
            match &self.packed {
                // The state says so, whatever the file has.
                None if self.as_read.is_some() && self.is_zero_piece(number) => now.fill(0),
                None if self.is_unchecked(number, look) => {
                    self.read_checked(number, place, skip, now, look)?;
                }
                None => {
                    let read = self.read_at(now, place.offset + skip);
                    read.map_err(|source| self.unreadable(source))?;
                }
                Some(_) => {
                    let piece = self.piece(number, place, look)?;
                    let part = skip as usize..(skip + len) as usize;
                    now.copy_from_slice(piece.get(part).unwrap_or_default());
                }
            }
            (at, rest) = (at + len, later);
        }
        Ok(())
    }

    fn is_zero_piece(&self, number: usize) -> bool {
        let piece = self.map.pieces.get(number);
        piece.is_some_and(|piece| piece.checksum.is_none())
    }

    /// Whether a piece is to be compared with its checksum still.
    fn is_unchecked(&self, number: usize, look: u32) -> bool {
        let checked = self.as_read.as_ref().and_then(|of| of.checked.as_ref());
        let checked = checked.and_then(|of| of.get(number));
        // Acquire: which of its pages are zero was noted before.
        checked.is_some_and(|checked| checked.load(Ordering::Acquire) != look)
    }

    /// Reads a piece part by part, compares it with its checksum, and gives what begins at `skip` in it. Memory that nobody
    /// has had before costs more than the reading: no more is taken than a part. What was checked by another meanwhile is read.
    fn read_checked(
        &self,
        number: usize,
        place: Region,
        skip: u64,
        out: &mut [u8],
        look: u32,
    ) -> Result<(), RestoreError> {
        let _turn = self.as_read.as_ref().map(|of| of.turn(number));
        if !self.is_unchecked(number, look) {
            let read = self.read_at(out, place.offset + skip);
            return read.map_err(|source| self.unreadable(source));
        }
        self.will_need(place);
        let wanted = skip as usize..skip as usize + out.len();
        let mut sum = Checksum::new();
        let mut part = vec![0; PART.min(place.len as usize)];
        let zeros = self.as_read.as_ref().map(|of| of.zeros_of(number));
        let mut found = vec![0_u64; zeros.map_or(0, <[_]>::len)];
        let mut at = 0;
        while at < place.len as usize {
            let len = part.len().min(place.len as usize - at);
            let now = part.get_mut(..len).unwrap_or_default();
            let read = self.read_at(now, place.offset + at as u64);
            read.map_err(|source| self.unreadable(source))?;
            sum.update(now);
            for (page, bytes) in (at / PAGE_SIZE as usize..).zip(now.chunks(PAGE_SIZE as usize)) {
                let bits = u64::BITS as usize;
                if let Some(word) = found.get_mut(page / bits) {
                    *word |= u64::from(pages::is_zero(bytes)) << (page % bits);
                }
            }
            let both = wanted.start.max(at)..wanted.end.min(at + len);
            if !both.is_empty()
                && let Some(to) = out.get_mut(both.start - skip as usize..both.end - skip as usize)
            {
                to.copy_from_slice(now.get(both.start - at..both.end - at).unwrap_or_default());
            }
            at += len;
        }
        let piece = self.map.pieces.get(number).copied().unwrap_or_default();
        let written = piece.checksum.unwrap_or_default();
        match differs_from(written, sum.finalize()) {
            Some(what) => Err(self.damaged(place, what)),
            None => {
                for (word, found) in zeros.into_iter().flatten().zip(found) {
                    // Relaxed: it is handed over by what follows.
                    word.store(found, Ordering::Relaxed);
                }
                self.is_checked_now(number, look);
                Ok(())
            }
        }
    }

    /// Has the kernel read a piece as a whole, as it would not if it were read part by part.
    fn will_need(&self, place: Region) {
        if let Ok(file) = self.file() {
            begin_to_read(file, place.offset, place.len);
        }
    }

    /// Compares a piece with its checksum.
    fn check_piece(
        &self,
        number: usize,
        place: Region,
        bytes: &[u8],
        look: u32,
    ) -> Result<(), RestoreError> {
        let piece = self.map.pieces.get(number).copied().unwrap_or_default();
        if let Some(what) = differs(piece, bytes) {
            return Err(self.damaged(place, what));
        }
        self.is_checked_now(number, look);
        Ok(())
    }

    fn is_checked_now(&self, number: usize, look: u32) {
        let checked = self.as_read.as_ref().and_then(|of| of.checked.as_ref());
        if let Some(checked) = checked.and_then(|of| of.get(number)) {
            // Release: see above.
            checked.store(look, Ordering::Release);
        }
    }

    /// Reads, and refuses what was read from a file that was written to since [`check_as_read`](Self::check_as_read). Where it
    /// may have been, the read is done once more, and what it has to do with is compared with the checksums. The reader is
    /// told in which look it is.
    fn read_unchanged(
        &self,
        mut read: impl FnMut(u32) -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let Some(was) = &self.as_read else {
            return read(0);
        };
        let changed = || RestoreError::Changed {
            path: self.dir.join(MEMORY),
        };
        for _ in 0..MOST_LOOKS {
            // What is in it is whole after each statement.
            let before = *was.look.lock().unwrap_or_else(PoisonError::into_inner);
            read(before.number)?;
            let is = self.file().and_then(File::metadata);
            let is = is.map_err(|source| self.unreadable(source))?;
            if (is.modified().ok(), is.len()) != (was.modified, was.len) {
                return Err(changed());
            }
            let now = (is.ctime(), is.ctime_nsec());
            // Nobody compares with anything: it may as well have been renamed.
            if now == before.changed || was.checked.is_none() {
                return Ok(());
            }
            let mut look = was.look.lock().unwrap_or_else(PoisonError::into_inner);
            if *look == before {
                *look = Look {
                    number: before.number.wrapping_add(1).max(1),
                    changed: now,
                };
            }
        }
        Err(changed())
    }

    /// A piece of a compressed file.
    fn piece(&self, number: usize, place: Region, look: u32) -> Result<Arc<Vec<u8>>, RestoreError> {
        // What is in it is whole after each statement.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.iter().position(|(of, _)| *of == number)
            && let Some(found) = kept.remove(at)
        {
            let piece = found.1.clone();
            kept.push_back(found);
            return Ok(piece);
        }
        let mut piece = vec![0; place.len as usize];
        self.unpack(number, place, &mut piece)?;
        if self.is_unchecked(number, look) {
            self.check_piece(number, place, &piece, look)?;
        }
        let piece = Arc::new(piece);
        if kept.len() as u64 >= KEPT / u64::from(self.map.piece) {
            kept.pop_front();
        }
        kept.push_back((number, piece.clone()));
        Ok(piece)
    }

    /// Takes a piece out of a compressed file, into zeros.
    fn unpack(&self, number: usize, place: Region, piece: &mut [u8]) -> Result<(), RestoreError> {
        let stored = self.packed.as_ref().and_then(|(packed, offsets)| {
            Some((*packed.pieces.get(number)?, *offsets.get(number)?))
        });
        let Some((stored, offset)) = stored else {
            return Err(self.damaged(place, "it is not in the table".into()));
        };
        let read = |bytes: &mut [u8]| {
            let read = self.read_at(bytes, offset);
            read.map_err(|source| self.unreadable(source))
        };
        match stored {
            Stored::Zero => Ok(()),
            Stored::Plain(_) => read(piece),
            Stored::Zstd(len) => {
                let mut frame = vec![0; len as usize];
                read(&mut frame)?;
                match zstd::bulk::decompress_to_buffer(&frame, piece) {
                    Ok(len) if len as u64 == place.len => Ok(()),
                    Ok(len) => Err(self.damaged(place, format!("only {len} bytes come out"))),
                    Err(error) => Err(self.damaged(place, error.to_string())),
                }
            }
        }
    }

    /// Compares memory with its checksums, which reads all of it that is not zero, and sees that there is nothing between.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::MemoryDamaged`].
    pub fn verify(&self) -> Result<(), RestoreError> {
        self.verify_room()?;
        let mut buffer = Vec::new();
        for (number, place) in self.map.places() {
            let piece = self.map.pieces.get(number).copied().unwrap_or_default();
            let nothing = match &self.packed {
                // The section says so of both, or is none.
                Some(_) => true,
                None => piece.checksum.is_none() && self.is_hole(place.offset, place.len),
            };
            if piece.checksum.is_none() && nothing {
                continue;
            }
            buffer.clear();
            buffer.resize(place.len as usize, 0);
            match &self.packed {
                Some(_) => self.unpack(number, place, &mut buffer)?,
                None => {
                    let read = self.read_at(&mut buffer, place.offset);
                    read.map_err(|source| self.unreadable(source))?;
                }
            }
            if let Some(what) = differs(piece, &buffer) {
                return Err(self.damaged(place, what));
            }
        }
        Ok(())
    }

    /// Compares what no piece is of with zero: the rest of the header, and what aligns the regions.
    fn verify_room(&self) -> Result<(), RestoreError> {
        // Which is no hole: the header is written there.
        let header = pages::HEADER as u64..FIRST;
        let mut room = Vec::new();
        if self.packed.is_none() {
            let mut at = FIRST;
            for region in &self.map.regions {
                room.push(at..region.offset);
                at = region.offset + region.len;
            }
        }
        let mut bytes = Vec::new();
        for Range { start, end } in std::iter::once(header).chain(room) {
            // Less than the regions are aligned to.
            let len = end - start;
            if len == 0 || self.is_hole(start, len) {
                continue;
            }
            bytes.resize(len as usize, 0);
            let read = self.read_at(&mut bytes, start);
            read.map_err(|source| self.unreadable(source))?;
            if !pages::is_zero(&bytes) {
                return Err(RestoreError::MemoryDamaged {
                    path: self.dir.join(MEMORY),
                    from: start,
                    to: end,
                    what: "there is nothing of the guest's, and it is not zero".into(),
                });
            }
        }
        Ok(())
    }

    fn unreadable(&self, source: io::Error) -> RestoreError {
        let path = self.dir.join(MEMORY);
        RestoreError::Read { path, source }
    }

    fn damaged(&self, place: Region, what: String) -> RestoreError {
        let number = self.map.locate(place.guest).map(|(number, _)| number);
        let packed = self.packed.as_ref().zip(number);
        let packed = packed.and_then(|((packed, offsets), number)| {
            let from = offsets.get(number)?;
            Some((*from, from + packed.pieces.get(number)?.len()))
        });
        let (from, to) = packed.unwrap_or((place.offset, place.offset + place.len));
        let path = self.dir.join(MEMORY);
        RestoreError::MemoryDamaged {
            path,
            from,
            to,
            what,
        }
    }
}

/// The sections of a file `state` that say where memory is.
struct Sections {
    id: SnapshotId,
    parent: Option<Parent>,
    own: Ranges,
    map: PageMap,
    packed: Option<Packed>,
    duplicates: Duplicates,
    first: Option<FirstPages>,
}

impl Sections {
    fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        let container = format::parse(bytes)?;
        let map = PageMap::parse(container.section(Kind::Memory)?)?;
        let of = |kind| container.section(kind).ok();
        let parent = of(Kind::Parent).map(Parent::parse).transpose()?;
        let sources = of(Kind::PageSources).map(Ranges::parse).transpose()?;
        let all = map.all();
        let own = match (&parent, sources) {
            (None, None) => all,
            (Some(_), Some(own)) => {
                if let Some(run) = own.subtract(&all).iter().next() {
                    let text = format!("it has pages at {:#x}, where no memory is", run.start);
                    return Err(StateError::Mismatch(text));
                }
                own
            }
            (parent, _) => {
                let missing = match parent {
                    Some(_) => Kind::PageSources,
                    None => Kind::Parent,
                };
                return Err(format::FormatError::Missing(missing).into());
            }
        };
        let packed = of(Kind::Packed);
        let packed = packed.map(|bytes| Packed::parse(bytes, &map)).transpose()?;
        let duplicates = match (of(Kind::Duplicates), &packed) {
            (None, _) => Duplicates::default(),
            (Some(bytes), Some(_)) => Duplicates::parse(bytes, &own)?,
            (Some(_), None) => return Err(format::FormatError::Missing(Kind::Packed).into()),
        };
        let first = of(Kind::FirstPages);
        let first = first.map(|bytes| FirstPages::parse(bytes, &map));
        Ok(Sections {
            first: first.transpose()?,
            id: container.id,
            parent,
            own,
            map,
            packed,
            duplicates,
        })
    }
}

/// The number of the snapshot in `dir`, by its state's header and table alone.
///
/// # Errors
/// [`RestoreError`], with the file's name in it.
pub fn id_of(dir: &Path) -> Result<SnapshotId, RestoreError> {
    let path = dir.join(STATE);
    let bytes = read_state(&path)?;
    let parsed = format::parse(&bytes).map(|container| container.id);
    parsed.map_err(|source| RestoreError::State {
        path,
        source: source.into(),
    })
}

/// `error`, with which the file `state` in `dir` was not found, as what is there instead of a snapshot.
fn said_of(dir: &Path, error: RestoreError) -> RestoreError {
    let is_missing = match &error {
        RestoreError::Read { source, .. } => matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        ),
        _ => false,
    };
    if !is_missing {
        return error;
    }
    let what = match std::fs::metadata(dir) {
        Ok(there) if there.is_dir() => NoSnapshot::Folder,
        Ok(_) => NoSnapshot::File {
            within: dir
                .parent()
                .filter(|dir| dir.join(STATE).is_file())
                .map(Path::to_owned),
        },
        Err(source) if source.kind() == io::ErrorKind::NotFound => NoSnapshot::Nothing,
        Err(_) => return error,
    };
    let dir = dir.to_owned();
    RestoreError::NoSnapshot { dir, what }
}

/// A file `state`, whole.
pub(super) fn read_state(path: &Path) -> Result<Vec<u8>, RestoreError> {
    let (file, len) = open(path)?;
    if len > format::MOST_BYTES {
        return Err(RestoreError::State {
            path: path.to_owned(),
            source: format::FormatError::Long(len).into(),
        });
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    let read = file.read_exact_at(&mut bytes, 0);
    read.map_err(|source| RestoreError::Read {
        path: path.to_owned(),
        source,
    })?;
    Ok(bytes)
}

/// A file of a snapshot, and its length.
pub(super) fn open(path: &Path) -> Result<(File, u64), RestoreError> {
    let read = |source| RestoreError::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before the file is opened, because opening a pipe waits for its other end.
    let is = std::fs::metadata(path).map_err(read)?;
    if !is.is_file() {
        let path = path.to_owned();
        return Err(RestoreError::NotAFile { path });
    }
    let file = File::open(path).map_err(read)?;
    let len = file.metadata().map_err(read)?.len();
    Ok((file, len))
}

/// What of `bytes` is not as it was written.
fn differs(piece: Piece, bytes: &[u8]) -> Option<String> {
    match piece.checksum {
        None if pages::is_zero(bytes) => None,
        None => Some("it was zero, and is not".into()),
        Some(written) => differs_from(written, format::checksum(bytes)),
    }
}

fn differs_from(written: u32, found: u32) -> Option<String> {
    (found != written)
        .then(|| format!("the checksum is {found:#010x}, and {written:#010x} was written"))
}

/// Has the kernel begin to read so much of a file, and does not wait for it. Where that cannot be done, nothing is lost.
pub(crate) fn begin_to_read(file: &File, from: u64, len: u64) {
    use std::os::fd::AsRawFd;
    let (from, len) = (from as libc::off_t, len as libc::off_t);
    // SAFETY: an open descriptor, and no pointer.
    let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), from, len, libc::POSIX_FADV_WILLNEED) };
}

/// `lseek`: where data, or a hole, is next.
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<u64> {
    use std::os::fd::AsRawFd;
    // SAFETY: an open descriptor; the position that it moves is nobody's, for all reads say theirs.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}
