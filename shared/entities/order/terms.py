"""The terms of an order: the taxes and the service charge of its restaurant at the time of its creation. A later change
of the settings does not change the order."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Label

BasisPoints = Annotated[int, Meta(ge=0, le=10_000)]
"""Hundredths of a percent: 1,000 is 10 %."""
PartsPerMillion = Annotated[int, Meta(ge=0, le=1_000_000)]
"""A tax rate: 88,750 is 8.875 %."""
Guests = Annotated[int, Meta(ge=1, le=1_000)]

STANDARD = "standard"
"""The tax category of a line that names none."""
DEFAULT = "default"
"""The rate of a category for the order types that have no rate of their own."""
AS_LINES = "as_lines"
UNTAXED = "untaxed"


class OrderType(StrEnum):
    DINE_IN = "dine_in"
    TAKEAWAY = "takeaway"
    DELIVERY = "delivery"


class TaxMode(StrEnum):
    EXCLUSIVE = "exclusive"
    """The tax is added to the prices."""
    INCLUSIVE = "inclusive"
    """The prices contain the tax."""


class Rounding(StrEnum):
    ORDER = "order"
    """The tax is rounded once for each rate and apportioned to the lines."""
    LINE = "line"


class TaxedDiscounts(StrEnum):
    REDUCED_PRICE = "reduced_price"
    """The tax is computed from the price that the guest pays (directive 2006/112/EC, art. 79)."""
    FULL_PRICE = "full_price"
    """The tax is computed from the price before the order's discount. Exclusive taxes only."""


Rates = dict[str, PartsPerMillion]
"""Order type, or `default` -> rate."""


class Tax(Struct, frozen=True, omit_defaults=True):
    """`rates`: tax category -> rates. A category without rates is taxed as `standard`; without any rate there is no
    tax."""

    mode: TaxMode = TaxMode.EXCLUSIVE
    rounding: Rounding = Rounding.ORDER
    discounts: TaxedDiscounts = TaxedDiscounts.REDUCED_PRICE
    rates: dict[str, Rates] = {}

    @classmethod
    def added(cls, basis_points: int) -> "Tax":
        """Returns a tax with one rate, which is added to the full price as in the original systems."""
        rates = {STANDARD: {DEFAULT: basis_points * 100}}
        return cls(discounts=TaxedDiscounts.FULL_PRICE, rates=rates)

    def rate(self, category: str | None, type_: OrderType) -> int:
        """Returns the rate in parts per million."""
        rates = self.rates.get(category or STANDARD) or self.rates.get(STANDARD) or {}
        return rates.get(type_, rates.get(DEFAULT, 0))


class ServiceCharge(Struct, frozen=True, omit_defaults=True):
    """A charge on orders of these types with at least `min_guests` guests. `tax`: `as_lines` (each line bears its
    share), `untaxed`, or a tax category."""

    bp: BasisPoints
    types: tuple[OrderType, ...] = (OrderType.DINE_IN,)
    min_guests: Annotated[int, Meta(ge=0, le=256)] = 0
    tax: Label | None = None
    """None means `as_lines`."""


class Terms(Struct, frozen=True, omit_defaults=True):
    """The taxes and the service charge. The currency is a field of the order itself."""

    tax: Tax
    service_charge: ServiceCharge | None = None
