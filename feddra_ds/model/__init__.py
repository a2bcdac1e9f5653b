"""The dual encoder on a single device: encoders, alignment module, adapters, processor, folders. Knows no ranks."""

SIDES = ("vision", "text")
