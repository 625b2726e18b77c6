"""Models by the names that commands take, and example inputs for them."""
