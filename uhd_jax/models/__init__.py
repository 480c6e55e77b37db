"""Linen modules that own parameters, and `uhd`, the whole model as functions of a parameter tree."""
