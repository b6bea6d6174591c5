"""Tests. Helpers are imported as ``tests.closeness``, ``tests.ranks``, ``tests.grid``."""
