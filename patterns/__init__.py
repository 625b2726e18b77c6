"""What to look for in a captured graph. Patterns look at one node and its neighbours, give matches or reasoned refusals, and change nothing."""
