"""Recipes times data sets: each described once, evaluated by its protocol, and told in one table and one page."""

from __future__ import annotations

from sppfeat.matrix.page import write_matrix_page
from sppfeat.matrix.reading import DataSet, read_data, read_recipes
from sppfeat.matrix.running import Cell, evaluate_matrix, table

__all__ = ["Cell", "DataSet", "evaluate_matrix", "read_data", "read_recipes", "table", "write_matrix_page"]
