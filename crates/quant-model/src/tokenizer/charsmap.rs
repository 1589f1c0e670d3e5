//! The compiled map of characters inside SentencePiece normalizers.

/// Checks a `precompiled_charsmap`: a little-endian length, a double-array trie of 32-bit units of that many bytes,
/// then the replacements, each ended by a zero byte. Every look-up that a text can cause must stay inside.
pub(super) fn check(base64: &str) -> Result<(), String> {
    let bytes = decode_base64(base64).ok_or("the precompiled charsmap is no base64")?;
    let (size, rest) =
        bytes.split_first_chunk().ok_or("the precompiled charsmap is shorter than its length")?;
    let size = u32::from_le_bytes(*size) as usize;
    if size > rest.len() || !size.is_multiple_of(4) || size == 0 {
        let have = rest.len();
        return Err(format!("the precompiled charsmap has a trie of {size} bytes, {have} are present"));
    }
    let (trie, text) = rest.split_at(size);
    let text =
        std::str::from_utf8(text).map_err(|_| "the precompiled charsmap maps to text that is no UTF-8")?;
    let units: Vec<u32> = trie.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
    walk(&units, text)
}

/// Visits every unit that a key can reach.
fn walk(units: &[u32], text: &str) -> Result<(), String> {
    let outside = || "the precompiled charsmap has a trie that points outside itself".to_owned();
    let mut seen = vec![false; units.len()];
    let mut open = vec![0usize];
    seen[0] = true;
    while let Some(at) = open.pop() {
        let unit = units[at];
        let offset = (unit >> 10 << ((unit & 1 << 9) >> 6)) as usize;
        let base = at ^ offset;
        if at != 0 && unit >> 8 & 1 == 1 {
            let value = (units.get(base).ok_or_else(outside)? & (u32::MAX >> 1)) as usize;
            if !text.is_char_boundary(value) {
                return Err("the precompiled charsmap has a replacement outside its text".to_owned());
            }
        }
        // Any byte may follow in a text.
        for byte in 1..=255usize {
            let child = base ^ byte;
            let unit = *units.get(child).ok_or_else(outside)?;
            if unit & (1 << 31 | 0xff) == byte as u32 && !seen[child] {
                seen[child] = true;
                open.push(child);
            }
        }
    }
    Ok(())
}

fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.chunks(4) {
        let mut word = 0u32;
        for &letter in chunk {
            let value = match letter {
                b'A'..=b'Z' => letter - b'A',
                b'a'..=b'z' => letter - b'a' + 26,
                b'0'..=b'9' => letter - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            word = word << 6 | u32::from(value);
        }
        word <<= 6 * (4 - chunk.len());
        bytes.extend(&word.to_be_bytes()[1..chunk.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode_base64(bytes: &[u8]) -> String {
        const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for chunk in bytes.chunks(3) {
            let word = chunk.iter().fold(0u32, |w, &b| w << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
            let letter = |i: usize| char::from(LETTERS[(word >> (18 - 6 * i) & 63) as usize]);
            text.extend((0..4).map(|i| if i <= chunk.len() { letter(i) } else { '=' }));
        }
        text
    }

    /// A trie of 512 units that maps "a" to the text at `value`.
    fn map(value: u32, edit: impl Fn(&mut [u32])) -> Result<(), String> {
        let mut units = vec![0u32; 512];
        units[0] = 256 << 10; // children of the root at 256 ^ byte
        units[256 ^ 0x61] = 0x61 | 1 << 8; // a leaf; its value at its own place ^ 0
        units[256 ^ 0x61] |= 0x61 << 10; // ... moved to 256
        units[256] = value;
        edit(&mut units);
        let mut bytes = (units.len() as u32 * 4).to_le_bytes().to_vec();
        bytes.extend(units.iter().flat_map(|u| u.to_le_bytes()));
        bytes.extend("é\0".as_bytes());
        check(&encode_base64(&bytes))
    }

    #[test]
    fn base64_round_trips() {
        for len in 0..10 {
            let bytes: Vec<u8> = (0..len).map(|i| 200 - i * 7).collect();
            assert_eq!(decode_base64(&encode_base64(&bytes)).unwrap(), bytes);
        }
        assert_eq!(decode_base64("a*=="), None);
    }

    #[test]
    fn tries_must_stay_inside() {
        assert_eq!(map(0, |_| {}), Ok(()));
        assert!(map(1, |_| {}).is_err(), "inside a character");
        assert!(map(99, |_| {}).is_err(), "behind the text");
        assert!(map(0, |u| u[0] = 512 << 10).is_err(), "root");
        assert!(map(0, |u| u[256 ^ 0x61] = 0x61 | 4096 << 10).is_err(), "child");
        assert!(check("AAAAAP////8=").is_err(), "no units at all");
        assert!(check("").is_err());
    }
}
