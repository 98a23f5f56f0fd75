"""The decoder's room: latents to encoded images."""
