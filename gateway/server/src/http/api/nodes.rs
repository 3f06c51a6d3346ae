//! The nodes of the cluster: how they are, and one taken out of service.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};
use skein_protocol::{error::ErrorCode, ids::NodeId};
use utoipa::ToSchema;

use super::{ApiError, AppliedNodes, CommonResponses, await_bus, parse_name};
use crate::http::Node;
use skein_core::bus::commands::{ControlCommand, NodeQuery};

/// A node.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct NodeInfo {
    /// Its id.
    node: String,
    /// How many connections it has.
    pub(super) connections: u64,
    /// Whether it takes no client any more.
    draining: bool,
    /// How many rooms it follows, inboxes among them.
    rooms: u64,
    /// How many messages it has handed to the bus since it was started.
    publishes: u64,
    /// How many entries it has put into outboxes since it was started.
    deliveries: u64,
}

/// The nodes that have answered.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NodeList {
    /// By id.
    nodes: Vec<NodeInfo>,
}

/// The cluster in numbers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ClusterStats {
    /// How many nodes have answered.
    nodes: usize,
    /// Users who are connected.
    users: u64,
    /// Their connections.
    connections: u64,
    /// Messages handed to the bus, since each node was started.
    publishes: u64,
    /// Entries put into outboxes, since each node was started.
    deliveries: u64,
}

/// What all nodes say of themselves, by id.
pub(super) async fn query_nodes(node: &Node) -> Result<Vec<NodeInfo>, ApiError> {
    let (answers, _) = node.control.query_nodes(NodeQuery::Node).await?;
    let mut nodes: Vec<NodeInfo> =
        answers.iter().filter_map(|answer| serde_json::from_str(answer).ok()).collect();
    nodes.sort_unstable_by(|a, b| a.node.cmp(&b.node));
    Ok(nodes)
}

/// List the nodes.
#[utoipa::path(
    get, path = "/api/v1/nodes", tag = "nodes",
    operation_id = "list_nodes",
    responses((status = 200, description = "Those that have answered.", body = NodeList), CommonResponses)
)]
pub(super) async fn list(State(node): State<Arc<Node>>) -> Result<Json<NodeList>, ApiError> {
    Ok(Json(NodeList { nodes: query_nodes(&node).await? }))
}

/// Take a node out of service: `ready` says 503, it takes no client any more, and sends those it has to
/// others. It serves again when it is started again.
#[utoipa::path(
    post, path = "/api/v1/nodes/{id}/drain", tag = "nodes",
    operation_id = "drain_node",
    params(("id" = String, Path, description = "The node", pattern = "^[A-Za-z0-9_.:-]{1,64}$")),
    responses((status = 200, description = "On how many nodes the order was taken.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn drain(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let id: NodeId = parse_name(&id)?;
    if !query_nodes(&node).await?.iter().any(|node| node.node == id.as_str()) {
        return Err(ApiError::new(ErrorCode::NotFound, "no node of that id has answered"));
    }
    Ok(Json(node.control.execute(ControlCommand::Drain { node: id }).await?.into()))
}

/// The cluster in numbers.
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
