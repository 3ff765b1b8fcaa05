// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a walk is compared with.

use dirty_log::PageRun;

/// What the host reads at most: each word once, in as wide pieces as the compiler makes of it.
pub fn read(words: &[u64]) -> u64 {
    let mut all = [0; 32];
    for piece in words.chunks_exact(all.len()) {
        all.iter_mut()
            .zip(piece)
            .for_each(|(all, word)| *all |= word);
    }
    all.iter().fold(0, |one, other| one | other)
}

/// One question a page, as the loops of peers ask it, with their merging of neighbours.
pub fn bit_by_bit(words: &[u64], mut run: impl FnMut(PageRun)) {
    let mut open: Option<PageRun> = None;
    for (index, word) in words.iter().enumerate() {
        for bit in 0..64 {
            let page = index as u64 * 64 + bit;
            if word & (1 << bit) != 0 {
                match &mut open {
                    Some(run) => run.pages += 1,
                    None => {
                        open = Some(PageRun {
                            first: page,
                            pages: 1,
                        })
                    }
                }
            } else if let Some(done) = open.take() {
                run(done);
            }
        }
    }
    if let Some(done) = open {
        run(done);
    }
}
