"""The notifier pushes every change to the screens that may see it.

changes.log.v1 ─► follower ─► events (change → push event) ─► window (what a cursor can resume)
                                                          └─► hub (fan-out) ─► transports/* ─► screens
"""
