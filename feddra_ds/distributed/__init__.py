"""Ranks and messages: who is where, who lives, how they meet. Knows no model."""
