// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hostile files out of good ones, the same in every run.

/// xorshift64*: the tests want the same bytes everywhere, not good randomness.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Numbers at which sizes and offsets overflow.
const NASTY: [u64; 12] = [
    0,
    1,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_f000,
    0xffff_ffff_ffff_ffff,
    0xc000_0000,
    0xfee0_0000,
];

/// Changes `image` in one to four places of its first `headers` bytes (or cuts it short).
pub fn mutate(image: &[u8], headers: usize, random: &mut Random) -> Vec<u8> {
    let mut image = image.to_vec();
    for _ in 0..1 + random.below(4) {
        let headers = headers.min(image.len());
        if headers < 16 {
            break;
        }
        match random.below(8) {
            0 => image[random.below(headers)] = random.next() as u8,
            1 => image[random.below(headers)] ^= 1 << random.below(8),
            2..=5 => {
                let width = [1, 2, 4, 8][random.below(4)];
                let at = random.below(headers / width) * width;
                let value = NASTY[random.below(NASTY.len())];
                let value = match random.below(3) {
                    0 => value.wrapping_sub(random.below(4096) as u64),
                    1 => value.wrapping_add(random.below(4096) as u64),
                    _ => value,
                };
                image[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
            6 => {
                let (from, to) = (random.below(headers - 8), random.below(headers - 8));
                image.copy_within(from..from + 8, to);
            }
            _ if random.below(4) == 0 => image.truncate(random.below(image.len())),
            _ => {}
        }
    }
    image
}
