"""A brand that dishes can carry."""

from shared.entities.menu_group import MenuGroup, menu_group_entity


class Brand(MenuGroup, frozen=True, kw_only=True):
    """The `brand` of a dish is the `name` of one of these."""


ENTITY = menu_group_entity("brand", Brand, table="brands")
