//! Text that goes to standard output and standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Where results go, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// One JSON object instead of text.
    pub(crate) json: bool,
    /// 0 with `--quiet`, 1 normally, more with each `--verbose`.
    pub(crate) verbosity: u8,
}

impl Output {
    /// Writes a result: `value` as the one JSON object, or the text that `text` makes.
    pub(crate) fn result<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.json {
            let json = serde_json::to_string(value).expect("results are plain data");
            print(&format!("{}\n", escape_json(&json)))
        } else {
            print(&escape(&text()))
        }
    }

    /// Says something on standard error unless `--quiet` was given.
    pub(crate) fn note(self, text: impl Display) {
        if self.verbosity > 0 {
            say(&escape(&text.to_string()));
        }
    }

    /// True if standard error is a terminal on which lines can be redrawn.
    pub(crate) fn redraws(self) -> bool {
        self.verbosity > 0 && io::stderr().is_terminal()
    }
}

/// Writes to standard output and flushes it.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::stdout)
}

/// Writes a line to standard error. There is nobody to tell when that fails.
pub(crate) fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// True for characters that can drive a terminal or reorder a line: controls and marks of direction.
fn is_hostile(c: char) -> bool {
    let reorders = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() && c != '\n' && c != '\t' || reorders
}

/// Replaces hostile characters by their escapes. Text that comes from files is on its way to a terminal.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hostile(c) { safe.extend(c.escape_unicode()) } else { safe.push(c) }
    }
    safe
}

/// The same for JSON, where only characters above ASCII are left raw in strings.
fn escape_json(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        if is_hostile(c) { safe.push_str(&format!("\\u{:04x}", u32::from(c))) } else { safe.push(c) }
    }
    safe
}

/// Columns of text, the first aligned left and numbers aligned right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    headed: bool,
}

impl Table {
    /// A table with a line of headings.
    pub(crate) fn with_head(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(ToString::to_string).collect()], headed: true }
    }

    /// A table of names and values.
    pub(crate) fn plain() -> Self {
        Self { rows: Vec::new(), headed: false }
    }

    /// Adds a line.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// Adds a name and its value.
    pub(crate) fn pair(&mut self, name: &str, value: impl Display) {
        self.row([name.to_owned(), value.to_string()]);
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Cells are made safe first: an escape is longer than its character.
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().map(|cell| escape(cell)).collect()).collect();
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let body = || rows.iter().skip(usize::from(self.headed));
        let width = |c: usize| {
            rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let is_number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
        let right = |c: usize| c > 0 && self.headed && body().filter_map(|r| r.get(c)).all(is_number);
        let layout: Vec<(usize, bool)> = (0..columns).map(|c| (width(c), right(c))).collect();
        for row in &rows {
            let mut line = String::new();
            for (cell, &(width, right)) in row.iter().zip(&layout) {
                if right {
                    line.push_str(&format!("{cell:>width$}  "));
                } else {
                    line.push_str(&format!("{cell:<width$}  "));
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_characters_do_not_reach_a_terminal() {
        assert_eq!(escape("a\u{1b}[2J\u{9b}\u{202e}\tb\n晴"), "a\\u{1b}[2J\\u{9b}\\u{202e}\tb\n晴");
        let json = serde_json::to_string("\u{1b}\u{9b}\u{202e}晴").unwrap();
        let safe = escape_json(&json);
        assert!(safe.chars().all(|c| !is_hostile(c)), "{safe}");
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), "\u{1b}\u{9b}\u{202e}晴");
    }

    #[test]
    fn tables_align() {
        let mut table = Table::with_head(&["name", "bits", "note"]);
        table.row(["a".into(), "4".into(), "x".into()]);
        table.row(["long".into(), "16".into(), String::new()]);
        assert_eq!(table.to_string(), "name  bits  note\na        4  x\nlong    16\n");
        let mut pairs = Table::plain();
        pairs.pair("size", 3);
        pairs.pair("a", "b");
        assert_eq!(pairs.to_string(), "size  3\na     b\n");
    }
}
