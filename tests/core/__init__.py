"""Tests of the attention core: masks, layouts, tiles, plans, executor, operator."""
