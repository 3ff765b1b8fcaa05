// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Text of others' (paths, a peer's names and reasons) on its way to a terminal or a page.
//!
//! A terminal obeys control characters, and what shows text reorders it at Unicode's bidirectional controls: `U+202E` and
//! a few letters behind it make an address of another one. So who shows text escapes what has no picture of its own.

#![forbid(unsafe_code)]

use std::fmt::Write;

use serde_json::Value;

/// Whether a terminal shows this character, does nothing else at it, and leaves its neighbours where they are: no control,
/// no format character (Unicode's category Cf, the bidirectional controls among them) and no separator but the space, as
/// far as std knows.
pub fn is_plain(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    if is_invisible(c) {
        return false;
    }
    // What std would escape in a literal. Behind another character: at the beginning of a text it escapes as well what
    // combines with the one before, an accent for one.
    let mut pair = String::from("x");
    pair.push(c);
    pair.escape_debug().eq(pair.chars())
}

/// Letters and marks that have no picture, or are there to change their neighbour's: std prints them. By them two names are
/// told apart that look the same.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        // Fillers of Hangul, vowels of Khmer that are not written, the joiner of graphemes, the empty pattern of Braille.
        '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' | '\u{17b4}' | '\u{17b5}' | '\u{34f}' | '\u{2800}'
        // Variation selectors, Mongolian's first.
        | '\u{180b}'..='\u{180d}' | '\u{180f}' | '\u{fe00}'..='\u{fe0f}' | '\u{e0100}'..='\u{e01ef}'
        // Tags.
        | '\u{e0000}'..='\u{e007f}'
    )
}

/// A text that may be shown: nothing in it moves a cursor, begins a line or turns its direction.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match is_plain(c) {
            true => shown.push(c),
            false => shown.extend(c.escape_default()),
        }
    }
    shown
}

/// `value` as one line of JSON, its end included, which reads as the same and may be shown.
pub fn json_line(value: &Value) -> String {
    json_plain(&value.to_string()) + "\n"
}

/// JSON that reads as `json`, and may be shown as far as that has no line ends.
pub fn json_plain(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        // What is not ASCII can only be in a string; and there no control is.
        if c.is_ascii_whitespace() || is_plain(c) {
            plain.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // A string takes everything.
            let _ = write!(plain, "\\u{unit:04x}");
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_turns_text_round_or_has_no_picture_is_escaped_and_the_rest_is_left() {
        let ranges = [
            0x202a..=0x202e_u32,
            0x2066..=0x2069,
            0x200b..=0x200f,
            0x80..=0x9f,
            0xfe00..=0xfe0f,
            0xe0000..=0xe007f,
            0xe0100..=0xe01ef,
        ];
        let lone = [
            0x61c, 0xad, 0xfeff, 0x2028, 0x2029, 0x7f, 0x115f, 0x1160, 0x3164, 0xffa0, 0x2800,
            0x34f, 0x17b4, 0x180b,
        ];
        for code in ranges.into_iter().flatten().chain(lone).chain(0..0x20) {
            let c = char::from_u32(code).unwrap();
            assert!(!is_plain(c), "{code:#x}");
            let shown = printable(&format!("a{c}b"));
            assert!(shown.chars().all(is_plain) && shown.len() > 3, "{shown}");
        }
        for text in [
            "a path, with \"'\\ in it",
            "Grüße, 你好, שלום, é in two: e\u{301}",
        ] {
            assert_eq!(printable(text), text);
        }
        // Said twice it is escaped once.
        let once = printable("a\u{9b}\\b");
        assert_eq!((printable(&once), &*once), (once.clone(), "a\\u{9b}\\b"));
    }

    #[test]
    fn a_line_of_json_reads_as_what_it_is_of_and_turns_nothing_round() {
        let value = serde_json::json!({ "a\u{202e}": ["\u{9b}31m", "\u{e0041}", "\n", "ü\"", 1] });
        let line = json_line(&value);
        assert!(
            line.strip_suffix('\n').unwrap().chars().all(is_plain),
            "{line}"
        );
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }
}
