//! Ctrl-C and termination: unfinished output is removed and the exit code tells the signal.

/// Watches for SIGINT and SIGTERM on a thread of its own. The exit code is 128 and the number of the signal.
#[cfg(unix)]
pub(crate) fn watch() -> std::io::Result<()> {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals;

    // A write beyond the limit on file sizes shall fail, as on a full disk, rather than end the process.
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            quant::remove_unfinished();
            crate::output::say(if signal == SIGINT { "interrupted" } else { "terminated" });
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

/// Other systems end the process themselves.
#[cfg(not(unix))]
pub(crate) fn watch() -> std::io::Result<()> {
    Ok(())
}
