//! Eight-bit and smaller floats, decoded to f32. Every value is exact in f32.

/// Decodes sign, `exp_bits` exponent bits and `man_bits` mantissa bits, without specials.
fn decode(bits: u8, exp_bits: u32, man_bits: u32, bias: i32) -> f32 {
    let exponent = i32::from(bits >> man_bits) & ((1 << exp_bits) - 1);
    let mantissa = f32::from(bits & ((1 << man_bits) - 1)) / (1u32 << man_bits) as f32;
    let magnitude = match exponent {
        0 => mantissa * exp2(1 - bias),
        e => (1.0 + mantissa) * exp2(e - bias),
    };
    if bits >> (exp_bits + man_bits) & 1 == 1 { -magnitude } else { magnitude }
}

/// `2^e` for `-149 <= e <= 127`.
pub fn exp2(e: i32) -> f32 {
    if e >= -126 { f32::from_bits(((e + 127) as u32) << 23) } else { f32::from_bits(1 << (e + 149)) }
}

/// E4M3 (the "fn" variant): maximum 448, no infinity, NaN is `0x7F` and `0xFF`.
pub fn e4m3_to_f32(bits: u8) -> f32 {
    if bits & 0x7F == 0x7F { f32::NAN } else { decode(bits, 4, 3, 7) }
}

/// E5M2: maximum 57344, with infinities and NaN.
pub fn e5m2_to_f32(bits: u8) -> f32 {
    match bits & 0x7F {
        0x7C => f32::INFINITY.copysign(if bits & 0x80 == 0 { 1.0 } else { -1.0 }),
        m if m > 0x7C => f32::NAN,
        _ => decode(bits, 5, 2, 15),
    }
}

/// E4M3 with bias 8 and neither infinity nor negative zero; NaN is `0x80`.
pub fn e4m3fnuz_to_f32(bits: u8) -> f32 {
    if bits == 0x80 { f32::NAN } else { decode(bits, 4, 3, 8) }
}

/// E5M2 with bias 16 and neither infinity nor negative zero; NaN is `0x80`.
pub fn e5m2fnuz_to_f32(bits: u8) -> f32 {
    if bits == 0x80 { f32::NAN } else { decode(bits, 5, 2, 16) }
}

/// E8M0, a power of two: `2^(bits - 127)`; `0xFF` is NaN.
pub fn e8m0_to_f32(bits: u8) -> f32 {
    if bits == 0xFF { f32::NAN } else { exp2(i32::from(bits) - 127) }
}

/// E2M3, a six-bit float: maximum 7.5, no specials. The two high bits are ignored.
pub fn e2m3_to_f32(bits: u8) -> f32 {
    decode(bits & 0x3F, 2, 3, 1)
}

/// E3M2, a six-bit float: maximum 28, no specials. The two high bits are ignored.
pub fn e3m2_to_f32(bits: u8) -> f32 {
    decode(bits & 0x3F, 3, 2, 3)
}

/// E2M1, the four-bit float of MXFP4 and NVFP4, by code.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(e4m3_to_f32(0x7E), 448.0);
        assert_eq!(e4m3_to_f32(0x01), exp2(-9));
        assert!(e4m3_to_f32(0xFF).is_nan());
        assert_eq!(e5m2_to_f32(0x7B), 57344.0);
        assert_eq!(e5m2_to_f32(0xFC), f32::NEG_INFINITY);
        assert_eq!(e8m0_to_f32(127), 1.0);
        assert_eq!(e8m0_to_f32(0), exp2(-127));
        assert_eq!(e8m0_to_f32(254), exp2(127));
        assert_eq!(e4m3fnuz_to_f32(0x7F), 240.0);
        assert_eq!(e5m2fnuz_to_f32(0x7F), 57344.0);
        for code in 0..16u8 {
            assert_eq!(decode(code, 2, 1, 1), E2M1[usize::from(code)]);
        }
    }
}
