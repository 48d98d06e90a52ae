"""`mistral preflight`: says what a cluster lacks for a release, with the command that fixes it. It changes nothing.

`release` reads what would be installed, `collectors` ask the cluster and the servers beside it, `checks` compare the
two, and `report` prints the findings. Only the collectors send requests.
"""
