"""Answers: sampling, cached decoding, and the object a user holds."""
