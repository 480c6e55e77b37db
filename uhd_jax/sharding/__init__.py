"""How arrays lie over devices: the mesh, and one table of rules for parameters."""
