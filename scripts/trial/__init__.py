"""What the trials share: servers in processes of their own, work to do, and the books of a run to be checked."""
