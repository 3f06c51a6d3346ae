// Calls every operation of the server API, typed by what openapi-typescript has made of its document: a path, a
// parameter or a member of a body or an answer that is not in the document does not compile.
//
// Usage: node generated_client.mjs <base URL> <API key>

import createClient from "openapi-fetch";
import type { components, operations, paths } from "./skein.js";

declare const process: { argv: string[] };
const [, , baseUrl, key] = process.argv;
const { GET, POST, PUT, DELETE } = createClient<paths>({ baseUrl, headers: { authorization: `Bearer ${key}` } });

type Problem = components["schemas"]["Problem"];
type Answer<T> = { data?: T; error?: Problem; response: Response };
const called = new Set<keyof operations>();

/** What an operation answered, which has to have this status. */
async function ok<T>(operation: keyof operations, status: number, asked: Promise<Answer<T>>): Promise<T> {
  const { data, error, response } = await asked;
  if (response.status !== status || data === undefined) {
    throw new Error(`${operation}: ${response.status} ${error?.error.code} ${error?.error.message}`);
  }
  called.add(operation);
  return data;
}

function check(is: boolean, what: string): void {
  if (!is) throw new Error(what);
}

const room = { room: "typed" };
const user = { user: "ann" };
const id = crypto.randomUUID();
const made = await ok("create_room", 201, PUT("/api/v1/rooms/{room}", { params: { path: room }, body: { name: "Typed" } }));
check(made.name === "Typed" && made.durable, "create_room");
await ok("get_room", 200, GET("/api/v1/rooms/{room}", { params: { path: room } }));
const listed = await ok("list_rooms", 200, GET("/api/v1/rooms", { params: { query: { prefix: "typ", limit: 1 } } }));
check(listed.rooms[0]?.room === "typed", "list_rooms");
const sent = await ok("send_message", 201, POST("/api/v1/rooms/{room}/messages", {
  params: { path: room }, body: { content: { any: "JSON" }, from: "ann", id, kind: "custom" },
}));
check(sent.seq === 1 && !sent.duplicate, "send_message");
const messages = [{ room: "typed", content: 1 }, { room: "no room", content: 2 }];
const fates = await ok("publish_messages", 201, POST("/api/v1/publish", { body: { messages } }));
check("seq" in fates.results[0]! && "error" in fates.results[1]!, "publish_messages");
const page = await ok("room_history", 200, GET("/api/v1/rooms/{room}/history", { params: { path: room, query: { limit: 1 } } }));
check(page.more && page.messages.length === 1, "room_history");
await ok("message_trail", 200, GET("/api/v1/messages/{id}/trail", { params: { path: { id }, query: { user: "ann" } } }));
await ok("room_presence", 200, GET("/api/v1/rooms/{room}/presence", { params: { path: room } }));
await ok("remove_member", 200, DELETE("/api/v1/rooms/{room}/members/{user}", { params: { path: { ...room, ...user } } }));
await ok("notify_user", 201, POST("/api/v1/users/{user}/notifications", { params: { path: user }, body: { payload: 1 } }));
const told = await ok("notify_users", 201, POST("/api/v1/notifications", { body: { users: ["ann", "_no"], payload: [] } }));
check("seq" in told.results[0]! && "error" in told.results[1]!, "notify_users");
await ok("broadcast", 201, POST("/api/v1/broadcast", { body: { payload: "all" } }));
await ok("list_users", 200, GET("/api/v1/users", {}));
await ok("count_online", 200, GET("/api/v1/online", {}));
check(!(await ok("get_user", 200, GET("/api/v1/users/{user}", { params: { path: user } }))).online, "get_user");
await ok("disconnect_user", 200, POST("/api/v1/users/{user}/disconnect", { params: { path: user }, body: { code: 4321 } }));
await ok("list_sessions", 200, GET("/api/v1/users/{user}/sessions", { params: { path: user } }));
await ok("revoke_sessions", 200, DELETE("/api/v1/users/{user}/sessions", { params: { path: user } }));
await ok("empty_inbox", 200, DELETE("/api/v1/users/{user}/inbox", { params: { path: user } }));
const gone = await DELETE("/api/v1/users/{user}/sessions/{id}", { params: { path: { ...user, id } } });
check(gone.response.status === 404 && gone.error?.error.code === "not_found", "revoke_session");
called.add("revoke_session");
const { nodes } = await ok("list_nodes", 200, GET("/api/v1/nodes", {}));
await ok("stats", 200, GET("/api/v1/stats", {}));
await ok("delete_room", 200, DELETE("/api/v1/rooms/{room}", { params: { path: room } }));
await ok("drain_node", 200, POST("/api/v1/nodes/{id}/drain", { params: { path: { id: nodes[0]!.node } } }));
console.log([...called].sort().join("\n"));
