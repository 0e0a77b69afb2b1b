"""Removal of channels, neurons and heads: the budget, the plan, the cut and its report."""
