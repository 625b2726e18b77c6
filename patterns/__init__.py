"""What to look for in a captured graph: one file per pattern. Patterns return matches or reasoned refusals and change nothing."""
