"""``dataset:sql``: the rows of a query as documents."""
