"""What to look for in a captured graph: patterns look at one node and its neighbours, give matches or reasons why not, and change nothing."""
