"""Declares each entity of the back office. `routes/entities.py` creates the routes from the declarations. The rules of
an entity are pure functions, and `prepare` reads the data that they need."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
import phonenumbers
from msgspec import Struct, field

from services.orders import requests
from services.orders.derived_figures import DerivedFigures, OrderAtTable
from shared.entities import bay, brand, category, customer, inventory_item, job, menu_item, table
from shared.entities.contract import in_range
from shared.entities.entity import Entity
from shared.entities.inventory_item import InventoryItem, recount_at
from shared.entities.job import BayJob, JobStage
from shared.errors import Conflict, InvalidInput, NotFound
from shared.http.endpoint import ListQuery
from shared.restaurants import Restaurant
from shared.security.emails import read_email
from shared.security.tokens import Identity

Fields = dict[str, Any]


class Context(Struct, frozen=True):
    """The data that the rules of an entity get in addition to the fields and the state."""

    restaurant: Restaurant
    at: datetime
    prepared: Any = None
    """The result of `Resource.prepare`."""


def _as_requested(fields: Fields, _: Context) -> Fields:
    return fields


def _changed_as_requested(state: Any, fields: Fields, _: Context) -> tuple[str, Fields]:
    return "updated", fields


async def _prepare_nothing(figures: DerivedFigures, restaurant: Restaurant, fields: Fields, state: Any | None) -> Any:
    return None


async def _no_derived_fields(
    figures: DerivedFigures, restaurant: Restaurant, identity: Identity, states: list[Any]
) -> list[Fields]:
    return [{} for _ in states]


class Resource(Struct, frozen=True, kw_only=True):
    entity: Entity
    path: str
    tag: str
    noun: str
    actions: tuple[str, str]
    """(action for reading, action for changing), which the caller's role must allow."""
    create: Any
    update: Any
    query: Any = ListQuery
    example: Fields = field(default_factory=dict)
    normalize_query: Callable[[Any, Restaurant], Any] = lambda query, _: query
    """Converts the values of a query into the form of the states. Raises InvalidInput."""
    prepare: Callable[[DerivedFigures, Restaurant, Fields, Any | None], Awaitable[Any]] = _prepare_nothing
    """Reads the data that the rules need (`Context.prepared`). Raises InvalidInput."""
    new_fields: Callable[[Fields, Context], Fields] = _as_requested
    """Returns the fields of a new entity. Raises InvalidInput."""
    changed_fields: Callable[[Any, Fields, Context], tuple[str, Fields]] = _changed_as_requested
    """Returns (event, changed fields). Raises InvalidInput, Conflict."""
    derive: Callable[[DerivedFigures, Restaurant, Identity, list[Any]], Awaitable[list[Fields]]] = _no_derived_fields
    """Returns the derived fields of each state, which the caller sees with it."""
    derived_types: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id_name(self) -> str:
        return f"{self.entity.name}_id"

    def new(self, id_: str, fields: Fields, context: Context) -> Any:
        made = self.new_fields(fields, context)
        at, restaurant = context.at, context.restaurant.id
        values = {"id": id_, "restaurant_id": restaurant, "created_at": at, "updated_at": at, **made}
        return _checked(self.entity, values)

    def after(self, state: Any, fields: Fields, context: Context) -> tuple[str, Any]:
        event, changed = self.changed_fields(state, fields, context)
        # The states are compared, because a request's values have other types than equal values of a state.
        after = _checked(self.entity, {**msgspec.structs.asdict(state), **changed})
        return event, state if after == state else msgspec.structs.replace(after, updated_at=context.at)


def _checked(entity: Entity, fields: Fields) -> Any:
    return msgspec.convert(msgspec.to_builtins(fields), entity.state)


# -- the menu ----------------------------------------------------------------------------------------------------


def _check_dish(fields: Fields) -> Fields:
    groups = fields.get("customizations") or ()
    seen: set[str] = set()
    for index, group in enumerate(groups):
        field_name = f"customizations[{index}]"
        if group.name in seen:
            raise InvalidInput(f"two groups have the name {group.name!r}", field=f"{field_name}.name")
        seen.add(group.name)
        if group.min_choices > group.max_choices:
            raise InvalidInput("min_choices is larger than max_choices", field=f"{field_name}.min_choices")
        names = [option.name for option in group.options]
        if len(set(names)) < len(names):
            raise InvalidInput("two options have the same name", field=f"{field_name}.options")
    needed = [str(one.inventory_item_id) for one in fields.get("consumes") or ()]
    if len(set(needed)) < len(needed):
        raise InvalidInput("must not name an inventory item twice", field="consumes")
    return fields


async def _check_consumed_items(figures: DerivedFigures, restaurant: Restaurant, fields: Fields, _: Any | None) -> None:
    for index, one in enumerate(fields.get("consumes") or ()):
        await figures.must_exist(
            inventory_item.ENTITY, restaurant.id, str(one.inventory_item_id), f"consumes[{index}].inventory_item_id"
        )


# -- tables, bays and jobs ---------------------------------------------------------------------------------------


class _Queue(Struct, frozen=True):
    bay_open: bool
    queued: list[BayJob]
    """The other queued jobs of the bay, the next one first."""


async def _read_bay_queue(
    figures: DerivedFigures, restaurant: Restaurant, fields: Fields, state: BayJob | None
) -> _Queue:
    requested = fields.get("bay_id")
    bay_id = str(requested) if requested is not None else state.bay_id if state is not None else ""
    try:
        found = await figures.current_state(bay.ENTITY, restaurant.id, bay_id)
    except NotFound as error:
        if requested is not None:
            raise InvalidInput("no such bay", field="bay_id", code="unknown_bay") from error
        found = None
    if requested is not None and found is not None and found.deleted_at is not None:
        raise InvalidInput("no such bay", field="bay_id", code="unknown_bay")
    if fields.get("order_id") is not None:
        await figures.must_exist(figures.ORDER, restaurant.id, str(fields["order_id"]), "order_id")
    queued: list[BayJob] = []
    if "position" in fields:
        queued = [one for one in await figures.queue(restaurant.id, bay_id) if state is None or one.id != state.id]
    return _Queue(found is None or (found.is_open and found.deleted_at is None), queued)


def _check_scheduled_time(fields: Fields) -> Fields:
    if (at := fields.get("scheduled_at")) and not in_range(at):
        raise InvalidInput("must be a time between 1970 and 2200", field="scheduled_at")
    return fields


def _new_job(fields: Fields, context: Context) -> Fields:
    return {
        **_check_scheduled_time(fields),
        "place": job.place_at(fields.get("scheduled_at") or context.at, context.at),
    }


def _changed_job(state: BayJob, fields: Fields, context: Context) -> tuple[str, Fields]:
    found: Fields = dict(_check_scheduled_time(fields))
    position = found.pop("position", None)
    event = "updated"
    stage = found.get("stage", state.stage)
    if stage is not state.stage:
        event = "stage_changed"
        allowed = job.allowed_next(state.stage)
        if stage not in allowed:
            raise Conflict(
                f"a job that is {state.stage} cannot become {stage}",
                code="illegal_stage",
                field="stage",
                stage=state.stage,
                allowed=list(allowed),
            )
        if stage is JobStage.IN_PROGRESS:
            if not context.prepared.bay_open:
                raise Conflict("the bay is closed", code="bay_closed", field="stage")
            found["started_at"] = context.at
        elif stage is JobStage.QUEUED:
            found["started_at"] = None
        else:
            found["finished_at"] = context.at
    if position is not None:
        if stage is not JobStage.QUEUED:
            raise Conflict(f"a job that is {stage} has no position in the queue", code="not_queued", field="position")
        found["place"] = _sort_key(context.prepared.queued, position, state)
    elif found.get("scheduled_at") not in (None, state.scheduled_at):
        found["place"] = job.place_at(found["scheduled_at"], state.created_at)
    return event, found


def _sort_key(queued: list[BayJob], position: int, state: BayJob) -> str:
    """Returns a sort key between the neighbours at `position`. `queued` has the other jobs."""
    before = queued[: position - 1][-1:]
    after = queued[position - 1 :][:1]
    if before and after:
        return job.place_between(before[0].place, after[0].place, tie_breaker=state.id)
    if before or after:
        neighbour, seconds = (before[0], 1) if before else (after[0], -1)
        return job.place_beside(neighbour.place, seconds, state.created_at)
    return state.place


# -- customers and stock -----------------------------------------------------------------------------------------


def _with_plain_contacts(fields: Fields, context: Context) -> Fields:
    """Returns the fields with the email and the phone number in the forms in which they are stored."""
    if fields.get("email") is not None:
        fields = {**fields, "email": read_email(fields["email"])}
    if fields.get("phone") is not None:
        return {**fields, "phone": e164(fields["phone"], context.restaurant.settings.country)}
    return fields


_MAX_E164_CHARS = 16  # the plus and at most 15 digits


def e164(text: str, country: str | None) -> str:
    """Returns the number in E.164 format. `country` is the ISO 3166 code for numbers without a country code.
    Raises InvalidInput."""
    try:
        found = phonenumbers.parse(text, country)
    except phonenumbers.NumberParseException as error:
        message = "not a phone number"
        if error.error_type == phonenumbers.NumberParseException.INVALID_COUNTRY_CODE:
            message = "must begin with + and the country code"
        raise InvalidInput(message, field="phone", code="invalid_phone") from error
    number = phonenumbers.format_number(found, phonenumbers.PhoneNumberFormat.E164)
    # phonenumbers also accepts numbers that work only within one town. From abroad they reach another subscriber.
    possible = phonenumbers.is_possible_number_with_reason(found) == phonenumbers.ValidationResult.IS_POSSIBLE
    if not possible or len(number) > _MAX_E164_CHARS:
        raise InvalidInput("not a possible phone number", field="phone", code="invalid_phone")
    return number


def _with_e164_query(query: requests.CustomersQuery, restaurant: Restaurant) -> requests.CustomersQuery:
    if query.phone is None:
        return query
    # An unescaped plus in a query means a space.
    text = f"+{query.phone[1:]}" if query.phone.startswith(" ") else query.phone
    return msgspec.structs.replace(query, phone=e164(text, restaurant.settings.country))


def _recounted(item: InventoryItem, fields: Fields, context: Context) -> tuple[str, Fields]:
    counted = {"counted_at": recount_at(item, context.at)} if "quantity" in fields else {}
    return "updated", {**fields, **counted}


RESOURCES = (
    Resource(
        entity=category.ENTITY,
        path="/api/menu/categories",
        tag="Menu",
        noun="category",
        actions=("menu.read", "menu.change"),
        create=requests.CreateHeading,
        update=requests.UpdateHeading,
        example={"name": "Mains", "position": 2},
    ),
    Resource(
        entity=brand.ENTITY,
        path="/api/menu/brands",
        tag="Menu",
        noun="brand",
        actions=("menu.read", "menu.change"),
        create=requests.CreateHeading,
        update=requests.UpdateHeading,
        example={"name": "Fritz"},
    ),
    Resource(
        entity=menu_item.ENTITY,
        path="/api/menu",
        tag="Menu",
        noun="dish",
        actions=("menu.read", "menu.change"),
        create=requests.CreateMenuItem,
        update=requests.UpdateMenuItem,
        query=requests.MenuQuery,
        example={
            "name": "Margherita",
            "price": 980,
            "category": "Mains",
            "customizations": [
                {
                    "name": "size",
                    "min_choices": 1,
                    "max_choices": 1,
                    "options": [{"name": "regular"}, {"name": "large", "price": 250}],
                }
            ],
        },
        prepare=_check_consumed_items,
        new_fields=lambda fields, _: _check_dish(fields),
        changed_fields=lambda _, fields, __: ("updated", _check_dish(fields)),
    ),
    Resource(
        entity=table.ENTITY,
        path="/api/tables",
        tag="Tables",
        noun="table",
        actions=("tables.read", "tables.change"),
        create=requests.CreateTable,
        update=requests.UpdateTable,
        query=requests.TablesQuery,
        example={"label": "Window 4", "seats": 4},
        derive=lambda figures, restaurant, identity, states: figures.orders_at(restaurant.id, identity, states),
        derived_types={"current_orders": list[OrderAtTable]},
    ),
    Resource(
        entity=bay.ENTITY,
        path="/api/bays",
        tag="Bays and jobs",
        noun="bay",
        actions=("work.read", "work.change"),
        create=requests.CreateBay,
        update=requests.UpdateBay,
        query=requests.BaysQuery,
        example={"name": "Grill", "kind": "kitchen"},
    ),
    Resource(
        entity=job.ENTITY,
        path="/api/jobs",
        tag="Bays and jobs",
        noun="job",
        actions=("work.read", "work.change"),
        create=requests.CreateJob,
        update=requests.UpdateJob,
        query=requests.JobsQuery,
        example={"bay_id": "2a6d1f0e-4c11-5c0a-9b1d-7f0c3b526f1e", "title": "Wash and dry", "expected_minutes": 20},
        prepare=_read_bay_queue,
        new_fields=_new_job,
        changed_fields=_changed_job,
        derive=lambda figures, restaurant, _, states: figures.positions(restaurant.id, states),
        derived_types={"position": int | None},
    ),
    Resource(
        entity=customer.ENTITY,
        path="/api/customers",
        tag="Customers",
        noun="customer",
        actions=("customers.read", "customers.change"),
        create=requests.CreateCustomer,
        update=requests.UpdateCustomer,
        query=requests.CustomersQuery,
        normalize_query=_with_e164_query,
        example={"name": "Ada", "phone": "+4930123456"},
        new_fields=_with_plain_contacts,
        changed_fields=lambda _, fields, context: ("updated", _with_plain_contacts(fields, context)),
        derive=lambda figures, restaurant, _, states: figures.totals(restaurant, states),
        derived_types={"loyalty_points": int | None, "total_spent": int | None, "visits": int | None},
    ),
    Resource(
        entity=inventory_item.ENTITY,
        path="/api/inventory",
        tag="Inventory",
        noun="inventory item",
        actions=("inventory.read", "inventory.change"),
        create=requests.CreateInventoryItem,
        update=requests.UpdateInventoryItem,
        example={"name": "Pizza dough", "quantity": 40, "unit": "piece", "low_at": 10},
        new_fields=lambda fields, context: {**fields, "counted_at": context.at},
        changed_fields=_recounted,
        derive=lambda figures, restaurant, _, states: figures.available(restaurant.id, states),
        derived_types={"available": int | None, "held": int | None, "low": bool | None},
    ),
)
