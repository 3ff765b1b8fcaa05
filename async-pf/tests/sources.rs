// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source delivers the right bytes, or says what was wrong and whether to try again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use async_pf::{
    CompositeSource, Fetched, FilePiece, FileSource, PageSource, SourceError, SparseSource,
    ZeroSource,
};
use memslots::{Gfn, PAGE_SIZE};
use proptest::prelude::*;

const PAGE: usize = 4096;

/// A file of `pages` pages, each filled with bytes that name it, behind `head` other bytes.
fn file(head: usize, pages: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0xee; head]).unwrap();
    for page in 0..pages {
        file.write_all(&contents(page)).unwrap();
    }
    file
}

fn contents(page: u64) -> Vec<u8> {
    page.to_le_bytes().into_iter().cycle().take(PAGE).collect()
}

fn piece(first: u64, pages: u64, offset: u64) -> FilePiece {
    FilePiece {
        first: Gfn(first),
        pages,
        offset,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn each_page_comes_from_its_place_in_the_file(
        head in 0usize..100, lengths in proptest::collection::vec(1u64..6, 1..5),
        gaps in proptest::collection::vec(0u64..3, 5), first in 0u64..40, count in 1u64..12,
    ) {
        // Pieces in reverse order of the file, so that guest order and file order differ.
        let total: u64 = lengths.iter().sum();
        let (mut gfn, mut file_page) = (3, total);
        let mut pieces = Vec::new();
        let mut model = std::collections::BTreeMap::new();
        for (length, gap) in lengths.iter().zip(&gaps) {
            file_page -= length;
            gfn += gap;
            pieces.push(piece(gfn, *length, head as u64 + file_page * PAGE as u64));
            for page in 0..*length {
                model.insert(gfn + page, file_page + page);
            }
            gfn += length;
        }
        let source = FileSource::new(file(head, total), pieces).unwrap();
        let mut buffer = vec![0; count as usize * PAGE];
        match (first..first + count).find(|gfn| !model.contains_key(gfn)) {
            None => {
                prop_assert_eq!(source.fetch(Gfn(first), &mut buffer).unwrap(), Fetched::Bytes);
                for (page, bytes) in (first..).zip(buffer.chunks(PAGE)) {
                    prop_assert_eq!(bytes, &contents(model[&page])[..]);
                }
            }
            Some(missing) => match source.fetch(Gfn(first), &mut buffer) {
                Err(SourceError::NoSuchPage { gfn }) => prop_assert_eq!(gfn, Gfn(missing)),
                other => prop_assert!(false, "{other:?}"),
            },
        }
    }
}

#[test]
fn a_file_that_shrinks_is_a_short_read_and_not_worth_a_retry() {
    let file = file(0, 4);
    let source = FileSource::new(file.try_clone().unwrap(), [piece(0, 4, 0)]).unwrap();
    file.set_len(2 * PAGE as u64 + 100).unwrap();
    let mut page = [0; PAGE];
    assert!(source.fetch(Gfn(1), &mut page).is_ok());
    let error = source.fetch(Gfn(2), &mut page).unwrap_err();
    assert!(matches!(
        error,
        SourceError::ShortRead {
            gfn: Gfn(2),
            offset: 8192,
            got: 100,
            want: 4096
        }
    ));
    assert!(!error.is_transient());
    assert_eq!(
        error.to_string(),
        "gfn 0x2: the file ends after 100 of 4096 bytes at offset 0x2000"
    );
}

#[test]
fn a_read_that_the_kernel_refuses_carries_its_errno_and_may_be_retried() {
    // A directory opens and refuses to be read: EISDIR.
    let source = FileSource::new(File::open("/").unwrap(), [piece(0, 1, 0)]).unwrap();
    match source.fetch(Gfn(0), &mut [0; PAGE]).unwrap_err() {
        error @ SourceError::Read { .. } => assert!(error.is_transient()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn pieces_are_checked_before_a_guest_runs() {
    let new = |pieces: &[FilePiece]| FileSource::new(file(0, 4), pieces.iter().copied());
    assert!(new(&[]).is_ok());
    assert!(
        new(&[piece(7, 0, u64::MAX)]).is_ok(),
        "an empty piece is no piece"
    );
    assert!(
        new(&[piece(4, 2, 0), piece(2, 2, 0)]).is_ok(),
        "in any order"
    );
    assert!(matches!(
        new(&[piece(4, 2, 0), piece(3, 2, 0)]),
        Err(SourceError::Layout {
            gfn: Gfn(4),
            pages: 2
        })
    ));
    assert!(matches!(
        new(&[piece(u64::MAX, 2, 0)]),
        Err(SourceError::Layout { .. })
    ));
    assert!(matches!(
        new(&[piece(0, u64::MAX, 0)]),
        Err(SourceError::Layout { .. })
    ));
    assert!(matches!(
        new(&[piece(0, 1, u64::MAX)]),
        Err(SourceError::Layout { .. })
    ));
    assert!(matches!(
        new(&[piece(9, 2, 3 * 4096)]),
        Err(SourceError::FileTooShort {
            gfn: Gfn(9),
            end: 0x5000,
            len: 0x4000
        })
    ));
}

#[test]
fn a_buffer_that_is_no_whole_number_of_pages_is_refused() {
    let source = FileSource::new(file(0, 2), [piece(0, 2, 0)]).unwrap();
    for bytes in [0, 1, PAGE - 1, PAGE + 1] {
        let mut buffer = vec![0; bytes];
        for source in [&source as &dyn PageSource, &ZeroSource] {
            match source.fetch(Gfn(0), &mut buffer) {
                Err(SourceError::Buffer { bytes: said }) => assert_eq!(said, bytes),
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(source.fetch(Gfn(u64::MAX), &mut [0; PAGE]).is_err());
}

#[test]
fn zero_pages_are_told_not_written() {
    let mut page = [7; PAGE];
    assert_eq!(
        ZeroSource.fetch(Gfn(123), &mut page).unwrap(),
        Fetched::Zero
    );
    assert_eq!(page, [7; PAGE]);
}

/// Page `gfn` of a file in which every page is full of its number.
fn numbered(pages: u64) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all(&[page as u8; PAGE_SIZE as usize]).unwrap();
    }
    file
}

proptest! {
    /// A sparse source and a composite one give, page by page and in one call, what a plain array of pages says.
    #[test]
    fn sparse_and_composite_sources_are_an_array_of_pages(
        runs in proptest::collection::vec((0u64..4, 1u64..5), 1..6),
        first in 0u64..30,
        pages in 1u64..12,
        split in 0u64..30,
    ) {
        let (mut pieces, mut truth, mut offset) = (Vec::new(), Vec::new(), 0);
        for (gap, length) in runs {
            truth.extend(vec![0; gap as usize]);
            let piece = FilePiece {
                first: Gfn(truth.len() as u64),
                pages: length,
                offset: offset * PAGE_SIZE,
            };
            pieces.push(piece);
            truth.extend((offset..offset + length).map(|page| page as u8));
            offset += length;
        }
        let all = truth.len() as u64;
        let sparse = || -> Arc<dyn PageSource> {
            let pieces = pieces.iter().copied();
            Arc::new(SparseSource::new(numbered(offset), pieces, Gfn(0)..Gfn(all)).unwrap())
        };
        let split = split.min(all);
        let parts = [(Gfn(split)..Gfn(all), sparse()), (Gfn(0)..Gfn(split), sparse())];
        let composite: Arc<dyn PageSource> = Arc::new(CompositeSource::new(parts).unwrap());
        for source in [sparse(), composite] {
            let mut buffer = vec![0xee; (pages * PAGE_SIZE) as usize];
            let fetched = source.fetch(Gfn(first), &mut buffer);
            if first + pages > all {
                let refused = matches!(fetched, Err(SourceError::NoSuchPage { .. }));
                prop_assert!(refused);
                continue;
            }
            let expected = &truth[first as usize..(first + pages) as usize];
            match fetched.unwrap() {
                Fetched::Zero => prop_assert!(expected.iter().all(|byte| *byte == 0)),
                Fetched::Bytes => {
                    for (page, byte) in buffer.chunks(PAGE_SIZE as usize).zip(expected) {
                        prop_assert!(page.iter().all(|b| b == byte));
                    }
                }
                other => prop_assert!(false, "{other:?}"),
            }
            let run = source.run(Gfn(first), pages);
            prop_assert!((1..=pages).contains(&run));
        }
    }
}

#[test]
fn sparse_and_composite_sources_refuse_what_does_not_fit() {
    let piece = FilePiece {
        first: Gfn(3),
        pages: 2,
        offset: 0,
    };
    let error = SparseSource::new(numbered(2), [piece], Gfn(0)..Gfn(4)).unwrap_err();
    assert!(matches!(
        error,
        SourceError::Layout {
            gfn: Gfn(3),
            pages: 2
        }
    ));
    let zeros: Arc<dyn PageSource> = Arc::new(ZeroSource);
    let overlapping = [(Gfn(0)..Gfn(5), zeros.clone()), (Gfn(4)..Gfn(6), zeros)];
    let error = CompositeSource::new(overlapping).unwrap_err();
    assert!(matches!(error, SourceError::Layout { gfn: Gfn(4), .. }));
}
