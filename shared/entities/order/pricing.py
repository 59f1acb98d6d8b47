"""The rules of prices: amounts of lines, discounts, service charge, taxes and tips (docs/orders.md).

Each amount is rounded once, half up, and apportioned to the lines without loss. All amounts are in minor units.
"""

import hashlib
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from shared.entities.order.state import Discount, Line, Order, RateTax
from shared.entities.order.terms import AS_LINES, UNTAXED, Rounding, ServiceCharge, Tax, TaxedDiscounts, TaxMode

_BASIS = 10_000
_MILLION = 1_000_000


def half_up(numerator: int, denominator: int) -> int:
    """Returns the rounded quotient; a half is rounded up. Neither number is negative."""
    return (2 * numerator + denominator) // (2 * denominator)


def apportion(amount: int, weights: Sequence[int]) -> list[int]:
    """Divides an amount by weight into shares that sum to it. Each share is first rounded down. The units that are left
    go to the largest fractions, and to the earlier one of two equal fractions. If all weights are 0, they count as
    equal."""
    total = sum(weights)
    if not total:
        if not weights:
            return []
        weights, total = [1] * len(weights), len(weights)
    products = [amount * weight for weight in weights]
    shares = [product // total for product in products]
    left = amount - sum(shares)
    if left:
        for place in sorted(range(len(shares)), key=lambda n: -(products[n] % total))[:left]:
            shares[place] += 1
    return shares


def quantity(line: Line) -> int:
    """Returns the number of pieces that are not voided."""
    if not line.voids:
        return line.ordered
    voided = 0
    for void in line.voids:
        if void.quantity is None:
            return 0
        voided += void.quantity
    return max(0, line.ordered - voided)


def wasted(line: Line, active: int) -> int:
    """Returns the number of wasted pieces: voided after the kitchen started them. `active`: the line's quantity."""
    made = sum(void.quantity or 0 for void in line.voids if void.wasted)
    if any(void.wasted and void.quantity is None for void in line.voids):
        returned = sum(void.quantity or 0 for void in line.voids if not void.wasted)
        made = max(made, line.ordered - returned)
    return min(made, line.ordered - active)


def discounted(discount: Discount | None, price: int) -> int:
    """Returns the amount of a discount, which is never more than the price."""
    if discount is None:
        return 0
    if discount.bp is not None:
        return half_up(price * discount.bp, _BASIS)
    return min(discount.amount or 0, price)


def basis(order: Order) -> str:
    """Returns a digest of all parts of the price, except the tips of payments."""
    lines = [
        (line.id, quantity(line), line.unit_price, line.tax_category, line.discount)
        for line in sorted(order.items, key=lambda line: line.id)
    ]
    parts = (lines, order.type, order.guests, order.tip, order.deposit_used, order.discount, order.service)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class Priced(Struct, frozen=True):
    """The amounts of an order. The lists have one element for each line."""

    quantities: list[int]
    line_totals: list[int]
    discounts: list[int]
    line_taxes: list[int]
    nets: list[int]
    subtotal: int
    discount_amount: int
    service_amount: int
    service_tax: int
    tax_amount: int
    taxes: tuple[RateTax, ...]
    total: int


def priced(order: Order, lines: Sequence[Line], tip: int) -> Priced:
    """Returns the amounts of an order with these lines, which are sorted by (seq, id). `tip`: all tips, including those
    of the payments."""
    tax = order.terms.tax
    quantities = [quantity(line) for line in lines]
    totals = [line.unit_price * number for line, number in zip(lines, quantities, strict=True)]
    discounts = [discounted(line.discount, total) for line, total in zip(lines, totals, strict=True)]
    before = [total - discount for total, discount in zip(totals, discounts, strict=True)]
    shares = apportion(discounted(order.discount, sum(before)), before)
    paid = [price - share for price, share in zip(before, shares, strict=True)]

    charge = order.terms.service_charge
    service = _service(order, charge, sum(paid))
    treatment = (charge.tax if charge is not None else None) or AS_LINES
    service_shares = apportion(service, paid) if service and treatment == AS_LINES else [0] * len(paid)
    # An inclusive tax of the full price could exceed the price that is paid, so only exclusive taxes use it.
    full = tax.mode is TaxMode.EXCLUSIVE and tax.discounts is TaxedDiscounts.FULL_PRICE
    bases = [price + share for price, share in zip(before if full else paid, service_shares, strict=True)]
    rates = [tax.rate(line.tax_category, order.type) for line in lines]
    if has_line := bool(service) and treatment not in (AS_LINES, UNTAXED):
        bases.append(service)
        rates.append(tax.rate(treatment, order.type))
    taxes = _taxes(tax, bases, rates)
    by_rate = _by_rate(tax, bases, rates, taxes)
    service_tax = taxes.pop() if has_line else 0

    inclusive = tax.mode is TaxMode.INCLUSIVE
    nets = [
        price + share - (one if inclusive else 0) for price, share, one in zip(paid, service_shares, taxes, strict=True)
    ]
    tax_amount = sum(taxes) + service_tax
    gross = sum(paid) + service + tip + (0 if inclusive else tax_amount)
    return Priced(
        quantities=quantities,
        line_totals=totals,
        discounts=[one + share for one, share in zip(discounts, shares, strict=True)],
        line_taxes=taxes,
        nets=nets,
        subtotal=sum(totals),
        discount_amount=sum(discounts) + sum(shares),
        service_amount=service,
        service_tax=service_tax,
        tax_amount=tax_amount,
        taxes=by_rate,
        total=max(0, gross - order.deposit_used),
    )


def _service(order: Order, charge: ServiceCharge | None, paid: int) -> int:
    if order.service is not None:
        return half_up(paid * order.service.bp, _BASIS)
    if charge is None or order.type not in charge.types or (order.guests or 0) < charge.min_guests:
        return 0
    return half_up(paid * charge.bp, _BASIS)


def _tax(tax: Tax, base: int, rate: int) -> int:
    return half_up(base * rate, _MILLION if tax.mode is TaxMode.EXCLUSIVE else _MILLION + rate)


def _taxes(tax: Tax, bases: list[int], rates: list[int]) -> list[int]:
    """Returns the tax of each base. With rounding per order, the tax of a rate is computed from the sum of its bases
    and apportioned to them."""
    if tax.rounding is Rounding.LINE:
        return [_tax(tax, base, rate) for base, rate in zip(bases, rates, strict=True)]
    found = [0] * len(bases)
    for rate in set(rates):
        places = [place for place, one in enumerate(rates) if one == rate]
        weights = [bases[place] for place in places]
        total = sum(weights)
        if total and rate:
            for place, share in zip(places, apportion(_tax(tax, total, rate), weights), strict=True):
                found[place] = share
    return found


def _by_rate(tax: Tax, bases: list[int], rates: list[int], taxes: list[int]) -> tuple[RateTax, ...]:
    sums: dict[int, tuple[int, int]] = {}
    for base, rate, one in zip(bases, rates, taxes, strict=True):
        net = base - one if tax.mode is TaxMode.INCLUSIVE else base
        earlier = sums.get(rate, (0, 0))
        sums[rate] = earlier[0] + net, earlier[1] + one
    return tuple(RateTax(rate, *sums[rate]) for rate in sorted(sums))
