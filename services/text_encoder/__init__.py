"""The text encoder's room: prompts to text embeddings."""
