"""Answers over HTTP in the form of OpenAI's chat completions, for existing clients."""
