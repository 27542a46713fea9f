"""Objects outside Temporal: the content of files. The store holds bytes and decides nothing: Temporal names them."""
