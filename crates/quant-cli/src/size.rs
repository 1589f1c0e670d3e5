//! Byte counts as people write and read them.

/// Reads `3.2GiB`, `800MB`, `4096`: decimal units with B, binary units with iB; a bare letter is binary.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unit {unit} is unknown; write 3.2GiB, 800MB or a number of bytes")),
    };
    let value = number.parse::<f64>().map_err(|_| "write 3.2GiB, 800MB or a number of bytes".to_owned())?;
    let bytes = value * factor;
    // Beyond 2^53 bytes (9 PB) a float no longer holds every number of bytes.
    if !(1.0..=9e15).contains(&bytes) {
        return Err("it must be at least one byte and below 9 PB".to_owned());
    }
    Ok(bytes.round() as u64)
}

/// Three digits and a binary unit.
pub(crate) fn show(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 1023.5 would be shown as 1024.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match () {
        () if unit == 0 => format!("{bytes} B"),
        () if value < 9.995 => format!("{value:.2} {}", UNITS[unit]),
        () if value < 99.95 => format!("{value:.1} {}", UNITS[unit]),
        () => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// Seconds in the largest fitting units: `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub(crate) fn show_seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 10.0 => format!("{seconds:.2} s"),
        _ if seconds < 59.95 => format!("{seconds:.1} s"),
        0..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_systems() {
        for (text, bytes) in [
            ("4096", 4096),
            ("800MB", 800_000_000),
            ("3.2GiB", 3_435_973_837),
            ("1.5 kib", 1536),
            ("2G", 2 << 30),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "-1", "0", "1XB", "1e99", "99999999TB", "1.2.3", "GiB"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(show(999), "999 B");
        assert_eq!(show(1000), "0.98 KiB");
        assert_eq!(show(1536), "1.50 KiB");
        assert_eq!(show(1023 << 20), "1.00 GiB");
        assert_eq!(show(345 << 20), "345 MiB");
        assert_eq!(show_seconds(0.416), "0.42 s");
        assert_eq!(show_seconds(59.99), "1 min 00 s");
        assert_eq!(show_seconds(7384.0), "2 h 03 min");
    }
}
