"""1.0 and 1e2 are integers, as in JSON Schema."""

from decimal import Decimal

_MAX_INTEGER_DIGITS = 30


def integer_if_whole(text: str) -> int | float:
    """Returns the value of a number of JSON that has a fraction or an exponent."""
    number = Decimal(text)
    # The exponent is checked first, because 1e999999999 would become an integer of a gigabyte.
    if number.adjusted() > _MAX_INTEGER_DIGITS or number != number.to_integral_value():
        return float(text)
    return int(number)
