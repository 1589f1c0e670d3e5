//! Names from files, made safe to print.

use std::fmt::{self, Write};
use std::path::Path;

/// Characters of a name that are shown; a hostile header can hold names of megabytes.
const SHOWN: usize = 200;

/// Shows a name from a file with control, invisible and direction-changing characters escaped, so that it
/// can't drive a terminal, and cut after 200 characters.
///
/// ```
/// let name = quant_formats::display_name("a\u{1b}[2Jb").to_string();
/// assert_eq!(name, "a\\u{1b}[2Jb");
/// ```
pub fn display_name(name: &str) -> DisplayName<'_> {
    DisplayName(name)
}

/// The same for a path.
pub fn display_path(path: &Path) -> String {
    display_name(&path.to_string_lossy()).to_string()
}

/// See [`display_name`].
#[derive(Clone, Copy, Debug)]
pub struct DisplayName<'a>(&'a str);

impl fmt::Display for DisplayName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("\"\"");
        }
        for (i, c) in self.0.chars().enumerate() {
            match c {
                _ if i == SHOWN => return f.write_char('…'),
                '\'' | '"' | '\\' => f.write_char(c)?,
                _ => write!(f, "{}", c.escape_debug())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        let hostile = "a\nb\x1b]0;x\x07\u{202e}\u{9b}\0é'";
        let shown = display_name(hostile).to_string();
        assert!(shown.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{shown}");
        assert!(shown.ends_with("é'"));
        assert_eq!(display_name("").to_string(), "\"\"");
        assert_eq!(display_name(&"x".repeat(1000)).to_string().chars().count(), SHOWN + 1);
    }
}
