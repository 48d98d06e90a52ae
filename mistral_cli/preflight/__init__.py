"""`mistral preflight`: checks whether a cluster can run a release. It changes nothing.

`release` reads what would be installed, `collectors` ask the cluster and the servers beside it, `checks` compare the
two, and `report` prints the findings. Only the collectors send requests.
"""
