"""Scores: tasks with their metrics, every answer kept."""
