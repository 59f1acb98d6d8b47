import importlib.util
from pathlib import Path
from typing import Any
from hypothesis import given, settings, HealthCheck
import asyncio
import msgspec
import pytest
from services.sync.writer import upsert
from shared.entities.contract import encode, Change
from shared.entities.entity import Entity
from shared.entities.order.merge import merge
from shared.entities import registry
from tests.integration.test_upsert import urls, owner, database, written, write_batch  # noqa
from tests.rigs import builders, order_law
from tests.rigs.newer_release import registered

spec = importlib.util.spec_from_file_location("draft_order", "drafts/order-model/entity.py")
draft = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draft)
E = draft.ENTITY


async def test_flip(owner, database, monkeypatch):
    await owner.execute(Path("drafts/order-model/0009_orders.sql").read_text())
    monkeypatch.setitem(upsert._STATEMENTS, "order", upsert._statements(E))
    from random import Random
    with registered(E):
        seen = {"lines": 0, "voids": 0, "pay": 0, "holds": 0}
        for seed in range(40):
            h = order_law.histories().example() if hasattr(order_law, "histories") else None
            states = [s.after for s in h.steps] + h.branches
            at = max(s.updated_at for s in states)
            final = states[0]
            for b in states[1:]:
                final = merge(final, b)
            chs = []
            base = None
            for s in [*states, final]:
                c = builders.change(s, base=base)
                e, st = registry.read(c)
                assert st == s
                chs.append(c); base = c
            await owner.execute("truncate orders, order_items, payments, order_holds, order_voids, changes, conflicts")
            await write_batch(database, written(*chs), timeout_seconds=20.0)
            n = await database.fetchval("select count(*) from order_items")
            assert n == len(final.items)
            v = await database.fetchval("select count(*) from order_voids")
            assert v == len({x.id for s in states for l in s.items for x in l.voids}), v
            p = await database.fetchval("select count(*) from payments")
            assert p == len({x.id for s in states for x in s.payments})
            hh = await database.fetchval("select coalesce(sum(quantity),0) from order_holds")
            assert hh == sum(x.quantity for x in final.holds)
            row = await database.fetchrow("select * from orders")
            assert (row["due"], row["balance"], row["status"]) == (final.due, final.balance, final.status.value)
            seen["lines"] += n; seen["voids"] += v; seen["pay"] += p; seen["holds"] += hh
    print(seen)
    assert all(seen.values())
