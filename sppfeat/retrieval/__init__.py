"""Galleries and their search: whitening, index, gallery, duplicates, and the evaluation of rankings."""
