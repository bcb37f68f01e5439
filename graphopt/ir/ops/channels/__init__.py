"""Rules of the `channels` and `repair` columns, one file a family; the rows of the op table name them.

A `channels` rule says which coordinates of which axes are the same channel, what is exact about removing one, and
what its results' axes are. A `repair` rule says which attributes and size operands follow once channels are gone.
"""
