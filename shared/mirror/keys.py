"""Names of everything in the mirror. A tenant's keys carry the restaurant as hash tag; the rail's own do not.

    {restaurant}:<entity>:<id>       hash   v version, c change id, d state, p accepted at (ms), h stock
    {restaurant}:claim:<entity>:<id> hash   v, c, e event, n number, at (ms), server (run id), marked, stored,
                                            h reserved items
    {restaurant}:live:<entity>       zset   id by place in the index (creation time)
    {restaurant}:pending:<entity>    zset   id by place in the index: not in PostgreSQL yet
    {restaurant}:failed:<entity>     hash   id -> error, attempts, last attempt
    {restaurant}:stock:<item>        hash   count, since, sum; order id -> what it takes (scripts/stock.lua)
    {restaurant}:number:<day>        int    last order number of a business day
    {restaurant}:restaurant          text   the restaurant's settings, for pricing while PostgreSQL is away
    ticketrail:warm                  text   run id of the Redis process that the mirror writer has filled
    ticketrail:log                   hash   epoch, offset: how far the mirror writer has applied the log; lost
    ticketrail:claims                zset   <restaurant>|<entity>|<id> by time of the claim (ms)
    ticketrail:conflicts             set    <restaurant>|<entity>|<id> with an open conflict, as PostgreSQL knows them
    ticketrail:restaurants           set    restaurant ids
    ticketrail:bucket:<whose>        hash   t tokens, at (ms): for limits on requests
    ticketrail:heartbeats            hash   lane -> time at which PostgreSQL stored its last heartbeat (ISO 8601)

Scripts touch both kinds, so the mirror is one primary with replicas, not a cluster.
"""

LAYOUT_VERSION = 1
"""Raise it with every change of a name, a type or a field above: data with other keys does not fit."""

WARM = "ticketrail:warm"
LOG = "ticketrail:log"
CLAIMS = "ticketrail:claims"
CONFLICTS = "ticketrail:conflicts"
RESTAURANTS = "ticketrail:restaurants"
HEARTBEATS = "ticketrail:heartbeats"


def doc(restaurant: str, entity: str, id_: str) -> str:
    return f"{{{restaurant}}}:{entity}:{id_}"


def claim(restaurant: str, entity: str, id_: str) -> str:
    return f"{{{restaurant}}}:claim:{entity}:{id_}"


def live(restaurant: str, entity: str) -> str:
    return f"{{{restaurant}}}:live:{entity}"


def pending(restaurant: str, entity: str) -> str:
    return f"{{{restaurant}}}:pending:{entity}"


def failed(restaurant: str, entity: str) -> str:
    return f"{{{restaurant}}}:failed:{entity}"


def number(restaurant: str, business_day: str) -> str:
    return f"{{{restaurant}}}:number:{business_day}"


def stock(restaurant: str, inventory_item: str) -> str:
    return f"{{{restaurant}}}:stock:{inventory_item}"


def bucket(whose: str) -> str:
    return f"ticketrail:bucket:{whose}"


def restaurant(restaurant_id: str) -> str:
    return f"{{{restaurant_id}}}:restaurant"


def member(restaurant: str, entity: str, id_: str) -> str:
    return f"{restaurant}|{entity}|{id_}"
