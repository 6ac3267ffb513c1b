"""``ccpo bench``: how fast the library is, beside its peers and the machine's limit, on the same work in one process tree."""
