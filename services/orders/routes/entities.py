"""The six routes of every entity in resources.py: create, list, read, change, delete, restore."""

from datetime import datetime
from typing import Any
from uuid import UUID

from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import UNSET

from services.orders.entity_changes import Receipt
from services.orders.idempotency import RequestKey
from services.orders.lists import list_reply, selection
from services.orders.resources import RESOURCES, Context, Resource
from services.orders.route_context import RouteContext, context_of, found_reply, receipt_reply
from shared.entities import menu_item, table
from shared.errors import NotFound
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import View, endpoint, path_id, read_query
from shared.http.etags import is_known, required_versions
from shared.http.replies import Reply
from shared.security.tokens import Identity


def requested_fields(requested: Any) -> dict[str, Any]:
    """Returns the fields that the request contains, with ids as text."""
    found = {name: getattr(requested, name) for name in requested.__struct_fields__}
    return {
        name: str(value) if isinstance(value, UUID) else value for name, value in found.items() if value is not UNSET
    }


def routes_of(resource: Resource) -> list[HTTPRouteHandler]:
    entity, noun = resource.entity, resource.noun
    one = f"{resource.path}/{{{resource.id_name}:str}}"
    read, change = resource.actions
    view = View(entity, resource.derived_types)
    a_noun = f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"
    nouns = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith("sh") else f"{noun}s"
    common: dict[str, Any] = {"tag": resource.tag, "answer": view}
    of_one: dict[str, Any] = {**common, "action": change, "errors": (404,), "headers": ("If-Match",)}

    @endpoint(
        "POST",
        resource.path,
        **common,
        action=change,
        summary=f"Add {a_noun}",
        description=f"A repeat with the same `Idempotency-Key` returns the {noun} that the first request has added.",
        body=resource.create,
        status=201,
        errors=(404,),
        headers=("Idempotency-Key",),
        example=resource.example,
    )
    async def create(request: Call) -> ASGIApp:
        key = RequestKey.of(request, f"POST {resource.path}")
        body = await request.whole_body()
        fields = requested_fields(read_body(body, resource.create))
        identity, context = request.identity, context_of(request)
        restaurant = (await context.menus.book(identity.tenant)).restaurant
        prepared = await resource.prepare(context.figures, restaurant, fields, None)
        id_, sha256 = key.entity_id(), key.hash_of(body)

        def made(at: datetime) -> Any:
            return resource.new(id_, {**fields, "request_hash": sha256}, Context(restaurant, at, prepared))

        receipt = await context.changes.create(identity, entity, id_, made, request_hash=sha256)
        return await _reply(request, receipt, status=201)

    @endpoint(
        "GET",
        resource.path,
        **common,
        action=read,
        summary=f"List {nouns}",
        description="The newest ones come first. `next_cursor` of a page leads to the next one. While PostgreSQL is"
        " unavailable, the list has only what the mirror has. While the mirror is not warm, it may lack changes that"
        " PostgreSQL does not have yet. `complete` is then false.",
        query=resource.query,
        many=True,
    )
    async def list_all(request: Call) -> ASGIApp:
        identity, context = request.identity, context_of(request)
        restaurant = (await context.menus.book(identity.tenant)).restaurant
        query = resource.normalize_query(read_query(request, resource.query), restaurant)
        own = {"id": identity.table_id} if entity is table.ENTITY and identity.table_id else {}
        page = await context.reads.page(entity, identity.tenant, selection(query, identity, **own), query.sync_state)
        derived = await resource.derive(
            context.figures, restaurant, identity, [found.decoded() for found in page.found]
        )
        return list_reply(entity, page, query, identity, derived, names=resource.derived_types)

    @endpoint(
        "GET",
        one,
        **common,
        action=read,
        summary=f"Read {a_noun}",
        description=f"A {noun} that was deleted is not found.",
        errors=(404,),
        headers=("If-None-Match",),
        not_modified=True,
    )
    async def read_one(request: Call) -> ASGIApp:
        identity, context = request.identity, context_of(request)
        id_ = _id(request, resource)
        if entity is table.ENTITY and identity.table_id not in (None, id_):
            raise NotFound("no such table")  # a guest at a table does not see the others
        found = await context.reads.one(entity, identity.tenant, id_)
        state = found.decoded()
        if state.deleted_at is not None:
            raise NotFound(f"the {noun} is deleted", code=f"{entity.name}_deleted")
        # Derived fields change without a new version, so only an entity without them can be unmodified.
        known = not resource.derived_types and is_known(request, found.head.version)
        return found_reply(found, identity, known=known, **await _derived_fields(context, resource, identity, state))

    @endpoint(
        "PUT",
        one,
        **of_one,
        summary=f"Change {a_noun}",
        description="Absent fields keep their values. A change without effect makes no new version.",
        body=resource.update,
        example=resource.example,
    )
    async def update(request: Call) -> ASGIApp:
        fields = requested_fields(read_body(await request.whole_body(), resource.update))
        identity, context = request.identity, context_of(request)
        id_, versions = _id(request, resource), required_versions(request)
        restaurant = (await context.menus.book(identity.tenant)).restaurant
        before = (await context.reads.one(entity, identity.tenant, id_)).decoded()
        prepared = await resource.prepare(context.figures, restaurant, fields, before)
        receipt = await context.changes.change(
            identity,
            entity,
            id_,
            versions,
            lambda state, at, _: resource.after(state, fields, Context(restaurant, at, prepared)),
        )
        return await _reply(request, receipt)

    @endpoint(
        "DELETE",
        one,
        **of_one,
        summary=f"Delete {a_noun}; it can be restored",
        description="Lists leave it out, unless an admin asks for deleted ones too.",
    )
    async def delete(request: Call) -> ASGIApp:
        id_, versions = _id(request, resource), required_versions(request)
        return await _reply(request, await context_of(request).changes.delete(request.identity, entity, id_, versions))

    @endpoint(
        "POST",
        f"{one}/restore",
        **of_one,
        summary=f"Restore {a_noun} that was deleted",
        description=f"Answers 409 if the {noun} is not deleted.",
    )
    async def restore(request: Call) -> ASGIApp:
        id_, versions = _id(request, resource), required_versions(request)
        return await _reply(request, await context_of(request).changes.restore(request.identity, entity, id_, versions))

    async def _reply(request: Call, receipt: Receipt, *, status: int = 200) -> Reply:
        context = context_of(request)
        if entity is menu_item.ENTITY:
            context.menus.put(receipt.head, receipt.state)
        return receipt_reply(
            receipt,
            request.identity,
            status=status,
            **await _derived_fields(context, resource, request.identity, receipt.state),
        )

    return [create, list_all, read_one, update, delete, restore]


async def _derived_fields(context: RouteContext, resource: Resource, identity: Identity, state: Any) -> dict[str, Any]:
    if not resource.derived_types:
        return {}
    restaurant = (await context.menus.book(state.restaurant_id)).restaurant
    return (await resource.derive(context.figures, restaurant, identity, [state]))[0]


def _id(request: Call, resource: Resource) -> str:
    return path_id(request.path_params[resource.id_name], resource.id_name)


ROUTES = [route for resource in RESOURCES for route in routes_of(resource)]
