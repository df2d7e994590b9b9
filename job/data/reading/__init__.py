"""Files -> rows, in chunks of flat memory; a row that can't be read costs that row alone."""
