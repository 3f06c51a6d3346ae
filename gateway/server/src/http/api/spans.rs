//! Spans of API calls.

use std::convert::Infallible;

use axum::{
    extract::{FromRequestParts, MatchedPath, Request},
    http::request::Parts,
    middleware::Next,
    response::Response,
};
use skein_core::telemetry::traces::{SpanKind, TraceCaller, TraceContext};

use crate::http::{
    Node,
    headers::{request_id, utf8},
};

/// The span of an API call, for the messages that it publishes. `None` without tracing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RequestSpan(pub(super) Option<TraceContext>);

impl<S: Sync> FromRequestParts<S> for RequestSpan {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().copied().unwrap_or_default())
    }
}

/// Runs an API call made with the key `key`, in a span if it is traced.
pub(super) async fn run_traced(
    node: &Node,
    key: &str,
    mut request: Request,
    next: Next,
) -> Response {
    let tracer = &node.services.publisher.tracer;
    if !tracer.is_on() {
        return next.run(request).await;
    }
    let traceparent = request.headers().get("traceparent").and_then(utf8);
    let parent = traceparent.and_then(|text| tracer.accept(text, TraceCaller::Application));
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_default();
    let name = format!("{} {route}", request.method());
    let mut span = tracer.begin(name, SpanKind::Server, parent);
    if let Some(span) = &mut span {
        span.set("http.request.method", request.method().to_string());
        span.set("http.route", route);
        span.set("url.path", request.uri().path().to_owned());
        span.set("skein.api_key", key.to_owned());
        if let Some(id) = request_id(request.headers()).and_then(utf8) {
            span.set("skein.request_id", id.to_owned());
        }
    }
    // The messages of a call that is not sampled are not sampled either.
    let context = span.as_ref().map_or(TraceContext::UNSAMPLED, |span| span.context());
    request.extensions_mut().insert(RequestSpan(Some(context)));
    let response = next.run(request).await;
    if let Some(mut span) = span {
        let status = response.status();
        span.set("http.response.status_code", i64::from(status.as_u16()));
        span.end(status.is_server_error().then(|| status.to_string()));
    }
    response
}
