//! The `quant` binary.
fn main() {}
