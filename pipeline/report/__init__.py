"""Figures, the HTML report and the model card, drawn from artifacts alone."""
