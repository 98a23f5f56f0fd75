"""The U-Net's room: noise and text embeddings to clean latents, in one step."""
