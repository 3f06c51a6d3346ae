//! Server API: nodes of the cluster, and draining a node.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};
use skein_protocol::{error::ErrorCode, ids::NodeId};
use utoipa::ToSchema;

use super::{ApiError, AppliedNodes, CallerName, CommonResponses, await_bus, parse_name};
use crate::{http::Node, reload::ReloadReport};
use skein_core::{
    bus::{
        commands::{ControlCommand, NodeQuery},
        nodes::AnnouncedNode,
    },
    hub::presence::wire_time,
};

/// State of a node.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct NodeInfo {
    /// Its announcement; absent if it has announced nothing yet, or is of a version that does not.
    #[serde(flatten)]
    announced: Option<AnnouncedInfo>,
    /// Id of the node.
    node: String,
    /// Number of its connections.
    pub(super) connections: u64,
    /// Whether it drains and rejects new clients.
    draining: bool,
    /// Number of rooms and inboxes that it is subscribed to.
    rooms: u64,
    /// Messages that it has published since its start.
    publishes: u64,
    /// Log entries that it has placed in outboxes since its start.
    deliveries: u64,
}

/// The announcement of a node, beside its lease.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
struct AnnouncedInfo {
    /// `accepting`, `draining`, `full`, `unavailable` (not ready), or `unknown` to the node that
    /// answers.
    condition: String,
    /// Version of its program.
    version: String,
    /// Newest schema of stored data that it reads.
    schema: u32,
    /// When it started, RFC 3339.
    started_at: String,
    /// Most connections that it takes.
    connections_max: u64,
    /// Value of `?node=` that leads to it, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<String>,
}

/// A node that ended without withdrawing its announcement: it was killed, or is frozen or cut off.
#[derive(Debug, Serialize, ToSchema)]
struct MissingNode {
    /// Id of the node.
    node: String,
    /// Seconds since its last announcement.
    missing_for_seconds: u64,
    /// Number of its connections then.
    connections: u64,
    /// Version of its program.
    version: String,
}

/// Nodes that have answered, and those that are missing.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NodeList {
    /// Nodes that have answered, ordered by id.
    nodes: Vec<NodeInfo>,
    /// Nodes that announced themselves within the last 15 minutes, and no longer do.
    missing: Vec<MissingNode>,
}

impl From<&AnnouncedNode> for AnnouncedInfo {
    fn from(node: &AnnouncedNode) -> Self {
        let announcement = node.announcement.clone();
        Self {
            condition: announcement.condition.as_str().to_owned(),
            version: announcement.version,
            schema: announcement.schema,
            started_at: wire_time(node.started),
            connections_max: announcement.connections_max,
            route: announcement.route,
        }
    }
}

impl From<&AnnouncedNode> for MissingNode {
    fn from(node: &AnnouncedNode) -> Self {
        Self {
            node: node.announcement.node.to_string(),
            missing_for_seconds: node.age.as_secs(),
            connections: node.announcement.connections,
            version: node.announcement.version.clone(),
        }
    }
}

/// Sums over the cluster.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ClusterStats {
    /// Number of nodes that have answered.
    nodes: usize,
    /// Number of connected users.
    users: u64,
    /// Number of connections.
    connections: u64,
    /// Messages published since the start of each node.
    publishes: u64,
    /// Log entries placed in outboxes since the start of each node.
    deliveries: u64,
}

/// Asks all nodes for their state. Ordered by id.
pub(super) async fn query_nodes(node: &Node) -> Result<Vec<NodeInfo>, ApiError> {
    let (replies, _) = node.control.query_nodes(NodeQuery::Node).await?;
    let mut nodes: Vec<NodeInfo> =
        replies.iter().filter_map(|reply| serde_json::from_str(reply).ok()).collect();
    nodes.sort_unstable_by(|a, b| a.node.cmp(&b.node));
    Ok(nodes)
}

/// List the nodes.
#[utoipa::path(
    get, path = "/api/v1/nodes", tag = "nodes",
    operation_id = "list_nodes",
    responses((status = 200, description = "The nodes that have answered, and those that are missing.", body = NodeList), CommonResponses)
)]
pub(super) async fn list(State(node): State<Arc<Node>>) -> Result<Json<NodeList>, ApiError> {
    let mut nodes = query_nodes(&node).await?;
    let announced = node.cluster.nodes();
    for info in &mut nodes {
        let is_it =
            |node: &&AnnouncedNode| node.is_alive && node.announcement.node.as_str() == info.node;
        info.announced = announced.iter().find(is_it).map(Into::into);
    }
    let missing = announced.iter().filter(|node| !node.is_alive).map(Into::into).collect();
    Ok(Json(NodeList { nodes, missing }))
}

/// Drain a node: its `/ready` returns 503, it rejects new clients, and moves its clients to other
/// nodes. It serves again after a restart, or when the drain is cancelled.
#[utoipa::path(
    post, path = "/api/v1/nodes/{id}/drain", tag = "nodes",
    operation_id = "drain_node",
    params(("id" = String, Path, description = "Id of the node", pattern = "^[A-Za-z0-9_.:-]{1,64}$")),
    responses((status = 200, description = "The number of nodes that have applied the command.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn drain(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let node_id = answering_node(&node, &id).await?;
    Ok(Json(node.control.execute(ControlCommand::Drain { node: node_id }).await?.into()))
}

/// Cancel the drain of a node: it accepts clients again. Clients that have moved stay where they
/// are. A node that stops is not affected.
#[utoipa::path(
    delete, path = "/api/v1/nodes/{id}/drain", tag = "nodes",
    operation_id = "cancel_drain",
    params(("id" = String, Path, description = "Id of the node", pattern = "^[A-Za-z0-9_.:-]{1,64}$")),
    responses((status = 200, description = "The number of nodes that have applied the command.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn cancel_drain(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let node_id = answering_node(&node, &id).await?;
    Ok(Json(node.control.execute(ControlCommand::CancelDrain { node: node_id }).await?.into()))
}

/// Checks that a node with this id answers.
async fn answering_node(node: &Node, id: &str) -> Result<NodeId, ApiError> {
    let id: NodeId = parse_name(id)?;
    if query_nodes(node).await?.iter().any(|node| node.node == id.as_str()) {
        Ok(id)
    } else {
        Err(ApiError::new(ErrorCode::NotFound, "no node with this id has answered"))
    }
}

/// The reports of a reload.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReloadReports {
    /// Reports of the nodes that have answered, ordered by id.
    nodes: Vec<ReloadReport>,
    /// Nodes that should answer: with `*` the nodes of the cluster, else 1.
    asked: usize,
    /// Nodes that have answered in time. One that has not may reload later, or not at all.
    answered: usize,
}

/// Reload the configuration of a node, or with `*` of all nodes. Keys, secrets of tokens, origins,
/// limits and the log level apply at once; `needs_restart` lists what does not. A configuration with
/// a mistake changes nothing.
#[utoipa::path(
    post, path = "/api/v1/nodes/{id}/reload", tag = "nodes",
    operation_id = "reload_node",
    params(("id" = String, Path, description = "Id of the node, or `*` for all nodes", pattern = "^([A-Za-z0-9_.:-]{1,64}|[*])$")),
    responses((status = 200, description = "The changes on each node.", body = ReloadReports), CommonResponses)
)]
pub(super) async fn reload(
    State(node): State<Arc<Node>>,
    Extension(CallerName(caller)): Extension<CallerName>,
    Path(id): Path<String>,
) -> Result<Json<ReloadReports>, ApiError> {
    let id: Option<NodeId> = if id == "*" { None } else { Some(parse_name(&id)?) };
    let by = format!("API key {caller}");
    let query = NodeQuery::Reload { node: id.clone(), by };
    let (replies, outcome) = node.control.query_nodes(query).await?;
    let mut nodes: Vec<ReloadReport> =
        replies.iter().filter_map(|reply| serde_json::from_str(reply).ok()).collect();
    if nodes.is_empty() && id.is_some() {
        return Err(ApiError::new(ErrorCode::NotFound, "no node with this id has answered"));
    }
    nodes.sort_unstable_by(|a, b| a.node.cmp(&b.node));
    let (asked, answered) = (if id.is_some() { 1 } else { outcome.nodes }, nodes.len());
    Ok(Json(ReloadReports { nodes, asked, answered }))
}

/// Get sums over the cluster.
#[utoipa::path(
    get, path = "/api/v1/stats", tag = "nodes",
    operation_id = "stats",
    responses((status = 200, description = "Sums over the nodes that have answered.", body = ClusterStats), CommonResponses)
)]
pub(super) async fn stats(State(node): State<Arc<Node>>) -> Result<Json<ClusterStats>, ApiError> {
    let page = await_bus(&node, node.services.presence.online(String::new(), 0)).await?;
    let nodes = query_nodes(&node).await?;
    let sum = |of: fn(&NodeInfo) -> u64| nodes.iter().map(of).sum();
    Ok(Json(ClusterStats {
        nodes: nodes.len(),
        users: page.count,
        connections: sum(|node| node.connections),
        publishes: sum(|node| node.publishes),
        deliveries: sum(|node| node.deliveries),
    }))
}
