"""The AsyncAPI 3.0 document of all events and queues, made from the topology and the registry of entities.

A message of the broker is an array, because changes of one lane that wait at the same moment travel together. The
document has one message for each event type; its payload is an array of this type. A real array may contain several
types.
"""

from typing import Any

import msgspec

from shared.entities import order, registry
from shared.entities.contract import CONTENT_TYPE, MAX_BATCH_CHANGES, Change, Lane
from shared.entities.signal import HEARTBEAT, MARK, Signal
from shared.messaging import topology
from shared.messaging.topology import QueueSpec
from shared.settings import Settings
from shared.version import VERSION

_REF = "#/components/schemas/{name}"
# Imported orders use the background lane. So do orders of other systems for which no client waits.
_ENTITY_WITH_IMPORTS = order.ENTITY
FAILURE_HEADERS = {
    "ticketrail-reason": "stable name of the cause; dead letters are grouped by it",
    "ticketrail-error": "error type and message, for people",
    "ticketrail-lane": "lane that the change came through",
    "ticketrail-failed-at": "time of the last failure",
    "ticketrail-first-failed-at": "time of the first failure",
    "ticketrail-change-id": "id of the change, if it can be read",
    "ticketrail-restaurant": "id of the restaurant, if it can be read",
    "ticketrail-subject": "entity of the change as <entity>/<id>, if it can be read",
    "ticketrail-log-offset": "offset of the change in the change log; only for dead letters of the mirror writer",
}
RETRIED = "retried"
DEAD = "dead"


def document(settings: Settings) -> dict[str, Any]:
    """Returns the whole document."""
    events = {type_: name for name, one in registry.ENTITIES.items() for type_ in _types(name)}
    channels: dict[str, Any] = {"changes": _exchange(events)}
    for queue in [*topology.queues(settings), *topology.logs(settings)]:
        channels[queue.name] = _queue(queue, _held_by(queue, events), settings)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Ticketrail",
            "version": VERSION,
            "description": "Every change of every entity, as CloudEvents 1.0 in JSON batches. A change carries the"
            " whole state after it: readers that apply the changes in any order and any number of times end in the same"
            " state.",
            "license": {"name": "MIT", "url": "https://opensource.org/license/mit"},
        },
        "defaultContentType": CONTENT_TYPE,
        "channels": channels,
        "operations": _operations(settings),
        "components": {
            "messages": {
                **{
                    type_: _message(type_, f"A change of the entity {name}; lane {_lane(name)}")
                    for type_, name in events.items()
                },
                HEARTBEAT: _message(
                    HEARTBEAT,
                    "A heartbeat, which proves the path through a lane or into a log every few seconds",
                    max_events=1,
                ),
                MARK: _message(
                    MARK,
                    "A mark that a reader publishes to a log, so that it knows when it has read to the end",
                    max_events=1,
                ),
                **_failed(),
            },
            "schemas": _schemas(events),
        },
    }


def _types(entity: str) -> list[str]:
    return [registry.ENTITIES[entity].type(event) for event in sorted(registry.ENTITIES[entity].events)]


def _lane(entity: str) -> str:
    lane = registry.ENTITIES[entity].lane
    return (
        f"{lane}, or {Lane.BACKGROUND} for imported orders"
        if registry.ENTITIES[entity] is _ENTITY_WITH_IMPORTS
        else lane
    )


def _held_by(queue: QueueSpec, events: dict[str, str]) -> list[str]:
    """Returns the names of the messages that the queue may contain."""
    if not queue.bound_to:
        return [DEAD if queue.name.endswith(".dead.v1") else RETRIED]
    lanes = set(queue.bound_to)
    found = [type_ for type_, name in events.items() if lanes & _lanes(name)]
    return [*found, HEARTBEAT, *([MARK] if queue.name in (topology.LOG, topology.REFERENCE_LOG) else [])]


def _lanes(entity: str) -> set[Lane]:
    one = registry.ENTITIES[entity]
    return {one.lane, Lane.BACKGROUND} if one is _ENTITY_WITH_IMPORTS else {one.lane}


def _message(type_: str, summary: str, max_events: int = MAX_BATCH_CHANGES) -> dict[str, Any]:
    return {
        "name": type_,
        "title": type_,
        "summary": summary,
        "contentType": CONTENT_TYPE,
        "payload": {
            "type": "array",
            "items": {"$ref": f"#/components/schemas/{type_}"},
            "minItems": 1,
            "maxItems": max_events,
        },
    }


def _schemas(events: dict[str, str]) -> dict[str, Any]:
    types = [Change, Signal, *(entity.state for entity in registry.ENTITIES.values())]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    for schema in schemas.values():
        if text := schema.get("description"):
            schema["description"] = " ".join(text.split())  # Python 3.13 and later indent docstrings differently
    for type_, name in events.items():
        schemas[type_] = _event(type_, name)
    for type_ in (HEARTBEAT, MARK):
        schemas[type_] = {
            "allOf": [
                {"$ref": "#/components/schemas/Signal"},
                {"type": "object", "properties": {"type": {"const": type_}}},
            ]
        }
    return schemas


def _event(type_: str, entity: str) -> dict[str, Any]:
    state = registry.ENTITIES[entity].state.__name__
    return {
        "allOf": [
            {"$ref": "#/components/schemas/Change"},
            {
                "type": "object",
                "properties": {
                    "type": {"const": type_},
                    "subject": {"type": "string", "pattern": f"^{entity}/"},
                    "data": {
                        "type": "object",
                        "properties": {
                            "before": {"type": "object", "description": "old values of the fields that changed"},
                            "after": {"$ref": f"#/components/schemas/{state}"},
                        },
                        "required": ["after"],
                    },
                },
            },
        ]
    }


def _failed() -> dict[str, Any]:
    texts = {name: {"type": "string", "description": text} for name, text in FAILURE_HEADERS.items()}
    attempt = {"type": "integer", "minimum": 1, "description": "number of attempts so far"}
    headers = {"type": "object", "properties": {topology.ATTEMPT: attempt, **texts}}
    one = {"type": "array", "items": {"$ref": "#/components/schemas/Change"}, "minItems": 1, "maxItems": 1}
    summary = "One change that could not be written, with unchanged bytes; the headers give the reason"
    return {
        RETRIED: {"name": RETRIED, "summary": summary, "contentType": CONTENT_TYPE, "headers": headers, "payload": one},
        DEAD: {
            "name": DEAD,
            "summary": summary,
            "contentType": CONTENT_TYPE,
            "headers": headers,
            "payload": {"description": "Any bytes; they may be unreadable"},
        },
    }


def _exchange(events: dict[str, str]) -> dict[str, Any]:
    return {
        "address": topology.CHANGES,
        "description": f"Direct exchange; the routing key is the lane: {', '.join(Lane)}. Each message contains 1 to"
        f" {MAX_BATCH_CHANGES} changes of one lane, perhaps of several types.",
        "messages": {type_: {"$ref": f"#/components/messages/{type_}"} for type_ in (*events, HEARTBEAT)},
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {"name": topology.CHANGES, "type": "direct", "durable": True, "autoDelete": False},
                "bindingVersion": "0.3.0",
            }
        },
    }


def _queue(queue: QueueSpec, held: list[str], settings: Settings) -> dict[str, Any]:
    bound = f"Bound to {topology.CHANGES} by {', '.join(queue.bound_to)}." if queue.bound_to else ""
    return {
        "address": queue.name,
        "description": " ".join(part for part in (_purpose(queue, settings), bound) if part),
        "messages": {type_: {"$ref": f"#/components/messages/{type_}"} for type_ in held},
        "bindings": {
            "amqp": {
                "is": "queue",
                "queue": {"name": queue.name, "durable": True, "exclusive": False, "autoDelete": False},
                "bindingVersion": "0.3.0",
            }
        },
        "x-arguments": queue.arguments,
    }


def _purpose(queue: QueueSpec, settings: Settings) -> str:
    if queue.name == topology.LOG:
        return "Stream: every change, in the order in which the broker received it."
    if queue.name == topology.REFERENCE_LOG:
        return "Stream: the change log without orders and payments."
    if queue.name == topology.MIRROR_DEAD:
        return "Changes that the mirror writer could not read."
    lane = next(lane for lane in Lane if queue.name.startswith(f"sync.postgres.{lane}."))
    if queue.name == topology.dead_queue(lane):
        return f"Changes of lane {lane} that no retry can write, or whose retries are used up."
    for step in settings.retry_steps_ms:
        if queue.name == topology.retry_queue(lane, step):
            return f"Retry queue: a change returns to {topology.lane_queue(lane)} after {step} ms."
    return f"Changes of lane {lane} that wait to be written to PostgreSQL."


def _operations(settings: Settings) -> dict[str, Any]:
    found = {
        "record": _operation(
            "send", "changes", "The orders and sync services publish changes: mandatory, persistent and confirmed"
        ),
        "follow": _operation(
            "receive", topology.LOG, "The sync worker applies changes to the mirror, and the notifier pushes them"
        ),
        "follow_reference": _operation(
            "receive", topology.REFERENCE_LOG, "The orders service keeps its menus up to date"
        ),
        "dead_letter_mirror": _operation(
            "send", topology.MIRROR_DEAD, "The sync worker dead-letters a change that it cannot read"
        ),
    }
    for lane in Lane:
        found[f"write_{lane}"] = _operation(
            "receive", topology.lane_queue(lane), "The sync worker writes changes to PostgreSQL"
        )
        for step in settings.retry_steps_ms:
            found[f"retry_{lane}_{step}ms"] = _operation(
                "send", topology.retry_queue(lane, step), f"The sync worker defers a change for {step} ms"
            )
        found[f"dead_letter_{lane}"] = _operation(
            "send", topology.dead_queue(lane), "The sync worker dead-letters a change that it cannot write"
        )
    return found


def _operation(action: str, channel: str, summary: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}
