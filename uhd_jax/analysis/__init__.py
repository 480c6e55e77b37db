"""What a run did: its report and its pictures."""
