"""The AsyncAPI 3.0 document of all events and queues, out of the topology and the registry of entities."""

from typing import Any

import msgspec

from shared.entities import registry
from shared.entities.contract import CONTENT_TYPE, MAX_BATCH, Change, Lane
from shared.messaging import topology
from shared.settings import Settings

_REF = "#/components/schemas/{name}"


def document(settings: Settings) -> dict[str, Any]:
    types = [Change, *(entity.state for entity in registry.ENTITIES.values())]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    messages = {
        entity.type(event): _message(name, entity.state.__name__, entity.type(event), entity.lane)
        for name, entity in registry.ENTITIES.items()
        for event in sorted(entity.events)
    }
    channels: dict[str, Any] = {"changes": _exchange(messages)}
    for queue in [*topology.queues(settings), *topology.logs(settings)]:
        channels[queue.name] = _queue(queue)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Ticketrail",
            "version": "1.0.0",
            "description": "Every change of every entity, as CloudEvents 1.0 in JSON batches. A change carries the"
            " whole state after it: applied in any order, any number of times, every reader ends in the same state.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": CONTENT_TYPE,
        "channels": channels,
        "operations": {
            "record": {
                "action": "send",
                "channel": {"$ref": "#/channels/changes"},
                "summary": "orders, sync: mandatory, persistent, confirmed",
            },
            **{
                f"write_{lane}": {
                    "action": "receive",
                    "channel": {"$ref": f"#/channels/{topology.lane_queue(lane)}"},
                    "summary": "the sync worker writes them to PostgreSQL",
                }
                for lane in Lane
            },
            "follow": {
                "action": "receive",
                "channel": {"$ref": f"#/channels/{topology.LOG}"},
                "summary": "the sync worker writes them to the mirror, the notifier pushes them",
            },
            "follow_reference": {
                "action": "receive",
                "channel": {"$ref": f"#/channels/{topology.REFERENCE_LOG}"},
                "summary": "the orders service keeps its menus up to date",
            },
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def _message(entity: str, state: str, type_: str, lane: Lane) -> dict[str, Any]:
    return {
        "name": type_,
        "title": type_,
        "summary": f"{entity}: lane {lane} by default; travels in an array of 1 to {MAX_BATCH}",
        "contentType": CONTENT_TYPE,
        "payload": {
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
        },
    }


def _exchange(messages: dict[str, Any]) -> dict[str, Any]:
    return {
        "address": topology.CHANGES,
        "description": "Direct exchange; the routing key is the lane: critical, normal or background.",
        "messages": {type_: {"$ref": f"#/components/messages/{type_}"} for type_ in messages},
        "bindings": {
            "amqp": {"is": "routingKey", "exchange": {"name": topology.CHANGES, "type": "direct", "durable": True}}
        },
    }


def _queue(queue: topology.Queue) -> dict[str, Any]:
    bound = f"Bound to {topology.CHANGES} by {', '.join(queue.bound_to)}." if queue.bound_to else "Bound to nothing."
    arguments = ", ".join(f"{name}={value}" for name, value in sorted(queue.arguments.items()))
    return {
        "address": queue.name,
        "description": f"{bound} {arguments}",
        "bindings": {"amqp": {"is": "queue", "queue": {"name": queue.name, "durable": True}}},
    }
