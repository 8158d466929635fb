"""What is shown of the backends before and after a run: the badge on a node, the table of this machine."""
