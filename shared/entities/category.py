"""A heading of the menu."""

from shared.entities.menu_group import MenuGroup, menu_group_entity


class Category(MenuGroup, frozen=True, kw_only=True):
    """The `category` of a dish is the `name` of one of these."""


ENTITY = menu_group_entity("category", Category, table="categories")
