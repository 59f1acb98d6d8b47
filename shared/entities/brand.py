"""A brand of dishes."""

from shared.entities.menu_group import MenuGroup, menu_group_entity


class Brand(MenuGroup, frozen=True, kw_only=True):
    """A brand. The field `brand` of a dish contains the `name` of its brand."""


ENTITY = menu_group_entity("brand", Brand, table="brands")
