"""Plain functions of arrays: no modules, no parameters of their own."""
