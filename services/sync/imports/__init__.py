"""Imports orders of another system: one at a time over HTTP, or in bulk from a file or a database.

Guarantee: an external order becomes one order, however often it is sent. An interrupted import continues where it
stopped. Bulk imports use the background lane, so that they do not delay new orders.

    external_orders.py         the format of external orders, and their merge into our orders; pure
    external_order_upserts.py  commits one external order
    columns.py                 the columns of CSV files and queries, and the check of their names; pure
    cells.py                   amounts and times of cells; pure
    text_files.py              encodings, gzip, and the place of the first bad byte
    csv_files.py               separators, headings, and the rows of one order
    sources.py                 reads rows from JSON lines, CSV or another PostgreSQL
    importer.py                imports all rows of a source and stores the progress
    forecast.py                computes the outcome of an import
    routes.py, commands.py     POST /api/sync/order and `ticketrail import`

Others may use: `external_order_upserts` and `routes` (api.py), `commands` (the command line). The rest is internal.
"""
