//! Progress of a run: one line on the terminal, rewritten in place.

use indicatif::{ProgressBar, ProgressStyle};
use skein_testkit::timeline::Timeline;
use tokio::time::{Duration, Instant, sleep};

use crate::signals;

/// Interval between two updates.
const EVERY: Duration = Duration::from_millis(200);

/// A line on the terminal; hidden if standard error is no terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    shown: Option<Instant>,
}

impl Progress {
    /// A hidden line, for worker processes.
    pub(crate) fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), shown: None }
    }

    /// An empty line.
    pub(crate) fn new() -> Self {
        let style =
            ProgressStyle::with_template("{elapsed:>4} {msg}").expect("the template is valid");
        Self { bar: ProgressBar::new_spinner().with_style(style), shown: None }
    }

    /// Shows the progress until `completed` completes or a signal arrives. `read_timeline` receives
    /// a function that shows a timeline. Returns whether a signal interrupted it.
    pub(crate) async fn until(
        mut self,
        completed: impl Future<Output = ()>,
        read_timeline: impl Fn(&mut dyn FnMut(&mut Timeline)),
    ) -> bool {
        let mut completed = std::pin::pin!(completed);
        let mut interrupted = std::pin::pin!(signals::interrupted());
        loop {
            // All arms are cancel-safe.
            tokio::select! {
                () = &mut completed => return false,
                () = &mut interrupted => return true,
                () = sleep(EVERY) => read_timeline(&mut |timeline| self.show(timeline)),
            }
        }
    }

    /// Rewrites the line, at most once per interval.
    pub(crate) fn show(&mut self, timeline: &mut Timeline) {
        let now = Instant::now();
        if self.bar.is_hidden() || self.shown.is_some_and(|at| now.duration_since(at) < EVERY) {
            return;
        }
        self.shown = Some(now);
        timeline.advance_to(now);
        let open = timeline.open();
        let last = timeline.last().map(|second| {
            let p99 = second.latencies().value_at_quantile(0.99) as f64 / 1e3;
            let (acks, deliveries) = (second.acks, second.deliveries);
            format!(", {acks} acknowledged/s, {deliveries} delivered/s, p99 {p99:.1} ms")
        });
        self.bar.set_message(format!("{open} connections{}", last.unwrap_or_default()));
        self.bar.tick();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
