//! Export of spans to a collector, over OTLP.
//!
//! One task takes completed spans from the queue of the [`Tracer`] in batches. It never makes the
//! gateway wait: while the collector is away or slow, the queue fills, and further spans are dropped
//! and counted.

use std::{sync::Arc, time::Duration};

use opentelemetry::KeyValue;
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, RetryPolicy, SpanExporter, WithExportConfig as _,
    WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::{Resource, trace::SpanExporter as _};
use skein_core::{
    drain::Tasks,
    telemetry::{
        log_limiter::LogLimiter,
        metrics::{Metrics, SpanResult},
        traces::{SpanData, Tracer},
    },
};
use skein_protocol::ids::NodeId;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// The most spans of one export.
const BATCH_LEN_MAX: usize = 512;
/// How long a span waits for others to be exported with.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take to answer.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after a failed export. The queue fills meanwhile.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// How long a stop waits for the last spans to be exported.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The collector, and the share of messages that are traced.
#[derive(Clone, Debug)]
pub struct OtlpOptions {
    /// URL of the collector, `http://host:port`.
    pub endpoint: String,
    /// The transport.
    pub protocol: OtlpProtocol,
    /// Share of messages and API calls that are traced, 0 to 1.
    pub sample_ratio: f64,
}

/// The transport of OTLP. Both carry Protocol Buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// HTTP/1.1, to the path `/v1/traces`.
    Http,
    /// gRPC.
    Grpc,
}

/// Starts the export. Returns the tracer whose spans are exported.
///
/// # Errors
///
/// [`ExporterBuildError`] if the endpoint is no URL. A collector that cannot be reached is no error.
pub(crate) fn start(
    options: &OtlpOptions,
    node: &NodeId,
    metrics: &Arc<Metrics>,
    tasks: &Tasks,
) -> Result<Tracer, ExporterBuildError> {
    let mut exporter = exporter(options)?;
    let resource = Resource::builder_empty().with_attributes([
        KeyValue::new("service.name", "skein-gateway"),
        KeyValue::new("service.instance.id", node.to_string()),
        KeyValue::new("service.version", crate::version::VERSION),
    ]);
    exporter.set_resource(&resource.build());
    let (tracer, spans) = Tracer::new(options.sample_ratio, metrics.clone());
    let export = SpanExport {
        exporter,
        spans,
        metrics: metrics.clone(),
        log: LogLimiter::new(),
        stopped: tasks.stopped().clone(),
        _tracer: tracer.clone(),
    };
    tasks.spawn_service("trace_export", export.run());
    Ok(tracer)
}

fn exporter(options: &OtlpOptions) -> Result<SpanExporter, ExporterBuildError> {
    // A failed batch is not sent again: its successor is as good.
    match options.protocol {
        OtlpProtocol::Http => SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", options.endpoint))
            .with_timeout(EXPORT_TIMEOUT)
            .with_retry_policy(RetryPolicy::disabled())
            .build(),
        OtlpProtocol::Grpc => SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&options.endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .with_retry_policy(RetryPolicy::disabled())
            .build(),
    }
}

/// The task that exports spans.
struct SpanExport {
    exporter: SpanExporter,
    spans: mpsc::Receiver<SpanData>,
    metrics: Arc<Metrics>,
    log: LogLimiter,
    stopped: CancellationToken,
    /// Keeps the queue open.
    _tracer: Tracer,
}

impl SpanExport {
    async fn run(mut self) {
        let stopped = self.stopped.clone();
        let is_over = async {
            stopped.cancelled().await;
            tokio::time::sleep(FLUSH_TIMEOUT).await;
        };
        tokio::select! {
            biased;
            () = self.export_until_stopped() => {}
            () = is_over => {}
        }
    }

    /// Exports spans until the gateway stops and none is left.
    async fn export_until_stopped(&mut self) {
        let stopped = self.stopped.clone();
        while let Some(batch) = self.next_batch().await {
            if !self.export(batch).await {
                // Cancel-safe: what the queue drops meanwhile is counted.
                tokio::select! {
                    biased;
                    () = stopped.cancelled() => return,
                    () = tokio::time::sleep(FAILURE_PAUSE) => {}
                }
            }
        }
    }

    /// Waits for spans and then for more of them. `None` once the gateway stops and none is left.
    async fn next_batch(&mut self) -> Option<Vec<SpanData>> {
        let (mut batch, spans) = (Vec::new(), &mut self.spans);
        let gather = async {
            spans.recv_many(&mut batch, BATCH_LEN_MAX).await;
            let fill = async {
                while batch.len() < BATCH_LEN_MAX {
                    let rest = BATCH_LEN_MAX - batch.len();
                    spans.recv_many(&mut batch, rest).await;
                }
            };
            // Cancel-safe: `recv_many` takes nothing unless it completes.
            let _ = timeout(BATCH_DELAY, fill).await;
        };
        tokio::select! {
            biased;
            () = self.stopped.cancelled() => {}
            () = gather => {}
        }
        while batch.len() < BATCH_LEN_MAX
            && let Ok(span) = self.spans.try_recv()
        {
            batch.push(span);
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// Exports a batch. Returns whether the collector accepted it.
    async fn export(&self, batch: Vec<SpanData>) -> bool {
        let count = batch.len() as u64;
        // gRPC has no time limit of its own while it connects.
        let exported = timeout(EXPORT_TIMEOUT, self.exporter.export(batch)).await;
        let error = match exported {
            Ok(Ok(())) => {
                self.metrics.trace_spans.of(SpanResult::Exported).inc_by(count);
                return true;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {EXPORT_TIMEOUT:?}"),
        };
        self.metrics.trace_spans.of(SpanResult::Failed).inc_by(count);
        if let Some(suppressed) = self.log.should_log() {
            tracing::warn!(
                error,
                spans = count,
                suppressed,
                "cannot export traces; check telemetry.otlp_endpoint and the collector; messages \
                 are not affected"
            );
        }
        false
    }
}
