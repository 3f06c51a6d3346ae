//! Server API: the users and addresses that send most.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ApiError, CommonResponses, page_limit, parse_query};
use crate::http::Node;
use skein_core::{
    bus::commands::NodeQuery,
    telemetry::top::{InputOrder, WINDOW},
};

/// Selects the order and the number of rows.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TopQuery {
    /// Order, largest first: `frames`, `bytes` or `refusals`.
    #[serde(default)]
    #[param(pattern = "^(frames|bytes|refusals)$", default = "frames")]
    by: Option<String>,
    /// Rows per list, 1 to 200.
    #[serde(default)]
    #[param(minimum = 1, maximum = 200, default = 20)]
    limit: Option<u32>,
}

/// A user that sends much to a node.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
struct TopUser {
    /// Id of the user.
    user: String,
    /// Id of the node.
    #[serde(default)]
    node: String,
    /// Input of the last minute.
    #[serde(flatten)]
    input: SenderInput,
}

/// An address that sends much to a node.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
struct TopAddress {
    /// Address; of IPv6 the /64.
    address: String,
    /// Id of the node.
    #[serde(default)]
    node: String,
    /// Input of the last minute.
    #[serde(flatten)]
    input: SenderInput,
}

/// Input of a sender within the last minute.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
struct SenderInput {
    /// Frames, control frames included.
    frames: u64,
    /// Bytes read.
    bytes: u64,
    /// Frames that got an `error`, and handshakes above a limit.
    refusals: u64,
}

impl SenderInput {
    fn by(&self, order: InputOrder) -> u64 {
        match order {
            InputOrder::Frames => self.frames,
            InputOrder::Bytes => self.bytes,
            InputOrder::Refusals => self.refusals,
        }
    }
}

/// The largest senders of the cluster. A sender on several nodes has a row of each.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TopSenderList {
    /// Seconds that the counts cover.
    seconds: u64,
    /// Users, largest first.
    users: Vec<TopUser>,
    /// Addresses, largest first.
    addresses: Vec<TopAddress>,
    /// Nodes that were asked.
    asked: usize,
    /// Nodes that have answered in time.
    answered: usize,
}

/// The reply of one node.
#[derive(Deserialize)]
struct TopReply {
    node: String,
    users: Vec<TopUser>,
    addresses: Vec<TopAddress>,
}

/// Get the users and addresses that send most, to find who floods the cluster. Counts are lower
/// bounds: each connection reports in portions of 32 frames or KiB.
#[utoipa::path(
    get, path = "/api/v1/top", tag = "nodes",
    operation_id = "top_senders",
    params(TopQuery),
    responses((status = 200, description = "The largest senders of the last minute.", body = TopSenderList), CommonResponses)
)]
pub(super) async fn top(
    State(node): State<Arc<Node>>,
    selected: Result<Query<TopQuery>, QueryRejection>,
) -> Result<Json<TopSenderList>, ApiError> {
    let TopQuery { by, limit } = parse_query(selected)?;
    let by = match by.as_deref().unwrap_or("frames") {
        "frames" => InputOrder::Frames,
        "bytes" => InputOrder::Bytes,
        "refusals" => InputOrder::Refusals,
        _ => return Err(ApiError::bad_request("`by` must be frames, bytes or refusals")),
    };
    let limit = page_limit(limit, 20)?;
    let (replies, outcome) = node.control.query_nodes(NodeQuery::Top { by, limit }).await?;
    let mut answered = 0;
    let (mut users, mut addresses) = (Vec::new(), Vec::new());
    for reply in replies {
        // A node of a version without this query does not reply.
        let Ok(reply) = serde_json::from_str::<TopReply>(&reply) else { continue };
        answered += 1;
        let TopReply { node, users: of_users, addresses: of_addresses } = reply;
        users.extend(of_users.into_iter().map(|row| TopUser { node: node.clone(), ..row }));
        addresses
            .extend(of_addresses.into_iter().map(|row| TopAddress { node: node.clone(), ..row }));
    }
    users.sort_by_key(|row| std::cmp::Reverse(row.input.by(by)));
    addresses.sort_by_key(|row| std::cmp::Reverse(row.input.by(by)));
    users.truncate(limit as usize);
    addresses.truncate(limit as usize);
    let (seconds, asked) = (WINDOW.as_secs(), outcome.nodes);
    Ok(Json(TopSenderList { seconds, users, addresses, asked, answered }))
}
