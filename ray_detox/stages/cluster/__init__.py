"""The Ray cluster: connect, nodes, admission, probes and the number of workers."""
