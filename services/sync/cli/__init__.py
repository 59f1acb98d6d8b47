"""The command `ticketrail`: its entry point, and the commands that belong to no feature.

Commands of a feature are in its package, as `commands.py`. The command line never imports the web framework, so that it
starts quickly.

    main.py           the entry point: puts all commands together; `migrate` and `token`
    seed.py           `seed`, the demo restaurant
    users.py          `user`; user_accounts.py has its SQL
    menu.py           `dish`
    orders.py         `orders`, and finding an order by id, prefix or number
    journal.py        `journal`
    status_screen.py  `status`
    trace_search.py   `trace`; waterfall.py draws the traces that it finds

Nothing else imports this package.
"""
