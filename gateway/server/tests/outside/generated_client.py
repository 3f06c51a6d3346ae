"""Calls every operation of the server API with a client that openapi-python-client has made of its document.

Usage: generated_client.py <folder of the package `skein`> <base URL> <API key>

Prints the operations called, one a line. Each answer has to be of the type that the document has for its status.
"""

import importlib
import pkgutil
import sys
import uuid

folder, url, key = sys.argv[1:]
sys.path.insert(0, folder)

import skein.api
from skein import AuthenticatedClient, models

client = AuthenticatedClient(base_url=url, token=key, raise_on_unexpected_status=True)
stranger = AuthenticatedClient(base_url=url, token="another", raise_on_unexpected_status=True)
operations = {
    name: importlib.import_module(f"skein.api.{tag.name}.{name}")
    for tag in pkgutil.iter_modules(skein.api.__path__)
    for _, name, _ in pkgutil.iter_modules(importlib.import_module(f"skein.api.{tag.name}").__path__)
}
called = []


def call(name, *args, status=200, by=client, **named):
    """Calls an operation and returns what its answer was read as."""
    answer = operations[name].sync_detailed(*args, client=by, **named)
    assert answer.status_code == status, (name, answer)
    assert answer.parsed is not None, (name, answer)
    assert isinstance(answer.parsed, models.Problem) == (status >= 400), (name, answer)
    called.append(name)
    return answer.parsed


room, user, key_of_send = "generated", "ann", uuid.uuid4()
made = call("create_room", room, body=models.NewRoom(name="Made here", max_members=3), status=201)
assert (made.room, made.name, made.max_members) == (room, "Made here", 3), made
exists = call("create_room", room, body=models.NewRoom(), status=409)
assert exists.error.code == "room_exists", exists
assert call("get_room", room).name == "Made here"
assert [found.room for found in call("list_rooms", prefix="gen", limit=1).rooms] == [room]
message = models.NewMessage(content={"any": ["JSON"]}, from_=user, id=key_of_send, kind=models.MessageKind.CUSTOM)
sent = call("send_message", room, body=message, status=201)
assert sent.id == key_of_send and sent.seq == 1 and not sent.duplicate, sent
assert call("send_message", room, body=message).duplicate
batch = [models.BatchMessage(room=room, content="one"), models.BatchMessage(room="no room", content="two")]
fates = call("publish_messages", body=models.MessageBatch(messages=batch), status=201).results
assert isinstance(fates[0], models.SendResult) and isinstance(fates[1], models.Problem), fates
page = call("room_history", room, after=0, limit=1)
assert page.more and page.messages[0].additional_properties["content"] == {"any": ["JSON"]}, page
assert call("message_trail", str(key_of_send), user=user).asked == 1
assert call("room_presence", room).count == 0
assert call("remove_member", room, user).applied == 1
assert call("notify_user", user, body=models.NewNotification(payload=1, require_ack=True), status=201).seq == 1
fates = call("notify_users", body=models.BulkNotification(users=[user, "_no"], payload=None), status=201).results
assert isinstance(fates[0], models.NotificationSent) and isinstance(fates[1], models.NotificationFailed), fates
assert call("broadcast", body=models.NewBroadcast(payload="all"), status=201).nodes == 1
assert call("list_users").users == [] and call("count_online").connections == 0
assert not call("get_user", user).online
assert call("disconnect_user", user, body=models.DisconnectOptions(code=4321, reason="bye")).nodes == 1
assert call("list_sessions", user).sessions == []
assert call("revoke_sessions", user).applied == 1
assert call("empty_inbox", user).user == user
assert call("revoke_session", user, str(uuid.uuid4()), status=404).error.code == "not_found"
nodes = call("list_nodes").nodes
assert len(nodes) == 1 and call("stats").users == 0
assert call("delete_room", room).room == room
assert call("delete_room", room, status=404).error.code == "not_found"
assert call("get_room", "no room", status=400).error.code == "bad_request"
assert call("get_room", room, by=stranger, status=401).error.code == "unauthorized"
assert call("drain_node", nodes[0].node).applied == 1

assert set(called) == set(operations), set(operations) ^ set(called)
print("\n".join(sorted(set(called))))
