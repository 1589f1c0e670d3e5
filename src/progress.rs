//! How long-running work tells its caller where it stands.

/// Receives news of long-running work. All methods may be called from one thread at a time only.
pub trait Progress: Sync {
    /// A phase of `units` of work begins.
    fn begin(&self, phase: &str, units: u64);
    /// `units` more are done; `item` is what was just finished or is being worked on.
    fn advance(&self, item: &str, units: u64);
    /// The phase has ended.
    fn end(&self);
    /// Something the user should know.
    fn note(&self, text: &str);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: &str, _: u64) {}
    fn end(&self) {}
    fn note(&self, _: &str) {}
}
