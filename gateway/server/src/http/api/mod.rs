//! The server API under `/api/v1`: queries and commands of an application, with an API key.
//!
//! Every path is declared at its handler. The router and `/api/openapi.json` are built from the
//! same declarations, so that the document has all paths.

use std::sync::Arc;

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest};
use axum::{
    Json, Router,
    extract::{
        DefaultBodyLimit, FromRequest, MatchedPath, Query, Request, State,
        rejection::QueryRejection,
    },
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use skein_protocol::error::ErrorCode;
use tokio::time::Instant;
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Node,
    headers::{REQUEST_ID, bearer, request_id, utf8},
};
use skein_core::{
    archive::ArchiveError,
    bus::{BusError, commands},
    telemetry::{log_limiter::LogLimiter, metrics::ApiRejection},
};

mod messages;
mod nodes;
mod notifications;
mod rooms;
mod search;
mod spans;
mod top;
mod users;

/// Largest body of a request in bytes: a batch of messages.
const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Lines per second about API calls that send messages.
const SEND_LINES_PER_SECOND_MAX: u32 = 20;

/// Keys of the server API with their names, as SHA-256.
#[derive(Clone, Default)]
pub struct ApiKeys {
    keys: Vec<(String, digest::Digest)>,
    /// Whether `/api/docs` and `/api/openapi.json` are served.
    pub docs: bool,
}

impl ApiKeys {
    /// Creates a set of keys with the names that the log shows for them.
    pub fn new(keys: impl IntoIterator<Item = (String, String)>, docs: bool) -> Self {
        let keys = keys.into_iter().map(|(name, key)| (name, digest_of(&key)));
        Self { keys: keys.collect(), docs }
    }

    /// The names of the keys.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(name, _)| name.as_str())
    }

    /// Returns the name of the key that a request carries.
    ///
    /// # Errors
    ///
    /// The reason for rejecting the request.
    pub(super) fn authenticate(&self, headers: &HeaderMap) -> Result<&str, ApiRejection> {
        if self.keys.is_empty() {
            return Err(ApiRejection::Disabled);
        }
        if !headers.contains_key(header::AUTHORIZATION) {
            return Err(ApiRejection::MissingKey);
        }
        bearer(headers).and_then(|key| self.name_of(&key)).ok_or(ApiRejection::WrongKey)
    }

    /// Returns the name of a key. Compares the digests of all keys completely, so that the duration
    /// does not reveal how much of a key is right.
    fn name_of(&self, key: &str) -> Option<&str> {
        let presented = digest_of(key);
        let mut found = None;
        for (name, known) in &self.keys {
            if verify_slices_are_equal(known.as_ref(), presented.as_ref()).is_ok() {
                found = Some(name.as_str());
            }
        }
        found
    }
}

fn digest_of(key: &str) -> digest::Digest {
    digest::digest(&digest::SHA256, key.as_bytes())
}

/// An error, for programs and for people.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem {
    error: ProblemDetail,
}

#[derive(Debug, Serialize, ToSchema)]
struct ProblemDetail {
    /// One of the codes of `error` frames.
    code: String,
    /// Description for people.
    message: String,
}

/// Error of a request, sent as a [`Problem`].
#[derive(Debug)]
pub(super) struct ApiError {
    code: ErrorCode,
    message: String,
}

impl ApiError {
    pub(super) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    /// Returns the error as it appears in the results of a batch.
    pub(super) fn to_problem(&self) -> Problem {
        let (code, message) = (self.code.as_str().to_owned(), self.message.clone());
        Problem { error: ProblemDetail { code, message } }
    }
}

impl From<BusError> for ApiError {
    fn from(error: BusError) -> Self {
        match error {
            BusError::Unavailable => Self::new(
                ErrorCode::Unavailable,
                "the bus is unavailable, and the request may or may not have taken effect: repeat a \
                 message with the same id",
            ),
            BusError::Overloaded => {
                Self::new(ErrorCode::Overloaded, "too many requests wait for the bus; retry later")
            }
            BusError::Rejected => Self::new(ErrorCode::Internal, "the bus rejected the request"),
            BusError::MemoryFull => Self::new(
                ErrorCode::Overloaded,
                "the memory of Redis is above the watermark, and no new state is stored; retry later",
            ),
            BusError::UnseenQuota => Self::new(ErrorCode::RateLimited, error.to_string()),
            BusError::UnseenBytes => Self::new(ErrorCode::LimitReached, error.to_string()),
        }
    }
}

impl From<ArchiveError> for ApiError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Unavailable(_) => {
                Self::new(ErrorCode::Unavailable, "the archive is unavailable; retry later")
            }
            ArchiveError::Rejected(_) => {
                Self::new(ErrorCode::Internal, "the archive rejected the request")
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.code {
            ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorCode::Forbidden => StatusCode::FORBIDDEN,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::RoomExists => StatusCode::CONFLICT,
            ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            ErrorCode::Unavailable | ErrorCode::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        let problem = self.to_problem();
        if self.code.is_retryable() {
            let (code, message) = (problem.error.code, problem.error.message);
            let wait = super::error::retry_after();
            return super::error::error_response_with_retry(status, &code, &message, wait);
        }
        (status, Json(problem)).into_response()
    }
}

/// Waits for the bus, at most for the time that a request may wait.
pub(super) async fn await_bus<T, E: Into<ApiError>>(
    node: &Node,
    request: impl Future<Output = Result<T, E>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(node.services.limits.wait_max, request).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(BusError::Unavailable.into()),
    }
}

/// Extractor of a body in JSON. An empty body counts as `{}`.
pub(super) struct JsonBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = Bytes::from_request(request, state).await.map_err(|error| {
            let code = match error.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::TooLarge,
                _ => ErrorCode::BadRequest,
            };
            ApiError::new(code, error.body_text())
        })?;
        let text = body.trim_ascii();
        let body = if text.is_empty() || text == b"null" { &b"{}"[..] } else { text };
        // serde would read an array as the members of a struct in their order.
        if !body.starts_with(b"{") {
            return Err(ApiError::bad_request("the body must be a JSON object"));
        }
        serde_json::from_slice(body)
            .map(Self)
            .map_err(|error| ApiError::bad_request(error.to_string()))
    }
}

/// Parses a query.
pub(super) fn parse_query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    query.map(|Query(query)| query).map_err(|error| ApiError::bad_request(error.body_text()))
}

/// Parses a name in a path.
pub(super) fn parse_name<T: std::str::FromStr<Err: std::fmt::Display>>(
    text: &str,
) -> Result<T, ApiError> {
    text.parse().map_err(|error: T::Err| ApiError::bad_request(error.to_string()))
}

/// Parses the id of a user. Ids with a leading `_` are reserved.
pub(super) fn parse_user(text: &str) -> Result<skein_protocol::ids::UserId, ApiError> {
    let user: skein_protocol::ids::UserId = parse_name(text)?;
    if user.is_reserved() {
        return Err(ApiError::bad_request("ids with a leading `_` are reserved for the server"));
    }
    Ok(user)
}

/// Selects a page of a list.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// Prefix of the ids.
    #[serde(default)]
    #[param(max_length = 128)]
    pub(super) prefix: Option<String>,
    /// `cursor` of the previous page.
    #[serde(default)]
    #[param(max_length = 128)]
    pub(super) cursor: Option<String>,
    /// Entries per page, 1 to 200.
    #[serde(default)]
    #[param(minimum = 1, maximum = 200, default = 100)]
    pub(super) limit: Option<u32>,
}

impl PageQuery {
    pub(super) fn checked(self) -> Result<(String, String, usize), ApiError> {
        let Self { prefix, cursor, limit } = self;
        let (prefix, cursor) = (prefix.unwrap_or_default(), cursor.unwrap_or_default());
        if prefix.chars().count() > 128 || cursor.chars().count() > 128 {
            return Err(ApiError::bad_request(
                "`prefix` and `cursor` must be at most 128 characters",
            ));
        }
        Ok((prefix, cursor, page_limit(limit, 100)? as usize))
    }
}

/// Checks the number of entries per page, 1 to 200.
pub(super) fn page_limit(limit: Option<u32>, default: u32) -> Result<u32, ApiError> {
    match limit.unwrap_or(default) {
        limit @ 1..=200 => Ok(limit),
        _ => Err(ApiError::bad_request("`limit` must be 1 to 200")),
    }
}

/// The number of nodes that have applied a command.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AppliedNodes {
    /// Nodes that have applied it.
    applied: usize,
    /// Nodes that are alive or were seen within the last minute.
    nodes: usize,
}

impl From<commands::CommandProgress> for AppliedNodes {
    fn from(commands::CommandProgress { applied, nodes }: commands::CommandProgress) -> Self {
        Self { applied, nodes }
    }
}

/// Responses that every path may return besides its own.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "documents responses in the OpenAPI document")]
pub(super) enum CommonResponses {
    /// The request is invalid.
    #[response(status = 400)]
    BadRequest(Problem),
    /// The API key is missing or wrong.
    #[response(status = 401)]
    Unauthorized(Problem),
    /// The server API is disabled: see `api.keys`.
    #[response(status = 403)]
    Forbidden(Problem),
    /// The requested object does not exist.
    #[response(status = 404)]
    NotFound(Problem),
    /// The body or a field is too large.
    #[response(status = 413)]
    TooLarge(Problem),
    /// Above a rate: retry after `Retry-After`.
    #[response(status = 429)]
    RateLimited(Problem),
    /// The bus is unavailable: retry after `Retry-After`.
    #[response(status = 503)]
    Unavailable(Problem),
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Skein server API",
        description = "Queries and commands of an application to a Skein cluster. Any node answers for the whole cluster. Errors are `{\"error\":{\"code\",\"message\"}}`.",
    ),
    servers(
        (url = "/", description = "The node that serves this document"),
        // Relative to the document.
        (url = "..", description = "The same node behind a proxy that adds a path prefix"),
    ),
    components(schemas(Problem)),
    security(("api_key" = [])),
    modifiers(&BearerKey),
)]
struct OpenApiDocument;

struct BearerKey;

impl utoipa::Modify for BearerKey {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
        let components = document.components.get_or_insert_default();
        let key = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        components.add_security_scheme("api_key", key);
    }
}

fn paths() -> OpenApiRouter<Arc<Node>> {
    OpenApiRouter::with_openapi(OpenApiDocument::openapi())
        .routes(routes!(messages::send))
        .routes(routes!(messages::publish))
        .routes(routes!(messages::trail))
        .routes(routes!(rooms::list))
        .routes(routes!(rooms::info, rooms::create, rooms::delete))
        .routes(routes!(rooms::history))
        .routes(routes!(search::search))
        .routes(routes!(rooms::presence))
        .routes(routes!(rooms::remove))
        .routes(routes!(notifications::notify))
        .routes(routes!(notifications::notify_many))
        .routes(routes!(notifications::broadcast))
        .routes(routes!(users::list))
        .routes(routes!(users::info))
        .routes(routes!(users::disconnect))
        .routes(routes!(users::sessions, users::revoke))
        .routes(routes!(users::revoke_one))
        .routes(routes!(users::empty_inbox))
        .routes(routes!(users::online))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::drain, nodes::cancel_drain))
        .routes(routes!(nodes::reload))
        .routes(routes!(nodes::stats))
        .routes(routes!(top::top))
}

/// Builds the routes of the API and its documentation.
pub(super) fn router(node: Arc<Node>) -> Router<Arc<Node>> {
    let (api, document) = paths().split_for_parts();
    let api = api
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .route_layer(middleware::from_fn_with_state(node.clone(), measure))
        .layer(middleware::from_fn_with_state(node.clone(), authorize));
    if !node.access.load().api.docs {
        return api;
    }
    // Shared, so that a client which does not read the response holds no copy.
    let json = Bytes::from(document.to_json().expect("the document serializes"));
    let serve = move || {
        let json = json.clone();
        async { ([(header::CONTENT_TYPE, "application/json")], json) }
    };
    api.route("/api/openapi.json", get(serve))
        .route("/api/docs", get(async || Html(include_str!("../../../../web/api.html"))))
}

async fn method_not_allowed() -> Response {
    super::error::error_response(
        StatusCode::METHOD_NOT_ALLOWED,
        "bad_request",
        "this path does not support the method",
    )
}

/// Name of the API key of a request.
#[derive(Clone, Debug)]
pub(super) struct CallerName(pub(super) Arc<str>);

/// Counts and times requests by their declared route.
async fn measure(
    State(node): State<Arc<Node>>,
    route: MatchedPath,
    request: Request,
    next: Next,
) -> Response {
    let (method, started) = (request.method().clone(), Instant::now());
    let response = next.run(request).await;
    // Extension methods would be labels that clients choose.
    let method = match method {
        Method::GET | Method::POST | Method::PUT | Method::PATCH | Method::DELETE => {
            method.as_str()
        }
        _ => "other",
    };
    let status = response.status().as_u16();
    node.metrics.api_request(method, route.as_str(), status, started.elapsed());
    response
}

/// Passes on requests with a valid key, and rejects the others.
async fn authorize(
    State(node): State<Arc<Node>>,
    headers: HeaderMap,
    mut request: Request,
    next: Next,
) -> Response {
    let access = node.access.load_full();
    match access.api.authenticate(&headers) {
        // The error of the path extractor would have no code.
        Ok(_) if !is_utf8_path(request.uri().path()) => {
            ApiError::bad_request("the path must be UTF-8").into_response()
        }
        Ok(name) => {
            let id = request_id(request.headers()).cloned();
            let call = ApiCall::of(&request);
            request.extensions_mut().insert(CallerName(name.into()));
            let mut response = spans::run_traced(&node, name, request, next).await;
            call.log(name, response.status(), id.as_ref().and_then(utf8));
            if let Some(id) = id {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            response
        }
        Err(ApiRejection::Disabled) => {
            let text = "the server API is disabled on this gateway: set api.keys";
            ApiError::new(ErrorCode::Forbidden, text).into_response()
        }
        Err(_) => {
            let text = "missing or wrong API key: send `Authorization: Bearer <api key>`";
            let mut response = ApiError::new(ErrorCode::Unauthorized, text).into_response();
            let challenge = header::HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            response
        }
    }
}

/// A call, for its log line.
struct ApiCall {
    method: Method,
    path: String,
    /// Whether it sends messages, of which there may be many.
    sends: bool,
    started: Instant,
}

impl ApiCall {
    /// Paths whose calls send messages.
    const SENDING: [&str; 4] = [
        "/api/v1/rooms/{room}/messages",
        "/api/v1/publish",
        "/api/v1/notifications",
        "/api/v1/users/{user}/notifications",
    ];

    fn of(request: &Request) -> Self {
        let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
        Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            sends: Self::SENDING.contains(&route),
            started: Instant::now(),
        }
    }

    /// Logs an order with the name of its key and its result. Queries are at debug, and calls that
    /// send messages are left out above a rate.
    fn log(self, key: &str, status: StatusCode, request_id: Option<&str>) {
        static SENDS: LogLimiter = LogLimiter::per_second(SEND_LINES_PER_SECOND_MAX);
        let Self { method, path, sends, started } = self;
        let (status, ms) = (status.as_u16(), started.elapsed().as_millis() as u64);
        if method == Method::GET {
            tracing::debug!(key, %method, path, status, ms, request_id, "API query");
            return;
        }
        let suppressed = if sends { SENDS.should_log() } else { Some(0) };
        if let Some(suppressed) = suppressed {
            tracing::info!(key, %method, path, status, ms, request_id, suppressed, "API order");
        }
    }
}

/// Whether a path is UTF-8 after decoding its escapes (RFC 3986, section 2.1).
fn is_utf8_path(path: &str) -> bool {
    percent_decode_str(path).decode_utf8().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_a_path_must_be_utf8() {
        for good in ["/a", "/a%20b", "/%C3%BC", "/%", "/%2", "/%zz", "/%+f"] {
            assert!(is_utf8_path(good), "{good}");
        }
        for bad in ["/%FF", "/a%c3", "/%C3%28"] {
            assert!(!is_utf8_path(bad), "{bad}");
        }
    }

    #[test]
    fn a_key_has_a_name_and_other_keys_have_none() {
        let keys = [("web", "one"), ("ops", "two")];
        let keys = ApiKeys::new(keys.map(|(name, key)| (name.into(), key.into())), true);
        assert_eq!((keys.name_of("one"), keys.name_of("two")), (Some("web"), Some("ops")));
        assert_eq!((keys.name_of("on"), keys.name_of("")), (None, None));
        assert_eq!(ApiKeys::default().name_of(""), None);
    }
}
