//! What may be shown on a terminal. Output of scripts, names of hosts and messages of servers come from elsewhere; on a terminal a
//! control character in them could move the cursor, rename the window or hide what was printed. Nothing is changed when the output
//! goes to a file or a pipe: there the bytes are what is wanted.

use std::borrow::Cow;
use std::fmt::Write;

/// What to do with control characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escape {
    /// Leave everything as it is: the output is not a terminal.
    Nothing,
    /// Show all of them but line feed and tab in a visible spelling.
    All,
    /// The same, but let colours and other text attributes through.
    AllButColour,
}

/// Longest colour sequence that is let through, in bytes.
const MAX_SGR: usize = 40;

/// `text` as it may be printed.
#[must_use]
pub fn escape(text: &str, how: Escape) -> Cow<'_, str> {
    if how == Escape::Nothing || !text.chars().any(is_special) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if how == Escape::AllButColour
            && let Sgr::Whole(len) = sgr(rest)
        {
            out.push_str(&rest[..len]);
            rest = &rest[len..];
            continue;
        }
        if is_special(c) {
            push_visible(&mut out, c);
        } else {
            out.push(c);
        }
        rest = &rest[c.len_utf8()..];
    }
    Cow::Owned(out)
}

/// One line of something that was not printed by a script (a name, a message): control characters and line feeds made visible.
#[must_use]
pub fn one_line(text: &str) -> String {
    let flat: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    escape(&flat.join("; ").replace('\t', " "), Escape::All).into_owned()
}

/// [`escape`] for a text that arrives in pieces, where a colour sequence may be cut in two.
#[derive(Debug)]
pub struct Escaper {
    how: Escape,
    held: String,
}

impl Escaper {
    /// Nothing has arrived yet.
    #[must_use]
    pub fn new(how: Escape) -> Self {
        Self {
            how,
            held: String::new(),
        }
    }

    /// What may be printed of `piece` now.
    pub fn push(&mut self, piece: &str) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if self.how == Escape::AllButColour
            && let Some(at) = text.rfind('\u{1b}')
            && sgr(&text[at..]) == Sgr::Cut
        {
            self.held = text.split_off(at);
        }
        escape(&text, self.how).into_owned()
    }

    /// What is left when nothing more comes.
    pub fn finish(&mut self) -> String {
        escape(&std::mem::take(&mut self.held), self.how).into_owned()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Sgr {
    /// Not a colour sequence.
    No,
    /// The beginning of one, and the text ends.
    Cut,
    /// One of this many bytes.
    Whole(usize),
}

/// Whether `text` begins with a "select graphic rendition" sequence: `ESC [ digits ; : m`.
fn sgr(text: &str) -> Sgr {
    let mut bytes = text.bytes();
    if bytes.next() != Some(0x1b) {
        return Sgr::No;
    }
    match bytes.next() {
        None => return Sgr::Cut,
        Some(b'[') => {}
        Some(_) => return Sgr::No,
    }
    for (at, byte) in bytes.enumerate().take(MAX_SGR) {
        match byte {
            b'0'..=b'9' | b';' | b':' => {}
            b'm' => return Sgr::Whole(at + 3),
            _ => return Sgr::No,
        }
    }
    if text.len() < MAX_SGR { Sgr::Cut } else { Sgr::No }
}

fn is_special(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t')
        // Marks that change the direction of what follows: they can make a line read as something else.
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

fn push_visible(out: &mut String, c: char) {
    match c {
        '\r' => out.push_str("\\r"),
        c if u32::from(c) < 0x80 => {
            // Writing into a String cannot fail.
            let _ = write!(out, "\\x{:02x}", u32::from(c));
        }
        c => {
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_visible_and_layout_stays() {
        let nasty = "a\tb\nc\r\x1b]0;title\x07\x1b[2J\u{9b}31m\u{202e}é\x7f\0";
        assert_eq!(
            escape(nasty, Escape::All),
            "a\tb\nc\\r\\x1b]0;title\\x07\\x1b[2J\\u{9b}31m\\u{202e}é\\x7f\\x00"
        );
        assert_eq!(escape(nasty, Escape::Nothing), nasty);
        assert!(matches!(escape("plain ü\n", Escape::All), Cow::Borrowed(_)));
    }

    #[test]
    fn colours_pass_only_when_asked_for_and_nothing_else_does() {
        let text = "\x1b[1;31mred\x1b[0m\x1b[2Jx\x1b[mend\x1b";
        assert_eq!(
            escape(text, Escape::AllButColour),
            "\x1b[1;31mred\x1b[0m\\x1b[2Jx\x1b[mend\\x1b"
        );
        assert_eq!(
            escape(text, Escape::All),
            "\\x1b[1;31mred\\x1b[0m\\x1b[2Jx\\x1b[mend\\x1b"
        );
        let endless = format!("\x1b[{}m", "1".repeat(200));
        assert!(escape(&endless, Escape::AllButColour).starts_with("\\x1b["));
    }

    #[test]
    fn a_sequence_cut_between_two_pieces_is_kept_whole() {
        let text = "a\x1b[1;31mred\x1b[0mé\x1b]x";
        for cut in (0..=text.len()).filter(|at| text.is_char_boundary(*at)) {
            let mut escaper = Escaper::new(Escape::AllButColour);
            let mut out = escaper.push(&text[..cut]);
            out += &escaper.push(&text[cut..]);
            out += &escaper.finish();
            assert_eq!(out, escape(text, Escape::AllButColour), "cut at {cut}");
        }
        let mut escaper = Escaper::new(Escape::AllButColour);
        assert_eq!(escaper.push("x\x1b[3"), "x");
        assert_eq!(escaper.finish(), "\\x1b[3");
    }

    #[test]
    fn a_message_of_several_lines_becomes_one() {
        assert_eq!(one_line("first\n\n  second\tx\r\n\x1b[1m"), "first; second x; \\x1b[1m");
    }
}
