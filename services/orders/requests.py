"""What clients send. Unknown fields are refused; money is integer minor units; what is absent in a change stays."""

from typing import Annotated
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.entities.contract import Label, Text
from shared.entities.order import Customization, Quantity, Status


class RequestedCustomization(Struct, forbid_unknown_fields=True, frozen=True):
    name: Label
    option: Label

    def kept(self) -> Customization:
        return Customization(self.name, self.option)


class RequestedItem(Struct, forbid_unknown_fields=True, frozen=True):
    menu_item_id: UUID
    quantity: Quantity
    special_instructions: Text | None = None
    customizations: Annotated[list[RequestedCustomization], Meta(max_length=50)] = []


# Far above any tip, and small enough that no sum leaves what the contract allows.
Charge = Annotated[int, Meta(ge=0, le=10**11)]
Items = Annotated[list[RequestedItem], Meta(min_length=1, max_length=1_000)]


class PlaceOrder(Struct, forbid_unknown_fields=True, frozen=True):
    items: Items
    table_id: UUID | None = None
    customer_name: Label | None = None
    customer_phone: Label | None = None
    customer_session_id: Label | None = None
    tip_amount: Charge = 0
    discount_amount: Charge = 0
    deposit_used: Charge = 0
    payment_method: Label | None = None
    notes: Text | None = None
    special_instructions: Text | None = None


class UpdateOrder(Struct, forbid_unknown_fields=True, frozen=True):
    items: Items | UnsetType = UNSET
    table_id: UUID | UnsetType | None = UNSET
    customer_name: Label | UnsetType | None = UNSET
    customer_phone: Label | UnsetType | None = UNSET
    tip_amount: Charge | UnsetType = UNSET
    discount_amount: Charge | UnsetType = UNSET
    payment_method: Label | UnsetType | None = UNSET
    notes: Text | UnsetType | None = UNSET
    special_instructions: Text | UnsetType | None = UNSET
    status: Status | UnsetType = UNSET
