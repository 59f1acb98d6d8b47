// A peer of the accept benchmark: Express with pg and one PostgreSQL transaction per order. It has the checks, prices, token
// cache and statements of peers/transaction.py, a pool of 20, prepared statements and the menu in memory. One thing differs:
// the unique index refuses a repeated Idempotency-Key, which the load never sends.
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const express = require("express");
const jwt = require("jsonwebtoken");
const { Pool } = require("pg");

const config = JSON.parse(fs.readFileSync(process.env.BENCH_RESTAURANTS, "utf8"));
const menuBooks = new Map(
  config.restaurants.map((one) => [
    one.id,
    { id: one.id, tax: 700, menu: new Map(one.dishes.map(([id, name, price]) => [id, { id, name, price }])) },
  ]),
);
const pool = new Pool({ connectionString: process.env.BENCH_DATABASE_URL, max: 20 });
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
const ORDER_FIELDS = new Set([
  "items", "table_id", "customer_name", "customer_phone", "customer_session_id", "tip_amount", "discount_amount",
  "deposit_used", "payment_method", "notes", "special_instructions",
]);
const ITEM_FIELDS = new Set(["menu_item_id", "quantity", "special_instructions", "customizations"]);

class RequestError extends Error {
  constructor(status, code, message, field) {
    super(message);
    Object.assign(this, { status, code, field });
  }
}

const verified = new Map();
function authenticate(header) {
  if (!header || !header.toLowerCase().startsWith("bearer ")) {
    throw new RequestError(401, "unauthenticated", "an Authorization header with a Bearer token is needed");
  }
  const token = header.slice(7);
  const known = verified.get(token);
  if (known && known.exp * 1000 > Date.now()) return known;
  let claims;
  try {
    claims = jwt.verify(token, config.secret, { algorithms: ["HS256"] });
  } catch (error) {
    throw new RequestError(401, "unauthenticated", error.message);
  }
  if (!UUID.test(claims.restaurantId) || !["admin", "staff", "customer"].includes(claims.role)) {
    throw new RequestError(401, "unauthenticated", "the token's role or restaurantId is not valid");
  }
  if (verified.size >= 4096) verified.clear();
  verified.set(token, claims);
  return claims;
}

function text(value, field, maxLength) {
  if (value === undefined || value === null) return null;
  if (typeof value !== "string" || value.length > maxLength || value.includes("\0")) {
    throw new RequestError(422, "invalid_input", `must be a text of at most ${maxLength} characters`, field);
  }
  return value;
}

function amount(value, field) {
  if (value === undefined) return 0;
  if (!Number.isInteger(value) || value < 0 || value > 1e11) {
    throw new RequestError(422, "invalid_input", "must be an amount in minor units", field);
  }
  return value;
}

function priced(requested, book) {
  if (typeof requested !== "object" || requested === null || Array.isArray(requested)) {
    throw new RequestError(422, "invalid_input", "must be an object", "body");
  }
  for (const name of Object.keys(requested)) {
    if (!ORDER_FIELDS.has(name)) throw new RequestError(422, "invalid_input", "unknown field", name);
  }
  if (!Array.isArray(requested.items) || requested.items.length < 1 || requested.items.length > 1000) {
    throw new RequestError(422, "invalid_input", "must be 1 to 1000 items", "items");
  }
  if (requested.table_id !== undefined && requested.table_id !== null && !UUID.test(requested.table_id)) {
    throw new RequestError(422, "invalid_input", "must be a UUID", "table_id");
  }
  const items = requested.items.map((item, place) => {
    for (const name of Object.keys(item)) {
      if (!ITEM_FIELDS.has(name)) throw new RequestError(422, "invalid_input", "unknown field", `items[${place}].${name}`);
    }
    const dish = book.menu.get(item.menu_item_id);
    if (!dish) throw new RequestError(422, "unknown_menu_item", "no such dish", `items[${place}].menu_item_id`);
    if (!Number.isInteger(item.quantity) || item.quantity < 1 || item.quantity > 1000) {
      throw new RequestError(422, "invalid_input", "must be 1 to 1000", `items[${place}].quantity`);
    }
    return {
      menu_item_id: dish.id,
      name: dish.name,
      quantity: item.quantity,
      unit_price: dish.price,
      line_total: dish.price * item.quantity,
      special_instructions: text(item.special_instructions, `items[${place}].special_instructions`, 2000),
      customizations: item.customizations ?? [],
    };
  });
  const [tip, discount, deposit] = ["tip_amount", "discount_amount", "deposit_used"].map((f) => amount(requested[f], f));
  const subtotal = items.reduce((sum, item) => sum + item.line_total, 0);
  if (discount > subtotal) throw new RequestError(422, "discount_above_subtotal", "must not be more than the subtotal", "discount_amount");
  const tax = Math.floor((subtotal * book.tax + 5000) / 10000);
  return {
    items, subtotal, tip, discount, deposit, tax, total: Math.max(0, subtotal + tax + tip - discount - deposit),
    customer_name: text(requested.customer_name, "customer_name", 200),
    notes: text(requested.notes, "notes", 2000),
  };
}

const day = new Intl.DateTimeFormat("sv-SE", { timeZone: "Europe/Berlin", dateStyle: "short" });

async function place(request, response) {
  const claims = authenticate(request.get("authorization"));
  const book = menuBooks.get(claims.restaurantId);
  const order = priced(request.body, book);
  const id = crypto.randomUUID();
  const at = new Date();
  const businessDay = day.format(new Date(at.getTime() - 4 * 3600 * 1000));
  const client = await pool.connect();
  let number;
  try {
    await client.query("begin");
    await client.query({
      name: "items",
      text:
        "insert into order_items select $1, $2, * from unnest($3::int[], $4::uuid[], $5::text[], $6::int[]," +
        " $7::bigint[], $8::bigint[])",
      values: [
        book.id, id, order.items.map((_, place) => place + 1), order.items.map((item) => item.menu_item_id),
        order.items.map((item) => item.name), order.items.map((item) => item.quantity),
        order.items.map((item) => item.unit_price), order.items.map((item) => item.line_total),
      ],
    });
    await client.query({
      name: "log",
      text: "insert into sync_log (restaurant_id, order_id, version, state) values ($1, $2, 1, 'pending')",
      values: [book.id, id],
    });
    const counted = await client.query({
      name: "count",
      text:
        "insert into counters as c values ($1, $2, 1) on conflict (restaurant_id, day) do update" +
        " set last = c.last + 1 returning last",
      values: [book.id, businessDay],
    });
    number = String(counted.rows[0].last).padStart(4, "0");
    await client.query({
      name: "order",
      text:
        "insert into orders values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)",
      values: [
        book.id, id, number, businessDay, "pending", request.body.table_id ?? null, order.customer_name, "EUR",
        order.subtotal, book.tax, order.tax, order.tip, order.discount, order.deposit, order.total,
        request.get("idempotency-key") ?? null, claims.userId, at, at,
      ],
    });
    await client.query("commit");
  } catch (error) {
    await client.query("rollback");
    throw error;
  } finally {
    client.release();
  }
  response.status(201).set("ETag", '"1"').json({
    success: true,
    data: {
      id, restaurant_id: book.id, order_number: number, business_day: businessDay, status: "pending", items: order.items,
      currency: "EUR", subtotal: order.subtotal, tax_basis_points: book.tax, tax_amount: order.tax, tip_amount: order.tip,
      discount_amount: order.discount, deposit_used: order.deposit, total: order.total, created_at: at, updated_at: at,
      table_id: request.body.table_id ?? null, customer_name: order.customer_name, notes: order.notes, version: 1,
      sync: { state: "pending" },
    },
  });
}

const app = express();
app.disable("x-powered-by");
app.disable("etag");
app.use(express.json({ limit: "1mb" }));
app.get("/health/ready", (_, response) => response.json({ status: "ready" }));
app.post("/api/orders", place);
app.use((error, _request, response, _next) => {
  const status = error.status ?? 500;
  response.status(status).json({
    success: false,
    error: { message: error.message, code: error.code ?? "internal", details: { field: error.field } },
  });
});
app.listen(Number(process.env.BENCH_PORT), "127.0.0.1");
