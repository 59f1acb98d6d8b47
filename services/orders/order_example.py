"""The order in the examples of the API documents. Its amounts add up."""

from typing import Any

DISH_ID = "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11"
TABLE_ID = "2a6d1f0e-4c11-5c0a-9b1d-7f0c3b526f1e"
AT = "2026-03-14T12:30:00Z"

REQUEST: dict[str, Any] = {
    "items": [{"menu_item_id": DISH_ID, "quantity": 2, "customizations": [{"name": "size", "option": "large"}]}],
    "table_id": TABLE_ID,
    "tip_amount": 200,
    "notes": "birthday",
}
ORDER: dict[str, Any] = {
    "id": "5b0f6c1e-8f57-5d0e-a3c8-1f0f3f1c2a77",
    "restaurant_id": "11111111-1111-4111-8111-111111111111",
    "order_number": "0042",
    "business_day": "2026-03-14",
    "status": "pending",
    "items": [
        {
            "menu_item_id": DISH_ID,
            "name": "Margherita",
            "quantity": 2,
            "unit_price": 1230,
            "line_total": 2460,
            "customizations": [{"name": "size", "option": "large", "price": 250}],
        }
    ],
    "currency": "EUR",
    "subtotal": 2460,
    "tax_basis_points": 1900,
    "tax_amount": 467,
    "tip_amount": 200,
    "discount_amount": 0,
    "deposit_used": 0,
    "total": 3127,
    "created_at": AT,
    "updated_at": AT,
    "table_id": TABLE_ID,
    "payment_status": "pending",
    "notes": "birthday",
    "placed_by": "0c9b2d7e-1f64-4c0b-9c58-6f1f7b0d2e33",
}
PAYMENT: dict[str, Any] = {
    "id": "0b9df4a0-93b2-4c55-9a5e-5f1a6c1d9a11",
    "amount": 1500,
    "method": "card",
    "created_at": "2026-03-14T12:45:00Z",
    "reference": "auth 77",
}
PAID: dict[str, Any] = {
    **ORDER,
    "payments": [PAYMENT],
    "payment": PAYMENT,
    "payment_status": "partially_paid",
    "updated_at": "2026-03-14T12:45:00Z",
    "version": 2,
}
