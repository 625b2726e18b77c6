"""What to look for in a captured graph: patterns look at a node and its neighbours, give matches or reasons why not, and change nothing."""
