"""A category: a heading of the menu, such as "Desserts"."""

from shared.entities.menu_group import MenuGroup, menu_group_entity


class Category(MenuGroup, frozen=True, kw_only=True):
    """A category. The field `category` of a dish contains the `name` of its category."""


ENTITY = menu_group_entity("category", Category, table="categories")
