//! Progress of long work on standard error: a bar on a terminal, lines elsewhere.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use quant::Progress;

use crate::output::{Output, escape, say};
use crate::size::show_seconds;

/// Shortest time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What standard error gets, by its kind and the verbosity asked for.
pub(crate) fn reporter(output: Output) -> Box<dyn Progress> {
    match output.verbosity {
        0 => Box::new(quant::Silent),
        _ if output.redraws() => Box::new(Bar { bar: Mutex::new(ProgressBar::hidden()) }),
        verbosity => Box::new(Lines { every_item: verbosity > 1, phase: Mutex::new(None) }),
    }
}

/// A bar with the time left, redrawn in place.
struct Bar {
    bar: Mutex<ProgressBar>,
}

impl Bar {
    fn bar(&self) -> ProgressBar {
        self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl Progress for Bar {
    fn begin(&self, phase: &str, units: u64) {
        let style = ProgressStyle::with_template("{prefix} {bar:30} {percent:>3}%  {eta} left  {wide_msg}");
        let bar = ProgressBar::with_draw_target(Some(units), ProgressDrawTarget::stderr())
            .with_style(style.expect("the template is right"))
            .with_prefix(escape(phase));
        bar.enable_steady_tick(Duration::from_millis(500));
        *self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
    }

    fn advance(&self, item: &str, units: u64) {
        let bar = self.bar();
        bar.inc(units);
        bar.set_message(escape(item));
    }

    fn end(&self) {
        self.bar().finish_and_clear();
    }

    fn note(&self, text: &str) {
        self.bar().suspend(|| say(&format!("note: {}", escape(text))));
    }
}

/// A line now and then.
struct Lines {
    every_item: bool,
    phase: Mutex<Option<Phase>>,
}

struct Phase {
    name: String,
    start: Instant,
    last: Instant,
    done: u64,
    units: u64,
}

impl Phase {
    fn line(&self, item: &str) -> String {
        let share = self.done as f64 / self.units.max(1) as f64;
        let left = self.start.elapsed().as_secs_f64() * (1.0 - share) / share.max(1e-9);
        let (name, left) = (&self.name, show_seconds(left));
        let item = if item.is_empty() { String::new() } else { format!(", {item}") };
        escape(&format!("{name}: {:.0}%, {left} left{item}", 100.0 * share))
    }
}

impl Progress for Lines {
    fn begin(&self, phase: &str, units: u64) {
        let now = Instant::now();
        let phase = Phase { name: phase.to_owned(), start: now, last: now, done: 0, units };
        say(&escape(&format!("{} ...", phase.name)));
        *self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(phase);
    }

    fn advance(&self, item: &str, units: u64) {
        let mut phase = self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(phase) = phase.as_mut() else { return };
        phase.done += units;
        if self.every_item || phase.last.elapsed() >= LINE_INTERVAL {
            phase.last = Instant::now();
            say(&phase.line(item));
        }
    }

    fn end(&self) {
        let phase = self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(phase) = phase {
            let took = show_seconds(phase.start.elapsed().as_secs_f64());
            say(&escape(&format!("{}: done in {took}", phase.name)));
        }
    }

    fn note(&self, text: &str) {
        say(&format!("note: {}", escape(text)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_share_and_time_left() {
        let start = Instant::now() - Duration::from_secs(30);
        let phase = Phase { name: "quantizing".into(), start, last: start, done: 1, units: 4 };
        assert_eq!(phase.line("up_proj"), "quantizing: 25%, 1 min 30 s left, up_proj");
        assert_eq!(phase.line(""), "quantizing: 25%, 1 min 30 s left");
    }
}
