// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes a pseudo-random sequence of pages by itself, as fast as it can.

crate::blob!(
    /// 32-bit flat protected mode without paging, position-independent, no stack. Takes `ecx` steps
    /// (not 0) from the state `esi` and halts; each writes the new state, 4 bytes, at `ebx` in one of the
    /// `ebp + 1` pages (a power of two) from address `edi`: [`page_sequence_step`] says which.
    page_sequence,
    "
    .code32
    2:  imul esi, esi, 1664525
        add esi, 1013904223
        mov eax, esi
        shr eax, 12
        and eax, ebp
        shl eax, 12
        add eax, edi
        mov [eax + ebx], esi
        dec ecx
        jnz 2b
        hlt
    "
);

/// The state after a step from `state`, and the page that it writes, of `pages` (a power of two).
pub const fn page_sequence_step(state: u32, pages: u32) -> (u32, u32) {
    let state = state.wrapping_mul(1664525).wrapping_add(1013904223);
    (state, state >> 12 & pages.wrapping_sub(1))
}
