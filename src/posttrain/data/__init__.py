"""Everything between a file of data and token samples: rows, formats, chat rendering, and their diagnosis."""
