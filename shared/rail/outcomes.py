"""The outcomes of a commit in addition to the errors of shared/errors.py.

ClaimLost and OutOfStock: nothing of the change was claimed. NoClaim: the mirror took no claim of a creation, which may
continue without one (idempotency.py).
"""

from typing import Any

from msgspec import Struct

from shared.entities.contract import Head
from shared.errors import OutcomeUnknown, TicketrailError, Unavailable
from shared.rail.head import Standing
from shared.rail.record import Durability


class Committed(Struct, frozen=True):
    state: Any
    head: Head
    durability: Durability
    visible: bool
    raw: bytes
    """The state as it was recorded, with the fields that this release does not know."""


class ClaimLost(TicketrailError):
    """Another change came first. `head` is None while that change is not committed yet. `standing` is None in the same
    case, and also if the mirror does not have the state."""

    status = 409
    code = "version_conflict"

    def __init__(self, head: Head | None = None, standing: Standing | None = None) -> None:
        super().__init__("another change came first")
        self.head = head
        self.standing = standing


class OutOfStock(TicketrailError):
    """The stock is not enough. `left`: pairs of inventory item id and available amount."""

    status = 409
    code = "out_of_stock"

    def __init__(self, left: tuple[tuple[str, int], ...]) -> None:
        super().__init__("the stock is not enough")
        self.left = left


class NoClaim(TicketrailError):
    """The mirror took no claim. `sent`: a claim got no reply; it may have been executed, or may be executed when a
    frozen server continues. `asked`: the mirror does not know all keys yet, so the caller must look into PostgreSQL."""

    status = 503
    code = "unavailable"

    def __init__(self, *, sent: bool, asked: bool = False) -> None:
        super().__init__("the mirror takes no claims")
        self.sent = sent
        self.asked = asked

    def refusal(self) -> TicketrailError:
        """Returns the error for a change that cannot continue without a claim."""
        cold = Unavailable("nothing can be changed until the mirror is warm; retry", retry_after=2.0)
        return unless_sent(self.sent, cold)


def unless_sent(sent: bool, error: TicketrailError) -> TicketrailError:
    """Returns the error, or OutcomeUnknown if a claim got no reply, because it may have been executed."""
    if not sent:
        return error
    return OutcomeUnknown(f"the mirror did not answer in time, so the change may appear ({error})")
