"""Causes faults at random times under load, and then proves that nothing was lost or doubled. The schedule is computed
from a seed: `make chaos SEED=7` repeats it.

    schedule.py   the faults and their times: pure
    rig.py        the system under test, behind proxies, and how each fault begins and ends
    load.py       creations, concurrent changes, payments, repeats; remembers every reply
    screens.py    a screen of each restaurant
    run.py        one whole run, from the first fault to the proof
    idle.py       waits until no change is under way
    stores.py     reads the content of all stores
    proof.py      checks it: pure
"""
