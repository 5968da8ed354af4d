"""Linear SVMs of all classes at once: the solver, the choice of C, and the metrics that judge them."""
