"""From a module to graphs: the tracer, regions, one graph per state of the module tree, and the class swap."""
