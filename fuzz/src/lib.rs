//! Fuzz targets over the readers of `quant`. `cargo +nightly fuzz run NAME` needs cargo-fuzz; `run.sh` does not.

pub mod targets;

pub use libfuzzer_sys::fuzz_target;

/// A scratch folder that lives as long as the process.
pub fn scratch() -> &'static std::path::Path {
    static FOLDER: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path()
}

/// The entry point of one target.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        $crate::fuzz_target!(|bytes: &[u8]| {
            let target = $crate::targets::TARGETS.iter().find(|t| t.name == $name).expect("a known target");
            (target.run)($crate::scratch(), bytes);
        });
    };
}
