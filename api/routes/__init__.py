"""One file a noun; an endpoint is its schema and one call into shared."""
