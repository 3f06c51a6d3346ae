//! Traces of sampled messages and API calls, as OpenTelemetry spans (docs/adr/0021).
//!
//! A span is one value that its owner completes and hands to the [`Tracer`]. No span surrounds a
//! task or a connection, and an unsampled message has none: it costs one random number. Completed
//! spans wait in a bounded queue for the exporter; a full queue drops and counts them, so that no
//! part of the gateway ever waits for a collector.

use std::{
    borrow::Cow,
    fmt,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

pub use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId};
use opentelemetry::{
    Context, InstrumentationScope, KeyValue, Value,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{Link, SpanContext, TraceContextExt as _, TraceFlags, TraceState},
};
pub use opentelemetry_sdk::trace::SpanData;
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{SpanEvents, SpanLinks},
};
use parking_lot::Mutex;
use skein_protocol::position::Position;
use tokio::{sync::mpsc, time::Instant};

use super::{
    metrics::{Metrics, SpanResult},
    period_count::PeriodCount,
};

/// The most spans that wait for the exporter; further ones are dropped.
pub const QUEUE_LEN_MAX: usize = 2048;
/// Traces per second and node that the `traceparent` of client frames may request; the sampling
/// ratio decides on the others.
const CLIENT_TRACES_PER_SECOND_MAX: u32 = 10;
/// As [`CLIENT_TRACES_PER_SECOND_MAX`], for API calls.
const API_TRACES_PER_SECOND_MAX: u32 = 100;
const SECOND: Duration = Duration::from_secs(1);

/// Where a trace continues: a span of it, and whether that span is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: TraceId,
    /// A span of the trace.
    pub span_id: SpanId,
    /// Whether the trace is recorded.
    pub is_sampled: bool,
}

/// The text is no `traceparent` of W3C Trace Context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent")]
pub struct InvalidTraceparent;

/// The single field of a carrier.
struct Traceparent<'a>(&'a str);

impl Extractor for Traceparent<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

impl FromStr for TraceContext {
    type Err = InvalidTraceparent;

    fn from_str(text: &str) -> Result<Self, InvalidTraceparent> {
        // The propagator takes a version of any length.
        if text.as_bytes().get(2) != Some(&b'-') {
            return Err(InvalidTraceparent);
        }
        let propagator = TraceContextPropagator::new();
        let context = propagator.extract_with_context(&Context::new(), &Traceparent(text));
        let span = context.span();
        let span = span.span_context();
        if !span.is_valid() {
            return Err(InvalidTraceparent);
        }
        let (trace_id, span_id) = (span.trace_id(), span.span_id());
        Ok(Self { trace_id, span_id, is_sampled: span.is_sampled() })
    }
}

impl fmt::Display for TraceContext {
    /// Writes a `traceparent` of version 00: 55 characters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = u8::from(self.is_sampled);
        write!(f, "00-{}-{}-{flags:02x}", self.trace_id, self.span_id)
    }
}

impl TraceContext {
    /// The context of work that is not traced.
    pub const UNSAMPLED: Self =
        Self { trace_id: TraceId::INVALID, span_id: SpanId::INVALID, is_sampled: false };

    fn span_context(self) -> SpanContext {
        let flags = if self.is_sampled { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        SpanContext::new(self.trace_id, self.span_id, flags, true, TraceState::NONE)
    }
}

/// The sender of a `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceCaller {
    /// A client, in a frame.
    Client,
    /// The application, in the header of an API call.
    Application,
}

/// Decides which messages and calls are traced, and queues their spans for the exporter. Cheap to
/// clone. The default traces nothing.
#[derive(Clone, Debug, Default)]
pub struct Tracer(Option<Arc<Sampler>>);

#[derive(Debug)]
struct Sampler {
    /// Random numbers of 63 bits below it are sampled.
    threshold: u64,
    spans: mpsc::Sender<SpanData>,
    metrics: Arc<Metrics>,
    scope: InstrumentationScope,
    by_clients: Mutex<PeriodCount>,
    by_application: Mutex<PeriodCount>,
}

impl Tracer {
    /// Creates a tracer that samples the share `ratio` (0 to 1) of messages and calls, and the queue
    /// of completed spans that the exporter takes from.
    pub fn new(ratio: f64, metrics: Arc<Metrics>) -> (Self, mpsc::Receiver<SpanData>) {
        let (spans, queue) = mpsc::channel(QUEUE_LEN_MAX);
        let sampler = Sampler {
            threshold: (ratio.clamp(0.0, 1.0) * (1u64 << 63) as f64) as u64,
            spans,
            metrics,
            scope: InstrumentationScope::builder("skein").build(),
            by_clients: Mutex::new(PeriodCount::new()),
            by_application: Mutex::new(PeriodCount::new()),
        };
        (Self(Some(Arc::new(sampler))), queue)
    }

    /// Whether anything is traced.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The parent that a caller's `traceparent` names. `None` without tracing, if the text is no
    /// `traceparent`, or if it requests a trace beyond the rate of such requests, so that the
    /// sampling ratio decides.
    pub fn accept(&self, traceparent: &str, caller: TraceCaller) -> Option<TraceContext> {
        let sampler = self.0.as_ref()?;
        let parent: TraceContext = traceparent.parse().ok()?;
        let (taken, count_max) = match caller {
            TraceCaller::Client => (&sampler.by_clients, CLIENT_TRACES_PER_SECOND_MAX),
            TraceCaller::Application => (&sampler.by_application, API_TRACES_PER_SECOND_MAX),
        };
        if parent.is_sampled && !taken.lock().take(count_max, SECOND, Instant::now()) {
            sampler.metrics.trace_requests_ignored.inc();
            return None;
        }
        Some(parent)
    }

    /// Begins the span of a message or call. It is traced if its parent is, or without a parent if
    /// the sampling ratio selects it; otherwise `None`.
    pub fn begin(
        &self,
        name: impl Into<Cow<'static, str>>,
        kind: SpanKind,
        parent: Option<TraceContext>,
    ) -> Option<OpenSpan> {
        let sampler = self.0.as_ref()?;
        let trace_id = match parent {
            Some(parent) if parent.is_sampled => parent.trace_id,
            Some(_) => return None,
            None => sampler.sample()?,
        };
        Some(OpenSpan::new(sampler.clone(), name.into(), kind, trace_id, parent))
    }

    /// Begins a span in the trace of `cause` that has no parent and links to it: the work is one of
    /// several that `cause` set off, and may begin after its end.
    pub fn begin_linked(
        &self,
        name: &'static str,
        kind: SpanKind,
        cause: TraceContext,
    ) -> Option<OpenSpan> {
        let sampler = self.0.as_ref()?;
        let mut span = OpenSpan::new(sampler.clone(), name.into(), kind, cause.trace_id, None);
        span.links.links.push(Link::with_context(cause.span_context()));
        Some(span)
    }
}

impl Sampler {
    /// The id of a new trace, if it is sampled. The decision is that of OpenTelemetry's
    /// `TraceIdRatioBased`: other services with the same ratio select the same traces.
    fn sample(&self) -> Option<TraceId> {
        let low: u64 = rand::random();
        if low >> 1 >= self.threshold {
            return None;
        }
        Some(TraceId::from(u128::from(rand::random::<u64>()) << 64 | u128::from(low.max(1))))
    }
}

/// A span that has not ended. Dropped without an end, it is not recorded.
#[derive(Debug)]
pub struct OpenSpan {
    sampler: Arc<Sampler>,
    context: TraceContext,
    parent: SpanId,
    name: Cow<'static, str>,
    kind: SpanKind,
    start: SystemTime,
    attributes: Vec<KeyValue>,
    links: SpanLinks,
}

impl OpenSpan {
    fn new(
        sampler: Arc<Sampler>,
        name: Cow<'static, str>,
        kind: SpanKind,
        trace_id: TraceId,
        parent: Option<TraceContext>,
    ) -> Self {
        let span_id = SpanId::from(rand::random_range(1..=u64::MAX));
        Self {
            sampler,
            context: TraceContext { trace_id, span_id, is_sampled: true },
            parent: parent.map_or(SpanId::INVALID, |parent| parent.span_id),
            name,
            kind,
            start: SystemTime::now(),
            attributes: Vec::new(),
            links: SpanLinks::default(),
        }
    }

    /// The context for spans below this one.
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// Begins a span below this one that began at `start`.
    pub fn child(&self, name: &'static str, kind: SpanKind, start: SystemTime) -> Self {
        let (sampler, trace_id) = (self.sampler.clone(), self.context.trace_id);
        Self { start, ..Self::new(sampler, name.into(), kind, trace_id, Some(self.context)) }
    }

    /// Adds an attribute. Attributes hold names and numbers, never the content of a message or a
    /// token.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.attributes.push(KeyValue::new(key, value));
    }

    /// Adds the position of an entry in its log.
    pub fn set_position(&mut self, position: &Position) {
        self.set("skein.epoch", position.epoch.to_string());
        self.set("skein.seq", i64::try_from(position.seq).unwrap_or(i64::MAX));
    }

    /// Ends the span now and queues it for the exporter. `error`: the reason why its work failed.
    pub fn end(self, error: Option<String>) {
        let Self { sampler, context, parent, name, kind, start, attributes, links } = self;
        let span = SpanData {
            span_context: SpanContext::new(
                context.trace_id,
                context.span_id,
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: parent,
            parent_span_is_remote: false,
            span_kind: kind,
            name,
            start_time: start,
            // The clock may have been set back.
            end_time: SystemTime::now().max(start),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: error.map_or(Status::Unset, Status::error),
            instrumentation_scope: sampler.scope.clone(),
        };
        if sampler.spans.try_send(span).is_err() {
            sampler.metrics.trace_spans.of(SpanResult::Dropped).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

    fn tracer(ratio: f64) -> (Tracer, mpsc::Receiver<SpanData>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        let (tracer, spans) = Tracer::new(ratio, metrics.clone());
        (tracer, spans, metrics)
    }

    fn begin(tracer: &Tracer, parent: Option<TraceContext>) -> Option<OpenSpan> {
        tracer.begin("publish", SpanKind::Server, parent)
    }

    #[test]
    fn a_traceparent_round_trips_and_others_are_rejected() {
        for text in [SAMPLED, UNSAMPLED] {
            let context: TraceContext = text.parse().unwrap();
            assert_eq!((context.to_string(), text.len()), (text.to_owned(), 55));
            assert_eq!(context.is_sampled, text == SAMPLED);
        }
        for bad in ["", "00", &SAMPLED[1..], &SAMPLED.replace("0af7", "0AFG"), &"0".repeat(55)] {
            assert!(bad.parse::<TraceContext>().is_err(), "{bad}");
        }
        let zero = SAMPLED.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32));
        assert!(zero.parse::<TraceContext>().is_err());
    }

    #[test]
    fn the_parent_decides_and_without_one_the_ratio() {
        let (sampled, unsampled) = (SAMPLED.parse().unwrap(), UNSAMPLED.parse().unwrap());
        for ratio in [0.0, 1.0] {
            let (tracer, ..) = tracer(ratio);
            let span = begin(&tracer, Some(sampled)).unwrap();
            assert_eq!((span.context.trace_id, span.parent), (sampled.trace_id, sampled.span_id));
            assert!(begin(&tracer, Some(unsampled)).is_none());
            assert_eq!(begin(&tracer, None).is_some(), ratio == 1.0);
        }
        assert!(begin(&Tracer::default(), Some(sampled)).is_none());
        let (tracer, ..) = tracer(0.25);
        let count = (0..40_000).filter(|_| begin(&tracer, None).is_some()).count();
        assert!((9_000..11_000).contains(&count), "{count} of 40,000");
    }

    #[tokio::test(start_paused = true)]
    async fn callers_cannot_request_traces_without_bound() {
        let (tracer, _spans, metrics) = tracer(0.0);
        let accepted =
            |caller, text| (0..1_000).filter(|_| tracer.accept(text, caller).is_some()).count();
        assert_eq!(accepted(TraceCaller::Client, SAMPLED), 10);
        assert_eq!(metrics.trace_requests_ignored.get(), 990);
        // The application has a rate of its own, and an unsampled parent costs nothing.
        assert_eq!(accepted(TraceCaller::Application, SAMPLED), 100);
        assert_eq!(accepted(TraceCaller::Client, UNSAMPLED), 1_000);
        tokio::time::advance(SECOND).await;
        assert_eq!(accepted(TraceCaller::Client, SAMPLED), 10);
        assert!(tracer.accept("nonsense", TraceCaller::Application).is_none());
        assert!(Tracer::default().accept(SAMPLED, TraceCaller::Client).is_none());
    }

    #[test]
    fn a_linked_span_is_in_the_trace_and_has_no_parent() {
        let (tracer, mut spans, _metrics) = tracer(1.0);
        let publish = begin(&tracer, None).unwrap();
        let mut append = publish.child("append", SpanKind::Client, publish.start);
        append.set("skein.seq", 7);
        append.end(Some("the bus is down".to_owned()));
        let cause = publish.context();
        tracer.begin_linked("deliver", SpanKind::Consumer, cause).unwrap().end(None);
        let append = spans.try_recv().unwrap();
        assert_eq!(append.parent_span_id, cause.span_id);
        assert_eq!(append.attributes, [KeyValue::new("skein.seq", 7)]);
        assert_eq!(append.status, Status::error("the bus is down"));
        let deliver = spans.try_recv().unwrap();
        assert_eq!(deliver.span_context.trace_id(), cause.trace_id);
        assert_eq!(deliver.parent_span_id, SpanId::INVALID);
        assert_eq!(deliver.links[0].span_context.span_id(), cause.span_id);
        // A span that never ends is not recorded.
        drop(publish);
        assert!(spans.try_recv().is_err());
    }

    #[test]
    fn a_full_queue_drops_spans_and_counts_them() {
        let (tracer, spans, metrics) = tracer(1.0);
        for _ in 0..QUEUE_LEN_MAX + 5 {
            begin(&tracer, None).unwrap().end(None);
        }
        assert_eq!((spans.len(), metrics.trace_spans.of(SpanResult::Dropped).get()), (2048, 5));
    }
}
