"""The push hub: what was changed, on every screen that may see it.

changes.log.v1 ─► follower ─► events (change → push event) ─► window (what a cursor can be given again)
                                                          └─► hub (fan-out) ─► transports/* ─► screens
"""
