"""What a user may set: schema, loading, contradictions, the reference page. Loads without torch."""
