"""Answers for the refusals of the order's law, which knows no HTTP: kind, code, field and details become an error."""

from collections.abc import Iterator
from contextlib import contextmanager

from shared.entities.order.refusals import Kind, Refused
from shared.errors import Conflict, Forbidden, InvalidInput, NotFound, TicketrailError

_TYPES: dict[Kind, type[TicketrailError]] = {
    Kind.INVALID: InvalidInput,
    Kind.FORBIDDEN: Forbidden,
    Kind.ABSENT: NotFound,
    Kind.CONFLICT: Conflict,
}


def as_error(refused: Refused) -> TicketrailError:
    """Returns the error that a caller sees of a refused command. Its details have `field` only if the refusal names
    one."""
    named = {} if refused.field is None else {"field": refused.field}
    return _TYPES[refused.kind](str(refused), code=refused.code, **named, **refused.details)


@contextmanager
def refusals() -> Iterator[None]:
    """Raises what a refused command of the block means for the caller."""
    try:
        yield
    except Refused as refused:
        raise as_error(refused) from refused
